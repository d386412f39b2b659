//! `culvert.filters.http.override`: sends a request whose baggage names an offloaded revision of the chosen service to
//! that revision. docs/overrides.md has the messages and the rules.
//!
//! Only an endpoint that discovery lists as offloaded *for the very cluster that the route chose* can be reached. Whatever
//! else a request asks for is counted and ignored, and the request goes where it would have gone.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use culvert_xds_client::{
    api::culvert::{extensions::filters::http::overrides::v1::Override as Config, overrides::v1::OffloadedService},
    json::unpack,
    overrides::{DEFAULT_NAMESPACE, Overrides, overrides_from_headers},
};
use envoy_types::pb::google::protobuf::Any;

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute};
use crate::{
    config::FieldError,
    http::{
        body::Body,
        headers::names::X_ENVOY_ORIGINAL_DST_HOST,
        stream::{RequestHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

/// Every offloaded endpoint that discovery lists: by cluster, then by revision.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct OffloadedTable {
    by_cluster: HashMap<String, HashMap<String, Vec<SocketAddr>>>,
}

impl OffloadedTable {
    /// The table of some resources.
    ///
    /// # Errors
    /// The first endpoint that cannot be reached: a bad address or port.
    pub fn from_resources<'a>(
        resources: impl IntoIterator<Item = &'a OffloadedService>,
    ) -> Result<OffloadedTable, FieldError> {
        let mut table = OffloadedTable::default();
        for service in resources {
            let revisions = table.by_cluster.entry(service.cluster_name.clone()).or_default();
            for (index, endpoint) in service.endpoints.iter().enumerate() {
                let path = |field| format!("endpoints[{index}].{field}");
                let ip = endpoint.address.parse().map_err(|_| {
                    FieldError::new(path("address"), format!("\"{}\" is not an IP address", endpoint.address))
                })?;
                let port = u16::try_from(endpoint.port)
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(|| FieldError::new(path("port"), format!("{} is not a TCP port", endpoint.port)))?;
                revisions.entry(endpoint.revision.clone()).or_default().push(SocketAddr::new(ip, port));
            }
        }
        Ok(table)
    }

    /// One of the offloaded endpoints of a cluster's service and revision.
    fn find(&self, cluster: &str, revision: &str) -> Option<SocketAddr> {
        let endpoints = self.by_cluster.get(cluster)?.get(revision)?;
        endpoints.get(fastrand::usize(..endpoints.len().max(1))).copied()
    }
}

/// The full name of its configuration message.
pub(super) const TYPE_NAME: &str = "culvert.extensions.filters.http.overrides.v1.Override";

/// What is configured. Streams hold on to it: what they count in must last.
#[derive(Debug)]
struct Configured {
    original_dst_cluster: Box<str>,
    stats: Stats,
    _lease: Lease,
}

/// One stream's filter.
#[derive(Debug)]
struct OverrideFilter(Arc<Configured>);

#[derive(Debug, Clone, Copy)]
struct Stats {
    /// Requests that were sent to an offloaded endpoint.
    applied: Counter,
    /// Requests whose target is not an offloaded endpoint of the service.
    rejected: Counter,
    /// Requests whose headers could not be read.
    undecodable: Counter,
    /// Requests that carried `x-envoy-original-dst-host`, which was removed.
    header_removed: Counter,
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Config { original_dst_cluster } = unpack(typed_config, cx.path)?;
    if original_dst_cluster.is_empty() {
        return Err(FieldError::new(format!("{}.original_dst_cluster", cx.path), "must name an ORIGINAL_DST cluster"));
    }
    let scope = Scope::http(cx.stat_prefix);
    let lease = scope.lease();
    let counter = |name: &str| scope.counter(&format!("override.{name}"));
    let stats = Stats {
        applied: counter("applied"),
        rejected: counter("rejected"),
        undecodable: counter("undecodable"),
        header_removed: counter("header_removed"),
    };
    let configured = Configured { original_dst_cluster: original_dst_cluster.into(), stats, _lease: lease };
    Ok(Arc::new(OverrideFactory(Arc::new(configured))))
}

#[derive(Debug)]
struct OverrideFactory(Arc<Configured>);

impl HttpFilterFactory for OverrideFactory {
    fn stream(&self, _route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(OverrideFilter(Arc::clone(&self.0))))
    }

    fn needs_offloaded_services(&self) -> bool {
        true
    }
}

impl HttpFilter for OverrideFilter {
    fn request(&mut self, head: &mut RequestHead, _body: &mut Body, cx: &mut StreamCx) -> Flow {
        // Envoy obeys this header in any ORIGINAL_DST cluster and strips it nowhere: whoever can set it reaches anything.
        if head.headers.remove(X_ENVOY_ORIGINAL_DST_HOST).is_some() {
            self.0.stats.header_removed.inc();
        }
        match overrides_from_headers(&head.headers) {
            None => {}
            Some(Ok(overrides)) => self.apply(&overrides, cx),
            Some(Err(error)) => {
                tracing::debug!(%error, "overrides ignored");
                self.0.stats.undecodable.inc();
            }
        }
        Flow::Continue
    }
}

impl OverrideFilter {
    fn apply(&self, overrides: &Overrides, cx: &mut StreamCx) {
        let Some(cluster) = &cx.cluster else { return };
        let name = &*cluster.cluster.config.name;
        let Some(wanted) = overrides.overrides.iter().find(|entry| names(&entry.service, name)) else { return };
        let target = cx.worker.with_offloaded(|table| table.find(name, &wanted.revision));
        match (target, cx.worker.clusters.get(&self.0.original_dst_cluster)) {
            (Some(target), Some(original_dst)) => {
                self.0.stats.applied.inc();
                cx.override_dst = Some(target);
                cx.cluster = Some(original_dst);
            }
            _ => self.0.stats.rejected.inc(),
        }
    }
}

/// Whether `service` (`name` or `name.namespace`) is the service of the cluster `name.namespace:port`.
fn names(service: &str, cluster: &str) -> bool {
    let of_cluster = cluster.rsplit_once(':').map_or(cluster, |(service, _)| service);
    match of_cluster.strip_prefix(service) {
        Some("") => true,
        Some(rest) => !service.contains('.') && rest.strip_prefix('.') == Some(DEFAULT_NAMESPACE),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::api::culvert::overrides::v1::OffloadedEndpoint;

    use super::*;

    #[test]
    fn a_service_is_named_with_or_without_its_namespace() {
        assert!(names("users", "users.default:80"));
        assert!(names("users.default", "users.default:80"));
        assert!(names("users.shop", "users.shop:80"));
        assert!(!names("users", "users.shop:80"), "without a namespace, only `default`");
        assert!(!names("user", "users.default:80"));
        assert!(!names("users.def", "users.default:80"));
    }

    #[test]
    fn only_what_is_listed_for_the_cluster_is_found() {
        let endpoint = |revision: &str, address: &str, port| OffloadedEndpoint {
            revision: revision.to_owned(),
            address: address.to_owned(),
            port,
            pod: String::new(),
        };
        let service = |endpoint| OffloadedService {
            cluster_name: "users.default:80".to_owned(),
            service: "users.default".to_owned(),
            endpoints: vec![endpoint],
        };
        let table = OffloadedTable::from_resources([&service(endpoint("feature-x", "10.1.0.9", 8080))]).unwrap();
        assert_eq!(table.find("users.default:80", "feature-x"), Some("10.1.0.9:8080".parse().unwrap()));
        assert_eq!(table.find("users.default:80", "feature-y"), None);
        assert_eq!(table.find("front.default:80", "feature-x"), None);

        let error = OffloadedTable::from_resources([&service(endpoint("x", "nowhere", 80))]).unwrap_err();
        assert_eq!(error.to_string(), "endpoints[0].address: \"nowhere\" is not an IP address");
        let error = OffloadedTable::from_resources([&service(endpoint("x", "10.0.0.1", 70000))]).unwrap_err();
        assert_eq!(error.to_string(), "endpoints[0].port: 70000 is not a TCP port");
    }
}
