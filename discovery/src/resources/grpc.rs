//! LDS for gRPC's own xDS client: for each HTTP port of a service an API listener, which says how to call that service.
//!
//! gRPC asks for the listener that has the name of its target (gRFC A27): `xds:///users.default:80`, or
//! `xds:///users.default.svc.cluster.local:80`. What follows (CDS, EDS) is what proxies get.

use envoy_types::pb::envoy::config::listener::v3::{ApiListener, Listener};
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;

use super::listeners::router;
use super::pack;
use super::routes::to_service;
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, Protocol, cluster_name};
use crate::policy::ServiceManifest;

pub(super) fn listeners(mesh: &Mesh) -> Vec<(String, Listener)> {
    let mut listeners = Vec::new();
    for (key, service) in &mesh.services {
        for (port, described) in service.ports.iter().filter(|(_, described)| described.protocol.is_http()) {
            let cluster = cluster_name(key, *port);
            let ObjectKey { namespace, name } = key;
            let long = format!("{name}.{namespace}.svc.cluster.local:{port}");
            listeners.extend(
                [cluster.clone(), long].map(|name| {
                    (name.clone(), listener(name, &cluster, described.protocol, service.manifest.as_deref()))
                }),
            );
        }
    }
    listeners
}

fn listener(name: String, cluster: &str, protocol: Protocol, manifest: Option<&ServiceManifest>) -> Listener {
    let routes = RouteConfiguration {
        name: cluster.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: cluster.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![to_service(cluster, protocol, manifest)],
            ..Default::default()
        }],
        ..Default::default()
    };
    let manager = HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::RouteConfig(routes)),
        http_filters: vec![router()],
        ..Default::default()
    };
    let api_listener = Some(ApiListener { api_listener: Some(pack(&manager)) });
    Listener { name, api_listener, ..Default::default() }
}
