//! What a worker keeps for the override filters of all its listeners.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use culvert_xds_client::overrides::contexts::{Carried, Counted};

use crate::stats::{Counter, Scope};

/// The most services, and the most addresses, that are counted on their own. The rest counts as `other`.
const MAX_COUNTED: usize = 500;
const OTHER: &str = "other";
const TO: &str = "to";
const FROM: &str = "from";
const SECOND: Duration = Duration::from_secs(1);
/// For so long a tunnel that nobody could be connected to counts as gone, before a request tries again.
const GONE: Duration = Duration::from_secs(2);

/// What all workers count, for reports. A worker is here once for each service and address that it meets.
static COUNTED: Mutex<BTreeMap<Counted, Contexts>> = Mutex::new(BTreeMap::new());

/// The requests that all workers have counted since the daemon was started, by service and by address. Those beyond the first few hundred
/// are not told.
pub fn counted_contexts() -> Vec<(Counted, Carried)> {
    // The map is whole after every change, so a panic elsewhere does not spoil it.
    let counted = COUNTED.lock().unwrap_or_else(PoisonError::into_inner);
    counted.iter().map(|(whose, contexts)| (whose.clone(), contexts.carried())).collect()
}

/// What a worker keeps for the override filters. Lives on the worker's thread.
#[derive(Debug, Default)]
pub struct OverrideState {
    /// When the second began that is counted, and how many requests were logged in it.
    logged: Cell<Option<(Instant, u32)>>,
    /// When nobody could be connected to at tunnels.
    gone: RefCell<HashMap<SocketAddr, Instant>>,
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

    /// The same, which reports tell.
    fn told(whose: Counted) -> Contexts {
        let contexts = match &whose {
            Counted::To(cluster) => Contexts::new(TO, cluster),
            Counted::From(address) => Contexts::new(FROM, address),
        };
        COUNTED.lock().unwrap_or_else(PoisonError::into_inner).insert(whose, contexts);
        contexts
    }

    /// Of all that come after the first few hundred, which nobody is told of but the log, once.
    fn of_others(direction: &str, what: &str) -> Contexts {
        tracing::warn!(
            "a worker has met {MAX_COUNTED} {what} with contexts: what others carry is counted together and not reported"
        );
        Contexts::new(direction, OTHER)
    }

    fn carried(self) -> Carried {
        let Contexts { overrides, trace, nothing } = self;
        Carried { overrides: overrides.value(), trace_only: trace.value(), nothing: nothing.value() }
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

    /// Nobody could be connected to at a tunnel.
    pub(crate) fn tunnel_failed(&self, address: SocketAddr, now: Instant) {
        let mut gone = self.gone.borrow_mut();
        gone.retain(|_, since| now.saturating_duration_since(*since) < GONE);
        gone.insert(address, now);
    }

    /// Whether a tunnel is gone, as far as was seen.
    pub(super) fn is_gone(&self, address: SocketAddr, now: Instant) -> bool {
        self.gone.borrow().get(&address).is_some_and(|since| now.saturating_duration_since(*since) < GONE)
    }

    /// Counts a request to a cluster from an address.
    pub(super) fn count(&self, cluster: Option<&str>, source: IpAddr, carries: Carries) {
        if let Some(cluster) = cluster {
            let known = self.to.borrow().get(cluster).copied();
            let counters = known.unwrap_or_else(|| {
                let mut to = self.to.borrow_mut();
                if to.len() < MAX_COUNTED {
                    *to.entry(cluster.into()).or_insert_with(|| Contexts::told(Counted::To(cluster.to_owned())))
                } else {
                    *to.entry(OTHER.into()).or_insert_with(|| Contexts::of_others(TO, "services"))
                }
            });
            counters.count(carries);
        }
        let known = self.from.borrow().get(&source).copied();
        let counters = known.unwrap_or_else(|| {
            let mut from = self.from.borrow_mut();
            if from.len() < MAX_COUNTED {
                *from.entry(source).or_insert_with(|| Contexts::told(Counted::From(source.to_string())))
            } else {
                // The unspecified address stands for the rest: nobody comes from it.
                let rest = IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED);
                *from.entry(rest).or_insert_with(|| Contexts::of_others(FROM, "addresses"))
            }
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
    fn a_tunnel_is_gone_for_a_while() {
        let (state, now) = (OverrideState::default(), Instant::now());
        let [one, other] = [1, 2].map(|port| SocketAddr::from(([10, 0, 0, 1], port)));
        assert!(!state.is_gone(one, now));
        state.tunnel_failed(one, now);
        assert!(state.is_gone(one, now + GONE / 2) && !state.is_gone(other, now) && !state.is_gone(one, now + GONE));
        state.tunnel_failed(other, now + GONE);
        assert_eq!(state.gone.borrow().len(), 1);
    }

    #[test]
    fn what_is_counted_is_bounded() {
        let state = OverrideState::default();
        for index in 0..2 * MAX_COUNTED {
            let source = IpAddr::V4((0x0a00_0000 + index as u32).into());
            state.count(Some(&format!("override-state-{index}")), source, Carries::Trace);
        }
        assert_eq!((state.to.borrow().len(), state.from.borrow().len()), (MAX_COUNTED + 1, MAX_COUNTED + 1));
        let other = Contexts::new(TO, OTHER);
        assert_eq!(other.trace.value(), MAX_COUNTED as u64);
        let told = counted_contexts();
        let one = Carried { trace_only: 1, ..Carried::default() };
        assert!(told.contains(&(Counted::To("override-state-7".to_owned()), one)), "{told:?}");
        assert!(told.contains(&(Counted::From("10.0.0.7".to_owned()), one)), "{told:?}");
        assert!(!told.iter().any(|(whose, _)| *whose == Counted::To(OTHER.to_owned())), "{told:?}");
    }
}
