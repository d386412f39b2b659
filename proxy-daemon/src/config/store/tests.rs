//! Updates in, calls to the data plane and answers to the control plane out.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, OnceLock},
    time::Duration,
};

use culvert_xds_client::{
    ads::{Outcome, Rejection, Resource},
    source::Server,
    sources::{Change, Subscription},
};
use envoy_types::pb::envoy::config::{
    bootstrap::v3::Bootstrap as BootstrapMessage, cluster::v3::Cluster, core::v3::ConfigSource as ConfigSourceMessage,
    endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use tokio::sync::mpsc::UnboundedReceiver;

use super::*;
use crate::{
    config::{
        model::{LocalityEndpoints, RouteConfig, Secret, SecretName},
        parse,
        status::{Missing, Version},
    },
    http::filters::{DiscoveredFilter, Factory},
    layered_runtime::Entry,
    listener::Prints,
    stats::{HistogramBuckets, write_text},
    upstream::{self, ClusterChange, health_check::ClusterChecks},
};

/// Writes down what it is told, one line a call. What happens later is answered by [`Fixture::workers`].
#[derive(Clone, Default)]
struct Recorder {
    lines: Arc<Mutex<Vec<String>>>,
    told: Arc<Mutex<Vec<(String, Told)>>>,
    batches: Arc<Mutex<usize>>,
    /// Listeners that cannot be bound, with the reason.
    unbindable: Arc<Mutex<BTreeMap<String, String>>>,
    /// Clusters whose names are looked up.
    resolving: Arc<Mutex<Vec<(String, Resolved)>>>,
    /// What clusters are built in, where they are.
    built: Arc<OnceLock<upstream::Clusters>>,
}

impl Recorder {
    fn note(&self, line: String) {
        self.lines.lock().unwrap().push(line);
    }

    /// What was noted since the last call.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.lines.lock().unwrap())
    }

    /// How often clusters were changed.
    fn batches(&self) -> usize {
        *self.batches.lock().unwrap()
    }

    /// Builds clusters from now on.
    fn build(&self) {
        self.built.get_or_init(|| upstream::Clusters::new(1));
    }

    /// The clusters that were built.
    fn clusters(&self) -> Arc<upstream::ClusterMap> {
        self.built.get().expect("clusters are built").load()
    }

    /// Says what the names of this cluster are found to be, of its oldest look-up.
    fn resolve_as(&self, name: &str, found: Option<Arc<[LocalityEndpoints]>>) {
        let (_, told) = {
            let mut all = self.resolving.lock().unwrap();
            let at = all.iter().position(|(cluster, _)| cluster == name).expect("it is looked up");
            all.remove(at)
        };
        told(found);
    }

    fn later(&self, name: &str, told: Told) {
        self.told.lock().unwrap().push((name.to_owned(), told));
    }
}

impl Apply for Recorder {
    fn change_clusters(&self, changes: Vec<ClusterChange>) {
        *self.batches.lock().unwrap() += 1;
        for change in &changes {
            match change {
                ClusterChange::Upsert(config, None, _) => self.note(format!("cluster {}", config.name)),
                ClusterChange::Upsert(config, Some(endpoints), _) => {
                    self.note(format!("cluster {} with {}", config.name, count(endpoints)));
                }
                ClusterChange::Remove(name) => self.note(format!("no cluster {name}")),
            }
        }
        if let Some(built) = self.built.get() {
            built.change(changes);
        }
    }
    fn resolve(&self, config: &ClusterConfig, told: Resolved) {
        self.resolving.lock().unwrap().push((config.name.to_string(), told));
    }
    fn check_first(
        &self,
        _: &ClusterConfig,
        _: &Arc<[LocalityEndpoints]>,
        _: Box<dyn FnOnce() + Send>,
    ) -> Option<Arc<ClusterChecks>> {
        None
    }
    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        self.note(format!("{cluster} has {}", count(endpoints)));
    }
    fn set_routes(&self, _: &Arc<Source>, name: &Arc<str>, _: Arc<RouteConfig>) {
        self.note(format!("routes {name}"));
    }
    fn remove_routes(&self, _: &Arc<Source>, name: &Arc<str>) {
        self.note(format!("no routes {name}"));
    }
    fn set_scopes(&self, _: &Arc<Source>, scopes: Arc<[Arc<model::Scope>]>) {
        let names: Vec<_> = scopes.iter().map(|scope| &*scope.name).collect();
        self.note(format!("scopes {}", names.join(" ")));
    }
    fn remove_scopes(&self, _: &Arc<Source>) {
        self.note("no scopes".to_owned());
    }
    fn set_runtime(&self, _: &Source, name: &str, values: HashMap<String, Entry>) {
        self.note(format!("runtime {name} has {}", values.len()));
    }
    fn set_filter(&self, place: &DiscoveredFilter, delivered: Option<Factory>) {
        let what = delivered.as_ref().map(|factory| format!("{factory:?}"));
        self.note(format!("filter {} {}", place.wanted.name, what.as_deref().unwrap_or("as by default")));
        place.set(delivered);
    }
    fn set_secret(&self, name: SecretName, secret: Secret) {
        self.note(format!("secret {}: {}", name.name, secret.secret_type().field()));
        if let Some(built) = self.built.get() {
            built.secrets().put(name, secret);
        }
    }
    fn tell_secret_users(&self) {
        if let Some(built) = self.built.get() {
            built.secrets().tell();
        }
    }
    fn remove_secret(&self, name: &SecretName) {
        self.note(format!("no secret {}", name.name));
        if let Some(built) = self.built.get() {
            built.secrets().remove(name);
        }
    }
    fn set_offloaded(&self, table: OffloadedTable) {
        self.note(format!("offloaded {}", table != OffloadedTable::default()));
    }
    fn prepare_listener(&self, listener: Arc<model::Listener>, _: Option<Prints>, told: Told) {
        self.later(&listener.name, told);
    }
    fn start_listener(&self, name: &str, told: Told) {
        self.note(format!("listener {name}"));
        self.later(name, told);
    }
    fn remove_listener(&self, name: &str) {
        self.note(format!("no listener {name}"));
    }
}

fn count(endpoints: &[LocalityEndpoints]) -> usize {
    endpoints.iter().map(|group| group.endpoints.len()).sum()
}

/// A store, and what it wants of the control plane.
struct Fixture {
    store: ConfigStore<Recorder>,
    calls: Recorder,
    wanted: Mutex<UnboundedReceiver<Subscription>>,
    /// What is wanted of each type, as far as [`wanted`](Fixture::wanted) has heard.
    known: Mutex<BTreeMap<String, Interest>>,
}

impl std::ops::Deref for Fixture {
    type Target = ConfigStore<Recorder>;

    fn deref(&self) -> &ConfigStore<Recorder> {
        &self.store
    }
}

/// What an update led to.
struct Answered {
    outcome: std::sync::mpsc::Receiver<Outcome>,
    wanted: BTreeMap<String, Interest>,
}

impl Answered {
    /// What was rejected; the update must have been answered by now, and this may be asked once.
    fn rejected(&self) -> Vec<Rejection> {
        self.outcome.try_recv().expect("the update is answered").rejected
    }

    fn is_open(&self) -> bool {
        matches!(self.outcome.try_recv(), Err(std::sync::mpsc::TryRecvError::Empty))
    }
}

impl Fixture {
    fn update(&self, update: Update) -> Answered {
        self.update_from(&Source::Ads, update)
    }

    fn update_from(&self, source: &Source, update: Update) -> Answered {
        let (sender, outcome) = std::sync::mpsc::channel();
        // Nobody may be waiting for the outcome any more.
        self.store.update(source, update, Done::new(move |outcome| drop(outcome.map(|outcome| sender.send(outcome)))));
        self.workers();
        Answered { outcome, wanted: self.wanted() }
    }

    /// Lets the workers do what they were told.
    fn workers(&self) {
        loop {
            let told = std::mem::take(&mut *self.calls.told.lock().unwrap());
            if told.is_empty() {
                return;
            }
            for (name, told) in told {
                let error = self.calls.unbindable.lock().unwrap().get(&name).cloned();
                told(error.map_or(Ok(()), Err));
            }
        }
    }

    /// Lets time pass, as far as the store knows.
    fn later(&self, by: Duration) {
        self.store.expire(Instant::now() + by);
        self.workers();
    }

    /// What is wanted, where that was said since the last call.
    fn wanted(&self) -> BTreeMap<String, Interest> {
        let (mut wanted, mut known) = (self.wanted.lock().unwrap(), self.known.lock().unwrap());
        let changes = std::iter::from_fn(|| wanted.try_recv().ok());
        let mut changed = BTreeMap::new();
        for Subscription { type_url, change, .. } in changes {
            let interest = known.entry(type_url.clone()).or_default();
            match change {
                Change::To(all) => *interest = all,
                Change::Names(some) => {
                    let (Interest::Names(names) | Interest::WildcardAnd(names)) = interest else {
                        assert_eq!(*interest, Interest::Wildcard, "nothing was wanted");
                        let names = some.into_iter().map(|(name, wanted)| wanted.then_some(name).expect("it is new"));
                        *interest = Interest::WildcardAnd(names.collect());
                        changed.insert(type_url, interest.clone());
                        continue;
                    };
                    for (name, wanted) in some {
                        assert!(if wanted { names.insert(name) } else { names.remove(&name) }, "it has not changed");
                    }
                    if names.is_empty() {
                        assert!(matches!(interest, Interest::WildcardAnd(_)), "nothing is wanted");
                        *interest = Interest::Wildcard;
                    }
                }
            }
            changed.insert(type_url, interest.clone());
        }
        changed
    }

    /// What is counted under a name, where there is such a number.
    fn metric(&self, name: &str) -> Option<u64> {
        let metrics = self.store.metrics();
        let metric = metrics.iter().find(|metric| metric.name() == name)?;
        let mut text = String::new();
        write_text(&mut text, std::slice::from_ref(metric), HistogramBuckets::Summary).unwrap();
        text.trim().rsplit(' ').next()?.parse().ok()
    }

    fn is_initialized(&self) -> bool {
        self.store.0.progress.borrow().initialized
    }
}

/// A store that has started, with CDS and LDS from the aggregated stream where they are `expected`.
fn store(expected: &[String]) -> (Fixture, Recorder) {
    store_with(expected, Vec::new(), Vec::new())
}

fn store_with(
    expected: &[String],
    clusters: Vec<ClusterConfig>,
    listeners: Vec<model::Listener>,
) -> (Fixture, Recorder) {
    let from = |type_url: String| expected.contains(&type_url).then(ConfigSource::default);
    let start = StartUp {
        first: Vec::new(),
        cds: from(Cluster::type_url()),
        lds: from(Listener::type_url()),
        ..StartUp::default()
    };
    start_up(start, clusters, listeners)
}

/// With an aggregated stream, and a control plane behind the cluster `xds`.
fn start_up(mut start: StartUp, clusters: Vec<ClusterConfig>, listeners: Vec<model::Listener>) -> (Fixture, Recorder) {
    let api = "{ api_type: GRPC, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: xds } }] }";
    let source: ConfigSourceMessage = json::from_yaml(&format!("{{ api_config_source: {api} }}")).unwrap();
    if let Source::Grpc(grpc) = Source::clone(&parse::config_source(Some(&source), "").unwrap().source) {
        start.sources.ads = Some(grpc);
    }
    start.sources.servers.insert("xds".to_owned(), Server::plain(Vec::new()));
    start.sources.unsupported.insert("behind".to_owned());
    let calls = Recorder::default();
    let (subscriptions, wanted) = Subscriptions::channel();
    let store = ConfigStore::new(calls.clone(), start, subscriptions);
    store.start(clusters, listeners);
    let fixture = Fixture { store, calls: calls.clone(), wanted: Mutex::new(wanted), known: Mutex::default() };
    fixture.workers();
    (fixture, calls)
}

/// A store whose control plane has answered with nothing, and is asked for everything.
fn running() -> (Fixture, Recorder) {
    let (store, calls) = store(&[Cluster::type_url(), Listener::type_url()]);
    store.update(update(Cluster::type_url(), Vec::new()));
    store.update(update(Listener::type_url(), Vec::new()));
    assert!(store.is_initialized());
    (store, calls)
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

/// A cluster whose endpoints are those of `service`.
fn eds_cluster_of(name: &str, service: &str) -> Resource {
    let config = format!("{{ service_name: '{service}', eds_config: {ADS} }}");
    resource::<Cluster>(name, &format!("{{ name: '{name}', type: EDS, eds_cluster_config: {config} }}"))
}

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

fn names(told: &Answered, type_url: String) -> Vec<&str> {
    match told.wanted.get(&type_url) {
        Some(Interest::Names(names)) => names.iter().map(String::as_str).collect(),
        Some(Interest::Wildcard) => vec!["*"],
        Some(Interest::None) | None => Vec::new(),
        other => panic!("{type_url} is asked for as {other:?}"),
    }
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

mod churn;
mod clusters;
mod demanded;
mod driven;
mod driven_random;
mod extensions;
mod listeners;
mod named;
mod rotation;
mod runtime;
mod scopes;
mod secrets;
mod sourced;
mod start;
mod vhds;
