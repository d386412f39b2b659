//! fault.

use super::harness::{By, Case, case};

const FAULT: &str = "fault.v3.HTTPFault";

const ALWAYS: &str = "percentage: {numerator: 100}";

pub fn cases() -> Vec<Case> {
    let abort = format!("abort: {{http_status: 418, {ALWAYS}}}");
    let delay = format!("delay: {{fixed_delay: 0.05s, {ALWAYS}}}");
    let by_header = |field: &str, kind: &str| format!("{field}: {{{kind}: {{}}, {ALWAYS}}}");
    let all = ["GET /", "GET /direct", "POST /\n\nbody", "HEAD /"];
    let grpc = "POST /\ncontent-type: application/grpc\n\nbody";
    vec![
        case("abort", FAULT, &abort, &all),
        case("abort of gRPC", FAULT, &abort, &[grpc]),
        case("abort with a body", FAULT, &format!("abort: {{http_status: 503, {ALWAYS}, response_body: gone}}"), &all),
        case("abort with a gRPC status", FAULT, &format!("abort: {{grpc_status: 5, {ALWAYS}}}"), &[grpc, "GET /"]),
        case("no percentage is none", FAULT, "abort: {http_status: 418}", &["GET /"]),
        case("delay", FAULT, &delay, &all),
        case(
            "delay and abort",
            FAULT,
            &format!("{delay}, {abort}"),
            &["GET /", "POST /\ncontent-type: application/grpc"],
        ),
        case(
            "abort by header",
            FAULT,
            &by_header("abort", "header_abort"),
            &[
                "GET /",
                "GET /\nx-envoy-fault-abort-request: 429",
                "GET /\nx-envoy-fault-abort-request: 99",
                "GET /\nx-envoy-fault-abort-request: 600",
                "GET /\nx-envoy-fault-abort-request: x",
                "GET /\nx-envoy-fault-abort-request: 429\nx-envoy-fault-abort-request-percentage: 0",
                "GET /\nx-envoy-fault-abort-request: 429\nx-envoy-fault-abort-request-percentage: 100",
                "GET /\nx-envoy-fault-abort-grpc-request: 5",
                "POST /\ncontent-type: application/grpc\nx-envoy-fault-abort-grpc-request: 5\n\nbody",
            ],
        ),
        case(
            "delay by header",
            FAULT,
            &by_header("delay", "header_delay"),
            &[
                "GET /",
                "GET /\nx-envoy-fault-delay-request: 20",
                "GET /\nx-envoy-fault-delay-request: 0",
                "GET /\nx-envoy-fault-delay-request: x",
                "GET /\nx-envoy-fault-delay-request: 20\nx-envoy-fault-delay-request-percentage: 0",
            ],
        ),
        case(
            "headers",
            FAULT,
            &format!("{abort}, headers: [{{name: x-a, string_match: {{exact: one}}}}, {{name: x-b}}]"),
            &["GET /", "GET /\nx-a: one", "GET /\nx-a: one\nx-b: 1"],
        ),
        case("upstream_cluster", FAULT, &format!("{abort}, upstream_cluster: a"), &["GET /", "GET /direct"]),
        case("another upstream_cluster", FAULT, &format!("{abort}, upstream_cluster: b"), &["GET /"]),
        case(
            "downstream_nodes",
            FAULT,
            &format!("{abort}, downstream_nodes: [one]"),
            &["GET /", "GET /\nx-envoy-downstream-service-node: one", "GET /\nx-envoy-downstream-service-node: two"],
        ),
        case("max_active_faults", FAULT, &format!("{abort}, {delay}, max_active_faults: 0"), &["GET /"]),
        case(
            "response_rate_limit",
            FAULT,
            &format!("response_rate_limit: {{fixed_limit: {{limit_kbps: 10}}, {ALWAYS}}}"),
            &["GET /\nx-do: 200+bytes=1900", "HEAD /", "GET /direct"],
        ),
        case("by route", FAULT, &abort, &["GET /", "GET /plain", "GET /direct", "GET /created"])
            .told(By::Host, FAULT, &format!("abort: {{http_status: 410, {ALWAYS}}}"))
            .told(By::Route, FAULT, &format!("{delay}, headers: [{{name: x-a}}]")),
        case("by route only", FAULT, "", &["GET /", "GET /plain", "GET /\nx-a: 1"]).told(
            By::Route,
            FAULT,
            &format!("{delay}, abort: {{grpc_status: 5, {ALWAYS}}}, headers: [{{name: x-a}}]"),
        ),
        case("by route, max_active_faults", FAULT, &abort, &["GET /", "GET /plain"])
            .told(By::Route, FAULT, &format!("{abort}, max_active_faults: 0"))
            .told(By::Config, FAULT, "max_active_faults: 0"),
        case(
            "by route, response_rate_limit",
            FAULT,
            &format!("{abort}, response_rate_limit: {{fixed_limit: {{limit_kbps: 1}}, {ALWAYS}}}"),
            &["GET /\nx-do: 200+bytes=1900", "GET /direct", "GET /plain"],
        )
        .told(By::Route, FAULT, &format!("response_rate_limit: {{fixed_limit: {{limit_kbps: 10}}, {ALWAYS}}}")),
        case(
            "response_rate_limit by header",
            FAULT,
            &by_header("response_rate_limit", "header_limit"),
            &["GET /", "GET /\nx-envoy-fault-throughput-response: 100", "GET /\nx-envoy-fault-throughput-response: 0"],
        ),
    ]
}
