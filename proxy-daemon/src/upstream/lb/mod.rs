//! Load balancers. What they choose from is made by the control thread, once for all workers and for each change; a worker keeps whose
//! turn it is ([`Turns`]) and asks for one host at a time.

mod by_hash;
mod edf;
mod group;
mod layout;
mod load;
mod mersenne;
mod shares;
mod subset;
mod tried;
mod zone;

use std::sync::Arc;

pub use self::tried::TriedPriorities;
use self::{
    by_hash::HashTable,
    edf::Edf,
    group::{Group, Making},
    layout::{LocalityHosts, those},
    subset::Subsets,
    zone::ZoneRouting,
};
pub(super) use self::{
    by_hash::Spread,
    group::Turns,
    layout::{Assigned, Level, levels},
    load::{Load, Target},
    zone::LocalZones,
};
use super::{ClusterStats, Host, Standing};
use crate::{
    config::model::{LbOptions, LbPolicy, LocalityLb, MetadataMatch, SlowStart},
    layered_runtime::Key,
};

/// What a pick goes by.
pub(super) struct Pick<'a> {
    /// Of the cluster: what balancers choose are numbers of these.
    pub(super) hosts: &'a [Arc<Host>],
    pub(super) turns: &'a mut Turns,
    /// Requests of this worker that a host has.
    pub(super) active: &'a dyn Fn(u32) -> u32,
    /// Whether this worker's last connect to a host has failed; asked once for each failure.
    pub(super) failed: &'a dyn Fn(u32) -> bool,
    /// Requests with the same hash go to the same host.
    pub(super) hash: Option<u64>,
    /// How many hosts have been passed over.
    pub(super) attempt: u32,
    /// What the host's metadata has to say.
    pub(super) criteria: Option<&'a MetadataMatch>,
    /// Priorities that get nothing, because they have failed the request.
    pub(super) tried: Option<&'a TriedPriorities>,
    /// What an aggregate has chosen.
    pub(super) target: Option<Target>,
    pub(super) slow_start: Option<&'a SlowStart>,
    pub(super) stats: &'a ClusterStats,
}

/// What is known of a cluster while its balancer is made.
pub(super) struct Ingredients<'a> {
    pub(super) hosts: &'a [Arc<Host>],
    pub(super) levels: &'a [Level],
    pub(super) policy: &'a LbPolicy,
    pub(super) options: &'a LbOptions,
    /// `None`: the bootstrap names no local cluster.
    pub(super) local: Option<&'a LocalZones>,
    pub(super) stats: &'a ClusterStats,
}

/// Everything that choosing needs.
#[derive(Debug)]
pub(super) struct Balancer {
    kind: Kind,
    policy: LbPolicy,
    options: LbOptions,
    /// How many turns a worker has to keep.
    pub(super) ids: u32,
}

#[derive(Debug)]
enum Kind {
    Whole(Picker),
    Subsets(Box<Subsets>),
}

impl Balancer {
    pub(super) fn new(of: &Ingredients<'_>) -> Balancer {
        let (policy, options) = (of.policy.clone(), of.options.clone());
        let mut making = Making { hosts: of.hosts, policy: of.policy, slow_start: options.slow_start.as_ref(), ids: 0 };
        let kind = match &options.subsets {
            Some(config) => Kind::Subsets(Box::new(Subsets::new(config, of, &mut making))),
            None => Kind::Whole(Picker::new(of, of.levels, &mut making)),
        };
        let ids = making.ids;
        Balancer { kind, policy, options, ids }
    }

    /// The number of a host; `None` where none may be used.
    pub(super) fn pick<'a>(&'a self, cx: &mut Pick<'a>) -> Option<u32> {
        cx.slow_start = self.options.slow_start.as_ref();
        match &self.kind {
            Kind::Whole(picker) => picker.pick(&self.policy, &self.options, cx),
            Kind::Subsets(subsets) => subsets.pick(&self.policy, cx),
        }
    }

    /// What the hash table of the last priority with hosts is called and looks like, where there is one: Envoy makes it last.
    pub(super) fn spread(&self) -> Option<(&'static str, &'static str, Spread)> {
        let Kind::Whole(picker) = &self.kind else { return None };
        let table = picker.priorities.iter().rev().find_map(|priority| priority.table.as_ref())?;
        let (lb, unit) = table.names();
        Some((lb, unit, table.spread))
    }
}

impl Balancer {
    /// How many subsets there are, how many of them `before` had not, and how many hosts are in none because theirs has one.
    pub(super) fn subsets(&self, before: Option<&Balancer>) -> Option<(u64, u64, u64)> {
        let Kind::Subsets(subsets) = &self.kind else { return None };
        let before = before.and_then(|before| match &before.kind {
            Kind::Subsets(subsets) => Some(&**subsets),
            Kind::Whole(_) => None,
        });
        let (all, new) = subsets.difference(before);
        Some((all, new, subsets.duplicates))
    }
}

/// What the hosts of a cluster, or of a subset of them, are chosen by.
#[derive(Debug)]
struct Picker {
    load: Load,
    priorities: Box<[Priority]>,
}

/// What there is to choose from at one priority. Groups that are never asked for are empty.
#[derive(Debug, Default)]
struct Priority {
    /// Where the priority panics.
    all: Group,
    /// Healthy hosts, and degraded ones.
    groups: [Group; 2],
    /// The same of each locality.
    localities: Box<[[Group; 2]]>,
    /// How a locality is chosen where they have weights: for healthy hosts, and for degraded ones.
    weighted: [Option<WeightedLocalities>; 2],
    zones: Option<ZoneRouting>,
    table: Option<HashTable>,
}

/// Localities that share the load by their weights.
#[derive(Debug)]
struct WeightedLocalities {
    id: u32,
    /// Their numbers and their weights; none is 0.
    weights: Box<[(u32, f64)]>,
}

/// Fewer hosts that may be used than so many in a hundred are no hosts to rely on.
pub(super) fn panic_threshold(options: &LbOptions) -> u32 {
    let threshold = Key::new("upstream.healthy_panic_threshold").integer();
    threshold.map_or(options.panic_threshold, |percent| percent.min(100) as u32)
}

const STANDINGS: [Standing; 2] = [Standing::Healthy, Standing::Degraded];

impl WeightedLocalities {
    fn new(level: &Level, standing: Standing, making: &mut Making<'_>) -> Option<WeightedLocalities> {
        let weight = |(number, group): (usize, &LocalityHosts)| {
            let weight = level.effective_weight(group, making.hosts, standing);
            (weight > 0.0).then_some((number as u32, weight))
        };
        let weights: Box<[_]> = level.localities.iter().enumerate().filter_map(weight).collect();
        (!weights.is_empty()).then(|| WeightedLocalities { id: making.id(), weights })
    }

    /// The number of a locality.
    fn pick(&self, turns: &mut Turns) -> usize {
        let weights = || self.weights.iter().map(|(_, weight)| *weight);
        let schedule = turns.schedules.entry(self.id).or_insert_with(|| Edf::new(weights()));
        // Never empty.
        let next = schedule.next(|index| self.weights[index as usize].1).unwrap_or(0);
        self.weights[next as usize].0 as usize
    }
}

impl Picker {
    fn new(of: &Ingredients<'_>, levels: &[Level], making: &mut Making<'_>) -> Picker {
        let threshold = panic_threshold(of.options);
        let loads: Vec<_> = levels.iter().map(|level| level.for_load(of.hosts)).collect();
        let load = Load::new(&loads, threshold);
        let priorities = levels.iter().enumerate().map(|(number, level)| {
            let panic = load.panic[number];
            if of.policy.wants_hash() {
                let degraded = load.shares.degraded[number] > 0;
                return Priority { table: HashTable::new(of, level, panic, degraded), ..Priority::default() };
            }
            let mut priority = Priority::default();
            if panic {
                priority.all = Group::new(level.hosts.clone(), making);
                return priority;
            }
            priority.groups =
                STANDINGS.map(|standing| Group::new(those(&level.hosts, of.hosts, standing).collect(), making));
            match (&of.options.locality, of.local) {
                (LocalityLb::Weighted, _) => {
                    priority.weighted = STANDINGS.map(|standing| WeightedLocalities::new(level, standing, making));
                }
                // Zones matter for the first priority only.
                (LocalityLb::ZoneAware(config), Some(local)) if number == 0 => {
                    priority.zones = ZoneRouting::new(config, local, level, of.hosts, threshold, of.stats);
                }
                (LocalityLb::ZoneAware(_), _) => {}
            }
            if priority.zones.is_some() || priority.weighted.iter().any(Option::is_some) {
                let groups = level.localities.iter().map(|group| {
                    STANDINGS.map(|standing| Group::new(those(&group.hosts, of.hosts, standing).collect(), making))
                });
                priority.localities = groups.collect();
            }
            priority
        });
        let priorities = priorities.collect();
        Picker { load, priorities }
    }

    fn pick(&self, policy: &LbPolicy, options: &LbOptions, cx: &mut Pick<'_>) -> Option<u32> {
        let hash = cx.hash.filter(|_| policy.wants_hash());
        // What has no hash may go anywhere.
        let number = hash.unwrap_or_else(|| fastrand::u64(..));
        // Those that go by hashes do not ask, as in Envoy.
        let tried = cx.tried.filter(|_| !policy.wants_hash());
        let given = cx.target.filter(|_| !policy.wants_hash());
        let target = given.or_else(|| tried.and_then(|tried| tried.target(&self.load, number)));
        let target = target.unwrap_or_else(|| self.load.target(number));
        let at = usize::from(target.priority);
        let priority = self.priorities.get(at)?;
        let panic = self.load.panic[at];
        if panic {
            cx.stats.lb_healthy_panic.inc();
        }
        if let Some(table) = &priority.table {
            return table.pick(number, cx);
        }
        let zone_aware = match &options.locality {
            LocalityLb::ZoneAware(config) => Some(config),
            LocalityLb::Weighted => None,
        };
        if panic {
            let fails = zone_aware.is_some_and(|config| config.fail_traffic_on_panic);
            return if fails { None } else { priority.all.pick(policy, number, cx) };
        }
        let kind = usize::from(target.degraded);
        if let Some(weighted) = &priority.weighted[kind] {
            let locality = weighted.pick(cx.turns);
            return priority.localities[locality][kind].pick(policy, number, cx);
        }
        if let (Some(zones), Some(config)) = (&priority.zones, zone_aware)
            && zones.includes(config)
        {
            if !zones.local_panic {
                let locality = zones.pick(cx.stats);
                return priority.localities.get(locality)?[kind].pick(policy, number, cx);
            }
            cx.stats.lb_local_cluster_not_ok.inc();
            if config.fail_traffic_on_panic {
                return None;
            }
        }
        priority.groups[kind].pick(policy, number, cx)
    }
}
