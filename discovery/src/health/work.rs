//! Who checks what.
//!
//! Checkers are points on a ring, each several times, and so is each endpoint: those who come next on the ring check it. Who comes
//! or goes changes the work of its neighbours only.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Locality as LocalityMessage;
use envoy_types::pb::envoy::config::endpoint::v3::Endpoint as EndpointMessage;
use envoy_types::pb::envoy::service::health::v3::{ClusterHealthCheck, HealthCheckSpecifier, LocalityEndpoints};

use super::Target;
use crate::kubernetes::ObjectKey;
use crate::mesh::{Endpoint, Health, Locality, Mesh, Protocol, cluster_name};
use crate::policy::HealthCheck;
use crate::resources::{duration, health_check, socket_address};

/// How often each checker is on the ring: the more, the more alike their parts are.
const POINTS: u32 = 16;

/// Somebody who can check something.
pub(super) struct Candidate<'a> {
    pub(super) name: &'a Arc<str>,
    pub(super) locality: &'a Locality,
    /// The services that it may know; all without it.
    pub(super) scope: Option<BTreeSet<ObjectKey>>,
    pub(super) http: bool,
    pub(super) tcp: bool,
}

impl Candidate<'_> {
    fn can_check(&self, service: &ObjectKey, by_http: bool) -> bool {
        let able = if by_http { self.http } else { self.tcp };
        able && self.scope.as_ref().is_none_or(|scope| scope.contains(service))
    }
}

/// The work, and who does it.
pub(super) struct Divided<'a> {
    /// A portion for each candidate.
    pub(super) portions: Vec<Portion<'a>>,
    /// All that is to be checked, whether or not there is somebody to do it.
    pub(super) all: HashSet<Target>,
}

/// What one checker does.
#[derive(Default)]
pub(super) struct Portion<'a>(Vec<OfCluster<'a>>);

struct OfCluster<'a> {
    name: Arc<str>,
    service: &'a ObjectKey,
    port: u16,
    protocol: Protocol,
    check: &'a HealthCheck,
    endpoints: Vec<&'a Endpoint>,
}

impl<'a> Portion<'a> {
    /// The endpoints, with the names of their Envoy clusters and how they are checked.
    pub(super) fn targets(&self) -> impl Iterator<Item = (Target, &str, &'a HealthCheck)> {
        self.0.iter().flat_map(|of| {
            of.endpoints.iter().map(move |endpoint| {
                let target = Target { service: of.service.clone(), port: of.port, address: endpoint.address };
                (target, &*of.name, of.check)
            })
        })
    }

    /// The same as the checker is told.
    pub(super) fn specifier(&self, interval: Duration) -> HealthCheckSpecifier {
        let clusters = self.0.iter().map(|of| {
            let mut localities: BTreeMap<&Locality, Vec<EndpointMessage>> = BTreeMap::new();
            for endpoint in &of.endpoints {
                let address = Some(socket_address(endpoint.address.ip(), endpoint.address.port(), false));
                let message = EndpointMessage { address, ..Default::default() };
                localities.entry(&endpoint.locality).or_default().push(message);
            }
            let localities = localities.into_iter().map(|(Locality { region, zone }, endpoints)| {
                let (region, zone) = (region.clone(), zone.clone());
                let locality = LocalityMessage { region, zone, sub_zone: String::new() };
                LocalityEndpoints { locality: Some(locality), endpoints }
            });
            let mut check = health_check(of.check, of.protocol);
            // Nothing but checks goes there from here.
            check.no_traffic_interval = check.interval;
            ClusterHealthCheck {
                cluster_name: of.name.to_string(),
                health_checks: vec![check],
                locality_endpoints: localities.collect(),
                ..Default::default()
            }
        });
        HealthCheckSpecifier { cluster_health_checks: clusters.collect(), interval: Some(duration(interval)) }
    }
}

/// Candidates by hash.
type Ring = Vec<(u64, usize)>;

/// The rings of a zone, of a region and of all.
#[derive(Default)]
struct Rings<'a> {
    zones: HashMap<&'a Locality, Ring>,
    regions: HashMap<&'a str, Ring>,
    all: Ring,
}

impl<'a> Rings<'a> {
    fn new(candidates: &[Candidate<'a>], wanted: impl Fn(&Candidate<'a>) -> bool) -> Self {
        let mut rings = Self::default();
        for (index, candidate) in candidates.iter().enumerate().filter(|(_, candidate)| wanted(candidate)) {
            for point in 0..POINTS {
                let entry = (hash(&(candidate.name, point)), index);
                rings.zones.entry(candidate.locality).or_default().push(entry);
                rings.regions.entry(&candidate.locality.region).or_default().push(entry);
                rings.all.push(entry);
            }
        }
        let smaller = rings.zones.values_mut().chain(rings.regions.values_mut());
        smaller.chain([&mut rings.all]).for_each(|ring| ring.sort_unstable());
        rings
    }

    /// Those who check an endpoint: of its zone, else of its region, else any.
    fn nearest(&self, place: u64, locality: &Locality, count: usize) -> Vec<usize> {
        let near = [self.zones.get(locality), self.regions.get(&*locality.region), Some(&self.all)];
        let mut found = Vec::with_capacity(count);
        for ring in near.into_iter().flatten() {
            let start = ring.partition_point(|(point, _)| *point < place);
            for (_, index) in ring[start..].iter().chain(&ring[..start]) {
                if found.len() == count {
                    return found;
                }
                if !found.contains(index) {
                    found.push(*index);
                }
            }
        }
        found
    }
}

fn hash(of: &impl Hash) -> u64 {
    // The same in every process: its keys are fixed.
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Gives each endpoint that is to be checked to as many candidates as `count` says, if there are that many.
pub(super) fn divide<'a>(mesh: &'a Mesh, candidates: &[Candidate<'_>], count: usize) -> Divided<'a> {
    let mut divided = Divided { portions: Vec::new(), all: HashSet::new() };
    divided.portions.resize_with(candidates.len(), Portion::default);
    // Most services can be checked by everybody.
    let for_all = Rings::new(candidates, |_| true);
    for (key, service) in &mesh.services {
        let check = service.manifest.as_ref().and_then(|manifest| manifest.checks_of_checkers());
        let Some(check) = check else { continue };
        for (port, described) in service.ports.iter().filter(|(_, described)| described.external.is_none()) {
            let by_http = is_by_http(check, described.protocol);
            let can = |candidate: &Candidate<'_>| candidate.can_check(key, by_http);
            let some;
            let rings = if candidates.iter().all(can) {
                &for_all
            } else {
                some = Rings::new(candidates, can);
                &some
            };
            let name: Arc<str> = cluster_name(key, *port).into();
            let mut parts: BTreeMap<usize, Vec<&Endpoint>> = BTreeMap::new();
            for endpoint in described.endpoints.iter().filter(|endpoint| endpoint.health != Health::Draining) {
                divided.all.insert(Target { service: key.clone(), port: *port, address: endpoint.address });
                for index in rings.nearest(hash(&(&*name, endpoint.address)), &endpoint.locality, count) {
                    parts.entry(index).or_default().push(endpoint);
                }
            }
            for (index, endpoints) in parts {
                let (name, protocol) = (Arc::clone(&name), described.protocol);
                divided.portions[index].0.push(OfCluster {
                    name,
                    service: key,
                    port: *port,
                    protocol,
                    check,
                    endpoints,
                });
            }
        }
    }
    divided
}

/// Whether a check is an HTTP request. gRPC's checks are too; they have no capability of their own.
fn is_by_http(check: &HealthCheck, protocol: Protocol) -> bool {
    match protocol {
        Protocol::Tcp => false,
        Protocol::Grpc => true,
        Protocol::Http1 | Protocol::Http2 => check.path.is_some(),
    }
}
