//! What a worker keeps for the override filters of all its listeners.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::stats::{Counter, Scope};

/// The most services, and the most addresses, that are counted on their own. The rest counts as `other`.
const MAX_COUNTED: usize = 500;
const SECOND: Duration = Duration::from_secs(1);

/// What a worker keeps for the override filters. Lives on the worker's thread.
#[derive(Debug, Default)]
pub struct OverrideState {
    /// When the second began that is counted, and how many requests were logged in it.
    logged: Cell<Option<(Instant, u32)>>,
    to: RefCell<HashMap<Box<str>, Contexts>>,
    from: RefCell<HashMap<IpAddr, Contexts>>,
}

/// What a request carries of a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    /// Overrides.
    Overrides,
    /// A trace context without overrides.
    Trace,
    Nothing,
}

/// Counts requests by what they carry.
#[derive(Debug, Clone, Copy)]
struct Contexts {
    overrides: Counter,
    trace: Counter,
    nothing: Counter,
}

impl Contexts {
    fn new(direction: &str, who: &str) -> Contexts {
        let scope = Scope::new("override_context").child(direction).tagged("culvert_context_of", who);
        let counter = |leaf: &str| scope.counter(leaf);
        Contexts { overrides: counter("overrides"), trace: counter("trace_only"), nothing: counter("nothing") }
    }

    fn count(self, carries: Carries) {
        match carries {
            Carries::Overrides => self.overrides.inc(),
            Carries::Trace => self.trace.inc(),
            Carries::Nothing => self.nothing.inc(),
        }
    }
}

impl OverrideState {
    /// Whether one more request may be logged in this second.
    pub(super) fn may_log(&self, now: Instant, most: u32) -> bool {
        let (began, count) = match self.logged.get() {
            Some((began, count)) if now.saturating_duration_since(began) < SECOND => (began, count),
            _ => (now, 0),
        };
        self.logged.set(Some((began, count.saturating_add(1))));
        count < most
    }

    /// Counts a request to a cluster from an address.
    pub(super) fn count(&self, cluster: Option<&str>, source: IpAddr, carries: Carries) {
        if let Some(cluster) = cluster {
            let known = self.to.borrow().get(cluster).copied();
            let counters = known.unwrap_or_else(|| {
                let mut to = self.to.borrow_mut();
                let name = if to.len() < MAX_COUNTED { cluster } else { "other" };
                *to.entry(name.into()).or_insert_with(|| Contexts::new("to", name))
            });
            counters.count(carries);
        }
        let known = self.from.borrow().get(&source).copied();
        let counters = known.unwrap_or_else(|| {
            let mut from = self.from.borrow_mut();
            let is_room = from.len() < MAX_COUNTED;
            // The unspecified address stands for the rest: nobody comes from it.
            let key = if is_room { source } else { IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED) };
            let name = if is_room { source.to_string() } else { "other".to_owned() };
            *from.entry(key).or_insert_with(|| Contexts::new("from", &name))
        });
        counters.count(carries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_are_logged_in_a_second() {
        let (state, now) = (OverrideState::default(), Instant::now());
        let logs = |at: Duration| state.may_log(now + at, 2);
        assert_eq!([logs(Duration::ZERO), logs(SECOND / 2), logs(SECOND / 2)], [true, true, false]);
        assert!(logs(SECOND) && logs(SECOND) && !logs(SECOND));
        assert!(!state.may_log(now + 9 * SECOND, 0));
    }

    #[test]
    fn what_is_counted_is_bounded() {
        let state = OverrideState::default();
        for index in 0..2 * MAX_COUNTED {
            let source = IpAddr::V4((0x0a00_0000 + index as u32).into());
            state.count(Some(&format!("override-state-{index}")), source, Carries::Trace);
        }
        assert_eq!((state.to.borrow().len(), state.from.borrow().len()), (MAX_COUNTED + 1, MAX_COUNTED + 1));
        let other = Contexts::new("to", "other");
        assert_eq!(other.trace.value(), MAX_COUNTED as u64);
    }
}
