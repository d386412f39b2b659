use http::Request;

use super::*;
use crate::config::model::{HeaderMutations, RouteAction, StringMatcher, StringPattern};

fn host(name: &str, domains: &[&str], routes: Vec<RouteMatch>) -> VirtualHost {
    let route = |route_match| {
        let action = RouteAction::DirectResponse { status: http::StatusCode::OK, body: bytes::Bytes::new() };
        Arc::new(Route { name: String::new(), route_match, action, headers: HeaderMutations::default() })
    };
    VirtualHost {
        name: name.to_owned(),
        domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
        routes: routes.into_iter().map(route).collect(),
        ..VirtualHost::default()
    }
}

fn path(path: PathMatch) -> RouteMatch {
    RouteMatch { path, case_sensitive: true, headers: Vec::new(), query_parameters: Vec::new(), grpc: false }
}

fn table(virtual_hosts: Vec<VirtualHost>) -> RouteTable {
    RouteTable::new(Arc::new(RouteConfig { virtual_hosts, ..RouteConfig::default() }))
}

fn request(uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut builder = Request::builder().uri(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

#[test]
fn hosts_are_searched_in_envoys_order() {
    let table = table(vec![
        host("any", &["*"], vec![]),
        host("prefix", &["api.*"], vec![]),
        host("short suffix", &["*.com"], vec![]),
        host("long suffix", &["*.example.com"], vec![]),
        host("exact", &["api.example.com"], vec![]),
    ]);
    let find = |name: &str| table.virtual_host(name).map(|index| table.config.virtual_hosts[index].name.as_str());
    assert_eq!(find("API.Example.com"), Some("exact"));
    assert_eq!(find("www.example.com"), Some("long suffix"));
    assert_eq!(find("www.other.com"), Some("short suffix"));
    assert_eq!(find("api.internal"), Some("prefix"));
    assert_eq!(find("api.other.com"), Some("short suffix"), "suffixes come before prefixes");
    assert_eq!(find(".com"), Some("any"), "a star stands for at least one character");
    assert_eq!(find("users"), Some("any"));
}

#[test]
fn the_first_route_that_matches_is_taken() {
    let routes = vec![
        path(PathMatch::Path("/exact".into())),
        path(PathMatch::PathSeparatedPrefix("/api".into())),
        path(PathMatch::Prefix("/".into())),
    ];
    let table = table(vec![host("any", &["*"], routes)]);
    let find = |uri: &str| table.find(&request(uri, &[("host", "a")])).map(|(_, route)| route);
    assert_eq!(find("/exact?q=1"), Some(0), "the query takes no part");
    assert_eq!(find("/api"), Some(1));
    assert_eq!(find("/api/v1"), Some(1));
    assert_eq!(find("/apis"), Some(2));
    assert_eq!(find("/exact/"), Some(2));
}

#[test]
fn no_host_or_no_route_is_no_match() {
    let table = table(vec![host("a", &["a"], vec![path(PathMatch::Prefix("/x".into()))])]);
    assert_eq!(table.find(&request("/x", &[("host", "b")])), None);
    assert_eq!(table.find(&request("/y", &[("host", "a")])), None);
    assert_eq!(table.find(&request("/x", &[("host", "a")])), Some((0, 0)));
}

fn header(value: HeaderValueMatch, invert_match: bool, treat_missing_header_as_empty: bool) -> HeaderMatcher {
    let name = MatchedHeader::Name(http::HeaderName::from_static("x"));
    HeaderMatcher { name, value, invert_match, treat_missing_header_as_empty }
}

fn text(pattern: StringPattern) -> HeaderValueMatch {
    HeaderValueMatch::String(StringMatcher { pattern, ignore_case: false })
}

#[test]
fn header_matchers_follow_envoy() {
    let exact = |invert, missing| header(text(StringPattern::Exact("1".into())), invert, missing);
    let cases = [
        (exact(false, false), vec![("x", "1")], true),
        (exact(false, false), vec![("x", "2")], false),
        (exact(true, false), vec![("x", "2")], true),
        (exact(true, false), vec![], false),
        (exact(true, true), vec![], true),
        (header(text(StringPattern::Exact("1,2".into())), false, false), vec![("x", "1"), ("x", "2")], true),
        (header(HeaderValueMatch::Present(true), false, false), vec![("x", "")], true),
        (header(HeaderValueMatch::Present(true), true, false), vec![], true),
        (header(HeaderValueMatch::Present(false), false, false), vec![], true),
        (header(HeaderValueMatch::Range { start: -10, end: 0 }, false, false), vec![("x", "-1")], true),
        (header(HeaderValueMatch::Range { start: -10, end: 0 }, false, false), vec![("x", "0")], false),
        (header(HeaderValueMatch::Range { start: -10, end: 0 }, false, false), vec![("x", "somestring")], false),
    ];
    for (index, (matcher, headers, expected)) in cases.iter().enumerate() {
        assert_eq!(header_matches(matcher, &request("/", headers)), *expected, "case {index}");
    }
}

#[test]
fn query_parameters() {
    let matcher = |value: Option<&str>| QueryParameterMatcher {
        name: "debug".to_owned(),
        value: value.map(|value| StringMatcher { pattern: StringPattern::Exact(value.into()), ignore_case: false }),
    };
    assert!(query_matches(&matcher(None), Some("a=1&debug")));
    assert!(query_matches(&matcher(Some("1")), Some("debug=1")));
    assert!(!query_matches(&matcher(Some("1")), Some("debug=2")));
    assert!(!query_matches(&matcher(None), None));
}

#[test]
fn a_cache_sees_new_routes_and_streams_keep_the_old() {
    let slot = Arc::new(RouteSlot::default());
    let cache = RouteCache::new(Arc::clone(&slot));
    let request = request("/x", &[("host", "a")]);
    assert!(cache.route(&request).is_none(), "no routes yet");
    let routes = |name: &str| {
        let virtual_hosts = vec![host(name, &["*"], vec![path(PathMatch::Prefix("/".into()))])];
        Arc::new(RouteConfig { virtual_hosts, ..RouteConfig::default() })
    };
    slot.set(routes("one"));
    let first = cache.route(&request).unwrap();
    slot.set(routes("two"));
    assert_eq!(first.virtual_host().name, "one");
    assert_eq!(cache.route(&request).unwrap().virtual_host().name, "two");
}
