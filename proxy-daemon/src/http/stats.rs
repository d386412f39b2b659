use crate::stats::{Counter, Gauge, Histogram, Lease, ResponseCodes, Scope};

macro_rules! hcm_stats {
    (counters { $($counter:ident)* } gauges { $($gauge:ident)* } histograms { $($histogram:ident)* }) => {
        /// The slots of a connection manager's statistics: `http.<stat_prefix>.<field>`, as Envoy names them.
        #[derive(Debug)]
        pub(super) struct HcmStats {
            $(pub(super) $counter: Counter,)*
            $(pub(super) $gauge: Gauge,)*
            $(pub(super) $histogram: Histogram,)*
            pub(super) downstream_rq: ResponseCodes,
            _lease: Lease,
        }

        impl HcmStats {
            pub(super) fn new(stat_prefix: &str) -> HcmStats {
                let scope = Scope::http(stat_prefix);
                let lease = scope.lease();
                for name in NEVER_COUNTED {
                    scope.counter(name);
                }
                scope.gauge("downstream_cx_http3_active");
                HcmStats {
                    $($counter: scope.counter(stringify!($counter)),)*
                    $($gauge: scope.gauge(stringify!($gauge)),)*
                    $($histogram: scope.histogram(stringify!($histogram)),)*
                    downstream_rq: ResponseCodes::classes_only(&scope, "downstream_rq"),
                    _lease: lease,
                }
            }
        }
    };
}

hcm_stats! {
    counters {
        downstream_cx_total downstream_cx_ssl_total downstream_cx_http1_total downstream_cx_http2_total downstream_cx_destroy
        downstream_cx_destroy_local downstream_cx_destroy_remote downstream_cx_destroy_active_rq
        downstream_cx_destroy_local_active_rq downstream_cx_destroy_remote_active_rq downstream_cx_delayed_close_timeout
        downstream_cx_rx_bytes_total downstream_cx_tx_bytes_total
        downstream_cx_protocol_error downstream_cx_idle_timeout downstream_cx_max_duration_reached
        downstream_cx_max_requests_reached downstream_cx_drain_close downstream_cx_upgrades_total
        downstream_rq_ws_on_non_ws_route
        downstream_rq_total downstream_rq_http1_total downstream_rq_http2_total
        downstream_rq_header_timeout downstream_rq_response_before_rq_complete downstream_rq_non_relative_path
        downstream_rq_rejected_via_ip_detection
        downstream_rq_failed_path_normalization downstream_rq_redirected_with_normalized_path
        downstream_rq_too_large rs_too_large downstream_rq_rx_reset downstream_rq_timeout downstream_rq_idle_timeout
        downstream_rq_max_duration_reached downstream_rq_too_many_premature_resets
        downstream_flow_control_paused_reading_total downstream_flow_control_resumed_reading_total
        no_route no_cluster rq_direct_response rq_total
        rq_reset_after_downstream_response_started
        passthrough_internal_redirect_bad_location passthrough_internal_redirect_unsafe_scheme
        passthrough_internal_redirect_too_many_redirects passthrough_internal_redirect_no_route
        passthrough_internal_redirect_predicate
    }
    gauges { downstream_cx_active downstream_cx_ssl_active downstream_cx_http1_active downstream_cx_http2_active
        downstream_rq_active downstream_cx_upgrades_active }
    histograms { downstream_cx_length_ms downstream_rq_time }
}

/// What Envoy has and what never happens here: redirects count as direct responses (in Envoy too), and there is neither tracing
/// nor an overload manager nor HTTP/3.
const NEVER_COUNTED: [&str; 10] = [
    "rq_redirect",
    "tracing.client_enabled",
    "tracing.health_check",
    "tracing.not_traceable",
    "tracing.random_sampling",
    "tracing.service_forced",
    "downstream_cx_http3_total",
    "downstream_rq_http3_total",
    "downstream_cx_overload_disable_keepalive",
    "downstream_rq_overload_close",
];

/// How a client's connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConnectionEnd {
    /// The client closed it; otherwise it was closed here.
    pub(super) by_client: bool,
    /// There were requests in flight.
    pub(super) in_use: bool,
}

impl ConnectionEnd {
    /// Closed here, with nothing in flight.
    pub(super) const HERE: ConnectionEnd = ConnectionEnd { by_client: false, in_use: false };
}

impl HcmStats {
    pub(super) fn count_end(&self, end: ConnectionEnd) {
        let ConnectionEnd { by_client, in_use } = end;
        self.downstream_cx_destroy.inc();
        if by_client {
            self.downstream_cx_destroy_remote.inc()
        } else {
            self.downstream_cx_destroy_local.inc()
        }
        if in_use {
            self.downstream_cx_destroy_active_rq.inc();
            let active = (self.downstream_cx_destroy_local_active_rq, self.downstream_cx_destroy_remote_active_rq);
            if by_client { active.1.inc() } else { active.0.inc() }
        }
    }
}

/// The slots of what codecs count, `http1.<field>` and `http2.<field>`: all connection managers have them together.
#[derive(Debug)]
pub(super) struct CodecStats {
    pub(super) http1_rejected_with_underscores: Counter,
    pub(super) http1_dropped_with_underscores: Counter,
    pub(super) http2_rejected_with_underscores: Counter,
    pub(super) http2_dropped_with_underscores: Counter,
    pub(super) goaway_sent: Counter,
    pub(super) inbound_empty_frames_flood: Counter,
    pub(super) inbound_priority_frames_flood: Counter,
    pub(super) inbound_window_update_frames_flood: Counter,
    pub(super) keepalive_timeout: Counter,
    pub(super) rx_messaging_error: Counter,
    pub(super) rx_reset: Counter,
    pub(super) tx_reset: Counter,
    pub(super) tx_flush_timeout: Counter,
    _leases: [Lease; 2],
}

impl CodecStats {
    pub(super) fn new() -> CodecStats {
        let (http1, http2) = (Scope::new("http1"), Scope::new("http2"));
        let leases = [http1.lease(), http2.lease()];
        let (rejected, dropped) = ("requests_rejected_with_underscores_in_headers", "dropped_headers_with_underscores");
        CodecStats {
            http1_rejected_with_underscores: http1.counter(rejected),
            http1_dropped_with_underscores: http1.counter(dropped),
            http2_rejected_with_underscores: http2.counter(rejected),
            http2_dropped_with_underscores: http2.counter(dropped),
            goaway_sent: http2.counter("goaway_sent"),
            inbound_empty_frames_flood: http2.counter("inbound_empty_frames_flood"),
            inbound_priority_frames_flood: http2.counter("inbound_priority_frames_flood"),
            inbound_window_update_frames_flood: http2.counter("inbound_window_update_frames_flood"),
            keepalive_timeout: http2.counter("keepalive_timeout"),
            rx_messaging_error: http2.counter("rx_messaging_error"),
            rx_reset: http2.counter("rx_reset"),
            tx_reset: http2.counter("tx_reset"),
            tx_flush_timeout: http2.counter("tx_flush_timeout"),
            _leases: leases,
        }
    }
}
