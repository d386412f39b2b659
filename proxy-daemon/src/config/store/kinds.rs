//! The types of resources that are asked for by name, and what names them.

use std::{
    collections::{HashMap, hash_map::Entry as Slot},
    sync::Arc,
};

use culvert_xds_client::{Any, ads::type_url};
use envoy_types::pb::envoy::{
    config::{core::v3::TypedExtensionConfig, endpoint::v3::ClusterLoadAssignment, route::v3::RouteConfiguration},
    extensions::transport_sockets::tls::v3::Secret as ProtoSecret,
    service::runtime::v3::Runtime,
};

use super::{resources::parse, scopes::AllScopes};
use crate::{
    config::{
        FieldError,
        model::{
            ALL_SCOPES, ClusterConfig, ConfigSource, Discovery, Listener, LocalityEndpoints, ResourceRef, RouteConfig,
            ScopeSource, SecretRef, SecretType,
        },
        parse::{self, SecretWithFiles},
    },
    layered_runtime::Entry,
};

/// A type of resources that clusters or listeners ask for by name, from the source that they say. See the module's
/// documentation for how to add one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// EDS
    Endpoints,
    /// SRDS: all scopes of a source are one need. See [`super::scopes`].
    Scopes,
    /// RDS
    Routes,
    /// RTDS
    Runtime,
    /// ECDS
    ExtensionConfigs,
    /// SDS
    Secrets,
}

/// A resource that was taken.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// Not kept: what was received is parsed again for a cluster that comes later.
    Endpoints(Arc<[LocalityEndpoints]>),
    Routes(Arc<RouteConfig>),
    Runtime(Arc<HashMap<String, Entry>>),
    /// Each place that it is for reads it anew.
    ExtensionConfig(Arc<Any>),
    /// Not kept: the data plane has it.
    Secret(Box<SecretWithFiles>),
}

/// A resource that a cluster, a listener or the process itself cannot do without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Its type.
    pub kind: Kind,
    /// Which, and from where.
    pub wanted: ResourceRef,
    /// It can do without until it comes: it is asked for, and not waited for.
    pub optional: bool,
    /// Of a secret: what it has to be.
    pub secret_type: Option<SecretType>,
}

impl Need {
    /// A resource that is no secret, and is waited for.
    pub fn new(kind: Kind, wanted: ResourceRef) -> Need {
        Need { kind, wanted, optional: false, secret_type: None }
    }

    fn secret((secret_type, secret): (SecretType, &SecretRef)) -> Option<Need> {
        let SecretRef::Discovered(wanted) = secret else { return None };
        Some(Need { secret_type: Some(secret_type), ..Need::new(Kind::Secrets, wanted.clone()) })
    }
}

impl Kind {
    pub(in crate::config) const ALL: [Kind; 6] =
        [Kind::Endpoints, Kind::Scopes, Kind::Routes, Kind::Runtime, Kind::ExtensionConfigs, Kind::Secrets];

    /// The type that this type URL names.
    pub(super) fn of(type_url: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    pub(in crate::config) fn type_url(self) -> &'static str {
        match self {
            Kind::Endpoints => type_url::ENDPOINT,
            Kind::Scopes => type_url::SCOPED_ROUTES,
            Kind::Routes => type_url::ROUTE,
            Kind::Runtime => type_url::RUNTIME,
            Kind::ExtensionConfigs => type_url::EXTENSION_CONFIG,
            Kind::Secrets => type_url::SECRET,
        }
    }

    /// What a wait for it is called in the log.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Kind::Endpoints => "the endpoints",
            Kind::Scopes => "the scopes",
            Kind::Routes => "the route configuration",
            Kind::Runtime => "the runtime layer",
            Kind::ExtensionConfigs => "the filter configuration",
            Kind::Secrets => "the secret",
        }
    }

    /// What waits for it, in the words of Envoy's init targets.
    pub(super) fn target(self, name: &str) -> String {
        match self {
            Kind::Endpoints => format!("shared target EdsClusterImpl init {name}"),
            Kind::Scopes => "shared target SRDS".to_owned(),
            Kind::Routes => format!("shared target RdsRouteConfigSubscription RDS init {name}"),
            Kind::Runtime => format!("target RTDS {name}"),
            Kind::ExtensionConfigs => format!("shared target FilterConfigSubscription init {name}"),
            Kind::Secrets => format!("shared target SdsApi {name}"),
        }
    }

    /// Unpacks, validates and parses a resource.
    pub(super) fn parse(self, name: &str, body: &Any) -> Result<Value, FieldError> {
        match self {
            Kind::Endpoints => {
                let named: fn(&ClusterLoadAssignment) -> &str = |message| &message.cluster_name;
                parse(name, body, named, parse::endpoints).map(|endpoints| Value::Endpoints(endpoints.into()))
            }
            // Taken all together: see `super::scopes`.
            Kind::Scopes => Err(FieldError::unsupported("")),
            Kind::Routes => {
                let named: fn(&RouteConfiguration) -> &str = |message| &message.name;
                parse(name, body, named, parse::route_config).map(|routes| Value::Routes(Arc::new(routes)))
            }
            Kind::Runtime => {
                let named: fn(&Runtime) -> &str = |message| &message.name;
                parse(name, body, named, parse::runtime_values).map(|values| Value::Runtime(Arc::new(values)))
            }
            Kind::ExtensionConfigs => {
                let named: fn(&TypedExtensionConfig) -> &str = |message| &message.name;
                let config = parse(name, body, named, parse::extension_config)?;
                Ok(Value::ExtensionConfig(Arc::new(config)))
            }
            Kind::Secrets => {
                let named: fn(&ProtoSecret) -> &str = |message| &message.name;
                parse(name, body, named, parse::discovered_secret).map(|read| Value::Secret(Box::new(read)))
            }
        }
    }
}

/// What a cluster needs before it may be used.
pub(super) fn cluster_needs(config: &ClusterConfig) -> Vec<Need> {
    let endpoints = match &config.discovery {
        Discovery::Eds { endpoints } => Some(Need::new(Kind::Endpoints, endpoints.clone())),
        _ => None,
    };
    distinct(endpoints.into_iter().chain(config.secrets().filter_map(Need::secret)))
}

/// What a listener needs before it may accept connections. `scopes`: what SRDS has delivered.
pub(super) fn listener_needs(listener: &Listener, scopes: &AllScopes) -> Vec<Need> {
    let filters = listener.discovered_filters().map(|filter| Need {
        optional: filter.without_warming,
        ..Need::new(Kind::ExtensionConfigs, filter.wanted.clone())
    });
    let mut needs: Vec<Need> = filters.collect();
    for manager in listener.connection_managers() {
        needs.extend(manager.rds().map(|wanted| Need::new(Kind::Routes, wanted.clone())));
        if let Some(ScopeSource::Srds { scopes: from, routes }) = manager.scoped().map(|scoped| &scoped.scopes) {
            let need = |kind: Kind, name: Arc<str>, from: &ConfigSource| {
                Need::new(kind, ResourceRef { name, from: from.clone() })
            };
            needs.push(need(Kind::Scopes, ALL_SCOPES.into(), from));
            let named = scopes.get(&from.source).into_iter().flat_map(|set| set.named_routes());
            needs.extend(
                named.map(|(name, waits)| Need { optional: !waits, ..need(Kind::Routes, Arc::clone(name), routes) }),
            );
        }
    }
    distinct(needs.into_iter().chain(listener.secrets().filter_map(Need::secret)))
}

/// Each once, whatever is said of the wait.
fn distinct(all: impl Iterator<Item = Need>) -> Vec<Need> {
    let mut needs: Vec<Need> = Vec::new();
    let mut known: HashMap<_, usize> = HashMap::new();
    for need in all {
        let (name, source) = (Arc::clone(&need.wanted.name), Arc::clone(&need.wanted.from.source));
        match known.entry((need.kind, need.secret_type, name, source)) {
            Slot::Occupied(index) => needs[*index.get()].optional &= need.optional,
            Slot::Vacant(index) => {
                index.insert(needs.len());
                needs.push(need);
            }
        }
    }
    needs
}
