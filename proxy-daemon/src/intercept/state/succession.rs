//! Whose programs are in force when several daemons run: who replaces another one tells by a lock that it lives. If the lock is
//! free although it should be held, the one that was replaced, and still serves, takes over again: so a successor that crashes, or is
//! told to end, leaves no node without interception.

use std::fs;
use std::path::{Path, PathBuf};

use super::{NEXT, State};
use crate::intercept::cgroups::Hooks;
use crate::intercept::error::InterceptError;
use crate::intercept::lease::Lease;
use crate::intercept::{inherit, kernel};

/// What the names of the daemons' marks begin with; the daemon's number follows.
const MARK: &str = "daemon-";

impl State {
    /// Marks that this daemon lives, to be called before its maps are pinned.
    pub(super) fn announce(&mut self) {
        let Some(mark) = self.own_mark() else { return };
        // A second handle would not get the lock.
        self.alive = None;
        let made = fs::create_dir_all(&mark).and_then(|()| Lease::take(&mark));
        match made {
            Ok(lease) => self.alive = Some(lease),
            Err(error) => {
                tracing::warn!(%error, "if this daemon ends, the one that it replaces does not take over again");
            }
        }
    }

    fn own_mark(&self) -> Option<PathBuf> {
        kernel::number(&self.ebpf).map(|own| self.mark_of(own))
    }

    fn mark_of(&self, number: u32) -> PathBuf {
        self.config.pin_path.join(format!("{MARK}{number}"))
    }

    pub(super) fn remove_own_mark(&mut self) {
        self.alive = None;
        if let Some(mark) = self.own_mark() {
            // Fails where there is none.
            let _ = fs::remove_dir(mark);
        }
    }

    /// Takes over again if the daemon that replaced this one is gone. What goes wrong is one of the faults, and tried again until it works;
    /// returned where it is news.
    pub(super) fn look_after_successor(&mut self) -> Option<InterceptError> {
        if !self.took_over || self.ends {
            return None;
        }
        let tries_again = self.succession_fault.is_some() && !self.others_are_pinned();
        if !tries_again && !self.is_left() {
            self.was_followed |= self.is_followed();
            self.succession_fault = None;
            return None;
        }
        let done = self.take_next().and_then(|free| {
            // Another one is about to take over, or has just done so.
            if !free || !(tries_again || self.is_left()) {
                self.next = None;
                return Ok(false);
            }
            if !tries_again {
                tracing::warn!("the daemon that replaced this one is gone: this one takes over again");
            }
            self.take_back().map(|()| true)
        });
        self.took_over = true;
        match done {
            Ok(done) => {
                self.was_followed &= !done;
                self.succession_fault = None;
                None
            }
            Err(error) => {
                let fault = Some(format!("cannot take over again: {error}"));
                let known = std::mem::replace(&mut self.succession_fault, fault);
                (known != self.succession_fault).then_some(error)
            }
        }
    }

    /// Has others see that this daemon is about to take over; whether no other is.
    pub(super) fn take_next(&mut self) -> Result<bool, InterceptError> {
        // Of a try that failed: a second handle would not get the lock.
        if self.next.as_ref().is_some_and(Lease::is_held) {
            return Ok(true);
        }
        let next = self.config.pin_path.join(NEXT);
        self.make_directory(&next)?;
        let lease =
            Lease::take(&next).map_err(|source| InterceptError::PinPath { path: next, reason: source.to_string() })?;
        let free = lease.is_held();
        self.next = free.then_some(lease);
        Ok(free)
    }

    /// Whether another daemon took over, and is gone.
    fn is_left(&self) -> bool {
        let pinned = self.pinned();
        if pinned.is_empty() {
            // It removed everything, as it does if it does not know of us.
            return !inherit::maps_directory(&self.config.pin_path).exists();
        }
        // A daemon without a mark is of a release that made none: it is taken to live.
        let is_gone = |number: &u32| Lease::take(&self.mark_of(*number)).is_ok_and(|lease| lease.is_held());
        self.are_others(&pinned) && pinned.iter().all(is_gone)
    }

    fn take_back(&mut self) -> Result<(), InterceptError> {
        // The directory may be another one by now.
        self.lease = None;
        self.lease = Lease::take(&self.config.pin_path).ok();
        // What is looked at now is ours again.
        self.took_over = false;
        self.attachments.drain().for_each(|(_, attachment)| attachment.leave());
        self.hooks.iter_mut().for_each(Hooks::attach_anew);
        // The other one's programs connected sockets, and it was told of pods.
        self.inherits_sockets = true;
        // It may have been written by a later release: what this daemon knows has to do.
        if let Err(error) = self.recall() {
            tracing::warn!(%error, "what was enrolled by command meanwhile is not known");
        }
        self.reconcile_addresses()?;
        // Before others with their addresses are enrolled.
        let links = self.links()?;
        self.leave_gone(&links);
        self.reconcile_pods();
        self.take_over()
    }

    /// Has the daemon that this one replaced take over again, if there is one; says whether.
    pub(in crate::intercept) fn hand_back(&mut self) -> bool {
        self.ends = true;
        self.alive = None;
        // The oldest of three has no predecessor, but the one in the middle may serve.
        self.took_over && (self.has_predecessor() || self.others_live())
    }

    /// Whether another daemon that has taken over once lives, and was not told to end.
    fn others_live(&self) -> bool {
        let own = self.own_mark();
        let mut others = marks(&self.config.pin_path).filter(|mark| Some(mark) != own.as_ref());
        others.any(|mark| Lease::take(&mark).is_ok_and(|lease| !lease.is_held()))
    }

    /// Has new connections go their own way, unless it is another daemon that they go to.
    pub(in crate::intercept) fn let_pass(&mut self) -> Result<(), InterceptError> {
        self.ends = true;
        // One that only waits for its listeners has programs of its own, which do not look at this.
        if self.others_are_pinned() { Ok(()) } else { kernel::set_ending(&mut self.ebpf) }
    }
}

/// Removes the marks of daemons that are gone.
pub(super) fn remove_stale_marks(pin_path: &Path) {
    let is_stale = |mark: &Path| Lease::take(mark).is_ok_and(|lease| lease.is_held());
    for mark in marks(pin_path).filter(|mark| is_stale(mark)) {
        // What is left is in nobody's way.
        let _ = fs::remove_dir(mark);
    }
}

fn marks(pin_path: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(pin_path).into_iter().flatten().filter_map(Result::ok);
    let marks = entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(MARK.as_bytes()));
    marks.map(|entry| entry.path())
}
