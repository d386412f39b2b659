//! What is checked for a management server, and what a report says of it.

use std::{collections::HashMap, sync::Arc, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{HealthCheck, HealthStatus, Locality as ProtoLocality},
            endpoint::v3::Endpoint,
        },
        service::health::v3::{
            ClusterEndpointsHealth, EndpointHealth, EndpointHealthResponse, HealthCheckSpecifier,
            LocalityEndpointsHealth,
        },
    },
    google::protobuf::{Struct, Value, value::Kind},
};

use super::load::proto_address;
use crate::{
    config::{
        FieldError,
        model::{Check, EndpointAddress, HealthCheckConfig, Locality, SocketIndex, UpstreamBind},
        parse::{self, HealthCheckTarget, HealthChecks},
    },
    upstream::{
        ClusterStats,
        health_check::{self, Health, HealthCheckStats, HealthChecker},
    },
};

/// The checks that a management server has asked for. They go on when its stream is lost.
#[derive(Debug, Default)]
pub struct HealthReporter {
    clusters: Vec<Cluster>,
}

#[derive(Debug)]
struct Cluster {
    name: String,
    bind: Option<Arc<UpstreamBind>>,
    localities: Vec<(Locality, Vec<Target>)>,
    /// All that a cluster has, though checks alone count.
    _stats: ClusterStats,
}

#[derive(Debug)]
struct Target {
    endpoint: HealthCheckTarget,
    /// Each with the message that it was made from.
    checkers: Vec<(HealthCheck, HealthChecker)>,
}

impl Target {
    /// Healthy where all checks pass; else what the first says that does not. Without a check: not healthy, as in Envoy.
    fn health(&self) -> Health {
        let healths = || self.checkers.iter().map(|(_, checker)| checker.health());
        healths().find(|health| !health.healthy).or_else(|| healths().next_back()).unwrap_or_default()
    }

    /// Whether anything is said of it: of an endpoint with `disable_active_health_check` nothing is known.
    fn is_checked(&self) -> bool {
        !self.endpoint.check.as_ref().is_some_and(|check| check.disabled)
    }
}

/// What was checked before, by the cluster's name and the endpoint's address; with where connections came from.
type Before = HashMap<(String, EndpointAddress), (Target, Option<Arc<UpstreamBind>>)>;

impl HealthReporter {
    /// Checks what the server wants from now on, and says how often it wants to be told. What was checked in the same way
    /// before is not disturbed. Must be called within the control runtime.
    ///
    /// # Errors
    /// The field that is wrong or not honoured: everything stays as it was.
    pub fn assign(&mut self, specifier: &HealthCheckSpecifier) -> Result<Duration, FieldError> {
        let (interval, wanted) = parse::health_check_specifier(specifier)?;
        let mut before = Before::new();
        // Those without a name are made anew, as in Envoy: nothing tells one from another.
        for cluster in self.clusters.drain(..).filter(|cluster| !cluster.name.is_empty()) {
            let targets = cluster.localities.into_iter().flat_map(|(_, targets)| targets);
            let bind = cluster.bind.as_ref();
            before.extend(targets.map(|target| {
                ((cluster.name.clone(), target.endpoint.address.clone()), (target, bind.map(Arc::clone)))
            }));
        }
        self.clusters = wanted.into_iter().map(|cluster| Cluster::new(cluster, &mut before)).collect();
        Ok(interval)
    }

    /// The health of everything that is checked.
    pub fn report(&self) -> EndpointHealthResponse {
        let cluster_endpoints_health: Vec<_> = self.clusters.iter().map(Cluster::report).collect();
        let localities = cluster_endpoints_health.iter().flat_map(|cluster| &cluster.locality_endpoints_health);
        let endpoints_health = localities.flat_map(|locality| &locality.endpoints_health).cloned().collect();
        #[expect(deprecated, reason = "Envoy fills both")]
        let response = EndpointHealthResponse { endpoints_health, cluster_endpoints_health };
        response
    }
}

impl Cluster {
    fn new(wanted: HealthChecks, before: &mut Before) -> Cluster {
        let cluster = ClusterStats::of_checks(&wanted.cluster);
        if wanted.checks.iter().any(|(_, config)| matches!(&config.check, Check::Http(http) if !http.http2)) {
            cluster.speaks_http1();
        }
        let stats = |config: &HealthCheckConfig| HealthCheckStats::new(cluster.scope().clone(), &config.name);
        let target = |endpoint: HealthCheckTarget, before: &mut Before| {
            let old = before.remove(&(wanted.cluster.clone(), endpoint.address.clone()));
            let health = old.as_ref().map(|(old, _)| old.health()).unwrap_or_default();
            let same = old.filter(|(old, bind)| old.endpoint == endpoint && *bind == wanted.bind);
            let mut old = match same {
                Some((old, _)) => old.checkers,
                None => {
                    cluster.count_socket(SocketIndex::default());
                    Vec::new()
                }
            };
            let check = endpoint.check.as_ref();
            let checker = |(message, config): &(HealthCheck, Arc<_>)| {
                let same = old.iter().position(|(other, _)| other == message);
                same.map(|index| old.swap_remove(index)).unwrap_or_else(|| {
                    // Nobody sends traffic to what is only checked: the intervals are those without traffic, as in Envoy.
                    let traffic = Arc::new(|| false);
                    let address = check.map_or_else(|| endpoint.address.clone(), |it| it.target(&endpoint.address));
                    let target = health_check::Target {
                        name: endpoint.hostname.clone(),
                        host: check.and_then(|check| check.hostname.clone()),
                        bind: wanted.bind.clone(),
                        ..health_check::Target::plain(address)
                    };
                    let (config, stats) = (Arc::clone(config), stats(config));
                    (message.clone(), HealthChecker::start(config, target, health, stats, traffic))
                })
            };
            let is_checked = !check.is_some_and(|check| check.disabled);
            let checkers = wanted.checks.iter().filter(|_| is_checked).map(checker).collect();
            Target { endpoint, checkers }
        };
        let localities = wanted.localities.iter().map(|(locality, endpoints)| {
            (locality.clone(), endpoints.iter().map(|endpoint| target(endpoint.clone(), before)).collect())
        });
        let localities = localities.collect();
        Cluster { localities, bind: wanted.bind.clone(), name: wanted.cluster.clone(), _stats: cluster }
    }

    fn report(&self) -> ClusterEndpointsHealth {
        let locality = |(locality, targets): &(Locality, Vec<Target>)| {
            let Locality { region, zone, sub_zone } = locality.clone();
            LocalityEndpointsHealth {
                locality: Some(ProtoLocality { region, zone, sub_zone }),
                endpoints_health: targets.iter().filter(|target| target.is_checked()).map(endpoint_health).collect(),
            }
        };
        ClusterEndpointsHealth {
            cluster_name: self.name.clone(),
            locality_endpoints_health: self.localities.iter().map(locality).collect(),
        }
    }
}

fn endpoint_health(target: &Target) -> EndpointHealth {
    let health = target.health();
    let status = match health {
        Health { healthy: true, degraded: false, .. } => HealthStatus::Healthy,
        Health { timed_out: true, .. } => HealthStatus::Timeout,
        // Degraded ones too: that is what Envoy makes of them here.
        _ => HealthStatus::Unhealthy,
    };
    let code = health.http_status.map(|code| {
        let value = Value { kind: Some(Kind::NumberValue(f64::from(code))) };
        Struct { fields: [("http_status_code".to_owned(), value)].into() }
    });
    EndpointHealth {
        endpoint: Some(Endpoint { address: Some(proto_address(&target.endpoint.address)), ..Endpoint::default() }),
        health_status: status.into(),
        health_metadata: code,
    }
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;
