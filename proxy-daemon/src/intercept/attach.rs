//! Attaches the packet programs to interfaces, so that they stay when the daemon dies.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};

use super::error::{InterceptError, chain};
use super::netlink::Link;
use super::pinned;

/// Which packets an interface brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// What a pod sends.
    Outbound,
    /// What comes from other nodes.
    Inbound,
}

impl Direction {
    /// The program that sees these packets.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Outbound => "redirect_outbound",
            Self::Inbound => "redirect_inbound",
        }
    }
}

/// How programs are attached on this kernel.
#[derive(Clone, Debug)]
pub(super) enum Method {
    /// By TCX links, pinned in this directory under the interface's index.
    Tcx(PathBuf),
    /// By filters of a clsact queueing discipline, which need no pins to stay.
    Clsact,
}

/// A program on an interface.
pub(super) struct Attachment {
    /// What it is there for.
    pub(super) direction: Direction,
    interface: String,
    held: Held,
}

enum Held {
    /// And where.
    Pinned(PinnedLink, PathBuf),
    Filter(SchedClassifierLink),
}

impl Attachment {
    /// Attaches, or puts the program in the place of the one that an earlier daemon left.
    pub(super) fn new(
        ebpf: &mut Ebpf,
        link: &Link,
        direction: Direction,
        method: &Method,
    ) -> Result<Self, InterceptError> {
        let program = classifier(ebpf, direction)?;
        let held = match method {
            Method::Tcx(directory) => attach_tcx(program, link, &directory.join(link.index.to_string())),
            Method::Clsact => attach_clsact(program, link, direction),
        }
        .map_err(|reason| InterceptError::Attach {
            program: direction.program(),
            interface: link.name.clone(),
            reason,
        })?;
        Ok(Self { direction, interface: link.name.clone(), held })
    }

    /// Leaves the program where it is: it is a successor's by now.
    pub(super) fn leave(self) {
        match self.held {
            // A pin keeps its link.
            Held::Pinned(link, _) => drop(link),
            Held::Filter(link) => std::mem::forget(link),
        }
    }

    /// Detaches. An interface that is gone took its program along.
    pub(super) fn detach(self) -> Result<(), String> {
        match self.held {
            // Without its pin it goes with our handle.
            Held::Pinned(_link, pin) => {
                pinned::remove(&pin).map_err(|error| format!("pinned link of {}: {error}", self.interface))?;
            }
            Held::Filter(link) => drop(link),
        }
        Ok(())
    }

    /// Whether the program is on the interface of this name.
    pub(super) fn is_on(&self, interface: &str) -> bool {
        self.interface == interface
    }

    /// Notes that the interface has a new name.
    pub(super) fn rename(&mut self, interface: &str) {
        interface.clone_into(&mut self.interface);
    }
}

/// The loaded program for a direction.
pub(super) fn classifier(ebpf: &mut Ebpf, direction: Direction) -> Result<&mut SchedClassifier, InterceptError> {
    let name = direction.program();
    let missing = || InterceptError::Load { name: name.to_owned(), reason: "not in the kernel object".to_owned() };
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    program.try_into().map_err(|error: ProgramError| InterceptError::load(name, &error))
}

/// Removes pinned links that no attachment of this daemon uses: interfaces that no longer exist or match.
pub(super) fn remove_stale_pins(directory: &Path, is_used: impl Fn(u32) -> bool) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let used = entry.file_name().to_str().and_then(|name| name.parse().ok()).is_some_and(&is_used);
        if !used {
            pinned::remove(&entry.path())?;
        }
    }
    Ok(())
}

fn attach_tcx(program: &mut SchedClassifier, link: &Link, pin: &Path) -> Result<Held, String> {
    // One step from the old program to the new: no packet sees both, and none sees neither.
    if let Ok(old) = PinnedLink::from_pin(pin) {
        let replaced = SchedClassifierLink::try_from(FdLink::from(old))
            .map_err(|error| chain(&error))
            .and_then(|old| program.attach_to_link(old).map_err(|error| chain(&error)))
            .and_then(|id| program.take_link(id).map_err(|error| chain(&error)));
        match replaced {
            Ok(_open_link) => {
                let pinned = PinnedLink::from_pin(pin).map_err(|error| chain(&error))?;
                return Ok(Held::Pinned(pinned, pin.to_owned()));
            }
            // Mostly because the interface that the link belonged to is gone, and another has its index now.
            Err(reason) => {
                tracing::debug!(
                    interface = link.name,
                    reason,
                    "a link of an earlier daemon takes no other program: a new one is made"
                );
            }
        }
    }
    // First, because programs of network plugins may decide about a packet in a way that ends the chain; ours passes on
    // whatever it does not take.
    let id = program
        .attach_with_options(&link.name, TcAttachType::Ingress, TcAttachOptions::TcxOrder(LinkOrder::first()))
        .map_err(|error| chain(&error))?;
    let attached = program.take_link(id).map_err(|error| chain(&error))?;
    let attached = FdLink::try_from(attached).map_err(|error| chain(&error))?;
    // Before what is left of an earlier one goes: an interface is never without.
    let fresh = pin.with_file_name(format!("{}-new", link.index));
    let _ = fs::remove_file(&fresh);
    attached.pin(&fresh).map_err(|error| format!("{}: {}", fresh.display(), chain(&error)))?;
    pinned::detach(pin);
    fs::rename(&fresh, pin).map_err(|error| format!("{}: {error}", pin.display()))?;
    let pinned = PinnedLink::from_pin(pin).map_err(|error| format!("{}: {}", pin.display(), chain(&error)))?;
    Ok(Held::Pinned(pinned, pin.to_owned()))
}

fn attach_clsact(program: &mut SchedClassifier, link: &Link, direction: Direction) -> Result<Held, String> {
    match qdisc_add_clsact(&link.name) {
        Ok(()) | Err(TcError::AlreadyAttached) => {}
        Err(error) if is_existing(&error) => {}
        Err(error) => return Err(format!("clsact: {}", chain(&error))),
    }
    // A filter that an earlier daemon left. Between this and the next step the interface has no program.
    match qdisc_detach_program(&link.name, TcAttachType::Ingress, direction.program()) {
        Ok(()) => {}
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("filter of an earlier daemon: {}", chain(&error))),
    }
    let options = NlOptions { priority: 1, ..NlOptions::default() };
    let id = program
        .attach_with_options(&link.name, TcAttachType::Ingress, TcAttachOptions::Netlink(options))
        .map_err(|error| chain(&error))?;
    program.take_link(id).map(Held::Filter).map_err(|error| chain(&error))
}

fn is_existing(error: &TcError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
            return true;
        }
        cause = error.source();
    }
    false
}
