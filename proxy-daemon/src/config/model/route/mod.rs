use std::{any::Any, collections::BTreeMap, sync::Arc};

use http::HeaderName;

use super::{ConfigSource, RateLimit};
use crate::http::metadata::Metadata;

mod action;
mod cluster_choice;
mod hash_policy;
mod header_mutations;
mod internal_redirect;
mod matcher;
mod matches;
mod metadata_match;
mod retry;
mod rewrite;

pub use action::*;
pub use cluster_choice::*;
pub use hash_policy::*;
pub use header_mutations::*;
pub use internal_redirect::*;
pub use matcher::*;
pub use matches::*;
pub use metadata_match::*;
pub use retry::*;
pub use rewrite::*;

/// A checked `RouteConfiguration`. `http::route_match` builds the index over it.
#[derive(Debug, Default, Clone)]
pub struct RouteConfig {
    /// Its name: what RDS subscribes to.
    pub name: String,
    /// In the order of the configuration.
    pub virtual_hosts: Vec<Arc<VirtualHost>>,
    /// Where further virtual hosts come from.
    pub vhds: Option<ConfigSource>,
    /// Who gets a copy of requests, where neither their route nor its virtual host says.
    pub mirrors: Arc<[MirrorPolicy]>,
    /// Applied last, after the route's and the virtual host's.
    pub headers: HeaderMutations,
    /// A route to a cluster that does not exist makes the whole invalid. Unset: yes for routes that are written into a
    /// listener or a scope, no for those that RDS delivers.
    pub validate_clusters: Option<bool>,
    /// The host's port takes no part in choosing the virtual host.
    pub ignore_port_in_host_matching: bool,
    /// What follows a `;` takes no part in matching paths.
    pub ignore_path_parameters_in_path_matching: bool,
    /// The header mutations of routes are applied last, after the virtual host's and the configuration's.
    pub most_specific_header_mutations_wins: bool,
    /// The virtual host is chosen by this header instead of the host.
    pub vhost_header: Option<HeaderName>,
    /// What filters are told here.
    pub per_filter: PerFilterConfigs,
    /// Removed from requests that are not internal.
    pub internal_only_headers: Box<[HeaderName]>,
}

impl RouteConfig {
    /// The clusters that routes name by name; one may occur more than once.
    pub fn cluster_names(&self) -> impl Iterator<Item = &str> {
        let routes = self.virtual_hosts.iter().flat_map(|host| &host.routes);
        routes.flat_map(|route| route.cluster_names())
    }

    /// The first cluster that a route names by name and that is not `known`: the path of what names it, and what Envoy says of it.
    /// A route's own clusters are looked at before those of its mirrors.
    pub fn unknown_cluster(&self, known: impl Fn(&str) -> bool) -> Option<(String, String)> {
        // Those of matchers are not held to it, as in Envoy.
        let hosts = self.virtual_hosts.iter().enumerate().filter(|(_, host)| host.matcher.is_none());
        for (host_index, host) in hosts {
            for (index, route) in host.routes.iter().enumerate() {
                let path = format!("virtual_hosts[{host_index}].routes[{index}].route");
                if let Some(name) = route.cluster_names().into_iter().find(|name| !known(name)) {
                    let weighted = matches!(
                        &route.action,
                        RouteAction::Forward(action) if matches!(action.cluster, ClusterChoice::Weighted(_))
                    );
                    let noun = if weighted { "weighted cluster" } else { "cluster" };
                    return Some((path, format!("unknown {noun} '{name}'")));
                }
                // Those of other levels are held to it by any route that has none of its own, as in Envoy.
                let (mirrors, path) = match &route.action {
                    RouteAction::Forward(action) if !action.mirrors.is_empty() => (&*action.mirrors, path + "."),
                    _ if !host.mirrors.is_empty() => (&*host.mirrors, format!("virtual_hosts[{host_index}].")),
                    _ => (&*self.mirrors, String::new()),
                };
                let unknown = mirrors.iter().enumerate().find_map(|(index, mirror)| match &mirror.cluster {
                    MirrorCluster::Name(name) if !known(name) => Some((index, name)),
                    MirrorCluster::Name(_) | MirrorCluster::Header(_) => None,
                });
                if let Some((index, name)) = unknown {
                    let path = format!("{path}request_mirror_policies[{index}].cluster");
                    return Some((path, format!("route: unknown shadow cluster '{name}'")));
                }
            }
        }
        None
    }
}

impl Route {
    /// The clusters that it names by name.
    pub fn cluster_names(&self) -> Vec<&str> {
        match &self.action {
            // One without a name is never there.
            RouteAction::Forward(action) => {
                action.cluster.names().into_iter().filter(|name| !name.is_empty()).collect()
            }
            RouteAction::Redirect(_) | RouteAction::DirectResponse { .. } => Vec::new(),
        }
    }
}

/// `typed_per_filter_config`, by the names of filters.
pub type PerFilterConfigs = BTreeMap<Box<str>, Arc<PerFilterConfig>>;

/// What a filter's own parser made of a message for it.
pub type FilterConfigOf = Arc<dyn Any + Send + Sync>;

/// What one filter is told by a route, a virtual host or a route configuration.
#[derive(Debug)]
pub struct PerFilterConfig {
    /// The filter has no part in these requests.
    pub disabled: bool,
    /// What the filter's own parser made of it; none: it is only switched on or off.
    pub config: Option<FilterConfigOf>,
}

/// A checked `VirtualHost`.
#[derive(Debug, Default)]
pub struct VirtualHost {
    /// `vhost.<name>.` in stats names.
    pub name: String,
    /// Lower case: exact names, `*.suffix`, `prefix.*`, or `*`.
    pub domains: Vec<String>,
    /// The first that matches is taken; where there is a `matcher`, of those that it finds.
    pub routes: Vec<Arc<Route>>,
    /// Which of the routes are looked at.
    pub matcher: Option<RouteMatcher>,
    /// What its requests are counted under: the first that matches, else `other`.
    pub virtual_clusters: Box<[VirtualCluster]>,
    /// Applied after the route's.
    pub headers: HeaderMutations,
    /// Used by routes that have none of their own.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// `hedge_policy`: an attempt that is late gets another beside it, where the route does not say.
    pub hedge_on_per_try_timeout: bool,
    /// So much of a request's body, in bytes, is kept for further attempts: what routes have that say nothing of it.
    pub body_buffer_limit: Option<u64>,
    /// Further attempts carry `x-envoy-is-timeout-retry`.
    pub include_is_timeout_retry_header: bool,
    /// Who gets a copy of requests, where their route does not say.
    pub mirrors: Box<[MirrorPolicy]>,
    /// What its requests are counted under.
    pub rate_limits: Box<[RateLimit]>,
    /// Upstream requests carry `x-envoy-attempt-count`.
    pub include_request_attempt_count: bool,
    /// Responses carry `x-envoy-attempt-count`.
    pub include_attempt_count_in_response: bool,
    /// `cors`, as the filter's own parser reads it.
    pub cors: Option<FilterConfigOf>,
    /// Which requests are redirected to https.
    pub require_tls: TlsRequirement,
    /// What filters are told here.
    pub per_filter: PerFilterConfigs,
}

/// `VirtualCluster`: requests that are counted together, `vhost.<virtual host>.vcluster.<name>.`
#[derive(Debug)]
pub struct VirtualCluster {
    /// Its name in statistics.
    pub name: Box<str>,
    /// All must match.
    pub headers: Vec<HeaderMatcher>,
}

/// `VirtualHost.TlsRequirementType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TlsRequirement {
    /// None.
    #[default]
    None,
    /// Those that are not internal.
    ExternalOnly,
    /// All.
    All,
}

/// A checked `Route`.
#[derive(Debug)]
pub struct Route {
    /// Its requests are counted under `vhost.<virtual host>.route.<this>.`
    pub stat_prefix: Option<Box<str>>,
    /// Appears as `%ROUTE_NAME%`.
    pub name: String,
    /// What its `metadata` says.
    pub metadata: Option<Arc<Metadata>>,
    /// Which requests it serves.
    pub route_match: RouteMatch,
    /// What becomes of them.
    pub action: RouteAction,
    /// Applied first.
    pub headers: HeaderMutations,
    /// What filters are told here.
    pub per_filter: PerFilterConfigs,
    /// So much of a request's body, in bytes, is kept for further attempts. Default: what the virtual host says, or the
    /// listener's buffer limit.
    pub body_buffer_limit: Option<u64>,
}
