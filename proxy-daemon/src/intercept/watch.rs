//! Follows the node's interfaces and addresses as they come and go.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::error::InterceptError;
use super::netlink::{Event, Monitor};
use super::state::State;

/// How often what failed is tried again, in milliseconds.
const RETRY: u16 = 250;
/// How often it is looked, in milliseconds, whether another daemon has taken over, and whether rule and route are there.
const LOOK: u16 = 1000;

/// The thread that follows. Dropping it stops the thread.
pub(super) struct Watcher {
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts the thread; it works in the calling thread's network namespace. `wake` has it look at the state.
    pub(super) fn start(
        monitor: Monitor,
        state: Arc<Mutex<State>>,
        wake: Arc<EventFd>,
    ) -> Result<Self, InterceptError> {
        let failed = |source: io::Error| InterceptError::Netlink { action: "watch interfaces".to_owned(), source };
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, woken) = (Arc::clone(&stop), Arc::clone(&wake));
        let thread = std::thread::Builder::new()
            .name("intercept-watch".to_owned())
            .spawn(move || {
                if let Err(error) = follow(&monitor, &stopped, &woken, &state) {
                    tracing::error!(%error, "interfaces and addresses are no longer followed; restart culvertd");
                }
            })
            .map_err(failed)?;
        Ok(Self { stop, wake, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.wake.write(1) {
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

fn follow(monitor: &Monitor, stop: &AtomicBool, wake: &EventFd, state: &Mutex<State>) -> io::Result<()> {
    loop {
        let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
        let timeout = PollTimeout::from(if lock().is_settled() { LOOK } else { RETRY });
        let mut fds = [PollFd::new(monitor.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(nix::Error::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if stop.load(Ordering::Acquire) {
            return Ok(());
        }
        if fds[1].any().unwrap_or(false) {
            wake.read()?;
        }
        let events = monitor.events()?;
        let mut state = lock();
        let mut errors = apply(&mut state, events);
        errors.extend(state.retry());
        for error in errors {
            tracing::warn!(%error, "interception does not follow a change of the node");
        }
    }
}

/// Applies what happened; returns what could not be applied.
fn apply(state: &mut State, events: Vec<Event>) -> Vec<InterceptError> {
    let mut errors = Vec::new();
    let (mut addresses_changed, changed) = (false, !events.is_empty());
    for event in events {
        match event {
            Event::Link(link) => errors.extend(state.reconcile_link(&link).err()),
            Event::LinkGone(index) => errors.extend(state.link_gone(index).err()),
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
    if changed {
        state.reconcile_pods();
    }
    errors
}
