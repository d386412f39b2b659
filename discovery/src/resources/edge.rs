//! The edge: listeners for calls from outside the mesh, with routes to the services whose manifests let them in.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::{Override, r#override::Edge};
use culvert_xds_client::overrides::{CARRIERS, CONFIG, DEBUG};
use envoy_types::pb::envoy::config::core::v3::http_protocol_options::HeadersWithUnderscoresAction;
use envoy_types::pb::envoy::config::core::v3::{CidrRange, Http2ProtocolOptions, HttpProtocolOptions};
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::config::route::v3::{Route, RouteConfiguration, RouteMatch, VirtualHost};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    InternalAddressConfig, PathWithEscapedSlashesAction, RouteSpecifier,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{HttpConnectionManager, Rds};
use envoy_types::pb::google::protobuf::{BoolValue, Duration, UInt32Value};
use http::HeaderName;
use serde::Deserialize;

use super::clusters::{over_ads, socket_address};
use super::listeners::{access_log, http_filter, manager_filter, override_filter, router};
use super::routes::to_service;
use super::{EDGE_ROUTES, Options, ProxyKind, policy};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, MeshService, cluster_name};
use crate::policy::{AddressRange, Edge as Exposed};

/// The streams that one connection from outside may have at a time.
const MAX_STREAMS: u32 = 100;
/// How long a client may take to say what it wants.
const HEADERS_TIMEOUT: Duration = Duration { seconds: 10, nanos: 0 };

/// How edge proxies are configured: `edge` of the configuration file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeOptions {
    /// Where they listen.
    pub listeners: Vec<EdgeListener>,
    /// What becomes of overrides that come from outside.
    #[serde(default)]
    pub overrides: EdgeOverrides,
    /// Whose addresses are not from outside: requests from there are internal.
    #[serde(default)]
    pub internal_ranges: Vec<AddressRange>,
    /// How many proxies in front of the edge are trusted to say in `x-forwarded-for` where a request comes from.
    #[serde(default)]
    pub trusted_hops: u32,
}

/// Where edge proxies listen.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdgeListener {
    /// The address. The unspecified IPv6 address takes IPv4 connections too.
    #[serde(default = "everywhere")]
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The secret with the certificate, which comes by SDS; without it the listener has no TLS.
    pub tls: Option<String>,
}

fn everywhere() -> IpAddr {
    Ipv6Addr::UNSPECIFIED.into()
}

/// What becomes of overrides that come from outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EdgeOverrides {
    /// They are taken out of all requests.
    #[default]
    Strip,
    /// They are taken out of those that are not internal.
    StripExternal,
    /// They count, as far as the filter's other fields let them.
    Keep,
}

impl EdgeOptions {
    /// Says what cannot work. `proxies_own`: the ports of the listeners of other proxies, into which NAT rules redirect.
    ///
    /// # Errors
    /// The field and what is wrong with it.
    pub fn check(&self, proxies_own: [u16; 2]) -> Result<(), String> {
        /// Each of them adds an address to a header, which has a limit of its own.
        const MOST_HOPS: u32 = 100;
        if self.trusted_hops > MOST_HOPS {
            return Err(format!("edge.trusted_hops: at most {MOST_HOPS}"));
        }
        if self.listeners.is_empty() {
            return Err("edge.listeners: an edge proxy needs a listener".to_owned());
        }
        for (index, listener) in self.listeners.iter().enumerate() {
            if listener.port == 0 {
                return Err(format!("edge.listeners[{index}].port: 0 is not a port"));
            }
            if proxies_own.contains(&listener.port) {
                let reason = "is the outbound or the inbound port of the mesh's proxies";
                return Err(format!("edge.listeners[{index}].port: {} {reason}", listener.port));
            }
            if self.listeners[..index].iter().any(|before| before.port == listener.port) {
                return Err(format!("edge.listeners[{index}].port: {} is taken by another one", listener.port));
            }
            if listener.tls.as_ref().is_some_and(String::is_empty) {
                return Err(format!("edge.listeners[{index}].tls: is no secret"));
            }
        }
        if self.overrides == EdgeOverrides::StripExternal && self.internal_ranges.is_empty() {
            return Err(
                "edge.overrides: strip_external needs `edge.internal_ranges`: else nothing is internal".to_owned()
            );
        }
        Ok(())
    }
}

/// What edge proxies listen to.
pub(super) fn listeners(mesh: &Mesh, options: &Options, kind: ProxyKind) -> Vec<(String, Listener)> {
    let Some(edge) = &options.edge else { return Vec::new() };
    let exposed = mesh.services.values().filter_map(|service| service.manifest.as_ref());
    let counted = exposed.clone().any(|manifest| manifest.edge.is_some() && manifest.rate_limit.is_some());
    let listener = |listener: &EdgeListener| {
        let EdgeListener { address, port, tls } = listener;
        let dual_stack = address.is_unspecified() && address.is_ipv6();
        let name = format!("edge_{port}");
        let chain = FilterChain {
            name: name.clone(),
            filters: vec![manager_filter(manager(edge, counted, options, kind))],
            transport_socket: tls.as_deref().map(policy::edge_tls),
            ..Default::default()
        };
        let address = Some(socket_address(*address, *port, dual_stack));
        (name.clone(), Listener { name, address, filter_chains: vec![chain], ..Default::default() })
    };
    edge.listeners.iter().map(listener).collect()
}

/// `counted`: requests to some of the services are.
fn manager(edge: &EdgeOptions, counted: bool, options: &Options, kind: ProxyKind) -> HttpConnectionManager {
    let mut http_filters = Vec::new();
    if kind == ProxyKind::Culvert {
        let mode = match edge.overrides {
            EdgeOverrides::Strip => Edge::Strip,
            EdgeOverrides::StripExternal => Edge::StripExternal,
            EdgeOverrides::Keep => Edge::Keep,
        };
        http_filters.push(override_filter(Override { edge: mode.into(), ..options.overrides.clone() }));
    }
    if counted {
        http_filters.push(http_filter(policy::RATE_LIMIT_FILTER, policy::rate_limit_filter()));
    }
    http_filters.push(router());
    let yes = Some(BoolValue { value: true });
    let internal = (!edge.internal_ranges.is_empty()).then(|| InternalAddressConfig {
        cidr_ranges: edge.internal_ranges.iter().map(cidr_range).collect(),
        ..Default::default()
    });
    // As Envoy advises for proxies at the edge: what two readers of a request could take differently does not get in, and nobody takes for
    // ever to say what he wants.
    HttpConnectionManager {
        stat_prefix: "edge".to_owned(),
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: Some(over_ads()),
            route_config_name: EDGE_ROUTES.to_owned(),
        })),
        http_filters,
        access_log: access_log(options),
        use_remote_address: yes,
        xff_num_trusted_hops: edge.trusted_hops,
        internal_address_config: internal,
        request_headers_timeout: Some(HEADERS_TIMEOUT),
        normalize_path: yes,
        merge_slashes: true,
        path_with_escaped_slashes_action: PathWithEscapedSlashesAction::UnescapeAndRedirect.into(),
        common_http_protocol_options: Some(HttpProtocolOptions {
            headers_with_underscores_action: HeadersWithUnderscoresAction::RejectRequest.into(),
            ..Default::default()
        }),
        http2_protocol_options: Some(Http2ProtocolOptions {
            max_concurrent_streams: Some(UInt32Value { value: MAX_STREAMS }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn cidr_range(range: &AddressRange) -> CidrRange {
    let (address, bits) = range.parts();
    CidrRange { address_prefix: address.to_string(), prefix_len: Some(UInt32Value { value: bits.into() }) }
}

/// The port of a service that is called from outside, if it is let to be.
#[must_use]
pub fn exposed(service: &MeshService) -> Option<(&Exposed, u16)> {
    let stated = service.manifest.as_ref()?.edge.as_ref()?;
    let mut http = service.ports.iter().filter(|(_, port)| port.protocol.is_http()).map(|(number, _)| *number);
    let port = http.find(|port| stated.port.is_none_or(|stated| stated.get() == *port))?;
    Some((stated, port))
}

/// Who has the prefixes of a domain, the longest first: the service and its port.
pub(crate) type Claims<'a> = BTreeMap<(Reverse<usize>, &'a str), (&'a ObjectKey, u16)>;

/// For each domain and prefix the service that has it. Of several, the one whose manifest is the oldest counts, or the first by name: a new one
/// takes nothing over. `conflict` is told of the others. A manifest of a file has no age, and is older than any of an API server.
pub(crate) fn claims<'a>(
    mesh: &'a Mesh,
    mut conflict: impl FnMut(&'a ObjectKey, &'a ObjectKey, &'a str, &'a str),
) -> BTreeMap<&'a str, Claims<'a>> {
    let mut domains: BTreeMap<&str, Claims<'_>> = BTreeMap::new();
    let all = mesh.services.iter();
    let mut all: Vec<_> = all.filter_map(|(key, service)| Some((key, service, exposed(service)?))).collect();
    all.sort_by_key(|(_, service, _)| service.manifest.as_ref().and_then(|manifest| manifest.created));
    for (key, _, (stated, port)) in all {
        let prefix = stated.prefix.as_str();
        for domain in stated.domains.iter() {
            // The longest one counts.
            let claims = domains.entry(domain).or_default();
            let (owner, _) = claims.entry((Reverse(prefix.len()), prefix)).or_insert((key, port));
            if *owner != key {
                conflict(owner, key, domain, prefix);
            }
        }
    }
    domains
}

/// The routes of edge proxies.
pub(super) fn route_configuration(mesh: &Mesh, options: &Options, kind: ProxyKind) -> (String, RouteConfiguration) {
    let hosts = claims(mesh, |_, _, _, _| {}).into_iter().map(|(domain, claims)| {
        let routes = claims.into_iter().filter_map(|((_, prefix), (key, port))| {
            let service = mesh.services.get(key)?;
            let manifest = service.manifest.as_deref();
            let path = match prefix {
                "/" => PathSpecifier::Prefix(prefix.to_owned()),
                prefix => PathSpecifier::PathSeparatedPrefix(prefix.to_owned()),
            };
            Some(Route {
                r#match: Some(RouteMatch { path_specifier: Some(path), ..Default::default() }),
                typed_per_filter_config: manifest.map(policy::rate_limit).unwrap_or_default(),
                ..to_service(&cluster_name(key, port), service.ports.get(&port)?.protocol, manifest)
            })
        });
        VirtualHost {
            name: domain.to_owned(),
            domains: vec![domain.to_owned()],
            routes: routes.collect(),
            ..Default::default()
        }
    });
    // The filter does that in culvertd, and leaves other baggage in.
    let strips = options.edge.as_ref().is_some_and(|edge| edge.overrides != EdgeOverrides::Keep);
    let mut taken_out = Vec::new();
    if kind != ProxyKind::Culvert {
        // What only an override may put into a request, and never its sender.
        taken_out.extend([CONFIG, X_ENVOY_ORIGINAL_DST_HOST]);
        if strips {
            taken_out.extend(CARRIERS.into_iter().chain([DEBUG]));
        }
    }
    let routes = RouteConfiguration {
        name: EDGE_ROUTES.to_owned(),
        virtual_hosts: hosts.collect(),
        request_headers_to_remove: taken_out.iter().map(ToString::to_string).collect(),
        ignore_port_in_host_matching: true,
        ..Default::default()
    };
    (EDGE_ROUTES.to_owned(), routes)
}

/// Names a host to Envoy, past load balancing.
const X_ENVOY_ORIGINAL_DST_HOST: HeaderName = HeaderName::from_static("x-envoy-original-dst-host");
