//! RDS: for each port with HTTP services, a route configuration that finds the service by the Host header.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::config::route::v3::route_action::ClusterSpecifier;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::config::route::v3::{
    RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
};
use envoy_types::pb::google::protobuf::{Duration, UInt32Value};

use super::{ORIGINAL_DST_CLUSTER, policy};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, Protocol, cluster_name};
use crate::policy::ServiceManifest;

/// How long a response may take. Not for gRPC, whose clients state deadlines and whose streams stay open.
const TIMEOUT: Duration = Duration { seconds: 15, nanos: 0 };
const NO_TIMEOUT: Duration = Duration { seconds: 0, nanos: 0 };
/// Only what cannot have reached the service: retrying is safe whatever the request does.
const RETRY_ON: &str = "connect-failure,refused-stream,reset-before-request";
const RETRIES: u32 = 2;

/// The name of a port's route configuration.
pub(super) fn route_configuration_name(port: u16) -> String {
    format!("outbound_http_{port}")
}

/// The route configurations of these ports, as far as HTTP services use them.
pub(super) fn route_configurations(mesh: &Mesh, ports: &BTreeSet<u16>) -> Vec<(String, RouteConfiguration)> {
    let mut by_port: BTreeMap<u16, Vec<VirtualHost>> = BTreeMap::new();
    for (key, service) in &mesh.services {
        let wanted = service.ports.iter().filter(|(port, _)| ports.contains(port));
        for (port, described) in wanted.filter(|(_, described)| described.protocol.is_http()) {
            let cluster = cluster_name(key, *port);
            by_port.entry(*port).or_default().push(VirtualHost {
                name: cluster.clone(),
                domains: domains(key, *port, &described.vips),
                routes: vec![to_service(&cluster, described.protocol, service.manifest.as_deref())],
                typed_per_filter_config: service.manifest.as_deref().map(policy::rate_limit).unwrap_or_default(),
                ..Default::default()
            });
        }
    }
    by_port
        .into_iter()
        .map(|(port, mut virtual_hosts)| {
            virtual_hosts.push(VirtualHost {
                name: "passthrough".to_owned(),
                domains: vec!["*".to_owned()],
                routes: vec![everything(RouteAction {
                    cluster_specifier: Some(ClusterSpecifier::Cluster(ORIGINAL_DST_CLUSTER.to_owned())),
                    timeout: Some(NO_TIMEOUT),
                    ..Default::default()
                })],
                ..Default::default()
            });
            let name = route_configuration_name(port);
            (name.clone(), RouteConfiguration { name, virtual_hosts, ..Default::default() })
        })
        .collect()
}

/// Every way to name a service in a Host header, with and without the port.
fn domains(key: &ObjectKey, port: u16, vips: &[IpAddr]) -> Vec<String> {
    let ObjectKey { namespace, name } = key;
    let mut hosts = Vec::new();
    if namespace == "default" {
        hosts.push(name.clone());
    }
    hosts.push(format!("{name}.{namespace}"));
    hosts.push(format!("{name}.{namespace}.svc"));
    hosts.push(format!("{name}.{namespace}.svc.cluster.local"));
    hosts.extend(vips.iter().map(|vip| match vip {
        IpAddr::V4(vip) => vip.to_string(),
        IpAddr::V6(vip) => format!("[{vip}]"),
    }));
    hosts.into_iter().flat_map(|host| [host.clone(), format!("{host}:{port}")]).collect()
}

pub(super) fn to_service(cluster: &str, protocol: Protocol, manifest: Option<&ServiceManifest>) -> Route {
    let timeout = match manifest.and_then(|manifest| manifest.timeouts.request) {
        Some(stated) => policy::duration(stated.0),
        None if protocol == Protocol::Grpc => NO_TIMEOUT,
        None => TIMEOUT,
    };
    let retry_policy = match manifest.and_then(|manifest| manifest.retries.as_ref()) {
        Some(stated) => policy::retry_policy(stated, RETRY_ON),
        None => Some(RetryPolicy {
            retry_on: RETRY_ON.to_owned(),
            num_retries: Some(UInt32Value { value: RETRIES }),
            ..Default::default()
        }),
    };
    everything(RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: Some(timeout),
        retry_policy,
        ..Default::default()
    })
}

/// To the pod of a sidecar. How long that may take its callers decide.
pub(super) fn to_own_port(cluster: &str) -> Route {
    everything(RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: Some(NO_TIMEOUT),
        ..Default::default()
    })
}

fn everything(action: RouteAction) -> Route {
    Route {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..Default::default() }),
        action: Some(Action::Route(action)),
        ..Default::default()
    }
}
