//! Resources that are asked for by name.

use envoy_types::pb::google::protobuf::BoolValue;

use super::*;

#[test]
fn one_assignment_serves_every_cluster_of_its_name() {
    let (store, calls) = running();
    let shared = |name: &str| {
        let config = format!("{{ service_name: shared, eds_config: {ADS} }}");
        resource::<Cluster>(name, &format!("{{ name: {name}, type: EDS, eds_cluster_config: {config} }}"))
    };
    let outcome = store.update(update(Cluster::type_url(), vec![shared("a"), shared("b")]));
    assert_eq!(names(&outcome, ClusterLoadAssignment::type_url()), ["shared"]);
    calls.take();
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("shared", &[80])]));
    assert_eq!(calls.take(), ["cluster a with 1", "cluster b with 1"]);
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("shared", &[80, 81])]));
    assert_eq!(calls.take(), ["a has 2", "b has 2"]);
}

#[test]
fn endpoints_need_literal_addresses() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    calls.take();
    let yaml = "{ cluster_name: a, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: \
                users.local, port_value: 80 } } } }] }] }";
    let bad = resource::<ClusterLoadAssignment>("a", yaml);
    let rejected = store.update(update(ClusterLoadAssignment::type_url(), vec![bad])).rejected();
    assert!(
        rejected[0].message.starts_with(
            "endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address: malformed IP address: users.local."
        ),
        "{rejected:?}"
    );
    assert_eq!(calls.take(), ["cluster a"], "not waited for any longer");
}

#[test]
fn routes_are_held_to_their_own_validate_clusters() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    let route = "{ match: { prefix: / }, route: { cluster: nobody } }";
    let yaml = |extra: &str| {
        format!("{{ name: web, {extra} virtual_hosts: [{{ name: v, domains: ['*'], routes: [{route}] }}] }}")
    };
    let strict = resource::<RouteConfiguration>("web", &yaml("validate_clusters: true,"));
    let outcome = store.update(update(RouteConfiguration::type_url(), vec![strict]));
    assert_eq!(outcome.rejected()[0].message, "virtual_hosts[0].routes[0].route: unknown cluster 'nobody'");
    assert_eq!(calls.take(), ["listener in"], "not waited for any longer");
    let lenient = resource::<RouteConfiguration>("web", &yaml(""));
    assert_eq!(store.update(update(RouteConfiguration::type_url(), vec![lenient])).rejected(), []);
    assert_eq!(calls.take(), ["routes web"]);
}

#[test]
fn mirrors_are_held_to_the_clusters_that_there_are() {
    let (store, _calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    store.update(update(Cluster::type_url(), vec![resource::<Cluster>("a", "{ name: a }")]));
    const ZZ: &str = "request_mirror_policies: [{ cluster: a }, { cluster: zz }]";
    let forward = |extra: &str| format!("{{ match: {{ prefix: / }}, route: {{ cluster: a, {extra} }} }}");
    let redirect = "{ match: { prefix: / }, redirect: { host_redirect: x } }".to_owned();
    let host = "virtual_hosts[0].request_mirror_policies[1].cluster";
    let cases = [
        ("", forward(ZZ), "virtual_hosts[0].routes[0].route.request_mirror_policies[1].cluster"),
        (ZZ, forward(""), host),
        (ZZ, redirect, host),
        (ZZ, forward("request_mirror_policies: [{ cluster: a }]"), ""),
        ("", forward("request_mirror_policies: [{ cluster_header: x-zz }]"), ""),
        (ZZ, String::new(), ""),
    ];
    for (of_host, route, path) in cases {
        for validated in [true, false] {
            let yaml = format!(
                "{{ name: web, validate_clusters: {validated}, virtual_hosts: [{{ name: v, domains: ['*'], routes: [{route}], \
                 {of_host} }}] }}"
            );
            let routes = resource::<RouteConfiguration>("web", &yaml);
            let outcome = store.update(update(RouteConfiguration::type_url(), vec![routes]));
            let refused: Vec<_> = outcome.rejected().iter().map(|it| it.message.clone()).collect();
            let expected: Vec<_> = (validated && !path.is_empty())
                .then(|| format!("{path}: route: unknown shadow cluster 'zz'"))
                .into_iter()
                .collect();
            assert_eq!(refused, expected, "{yaml}");
        }
    }
}

/// A listener whose connection manager has `routes`.
fn listener_with(routes: &str) -> Resource {
    let yaml = listener_yaml("in", "web", "");
    let rds = yaml.lines().find(|line| line.trim_start().starts_with("rds:")).expect("it has RDS").trim().to_owned();
    resource::<Listener>("in", &yaml.replace(&rds, routes))
}

#[test]
fn routes_in_a_listener_are_held_to_the_clusters_that_there_are() {
    let (store, calls) = running();
    let routes = |extra: &str| {
        format!(
            "{{ name: r, {extra} virtual_hosts: [{{ name: v, domains: ['*'], routes: [{{ match: {{ prefix: / }}, route: \
             {{ cluster: nobody }} }}] }}] }}"
        )
    };
    let own = |extra: &str| listener_with(&format!("route_config: {}", routes(extra)));
    let manager = "filter_chains[0].filters[0].typed_config";
    let refused = |store: &Fixture, listener: Resource, path: &str| {
        let outcome = store.update(update(Listener::type_url(), vec![listener]));
        let rejected = outcome.rejected();
        let expected = format!("{manager}.{path}.virtual_hosts[0].routes[0].route: unknown cluster 'nobody'");
        assert_eq!(rejected.iter().map(|it| it.message.clone()).collect::<Vec<_>>(), [expected]);
    };
    refused(&store, own(""), "route_config");
    let scoped = listener_with(&format!(
        "scoped_routes: {{ name: s, scope_key_builder: {{ fragments: [{{ header_value_extractor: {{ name: x, index: 0, \
         element_separator: ',' }} }}] }}, scoped_route_configurations_list: {{ scoped_route_configurations: [{{ name: a, \
         key: {{ fragments: [{{ string_key: a }}] }}, route_configuration: {} }}] }} }}",
        routes("")
    ));
    let list = "scoped_routes.scoped_route_configurations_list.scoped_route_configurations[0].route_configuration";
    refused(&store, scoped, list);
    assert_eq!(calls.take(), [""; 0]);
    let accepted = |store: &Fixture, listener: Resource| {
        let outcome = store.update(update(Listener::type_url(), vec![listener]));
        store.workers();
        assert_eq!(outcome.rejected(), []);
    };
    accepted(&store, own("validate_clusters: false,"));
    // One that warms is there.
    store.update(update(Cluster::type_url(), vec![eds_cluster("nobody")]));
    accepted(&store, own(""));
}

#[test]
fn what_nobody_asked_for_is_accepted_and_forgotten() {
    let (store, calls) = running();
    let answer = store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("nobody", &[80])]));
    assert_eq!(answer.rejected(), []);
    assert_eq!(calls.take(), [""; 0]);
    assert!(store.snapshot().of(&ClusterLoadAssignment::type_url()).is_empty());
}

#[test]
fn an_entry_is_small() {
    // There is one for each cluster of EDS, ten thousand and more: what only few of them have is boxed.
    let size = size_of::<crate::config::store::watched::Entry>();
    assert!(size <= 256, "{size} bytes");
}

#[test]
fn a_filter_whose_source_cannot_be_had_is_refused_with_its_listener() {
    let (store, _) = running();
    let filter = "{ name: od, typed_config: { '@type': \
                  type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.OnDemand, odcds: { source: { \
                  resource_api_version: V3, api_config_source: { api_type: DELTA_GRPC, transport_api_version: V3, \
                  grpc_services: [{ envoy_grpc: { cluster_name: nobody } }] } } } } }";
    let yaml = listener_yaml("in", "web", "");
    let yaml = yaml.replace("http_filters:", &format!("http_filters:\n      - {filter}"));
    let told = store.update(update(Listener::type_url(), vec![resource::<Listener>("in", &yaml)]));
    let rejected = told.rejected();
    assert!(
        rejected.len() == 1 && rejected[0].message.contains("odcds.source: must have a statically"),
        "{rejected:?}"
    );
}

#[test]
fn sources_are_kept_apart() {
    use culvert_xds_client::source::FileSource;
    let (store, calls) = running();
    let file = |path: &str| Source::File(FileSource { path: path.into(), watched_directory: None });
    let named = |cluster: &str, path: &str| {
        let from = ConfigSource { source: Arc::new(file(path)), initial_fetch_timeout: None };
        let mut config = parse::cluster(&json::unpack(&eds_cluster(cluster).body, "").unwrap(), "").unwrap();
        config.discovery = model::Discovery::Eds { endpoints: model::ResourceRef { name: "shared".into(), from } };
        config
    };
    store.store.changed(|state| {
        let stored = |name: &str| Some(resources::version(eds_cluster(name)));
        store.store.add_cluster(state, named("a", "/one"), stored("a"), None);
        store.store.add_cluster(state, named("b", "/two"), stored("b"), None);
    });
    let type_url = ClusterLoadAssignment::type_url;
    assert_eq!(names(&store.update_from(&Source::Ads, update(type_url(), vec![])), type_url()), ["shared"]);
    store.update_from(&Source::Ads, update(type_url(), vec![assignment("shared", &[1])]));
    assert_eq!(calls.take(), [""; 0], "nobody wants it from there");
    store.update_from(&file("/two"), update(type_url(), vec![assignment("shared", &[1, 2])]));
    assert_eq!(calls.take(), ["cluster b with 2"]);
    store.update_from(&file("/one"), update(type_url(), vec![assignment("shared", &[1])]));
    assert_eq!(calls.take(), ["cluster a with 1"]);
    let shown = store.snapshot();
    let shown = shown.of(&type_url()).iter().map(|it| it.active.as_ref().expect("it is in force").body.clone());
    assert_eq!(
        shown.collect::<Vec<_>>(),
        [assignment("shared", &[1]).body, assignment("shared", &[1, 2]).body],
        "both are shown"
    );
    store.later(Duration::from_secs(3600));
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn routes_in_use_wait_for_the_new_clusters_that_they_name() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("old")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("old", &[80])]));
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "old")]));
    calls.take();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("old"), eds_cluster("new")]));
    let rds = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "new")]));
    assert!(cds.is_open() && rds.is_open());
    assert_eq!(calls.take(), [""; 0], "the old routes serve on");
    // Newer routes replace those that wait, and so do the old ones again.
    let again = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "new")]));
    assert_eq!(rds.rejected(), []);
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("new", &[80])]));
    assert_eq!(calls.take(), ["cluster new with 1", "routes web"], "the cluster comes first");
    assert_eq!((cds.rejected(), again.rejected()), (vec![], vec![]));

    store.update(update(Cluster::type_url(), vec![eds_cluster("later")]));
    let held = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "later")]));
    let back = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "new")]));
    assert_eq!((held.rejected(), back.rejected()), (vec![], vec![]));
    let held = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "later")]));
    assert!(held.is_open());
    let shown = || store.snapshot().of(&RouteConfiguration::type_url())[0].clone();
    assert!(shown().active.is_some() && shown().warming.is_some());
    assert_eq!(shown().waits_for, ["the cluster \"later\""]);
    assert_eq!(store.snapshot().of(&Cluster::type_url())[0].waits_for, ["the endpoints \"later\""]);
    store.later(Duration::from_millis(1001));
    assert_eq!(held.rejected(), [], "not for long");
    assert_eq!(calls.take(), ["routes web"]);
    assert!(shown().warming.is_none() && shown().waits_for.is_empty());
    // What is in force names it: nothing is won by waiting once more.
    let mut next = routes("web", "later");
    next.body = json::pack(&RouteConfiguration {
        validate_clusters: Some(BoolValue { value: false }),
        ..json::unpack(&next.body, "").unwrap()
    });
    assert_eq!(store.update(update(RouteConfiguration::type_url(), vec![next])).rejected(), []);
    assert_eq!(calls.take(), ["routes web"]);
    store.later(Duration::from_secs(16));
    assert_eq!(calls.take(), ["cluster later"]);
    let gone = store.update(update(Cluster::type_url(), vec![eds_cluster("gone")]));
    let held = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "gone")]));
    store.update(removal(Cluster::type_url(), "gone"));
    assert_eq!((gone.rejected(), held.rejected()), (vec![], vec![]), "nothing is waited for that is gone");
}

#[test]
fn what_does_not_exist_is_not_waited_for() {
    let (store, calls) = running();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    let absent = Update { absent: vec!["a".to_owned()], ..update(ClusterLoadAssignment::type_url(), Vec::new()) };
    assert_eq!(store.update(absent).rejected(), []);
    assert_eq!(calls.take(), ["cluster a"]);
    assert_eq!(cds.rejected(), []);
}

#[test]
fn what_serves_without_routes_or_endpoints_is_incomplete() {
    let (store, _) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    assert_eq!(store.snapshot().incomplete, [], "they are waited for");
    store.later(model::INITIAL_FETCH_TIMEOUT);
    let lacking = |type_url: String, name: &str, lacks: &str| crate::config::status::Incomplete {
        type_url,
        name: name.to_owned(),
        lacks: vec![lacks.to_owned()],
    };
    let cluster = lacking(Cluster::type_url(), "a", "the endpoints \"a\"");
    let in_lacks = lacking(Listener::type_url(), "in", "the route configuration \"web\"");
    assert_eq!(store.snapshot().incomplete, [cluster, in_lacks.clone()]);
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    assert_eq!(store.snapshot().incomplete, [in_lacks]);
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "a")]));
    assert_eq!(store.snapshot().incomplete, []);
}

/// What only counts, for resources that were taken and for those that were not.
#[test]
fn the_same_document_again_counts_for_each_resource() {
    use culvert_xds_client::ads::{Counted, Sink as _};
    let (store, _) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a"), eds_cluster("b")]));
    let bad = Resource { body: culvert_xds_client::Any::default(), ..assignment("b", &[80]) };
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80]), bad]));
    let counts = |name: &str| {
        ["attempt", "success", "rejected", "failure"]
            .map(|count| store.metric(&format!("cluster.{name}.update_{count}")).unwrap())
    };
    let (a, b) = (counts("a"), counts("b"));
    let count = |answer| store.counted(&Source::Ads, &ClusterLoadAssignment::type_url(), answer);
    count(Counted::Same { accepted: false });
    assert_eq!(counts("a"), [a[0] + 1, a[1] + 1, a[2], a[3]]);
    assert_eq!(counts("b"), [b[0] + 1, b[1], b[2] + 1, b[3]]);
    count(Counted::Unmodified);
    assert_eq!(counts("a"), [a[0] + 2, a[1] + 1, a[2], a[3]]);
    count(Counted::Rejected);
    assert_eq!(counts("a"), [a[0] + 3, a[1] + 1, a[2] + 1, a[3]]);
}
