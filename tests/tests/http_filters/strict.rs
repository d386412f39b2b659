//! `strict_check_headers` of the router: what clients ask for in `x-envoy-*` headers.

use super::harness::{By, Case, case};

const CHECKED: [(&str, [&str; 6]); 5] = [
    ("x-envoy-upstream-rq-timeout-ms", ["1000", "1.5", "x", " 5000", "", "+5000"]),
    (
        "x-envoy-upstream-rq-per-try-timeout-ms",
        ["1000", "-1", "1s", "18446744073709551615", "18446744073709551616", "0"],
    ),
    ("x-envoy-max-retries", ["2", "2.0", "none", "0", "1,2", "0x1"]),
    ("x-envoy-retry-on", ["5xx", "5xx , reset", "cancelled", "5xx,other", "", ",reset-before-request,"]),
    ("x-envoy-retry-grpc-on", ["cancelled", "unavailable , internal", "5xx", "unavailable,other", "", "Internal"]),
];

pub fn cases() -> Vec<Case> {
    let plain = "mutations: {request_mutations: []}";
    let all: Vec<_> = CHECKED.iter().map(|(name, _)| *name).collect();
    let requests: Vec<_> = CHECKED
        .iter()
        .flat_map(|(name, values)| values.map(|value| format!("GET /\n{name}: {value}")))
        .chain([
            "GET /direct\nx-envoy-max-retries: x".to_owned(),
            "GET /\nx-envoy-max-retries: 1\nx-envoy-retry-on: x".to_owned(),
        ])
        .chain(["POST /\ncontent-type: application/grpc\nx-envoy-max-retries: x".to_owned()])
        .collect();
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    let of = |name, checked: &[&str]| {
        let checked = format!("strict_check_headers: [{}]", checked.join(", "));
        case(name, "header_mutation.v3.HeaderMutation", plain, &requests).of_router(&checked)
    };
    let edge = [
        "use_remote_address: true",
        "internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}",
    ];
    vec![
        of("all headers that can be checked", &all),
        of("some headers are checked", &all[2..4]),
        // Of a client that may not ask for anything they are removed before.
        edge.iter().fold(of("headers of the edge are gone", &all), |case, line| case.of_manager(line)),
        of("checked headers that a filter adds", &all).told(
            By::Route,
            "header_mutation.v3.HeaderMutationPerRoute",
            "mutations: {request_mutations: [{append: {header: {key: x-envoy-max-retries, value: many}}}]}",
        ),
    ]
}
