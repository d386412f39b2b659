use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use culvert_xds_client::source::Usage;

use super::{ConnectError, HostSet, Standing, lb::Balancer};
use crate::{
    config::model::{ClusterConfig, Discovery, SocketIndex, SocketMatches, TrackedStats},
    stats::{Counter, Gauge, Histogram, Lease, ResponseCodes, Scope},
};

/// What is counted of the responses to requests of one origin, and of those of canaries.
#[derive(Debug)]
struct Origin {
    codes: ResponseCodes,
    time: Histogram,
}

impl Origin {
    fn new(scope: &Scope, prefix: &'static str) -> Origin {
        Origin { codes: ResponseCodes::new(scope, prefix), time: scope.histogram(&format!("{prefix}_time")) }
    }
}

/// How much of their time requests and attempts have used, in percent; 0 where there is no limit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budgets {
    percent_used: Histogram,
    per_try_percent_used: Histogram,
}

impl Budgets {
    fn new(scope: &Scope) -> Budgets {
        Budgets {
            percent_used: scope.histogram("upstream_rq_timeout_budget_percent_used"),
            per_try_percent_used: scope.histogram("upstream_rq_timeout_budget_per_try_percent_used"),
        }
    }

    /// A request took so long; `limit`: of all attempts.
    pub(crate) fn request(&self, took: Duration, limit: Option<Duration>) {
        self.percent_used.record(percent(took, limit));
    }

    /// An attempt took so long.
    pub(crate) fn attempt(&self, took: Duration, limit: Option<Duration>) {
        self.per_try_percent_used.record(percent(took, limit));
    }
}

/// How large messages are in one direction: `request_response_sizes`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MessageSizes {
    headers_size: Histogram,
    headers_count: Histogram,
    body_size: Histogram,
}

impl MessageSizes {
    /// Those of requests, and those of responses.
    fn both(scope: &Scope) -> [MessageSizes; 2] {
        ["rq", "rs"].map(|which| {
            let histogram = |what: &str| scope.histogram(&format!("upstream_{which}_{what}"));
            MessageSizes {
                headers_size: histogram("headers_size"),
                headers_count: histogram("headers_count"),
                body_size: histogram("body_size"),
            }
        })
    }

    /// One of so many headers, of so many bytes together, and a body of so many bytes.
    pub(crate) fn record(&self, headers: u64, headers_size: u64, body_size: u64) {
        self.headers_size.record(headers_size);
        self.headers_count.record(headers);
        self.body_size.record(body_size);
    }
}

fn percent(took: Duration, limit: Option<Duration>) -> u64 {
    let limit = limit.map_or(0, |limit| limit.as_millis());
    took.as_millis().saturating_mul(100).checked_div(limit).unwrap_or(0) as u64
}

macro_rules! cluster_stats {
    (counters { $($counter:ident)* } gauges { $($gauge:ident)* } histograms { $($histogram:ident)* }) => {
        /// The slots of a cluster's statistics: `cluster.<name>.<field>`, as Envoy names them.
        #[derive(Debug, Clone)]
        #[expect(missing_docs, reason = "each field is the Envoy statistic of the same name, which Envoy documents")]
        pub struct ClusterStats {
            $(pub $counter: Counter,)*
            $(pub $gauge: Gauge,)*
            $(pub $histogram: Histogram,)*
            /// `upstream_rq_completed`, `upstream_rq_2xx`, `upstream_rq_200` and so on.
            pub upstream_rq: ResponseCodes,
            /// `retry.upstream_rq_503` and so on: responses that were tried again.
            retry: Arc<OnceLock<ResponseCodes>>,
            /// `external.upstream_rq_200` and so on, and `internal.`: by where requests come from.
            origins: Arc<[OnceLock<Origin>; 2]>,
            /// `canary.upstream_rq_200` and so on: of canaries.
            canary: Arc<OnceLock<Origin>>,
            /// Whether the counters of its HTTP/1 connections are there.
            http1: Arc<OnceLock<()>>,
            /// `timeout_budgets`; `None`: nobody wants to know.
            pub(crate) budgets: Option<Budgets>,
            /// Of requests and of responses; `None`: nobody wants to know.
            pub(crate) sizes: Option<[MessageSizes; 2]>,
            /// `<name>.total_match_count` of its transport sockets, by their places.
            socket_matches: Arc<[Counter]>,
            scope: Scope,
            _lease: Arc<Lease>,
        }

        impl ClusterStats {
            /// Takes the slots of a cluster; the same name gets the same slots again.
            pub fn new(config: &ClusterConfig) -> ClusterStats {
                ClusterStats::of(&config.stat_name, config.tracked, &config.socket_matches)
            }

            fn of(name: &str, tracked: TrackedStats, matches: &SocketMatches) -> ClusterStats {
                let scope = Scope::cluster(name).shared();
                // Before the handles, so that they are of this life of the scope.
                let lease = Arc::new(scope.lease());
                ClusterStats {
                    $($counter: scope.counter(stringify!($counter)),)*
                    $($gauge: scope.gauge(stringify!($gauge)),)*
                    $($histogram: scope.histogram(stringify!($histogram)),)*
                    upstream_rq: ResponseCodes::new(&scope, "upstream_rq"),
                    retry: Arc::default(),
                    origins: Arc::default(),
                    canary: Arc::default(),
                    http1: Arc::default(),
                    budgets: tracked.timeout_budgets.then(|| Budgets::new(&scope)),
                    sizes: tracked.request_response_sizes.then(|| MessageSizes::both(&scope)),
                    socket_matches: socket_matches(matches, &scope),
                    scope,
                    _lease: lease,
                }
            }
        }
    };
}

cluster_stats! {
    counters {
        upstream_cx_total upstream_cx_http1_total upstream_cx_http2_total upstream_cx_connect_fail
        upstream_cx_connect_timeout upstream_cx_overflow upstream_cx_destroy upstream_cx_idle_timeout
        upstream_cx_destroy_local upstream_cx_destroy_remote upstream_cx_destroy_with_active_rq
        upstream_cx_destroy_local_with_active_rq upstream_cx_destroy_remote_with_active_rq
        upstream_cx_max_requests upstream_cx_max_duration_reached upstream_cx_none_healthy upstream_cx_rx_bytes_total upstream_cx_tx_bytes_total
        upstream_flow_control_paused_reading_total upstream_flow_control_resumed_reading_total
        upstream_flow_control_backed_up_total upstream_flow_control_drained_total
        upstream_cx_protocol_error upstream_cx_close_notify bind_errors upstream_cx_connect_attempts_exceeded upstream_cx_pool_overflow
        upstream_rq_total upstream_rq_cancelled upstream_rq_timeout upstream_rq_per_try_timeout
        upstream_rq_pending_total upstream_rq_pending_overflow upstream_rq_active_overflow
        upstream_rq_pending_failure_eject
        upstream_rq_retry upstream_rq_retry_success upstream_rq_retry_limit_exceeded upstream_rq_retry_overflow
        upstream_rq_retry_backoff_exponential upstream_rq_retry_backoff_ratelimited upstream_rq_per_try_idle_timeout
        retry_or_shadow_abandoned upstream_rq_max_duration_reached
        // As by Envoy a reset with NO_ERROR is counted as any other.
        upstream_rq_rx_reset_no_error
        upstream_rq_rx_reset upstream_rq_tx_reset upstream_rq_maintenance_mode
        upstream_internal_redirect_succeeded_total upstream_internal_redirect_failed_total
        original_dst_host_invalid
        membership_change update_attempt update_success update_failure update_empty update_no_rebuild
        assignment_stale assignment_timeout_received assignment_use_cached upstream_cx_preconnect_skipped
        lb_healthy_panic lb_local_cluster_not_ok lb_recalculate_zone_structures lb_zone_cluster_too_small
        lb_zone_no_capacity_left lb_zone_number_differs lb_zone_routing_all_directly lb_zone_routing_sampled
        lb_zone_routing_cross_zone
        lb_subsets_created lb_subsets_removed lb_subsets_selected lb_subsets_fallback lb_subsets_fallback_panic
    }
    gauges { warming_state version upstream_queue_overloaded lb_subsets_active max_host_weight upstream_cx_active upstream_rq_active upstream_rq_pending_active membership_total membership_healthy
        membership_degraded membership_excluded }
    histograms { upstream_cx_connect_ms upstream_cx_length_ms upstream_rq_per_cx upstream_rq_time }
}

/// Of a control plane's cluster: what the xDS client does with it.
impl Usage for ClusterStats {
    fn connecting(&self, http2: bool) {
        self.upstream_cx_total.inc();
        self.upstream_cx_active.inc();
        if http2 { self.upstream_cx_http2_total.inc() } else { self.count_http1() }
    }

    fn connected(&self, took: Duration) {
        self.upstream_cx_connect_ms.record(took.as_millis() as u64);
    }

    fn failed(&self, timed_out: bool) {
        self.upstream_cx_connect_fail.inc();
        if timed_out {
            self.upstream_cx_connect_timeout.inc();
        }
    }

    fn closed(&self, after: Duration) {
        self.upstream_cx_active.dec();
        self.upstream_cx_destroy.inc();
        self.upstream_cx_length_ms.record(after.as_millis() as u64);
    }

    fn request(&self) {
        self.upstream_rq_total.inc();
        self.upstream_rq_active.inc();
    }

    fn request_ended(&self) {
        self.upstream_rq_active.dec();
    }
}

/// `<name>.total_match_count` of a cluster's transport sockets, by their places. As in Envoy they are right below the cluster's name.
pub(super) fn socket_matches(matches: &SocketMatches, scope: &Scope) -> Arc<[Counter]> {
    let names = std::iter::once("default").chain(matches.0.iter().map(|it| &*it.name));
    names.map(|name| scope.counter(&format!("{name}.total_match_count"))).collect()
}

impl ClusterStats {
    /// Those of a cluster that is only checked, for a management server: as in Envoy it has them all, but for its circuit breakers, which are not looked up.
    pub(crate) fn of_checks(name: &str) -> ClusterStats {
        ClusterStats::of(name, TrackedStats::default(), &SocketMatches::default())
    }

    /// A host's connections go by the transport socket in this place.
    pub(crate) fn count_socket(&self, index: SocketIndex) {
        self.socket_matches.get(usize::from(index.0)).inspect(|counter| counter.inc());
    }

    /// Counts a connection that has ended. `by_host`: the host closed it, and not this side; `in_use`: before a request on it was through.
    pub fn count_end(&self, by_host: bool, in_use: bool) {
        self.upstream_cx_destroy.inc();
        if by_host {
            self.upstream_cx_destroy_remote.inc()
        } else {
            self.upstream_cx_destroy_local.inc()
        }
        if in_use {
            self.upstream_cx_destroy_with_active_rq.inc();
            let active =
                (self.upstream_cx_destroy_local_with_active_rq, self.upstream_cx_destroy_remote_with_active_rq);
            if by_host { active.1.inc() } else { active.0.inc() }
        }
    }

    /// Counts a connect that failed; what became of the connection is counted apart from that.
    pub(crate) fn count_failed_connect(&self, error: &ConnectError) {
        self.upstream_cx_connect_fail.inc();
        match error {
            ConnectError::Timeout => self.upstream_cx_connect_timeout.inc(),
            ConnectError::Bind(..) => self.bind_errors.inc(),
            ConnectError::Io(_) | ConnectError::Unreachable(..) | ConnectError::Socket(_) | ConnectError::Tls(_) => {}
        }
    }

    /// Counts a response, or the answer in its place; `internal`: the request was.
    pub fn charge(&self, code: u16, internal: bool) {
        self.upstream_rq.inc(code);
        self.origin(internal).codes.inc(code);
    }

    /// A request took so many milliseconds; `internal`: it was.
    pub fn record_time(&self, milliseconds: u64, internal: bool) {
        self.upstream_rq_time.record(milliseconds);
        self.origin(internal).time.record(milliseconds);
    }

    /// Counts a response of a canary, besides [`charge`](Self::charge).
    pub fn charge_canary(&self, code: u16) {
        self.canary().codes.inc(code);
    }

    /// A canary took so many milliseconds for a request, besides [`record_time`](Self::record_time).
    pub fn record_canary_time(&self, milliseconds: u64) {
        self.canary().time.record(milliseconds);
    }

    /// Made with the first request of that origin: most clusters never see one of the other.
    fn origin(&self, internal: bool) -> &Origin {
        self.origins[usize::from(internal)].get_or_init(|| match internal {
            true => Origin::new(&self.scope, "internal.upstream_rq"),
            false => Origin::new(&self.scope, "external.upstream_rq"),
        })
    }

    /// Made with the first response of a canary: most clusters have none.
    fn canary(&self) -> &Origin {
        self.canary.get_or_init(|| Origin::new(&self.scope, "canary.upstream_rq"))
    }

    /// Counts a connection that speaks HTTP/1. With the first one come, as in Envoy, the counters of its codec, nothing of which happens
    /// on the side of hosts, or with the messages that pass here.
    pub fn count_http1(&self) {
        self.upstream_cx_http1_total.inc();
        self.speaks_http1();
    }

    /// The same, of a connection that checks hosts and is not counted.
    pub(crate) fn speaks_http1(&self) {
        self.http1.get_or_init(|| {
            for name in [
                "dropped_headers_with_underscores",
                "metadata_not_supported_error",
                "requests_rejected_with_underscores_in_headers",
                "response_flood",
            ] {
                let _: Counter = self.scope.counter(&format!("http1.{name}"));
            }
        });
    }

    /// Counts a response that is tried again.
    pub fn count_retried(&self, code: u16) {
        self.retry.get_or_init(|| ResponseCodes::new(&self.scope, "retry.upstream_rq")).inc(code);
    }

    /// The scope that the statistics live in.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Shows the hosts in the membership gauges.
    ///
    /// As in Envoy every worker counts its subsets, and so does the main thread.
    pub(super) fn publish_hosts(
        &self,
        config: &ClusterConfig,
        hosts: &HostSet,
        before: Option<&HostSet>,
        workers: usize,
    ) {
        if matches!(config.discovery, Discovery::StrictDns(_) | Discovery::Eds { .. }) {
            self.max_host_weight.set(hosts.hosts.iter().map(|host| host.said_weight.into()).max().unwrap_or(1));
        }
        let before = before.and_then(|before| before.balancer.as_ref());
        if let Some((all, new, duplicates)) = hosts.balancer.as_ref().and_then(|balancer| balancer.subsets(before)) {
            let known = before.and_then(|before| before.subsets(None)).map_or(0, |(all, ..)| all);
            let threads = workers as u64 + 1;
            self.lb_subsets_created.add(new * threads);
            self.lb_subsets_removed.add((known + new).saturating_sub(all) * threads);
            self.lb_subsets_active.set(all * threads);
            self.scope.gauge("lb_subsets_single_host_per_subset_duplicate").set(duplicates);
        }
        let count = |wanted| hosts.hosts.iter().filter(|host| host.standing() == wanted).count() as u64;
        if let Some((lb, unit, spread)) = hosts.balancer.as_ref().and_then(Balancer::spread) {
            self.scope.gauge(&format!("{lb}.min_{unit}_per_host")).set(spread.min);
            self.scope.gauge(&format!("{lb}.max_{unit}_per_host")).set(spread.max);
            if unit == "hashes" {
                self.scope.gauge(&format!("{lb}.size")).set(spread.size);
            }
        }
        self.membership_total.set(hosts.hosts.len() as u64);
        self.membership_healthy.set(count(Standing::Healthy));
        self.membership_degraded.set(count(Standing::Degraded));
        self.membership_excluded.set(count(Standing::Excluded));
    }
}
