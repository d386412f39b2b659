//! CDS and EDS: a cluster per service port, and its endpoints by locality.

use std::collections::{BTreeMap, HashMap};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, DnsLookupFamily, EdsClusterConfig, LbPolicy,
};
use envoy_types::pb::envoy::config::core::v3::HttpProtocolOptions as CoreHttpProtocolOptions;
use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, HealthStatus, Http1ProtocolOptions,
    Http2ProtocolOptions, Locality, Metadata, SocketAddress,
};
use envoy_types::pb::envoy::config::endpoint::v3::endpoint::AdditionalAddress;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration, Struct, UInt32Value, Value};

use super::{ORIGINAL_DST_CLUSTER, pack, policy};
use crate::mesh::{External, Health, Mesh, Protocol, cluster_name};
use crate::policy::Span;

const HTTP_PROTOCOL_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
pub(super) const CONNECT_TIMEOUT: Duration = Duration { seconds: 1, nanos: 0 };

/// "Ask for it on the stream that this came from."
pub(super) fn over_ads() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..Default::default()
    }
}

pub(crate) fn socket_address(address: std::net::IpAddr, port: u16, ipv4_compat: bool) -> Address {
    Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: address.to_string(),
            ipv4_compat,
            port_specifier: Some(PortSpecifier::PortValue(port.into())),
            ..Default::default()
        })),
    }
}

pub(super) fn clusters(mesh: &Mesh) -> Vec<(String, Cluster)> {
    let mut clusters = Vec::new();
    for (key, service) in &mesh.services {
        for (port, described) in &service.ports {
            let name = cluster_name(key, *port);
            let endpoints = match &described.external {
                Some(external) => external_name(&name, external),
                None => Cluster {
                    cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
                    eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(over_ads()), ..Default::default() }),
                    ..Default::default()
                },
            };
            let manifest = service.manifest.as_deref();
            let idle = manifest.and_then(|manifest| manifest.timeouts.idle);
            let mut cluster = Cluster {
                name: name.clone(),
                connect_timeout: Some(CONNECT_TIMEOUT),
                lb_policy: LbPolicy::RoundRobin.into(),
                typed_extension_protocol_options: protocol_options(described.protocol, idle),
                ..endpoints
            };
            if let Some(manifest) = manifest {
                policy::shape(&mut cluster, manifest, described.protocol);
            }
            clusters.push((name, cluster));
        }
    }
    clusters
}

/// A host that is found by its name whenever a connection is made. LOGICAL_DNS, for names with many addresses, of which
/// every answer shows some; and because gRPC's own xDS client knows it.
fn external_name(name: &str, external: &External) -> Cluster {
    let address = Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: external.host.clone(),
            port_specifier: Some(PortSpecifier::PortValue(external.port.into())),
            ..Default::default()
        })),
    };
    let endpoint = Endpoint { address: Some(address), ..Default::default() };
    let host = LbEndpoint { host_identifier: Some(HostIdentifier::Endpoint(endpoint)), ..Default::default() };
    Cluster {
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::LogicalDns.into())),
        dns_lookup_family: DnsLookupFamily::V4Preferred.into(),
        // Others do not wait for a name server that does not know it.
        wait_for_warm_on_init: Some(BoolValue { value: false }),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![LocalityLbEndpoints { lb_endpoints: vec![host], ..Default::default() }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Connects to the destination that the client chose, or that an override names. Never by header: whoever could set
/// one would reach anything.
pub(super) fn original_dst() -> Cluster {
    Cluster {
        name: ORIGINAL_DST_CLUSTER.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        connect_timeout: Some(CONNECT_TIMEOUT),
        lb_policy: LbPolicy::ClusterProvided.into(),
        // A destination that nothing is known about speaks what its client speaks.
        typed_extension_protocol_options: http_options(
            UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: Some(Http1ProtocolOptions::default()),
                http2_protocol_options: Some(Http2ProtocolOptions::default()),
                ..Default::default()
            }),
            None,
        ),
        ..Default::default()
    }
}

pub(super) fn protocol_options(protocol: Protocol, idle: Option<Span>) -> HashMap<String, Any> {
    let protocol_config = match protocol {
        Protocol::Tcp => return HashMap::new(),
        Protocol::Http1 => ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default()),
        Protocol::Http2 | Protocol::Grpc => ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default()),
    };
    let explicit = ExplicitHttpConfig { protocol_config: Some(protocol_config) };
    http_options(UpstreamProtocolOptions::ExplicitHttpConfig(explicit), idle)
}

fn http_options(options: UpstreamProtocolOptions, idle: Option<Span>) -> HashMap<String, Any> {
    let common =
        idle.map(|idle| CoreHttpProtocolOptions { idle_timeout: Some(policy::duration(idle.0)), ..Default::default() });
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(options),
        common_http_protocol_options: common,
        ..Default::default()
    };
    HashMap::from([(HTTP_PROTOCOL_OPTIONS.to_owned(), pack(&options))])
}

pub(super) fn load_assignments(mesh: &Mesh) -> Vec<(String, ClusterLoadAssignment)> {
    let mut assignments = Vec::new();
    for (key, service) in &mesh.services {
        for (port, described) in service.ports.iter().filter(|(_, described)| described.external.is_none()) {
            let mut localities: BTreeMap<_, Vec<LbEndpoint>> = BTreeMap::new();
            for endpoint in &described.endpoints {
                let health = match endpoint.health {
                    Health::Healthy => HealthStatus::Healthy,
                    Health::Draining => HealthStatus::Draining,
                    Health::Unhealthy => HealthStatus::Unhealthy,
                };
                let address = socket_address(endpoint.address.ip(), endpoint.address.port(), false);
                let additional_addresses = endpoint.other_family.map(|address| AdditionalAddress {
                    address: Some(socket_address(address.ip(), address.port(), false)),
                });
                localities.entry(&endpoint.locality).or_default().push(LbEndpoint {
                    host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
                        address: Some(address),
                        additional_addresses: additional_addresses.into_iter().collect(),
                        ..Default::default()
                    })),
                    health_status: health.into(),
                    metadata: endpoint.canary.then(canary),
                    load_balancing_weight: endpoint.weight.map(|weight| UInt32Value { value: weight.get() }),
                });
            }
            let name = cluster_name(key, *port);
            let endpoints = localities
                .into_iter()
                .map(|(locality, lb_endpoints)| LocalityLbEndpoints {
                    locality: Some(Locality {
                        region: locality.region.clone(),
                        zone: locality.zone.clone(),
                        sub_zone: String::new(),
                    }),
                    // Proxies pass this over unless told to weigh localities; gRPC ignores a locality without it.
                    load_balancing_weight: Some(total_weight(&lb_endpoints)),
                    lb_endpoints,
                    ..Default::default()
                })
                .collect();
            let assignment = ClusterLoadAssignment { cluster_name: name.clone(), endpoints, ..Default::default() };
            assignments.push((name, assignment));
        }
    }
    assignments
}

/// What endpoints without a weight have is 1.
fn total_weight(endpoints: &[LbEndpoint]) -> UInt32Value {
    let weight = |endpoint: &LbEndpoint| endpoint.load_balancing_weight.map_or(1, |weight| weight.value);
    UInt32Value { value: endpoints.iter().map(weight).fold(0, u32::saturating_add) }
}

/// The metadata that Envoy's `canary` statistics and subsets go by.
fn canary() -> Metadata {
    let value = Value { kind: Some(Kind::BoolValue(true)) };
    let fields = HashMap::from([("canary".to_owned(), value)]);
    Metadata { filter_metadata: HashMap::from([("envoy.lb".to_owned(), Struct { fields })]), ..Default::default() }
}
