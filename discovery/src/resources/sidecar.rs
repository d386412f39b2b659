//! What a sidecar is given beside the listener for what its pod calls: a listener for what calls its pod.
//!
//! ```text
//! port of the pod that is one of its service's   -> its protocol, limits and mTLS -> where the client wanted to go, which is the pod
//! any other                                      -> where the client wanted to go; nowhere while that may be an encrypted one
//! ```
//! Connections are redirected by the pod's own NAT rules, for both listeners. Whoever connects to a listener itself is turned away: the
//! proxy would connect to itself for ever.
//!
//! A pod that calls its own service may be led to itself: then the proxy calls itself, over the loopback device, where both ends of it
//! look alike. So what comes from `inbound` has a priority of its own, by which the rules know it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3::socket_option::{SocketState, Value as SocketValue};
use envoy_types::pb::envoy::config::core::v3::{BindConfig, SocketOption};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::{AdditionalAddress, FilterChain, FilterChainMatch, Listener};
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;

use super::clusters::{CONNECT_TIMEOUT, protocol_options, socket_address};
use super::listeners::{
    access_log, http_filter, manager_filter, matching_port, original_dst_filter, passthrough, router, tcp_proxy,
};
use super::routes::to_own_port;
use super::{INBOUND_LISTENER, Options, policy};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, MeshPort, MeshService, Protocol, cluster_name};
use crate::policy::ServiceManifest;

/// The cluster without endpoints, for connections to a listener itself.
const NOWHERE: &str = "nowhere";
/// The cluster that leads to the pod's ports that are none of its services'.
const TO_THE_POD: &str = "inbound_passthrough";
/// The option of sockets that says how urgent packets are, on Linux (`SOL_SOCKET`, `SO_PRIORITY`): the same for both families.
const SO_PRIORITY: (i64, i64) = (1, 12);
/// The priority of what goes from `inbound` to the pod: the highest that needs no privileges.
const PRIORITY: i64 = 6;

/// The cluster that leads to the pod's own port of a service's port.
fn own_cluster(key: &ObjectKey, port: u16) -> String {
    format!("inbound_{}", cluster_name(key, port))
}

/// The ports of the pod that services of these have, by the pod's numbers. Of services that share one, the first with mTLS counts, or the
/// first: what one of them wants encrypted is not open by another's name.
fn own_ports<'a>(mesh: &'a Mesh, own: &BTreeSet<ObjectKey>, options: &Options) -> BTreeMap<u16, OwnPort<'a>> {
    let mut ports = BTreeMap::new();
    for (key, service) in own.iter().filter_map(|key| mesh.services.get_key_value(key)) {
        for (port, described) in &service.ports {
            for target in described.targets.iter().filter(|target| **target != options.inbound_port) {
                let port = OwnPort { cluster: own_cluster(key, *port), described, service };
                let known: Option<&OwnPort<'_>> = ports.get(target);
                if known.is_none_or(|known| service.has_mtls() && !known.service.has_mtls()) {
                    ports.insert(*target, port);
                }
            }
        }
    }
    ports
}

struct OwnPort<'a> {
    cluster: String,
    described: &'a MeshPort,
    service: &'a MeshService,
}

impl OwnPort<'_> {
    fn manifest(&self) -> Option<&ServiceManifest> {
        self.service.manifest.as_deref()
    }
}

/// The clusters that only a sidecar of pods of these services has.
pub(super) fn clusters(mesh: &Mesh, own: &BTreeSet<ObjectKey>, options: &Options) -> Vec<(String, Cluster)> {
    let nowhere = Cluster {
        name: NOWHERE.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        connect_timeout: Some(CONNECT_TIMEOUT),
        load_assignment: Some(ClusterLoadAssignment { cluster_name: NOWHERE.to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let unknown = to_the_pod(TO_THE_POD, Protocol::Tcp, None);
    let mut clusters = BTreeMap::from([(NOWHERE.to_owned(), nowhere), (TO_THE_POD.to_owned(), unknown)]);
    for port in own_ports(mesh, own, options).into_values() {
        let cluster = to_the_pod(&port.cluster, port.described.protocol, port.manifest());
        clusters.insert(port.cluster, cluster);
    }
    clusters.into_iter().collect()
}

/// A cluster that leads where the client wanted to go, which is the pod.
fn to_the_pod(name: &str, protocol: Protocol, manifest: Option<&ServiceManifest>) -> Cluster {
    let priority = SocketOption {
        description: "past the rule that redirects what the proxy sends to its own pod".to_owned(),
        level: SO_PRIORITY.0,
        name: SO_PRIORITY.1,
        value: Some(SocketValue::IntValue(PRIORITY)),
        state: SocketState::StatePrebind.into(),
        ..Default::default()
    };
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        connect_timeout: Some(CONNECT_TIMEOUT),
        lb_policy: LbPolicy::ClusterProvided.into(),
        typed_extension_protocol_options: protocol_options(
            protocol,
            manifest.and_then(|manifest| manifest.timeouts.idle),
        ),
        circuit_breakers: manifest.and_then(policy::circuit_breakers),
        upstream_bind_config: Some(BindConfig { socket_options: vec![priority], ..Default::default() }),
        ..Default::default()
    }
}

/// Where the outbound listener is: at the loopback addresses of the families that proxies have, which is where redirected connections of
/// the pod itself come; at an address that is configured, there.
pub(super) fn outbound_addresses(options: &Options) -> Vec<IpAddr> {
    match options.outbound_address {
        IpAddr::V6(address) if address.is_unspecified() => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        IpAddr::V4(address) if address.is_unspecified() => vec![Ipv4Addr::LOCALHOST.into()],
        address => vec![address],
    }
}

/// Gives a listener these addresses, of which there is one at least.
pub(super) fn listen_at(listener: &mut Listener, addresses: &[IpAddr], port: u16) {
    let mut addresses = addresses.iter().map(|address| socket_address(*address, port, false));
    listener.address = addresses.next();
    let more = addresses.map(|address| AdditionalAddress { address: Some(address), ..Default::default() });
    listener.additional_addresses = more.collect();
}

/// The chain for connections to a listener itself. `addresses`: its own, unless it is at all of them.
pub(super) fn itself(port: u16, addresses: &[IpAddr]) -> FilterChain {
    closed("itself", matching_port(port, addresses))
}

fn closed(name: &str, filter_chain_match: Option<FilterChainMatch>) -> FilterChain {
    FilterChain {
        name: name.to_owned(),
        filter_chain_match,
        filters: vec![tcp_proxy(name, NOWHERE, None)],
        ..Default::default()
    }
}

/// The listener for what calls the pod.
pub(super) fn inbound(mesh: &Mesh, own: &BTreeSet<ObjectKey>, options: &Options) -> Listener {
    let own_ports = own_ports(mesh, own, options);
    let chains = own_ports.iter().map(|(target, port)| chain(*target, port, options));
    let dual_stack = options.outbound_address.is_unspecified() && options.outbound_address.is_ipv6();
    Listener {
        name: INBOUND_LISTENER.to_owned(),
        address: Some(socket_address(options.outbound_address, options.inbound_port, dual_stack)),
        listener_filters: vec![original_dst_filter()],
        filter_chains: chains.chain([itself(options.inbound_port, &[])]).collect(),
        default_filter_chain: Some(match hides_a_port(mesh, own) {
            true => closed("unknown", None),
            false => passthrough(TO_THE_POD),
        }),
        ..Default::default()
    }
}

/// Whether a service of these encrypts a port of the pod of which only the name is known yet: it may be any.
fn hides_a_port(mesh: &Mesh, own: &BTreeSet<ObjectKey>) -> bool {
    let mut services = own.iter().filter_map(|key| mesh.services.get(key));
    services.any(|service| service.has_mtls() && service.ports.values().any(|port| port.targets.is_empty()))
}

fn chain(target: u16, port: &OwnPort<'_>, options: &Options) -> FilterChain {
    let OwnPort { cluster, described, .. } = port;
    let manifest = port.manifest();
    let name = format!("inbound_{target}");
    let idle = manifest.and_then(|manifest| manifest.timeouts.idle);
    let filter =
        if described.protocol.is_http() { http(&name, port, options) } else { tcp_proxy(&name, cluster, idle) };
    let mtls = manifest.and_then(|manifest| manifest.mtls.as_ref());
    FilterChain {
        name,
        filter_chain_match: matching_port(target, &[]),
        filters: vec![filter],
        transport_socket: mtls.map(|mtls| policy::downstream_tls(mtls, described.protocol)),
        ..Default::default()
    }
}

/// The connection manager of a port. Timeouts and retries are the callers'.
fn http(name: &str, port: &OwnPort<'_>, options: &Options) -> envoy_types::pb::envoy::config::listener::v3::Filter {
    let limits = port.manifest().map(policy::rate_limit).unwrap_or_default();
    let mut http_filters = Vec::new();
    if !limits.is_empty() {
        http_filters.push(http_filter(policy::RATE_LIMIT_FILTER, policy::rate_limit_filter()));
    }
    http_filters.push(router());
    let routes = RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: port.cluster.clone(),
            domains: vec!["*".to_owned()],
            routes: vec![to_own_port(&port.cluster)],
            typed_per_filter_config: limits,
            ..Default::default()
        }],
        ..Default::default()
    };
    manager_filter(HttpConnectionManager {
        stat_prefix: name.to_owned(),
        route_specifier: Some(RouteSpecifier::RouteConfig(routes)),
        http_filters,
        access_log: access_log(options),
        ..Default::default()
    })
}
