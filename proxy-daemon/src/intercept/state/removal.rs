//! What becomes of all this when the daemon ends, and of what earlier ones left.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{NEXT, State, succession};
use crate::intercept::error::InterceptError;
use crate::intercept::kernel;
use crate::intercept::lease::Lease;
use crate::intercept::pinned;

impl State {
    /// Whether another daemon has taken over, or is about to.
    pub(super) fn is_superseded(&self) -> bool {
        if self.waits.is_some() {
            return self.has_predecessor();
        }
        // Who marked it and died takes over nothing.
        let next = self.config.pin_path.join(NEXT);
        let is_ours = self.next.as_ref().is_some_and(Lease::is_held);
        if !is_ours && next.exists() && Lease::take(&next).is_ok_and(|lease| !lease.is_held()) {
            return true;
        }
        self.others_are_pinned()
    }

    /// Whether another daemon has taken over from this one, so that nothing of the node is to be changed any more.
    pub(in crate::intercept) fn is_followed(&self) -> bool {
        self.took_over && self.others_are_pinned()
    }

    pub(super) fn others_are_pinned(&self) -> bool {
        self.are_others(&self.pinned())
    }

    /// Whether the daemons of these numbers are others than this one.
    pub(super) fn are_others(&self, pinned: &[u32]) -> bool {
        // What is gone, or cannot be read, says nothing of another daemon.
        !pinned.is_empty() && kernel::number(&self.ebpf).is_some_and(|own| !pinned.contains(&own))
    }

    /// The numbers of the daemons whose maps are pinned.
    pub(super) fn pinned(&self) -> Vec<u32> {
        map_directories(&self.config.pin_path).iter().filter_map(|directory| kernel::pinned_number(directory)).collect()
    }

    /// Removes all that was made, as far as possible, unless it is another daemon's by now.
    pub(in crate::intercept) fn remove(&mut self) -> Result<(), InterceptError> {
        self.spare.clear();
        if self.is_superseded() {
            tracing::info!("another daemon has taken over: kernel programs and routing are left to it");
            self.attachments.drain().for_each(|(_, attachment)| attachment.leave());
            self.remove_own_mark();
            if self.waits.is_some() {
                self.next = None;
                let _ = fs::remove_dir(self.config.pin_path.join(NEXT));
            }
            return Ok(());
        }
        // A daemon that this one replaced must not take over again before all is gone: what it pins would go, too.
        let next = self.config.pin_path.join(NEXT);
        if let Err(error) = self.take_next() {
            tracing::debug!(%error, "a daemon that takes over meanwhile may lose what it pins");
        }
        let mut failures: Vec<String> = Vec::new();
        // Programs first: without rule and route, what they redirect would go astray.
        for (_, attachment) in self.attachments.drain() {
            failures.extend(attachment.detach().err());
        }
        let removed =
            |directory: PathBuf| remove_pins(&directory).err().map(|error| format!("{}: {error}", directory.display()));
        failures
            .extend(["links", "cgroups"].map(|name| self.config.pin_path.join(name)).into_iter().filter_map(removed));
        for is_ipv6 in std::mem::take(&mut self.routed) {
            let (mark, table) = (self.config.mark, self.config.route_table);
            let rule = self.netlink.delete_rule(is_ipv6, mark, table);
            failures.extend(rule.err().map(|error| format!("rule of mark {mark:#x}: {error}")));
            let route = self.netlink.delete_local_route(is_ipv6, table, self.loopback);
            failures.extend(route.err().map(|error| format!("route of table {table}: {error}")));
        }
        // Last what tells that somebody is there.
        failures.extend(map_directories(&self.config.pin_path).into_iter().filter_map(removed));
        let _ = fs::remove_dir(next);
        self.next = None;
        self.alive = None;
        succession::remove_stale_marks(&self.config.pin_path);
        // The mark of a daemon that lives, which takes over now, stays.
        let in_use = [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty];
        if let Err(error) = fs::remove_dir(&self.config.pin_path)
            && !in_use.contains(&error.kind())
        {
            failures.push(format!("{}: {error}", self.config.pin_path.display()));
        }
        if failures.is_empty() { Ok(()) } else { Err(InterceptError::Remove(failures.join("; "))) }
    }
}

/// The directories of maps below a pin path, of whatever layout.
pub(in crate::intercept) fn map_directories(pin_path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pin_path).into_iter().flatten().filter_map(Result::ok);
    // The first layout had no number.
    let is_ours = |name: &[u8]| name == b"maps" || name.starts_with(b"maps-");
    entries.filter(|entry| is_ours(entry.file_name().as_encoded_bytes())).map(|entry| entry.path()).collect()
}

/// Removes what is pinned in a directory.
pub(super) fn remove_pinned_in(directory: &Path) -> Result<(), InterceptError> {
    let error = |source: io::Error| InterceptError::PinPath { path: directory.to_owned(), reason: source.to_string() };
    for entry in fs::read_dir(directory).map_err(error)? {
        entry.and_then(|entry| pinned::remove(&entry.path())).map_err(error)?;
    }
    Ok(())
}

/// Removes a directory of pins.
pub(in crate::intercept) fn remove_pins(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        pinned::remove(&entry?.path())?;
    }
    fs::remove_dir(directory)
}
