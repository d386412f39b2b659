//! Updates in, calls to the data plane and answers to the control plane out.

use culvert_xds_client::{ads::Resource, sources::Subscription};
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap as BootstrapMessage;
use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::config::status::Missing;

/// Writes down what it is told, one line a call.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<String>>>);

impl Recorder {
    fn note(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    /// What was noted since the last call.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Apply for Recorder {
    fn upsert_cluster(&self, config: ClusterConfig) {
        self.note(format!("cluster {}", config.name));
    }
    fn remove_cluster(&self, name: &str) {
        self.note(format!("no cluster {name}"));
    }
    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        let count: usize = endpoints.iter().map(|group| group.endpoints.len()).sum();
        self.note(format!("{cluster} has {count}"));
    }
    fn set_routes(&self, name: &str, _: Arc<RouteConfig>) {
        self.note(format!("routes {name}"));
    }
    fn set_offloaded(&self, table: OffloadedTable) {
        self.note(format!("offloaded {}", table != OffloadedTable::default()));
    }
    fn upsert_listener(&self, listener: Arc<model::Listener>) {
        self.note(format!("listener {}", listener.name));
    }
    fn remove_listener(&self, name: &str) {
        self.note(format!("no listener {name}"));
    }
}

/// A store, and what it wants of the control plane.
struct Fixture {
    store: ConfigStore<Recorder>,
    wanted: Mutex<UnboundedReceiver<Subscription>>,
}

impl std::ops::Deref for Fixture {
    type Target = ConfigStore<Recorder>;

    fn deref(&self) -> &ConfigStore<Recorder> {
        &self.store
    }
}

/// What an update led to.
struct Told {
    rejected: Vec<Rejection>,
    wanted: BTreeMap<String, Interest>,
}

impl Fixture {
    fn update(&self, update: Update) -> Told {
        let (sender, outcome) = std::sync::mpsc::channel();
        self.store.update(&Source::Ads, update, Done::new(move |outcome| sender.send(outcome.unwrap()).unwrap()));
        let rejected = outcome.try_recv().expect("the update is finished").rejected;
        Told { rejected, wanted: self.wanted() }
    }

    /// What is wanted, where that was said since the last call.
    fn wanted(&self) -> BTreeMap<String, Interest> {
        let mut wanted = self.wanted.lock().unwrap();
        std::iter::from_fn(|| wanted.try_recv().ok()).map(|it| (it.type_url, it.interest)).collect()
    }
}

fn store(expected: &[String]) -> (Fixture, Recorder) {
    let recorder = Recorder::default();
    let (subscriptions, wanted) = Subscriptions::channel();
    let store =
        ConfigStore::new(recorder.clone(), expected.iter().map(|url| (url.clone(), Source::Ads)), subscriptions);
    (Fixture { store, wanted: Mutex::new(wanted) }, recorder)
}

/// A resource from YAML.
fn resource<M: prost::Message + Name + Default>(name: &str, yaml: &str) -> Resource {
    let message: M = json::from_yaml(yaml).unwrap_or_else(|error| panic!("{error}: {yaml}"));
    Resource { name: name.to_owned(), version: "1".to_owned(), body: json::pack(&message), ..Default::default() }
}

fn update(type_url: String, added: Vec<Resource>) -> Update {
    Update { type_url, added, ..Default::default() }
}

fn removal(type_url: String, name: &str) -> Update {
    Update { type_url, removed: vec![name.to_owned()], ..Default::default() }
}

const ADS: &str = "{ resource_api_version: V3, ads: {} }";

fn eds_cluster(name: &str) -> Resource {
    resource::<Cluster>(name, &format!("{{ name: '{name}', type: EDS, eds_cluster_config: {{ eds_config: {ADS} }} }}"))
}

fn assignment(name: &str, ports: &[u16]) -> Resource {
    let hosts = ports.iter().map(|port| {
        format!("{{ endpoint: {{ address: {{ socket_address: {{ address: 10.0.0.1, port_value: {port} }} }} }} }}")
    });
    let hosts: Vec<_> = hosts.collect();
    let yaml = format!("{{ cluster_name: '{name}', endpoints: [{{ lb_endpoints: [{}] }}] }}", hosts.join(", "));
    resource::<ClusterLoadAssignment>(name, &yaml)
}

fn routes(name: &str, cluster: &str) -> Resource {
    let route = format!("{{ match: {{ prefix: / }}, route: {{ cluster: '{cluster}' }} }}");
    let hosts = format!("[{{ name: v, domains: ['*'], routes: [{route}] }}]");
    resource::<RouteConfiguration>(name, &format!("{{ name: '{name}', virtual_hosts: {hosts} }}"))
}

fn listener_yaml(name: &str, route_name: &str, filters: &str) -> String {
    format!(
        r#"
name: {name}
address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: store_{name}
      rds: {{ route_config_name: {route_name}, config_source: {ADS} }}
      http_filters:
{filters}
      - name: router
        typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
"#
    )
}

fn listener(name: &str, route_name: &str) -> Resource {
    resource::<Listener>(name, &listener_yaml(name, route_name, ""))
}

fn names(told: &Told, type_url: String) -> Vec<&str> {
    match told.wanted.get(&type_url) {
        Some(Interest::Names(names)) => names.iter().map(String::as_str).collect(),
        Some(Interest::Wildcard) => vec!["*"],
        Some(Interest::None) | None => Vec::new(),
        other => panic!("{type_url} is asked for as {other:?}"),
    }
}

#[test]
fn a_listener_waits_for_its_routes_and_their_endpoints() {
    let (store, calls) = store(&[Cluster::type_url(), Listener::type_url()]);
    let outcome = store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    assert_eq!(names(&outcome, RouteConfiguration::type_url()), ["web"]);
    assert_eq!(calls.take(), [""; 0], "nothing is known of the clusters yet");

    let outcome = store.update(update(Cluster::type_url(), vec![eds_cluster("users"), eds_cluster("idle")]));
    assert_eq!(names(&outcome, ClusterLoadAssignment::type_url()), ["idle", "users"]);
    assert_eq!(calls.take(), ["cluster users", "cluster idle"]);

    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    assert_eq!(calls.take(), ["routes web"]);
    assert!(!store.is_initialized());

    // The cluster that no route names holds nobody up.
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("users", &[80, 81])]));
    assert_eq!(calls.take(), ["users has 2", "listener in"]);
    assert!(store.is_initialized());
}

#[test]
fn a_wait_that_is_too_long_ends() {
    let (store, calls) = store(&[]);
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    let early = Instant::now() + WARMING_LIMIT / 2;
    store.release(&mut store.lock(), early);
    assert_eq!(calls.take(), [""; 0]);
    store.release(&mut store.lock(), early + WARMING_LIMIT);
    assert_eq!(calls.take(), ["listener in"]);

    // A later one waits for itself again.
    store.update(update(Listener::type_url(), vec![listener("late", "other")]));
    assert_eq!(calls.take(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn the_wait_is_ended_by_the_clock() {
    let (store, calls) = store(&[Cluster::type_url()]);
    tokio::spawn(store.clone().end_warming());
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    tokio::time::sleep(WARMING_LIMIT - Duration::from_secs(1)).await;
    assert!(calls.take().is_empty() && !store.is_initialized());
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(calls.take(), ["listener in"]);
    assert!(store.is_initialized());
}

#[test]
fn a_listener_serves_on_while_its_next_version_waits() {
    let (store, calls) = store(&[]);
    store.update(update(Listener::type_url(), vec![listener("in", "one")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("one", "users")]));
    assert_eq!(calls.take(), ["routes one", "listener in"]);

    store.update(update(Listener::type_url(), vec![listener("in", "two")]));
    assert_eq!(calls.take(), [""; 0]);
    let snapshot = store.snapshot();
    let entry = &snapshot.of(&Listener::type_url())[0];
    let route_name = |version: &Option<Arc<Version>>| {
        let listener = json::any_to_json(&version.as_ref()?.body);
        let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
        manager["rds"]["route_config_name"].as_str().map(str::to_owned)
    };
    assert_eq!(route_name(&entry.active).as_deref(), Some("one"));
    assert_eq!(route_name(&entry.warming).as_deref(), Some("two"));
    let unready = &snapshot.unready[0];
    assert_eq!((unready.listener.as_str(), unready.is_static), ("in", false));
    assert_eq!(unready.targets, ["shared target RdsRouteConfigSubscription RDS init two"]);
    let known = snapshot.of(&RouteConfiguration::type_url());
    assert_eq!((known[0].name.as_str(), known[0].missing), ("two", Some(Missing::Requested)));

    store.update(update(RouteConfiguration::type_url(), vec![routes("two", "users")]));
    assert_eq!(calls.take(), ["routes two", "listener in"]);
}

#[test]
fn one_bad_resource_does_not_hold_up_the_others() {
    let (store, calls) = store(&[]);
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    calls.take();
    let bad = resource::<Cluster>("a", "{ name: a, lb_subset_config: { list_as_any: true } }");
    let worse = resource::<Cluster>("c", "{ name: c, type: STATIC, lb_policy: MAGLEV }");
    let outcome = store.update(update(Cluster::type_url(), vec![bad, eds_cluster("b"), worse]));
    let rejected: Vec<_> = outcome.rejected.iter().map(|it| (it.name.as_str(), it.message.as_str())).collect();
    assert_eq!(
        rejected,
        [("a", "lb_subset_config: not supported by culvert yet"), ("c", "lb_policy: not supported by culvert yet")]
    );
    assert_eq!(calls.take(), ["cluster b"]);
    assert_eq!(names(&outcome, ClusterLoadAssignment::type_url()), ["a", "b"], "the last good version stays");

    let snapshot = store.snapshot();
    let clusters = snapshot.of(&Cluster::type_url());
    assert!(clusters[0].active.is_some());
    assert_eq!(clusters[0].failure.as_ref().unwrap().details, "lb_subset_config: not supported by culvert yet");
    assert!(clusters[1].failure.is_none());
    assert!(clusters[2].active.is_none(), "no version of it was ever taken");
    assert_eq!(json::any_to_json(&clusters[2].failure.as_ref().unwrap().attempt.body)["name"], "c");

    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    assert!(store.snapshot().of(&Cluster::type_url())[0].failure.is_none());
}

#[test]
fn content_of_another_type_or_name_is_refused() {
    let (store, calls) = store(&[]);
    let mut renamed = eds_cluster("a");
    renamed.name = "b".to_owned();
    let other = Resource { name: "c".to_owned(), ..routes("c", "x") };
    let outcome = store.update(update(Cluster::type_url(), vec![renamed, other]));
    assert_eq!(outcome.rejected[0].message, "name: the resource is named \"b\", and its content \"a\"");
    assert!(outcome.rejected[1].message.contains("RouteConfiguration"), "{:?}", outcome.rejected[1]);
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn what_did_not_change_is_left_alone() {
    let (store, calls) = store(&[]);
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    calls.take();
    let again = Resource { version: "2".to_owned(), ..eds_cluster("a") };
    store.update(update(Cluster::type_url(), vec![again]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    assert_eq!(calls.take(), [""; 0]);
    assert_eq!(store.lock().clusters.accepted["a"].version, "2");
}

#[test]
fn a_changed_cluster_keeps_its_endpoints_and_a_removed_one_forgets_them() {
    let (store, calls) = store(&[]);
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    calls.take();
    let yaml = format!("{{ name: a, type: EDS, eds_cluster_config: {{ eds_config: {ADS} }}, connect_timeout: 1s }}");
    store.update(update(Cluster::type_url(), vec![resource::<Cluster>("a", &yaml)]));
    assert_eq!(calls.take(), ["cluster a", "a has 1"]);

    let outcome = store.update(removal(Cluster::type_url(), "a"));
    assert_eq!(calls.take(), ["no cluster a"]);
    assert_eq!(names(&outcome, ClusterLoadAssignment::type_url()), [""; 0]);
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    assert_eq!(calls.take(), ["cluster a"], "old endpoints do not come back");
}

#[test]
fn one_assignment_serves_every_cluster_of_its_name() {
    let (store, calls) = store(&[]);
    let shared = |name: &str| {
        let config = format!("{{ service_name: shared, eds_config: {ADS} }}");
        resource::<Cluster>(name, &format!("{{ name: {name}, type: EDS, eds_cluster_config: {config} }}"))
    };
    let outcome = store.update(update(Cluster::type_url(), vec![shared("a"), shared("b")]));
    assert_eq!(names(&outcome, ClusterLoadAssignment::type_url()), ["shared"]);
    calls.take();
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("shared", &[80])]));
    assert_eq!(calls.take(), ["a has 1", "b has 1"]);
}

#[test]
fn endpoints_need_literal_addresses() {
    let (store, calls) = store(&[]);
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    calls.take();
    let yaml = "{ cluster_name: a, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: \
                users.local, port_value: 80 } } } }] }] }";
    let outcome =
        store.update(update(ClusterLoadAssignment::type_url(), vec![resource::<ClusterLoadAssignment>("a", yaml)]));
    assert!(
        outcome.rejected[0].message.starts_with(
            "endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address: malformed IP address: users.local."
        ),
        "{:?}",
        outcome.rejected
    );
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn a_removed_listener_goes_and_its_routes_are_not_wanted_any_more() {
    let (store, calls) = store(&[]);
    store.update(update(Listener::type_url(), vec![listener("in", "web"), listener("never", "other")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    calls.take();
    let outcome = store.update(removal(Listener::type_url(), "in"));
    assert_eq!(calls.take(), ["no listener in"]);
    assert_eq!(names(&outcome, RouteConfiguration::type_url()), ["other"]);
    store.update(removal(Listener::type_url(), "never"));
    assert_eq!(calls.take(), [""; 0], "it never served");
    assert!(store.is_initialized(), "nobody waits");
}

#[test]
fn the_override_filter_subscribes_to_offloaded_services() {
    let (store, calls) = store(&[]);
    let filter = "      - name: override\n        typed_config: { \"@type\": type.googleapis.com/culvert.extensions.\
                  filters.http.overrides.v1.Override, original_dst_cluster: offloaded }";
    let outcome = store.update(update(Listener::type_url(), vec![listener("plain", "web")]));
    assert_eq!(names(&outcome, OffloadedService::type_url()), [""; 0]);
    let with_filter = resource::<Listener>("in", &listener_yaml("in", "web", filter));
    let outcome = store.update(update(Listener::type_url(), vec![with_filter]));
    assert_eq!(names(&outcome, OffloadedService::type_url()), ["*"]);

    let service = |address: &str| {
        let endpoint = format!("{{ revision: r, address: {address}, port: 80 }}");
        resource::<OffloadedService>("users", &format!("{{ cluster_name: users, endpoints: [{endpoint}] }}"))
    };
    store.update(update(OffloadedService::type_url(), vec![service("10.0.0.9")]));
    assert_eq!(calls.take(), ["offloaded true"]);
    let outcome = store.update(update(OffloadedService::type_url(), vec![service("nowhere")]));
    assert_eq!(outcome.rejected[0].message, "endpoints[0].address: \"nowhere\" is not an IP address");
    assert_eq!(calls.take(), ["offloaded true"], "the last good one stays");
    store.update(removal(OffloadedService::type_url(), "users"));
    assert_eq!(calls.take(), ["offloaded false"]);
}

/// A bootstrap with a static EDS cluster `users`, and static listeners `plain` and `routed` (by RDS).
fn static_resources() -> (Vec<ClusterConfig>, Vec<model::Listener>) {
    let indent = |yaml: String| yaml.trim().replace('\n', "\n    ");
    let yaml = format!(
        r#"
static_resources:
  clusters:
  - {{ name: xds, load_assignment: {{ cluster_name: xds, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{
      socket_address: {{ address: 127.0.0.1, port_value: 1 }} }} }} }}] }}] }} }}
  - {{ name: users, type: EDS, eds_cluster_config: {{ eds_config: {ADS} }} }}
  listeners:
  - name: plain
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }}
    filter_chains: [{{ filters: [{{ name: t, typed_config: {{ "@type":
      type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, cluster: xds }} }}] }}]
  - {}
dynamic_resources:
  ads_config: {{ api_type: GRPC, transport_api_version: V3, grpc_services: [{{ envoy_grpc: {{ cluster_name: xds }} }}] }}
"#,
        indent(listener_yaml("routed", "web", ""))
    );
    let message: BootstrapMessage = json::from_yaml(&yaml).unwrap();
    let bootstrap = parse::bootstrap(&message).unwrap();
    (bootstrap.clusters, bootstrap.listeners)
}

#[test]
fn static_resources_are_subscribed_to_and_wait_as_well() {
    let (store, calls) = store(&[]);
    let (clusters, listeners) = static_resources();
    let ready = store.add_static(clusters, listeners);
    assert_eq!(calls.take(), ["cluster xds", "cluster users"]);
    assert_eq!(ready.iter().map(|it| &*it.name).collect::<Vec<_>>(), ["plain"]);
    let interests = Told { rejected: Vec::new(), wanted: store.wanted() };
    assert_eq!(names(&interests, ClusterLoadAssignment::type_url()), ["users"]);
    assert_eq!(names(&interests, RouteConfiguration::type_url()), ["web"]);
    assert!(!store.is_initialized());

    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("users", &[80])]));
    assert_eq!(calls.take(), ["routes web", "users has 1", "listener routed"]);
    assert!(store.is_initialized());
}

#[test]
fn static_resources_are_not_replaced() {
    let (store, calls) = store(&[]);
    let (clusters, listeners) = static_resources();
    store.add_static(clusters, listeners);
    calls.take();
    let outcome = store.update(update(Cluster::type_url(), vec![eds_cluster("users")]));
    assert_eq!(outcome.rejected[0].message, "name: is the name of a cluster of the bootstrap, which stays");
    let outcome = store.update(update(Listener::type_url(), vec![listener("plain", "web")]));
    assert_eq!(outcome.rejected[0].message, "name: is the name of a listener of the bootstrap, which stays");
    store.update(removal(Cluster::type_url(), "users"));
    store.update(removal(Listener::type_url(), "plain"));
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn routes_are_held_to_their_own_validate_clusters() {
    let (store, calls) = store(&[]);
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    let route = "{ match: { prefix: / }, route: { cluster: nobody } }";
    let yaml = |extra: &str| {
        format!("{{ name: web, {extra} virtual_hosts: [{{ name: v, domains: ['*'], routes: [{route}] }}] }}")
    };
    let strict = resource::<RouteConfiguration>("web", &yaml("validate_clusters: true,"));
    let outcome = store.update(update(RouteConfiguration::type_url(), vec![strict]));
    assert_eq!(outcome.rejected[0].message, "virtual_hosts: route: unknown cluster 'nobody'");
    assert_eq!(calls.take(), [""; 0]);
    let lenient = resource::<RouteConfiguration>("web", &yaml(""));
    assert_eq!(store.update(update(RouteConfiguration::type_url(), vec![lenient])).rejected, []);
    assert_eq!(calls.take(), ["routes web", "listener in"]);
}

#[test]
fn updates_are_counted_by_envoys_names() {
    let (store, _) = store(&[]);
    let count = |name: &str| crate::stats::counter(name).value();
    let before = ["cluster_manager.cluster_added", "cluster_manager.cds.update_success"].map(count);
    store.update(update(Cluster::type_url(), vec![eds_cluster("counted:80")]));
    store.update(update(Listener::type_url(), vec![listener("counted", "web")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "counted:80")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("counted:80", &[80])]));
    let after = ["cluster_manager.cluster_added", "cluster_manager.cds.update_success"].map(count);
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?} {after:?}");
    assert_eq!(count("cluster.counted_80.update_success"), 1);
    assert_eq!(count("http.store_counted.rds.web.update_success"), 1);
}
