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
                // Envoy has it and counts redirects as direct responses.
                scope.counter("rq_redirect");
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
        downstream_cx_protocol_error downstream_cx_idle_timeout downstream_cx_max_duration_reached
        downstream_cx_max_requests_reached downstream_cx_drain_close downstream_cx_upgrades_total
        downstream_rq_ws_on_non_ws_route
        downstream_rq_total downstream_rq_http1_total downstream_rq_http2_total
        downstream_rq_header_timeout downstream_rq_response_before_rq_complete downstream_rq_non_relative_path
        downstream_rq_rejected_via_ip_detection
        downstream_rq_failed_path_normalization downstream_rq_redirected_with_normalized_path
        downstream_rq_too_large downstream_rq_rx_reset downstream_rq_timeout downstream_rq_idle_timeout
        downstream_rq_max_duration_reached
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
