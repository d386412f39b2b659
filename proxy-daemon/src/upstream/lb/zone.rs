//! Zone-aware routing: requests stay in the node's own zone as far as its hosts have their share of the whole.

use std::{collections::HashMap, sync::Arc};

use super::{
    layout::Level,
    load::{self, Counts},
};
use crate::{
    config::model::{Locality, ZoneAware},
    layered_runtime::Key,
    upstream::{ClusterStats, Host, Standing},
};

/// What the cluster that this node is of (`local_cluster_name`) says of zones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::upstream) struct LocalZones {
    hosts: Counts,
    localities: usize,
    /// It has hosts in this node's own zone.
    here: bool,
    /// Healthy hosts and their weights, by zone.
    healthy: HashMap<Locality, (u64, u64)>,
}

impl LocalZones {
    /// Of the cluster's first priority: more are not meant to be.
    pub(in crate::upstream) fn new(level: Option<&Level>, hosts: &[Arc<Host>]) -> LocalZones {
        let Some(level) = level else { return LocalZones::default() };
        let healthy =
            level.localities.iter().map(|group| (Locality::clone(&group.locality), weigh(&group.hosts, hosts)));
        LocalZones {
            hosts: level.counts(hosts),
            localities: level.localities.len(),
            here: level.local && level.localities.first().is_some_and(|group| !group.hosts.is_empty()),
            healthy: healthy.filter(|(_, (number, _))| *number > 0).collect(),
        }
    }
}

/// How many of these hosts are healthy, and their weights.
fn weigh(numbers: &[u32], hosts: &[Arc<Host>]) -> (u64, u64) {
    let healthy = numbers.iter().map(|number| &hosts[*number as usize]);
    let healthy = healthy.filter(|host| host.standing() == Standing::Healthy);
    healthy.fold((0, 0), |(number, weight), host| (number + 1, weight + u64::from(host.weight)))
}

/// Where the requests of one priority go.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Zone {
    /// To hosts in the node's own zone.
    Direct,
    /// Some stay, and the others go where there is room.
    Residual {
        /// Of 10,000 requests so many stay.
        stay: u64,
        /// How much room zones have, each added to those before it.
        room: Box<[u64]>,
    },
}

/// What is asked for with each request.
#[derive(Debug)]
pub(super) struct ZoneRouting {
    pub(super) zone: Zone,
    /// The local cluster has too few healthy hosts to say anything.
    pub(super) local_panic: bool,
    enabled: Key,
}

impl ZoneRouting {
    /// `None`: zones do not matter.
    pub(super) fn new(
        config: &ZoneAware,
        local: &LocalZones,
        level: &Level,
        hosts: &[Arc<Host>],
        panic_threshold: u32,
        stats: &ClusterStats,
    ) -> Option<ZoneRouting> {
        stats.lb_recalculate_zone_structures.inc();
        let forced = Key::new("upstream.zone_routing.force_local_zone.min_size").integer().filter(|size| *size > 0);
        let forced = forced.or(config.force_local_zone.map(u64::from));
        if level.localities.len() < 2 || (forced.is_none() && local.localities < 2) {
            return None;
        }
        if !local.here {
            stats.lb_local_cluster_not_ok.inc();
            return None;
        }
        let healthy: Vec<_> = level.localities.iter().map(|group| weigh(&group.hosts, hosts)).collect();
        let least = Key::new("upstream.zone_routing.min_cluster_size").integer().unwrap_or(config.min_cluster_size);
        if healthy.iter().map(|(number, _)| number).sum::<u64>() < least {
            stats.lb_zone_cluster_too_small.inc();
            return None;
        }
        let percentages = percentages(config, local, level, &healthy);
        let zone = zone(level.local, &percentages, forced.is_some_and(|least| healthy[0].0 >= least));
        let level = load::Level { hosts: local.hosts, weights: None, overprovisioning_factor: 140 };
        let enabled = Key::new("upstream.zone_routing.enabled");
        Some(ZoneRouting { zone, local_panic: level.in_panic(panic_threshold), enabled })
    }

    /// Whether this request takes part.
    pub(super) fn includes(&self, config: &ZoneAware) -> bool {
        match self.percent(config) {
            100.. => true,
            share => fastrand::u64(..100) < share,
        }
    }

    /// The share of requests that take part, of 1.
    pub(super) fn included(&self, config: &ZoneAware) -> f64 {
        self.percent(config).min(100) as f64 / 100.0
    }

    fn percent(&self, config: &ZoneAware) -> u64 {
        self.enabled.integer().unwrap_or(u64::from(config.routing_enabled))
    }

    /// The locality for a request.
    pub(super) fn pick(&self, stats: &ClusterStats) -> usize {
        let Zone::Residual { stay, room } = &self.zone else {
            stats.lb_zone_routing_all_directly.inc();
            return 0;
        };
        if fastrand::u64(..10_000) < *stay {
            stats.lb_zone_routing_sampled.inc();
            return 0;
        }
        stats.lb_zone_routing_cross_zone.inc();
        match room.last() {
            // Rounding has left none.
            None | Some(0) => {
                stats.lb_zone_no_capacity_left.inc();
                fastrand::usize(..room.len().max(1))
            }
            Some(all) => {
                let number = fastrand::u64(..*all);
                room.partition_point(|sum| *sum <= number)
            }
        }
    }
}

/// Of 10,000, how many of the local cluster's hosts and how many of this one's are in each zone.
fn percentages(config: &ZoneAware, local: &LocalZones, level: &Level, healthy: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let of = |(number, weight): &(u64, u64)| if config.by_weight { *weight } else { *number };
    let here: u64 = local.healthy.values().map(of).sum();
    let there: u64 = healthy.iter().map(of).sum();
    let share = |part: u64, whole: u64| (10_000 * part).checked_div(whole).unwrap_or(0);
    let each = level.localities.iter().zip(healthy).map(|(group, counted)| {
        if counted.0 == 0 {
            return (0, 0);
        }
        (share(local.healthy.get(&*group.locality).map_or(0, of), here), share(of(counted), there))
    });
    each.collect()
}

/// `percentages`: the shares of the local cluster and of this one; those of the node's own zone first where `local`.
fn zone(local: bool, percentages: &[(u64, u64)], forced: bool) -> Zone {
    let (here, there) = percentages[0];
    if local && ((there > 0 && there >= here) || forced) {
        return Zone::Direct;
    }
    let stay = if local { (there * 10_000).checked_div(here).unwrap_or(0) } else { 0 };
    let mut sum = 0;
    let room = percentages.iter().enumerate().map(|(index, (here, there))| {
        if index > 0 || !local {
            sum += there.saturating_sub(*here);
        }
        sum
    });
    Zone::Residual { stay, room: room.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_room_gets_the_rest() {
        // Of Envoy's comment.
        let shares = [(4000, 2500), (4000, 5000), (2000, 2500)];
        let Zone::Residual { stay, room } = zone(true, &shares, false) else { panic!() };
        assert_eq!((stay, &*room), (6250, [0, 1000, 1500].as_slice()));
        assert_eq!(zone(true, &[(2500, 4000), (7500, 6000)], false), Zone::Direct);
        assert_eq!(zone(true, &shares, true), Zone::Direct);
        // No host in the node's own zone: nothing stays.
        let Zone::Residual { stay, room } = zone(false, &[(5000, 4000), (0, 6000)], true) else { panic!() };
        assert_eq!((stay, &*room), (0, [0, 6000].as_slice()));
    }
}
