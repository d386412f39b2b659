//! Listeners, and filter chains of listeners, whose connections are told to finish.

use std::{collections::VecDeque, sync::Arc};

use tokio::time::Instant;

use super::{
    Apply, ConfigStore,
    state::{Due, State},
};
use crate::config::status::Version;

/// As many are kept at most: what a control plane replaces again and again is not collected without end.
const MOST: usize = 1000;

/// What drains, in the order in which it ends.
#[derive(Default)]
pub(in crate::config) struct Draining(VecDeque<Drain>);

struct Drain {
    until: Instant,
    what: What,
}

enum What {
    /// A listener that was replaced or removed.
    Listener(Arc<str>, Option<Arc<Version>>),
    /// So many filter chains of a listener that serves on.
    Chains(usize),
}

impl Draining {
    /// How many listeners drain as a whole, and how many filter chains of others.
    pub(super) fn counts(&self) -> (usize, usize) {
        self.0.iter().fold((0, 0), |(whole, chains), drain| match drain.what {
            What::Listener(..) => (whole + 1, chains),
            What::Chains(more) => (whole, chains + more),
        })
    }

    /// The versions that drain, the newest of a name last.
    pub(in crate::config) fn versions(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Version>)> {
        self.0.iter().filter_map(|drain| match &drain.what {
            What::Listener(name, version) => Some((name, version.as_ref()?)),
            What::Chains(_) => None,
        })
    }
}

impl State {
    /// A version of a listener is not the one in force any more. `gone`: only so many of its filter chains are gone, the
    /// others were taken over.
    pub(super) fn drain_listener(&mut self, name: &Arc<str>, version: Option<&Arc<Version>>, gone: Option<usize>) {
        let what = match gone {
            Some(0) => return,
            Some(chains) => What::Chains(chains),
            None => What::Listener(Arc::clone(name), version.cloned()),
        };
        let until = Instant::now() + self.drain_time;
        let all = &mut self.listeners.draining.0;
        if all.len() >= MOST {
            all.pop_front();
        }
        all.push_back(Drain { until, what });
        self.at(until, Due::Drained);
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Forgets what has had its time by now.
    pub(super) fn drained(&self, state: &mut State, now: Instant) {
        let all = &mut state.listeners.draining.0;
        while all.front().is_some_and(|drain| drain.until <= now) {
            all.pop_front();
        }
    }
}
