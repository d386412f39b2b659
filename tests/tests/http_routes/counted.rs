//! What requests are counted under: virtual clusters, and the prefixes of routes. And who gets copies of all of a configuration's.

use super::harness::{Case, case};

const CLUSTERS: &str = "virtual_clusters: [{name: posts, headers: [{name: \":method\", string_match: {exact: POST}}]}, \
                        {name: one, headers: [{name: \":path\", string_match: {prefix: /one}}, {name: x-a, present_match: \
                        true}]}, {name: \"o.n:e\", headers: [{name: \":path\", string_match: {prefix: /one}}]}]";

/// All ways for a request to end.
const REQUESTS: [&str; 16] = [
    "GET /",
    "POST /\n\nbody",
    "GET /one",
    "GET /one\nx-a: b",
    "GET /one\nx-do: 404",
    "GET /one\nx-do: 503,200",
    "GET /one\nx-do: 503,503,503,200",
    "GET /one\nx-do: reset,reset,200",
    "GET /one/slow\nx-do: hang",
    "GET /one/dead",
    "GET /dead",
    "GET /empty",
    "GET /direct",
    "GET /redirect",
    "GET /nowhere",
    "GET /\nx-do: 302+location=http://nowhere.test/",
];

fn routes(prefix: &str) -> String {
    let of = |path: &str| match prefix {
        "" => String::new(),
        prefix => format!(", stat_prefix: \"{prefix}{}\"", path.replace('/', "_")),
    };
    [
        ("prefix: /one/slow", "route: {cluster: a, timeout: 0.3s}"),
        ("prefix: /one/dead", "route: {cluster: dead, retry_policy: {retry_on: connect-failure}}"),
        ("prefix: /one", "route: {cluster: a, retry_policy: {retry_on: 5xx, num_retries: 2}}"),
        ("prefix: /dead", "route: {cluster: dead}"),
        ("prefix: /empty", "route: {cluster: empty}"),
        ("prefix: /direct", "direct_response: {status: 200}"),
        ("prefix: /redirect", "redirect: {path_redirect: /x}"),
        ("path: /", "route: {cluster: a, internal_redirect_policy: {}}"),
    ]
    .iter()
    .map(|(path, action)| {
        format!("- {{match: {{{path}}}, {action}{}}}\n", of(path.trim_start_matches(|letter| letter != '/')))
    })
    .collect()
}

pub fn cases() -> Vec<Case> {
    let mirrored = "- {match: {prefix: /own}, route: {cluster: a, request_mirror_policies: [{cluster: c}]}}\n\
                    - {match: {prefix: /}, $a}";
    let all = "request_mirror_policies: [{cluster: b}]";
    vec![
        case("virtual clusters", &routes(""), &REQUESTS).of_host(CLUSTERS),
        case("stat_prefix", &routes("route.r"), &REQUESTS),
        case("both", &routes("p"), &REQUESTS).of_host(CLUSTERS),
        case("neither", &routes(""), &REQUESTS),
        case("a configuration's mirrors", mirrored, &["GET /", "GET /own", "POST /\n\nbody"]).of_config(all).settle(2),
        case("a virtual host's, not the configuration's", mirrored, &["GET /", "GET /own"])
            .of_host("request_mirror_policies: [{cluster: dead}, {cluster: c}]")
            .of_config(all)
            .settle(2),
    ]
}
