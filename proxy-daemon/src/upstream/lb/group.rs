//! Hosts that a balancer chooses one of: the healthy ones of a priority, for example.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Pick, edf::Edf};
use crate::{
    config::model::{LbPolicy, LeastRequest, SlowStart},
    upstream::Host,
};

/// More hosts than this are not all looked at while a request waits.
const MANY: usize = 1000;

/// Numbers of hosts, with what the policy needs to choose one of them. Shared by all workers.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// Where workers keep their turns.
    id: u32,
    hosts: Box<[u32]>,
    /// Their weights differ.
    weighted: bool,
    /// Of `ROUND_ROBIN` where weights differ, and of `LEAST_REQUEST` where hosts are many besides: hosts of the same weight, which stand
    /// together, take turns among themselves.
    classes: Box<[Class]>,
    /// Where workers keep the turns of the classes: not where those of the hosts are, which take turns by themselves in a slow start.
    classes_id: u32,
    /// Until then there are new hosts among them, whose weights grow.
    slow_until: Option<Instant>,
}

#[derive(Debug)]
struct Class {
    first: u32,
    len: u32,
    weight: u32,
    /// Where workers keep their turns; of classes with more than one host.
    id: u32,
    /// The weights of all its hosts, and of those of the classes before it.
    until: u64,
}

impl Class {
    /// How often it is one's turn.
    fn rate(&self) -> f64 {
        f64::from(self.weight) * f64::from(self.len)
    }
}

/// What is common to all groups of a set of hosts while they are made.
pub(super) struct Making<'a> {
    pub(super) hosts: &'a [Arc<Host>],
    pub(super) policy: &'a LbPolicy,
    pub(super) slow_start: Option<&'a SlowStart>,
    /// The number of ids that have been given.
    pub(super) ids: u32,
}

impl Making<'_> {
    pub(super) fn id(&mut self) -> u32 {
        self.ids += 1;
        self.ids - 1
    }
}

impl Group {
    pub(super) fn new(mut hosts: Vec<u32>, making: &mut Making<'_>) -> Group {
        let id = making.id();
        let all = making.hosts;
        let weight = |host: &u32| all[*host as usize].weight;
        let weighted = hosts.windows(2).any(|pair| weight(&pair[0]) != weight(&pair[1]));
        let mut classes = Vec::new();
        if matches!(making.policy, LbPolicy::PickFirst { shuffle: true }) {
            fastrand::shuffle(&mut hosts);
        }
        let by_class = match making.policy {
            LbPolicy::RoundRobin => weighted,
            LbPolicy::LeastRequest(_) => weighted && hosts.len() > MANY,
            _ => false,
        };
        if by_class {
            hosts.sort_by_key(weight);
            let (mut first, mut until) = (0, 0);
            for same in hosts.chunk_by(|a, b| weight(a) == weight(b)) {
                // There are never more hosts than fit.
                let len = same.len() as u32;
                let id = if len > 1 { making.id() } else { 0 };
                let weight = weight(&same[0]);
                // Both have 32 bits, and there are never so many hosts that the sum does not fit.
                until += u64::from(weight) * u64::from(len);
                classes.push(Class { first, len, weight, id, until });
                first += len;
            }
        }
        let classes_id = if classes.is_empty() { id } else { making.id() };
        let slow_until = making.slow_start.and_then(|slow| {
            let newest = hosts.iter().filter_map(|host| all[*host as usize].healthy_since()).max()?;
            newest.checked_add(slow.window).filter(|until| *until > Instant::now())
        });
        Group { id, hosts: hosts.into(), weighted, classes: classes.into(), classes_id, slow_until }
    }

    /// The numbers of its hosts.
    pub(super) fn hosts(&self) -> &[u32] {
        &self.hosts
    }

    /// The number of a host.
    pub(super) fn pick(&self, policy: &LbPolicy, random: u64, cx: &mut Pick<'_>) -> Option<u32> {
        let len = self.hosts.len();
        if len <= 1 {
            return self.hosts.first().copied();
        }
        let slow = self.slow_until.is_some_and(|until| Instant::now() < until);
        let at = match policy {
            LbPolicy::Random => random as usize % len,
            LbPolicy::PickFirst { .. } => self.first(cx),
            LbPolicy::LeastRequest(config) if !slow && !self.classes.is_empty() => self.least_by_weight(config, cx)?,
            LbPolicy::LeastRequest(config) if self.weighted || slow => self.by_deadline(Some(config), slow, cx)?,
            LbPolicy::LeastRequest(config) if config.full_scan => self.least_of_all(cx),
            LbPolicy::LeastRequest(config) => self.least_of_some(config.choice_count, cx),
            _ if slow => self.by_deadline(None, slow, cx)?,
            _ if self.weighted => self.by_class(cx)?,
            _ => cx.turns.next(self.id, self.hosts.len() as u32) as usize,
        };
        Some(self.hosts[at])
    }

    /// The first that can be connected to, as far as this worker knows, and for attempts that pass it over the next ones. It stays with
    /// one until a connect to that fails; when the hosts change, it begins with the first again.
    fn first(&self, cx: &mut Pick<'_>) -> usize {
        let len = self.hosts.len();
        let first = cx.turns.firsts.entry(self.id).or_default();
        if (cx.failed)(self.hosts[*first as usize % len]) {
            *first = first.wrapping_add(1);
        }
        (*first as usize + cx.attempt as usize) % len
    }

    /// By weights that do not change: first a weight, then one of those that have it.
    fn by_class(&self, cx: &mut Pick<'_>) -> Option<usize> {
        let schedule = || Edf::new(self.classes.iter().map(Class::rate));
        let class = cx.turns.schedules.entry(self.classes_id).or_insert_with(schedule);
        let class = &self.classes[class.next(|index| self.classes[index as usize].rate())? as usize];
        let at = if class.len > 1 { cx.turns.next(class.id, class.len) } else { 0 };
        Some((class.first + at) as usize)
    }

    /// By weights that change with the requests under way, and with time.
    fn by_deadline(&self, least: Option<&LeastRequest>, slow: bool, cx: &mut Pick<'_>) -> Option<usize> {
        let (hosts, active, slow) = (cx.hosts, cx.active, cx.slow_start.filter(|_| slow));
        let bias = least.map_or(0.0, |config| config.active_request_bias.get().max(0.0));
        let now = slow.map(|_| Instant::now());
        let weight = |index: u32| {
            let number = self.hosts[index as usize];
            let host = &hosts[number as usize];
            let mut weight = f64::from(host.weight);
            if bias == 1.0 {
                weight /= f64::from(active(number)) + 1.0;
            } else if bias > 0.0 {
                weight /= (f64::from(active(number)) + 1.0).powf(bias);
            }
            match slow.zip(now) {
                Some((slow, now)) => weight * slow.share(host, now),
                None => weight,
            }
        };
        let schedule = || Edf::new((0..self.hosts.len() as u32).map(weight));
        let schedule = cx.turns.schedules.entry(self.id).or_insert_with(schedule);
        Some(schedule.next(weight)? as usize)
    }

    /// Of many hosts whose weights differ: whose turn it is by weight, or of some that are chosen by weight too the one that has less to do for it.
    /// A schedule of them all by what each has to do, as for few, would be memory of each worker for each host, and would hold up the
    /// request that needs it first.
    fn least_by_weight(&self, config: &LeastRequest, cx: &mut Pick<'_>) -> Option<usize> {
        let mut best = self.by_class(cx)?;
        // Then what they have to do does not matter.
        if config.active_request_bias.get() <= 0.0 {
            return Some(best);
        }
        let host = |at: usize| self.hosts[at];
        let weight = |at: usize| u64::from(cx.hosts[host(at) as usize].weight);
        let active = |at: usize| u64::from((cx.active)(host(at)));
        for _ in 1..config.choice_count {
            let other = self.any_by_weight();
            // Both products fit: a weight and a number of requests have 32 bits.
            if active(other) * weight(best) < active(best) * weight(other) {
                best = other;
            }
        }
        Some(best)
    }

    /// Any host, by weights, whose turn it may not be.
    fn any_by_weight(&self) -> usize {
        let Some(all) = self.classes.last() else { return 0 };
        let at = fastrand::u64(..all.until);
        let class = &self.classes[self.classes.partition_point(|class| class.until <= at)];
        (class.first + fastrand::u32(..class.len)) as usize
    }

    /// Of some random hosts the least busy one: the power of two choices.
    fn least_of_some(&self, choices: u32, cx: &Pick<'_>) -> usize {
        let any = || fastrand::usize(..self.hosts.len());
        let active = |at: usize| (cx.active)(self.hosts[at]);
        let mut best = any();
        for _ in 1..choices {
            let other = any();
            if active(other) < active(best) {
                best = other;
            }
        }
        best
    }

    /// Of all hosts the least busy one; where there are many of those, any of them.
    fn least_of_all(&self, cx: &Pick<'_>) -> usize {
        let (mut best, mut least, mut ties) = (0, u32::MAX, 0_u32);
        for (at, host) in self.hosts.iter().enumerate() {
            let active = (cx.active)(*host);
            if active < least {
                (best, least, ties) = (at, active, 1);
            } else if active == least {
                ties += 1;
                if fastrand::u32(..ties) == 0 {
                    best = at;
                }
            }
        }
        best
    }
}

impl SlowStart {
    /// The share of its weight that a host has now.
    fn share(&self, host: &Host, now: Instant) -> f64 {
        let Some(since) = host.healthy_since() else { return 1.0 };
        let age = now.saturating_duration_since(since);
        if age >= self.window {
            return 1.0;
        }
        let part = age.max(Duration::from_millis(1)).as_secs_f64() / self.window.as_secs_f64();
        let aggression = self.aggression.get();
        let grown = if aggression > 0.0 && aggression != 1.0 { part.powf(1.0 / aggression) } else { part };
        // Weights are never 0.
        grown.max(self.min_weight).max(1e-6)
    }
}

/// Whose turn it is, in one worker: four bytes a group, and what schedules need.
#[derive(Debug, Default)]
pub(in crate::upstream) struct Turns {
    next: Vec<u32>,
    pub(super) schedules: HashMap<u32, Edf>,
    /// Where those begin that stay with the first.
    firsts: HashMap<u32, u32>,
    /// Where keys of subsets are written.
    pub(super) text: String,
}

impl Turns {
    /// For groups with ids less than `ids`. They start anywhere, so that workers do not all begin with the same host.
    pub(in crate::upstream) fn new(ids: u32) -> Turns {
        Turns { next: vec![fastrand::u32(..); ids as usize], ..Turns::default() }
    }

    #[cfg(test)]
    pub(in crate::upstream) fn bytes(&self) -> usize {
        let schedules = self.schedules.values().map(Edf::bytes).sum::<usize>();
        self.next.capacity() * size_of::<u32>() + schedules
    }

    /// One of `len`, in turn.
    fn next(&mut self, id: u32, len: u32) -> u32 {
        let next = &mut self.next[id as usize];
        let turn = *next % len;
        *next = turn + 1;
        turn
    }
}
