use std::{any::Any, collections::BTreeMap, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};
use regex::Regex;

use super::{ConfigSource, RateLimit};
use crate::access_log::HeaderFormat;
use crate::layered_runtime::{RuntimeFraction, RuntimeInteger};

/// A checked `RouteConfiguration`. `http::route_match` builds the index over it.
#[derive(Debug, Default, Clone)]
pub struct RouteConfig {
    /// Its name: what RDS subscribes to.
    pub name: String,
    /// In the order of the configuration.
    pub virtual_hosts: Vec<Arc<VirtualHost>>,
    /// Where further virtual hosts come from.
    pub vhds: Option<ConfigSource>,
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
        for (host_index, host) in self.virtual_hosts.iter().enumerate() {
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
                // The virtual host's are held to it by any route that has none of its own, as in Envoy.
                let (mirrors, path) = match &route.action {
                    RouteAction::Forward(action) if !action.mirrors.is_empty() => (&action.mirrors, path),
                    _ => (&host.mirrors, format!("virtual_hosts[{host_index}]")),
                };
                let unknown = mirrors.iter().enumerate().find_map(|(index, mirror)| match &mirror.cluster {
                    MirrorCluster::Name(name) if !known(name) => Some((index, name)),
                    MirrorCluster::Name(_) | MirrorCluster::Header(_) => None,
                });
                if let Some((index, name)) = unknown {
                    let path = format!("{path}.request_mirror_policies[{index}].cluster");
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
            RouteAction::Forward(action) => action.cluster.names(),
            RouteAction::Redirect(_) | RouteAction::DirectResponse { .. } => Vec::new(),
        }
    }
}

/// `typed_per_filter_config`, by the names of filters.
pub type PerFilterConfigs = BTreeMap<Box<str>, Arc<PerFilterConfig>>;

/// What one filter is told by a route, a virtual host or a route configuration.
#[derive(Debug)]
pub struct PerFilterConfig {
    /// The filter has no part in these requests.
    pub disabled: bool,
    /// What the filter's own parser made of it; none: it is only switched on or off.
    pub config: Option<Arc<dyn Any + Send + Sync>>,
}

/// A checked `VirtualHost`.
#[derive(Debug, Default)]
pub struct VirtualHost {
    /// `vhost.<name>.` in stats names.
    pub name: String,
    /// Lower case: exact names, `*.suffix`, `prefix.*`, or `*`.
    pub domains: Vec<String>,
    /// The first that matches is taken.
    pub routes: Vec<Arc<Route>>,
    /// Applied after the route's.
    pub headers: HeaderMutations,
    /// Used by routes that have none of their own.
    pub retry_policy: Option<Arc<RetryPolicy>>,
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
    /// Which requests are redirected to https.
    pub require_tls: TlsRequirement,
    /// What filters are told here.
    pub per_filter: PerFilterConfigs,
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
    /// Appears as `%ROUTE_NAME%`.
    pub name: String,
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

/// `RouteMatch`: all must hold.
#[derive(Debug)]
pub struct RouteMatch {
    /// The path, without the query.
    pub path: PathMatch,
    /// Whether the path is compared as it is, or without regard to ASCII case.
    pub case_sensitive: bool,
    /// All must match.
    pub headers: Vec<HeaderMatcher>,
    /// All must match.
    pub query_parameters: Vec<QueryParameterMatcher>,
    /// Only requests whose content type is gRPC's.
    pub grpc: bool,
    /// Only this share of the requests, by the stream's random number.
    pub runtime_fraction: Option<RuntimeFraction>,
    /// All must match.
    pub cookies: Vec<CookieMatcher>,
    /// `tls_context.presented`: whether the client has a certificate.
    pub certificate_presented: Option<bool>,
}

impl RouteMatch {
    /// A rule that the path alone decides, in its own case.
    pub fn new(path: PathMatch) -> RouteMatch {
        RouteMatch {
            path,
            case_sensitive: true,
            headers: Vec::new(),
            query_parameters: Vec::new(),
            grpc: false,
            runtime_fraction: None,
            cookies: Vec::new(),
            certificate_presented: None,
        }
    }
}

/// `RouteMatch.path_specifier`.
#[derive(Debug)]
pub enum PathMatch {
    /// The path begins so.
    Prefix(Box<str>),
    /// The path is this.
    Path(Box<str>),
    /// The whole path matches (the expression is anchored).
    Regex(Regex),
    /// The path is this, or this and `/` and more.
    PathSeparatedPrefix(Box<str>),
    /// `path_match_policy` with a `UriTemplateMatchConfig`: the expression that the template stands for (anchored), with a named
    /// group for each variable.
    Template(Regex),
}

/// One `HeaderMatcher`.
#[derive(Debug)]
pub struct HeaderMatcher {
    /// The header; `:method`, `:path`, `:authority` and `:scheme` are matched as Envoy does.
    pub name: MatchedHeader,
    /// What one of its values must be.
    pub value: HeaderValueMatch,
    /// The verdict is turned round.
    pub invert_match: bool,
    /// A missing header is matched as an empty one.
    pub treat_missing_header_as_empty: bool,
}

/// What a `HeaderMatcher` looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MatchedHeader {
    /// A header field.
    Name(HeaderName),
    /// `:method`
    Method,
    /// `:path`, with the query.
    Path,
    /// `:authority`
    Authority,
    /// `:scheme`
    Scheme,
}

/// `HeaderMatcher.header_match_specifier`.
#[derive(Debug)]
pub enum HeaderValueMatch {
    /// Whether the header is there at all.
    Present(bool),
    /// Its text.
    String(StringMatcher),
    /// A whole number from `start` up to, not including, `end`.
    Range {
        /// First number that matches.
        start: i64,
        /// First number above that does not.
        end: i64,
    },
}

/// `QueryParameterMatcher`.
#[derive(Debug)]
pub struct QueryParameterMatcher {
    /// The parameter's name, as it stands in the query.
    pub name: String,
    /// What its first value must be.
    pub value: QueryParameterMatch,
}

/// `QueryParameterMatcher.query_parameter_match_specifier`.
#[derive(Debug)]
pub enum QueryParameterMatch {
    /// Whether it is there at all.
    Present(bool),
    /// Its text.
    String(StringMatcher),
}

/// `CookieMatcher`.
#[derive(Debug)]
pub struct CookieMatcher {
    /// The cookie.
    pub name: String,
    /// What its value must be; a missing one does not match.
    pub value: StringMatcher,
    /// The verdict is turned round.
    pub invert_match: bool,
}

/// `envoy.type.matcher.v3.StringMatcher`.
#[derive(Debug)]
pub struct StringMatcher {
    /// How the text is compared.
    pub pattern: StringPattern,
    /// Without regard to ASCII case; has no effect on a regex.
    pub ignore_case: bool,
}

/// `StringMatcher.match_pattern`.
#[derive(Debug)]
pub enum StringPattern {
    /// The whole text.
    Exact(Box<str>),
    /// Its beginning.
    Prefix(Box<str>),
    /// Its end.
    Suffix(Box<str>),
    /// Any part of it.
    Contains(Box<str>),
    /// The whole text (the expression is anchored).
    Regex(Regex),
}

impl StringMatcher {
    /// Whether `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        let (t, folded);
        t = if self.ignore_case && !matches!(self.pattern, StringPattern::Regex(_)) {
            folded = text.to_ascii_lowercase();
            folded.as_str()
        } else {
            text
        };
        match &self.pattern {
            StringPattern::Exact(p) => t == &**p,
            StringPattern::Prefix(p) => t.starts_with(&**p),
            StringPattern::Suffix(p) => t.ends_with(&**p),
            StringPattern::Contains(p) => t.contains(&**p),
            StringPattern::Regex(r) => r.is_match(t),
        }
    }
}

/// What a route does with a request.
#[derive(Debug)]
pub enum RouteAction {
    /// Sends it to a cluster.
    Forward(Box<ForwardAction>),
    /// Answers it with a redirect.
    Redirect(Box<RedirectAction>),
    /// Answers it.
    DirectResponse {
        /// The status.
        status: StatusCode,
        /// The body; may be empty.
        body: bytes::Bytes,
    },
}

/// Envoy's message `RouteAction`.
#[derive(Debug)]
pub struct ForwardAction {
    /// Where to.
    pub cluster: ClusterChoice,
    /// The answer to a request whose cluster does not exist. Default 503.
    pub cluster_not_found_status: StatusCode,
    /// From the end of the request to the end of the response; `None`: no limit. Default 15 s.
    pub timeout: Option<Duration>,
    /// Overrides the connection manager's `stream_idle_timeout`; `Some(None)` disables it.
    pub idle_timeout: Option<Option<Duration>>,
    /// How long the whole stream may last; `timeout` says nothing then.
    pub max_stream_duration: Option<MaxStreamDuration>,
    /// Which failures are tried again.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// What the path becomes.
    pub path_rewrite: PathRewrite,
    /// Replaces the request's host.
    pub host_rewrite: HostRewrite,
    /// A host that is replaced is appended to `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// Circuit breakers of the high priority count this request.
    pub high_priority: bool,
    /// Which other protocols requests may ask for; those that are not named here are the connection manager's to allow.
    pub upgrades: Box<[UpgradeRule]>,
    /// Who gets a copy of requests; empty: those of the virtual host.
    pub mirrors: Box<[MirrorPolicy]>,
    /// What its requests are counted under.
    pub rate_limits: Box<[RateLimit]>,
    /// They are counted under what the virtual host says too.
    pub include_vh_rate_limits: bool,
}

/// `RouteAction.RequestMirrorPolicy`
#[derive(Debug)]
pub struct MirrorPolicy {
    /// Who gets a copy.
    pub cluster: MirrorCluster,
    /// Of only this share of the requests, by the stream's random number.
    pub share: Option<RuntimeFraction>,
    /// The copy's host ends in `-shadow`.
    pub suffix: bool,
}

/// The cluster of a mirror policy.
#[derive(Debug)]
pub enum MirrorCluster {
    /// `cluster`
    Name(Box<str>),
    /// `cluster_header`
    Header(HeaderName),
}

/// `upgrade_configs`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpgradeRule {
    /// As the header `upgrade` names it; compared without case.
    pub protocol: Box<str>,
    /// Requests may ask for it.
    pub enabled: bool,
}

/// `RouteAction.MaxStreamDuration`: 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MaxStreamDuration {
    /// From the stream's beginning.
    pub max: Option<Duration>,
    /// Requests with a `grpc-timeout` may take so long as that says, and at most this.
    pub grpc_max: Option<Duration>,
    /// The time that is taken off a `grpc-timeout`.
    pub grpc_offset: Option<Duration>,
}

/// Which host name the upstream sees.
#[derive(Debug, Clone)]
pub enum HostRewrite {
    /// The client's.
    None,
    /// This one.
    Literal(HeaderValue),
    /// The chosen endpoint's `hostname`, where it has one.
    Auto,
    /// The value of this request header, where it is there and not empty.
    Header(HeaderName),
    /// What the path, without its query, is rewritten to.
    PathRegex(Box<RegexRewrite>),
}

/// `prefix_rewrite`, `regex_rewrite`, `path_rewrite_policy`.
#[derive(Debug, Clone, Default)]
pub enum PathRewrite {
    /// It stays.
    #[default]
    None,
    /// Replaces what the path match consumed.
    Prefix(Box<str>),
    /// Replaces every match in the path.
    Regex(Box<RegexRewrite>),
    /// Made of what the variables of the match's template matched.
    Template(Vec<TemplatePiece>),
}

/// `RegexMatchAndSubstitute`.
#[derive(Debug, Clone)]
pub struct RegexRewrite {
    /// What is replaced, wherever it stands.
    pub pattern: Regex,
    /// By what.
    pub substitution: Vec<SubstitutionPiece>,
}

/// A piece of a substitution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubstitutionPiece {
    /// Text.
    Literal(Box<str>),
    /// What the group of this number matched; 0: the whole match.
    Group(usize),
}

/// A piece of a template rewrite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplatePiece {
    /// Text.
    Literal(Box<str>),
    /// What the variable of this name matched.
    Variable(Box<str>),
}

impl RegexRewrite {
    /// `text` with every match replaced.
    pub fn apply(&self, text: &str) -> String {
        let replace = |captures: &regex::Captures<'_>| {
            let pieces = self.substitution.iter().map(|piece| match piece {
                SubstitutionPiece::Literal(text) => text,
                SubstitutionPiece::Group(number) => captures.get(*number).map_or("", |group| group.as_str()),
            });
            pieces.collect::<String>()
        };
        self.pattern.replace_all(text, replace).into_owned()
    }
}

/// Where a request or connection goes.
#[derive(Debug, Clone)]
pub enum ClusterChoice {
    /// Always there.
    Cluster(Arc<str>),
    /// One of several, by weight.
    Weighted(WeightedClusters),
    /// The cluster that this request header names.
    Header(HeaderName),
}

impl ClusterChoice {
    /// The clusters that it names; none where a header does.
    pub fn names(&self) -> Vec<&str> {
        match self {
            ClusterChoice::Cluster(name) => vec![name],
            ClusterChoice::Weighted(weighted) => match &weighted.runtime {
                Some(clusters) => clusters.iter().map(|(_, name)| &**name).collect(),
                None => weighted.cumulative.iter().map(|(_, name)| &**name).collect(),
            },
            ClusterChoice::Header(_) => Vec::new(),
        }
    }
}

/// Clusters with weights.
#[derive(Debug, Clone)]
pub struct WeightedClusters {
    /// Each with the sum of all weights up to and including its own, so that a pick is a binary search.
    pub cumulative: Vec<(u32, Arc<str>)>,
    /// What holds for the requests of each, in the same order; empty: nothing.
    pub options: Arc<[WeightedOptions]>,
    /// With a `runtime_key_prefix`: every cluster with its weight now; `cumulative` is what is configured.
    pub runtime: Option<Vec<(RuntimeInteger, Arc<str>)>>,
}

/// What `WeightedCluster.ClusterWeight` says besides name and weight.
#[derive(Debug, Default)]
pub struct WeightedOptions {
    /// Applied before the route's.
    pub headers: HeaderMutations,
    /// `host_rewrite_literal`; the route's host rewrite comes after it.
    pub host_rewrite: Option<HeaderValue>,
}

impl WeightedClusters {
    /// The sum of all weights; never 0.
    pub fn total(&self) -> u32 {
        self.cumulative.last().map_or(1, |(sum, _)| *sum)
    }

    /// The cluster for a random number; `None` where runtime values leave no weight at all, or too much.
    pub fn choose(&self, random: u64) -> Option<&Arc<str>> {
        self.choose_index(random).map(|index| self.name(index))
    }

    /// The name of the cluster with this number.
    pub fn name(&self, index: usize) -> &Arc<str> {
        match &self.runtime {
            Some(clusters) => &clusters[index].1,
            None => &self.cumulative[index].1,
        }
    }

    /// The number of the cluster for a random number.
    pub fn choose_index(&self, random: u64) -> Option<usize> {
        let Some(clusters) = &self.runtime else { return Some(self.at((random % u64::from(self.total())) as u32)) };
        let total = clusters.iter().try_fold(0_u64, |sum, (weight, _)| sum.checked_add(weight.get()))?;
        if total == 0 || total > u64::from(u32::MAX) {
            return None;
        }
        let mut point = random % total;
        // The weights may change in between: the last one takes what is over.
        let chosen = clusters.iter().position(|(weight, _)| match point.checked_sub(weight.get()) {
            Some(rest) => {
                point = rest;
                false
            }
            None => true,
        });
        Some(chosen.unwrap_or(clusters.len() - 1))
    }

    /// The number of the cluster at `point`, which is below [`total`](Self::total).
    pub fn at(&self, point: u32) -> usize {
        self.cumulative.partition_point(|(sum, _)| *sum <= point).min(self.cumulative.len() - 1)
    }
}

/// `RedirectAction`.
#[derive(Debug)]
pub struct RedirectAction {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    /// `https_redirect` or `scheme_redirect`.
    pub scheme: Option<Box<str>>,
    /// Replaces the host.
    pub host: Option<Box<str>>,
    /// Replaces the port.
    pub port: Option<u16>,
    /// Replaces the path.
    pub path: RedirectPath,
    /// The query is not carried over.
    pub strip_query: bool,
}

/// `RedirectAction.path_rewrite_specifier`.
#[derive(Debug)]
pub enum RedirectPath {
    /// The request's own.
    Keep,
    /// This one; where it holds a `?`, the request's query is dropped.
    Replace(Box<str>),
    /// Replaces what the path match consumed.
    PrefixRewrite(Box<str>),
    /// Replaces every match in the path.
    RegexRewrite(Box<RegexRewrite>),
}

/// The base of a retry's pause where nothing else is configured.
pub const DEFAULT_BASE_INTERVAL: Duration = Duration::from_millis(25);

/// `RetryPolicy`.
#[derive(Debug)]
pub struct RetryPolicy {
    /// What is tried again.
    pub retry_on: RetryOn,
    /// How often, beyond the first attempt. Default 1.
    pub num_retries: u32,
    /// Limit of one attempt.
    pub per_try_timeout: Option<Duration>,
    /// `retry_back_off`: `upstream.base_retry_backoff_ms` by default, and without that 25 ms.
    pub base_interval: Option<Duration>,
    /// Ten times the base by default.
    pub max_interval: Option<Duration>,
    /// For `retriable-status-codes`.
    pub retriable_status_codes: Vec<u32>,
    /// An attempt whose upstream says nothing for so long has failed.
    pub per_try_idle_timeout: Option<Duration>,
    /// For `retriable-headers`: a response that one of them matches.
    pub retriable_headers: Vec<HeaderMatcher>,
    /// Only requests that one of them matches are tried again; empty: all.
    pub retriable_request_headers: Vec<HeaderMatcher>,
    /// `rate_limited_retry_back_off`
    pub rate_limited: Option<RateLimitedBackOff>,
    /// `previous_hosts`: hosts that have failed the request are passed over.
    pub avoid_previous_hosts: bool,
    /// How often another host is looked for where the one that was picked is to be passed over. Default 1.
    pub host_selection_attempts: u32,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            retry_on: RetryOn::default(),
            num_retries: 1,
            per_try_timeout: None,
            base_interval: None,
            max_interval: None,
            retriable_status_codes: Vec::new(),
            per_try_idle_timeout: None,
            retriable_headers: Vec::new(),
            retriable_request_headers: Vec::new(),
            rate_limited: None,
            avoid_previous_hosts: false,
            host_selection_attempts: 1,
        }
    }
}

/// `RetryPolicy.RateLimitedRetryBackOff`: upstreams say when to come back.
#[derive(Debug)]
pub struct RateLimitedBackOff {
    /// The first that a response has, and that says no more than `max_interval`, counts.
    pub reset_headers: Vec<ResetHeader>,
    /// Default 5 minutes.
    pub max_interval: Duration,
}

/// `RetryPolicy.ResetHeader`
#[derive(Debug)]
pub struct ResetHeader {
    /// The header.
    pub name: HeaderName,
    /// Its value is a time in seconds since 1970, not a number of seconds from now.
    pub is_unix_timestamp: bool,
}

/// The kinds of failure of `retry_on`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// `5xx`: any 5xx, or no response at all.
    pub server_error: bool,
    /// `gateway-error`: 502, 503, 504.
    pub gateway_error: bool,
    /// `reset`: no response at all.
    pub reset: bool,
    /// `reset-before-request`: no response, and the request's headers had not been sent.
    pub reset_before_request: bool,
    /// `connect-failure`
    pub connect_failure: bool,
    /// `refused-stream`
    pub refused_stream: bool,
    /// `retriable-4xx`: 409.
    pub retriable_4xx: bool,
    /// `retriable-status-codes`
    pub retriable_status_codes: bool,
    /// `retriable-headers`
    pub retriable_headers: bool,
    /// `envoy-ratelimited`: responses with `x-envoy-ratelimited`, which nothing else retries.
    pub rate_limited: bool,
    /// `cancelled`, `deadline-exceeded`, `internal`, `resource-exhausted`, `unavailable`: a bit for each gRPC status.
    pub grpc_statuses: u32,
}

impl RetryOn {
    /// Takes over the kinds of a list such as `retry_on`, but for those of gRPC.
    ///
    /// Returns the first word that is no such kind.
    pub fn add<'a>(&mut self, kinds: &'a str) -> Option<&'a str> {
        let mut unknown = None;
        for kind in kinds.split(',').map(str::trim).filter(|kind| !kind.is_empty()) {
            match kind {
                "5xx" => self.server_error = true,
                "gateway-error" => self.gateway_error = true,
                "reset" => self.reset = true,
                "reset-before-request" => self.reset_before_request = true,
                "connect-failure" => self.connect_failure = true,
                "refused-stream" => self.refused_stream = true,
                "retriable-4xx" => self.retriable_4xx = true,
                "retriable-status-codes" => self.retriable_status_codes = true,
                "retriable-headers" => self.retriable_headers = true,
                "envoy-ratelimited" => self.rate_limited = true,
                // No upstream is spoken to in HTTP/3.
                "http3-post-connect-failure" => {}
                other => unknown = unknown.or(Some(other)),
            }
        }
        unknown
    }

    /// Takes over the kinds of gRPC of a list such as `x-envoy-retry-grpc-on`.
    pub fn add_grpc(&mut self, kinds: &str) {
        for kind in kinds.split(',').map(str::trim) {
            self.grpc_statuses |= RetryOn::grpc_status(kind).map_or(0, |status| 1 << status);
        }
    }

    /// The gRPC status that this kind of retry is about.
    pub fn grpc_status(kind: &str) -> Option<u32> {
        Some(match kind {
            "cancelled" => 1,
            "deadline-exceeded" => 4,
            "resource-exhausted" => 8,
            "internal" => 13,
            "unavailable" => 14,
            _ => return None,
        })
    }

    /// Whether anything at all is tried again.
    pub fn is_anything(&self) -> bool {
        *self != RetryOn::default()
    }
}

/// `request_headers_to_add` and its kin, in the order in which they are applied: removals first.
#[derive(Debug, Default, Clone)]
pub struct HeaderMutations {
    /// `request_headers_to_remove`
    pub request_remove: Vec<HeaderName>,
    /// `request_headers_to_add`
    pub request_add: Vec<HeaderAdd>,
    /// `response_headers_to_remove`
    pub response_remove: Vec<HeaderName>,
    /// `response_headers_to_add`
    pub response_add: Vec<HeaderAdd>,
}

impl HeaderMutations {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.request_remove.is_empty()
            && self.request_add.is_empty()
            && self.response_remove.is_empty()
            && self.response_add.is_empty()
    }
}

/// One `HeaderValueOption`.
#[derive(Debug, Clone)]
pub struct HeaderAdd {
    /// The header.
    pub name: HeaderName,
    /// Its value.
    pub value: AddedValue,
    /// It is added even where it is empty.
    pub keep_empty_value: bool,
    /// What happens where the header is there already.
    pub action: HeaderAppendAction,
}

/// The value of a header that is added.
#[derive(Debug, Clone)]
pub enum AddedValue {
    /// Always the same.
    Literal(HeaderValue),
    /// Made anew for each message; what is missing is empty.
    Format(Arc<HeaderFormat>),
}

/// `HeaderValueOption.HeaderAppendAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderAppendAction {
    /// A further value.
    AppendIfExistsOrAdd,
    /// Only where there is none.
    AddIfAbsent,
    /// In place of what is there.
    OverwriteIfExistsOrAdd,
    /// In place of what is there, and nothing where there is none.
    OverwriteIfExists,
}
