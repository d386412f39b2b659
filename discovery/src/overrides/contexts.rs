//! Who passes contexts on: what proxies report of the requests that came to each service and went out from its pods.
//!
//! What comes in to a service is told by the proxies of those who call it, what goes out by those of its own pods. Nobody knows which
//! request was made because of which: these are shares.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use culvert_xds_client::overrides::contexts::{Carried, Counted, read};
use culvert_xds_client::overrides::split_service;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterStats;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use super::tunnels;
use crate::kubernetes::ObjectKey;
use crate::mesh::Mesh;
use crate::resources::Snapshot;

/// So many requests with overrides have to have come in before shares are compared.
pub const ENOUGH: u64 = 20;
/// How old the picture of whose addresses are whose may be, where the mesh has changed since.
const MAX_AGE: Duration = Duration::from_secs(2);
/// The most addresses of which numbers are kept until that picture is new.
const MAX_PENDING: usize = 10_000;

/// A service's requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passed {
    /// Those that came to it.
    #[serde(with = "CarriedJson")]
    pub came: Carried,
    /// Those that its pods sent.
    #[serde(with = "CarriedJson")]
    pub went: Carried,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Carried")]
struct CarriedJson {
    overrides: u64,
    trace_only: u64,
    nothing: u64,
}

impl Passed {
    /// What that means, in words; and whether the service drops what it is sent.
    #[must_use]
    pub fn verdict(&self) -> (&'static str, bool) {
        let Passed { came, went } = self;
        if came.overrides == 0 {
            return ("none came to it", false);
        }
        if went.total() == 0 {
            return ("calls nobody that is seen", false);
        }
        // A few may have been answered without calls of others, and what went out may have been on its own account. Nor are the reports of
        // what came and what went of one moment.
        match (went.overrides, came.overrides >= ENOUGH, went.trace_only > 0) {
            (1.., _, _) => {}
            (0, true, true) => return ("DROPS them: it passes on trace headers, but not their baggage", true),
            (0, true, false) => return ("DROPS them", true),
            (0, false, true) => {
                return ("passed on none so far, only trace headers; too few have come to say more", false);
            }
            (0, false, false) => return ("passed on none so far; too few have come to say more", false),
        }
        // The share that goes out is less than half of the share that comes in.
        let (out_share, in_share) = (
            u128::from(went.overrides) * u128::from(came.total()),
            u128::from(came.overrides) * u128::from(went.total()),
        );
        let less = 2 * out_share < in_share;
        match (came.overrides >= ENOUGH, less) {
            (true, true) => ("passes on some, and may drop others", true),
            (true, false) => ("passes them on", false),
            (false, true) => ("passes on some; too few have come to say more", false),
            (false, false) => ("passes on what came so far", false),
        }
    }
}

/// What is known of all services.
#[derive(Debug, Clone, Default)]
pub struct Contexts(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Seen>,
    /// Somebody needs to know whose addresses are whose in the newest mesh.
    wanted: Notify,
}

#[derive(Debug, Default)]
struct Seen {
    reports: u64,
    services: BTreeMap<ObjectKey, Passed>,
    owners: Owners,
    /// What came from addresses that may be those of pods that are newer than the picture.
    pending: HashMap<IpAddr, Carried>,
}

/// Whose addresses are whose.
#[derive(Debug, Default)]
struct Owners {
    mesh: Weak<Mesh>,
    by_address: HashMap<IpAddr, Vec<ObjectKey>>,
}

/// Contexts at `/status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextsStatus {
    /// How many reports of proxies there were since the start.
    pub reports: u64,
    /// The services that requests came to, or went out from: another replica may have been told the other half.
    pub services: Vec<ContextStatus>,
}

/// What is known of one service at `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextStatus {
    /// `name.namespace`.
    pub service: String,
    /// Its requests.
    #[serde(flatten)]
    pub passed: Passed,
    /// Whether it drops contexts.
    pub drops: bool,
    /// What that means, in words.
    pub verdict: String,
}

impl ContextStatus {
    /// With what it means.
    #[must_use]
    pub fn new(service: String, passed: Passed) -> Self {
        let (verdict, drops) = passed.verdict();
        Self { service, passed, drops, verdict: verdict.to_owned() }
    }
}

impl Contexts {
    fn with<T>(&self, change: impl FnOnce(&mut Seen) -> T) -> T {
        // Sums are whole after every change, so a panic elsewhere does not spoil them.
        change(&mut self.0.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps the picture of whose addresses are whose as new as reports need it, until snapshots end.
    pub async fn run(self, snapshots: watch::Receiver<Arc<Snapshot>>) {
        while snapshots.has_changed().is_ok() {
            self.0.wanted.notified().await;
            let mesh = Arc::clone(&snapshots.borrow().mesh);
            // A hundred thousand endpoints are read on a thread that may take its time, and while nobody waits.
            let Ok(owners) = tokio::task::spawn_blocking(move || Owners::of(&mesh)).await else { return };
            self.learn(owners);
            // A mesh may change fifty times a second.
            tokio::time::sleep(MAX_AGE).await;
        }
    }

    /// Takes in whose addresses are whose.
    fn learn(&self, owners: Owners) {
        let before = self.with(|seen| {
            let before = std::mem::replace(&mut seen.owners, owners);
            for (address, carried) in std::mem::take(&mut seen.pending) {
                seen.went(address, carried);
            }
            if let Some(mesh) = seen.owners.mesh.upgrade() {
                seen.services.retain(|key, _| mesh.services.contains_key(key));
            }
            before
        });
        // A large one is let go of where nobody waits for it.
        drop(before);
    }

    /// Takes in what a proxy reports. What is of no service of the mesh is passed over.
    pub fn add(&self, report: &ClusterStats, mesh: &Arc<Mesh>) {
        let is_new = self.with(|seen| {
            seen.reports += 1;
            let is_new = seen.owners.mesh.ptr_eq(&Arc::downgrade(mesh));
            for (whose, carried) in read(report) {
                match whose {
                    Counted::To(cluster) => {
                        let service = cluster.rsplit_once(':').map_or(&*cluster, |(service, _)| service);
                        let (name, namespace) = split_service(service);
                        let key = ObjectKey::new(namespace, name);
                        if mesh.services.contains_key(&key) {
                            seen.services.entry(key).or_default().came += carried;
                        }
                    }
                    Counted::From(address) => {
                        let Ok(address) = address.parse::<IpAddr>() else { continue };
                        let address = address.to_canonical();
                        if !seen.went(address, carried) && !is_new && seen.pending.len() < MAX_PENDING {
                            *seen.pending.entry(address).or_default() += carried;
                        }
                    }
                }
            }
            is_new
        });
        if !is_new {
            self.0.wanted.notify_one();
        }
    }

    /// How many reports there were.
    #[must_use]
    pub fn reports(&self) -> u64 {
        self.with(|seen| seen.reports)
    }

    /// What is known, by service.
    #[must_use]
    pub fn services(&self, mesh: &Mesh) -> Vec<(String, Passed)> {
        let name = |key: &ObjectKey| format!("{}.{}", key.name, key.namespace);
        self.with(|seen| {
            let there = seen.services.iter().filter(|(key, _)| mesh.services.contains_key(*key));
            there.map(|(key, passed)| (name(key), *passed)).collect()
        })
    }

    /// What `/status` says.
    #[must_use]
    pub fn status(&self, mesh: &Mesh) -> ContextsStatus {
        let services = self.services(mesh).into_iter().map(|(service, passed)| ContextStatus::new(service, passed));
        ContextsStatus { reports: self.reports(), services: services.collect() }
    }
}

impl Seen {
    /// Counts what the pods with this address sent; gives whether there are any.
    fn went(&mut self, address: IpAddr, carried: Carried) -> bool {
        let Some(owners) = self.owners.by_address.get(&address) else { return false };
        for key in owners {
            self.services.entry(key.clone()).or_default().went += carried;
        }
        true
    }
}

impl Owners {
    /// Reads them off a mesh.
    fn of(mesh: &Arc<Mesh>) -> Owners {
        let mut by_address: HashMap<IpAddr, Vec<ObjectKey>> = HashMap::new();
        for (key, service) in &mesh.services {
            for port in service.ports.values() {
                let endpoints = port.endpoints.iter().flat_map(|endpoint| {
                    std::iter::once(endpoint.address).chain(endpoint.other_family).map(|address| address.ip())
                });
                // What comes from the address of a tunnel comes from discovery.
                let pods = port.offloaded.iter().filter(|endpoint| endpoint.cluster != tunnels::CLUSTER_OF_TUNNELS);
                for address in endpoints.chain(pods.map(|endpoint| endpoint.address.ip())) {
                    let owners = by_address.entry(address.to_canonical()).or_default();
                    // Services come one after the other.
                    if owners.last() != Some(key) {
                        owners.push(key.clone());
                    }
                }
            }
        }
        Owners { mesh: Arc::downgrade(mesh), by_address }
    }
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::overrides::contexts::report;
    use envoy_types::pb::google::protobuf;

    use super::*;
    use crate::mesh::{Endpoint, Health, Locality, MeshPort, MeshService, Protocol};

    fn carried(overrides: u64, trace_only: u64, nothing: u64) -> Carried {
        Carried { overrides, trace_only, nothing }
    }

    fn mesh(services: &[(&str, &str)]) -> Arc<Mesh> {
        let service = |address: &str| {
            let endpoint = Endpoint {
                address: address.parse().unwrap(),
                other_family: None,
                locality: Locality::default(),
                health: Health::Healthy,
                cluster: "east".to_owned(),
                weight: None,
                canary: false,
            };
            let port = MeshPort {
                protocol: Protocol::Http1,
                vips: Vec::new(),
                external: None,
                endpoints: vec![endpoint],
                offloaded: Vec::new(),
                targets: Default::default(),
            };
            MeshService { ports: [(80, port)].into(), ..MeshService::default() }
        };
        let services = services.iter().map(|(name, it)| (ObjectKey::new("default", *name), Arc::new(service(it))));
        Arc::new(Mesh { services: services.collect(), ..Mesh::default() })
    }

    /// Takes a report in, and then who is who.
    fn told(contexts: &Contexts, mesh: &Arc<Mesh>, counted: &[(Counted, Carried)]) {
        contexts.add(&report(counted.iter().cloned(), protobuf::Duration::default()), mesh);
        contexts.learn(Owners::of(mesh));
    }

    #[test]
    fn who_drops_is_found_over_several_proxies() {
        let mesh = mesh(&[
            ("front", "10.0.0.1:8080"),
            ("users", "10.0.0.2:8080"),
            ("orders", "[fd00::3]:8080"),
            ("quiet", "10.0.0.4:8080"),
            ("leaf", "10.0.0.5:8080"),
        ]);
        let to = |name: &str| Counted::To(format!("{name}.default:80"));
        let from = |address: &str| Counted::From(address.to_owned());
        let contexts = Contexts::default();
        told(
            &contexts,
            &mesh,
            &[
                (to("front"), carried(3, 0, 7)),
                (from("10.0.0.1"), carried(2, 5, 0)),
                (to("users"), carried(20, 0, 0)),
                (from("10.0.0.2"), carried(0, 4, 0)),
                (to("quiet"), carried(0, 0, 9)),
            ],
        );
        told(
            &contexts,
            &mesh,
            &[
                (from("fd00::3"), carried(0, 0, 6)),
                (to("orders"), carried(1, 0, 0)),
                (from("::ffff:10.0.0.1"), carried(1, 0, 0)),
                (to("leaf"), carried(1, 0, 0)),
                // Somebody's own cluster, and an address of nobody.
                (to("other"), carried(1, 0, 0)),
                (from("10.9.9.9"), carried(1, 0, 0)),
                (from("nonsense"), carried(1, 0, 0)),
            ],
        );
        let status = contexts.status(&mesh);
        let verdicts: Vec<_> = status.services.iter().map(|it| (&*it.service, &*it.verdict, it.drops)).collect();
        let expected = [
            ("front.default", "passes on what came so far", false),
            ("leaf.default", "calls nobody that is seen", false),
            ("orders.default", "passed on none so far; too few have come to say more", false),
            ("quiet.default", "none came to it", false),
            ("users.default", "DROPS them: it passes on trace headers, but not their baggage", true),
        ];
        assert_eq!((status.reports, verdicts), (2, expected.to_vec()));
        assert_eq!(status.services[0].passed.went, carried(3, 5, 0));
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["services"][0]["came"], serde_json::json!({"overrides": 3, "trace_only": 0, "nothing": 7}));
        assert_eq!(serde_json::from_value::<ContextsStatus>(json).unwrap(), status);
    }

    #[test]
    fn pods_come_later_and_services_go() {
        let contexts = Contexts::default();
        let from_2 = |overrides| [(Counted::From("10.0.0.2".into()), carried(overrides, 0, 0))];
        let before = mesh(&[("front", "10.0.0.1:80")]);
        told(&contexts, &before, &from_2(1));
        let add = |mesh: &Arc<Mesh>, counted: &[(Counted, Carried)]| {
            contexts.add(&report(counted.iter().cloned(), protobuf::Duration::default()), mesh);
        };
        add(&before, &from_2(1));
        let later = mesh(&[("front", "10.0.0.2:80")]);
        add(&later, &from_2(2));
        assert_eq!(contexts.services(&later), [], "whose it is is not known yet");
        contexts.learn(Owners::of(&later));
        let went = Passed { came: Carried::default(), went: carried(2, 0, 0) };
        assert_eq!(
            contexts.services(&later),
            [("front.default".to_owned(), went)],
            "at first the address was nobody's"
        );
        assert_eq!(contexts.services(&mesh(&[])), []);
        let nothing = mesh(&[]);
        contexts.learn(Owners::of(&nothing));
        assert_eq!(contexts.services(&later), []);
    }

    #[tokio::test]
    async fn who_is_who_is_read_aside_when_somebody_needs_it() {
        let mesh = mesh(&[("front", "10.0.0.1:80")]);
        let (_publish, snapshots) =
            watch::channel(Arc::new(Snapshot::build(Arc::clone(&mesh), &crate::resources::Options::default())));
        let contexts = Contexts::default();
        let running = tokio::spawn(contexts.clone().run(snapshots));
        let counted = [(Counted::From("10.0.0.1".into()), carried(1, 0, 0))];
        contexts.add(&report(counted.iter().cloned(), protobuf::Duration::default()), &mesh);
        let known = async {
            while contexts.services(&mesh).is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), known).await.unwrap();
        running.abort();
    }

    #[test]
    fn shares_are_compared_where_there_are_enough() {
        let verdict = |came, went| Passed { came, went }.verdict();
        assert!(!verdict(carried(19, 0, 0), carried(1, 0, 99)).1);
        assert!(verdict(carried(20, 0, 0), carried(1, 0, 99)).1);
        assert!(!verdict(carried(20, 0, 80), carried(11, 0, 89)).1);
        assert_eq!(verdict(carried(20, 0, 0), carried(0, 0, 1)), ("DROPS them", true));
        assert!(!verdict(carried(19, 0, 0), carried(0, 0, 99)).1);
        assert!(!verdict(carried(19, 0, 0), carried(0, 99, 0)).1);
        let few = verdict(carried(14, 0, 0), carried(3, 6, 0));
        assert_eq!(few, ("passes on some; too few have come to say more", false));
    }
}
