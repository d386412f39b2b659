//! bandwidth_limit.

use super::harness::{By, Case, case};

const LIMIT: &str = "bandwidth_limit.v3.BandwidthLimit";

pub fn cases() -> Vec<Case> {
    let of = |mode: &str, fields: &str| format!("stat_prefix: $case, enable_mode: {mode}, {fields}");
    let small = ["GET /", "POST /\n\nbody", "GET /direct", "HEAD /", "GET /plain"];
    let trailers = "enable_response_trailers: true, response_trailer_prefix: x-a, limit_kbps: 1000";
    vec![
        case("no limit", LIMIT, "stat_prefix: $case", &small),
        case("request", LIMIT, &of("REQUEST", "limit_kbps: 1000"), &small),
        case("response", LIMIT, &of("RESPONSE", "limit_kbps: 1000, fill_interval: 0.02s"), &small),
        case("both", LIMIT, &of("REQUEST_AND_RESPONSE", trailers), &small),
        case("disabled", LIMIT, &of("DISABLED", "limit_kbps: 1"), &small),
        case(
            "disabled by runtime",
            LIMIT,
            &of("RESPONSE", "limit_kbps: 1, runtime_enabled: {default_value: false, runtime_key: bandwidth.test}"),
            &small,
        ),
        case("by route", LIMIT, "stat_prefix: $case", &small)
            .told(By::Host, LIMIT, &of("REQUEST", "limit_kbps: 500"))
            .told(By::Route, LIMIT, &of("REQUEST_AND_RESPONSE", "limit_kbps: 500")),
    ]
}
