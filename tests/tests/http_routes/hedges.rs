//! Attempts beside those that are late: `hedge_policy`.

use super::harness::{Case, case};

/// The connection manager trusts its clients, all of whom are on this machine.
const TRUSTING: [&str; 2] = [
    "use_remote_address: true",
    "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}",
];

const REQUESTS: [&str; 14] = [
    "GET /",
    // The second is first.
    "GET /\nx-do: 200+delay=1200+x-try=1,200+x-try=2",
    // The first is first all the same.
    "GET /\nx-do: 200+delay=550+x-try=1,200+delay=1500+x-try=2",
    "GET /\nx-do: 200+delay=1500,200+delay=1500,200+x-try=3",
    "GET /\nx-do: 200+delay=1500,503,200+x-try=3",
    "GET /\nx-do: 503+delay=550,200+delay=300+x-try=2",
    "GET /\nx-do: 200+delay=1000+x-try=1,503,503,503",
    "GET /\nx-do: 200+delay=1200+x-try=1,reset,200+x-try=3",
    "GET /\nx-do: 503,200+delay=1200,200+x-try=3",
    "GET /\nx-do: 200+delay=1200,404+x-try=2",
    "GET /\nx-do: hang",
    "POST /\nx-do: 200+delay=1200,200+x-try=2\n\nthe body",
    "POST /\nx-do: 200+delay=1500,200+delay=1500,200+x-try=3\n\nthe body",
    "HEAD /\nx-do: 200+delay=1200,200+x-try=2",
];

fn to(name: &'static str, fields: &str, requests: &[&str]) -> Case {
    let route = format!("- {{match: {{prefix: /}}, route: {{cluster: a, timeout: 2.5s, {fields}}}}}");
    case(name, &route, requests)
        .of_host("include_request_attempt_count: true")
        .of_host("include_attempt_count_in_response: true")
        .of_host("include_is_timeout_retry_header: true")
}

pub fn cases() -> Vec<Case> {
    let retries = "retry_policy: {retry_on: 5xx, num_retries: 2, per_try_timeout: 0.4s, retry_back_off: {base_interval: \
                   0.001s}}";
    let hedged = format!("hedge_policy: {{hedge_on_per_try_timeout: true}}, {retries}");
    let asked = [
        "GET /\nx-do: 200+delay=1200+x-try=1,200+x-try=2\nx-envoy-hedge-on-per-try-timeout: true",
        "GET /\nx-do: 200+delay=550+x-try=1,200+delay=1500+x-try=2\nx-envoy-hedge-on-per-try-timeout: true",
        "GET /\nx-do: 200+delay=550+x-try=1,200+delay=1500+x-try=2\nx-envoy-hedge-on-per-try-timeout: false",
        "GET /\nx-do: 200+delay=550+x-try=1,200+delay=1500+x-try=2\nx-envoy-hedge-on-per-try-timeout: maybe",
    ];
    let trusting =
        |name, fields: &str| TRUSTING.iter().fold(to(name, fields, &asked), |case, line| case.of_manager(line));
    let upgrades = format!("upgrade_configs: [{{upgrade_type: websocket}}], {hedged}");
    let upgrade = |does: &str| format!("GET /\nconnection: Upgrade\nupgrade: websocket\nx-do: {does}\n\nhello|bye");
    // Of WebSocket the answer is waited for though the request has no end before its tunnel has.
    let tunnels = ["101", "101+delay=1600", "101+delay=1000,101", "503,101", "503,101+delay=1000,101", "reset,101"];
    let refused = ["403+delay=1000,101", "503,503,503", "reset"];
    let tunnels: Vec<_> = tunnels.iter().chain(&refused).map(|does| upgrade(does)).collect();
    let tunnels: Vec<_> = tunnels.iter().map(String::as_str).collect();
    vec![
        to("tunnels that are late", &upgrades, &tunnels),
        to(
            "tunnels that are late and tried again",
            &format!("upgrade_configs: [{{upgrade_type: websocket}}], {retries}"),
            &tunnels,
        ),
        to(
            "tunnels of the host's policy",
            &format!("upgrade_configs: [{{upgrade_type: websocket}}], {retries}"),
            &tunnels,
        )
        .of_host("hedge_policy: {hedge_on_per_try_timeout: true}"),
        to("an attempt beside one that is late", &hedged, &REQUESTS),
        to(
            "whatever is tried again",
            "hedge_policy: {hedge_on_per_try_timeout: true}, retry_policy: {retry_on: connect-failure, per_try_timeout: 0.4s}",
            &REQUESTS,
        ),
        to("no retries", "hedge_policy: {hedge_on_per_try_timeout: true}", &REQUESTS[..3]),
        to("the virtual host's", retries, &REQUESTS[..4]).of_host("hedge_policy: {hedge_on_per_try_timeout: true}"),
        to("the route's, not the virtual host's", &format!("hedge_policy: {{}}, {retries}"), &REQUESTS[..4])
            .of_host("hedge_policy: {hedge_on_per_try_timeout: true}"),
        trusting("a client that asks for it", retries),
        trusting("a client that asks for another", &hedged),
        to("a client that may not ask", retries, &asked),
    ]
}
