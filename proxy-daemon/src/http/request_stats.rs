//! What requests are counted under besides their cluster: `virtual_clusters` of virtual hosts, and `stat_prefix` of routes.
//! Where neither is configured, nothing of this is looked at.

use std::{collections::HashMap, rc::Rc};

use super::{RouteRef, route_match::header_matches, stream::RequestHead};
use crate::{
    config::model::{RouteConfig, VirtualHost},
    stats::{Counter, Histogram, Lease, ResponseCodes, Scope},
};

/// The slots of one virtual cluster or route: `vhost.<name>.vcluster.<name>.<field>`, `vhost.<name>.route.<prefix>.<field>`.
#[derive(Debug)]
pub(super) struct RequestStats {
    pub(super) upstream_rq_retry: Counter,
    pub(super) upstream_rq_retry_limit_exceeded: Counter,
    pub(super) upstream_rq_retry_overflow: Counter,
    pub(super) upstream_rq_retry_success: Counter,
    pub(super) upstream_rq_timeout: Counter,
    pub(super) upstream_rq_total: Counter,
    pub(super) upstream_rq_time: Histogram,
    pub(super) upstream_rq: ResponseCodes,
    _lease: Lease,
}

impl RequestStats {
    fn new(scope: &Scope) -> RequestStats {
        // Before the handles, so that they are of this life of the scope.
        let lease = scope.lease();
        RequestStats {
            upstream_rq_retry: scope.counter("upstream_rq_retry"),
            upstream_rq_retry_limit_exceeded: scope.counter("upstream_rq_retry_limit_exceeded"),
            upstream_rq_retry_overflow: scope.counter("upstream_rq_retry_overflow"),
            upstream_rq_retry_success: scope.counter("upstream_rq_retry_success"),
            upstream_rq_timeout: scope.counter("upstream_rq_timeout"),
            upstream_rq_total: scope.counter("upstream_rq_total"),
            upstream_rq_time: scope.histogram("upstream_rq_time"),
            upstream_rq: ResponseCodes::new(scope, "upstream_rq"),
            _lease: lease,
        }
    }
}

/// The slots of a route configuration, by virtual host. Empty where nothing is counted so.
#[derive(Debug, Default)]
pub(super) struct StatsTable(Vec<HostStats>);

/// The slots of a virtual host.
#[derive(Debug, Default)]
pub(super) struct HostStats {
    /// In their order, and `other` at the end; empty where there are none.
    virtual_clusters: Vec<RequestStats>,
    /// By the number of the route.
    routes: HashMap<usize, RequestStats>,
}

impl StatsTable {
    pub(super) fn new(config: &RouteConfig) -> StatsTable {
        let is_counted = |host: &VirtualHost| {
            !host.virtual_clusters.is_empty() || host.routes.iter().any(|route| route.stat_prefix.is_some())
        };
        if !config.virtual_hosts.iter().any(|host| is_counted(host)) {
            return StatsTable::default();
        }
        StatsTable(config.virtual_hosts.iter().map(|host| HostStats::new(host)).collect())
    }

    pub(super) fn host(&self, index: usize) -> Option<&HostStats> {
        self.0.get(index)
    }
}

impl HostStats {
    fn new(host: &VirtualHost) -> HostStats {
        let scope = Scope::new("vhost").tagged_as_is("envoy_virtual_host", &host.name);
        let virtual_cluster = |name: &str| {
            RequestStats::new(&scope.clone().child("vcluster").tagged_as_is("envoy_virtual_cluster", name))
        };
        let names = host.virtual_clusters.iter().map(|cluster| &*cluster.name);
        let other = (!host.virtual_clusters.is_empty()).then_some("other");
        let routes = host.routes.iter().enumerate().filter_map(|(index, route)| {
            let scope = scope.clone().child("route").tagged_as_is("envoy_route", route.stat_prefix.as_deref()?);
            Some((index, RequestStats::new(&scope)))
        });
        HostStats { virtual_clusters: names.chain(other).map(virtual_cluster).collect(), routes: routes.collect() }
    }
}

/// What one request is counted under.
#[derive(Debug)]
pub(super) struct Counted {
    route: RouteRef,
    virtual_cluster: Option<usize>,
}

impl Counted {
    /// `None`: under nothing but its cluster.
    pub(super) fn of(route: &RouteRef, head: &RequestHead) -> Option<Rc<Counted>> {
        let (stats, number) = route.stats()?;
        let host = route.virtual_host();
        let virtual_cluster = (!stats.virtual_clusters.is_empty()).then(|| {
            let mut clusters = host.virtual_clusters.iter();
            let found = clusters.position(|cluster| cluster.headers.iter().all(|rule| header_matches(rule, head)));
            found.unwrap_or(host.virtual_clusters.len())
        });
        if virtual_cluster.is_none() && !number.is_some_and(|number| stats.routes.contains_key(&number)) {
            return None;
        }
        Some(Rc::new(Counted { route: route.clone(), virtual_cluster }))
    }

    /// The virtual cluster's name; those that are in none are in no other by name, as in Envoy.
    pub(super) fn virtual_cluster(&self) -> Option<&str> {
        let clusters = &self.route.virtual_host().virtual_clusters;
        Some(&*clusters.get(self.virtual_cluster?)?.name)
    }

    /// Counts in each of the places.
    pub(super) fn each(&self, count: impl Fn(&RequestStats)) {
        let Some((stats, number)) = self.route.stats() else { return };
        self.virtual_cluster.and_then(|index| stats.virtual_clusters.get(index)).into_iter().for_each(&count);
        number.and_then(|number| stats.routes.get(&number)).into_iter().for_each(&count);
    }
}
