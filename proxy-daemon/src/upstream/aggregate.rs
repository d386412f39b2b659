//! `envoy.clusters.aggregate`: clusters that have no hosts of their own. Their members' priorities follow each other, and what a member
//! gets it balances itself.
//!
//! The control thread makes a [`Plan`] for each change of the members' hosts; a worker finds its own view of the members with the first
//! pick after that ([`WorkerMembers`]), and a pick is one more look-up than in the member.

use std::{
    cell::{Cell, Ref, RefCell},
    collections::HashMap,
    rc::{Rc, Weak},
    sync::Arc,
};

use super::{
    Cluster, ClusterMap, PickCx, Placed, TriedPriorities, WorkerCluster, WorkerClusters, WorkerHost,
    lb::{self, Load, Target},
};
use crate::config::model::{Discovery, HashPolicy, LbOptions};

/// A priority of an aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// The number of the member.
    member: u32,
    /// Its priority.
    priority: u16,
}

/// How an aggregate's load is shared.
#[derive(Debug, Default)]
pub(super) struct Plan {
    members: Arc<[Arc<str>]>,
    /// By the aggregate's own priorities: those of the members that have hosts.
    places: Box<[Place]>,
    /// `None`: there are no hosts at all.
    load: Option<Load>,
    /// A member goes by hashes, and by routes' policies.
    wants_hash: bool,
    /// A member has subsets.
    has_subsets: bool,
}

impl Plan {
    /// A member that is not there, or that is an aggregate itself, has no hosts: it is passed over, as in Envoy.
    fn new(members: &Arc<[Arc<str>]>, options: &LbOptions, map: &ClusterMap) -> Plan {
        let (mut places, mut loads) = (Vec::new(), Vec::new());
        let (mut wants_hash, mut has_subsets) = (false, false);
        for (member, cluster) in
            (0_u32..).zip(members.iter()).filter_map(|(number, name)| Some((number, map.get(name)?)))
        {
            wants_hash |= cluster.config.wants_hash();
            has_subsets |= cluster.config.lb.subsets.is_some();
            let hosts = cluster.hosts();
            for (priority, level) in (0_u16..).zip(&hosts.levels).filter(|(_, level)| !level.is_empty()) {
                places.push(Place { member, priority });
                loads.push(level.for_load(&hosts.hosts));
            }
        }
        // More priorities than there are numbers for are none.
        places.truncate(usize::from(u16::MAX));
        loads.truncate(usize::from(u16::MAX));
        let load = (!loads.is_empty()).then(|| Load::new(&loads, lb::panic_threshold(options)));
        Plan { members: Arc::clone(members), places: places.into(), load, wants_hash, has_subsets }
    }

    /// A priority of the aggregate's; `None`: no host may be used.
    fn target(&self, tried: Option<&TriedPriorities>) -> Option<(Place, bool)> {
        let load = self.load.as_ref()?;
        let number = fastrand::u64(..);
        let target = tried.and_then(|tried| tried.target(load, number)).unwrap_or_else(|| load.target(number));
        Some((*self.places.get(usize::from(target.priority))?, target.degraded))
    }
}

/// Which aggregates have to follow when a cluster changes.
#[derive(Debug, Default)]
pub(super) struct Aggregates {
    by_member: HashMap<Arc<str>, Vec<Arc<str>>>,
}

impl Aggregates {
    /// A cluster is new, or has replaced another one.
    pub(super) fn add(&mut self, cluster: &Cluster) {
        self.remove(&cluster.config.name);
        let Discovery::Aggregate { clusters } = &cluster.config.discovery else { return };
        for member in clusters.iter() {
            let aggregates = self.by_member.entry(Arc::clone(member)).or_default();
            if !aggregates.contains(&cluster.config.name) {
                aggregates.push(Arc::clone(&cluster.config.name));
            }
        }
    }

    /// A cluster is gone.
    pub(super) fn remove(&mut self, name: &Arc<str>) {
        if self.by_member.is_empty() {
            return;
        }
        self.by_member.retain(|_, aggregates| {
            aggregates.retain(|aggregate| aggregate != name);
            !aggregates.is_empty()
        });
    }

    /// Makes the plans anew that clusters have a part in which have changed.
    pub(super) fn follow<'a>(&self, changed: impl Iterator<Item = &'a str>, map: &ClusterMap) {
        if self.by_member.is_empty() {
            return;
        }
        let mut names: Vec<&Arc<str>> = changed.filter_map(|name| self.by_member.get(name)).flatten().collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter().filter_map(|name| map.get(name)).for_each(|aggregate| replan(aggregate, map));
    }
}

/// Makes an aggregate's plan.
pub(super) fn replan(cluster: &Cluster, map: &ClusterMap) {
    if let (Discovery::Aggregate { clusters }, Some(plan)) = (&cluster.config.discovery, &cluster.plan) {
        plan.store(Arc::new(Plan::new(clusters, &cluster.config.lb, map)));
        cluster.hosts_moved();
    }
}

/// The members of an aggregate as one worker sees them.
#[derive(Default)]
pub(super) struct WorkerMembers {
    clusters: Weak<WorkerClusters>,
    /// The versions of all clusters and of the plan that this is of.
    seen: Cell<(u64, u64)>,
    plan: RefCell<Arc<Plan>>,
    members: RefCell<Vec<Option<Rc<WorkerCluster>>>>,
}

impl WorkerMembers {
    pub(super) fn new(clusters: &Weak<WorkerClusters>) -> WorkerMembers {
        WorkerMembers { clusters: Weak::clone(clusters), ..WorkerMembers::default() }
    }

    /// Adopts what has changed.
    fn plan(&self, cluster: &Cluster) -> Ref<'_, Plan> {
        if let (Some(clusters), Some(plan)) = (self.clusters.upgrade(), &cluster.plan) {
            let versions = (clusters.version(), cluster.hosts_version());
            if versions != self.seen.get() {
                self.seen.set(versions);
                let plan = plan.load_full();
                self.members.replace(plan.members.iter().map(|name| clusters.get(name)).collect());
                self.plan.replace(plan);
            }
        }
        Ref::map(self.plan.borrow(), |plan| &**plan)
    }
}

/// A host, and the cluster that it is of.
pub struct Chosen {
    /// Of an aggregate: the member.
    pub cluster: Rc<WorkerCluster>,
    /// The host.
    pub host: Rc<WorkerHost>,
}

impl WorkerCluster {
    /// The cluster that a host is to be chosen of, and what it is to be chosen by: of an aggregate one of its members. `None`: no host may be
    /// used.
    pub fn place<'a>(self: &Rc<Self>, cx: PickCx<'a>) -> Option<(Rc<WorkerCluster>, PickCx<'a>)> {
        let Some(members) = &self.members else { return Some((Rc::clone(self), cx)) };
        let (place, degraded) = members.plan(&self.cluster).target(cx.tried)?;
        let member = members.members.borrow().get(place.member as usize)?.clone()?;
        let target = Some(Placed(Target { priority: place.priority, degraded }));
        Some((member, PickCx { target, tried: None, ..cx }))
    }

    /// Chooses a host, of an aggregate one of a member's; `None` where no host may be used. `hash`: what a load balancer hashes by that has
    /// policies of its own.
    pub fn choose(self: &Rc<Self>, cx: PickCx<'_>, hash: impl FnOnce(&[HashPolicy]) -> Option<u64>) -> Option<Chosen> {
        let (cluster, mut cx) = self.place(cx)?;
        let policies = &*cluster.cluster.config.lb.hash_policy;
        if !policies.is_empty() {
            cx.hash = hash(policies);
        }
        let host = cluster.pick(&cx)?;
        Some(Chosen { cluster, host })
    }

    /// The priority of a host among those of this cluster; `None`: it has that host's no more.
    pub fn priority_of(&self, chosen: &Chosen) -> Option<u32> {
        let Some(members) = &self.members else { return Some(chosen.host.host.priority) };
        let plan = members.plan(&self.cluster);
        let name = &chosen.cluster.cluster.config.name;
        let is_it = |place: &Place| {
            u32::from(place.priority) == chosen.host.host.priority
                && plan.members.get(place.member as usize) == Some(name)
        };
        // A member that is named twice counts where it was named last, as in Envoy.
        plan.places.iter().rposition(is_it).map(|priority| priority as u32)
    }

    /// Whether hashes of requests by what routes say have a say.
    pub fn wants_hash(&self) -> bool {
        match &self.members {
            None => self.cluster.config.wants_hash(),
            Some(members) => members.plan(&self.cluster).wants_hash,
        }
    }

    /// Whether metadata of requests has a say.
    pub fn has_subsets(&self) -> bool {
        match &self.members {
            None => self.cluster.config.lb.subsets.is_some(),
            Some(members) => members.plan(&self.cluster).has_subsets,
        }
    }
}

#[cfg(test)]
#[path = "aggregate_tests.rs"]
mod tests;
