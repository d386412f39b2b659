//! The hosts of a cluster, or of a subset of them, by priority and locality.

use std::{collections::BTreeMap, sync::Arc};

use super::load::{self, Counts};
use crate::{
    config::model::{AssignmentPolicy, Locality},
    upstream::{Host, Standing},
};

/// One priority.
#[derive(Debug, Clone, Default)]
pub(in crate::upstream) struct Level {
    pub(super) policy: AssignmentPolicy,
    /// The numbers of its hosts, in the order of the configuration.
    pub(super) hosts: Vec<u32>,
    /// The node's own one first, the others in the order of their names.
    pub(super) localities: Vec<LocalityHosts>,
    /// The first locality is the node's own.
    pub(super) local: bool,
}

/// The hosts of one locality at one priority.
#[derive(Debug, Clone)]
pub(super) struct LocalityHosts {
    pub(super) locality: Arc<Locality>,
    /// 0: it gets nothing where localities are weighted.
    pub(super) weight: u32,
    pub(super) hosts: Vec<u32>,
}

/// A group of the configuration: locality, weight and priority, with the numbers of the hosts that it has.
pub(in crate::upstream) struct Assigned {
    pub(in crate::upstream) locality: Arc<Locality>,
    pub(in crate::upstream) weight: u32,
    pub(in crate::upstream) priority: u32,
    pub(in crate::upstream) policy: AssignmentPolicy,
    pub(in crate::upstream) hosts: std::ops::Range<u32>,
}

/// The greatest priority that Envoy's API knows.
const MAX_PRIORITY: u32 = 128;

/// The priorities of a cluster: at least one. `here`: where this node is.
pub(in crate::upstream) fn levels(groups: &[Assigned], here: &Locality) -> Vec<Level> {
    let count = groups.iter().map(|group| group.priority.min(MAX_PRIORITY) as usize + 1).max().unwrap_or(1);
    let policy = groups.first().map(|group| group.policy.clone()).unwrap_or_default();
    // By whether they are others than the node's own, and by name.
    type Localities = BTreeMap<(bool, Arc<Locality>), LocalityHosts>;
    let mut levels: Vec<(Level, Localities)> =
        (0..count).map(|_| (Level { policy: policy.clone(), ..Level::default() }, BTreeMap::new())).collect();
    let known = *here != Locality::default();
    for group in groups {
        let (level, localities) = &mut levels[group.priority.min(MAX_PRIORITY) as usize];
        level.hosts.extend(group.hosts.clone());
        let local = known && *group.locality == *here;
        level.local |= local;
        let locality = Arc::clone(&group.locality);
        let entry = localities.entry((!local, Arc::clone(&locality)));
        let entry = entry.or_insert_with(|| LocalityHosts { locality, weight: 0, hosts: Vec::new() });
        entry.weight = group.weight;
        entry.hosts.extend(group.hosts.clone());
    }
    let finish =
        |(level, localities): (Level, Localities)| Level { localities: localities.into_values().collect(), ..level };
    levels.into_iter().map(finish).collect()
}

impl Level {
    pub(in crate::upstream) fn policy(&self) -> &AssignmentPolicy {
        &self.policy
    }

    /// The weight of a locality; 0 where none is said.
    pub(in crate::upstream) fn weight(&self, locality: &Locality) -> u32 {
        self.localities.iter().find(|group| *group.locality == *locality).map_or(0, |group| group.weight)
    }

    /// There are no hosts.
    pub(in crate::upstream) fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    pub(super) fn counts(&self, hosts: &[Arc<Host>]) -> Counts {
        self.sum(hosts, |_| 1)
    }

    fn sum(&self, hosts: &[Arc<Host>], of: impl Fn(&Host) -> u64) -> Counts {
        let mut counts = Counts::default();
        for host in self.hosts.iter().map(|number| &hosts[*number as usize]) {
            let value = of(host);
            counts.all += value;
            match host.standing() {
                Standing::Healthy => counts.healthy += value,
                Standing::Degraded => counts.degraded += value,
                Standing::Unhealthy => {}
                Standing::Excluded => counts.excluded += value,
            }
        }
        counts
    }

    /// As the arithmetic of priorities sees it.
    pub(in crate::upstream) fn for_load(&self, hosts: &[Arc<Host>]) -> load::Level {
        let weighted = self.policy.weighted_priority_health;
        load::Level {
            hosts: self.counts(hosts),
            weights: weighted.then(|| self.sum(hosts, |host| host.weight.into())),
            overprovisioning_factor: self.policy.overprovisioning_factor,
        }
    }

    /// What the weight of a locality comes to, by how many of its hosts stand so.
    pub(super) fn effective_weight(&self, group: &LocalityHosts, hosts: &[Arc<Host>], standing: Standing) -> f64 {
        let count = |standing| those(&group.hosts, hosts, standing).count();
        let counted = group.hosts.len() - count(Standing::Excluded);
        if counted == 0 {
            return 0.0;
        }
        let ratio = count(standing) as f64 / counted as f64;
        f64::from(group.weight) * (f64::from(self.policy.overprovisioning_factor) / 100.0 * ratio).min(1.0)
    }
}

/// Those of the hosts that stand so.
pub(super) fn those<'a>(
    numbers: &'a [u32],
    hosts: &'a [Arc<Host>],
    standing: Standing,
) -> impl Iterator<Item = u32> + 'a {
    numbers.iter().copied().filter(move |number| hosts[*number as usize].standing() == standing)
}
