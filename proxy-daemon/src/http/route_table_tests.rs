use http::Request;

use super::*;
use crate::http::filters::PerRoute;
use crate::{
    config::model::WeightedClusters,
    layered_runtime::{Fraction, Key, Layer, LayerSource, Runtime, RuntimeFraction, RuntimeInteger},
};

fn host(name: &str, domains: &[&str], routes: Vec<RouteMatch>) -> VirtualHost {
    let route = |route_match| {
        let action =
            RouteAction::DirectResponse { status: http::StatusCode::OK, body: bytes::Bytes::new(), format: None };
        Arc::new(Route {
            stat_prefix: None,
            metadata: None,
            body_buffer_limit: None,
            name: String::new(),
            route_match,
            action,
            headers: HeaderMutations::default(),
            per_filter: Default::default(),
        })
    };
    VirtualHost {
        name: name.to_owned(),
        domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
        routes: routes.into_iter().map(route).collect(),
        ..VirtualHost::default()
    }
}

fn path(path: PathMatch) -> RouteMatch {
    RouteMatch::new(path)
}

fn table(virtual_hosts: Vec<VirtualHost>) -> RouteTable {
    let virtual_hosts = virtual_hosts.into_iter().map(Arc::new).collect();
    RouteTable::new(Arc::new(RouteConfig { virtual_hosts, ..RouteConfig::default() }))
}

/// The number of the host, and of the route there.
fn found(table: &RouteTable, request: &Parts, random: u64) -> Option<(usize, usize)> {
    let (host, chosen) = table.find(request, &MatchCx { random, ..MatchCx::default() })?;
    let Chosen::Route(route) = chosen else { panic!("{chosen:?}") };
    Some((host, route))
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
    let find = |uri: &str| found(&table, &request(uri, &[("host", "a")]), 0).map(|(_, route)| route);
    assert_eq!(find("/exact?q=1"), Some(0), "the query takes no part");
    assert_eq!(find("/api"), Some(1));
    assert_eq!(find("/api/v1"), Some(1));
    assert_eq!(find("/apis"), Some(2));
    assert_eq!(find("/exact/"), Some(2));
}

#[test]
fn no_host_or_no_route_is_no_match() {
    let table = table(vec![host("a", &["a"], vec![path(PathMatch::Prefix("/x".into()))])]);
    assert_eq!(found(&table, &request("/x", &[("host", "b")]), 0), None);
    assert_eq!(found(&table, &request("/y", &[("host", "a")]), 0), None);
    assert_eq!(found(&table, &request("/x", &[("host", "a")]), 0), Some((0, 0)));
}

#[test]
fn a_cache_sees_new_routes_and_streams_keep_the_old() {
    let slot = Arc::new(RouteSlot::default());
    let cache = RouteCache::new(Arc::clone(&slot), Arc::from([]));
    let request = request("/x", &[("host", "a")]);
    assert!(cache.route(&request, &MatchCx::default()).is_none(), "no routes yet");
    let routes = |name: &str| {
        let virtual_hosts = vec![host(name, &["*"], vec![path(PathMatch::Prefix("/".into()))])];
        let virtual_hosts = virtual_hosts.into_iter().map(Arc::new).collect();
        Arc::new(RouteConfig { virtual_hosts, ..RouteConfig::default() })
    };
    slot.set(routes("one"));
    let first = cache.route(&request, &MatchCx::default()).unwrap();
    slot.set(routes("two"));
    assert_eq!(first.virtual_host().name, "one");
    assert_eq!(cache.route(&request, &MatchCx::default()).unwrap().virtual_host().name, "two");
}

#[test]
fn a_share_of_the_requests_by_the_streams_number() {
    let share = |numerator| RouteMatch {
        runtime_fraction: Some(RuntimeFraction { default: Fraction::percent(numerator), key: None }),
        ..path(PathMatch::Prefix("/".into()))
    };
    let table = table(vec![host("a", &["*"], vec![share(0), share(30), path(PathMatch::Prefix("/".into()))])]);
    let find = |random| found(&table, &request("/", &[]), random).map(|(_, route)| route);
    assert_eq!([find(0), find(129), find(30), find(99)], [Some(1), Some(1), Some(2), Some(2)]);
}

#[test]
fn weights_follow_runtime_values() {
    let cluster = |name: &str, default| {
        (RuntimeInteger { default, key: Key::optional(&format!("w.{name}")) }, Arc::<str>::from(name))
    };
    let cumulative = vec![(1, "a".into()), (4, "b".into())];
    let mut weighted =
        WeightedClusters { cumulative, options: Arc::new([]), runtime: None, random: Default::default() };
    let picks = |weighted: &WeightedClusters| -> Vec<String> {
        (0..4).filter_map(|random| weighted.choose(random).map(ToString::to_string)).collect()
    };
    assert_eq!(picks(&weighted), ["a", "b", "b", "b"]);
    weighted.runtime = Some(vec![cluster("a", 1), cluster("b", 3), cluster("c", 0)]);
    assert_eq!(picks(&weighted), ["a", "b", "b", "b"]);
    let layers = vec![Layer { name: "a".to_owned(), source: LayerSource::Admin }];
    let runtime = Runtime::start(layers).unwrap();
    runtime.modify([("w.a", "2"), ("w.b", "0"), ("w.c", "2")]).unwrap();
    assert_eq!(picks(&weighted), ["a", "a", "c", "c"]);
    runtime.modify([("w.a", "0"), ("w.c", "0")]).unwrap();
    assert_eq!(weighted.choose(0), None, "no weight is left");
    runtime.modify([("w.a", "4294967296")]).unwrap();
    assert_eq!(weighted.choose(0), None, "as Envoy: the sum has 32 bits");
}

/// What a filter of the test is told.
struct Told(u8);

#[test]
fn filters_are_told_by_the_levels_of_their_route() {
    let told = |name: &str, disabled, value: Option<u8>| {
        let config = value.map(|value| Arc::new(Told(value)) as Arc<dyn std::any::Any + Send + Sync>);
        PerFilterConfigs::from([(name.into(), Arc::new(PerFilterConfig { disabled, config }))])
    };
    let mut hosts = vec![
        host("a", &["a"], vec![path(PathMatch::Path("/x".into())), path(PathMatch::Prefix("/".into()))]),
        host("b", &["b"], vec![path(PathMatch::Prefix("/".into()))]),
    ];
    hosts[0].per_filter = told("one", false, Some(2));
    Arc::get_mut(&mut hosts[0].routes[0]).unwrap().per_filter = told("one", false, Some(3));
    Arc::get_mut(&mut hosts[0].routes[1]).unwrap().per_filter = told("two", true, None);
    let config = RouteConfig {
        virtual_hosts: hosts.into_iter().map(Arc::new).collect(),
        per_filter: told("one", false, Some(1)),
        ..RouteConfig::default()
    };
    let slot = Arc::new(RouteSlot::default());
    slot.set(Arc::new(config));
    // The order of a connection manager's filters is not the order of the names.
    let cache = RouteCache::new(slot, Arc::from(["two".into(), "none".into(), "one".into()]));
    let seen = |uri: &str, host: &str| {
        let route = cache.route(&request(uri, &[("host", host)]), &MatchCx::default()).unwrap();
        let one = PerRoute::new(Some(&route), 2);
        let all: Vec<_> = one.all::<Told>().map(|told| told.0).collect();
        assert_eq!(one.most_specific::<Told>().map(|told| told.0), all.last().copied());
        assert!(one.most_specific::<u8>().is_none(), "what is for another filter is not for this one");
        assert!(PerRoute::new(Some(&route), 1).is_enabled(true) && !PerRoute::new(Some(&route), 1).is_enabled(false));
        (all, PerRoute::new(Some(&route), 0).is_enabled(true))
    };
    assert_eq!(seen("/x", "a"), (vec![1, 2, 3], true));
    assert_eq!(seen("/y", "a"), (vec![1, 2], false));
    assert_eq!(seen("/", "b"), (vec![1], true));
}
