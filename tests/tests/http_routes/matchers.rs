//! `VirtualHost.matcher`: the tree that finds which routes are looked at.

use super::harness::{Case, case};

const TYPES: &str = "\"@type\": type.googleapis.com";

/// A value, whatever it is.
const ANY: &str = "safe_regex: {google_re2: {}, regex: \".*\"}";

/// `$1` to `$9` and a cluster's letter, as routes of any path.
fn action(what: &str) -> String {
    to(&format!("match: {{prefix: /}}, {what}"))
}

/// A route with its own match.
fn to(route: &str) -> String {
    format!("{{action: {{name: r, typed_config: {{{TYPES}/envoy.config.route.v3.Route, {route}}}}}}}")
}

fn list(routes: &str) -> String {
    format!("{{action: {{name: r, typed_config: {{{TYPES}/envoy.config.route.v3.RouteList, routes: [{routes}]}}}}}}")
}

fn input(header: &str) -> String {
    format!(
        "input: {{name: i, typed_config: {{{TYPES}/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: \
         \"{header}\"}}}}"
    )
}

fn single(header: &str, matcher: &str) -> String {
    format!("{{single_predicate: {{{}, {matcher}}}}}", input(header))
}

fn value(header: &str, value: &str) -> String {
    single(header, &format!("value_match: {{{value}}}"))
}

fn custom(header: &str, kind: &str, fields: &str) -> String {
    let custom = format!("{TYPES}/envoy.extensions.matching.input_matchers.{kind}, {fields}");
    single(header, &format!("custom_match: {{name: c, typed_config: {{{custom}}}}}"))
}

fn matchers(all: &[(String, String)]) -> String {
    let all = all.iter().map(|(predicate, on)| format!("{{predicate: {predicate}, on_match: {on}}}"));
    format!("matcher_list: {{matchers: [{}]}}", all.collect::<Vec<_>>().join(", "))
}

fn map(kind: &str, header: &str, entries: &[(&str, String)]) -> String {
    let entries = entries.iter().map(|(key, on)| format!("\"{key}\": {on}"));
    let entries = entries.collect::<Vec<_>>().join(", ");
    format!("matcher_tree: {{{}, {kind}: {{map: {{{entries}}}}}}}", input(header))
}

fn nested(matcher: &str) -> String {
    format!("{{matcher: {{{matcher}}}}}")
}

fn host(name: &'static str, matcher: &str, requests: &[&str]) -> Case {
    case(name, &format!("- name: all\n  domains: [\"*\"]\n  matcher: {{{matcher}}}"), requests).hosts()
}

pub fn cases() -> Vec<Case> {
    [trees(), lists(), values(), routes()].concat()
}

fn trees() -> Vec<Case> {
    let asks = ["GET /\nx: a", "GET /\nx: ab", "GET /\nx: abc", "GET /\nx: A", "GET /\nx: b", "GET /", "GET /\nx:"];
    let deep = nested(&map("exact_match_map", "y", &[("1", action("$3"))]));
    let of_two =
        ["GET /\nx: a\ny: 1", "GET /\nx: ab\ny: 1", "GET /\nx: abc\ny: 2", "GET /\nx: abc\ny: 1", "GET /\nx: abc"];
    let no_match = format!("on_no_match: {}", action("$9"));
    let paths =
        ["GET /", "GET /api", "GET /api/v1/x?y=z", "GET /api/v2", "GET /apis", "GET /other?x=/api/v1", "HEAD /api/v1"];
    vec![
        host("exact_match_map", &map("exact_match_map", "x", &[("a", action("$1")), ("ab", action("$2"))]), &asks),
        host("exact_match_map of what is empty", &map("exact_match_map", "x", &[("", action("$1"))]), &asks),
        host(
            "exact_match_map, on_no_match",
            &format!("{}, {no_match}", map("exact_match_map", "x", &[("a", action("$1"))])),
            &asks,
        ),
        host("prefix_match_map", &map("prefix_match_map", "x", &[("a", action("$1")), ("ab", action("$2"))]), &asks),
        host(
            "prefix_match_map of all",
            &map("prefix_match_map", "x", &[("", action("$1")), ("a", action("$2"))]),
            &asks,
        ),
        host(
            "of prefixes the longest that comes to a route",
            &format!("{}, {no_match}", map("prefix_match_map", "x", &[("a", action("$1")), ("abc", deep.clone())])),
            &of_two,
        ),
        host(
            "a map that comes to nothing",
            &format!("{}, {no_match}", map("exact_match_map", "x", &[("abc", deep)])),
            &of_two,
        ),
        host(
            "a nested on_no_match",
            &map(
                "exact_match_map",
                "x",
                &[("abc", nested(&format!("{}, {no_match}", map("exact_match_map", "y", &[("1", action("$3"))]))))],
            ),
            &of_two,
        ),
        host(
            "of the path",
            &map(
                "prefix_match_map",
                ":path",
                &[("/api", action("$1")), ("/api/v1", action("$2")), ("/api/v", action("$a"))],
            ),
            &paths,
        ),
        host(
            "of the method",
            &map("exact_match_map", ":method", &[("GET", action("$1")), ("POST", action("$2"))]),
            &["GET /", "POST /\n\nx", "PUT /\n\nx", "HEAD /"],
        ),
        host(
            "of the host",
            &map("exact_match_map", ":authority", &[("a.test", action("$1")), ("b.test:80", action("$2"))]),
            &["GET /\nhost: a.test", "GET /\nhost: b.test:80", "GET /\nhost: B.test:80", "GET /\nhost: c.test"],
        ),
        host(
            "of the host by its other name",
            &map("exact_match_map", "Host", &[("a.test", action("$1"))]),
            &["GET /\nhost: a.test", "GET /\nhost: c.test"],
        ),
        host(
            "of the scheme",
            &map("exact_match_map", ":scheme", &[("http", action("$1")), ("https", action("$2"))]),
            &["GET /", "GET /\nx-forwarded-proto: https"],
        ),
        host("no matcher", "", &asks[..1]),
        host("nothing but on_no_match", &no_match, &asks[..1]),
    ]
}

fn lists() -> Vec<Case> {
    let asks = ["GET /\nx: a", "GET /\nx: b", "GET /\nx: a\nx: b", "GET /\nx: b\ny: 1", "GET /\ny: 1", "GET /"];
    let (x, y) = (value("x", "exact: a"), value("y", "exact: \"1\""));
    let both = |kind: &str| format!("{{{kind}: {{predicate: [{x}, {y}]}}}}");
    vec![
        host("matcher_list", &matchers(&[(x.clone(), action("$1")), (value("x", ANY), action("$2"))]), &asks),
        host(
            "of a list the first that comes to a route",
            &matchers(&[
                (value("x", ANY), nested(&map("exact_match_map", "y", &[("1", action("$1"))]))),
                (value("x", "exact: b"), action("$2")),
            ]),
            &asks,
        ),
        host(
            "a list and on_no_match",
            &format!("{}, on_no_match: {}", matchers(&[(x.clone(), action("$1"))]), action("$a")),
            &asks,
        ),
        host(
            "and_matcher",
            &matchers(&[(both("and_matcher"), action("$1"))]),
            &[&asks[..], &["GET /\nx: a\ny: 1"]].concat(),
        ),
        host("or_matcher", &matchers(&[(both("or_matcher"), action("$1"))]), &asks),
        host("not_matcher", &matchers(&[(format!("{{not_matcher: {x}}}"), action("$1"))]), &asks),
        host(
            "predicates in each other",
            &matchers(&[(
                format!("{{not_matcher: {{or_matcher: {{predicate: [{x}, {{not_matcher: {y}}}]}}}}}}"),
                action("$1"),
            )]),
            &asks,
        ),
    ]
}

fn values() -> Vec<Case> {
    let asks = [
        "GET /\nx: abc",
        "GET /\nx: ABC",
        "GET /\nx: xabcx",
        "GET /\nx: a",
        "GET /\nx: a\nx: bc",
        "GET /\nx: a,bc",
        "GET /\nx:",
        "GET /",
    ];
    let strings = [
        ("exact", "exact: \"a,bc\""),
        ("exact of what is empty", "exact: \"\""),
        ("ignore_case", "exact: Abc, ignore_case: true"),
        ("prefix", "prefix: a"),
        ("prefix, ignore_case", "prefix: A, ignore_case: true"),
        ("suffix", "suffix: bc"),
        ("contains", "contains: bc"),
        ("safe_regex", "safe_regex: {google_re2: {}, regex: \"[a-c,]+\"}"),
    ];
    let mut cases: Vec<Case> =
        strings.iter().map(|(name, text)| host(name, &matchers(&[(value("x", text), action("$1"))]), &asks)).collect();
    let ranges = "stat_prefix: matched, cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}, {address_prefix: \"fd00::\", \
                  prefix_len: 16}]";
    cases.push(host(
        "an address",
        &matchers(&[(custom("x", "ip.v3.Ip", ranges), action("$1"))]),
        &[
            "GET /\nx: 10.1.2.3",
            "GET /\nx: 11.1.2.3",
            "GET /\nx: fd00::1",
            "GET /\nx: fd01::1",
            "GET /\nx: ::ffff:10.1.2.3",
            "GET /\nx: 10.1.2",
            "GET /\nx: \"10.1.2.3\"",
            "GET /\nx: 10.1.2.3:80",
            "GET /\nx: 10.1.2.3\nx: 10.1.2.4",
            "GET /\nx:",
            "GET /",
        ],
    ));
    let words: Vec<String> = ["", "a", "b", "c", "d", "e", "f", "some longer text that is hashed"]
        .iter()
        .map(|word| format!("GET /\nx: {word}"))
        .chain(["GET /".to_owned()])
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    for (name, fields) in [
        ("consistent_hashing", "threshold: 5, modulo: 10"),
        ("consistent_hashing of a seed", "threshold: 5, modulo: 10, seed: 7"),
        ("consistent_hashing of all", "modulo: 1"),
        ("consistent_hashing of none", "threshold: 3, modulo: 3"),
    ] {
        let hashing = custom("x", "consistent_hashing.v3.ConsistentHashing", fields);
        cases.push(host(name, &matchers(&[(hashing, action("$1"))]), &words));
    }
    for (name, fields) in [
        ("runtime_fraction", "runtime_fraction: {default_value: {numerator: 50}}"),
        (
            "runtime_fraction of a seed",
            "seed: 3, runtime_fraction: {default_value: {numerator: 500000, denominator: MILLION}}",
        ),
    ] {
        let share = custom("x", "runtime_fraction.v3.RuntimeFraction", fields);
        cases.push(host(name, &matchers(&[(share, action("$1"))]), &words));
    }
    cases
}

fn routes() -> Vec<Case> {
    let asks =
        ["GET /a/x\nx: a", "GET /b/x\nx: a", "GET /c/x\nx: a", "GET /a/x\nx: b", "POST /a/x\nx: a\n\nbody", "GET /a/x"];
    let many: Vec<String> = (0..40).map(|number| format!("{{match: {{prefix: /{number}/}}, $1}}")).collect();
    let of_many = format!(
        "{{match: {{prefix: /}}, $b}}, {}, {{match: {{prefix: /a}}, $2}}, {{match: {{prefix: /}}, $3}}",
        many.join(", ")
    );
    vec![
        host(
            "the route's own match",
            &map("exact_match_map", "x", &[("a", to("match: {prefix: /a}, $a")), ("b", to("match: {prefix: /b}, $b"))]),
            &asks,
        ),
        host(
            "RouteList",
            &map(
                "exact_match_map",
                "x",
                &[
                    ("a", list("{match: {prefix: /a}, $a}, {match: {path: /b/x}, $b}, {match: {prefix: /a/x}, $1}")),
                    ("b", list(&of_many)),
                ],
            ),
            &[&asks[..], &["GET /39/x\nx: b"]].concat(),
        ),
        host(
            "a RouteList of many",
            &map("exact_match_map", "x", &[("a", list(of_many.trim_start_matches("{match: {prefix: /}, $b}, ")))]),
            &[&asks[..], &["GET /39/x\nx: a", "GET /40/x\nx: a"]].concat(),
        ),
        host("an empty RouteList", &map("exact_match_map", "x", &[("a", list(""))]), &asks[..2]),
        host(
            "a cluster that is not there",
            &map("exact_match_map", "x", &[("a", action("route: {cluster: nobody}"))]),
            &asks[..1],
        ),
        host(
            "what a route says",
            &map(
                "exact_match_map",
                "x",
                &[(
                    "a",
                    to(
                        "name: found, match: {prefix: /a/}, route: {cluster: a, prefix_rewrite: /new/}, request_headers_to_add: \
                        [{header: {key: x-route, value: \"%ROUTE_NAME%\"}}], response_headers_to_add: [{header: {key: x-of, value: \
                        route}}]",
                    ),
                )],
            ),
            &asks,
        ),
        host(
            "a redirect, and retries",
            &map(
                "exact_match_map",
                "x",
                &[
                    ("a", action("redirect: {path_redirect: /elsewhere}")),
                    ("b", action("route: {cluster: a, retry_policy: {retry_on: 5xx}}")),
                ],
            ),
            &["GET /\nx: a", "GET /\nx: b\nx-do: 503,200"],
        ),
        case(
            "require_tls before the matcher",
            &format!(
                "- name: all\n  domains: [\"*\"]\n  require_tls: ALL\n  matcher: {{{}}}",
                map("exact_match_map", "x", &[("a", action("$1"))])
            ),
            &["GET /\nx: a", "GET /\nx: b", "GET /\nx: a\nx-forwarded-proto: https"],
        )
        .hosts(),
    ]
}
