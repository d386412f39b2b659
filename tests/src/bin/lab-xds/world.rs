//! The resources that are pushed, and the server's side of a stream.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use culvert_tests::control_plane::{Push, Request, Resource, Stream};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig};
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress,
};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration, UInt32Value};
use prost::Name;

/// Endpoints of each cluster.
pub(super) const ENDPOINTS: u8 = 10;
/// The last endpoint gets all but a millionth of the requests, so that the first request shows its change.
const HEAVY: u32 = 1_000_000;

/// The name of cluster number `index`.
pub(super) fn cluster_name(index: usize) -> String {
    format!("team-{:02}/service-{index:05}", index % 40)
}

fn any<M: prost::Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn cluster(index: usize, connect_timeout: i64) -> Resource {
    let name = cluster_name(index);
    let ads = ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..Default::default()
    };
    let message = Cluster {
        name: name.clone(),
        connect_timeout: Some(ProtoDuration { seconds: connect_timeout, nanos: 0 }),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads), ..Default::default() }),
        ..Default::default()
    };
    Resource { name, version: connect_timeout.to_string(), body: any(&message) }
}

/// The endpoints of a cluster: 127.0.0.1 to 127.0.0.10 on port `port`, but for the last, which is on `last`.
fn assignment(name: &str, version: u64, port: u16, last: u16) -> Resource {
    let endpoint = |index: u8| {
        let heavy = index == ENDPOINTS;
        let address = Address {
            address: Some(AddressKind::SocketAddress(SocketAddress {
                address: format!("127.0.0.{index}"),
                port_specifier: Some(PortSpecifier::PortValue(u32::from(if heavy { last } else { port }))),
                ..Default::default()
            })),
        };
        LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: Some(address), ..Default::default() })),
            load_balancing_weight: Some(UInt32Value { value: if heavy { HEAVY } else { 1 } }),
            ..Default::default()
        }
    };
    let message = ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: (1..=ENDPOINTS).map(endpoint).collect(),
            ..Default::default()
        }],
        ..Default::default()
    };
    Resource { name: name.to_owned(), version: version.to_string(), body: any(&message) }
}

/// What the control plane knows, and what it has been told on its one stream.
pub(super) struct World {
    stream: Stream,
    clusters: Vec<Resource>,
    ports: [u16; 2],
    version: u64,
    /// Nonces of CDS and EDS that are not answered yet, with the time they were sent.
    unanswered: BTreeSet<String>,
    /// Names that endpoints were sent for.
    sent: BTreeSet<String>,
    /// What was last sent for a cluster.
    assignments: BTreeMap<String, Resource>,
    /// CDS has been asked for.
    asked: bool,
}

impl World {
    /// A world with `clusters` clusters, whose endpoints are on the first of two ports.
    pub(super) fn new(stream: Stream, clusters: usize, ports: [u16; 2]) -> World {
        World {
            stream,
            clusters: (0..clusters).map(|index| cluster(index, 1)).collect(),
            ports,
            version: 0,
            unanswered: BTreeSet::new(),
            sent: BTreeSet::new(),
            assignments: BTreeMap::new(),
            asked: false,
        }
    }

    /// Answers requests until `done`, or fails after `limit`.
    fn serve(&mut self, limit: Duration, what: &str, mut done: impl FnMut(&World) -> bool) -> Result<()> {
        let start = Instant::now();
        while !done(self) {
            ensure!(start.elapsed() < limit, "waited {limit:?} in vain for {what}");
            if let Some(request) = self.stream.next(Duration::from_millis(20))? {
                self.take(request)?;
            }
        }
        Ok(())
    }

    fn take(&mut self, request: Request) -> Result<()> {
        if let Some(error) = request.error {
            bail!("the proxy refused {}: {error}", request.type_url);
        }
        self.unanswered.remove(&request.nonce);
        if request.type_url == Cluster::type_url() {
            self.asked = true;
        } else if request.type_url == ClusterLoadAssignment::type_url() {
            for name in request.unsubscribed {
                self.sent.remove(&name);
            }
            let new: Vec<String> = request.names.into_iter().filter(|name| !self.sent.contains(name)).collect();
            if !new.is_empty() {
                let port = self.ports[0];
                for name in &new {
                    let resource = assignment(name, 1, port, port);
                    self.assignments.insert(name.clone(), resource);
                }
                self.endpoints(&new);
            }
        }
        Ok(())
    }

    fn push(&mut self, type_url: String, resources: Vec<Resource>) {
        self.version += 1;
        let nonce = format!("nonce-{}", self.version);
        self.unanswered.insert(nonce.clone());
        self.stream.push(Push { type_url, version: self.version.to_string(), nonce, resources, removed: Vec::new() });
    }

    fn endpoints(&mut self, names: &[String]) {
        self.sent.extend(names.iter().cloned());
        let resources = names.iter().filter_map(|name| self.assignments.get(name).cloned()).collect();
        self.push(ClusterLoadAssignment::type_url(), resources);
    }

    /// Waits until the proxy asks for clusters.
    pub(super) fn wait_for_subscription(&mut self) -> Result<()> {
        self.serve(Duration::from_secs(30), "the proxy to ask for clusters", |world| world.asked)
    }

    /// Pushes the first cluster only, and returns when it and its endpoints are acknowledged.
    pub(super) fn push_first(&mut self) -> Result<()> {
        let first = self.clusters[..1].to_vec();
        self.push(Cluster::type_url(), first);
        self.serve(Duration::from_secs(30), "a cluster to be acknowledged", |world| {
            world.unanswered.is_empty() && !world.sent.is_empty()
        })
    }

    /// Pushes all clusters with another connect timeout, so that each is rebuilt.
    pub(super) fn push_changed(&mut self) -> Result<()> {
        for index in 0..self.clusters.len() {
            self.clusters[index] = cluster(index, 2);
        }
        let clusters = self.clusters.clone();
        self.push(Cluster::type_url(), clusters);
        // Envoy asks for the endpoints once more in the state of the world, and only hears of them if they are sent.
        let endpoints = self.assignments.values().cloned().collect();
        self.push(ClusterLoadAssignment::type_url(), endpoints);
        self.settle()
    }

    /// Pushes all clusters, and returns when these and their endpoints are acknowledged.
    pub(super) fn push_all(&mut self) -> Result<()> {
        let (all, clusters) = (self.clusters.len(), self.clusters.clone());
        self.push(Cluster::type_url(), clusters);
        self.serve(Duration::from_secs(180), "all to be acknowledged", |world| {
            world.unanswered.is_empty() && world.sent.len() >= all
        })
    }

    /// Pushes all clusters and all endpoints once more, unchanged.
    pub(super) fn push_again(&mut self) -> Result<()> {
        let clusters = self.clusters.clone();
        self.push(Cluster::type_url(), clusters);
        let endpoints = self.assignments.values().cloned().collect();
        self.push(ClusterLoadAssignment::type_url(), endpoints);
        self.settle()
    }

    /// Sends a cluster's last endpoint to the other port (`true`) or back; only that cluster's endpoints are pushed.
    pub(super) fn change(&mut self, index: usize, other: bool) {
        let (name, version) = (cluster_name(index), self.version);
        let [first, second] = self.ports;
        let resource = assignment(&name, version + 2, first, if other { second } else { first });
        self.assignments.insert(name.clone(), resource);
        self.endpoints(&[name]);
    }

    /// Waits until all that was sent is acknowledged.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.serve(Duration::from_secs(60), "an acknowledgement", |world| world.unanswered.is_empty())
    }
}
