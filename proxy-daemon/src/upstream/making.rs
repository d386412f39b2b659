//! How a set of a cluster's hosts is made of what discovery says, and of the set before it.

use std::sync::Arc;

use super::{
    ClusterStats,
    by_address::ByAddress,
    cluster::Local,
    drop_overload::Drops,
    health_check::ClusterChecks,
    host::{Extras, Host, HostCounters, HostSet},
    lb::{self, Assigned, Balancer, Ingredients},
    orca::{Orca, Reports},
    outlier::OutlierDetector,
    vitals::{Moment, Vitals},
};
use crate::config::model::{
    AssignmentPolicy, ClusterConfig, Discovery, Endpoint, EndpointAddress, EndpointDetails, HealthStatus, Locality,
    LocalityEndpoints, SocketIndex,
};

/// What is as it is for all hosts of a cluster while a set of them is made.
pub(super) struct Making<'a> {
    pub(super) config: &'a ClusterConfig,
    pub(super) stats: &'a ClusterStats,
    pub(super) workers: usize,
    pub(super) local: &'a Local,
    pub(super) outlier: Option<&'a OutlierDetector>,
    pub(super) checks: Option<&'a ClusterChecks>,
    pub(super) orca: Option<&'a Arc<Orca>>,
    /// The hosts before are of the same version of the cluster: what was found out about them still holds.
    pub(super) keeps_vitals: bool,
}

/// A set of these endpoints. Hosts that `before` has at the same addresses keep their counters and their slots.
pub(super) fn build(endpoints: &[LocalityEndpoints], before: &HostSet, making: &Making<'_>) -> HostSet {
    let count = endpoints.iter().map(|group| group.endpoints.len()).sum();
    let mut by_address = ByAddress::with_capacity(count);
    let mut hosts: Vec<Arc<Host>> = Vec::with_capacity(count);
    let mut groups = Vec::with_capacity(endpoints.len());
    // Slots of hosts that are gone are free for those that come.
    let mut by_slot = vec![FREE; before.by_slot.len()];
    let mut new = Vec::new();
    let now = Moment::now();
    for group in endpoints {
        let locality = Arc::new(group.locality.clone());
        let first = hosts.len() as u32;
        for endpoint in &group.endpoints {
            if matches!(endpoint.address, EndpointAddress::Dns { .. }) {
                continue;
            }
            // There are never more hosts than fit.
            let number = hosts.len() as u32;
            // An address that is listed twice is one host, but where the configuration itself lists it: as in Envoy.
            let twin = by_address.get(&hosts, &endpoint.address).map(|twin| Arc::clone(&hosts[twin as usize]));
            if twin.is_some() && !matches!(making.config.discovery, Discovery::Static) {
                continue;
            }
            let known = if twin.is_none() { making.known(before, endpoint) } else { None };
            match known {
                Some(known) => by_slot[known.slot as usize] = number,
                None => new.push(number),
            }
            hosts.push(host(endpoint, group, &locality, known, twin.as_deref(), now, making));
            if twin.is_none() {
                by_address.add(&hosts, number);
            }
        }
        groups.push(Assigned {
            locality,
            weight: group.weight,
            priority: group.priority,
            policy: group.policy.clone(),
            hosts: first..hosts.len() as u32,
        });
    }
    give_slots(&mut hosts, new, &mut by_slot);
    // Hosts that the cluster begins with have the weights of the configuration until there are others, as in Envoy.
    if making.keeps_vitals {
        making.weigh(&mut hosts);
    }
    let levels = lb::levels(&groups, &making.local.node.locality);
    let mut set = HostSet { hosts, by_address, by_slot, levels, balancer: None, drops: Drops::new(endpoints) };
    set.balancer = making.balancer(&set);
    set
}

/// A set of these hosts, of a cluster that finds them by itself; `before` has the first of them.
pub(super) fn of_hosts(mut hosts: Vec<Arc<Host>>, listed: usize, before: &HostSet, local: &Local) -> HostSet {
    let mut by_address = ByAddress::with_capacity(hosts.len());
    let mut by_slot = vec![FREE; before.by_slot.len()];
    // There are never more hosts than fit.
    for (number, host) in (0..).zip(&hosts[..listed]) {
        by_slot[host.slot as usize] = number;
        by_address.add(&hosts, number);
    }
    let mut at = listed;
    while at < hosts.len() {
        if by_address.get(&hosts, &hosts[at].address).is_some() {
            // Two workers have found it at the same time.
            hosts.swap_remove(at);
            continue;
        }
        // A version with a slot; whoever has found it keeps the one without until then.
        hosts[at] = Arc::new(Host::clone(&hosts[at]));
        by_address.add(&hosts, at as u32);
        at += 1;
    }
    let new = (listed as u32..hosts.len() as u32).collect();
    give_slots(&mut hosts, new, &mut by_slot);
    let all = Assigned {
        locality: Arc::default(),
        weight: 0,
        priority: 0,
        policy: AssignmentPolicy::default(),
        hosts: 0..hosts.len() as u32,
    };
    let levels = lb::levels(&[all], &local.node.locality);
    HostSet { hosts, by_address, by_slot, levels, balancer: None, drops: Drops::default() }
}

/// Gives new hosts slots, of which those that are free are used first.
fn give_slots(hosts: &mut [Arc<Host>], new: Vec<u32>, by_slot: &mut Vec<u32>) {
    let mut free = 0;
    for number in new {
        while by_slot.get(free).is_some_and(|taken| *taken != FREE) {
            free += 1;
        }
        if free == by_slot.len() {
            by_slot.push(FREE);
        }
        if let Some(host) = Arc::get_mut(&mut hosts[number as usize]) {
            host.slot = free as u32;
        }
        by_slot[free] = number;
        free += 1;
    }
}

/// Stands for "no host".
const FREE: u32 = u32::MAX;

impl Making<'_> {
    /// The host that an endpoint has been. That of a LOGICAL_DNS cluster is another one when any of its addresses is, as in Envoy: nothing
    /// goes to where the name does not lead any more.
    fn known<'a>(&self, before: &'a HostSet, endpoint: &Endpoint) -> Option<&'a Arc<Host>> {
        let logical = matches!(self.config.discovery, Discovery::LogicalDns(_));
        let known = before.at(&endpoint.address);
        known.filter(|host| !logical || *host.additional_addresses() == *endpoint.additional_addresses)
    }

    fn balancer(&self, set: &HostSet) -> Option<Balancer> {
        let config = self.config;
        let given = config.discovery.chooses_hosts();
        (!given).then(|| {
            Balancer::new(&Ingredients {
                hosts: &set.hosts,
                levels: &set.levels,
                policy: &config.lb_policy,
                options: &config.lb,
                local: self.local.zones.as_ref(),
                stats: self.stats,
            })
        })
    }

    /// Gives hosts the weights that are made of what they report.
    fn weigh(&self, hosts: &mut [Arc<Host>]) {
        if let Some(orca) = self.orca {
            orca.apply(hosts);
        }
    }

    /// How connections to a host are encrypted of which this is said.
    fn socket(&self, details: Option<&EndpointDetails>) -> SocketIndex {
        let socket = self.config.socket_matches.of(details);
        self.stats.count_socket(socket);
        socket
    }

    /// Of a host; `known`: what it was before.
    fn vitals(&self, endpoint: &Endpoint, group: &LocalityEndpoints, known: Option<&Host>) -> Option<Arc<Vitals>> {
        let vitals = self.health(endpoint, group, known).or_else(|| self.orca.map(|_| Arc::default()))?;
        if let Some(orca) = self.orca {
            vitals.keep_reports(|| Reports::new(orca));
        }
        Some(vitals)
    }

    fn health(&self, endpoint: &Endpoint, group: &LocalityEndpoints, known: Option<&Host>) -> Option<Arc<Vitals>> {
        if let Some(vitals) = self.checks.and_then(|checks| checks.vitals(endpoint, group)) {
            if let Some(outlier) = self.outlier {
                vitals.watch(|| outlier.monitor());
            }
            return Some(vitals);
        }
        // Those of a host that is not checked any more say what its last check found.
        if self.keeps_vitals
            && let Some(known) = known
            && !known.vitals.as_ref().is_some_and(|vitals| vitals.is_checked())
        {
            return known.vitals.clone();
        }
        let outlier = self.outlier?;
        Some(Arc::new(Vitals::new(Some(outlier.monitor()))))
    }

    /// Whether a host of the version before may stay as it is.
    fn keeps(&self, host: &Host, socket: SocketIndex) -> bool {
        let finds_out = self.outlier.is_some() || self.checks.is_some() || self.orca.is_some();
        let weighed = host.weight != host.said_weight;
        host.vitals.is_none() && !finds_out && !weighed && host.socket == socket
    }

    /// A host of the version before.
    fn renewed(&self, host: &Host, socket: SocketIndex) -> Host {
        let endpoint = Endpoint {
            address: host.address.clone(),
            weight: host.said_weight,
            health: host.health,
            hostname: host.hostname().into(),
            details: host.details().cloned(),
            additional_addresses: host.additional_addresses().into(),
        };
        let group = LocalityEndpoints {
            locality: Locality::clone(&host.locality),
            priority: host.priority,
            ..LocalityEndpoints::default()
        };
        let vitals = self.vitals(&endpoint, &group, Some(host));
        Host { vitals, weight: host.said_weight, socket, ..host.clone() }
    }

    /// The same hosts, chosen anew.
    pub(super) fn again(&self, before: &HostSet) -> HostSet {
        let again = |host: &Arc<Host>| {
            if self.keeps_vitals {
                return Arc::clone(host);
            }
            let socket = self.socket(host.details().map(|details| &**details));
            if self.keeps(host, socket) { Arc::clone(host) } else { Arc::new(self.renewed(host, socket)) }
        };
        let mut hosts: Vec<_> = before.hosts.iter().map(again).collect();
        if self.keeps_vitals {
            self.weigh(&mut hosts);
        }
        let mut set = HostSet {
            hosts,
            by_address: before.by_address.clone(),
            by_slot: before.by_slot.clone(),
            levels: before.levels.clone(),
            balancer: None,
            drops: before.drops.clone(),
        };
        set.balancer = self.balancer(&set);
        set
    }
}

/// The host that an endpoint is; `known`: its version before. One that is as it was is kept as it is. `twin`: another at the same address, of
/// which all is true that is found out about this one.
fn host(
    endpoint: &Endpoint,
    group: &LocalityEndpoints,
    locality: &Arc<Locality>,
    known: Option<&Arc<Host>>,
    twin: Option<&Host>,
    now: Moment,
    making: &Making<'_>,
) -> Arc<Host> {
    let weight = endpoint.weight.max(1);
    let vitals = match twin {
        Some(twin) => twin.vitals.clone(),
        None => making.vitals(endpoint, group, known.map(|host| &**host)),
    };
    let same_vitals = |host: &Host| match (&host.vitals, &vitals) {
        (Some(before), Some(now)) => Arc::ptr_eq(before, now),
        (before, now) => before.is_none() && now.is_none(),
    };
    let socket = making.socket(endpoint.details.as_deref());
    let unchanged = known.filter(|host| {
        host.address == endpoint.address
            && (host.weight, host.said_weight) == (weight, weight)
            && host.health == endpoint.health
            && Extras::are_of(host.extras.as_deref(), endpoint)
            && host.socket == socket
            && host.priority == group.priority
            && *host.locality == group.locality
            && same_vitals(host)
    });
    if let Some(host) = unchanged {
        return Arc::clone(host);
    }
    let healthy = matches!(endpoint.health, HealthStatus::Unknown | HealthStatus::Healthy);
    Arc::new(Host {
        text: Host::text_of(&endpoint.address),
        address: endpoint.address.clone(),
        weight,
        said_weight: weight,
        health: endpoint.health,
        extras: Extras::of(endpoint),
        socket,
        locality: Arc::clone(locality),
        priority: group.priority,
        healthy_since: known.and_then(|host| host.healthy_since).or(healthy.then_some(now)),
        slot: known.map_or(0, |host| host.slot),
        vitals,
        counters: known.map_or_else(|| Arc::new(HostCounters::new(making.workers)), |host| Arc::clone(&host.counters)),
    })
}
