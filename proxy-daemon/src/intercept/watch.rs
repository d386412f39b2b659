//! Follows the node's interfaces and addresses as they come and go.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::State;
use super::error::InterceptError;
use super::netlink::{Event, Monitor};

/// The thread that follows. Dropping it stops the thread.
pub(super) struct Watcher {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts the thread; it works in the calling thread's network namespace.
    pub(super) fn start(monitor: Monitor, state: Arc<Mutex<State>>) -> Result<Self, InterceptError> {
        let failed = |source: io::Error| InterceptError::Netlink { action: "watch interfaces".to_owned(), source };
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|errno| failed(errno.into()))?);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("intercept-watch".to_owned())
            .spawn(move || {
                if let Err(error) = follow(&monitor, &stopped, &state) {
                    tracing::error!(%error, "interfaces and addresses are no longer followed; restart culvertd");
                }
            })
            .map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "cannot stop the thread that watches interfaces");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watched interfaces had panicked");
        }
    }
}

fn follow(monitor: &Monitor, stop: &EventFd, state: &Mutex<State>) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if fds[1].any().unwrap_or(false) {
            return Ok(());
        }
        let events = monitor.events()?;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        for error in apply(&mut state, events) {
            tracing::warn!(%error, "interception does not follow a change of the node");
        }
    }
}

/// Applies what happened; returns what could not be applied.
fn apply(state: &mut State, events: Vec<Event>) -> Vec<InterceptError> {
    let mut errors = Vec::new();
    let mut addresses_changed = false;
    for event in events {
        match event {
            Event::Link(link) => errors.extend(state.reconcile_link(&link).err()),
            Event::LinkGone(index) => errors.extend(state.forget_link(index).err()),
            // An address may be on two interfaces: only a listing tells whether the host still has it.
            Event::Address(_) | Event::AddressGone(_) => addresses_changed = true,
            Event::Lost => {
                tracing::debug!("interface events were lost; listing anew");
                addresses_changed = true;
                errors.extend(state.reconcile_all_links().err());
            }
        }
    }
    if addresses_changed {
        errors.extend(state.reconcile_addresses().err());
    }
    errors
}
