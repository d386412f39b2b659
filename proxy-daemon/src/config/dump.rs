//! What `/config_dump` shows of the configuration, as the messages of `envoy.admin.v3`.
//!
//! A dump is a list of [`Section`]s whose long lists are made one element at a time: ten thousand clusters never exist twice.

use std::{collections::HashSet, sync::Arc, time::SystemTime};

use culvert_xds_client::{Any, json};
use envoy_types::pb::{
    envoy::{
        admin::v3::{
            ClustersConfigDump, EcdsConfigDump, EndpointsConfigDump, ListenersConfigDump, RoutesConfigDump,
            ScopedRoutesConfigDump, SecretsConfigDump, UpdateFailureState, clusters_config_dump, ecds_config_dump,
            listeners_config_dump, routes_config_dump, scoped_routes_config_dump, secrets_config_dump,
        },
        config::{
            bootstrap::v3::Bootstrap,
            cluster::v3::Cluster,
            core::v3::TypedExtensionConfig,
            listener::v3::{Listener, filter::ConfigType},
            route::v3::RouteConfiguration,
        },
        extensions::{
            filters::network::http_connection_manager::v3::{
                HttpConnectionManager, http_connection_manager::RouteSpecifier, scoped_routes::ConfigSpecifier,
            },
            transport_sockets::tls::v3::Secret,
        },
    },
    google::protobuf::Timestamp,
};
use prost::{Message, Name};
use prost_reflect::DynamicMessage;

use super::status::{Failure, Resource, Scoped, Snapshot, Version};

/// What is configured, for those who show it.
pub struct Configuration {
    /// Encoded: a tenth of what it takes as a message, and looked at only when it is asked for.
    bootstrap: Vec<u8>,
    static_clusters: HashSet<Box<str>>,
    started: SystemTime,
    snapshot: Box<dyn Fn() -> Snapshot + Send + Sync>,
}

/// One message of a dump, in parts.
pub struct Section {
    /// Its type: `envoy.admin.v3.ClustersConfigDump`.
    pub message: String,
    /// What is not a list.
    pub head: Vec<(&'static str, Head)>,
    /// The fields that are lists.
    pub lists: Vec<List>,
}

/// A field of a [`Section`] that is not a list.
pub enum Head {
    /// A string.
    Text(String),
    /// A time.
    Time(SystemTime),
    /// The bootstrap.
    Bootstrap(Box<Bootstrap>),
}

/// A field of a [`Section`] that is a list.
pub struct List {
    /// Its name: `static_clusters`.
    pub field: &'static str,
    /// What it holds.
    pub elements: Vec<Element>,
}

/// An element of a list, not made yet.
pub struct Element {
    /// What `name_regex` is held against.
    pub name: String,
    /// Makes the message.
    pub make: Box<dyn FnOnce() -> DynamicMessage + Send>,
}

impl Element {
    /// An element whose message is made when it is looked at.
    pub fn new<M: Message + Name>(name: impl Into<String>, make: impl FnOnce() -> M + Send + 'static) -> Element {
        Element { name: name.into(), make: Box::new(move || json::to_dynamic(&make())) }
    }
}

impl Configuration {
    /// `bootstrap`: as the daemon started with it, at `started`. `snapshot` gives the rest.
    pub fn new(
        bootstrap: &Bootstrap,
        started: SystemTime,
        snapshot: impl Fn() -> Snapshot + Send + Sync + 'static,
    ) -> Configuration {
        let clusters = bootstrap.static_resources.iter().flat_map(|resources| &resources.clusters);
        Configuration {
            bootstrap: bootstrap.encode_to_vec(),
            static_clusters: clusters.map(|cluster| cluster.name.as_str().into()).collect(),
            started,
            snapshot: Box::new(snapshot),
        }
    }

    /// What the store knows now.
    pub fn snapshot(&self) -> Snapshot {
        (self.snapshot)()
    }

    /// Whether a cluster of this name is in the bootstrap: all others came from the control plane.
    pub fn is_static_cluster(&self, name: &str) -> bool {
        self.static_clusters.contains(name)
    }

    /// When the bootstrap was read.
    pub fn started(&self) -> SystemTime {
        self.started
    }

    /// The bootstrap.
    pub fn bootstrap(&self) -> Bootstrap {
        // These bytes were encoded by `new`.
        Bootstrap::decode(&*self.bootstrap).unwrap_or_default()
    }

    /// The whole dump in Envoy's order. `endpoints`: the section of [`endpoints_section`], where it is asked for.
    pub fn sections(&self, endpoints: Option<Section>) -> Vec<Section> {
        let (snapshot, bootstrap) = (self.snapshot(), self.bootstrap());
        let (clusters, listeners) =
            bootstrap.static_resources.clone().map(|it| (it.clusters, it.listeners)).unwrap_or_default();
        let routes = self.routes(&snapshot, &listeners);
        let mut sections = vec![self.bootstrap_section(bootstrap), self.clusters(&snapshot, clusters)];
        sections.extend(ecds(&snapshot));
        sections.extend(endpoints);
        sections.push(self.listeners(&snapshot, listeners));
        sections.extend(routes);
        sections.push(self.secrets(&snapshot));
        sections
    }

    fn bootstrap_section(&self, bootstrap: Bootstrap) -> Section {
        Section {
            message: "envoy.admin.v3.BootstrapConfigDump".to_owned(),
            head: vec![("bootstrap", Head::Bootstrap(Box::new(bootstrap))), ("last_updated", Head::Time(self.started))],
            lists: Vec::new(),
        }
    }

    fn clusters(&self, snapshot: &Snapshot, fixed: Vec<Cluster>) -> Section {
        use clusters_config_dump::{DynamicCluster, StaticCluster};
        let last_updated = Some(timestamp(self.started));
        let fixed = fixed.into_iter().map(|cluster| {
            Element::new(cluster.name.clone(), move || StaticCluster { cluster: Some(pack(&cluster)), last_updated })
        });
        let dynamic = |resource: &Resource, version: Option<&Arc<Version>>, with_error: bool| {
            let version = version.cloned();
            let failure = resource.failure.clone().filter(|_| with_error);
            Element::new(resource.name.clone(), move || DynamicCluster {
                version_info: version.as_ref().map(|it| it.version.clone()).unwrap_or_default(),
                last_updated: version.as_ref().map(|it| timestamp(it.updated)),
                cluster: version.as_ref().map(|it| it.body.clone()),
                error_state: failure.as_deref().map(error_state),
                ..Default::default()
            })
        };
        let resources = snapshot.of(&Cluster::type_url());
        // As in Envoy, one of which no version was ever taken is not shown; `culvert xds status` has it.
        let active = resources.iter().filter(|it| it.active.is_some());
        let warming = resources.iter().filter(|it| it.warming.is_some());
        section::<ClustersConfigDump>(
            snapshot.version_of(&Cluster::type_url()),
            vec![
                ("static_clusters", fixed.collect()),
                ("dynamic_active_clusters", active.map(|it| dynamic(it, it.active.as_ref(), true)).collect()),
                (
                    "dynamic_warming_clusters",
                    warming.map(|it| dynamic(it, it.warming.as_ref(), it.active.is_none())).collect(),
                ),
            ],
        )
    }

    fn listeners(&self, snapshot: &Snapshot, fixed: Vec<Listener>) -> Section {
        use listeners_config_dump::{DynamicListener, DynamicListenerState, StaticListener};
        let last_updated = Some(timestamp(self.started));
        let fixed = fixed.into_iter().map(|listener| {
            Element::new(listener.name.clone(), move || StaticListener {
                listener: Some(pack(&listener)),
                last_updated,
            })
        });
        let state = |version: &Option<Arc<Version>>| {
            version.as_ref().map(|it| DynamicListenerState {
                version_info: it.version.clone(),
                listener: Some(it.body.clone()),
                last_updated: Some(timestamp(it.updated)),
            })
        };
        let dynamic = snapshot.of(&Listener::type_url()).iter().filter(|it| it.missing.is_none()).map(|resource| {
            let resource = resource.clone();
            Element::new(resource.name.clone(), move || DynamicListener {
                active_state: state(&resource.active),
                warming_state: state(&resource.warming),
                draining_state: state(&resource.draining),
                error_state: resource.failure.as_deref().map(error_state),
                name: resource.name,
                ..Default::default()
            })
        });
        section::<ListenersConfigDump>(
            snapshot.version_of(&Listener::type_url()),
            vec![("static_listeners", fixed.collect()), ("dynamic_listeners", dynamic.collect())],
        )
    }

    /// Scoped routes and routes; none where nothing speaks HTTP, as in Envoy.
    fn routes(&self, snapshot: &Snapshot, fixed: &[Listener]) -> Vec<Section> {
        use routes_config_dump::{DynamicRouteConfig, StaticRouteConfig};
        let mut managers: Vec<_> =
            fixed.iter().flat_map(connection_managers).map(|manager| (manager, self.started)).collect();
        for resource in snapshot.of(&Listener::type_url()) {
            for version in resource.active.iter().chain(&resource.warming).chain(&resource.draining) {
                // What is in force has been decoded before.
                let listener = Listener::decode(&*version.body.value).unwrap_or_default();
                managers.extend(connection_managers(&listener).into_iter().map(|manager| (manager, version.updated)));
            }
        }
        if managers.is_empty() {
            return Vec::new();
        }
        let scoped = scoped_routes(snapshot, &managers);
        let inline = managers.into_iter().filter_map(|(manager, at)| match manager.route_specifier {
            Some(RouteSpecifier::RouteConfig(routes)) => Some(Element::new(routes.name.clone(), move || {
                StaticRouteConfig { route_config: Some(pack(&routes)), last_updated: Some(timestamp(at)) }
            })),
            _ => None,
        });
        let dynamic = |resource: &Resource| {
            let (version, failure) = (resource.active.clone(), resource.failure.clone());
            Element::new(resource.name.clone(), move || DynamicRouteConfig {
                version_info: version.as_ref().map(|it| it.version.clone()).unwrap_or_default(),
                route_config: version.as_ref().map(|it| it.body.clone()),
                last_updated: version.as_ref().map(|it| timestamp(it.updated)),
                error_state: failure.as_deref().map(error_state),
                ..Default::default()
            })
        };
        let known = snapshot.of(&RouteConfiguration::type_url()).iter().filter(|it| it.missing.is_none());
        vec![
            scoped,
            section::<RoutesConfigDump>(
                "",
                vec![
                    ("static_route_configs", inline.collect()),
                    ("dynamic_route_configs", known.map(dynamic).collect()),
                ],
            ),
        ]
    }

    fn secrets(&self, snapshot: &Snapshot) -> Section {
        use secrets_config_dump::{DynamicSecret, StaticSecret};
        let last_updated = Some(timestamp(self.started));
        let fixed = self.bootstrap().static_resources.unwrap_or_default().secrets;
        let fixed = fixed.into_iter().map(|secret| {
            Element::new(secret.name.clone(), move || StaticSecret {
                name: secret.name.clone(),
                last_updated,
                secret: Some(pack(&secret)),
            })
        });
        let dynamic = |resource: &Resource, version: Option<&Arc<Version>>| {
            let (name, version, failure) = (resource.name.clone(), version.cloned(), resource.failure.clone());
            Element::new(resource.name.clone(), move || DynamicSecret {
                name,
                // Envoy's words for a secret that has not come.
                version_info: version.as_ref().map_or("uninitialized".to_owned(), |it| it.version.clone()),
                last_updated: version.as_ref().map(|it| timestamp(it.updated)),
                secret: version.as_ref().map(|it| it.body.clone()),
                error_state: failure.as_deref().map(error_state),
                ..Default::default()
            })
        };
        let known = snapshot.of(&Secret::type_url());
        let (active, warming): (Vec<_>, Vec<_>) = known.iter().partition(|it| it.active.is_some());
        section::<SecretsConfigDump>(
            "",
            vec![
                ("static_secrets", fixed.collect()),
                ("dynamic_active_secrets", active.into_iter().map(|it| dynamic(it, it.active.as_ref())).collect()),
                ("dynamic_warming_secrets", warming.into_iter().map(|it| dynamic(it, it.warming.as_ref())).collect()),
            ],
        )
    }
}

/// Scoped routes: those of listeners, and those that SRDS delivered.
fn scoped_routes(snapshot: &Snapshot, managers: &[(HttpConnectionManager, SystemTime)]) -> Section {
    use scoped_routes_config_dump::{DynamicScopedRouteConfigs, InlineScopedRouteConfigs};
    let inline = managers.iter().filter_map(|(manager, at)| {
        let Some(RouteSpecifier::ScopedRoutes(scoped)) = &manager.route_specifier else { return None };
        let Some(ConfigSpecifier::ScopedRouteConfigurationsList(list)) = &scoped.config_specifier else { return None };
        let (name, list, last_updated) = (scoped.name.clone(), list.clone(), Some(timestamp(*at)));
        Some(Element::new(scoped.name.clone(), move || InlineScopedRouteConfigs {
            name,
            scoped_route_configs: list.scoped_route_configurations.iter().map(pack).collect(),
            last_updated,
        }))
    });
    let dynamic = snapshot.scoped.iter().cloned().map(|Scoped { name, scopes }| {
        Element::new(name.to_string(), move || {
            let newest = scopes.iter().max_by_key(|version| version.updated);
            DynamicScopedRouteConfigs {
                name: name.to_string(),
                version_info: newest.map(|version| version.version.clone()).unwrap_or_default(),
                last_updated: newest.map(|version| timestamp(version.updated)),
                scoped_route_configs: scopes.iter().map(|version| version.body.clone()).collect(),
                ..Default::default()
            }
        })
    });
    section::<ScopedRoutesConfigDump>(
        "",
        vec![("inline_scoped_route_configs", inline.collect()), ("dynamic_scoped_route_configs", dynamic.collect())],
    )
}

/// The filters' configurations that ECDS delivered; no section where there are none, as in Envoy.
fn ecds(snapshot: &Snapshot) -> Option<Section> {
    use ecds_config_dump::EcdsFilterConfig;
    let known = snapshot.of(&TypedExtensionConfig::type_url());
    let filters = known.iter().filter_map(|resource| {
        let version = Arc::clone(resource.active.as_ref()?);
        let failure = resource.failure.clone();
        Some(Element::new(resource.name.clone(), move || EcdsFilterConfig {
            version_info: version.version.clone(),
            ecds_filter: Some(version.body.clone()),
            last_updated: Some(timestamp(version.updated)),
            error_state: failure.as_deref().map(error_state),
            ..Default::default()
        }))
    });
    let filters: Vec<_> = filters.collect();
    (!filters.is_empty()).then(|| section::<EcdsConfigDump>("", vec![("ecds_filters", filters)]))
}

/// The section of endpoints, which only the data plane knows.
pub fn endpoints_section(fixed: Vec<Element>, dynamic: Vec<Element>) -> Section {
    section::<EndpointsConfigDump>("", vec![("static_endpoint_configs", fixed), ("dynamic_endpoint_configs", dynamic)])
}

fn section<M: Name>(version: &str, lists: Vec<(&'static str, Vec<Element>)>) -> Section {
    let version = (!version.is_empty()).then(|| ("version_info", Head::Text(version.to_owned())));
    let lists = lists.into_iter().map(|(field, elements)| List { field, elements });
    Section { message: M::full_name(), head: version.into_iter().collect(), lists: lists.collect() }
}

/// All connection managers of a listener.
fn connection_managers(listener: &Listener) -> Vec<HttpConnectionManager> {
    let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
    let configs = chains.flat_map(|chain| &chain.filters).filter_map(|filter| match &filter.config_type {
        Some(ConfigType::TypedConfig(config)) => Some(config),
        _ => None,
    });
    configs
        .filter(|config| config.type_url == HttpConnectionManager::type_url())
        .filter_map(|config| HttpConnectionManager::decode(&*config.value).ok())
        .collect()
}

/// A time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Envoy shows milliseconds.
    Timestamp { seconds: since.as_secs().cast_signed(), nanos: since.subsec_millis().cast_signed() * 1_000_000 }
}

/// `UpdateFailureState`
pub fn error_state(failure: &Failure) -> UpdateFailureState {
    UpdateFailureState {
        failed_configuration: Some(failure.attempt.body.clone()),
        last_update_attempt: Some(timestamp(failure.attempt.updated)),
        details: failure.details.clone(),
        version_info: failure.attempt.version.clone(),
    }
}

/// A message in an `Any`.
pub fn pack<M: Message + Name>(message: &M) -> Any {
    json::pack(message)
}
