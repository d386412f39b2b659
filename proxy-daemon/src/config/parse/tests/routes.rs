//! Routes: each field to its place in the model, and what Envoy refuses refused.

use std::time::Duration;

use http::StatusCode;

use super::*;
use crate::config::model::{
    AddedValue, ClusterChoice, ForwardAction, HeaderAppendAction, HeaderValueMatch, HostRewrite, MatchedHeader,
    PathMatch, PathRewrite, QueryParameterMatch, RedirectPath, RetryOn, Route, RouteAction, RouteConfig, StringPattern,
};
use crate::layered_runtime::{Denominator, Fraction, Key, RuntimeFraction};

fn config(yaml: &str) -> Result<RouteConfig, String> {
    let message = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    json::validate(&message).map_err(|error| error.to_string())?;
    route_config(&message, "").map_err(|error| error.to_string())
}

fn one(route: &str) -> Result<Route, String> {
    let config = config(&format!("{{ name: r, virtual_hosts: [{{ name: v, domains: ['*'], routes: [{route}] }}] }}"))?;
    let host = config.virtual_hosts.into_iter().next().unwrap();
    let route = std::sync::Arc::into_inner(host).unwrap().routes.remove(0);
    Ok(std::sync::Arc::into_inner(route).unwrap())
}

fn matched(rule: &str) -> Route {
    one(&format!("{{ match: {rule}, direct_response: {{ status: 200 }} }}")).unwrap()
}

fn forwarded(action: &str) -> ForwardAction {
    match one(&format!("{{ match: {{ prefix: / }}, route: {action} }}")).unwrap().action {
        RouteAction::Forward(action) => *action,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_kind_of_path_match() {
    let path = |rule| matched(rule).route_match.path;
    assert!(matches!(path("{ prefix: /a }"), PathMatch::Prefix(text) if &*text == "/a"));
    assert!(matches!(path("{ path: /a }"), PathMatch::Path(text) if &*text == "/a"));
    assert!(matches!(path("{ path_separated_prefix: /a }"), PathMatch::PathSeparatedPrefix(text) if &*text == "/a"));
    let PathMatch::Regex(regex) = path("{ safe_regex: { regex: '/a|/b+' } }") else { panic!() };
    assert!(regex.is_match("/bb") && !regex.is_match("/a/x") && !regex.is_match("x/a"), "anchored at both ends");
    let rule = matched("{ prefix: /a, case_sensitive: false, grpc: {} }").route_match;
    assert!(!rule.case_sensitive && rule.grpc);
    assert!(matched("{ prefix: /a }").route_match.case_sensitive);
}

#[test]
fn every_kind_of_header_match() {
    let header = |fields: &str| {
        let mut rule = matched(&format!("{{ prefix: /, headers: [{{ {fields} }}] }}")).route_match;
        rule.headers.remove(0)
    };
    let pattern = |fields: &str| match header(fields).value {
        HeaderValueMatch::String(matcher) => matcher,
        other => panic!("{other:?}"),
    };
    assert!(matches!(pattern("name: a, exact_match: X").pattern, StringPattern::Exact(text) if &*text == "X"));
    assert!(matches!(pattern("name: a, prefix_match: X").pattern, StringPattern::Prefix(text) if &*text == "X"));
    assert!(matches!(pattern("name: a, suffix_match: X").pattern, StringPattern::Suffix(text) if &*text == "X"));
    assert!(matches!(pattern("name: a, contains_match: X").pattern, StringPattern::Contains(text) if &*text == "X"));
    let old = pattern("name: a, safe_regex_match: { google_re2: {}, regex: 'a.c' }");
    assert!(old.matches("abc") && !old.matches("abcd"));
    let folded = pattern("name: a, string_match: { exact: MiXed, ignore_case: true }");
    assert!(folded.matches("mIxEd") && !folded.matches("mixed2"));
    assert!(matches!(header("name: a").value, HeaderValueMatch::Present(true)));
    assert!(matches!(header("name: a, present_match: false").value, HeaderValueMatch::Present(false)));
    let range = header("name: a, range_match: { start: -5, end: 10 }").value;
    assert!(matches!(range, HeaderValueMatch::Range { start: -5, end: 10 }));
    let both = header("name: a, invert_match: true, treat_missing_header_as_empty: true");
    assert!(both.invert_match && both.treat_missing_header_as_empty);
    for (name, expected) in [
        (":method", MatchedHeader::Method),
        (":path", MatchedHeader::Path),
        (":scheme", MatchedHeader::Scheme),
        (":authority", MatchedHeader::Authority),
        ("host", MatchedHeader::Authority),
    ] {
        assert_eq!(header(&format!("name: '{name}'")).name, expected);
    }
    let rule = matched("{ prefix: /, query_parameters: [{ name: q, string_match: { prefix: a } }, { name: p }] }");
    let [q, p] = rule.route_match.query_parameters.as_slice() else { panic!() };
    assert!(matches!(&q.value, QueryParameterMatch::String(matcher) if matcher.matches("abc")));
    assert!(matches!(p.value, QueryParameterMatch::Present(true)));
}

#[test]
fn forwarding() {
    let plain = forwarded("{ cluster: up }");
    assert!(matches!(&plain.cluster, ClusterChoice::Cluster(name) if &**name == "up"));
    assert_eq!(plain.timeout, Some(Duration::from_secs(15)));
    assert_eq!((plain.idle_timeout, plain.high_priority), (None, false));
    assert_eq!(plain.cluster_not_found_status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(matches!(plain.host_rewrite, HostRewrite::None));
    assert!(plain.retry_policy.is_none() && matches!(plain.path_rewrite, PathRewrite::None));

    let full = forwarded(
        "{ cluster_header: x-to, timeout: 0s, idle_timeout: 0s, priority: HIGH, cluster_not_found_response_code: \
         NOT_FOUND, prefix_rewrite: /v2, host_rewrite_literal: other }",
    );
    assert!(matches!(&full.cluster, ClusterChoice::Header(name) if name == "x-to"));
    assert_eq!((full.timeout, full.idle_timeout, full.high_priority), (None, Some(None), true));
    assert_eq!(full.cluster_not_found_status, StatusCode::NOT_FOUND);
    assert!(matches!(full.path_rewrite, PathRewrite::Prefix(prefix) if &*prefix == "/v2"));
    assert!(matches!(&full.host_rewrite, HostRewrite::Literal(host) if host == "other"));
    assert!(matches!(forwarded("{ cluster: up, auto_host_rewrite: true }").host_rewrite, HostRewrite::Auto));
    assert!(matches!(forwarded("{ cluster: up, auto_host_rewrite: false }").host_rewrite, HostRewrite::None));
    assert_eq!(forwarded("{ cluster: up, idle_timeout: 2.5s }").idle_timeout, Some(Some(Duration::from_millis(2500))));
}

#[test]
fn weights_add_up() {
    let action = forwarded(
        "{ weighted_clusters: { clusters: [{ name: a, weight: 90 }, { name: never, weight: 0 }, { name: b, weight: 10 }] } }",
    );
    let ClusterChoice::Weighted(clusters) = action.cluster else { panic!() };
    assert_eq!(clusters.total(), 100);
    assert_eq!([0, 89, 90, 99].map(|point| &**clusters.name(clusters.at(point))), ["a", "a", "b", "b"]);
}

#[test]
fn runtime_keys_of_a_route() {
    let share = |fraction: &str| matched(&format!("{{ prefix: /, runtime_fraction: {fraction} }}")).route_match;
    let rule = share("{ default_value: { numerator: 5, denominator: MILLION }, runtime_key: k }");
    let million = Fraction { numerator: 5, denominator: Denominator::Million };
    assert_eq!(rule.runtime_fraction, Some(RuntimeFraction { default: million, key: Key::optional("k") }));
    let rule = share("{ default_value: {} }");
    assert_eq!(rule.runtime_fraction, Some(RuntimeFraction { default: Fraction::percent(0), key: None }));
    let clusters = "weighted_clusters: { clusters: [{ name: a, weight: 1 }, { name: b, weight: 0 }]";
    let action = forwarded(&format!("{{ {clusters}, runtime_key_prefix: p }} }}"));
    let ClusterChoice::Weighted(weighted) = action.cluster else { panic!() };
    let runtime = weighted.runtime.unwrap();
    let keys: Vec<_> =
        runtime.iter().map(|(weight, _)| (weight.default, weight.key.as_ref().unwrap().name())).collect();
    assert_eq!(keys, [(1, "p.a"), (0, "p.b")]);
    let ClusterChoice::Weighted(weighted) = forwarded(&format!("{{ {clusters} }} }}")).cluster else { panic!() };
    assert!(weighted.runtime.is_none());
}

#[test]
fn retries() {
    let policy = forwarded(
        "{ cluster: up, retry_policy: { retry_on: '5xx, retriable-status-codes,unheard-of', retriable_status_codes: \
         [404, 409], num_retries: 4, per_try_timeout: 0.25s, retry_back_off: { base_interval: 0.1s } } }",
    );
    let policy = policy.retry_policy.unwrap();
    let on = RetryOn { server_error: true, retriable_status_codes: true, ..RetryOn::default() };
    assert_eq!((policy.retry_on, policy.num_retries), (on, 4));
    assert_eq!(policy.per_try_timeout, Some(Duration::from_millis(250)));
    assert_eq!((policy.base_interval, policy.max_interval), (Some(Duration::from_millis(100)), None));
    assert_eq!(policy.retriable_status_codes, [404, 409]);
    let policy = forwarded("{ cluster: up, retry_policy: { retry_on: connect-failure } }").retry_policy.unwrap();
    assert_eq!((policy.num_retries, policy.base_interval, policy.max_interval), (1, None, None));
}

#[test]
fn redirects_and_direct_responses() {
    let redirect = |fields: &str| match one(&format!("{{ match: {{ prefix: / }}, redirect: {{ {fields} }} }}")) {
        Ok(Route { action: RouteAction::Redirect(action), .. }) => *action,
        other => panic!("{other:?}"),
    };
    let action = redirect("https_redirect: true, host_redirect: b, port_redirect: 8443, path_redirect: /x?y");
    assert_eq!((action.status, action.scheme.as_deref()), (StatusCode::MOVED_PERMANENTLY, Some("https")));
    assert_eq!((action.host.as_deref(), action.port), (Some("b"), Some(8443)));
    assert!(matches!(&action.path, RedirectPath::Replace(path) if &**path == "/x?y"));
    let action = redirect("response_code: PERMANENT_REDIRECT, prefix_rewrite: /new, strip_query: true");
    assert_eq!((action.status, action.strip_query), (StatusCode::PERMANENT_REDIRECT, true));
    assert!(matches!(&action.path, RedirectPath::PrefixRewrite(path) if &**path == "/new"));
    assert!(action.scheme.is_none() && action.host.is_none() && action.port.is_none());

    let route = one("{ match: { prefix: / }, direct_response: { status: 418, body: { inline_string: hi } } }").unwrap();
    let RouteAction::DirectResponse { status, body, format: None } = route.action else { panic!() };
    assert_eq!((status.as_u16(), &body[..]), (418, &b"hi"[..]));
}

#[test]
fn bodies_of_direct_responses_are_read_up_to_their_limit() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: usize| {
        let path = directory.path().join(name);
        std::fs::write(&path, vec![b'x'; bytes]).unwrap();
        path.display().to_string()
    };
    let of = |source: &str| {
        let route =
            one(&format!("{{ match: {{ prefix: / }}, direct_response: {{ status: 200, body: {{ {source} }} }} }}"));
        route.map(|route| match route.action {
            RouteAction::DirectResponse { body, .. } => body.len(),
            _ => panic!(),
        })
    };
    assert_eq!(of(&format!("filename: {}", write("most", 4096))).unwrap(), 4096);
    let missing = directory.path().join("none").display().to_string();
    for (source, field) in [
        (format!("filename: {}", write("more", 4097)), "direct_response.body.filename"),
        (format!("filename: {}", directory.path().display()), "direct_response.body.filename"),
        (format!("filename: {missing}"), "direct_response.body.filename"),
        ("environment_variable: CULVERT_NONE_SUCH".to_owned(), "direct_response.body.environment_variable"),
    ] {
        let error = of(&source).unwrap_err();
        assert!(error.to_string().contains(field), "{source}: {error}");
    }
}

#[test]
fn header_mutations_at_every_level() {
    let edits = "request_headers_to_add: [{ header: { key: X-A, value: '100%%' }, append_action: ADD_IF_ABSENT }], \
                 request_headers_to_remove: [X-B], response_headers_to_add: [{ header: { key: c, value: v }, append: \
                 false }, { header: { key: empty, value: '' } }], response_headers_to_remove: [d]";
    let config = config(&format!(
        "{{ name: r, {edits}, virtual_hosts: [{{ name: v, domains: ['*'], {edits}, routes: [{{ match: {{ prefix: / }}, \
         {edits}, direct_response: {{ status: 200 }} }}] }}] }}"
    ))
    .unwrap();
    let host = &config.virtual_hosts[0];
    for headers in [&config.headers, &host.headers, &host.routes[0].headers] {
        let [add] = headers.request_add.as_slice() else { panic!() };
        assert_eq!(add.name.as_str(), "x-a");
        assert!(matches!(&add.value, AddedValue::Literal(value) if value == "100%"));
        assert_eq!(add.action, HeaderAppendAction::AddIfAbsent);
        assert_eq!(headers.request_remove, ["x-b"]);
        let [add] = &headers.response_add[..1] else { panic!() };
        assert!(!headers.response_add[1].keep_empty_value);
        assert_eq!((add.name.as_str(), add.action), ("c", HeaderAppendAction::OverwriteIfExistsOrAdd));
        assert_eq!(headers.response_remove, ["d"]);
    }
}

#[test]
fn what_envoy_refuses_is_refused() {
    const R: &str = "virtual_hosts[0].routes[0]";
    let cases = [
        (
            "route: { cluster: up }, request_headers_to_add: [{ header: { key: Host, value: x } }]",
            "request_headers_to_add[0].header.key: :-prefixed or host headers may not be modified",
        ),
        (
            "route: { cluster: up }, response_headers_to_add: [{ header: { key: ':status', value: x } }]",
            "response_headers_to_add[0].header.key: :-prefixed or host headers may not be modified",
        ),
        (
            "route: { cluster: up }, request_headers_to_remove: [a, host]",
            "request_headers_to_remove[1]: :-prefixed or host headers may not be removed",
        ),
        (
            "route: { cluster: up }, request_headers_to_add: [{ append: false, append_action: ADD_IF_ABSENT, header: { key: a, value: b } }]",
            "request_headers_to_add[0]: Both append and append_action are set and it's not allowed",
        ),
        (
            "route: { cluster: up, retry_policy: { retry_back_off: { base_interval: 1s, max_interval: 0.5s } } }",
            "route.retry_policy.retry_back_off.max_interval: max_interval must be greater than or equal to the base_interval",
        ),
        (
            "route: { weighted_clusters: { clusters: [{ name: a, weight: 3000000000 }, { name: b, weight: 3000000000 }] } }",
            "route.weighted_clusters: the sum of weights must be below 4294967296",
        ),
        ("redirect: { port_redirect: 70000 }", "redirect.port_redirect: 70000 is not a TCP port"),
        ("route: { cluster_header: 'a b' }", "route.cluster_header: \"a b\" is not a header name"),
        (
            "route: { cluster: up, host_rewrite_header: 'a b' }",
            "route.host_rewrite_header: \"a b\" is not a header name",
        ),
        (
            "typed_per_filter_config: { a: { '@type': type.googleapis.com/google.protobuf.Empty } }, route: { cluster: up }",
            "typed_per_filter_config[\"a\"]: type google.protobuf.Empty is not supported by culvert yet",
        ),
        (
            "typed_per_filter_config: { a: { '@type': type.googleapis.com/envoy.config.route.v3.FilterConfig, is_optional: \
             true } }, route: { cluster: up }",
            "typed_per_filter_config[\"a\"]: Empty route/virtual host per filter configuration for a filter",
        ),
        (
            "direct_response: { status: 200, body: { filename: /none/such } }",
            "direct_response.body.filename: unable to read file /none/such: No such file or directory (os error 2)",
        ),
    ];
    for (fields, expected) in cases {
        let error = one(&format!("{{ match: {{ prefix: / }}, {fields} }}")).unwrap_err();
        assert_eq!(error, format!("{R}.{expected}"), "{fields}");
    }
    let error = one(&format!(
        "{{ match: {{ prefix: / }}, direct_response: {{ status: 200, body: {{ inline_string: '{}' }} }} }}",
        "x".repeat(4097)
    ));
    assert_eq!(
        error.unwrap_err(),
        format!("{R}.direct_response.body: response body size is 4097 bytes; maximum is 4096")
    );
    let error = config("{ virtual_hosts: [{ name: a, domains: ['*'] }, { name: b, domains: ['*'] }] }").unwrap_err();
    assert_eq!(error, "virtual_hosts[1].domains: Only a single wildcard domain is permitted");
    let error = config("{ vhds: { config_source: { path_config_source: { path: /etc/hostname } } } }").unwrap_err();
    assert_eq!(error, "vhds: vhds: only 'DELTA_GRPC' is supported as an api_type.");
}

#[test]
fn what_envoy_takes_is_taken() {
    let config =
        config("{ virtual_hosts: [{ name: a, domains: ['A.com:80', 'x*y', '*.B'] }, { name: a, domains: [c] }] }");
    assert_eq!(config.unwrap().virtual_hosts[0].domains, ["a.com:80", "x*y", "*.b"]);
}
