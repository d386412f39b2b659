//! The types of resources that are asked for by name, and what names them.

use std::{collections::HashMap, sync::Arc};

use culvert_xds_client::{Any, ads::type_url};
use envoy_types::pb::envoy::{
    config::{core::v3::TypedExtensionConfig, endpoint::v3::ClusterLoadAssignment, route::v3::RouteConfiguration},
    service::runtime::v3::Runtime,
};

use super::{resources::parse, scopes::AllScopes};
use crate::{
    config::{
        FieldError,
        model::{
            ALL_SCOPES, ClusterConfig, ConfigSource, Discovery, Listener, LocalityEndpoints, ResourceRef, RouteConfig,
            ScopeSource,
        },
        parse,
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
}

/// A resource that was taken.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// Not kept: what was received is parsed again for a cluster that comes later.
    Endpoints(Vec<LocalityEndpoints>),
    Routes(Arc<RouteConfig>),
    Runtime(Arc<HashMap<String, Entry>>),
    /// Each place that it is for reads it anew.
    ExtensionConfig(Arc<Any>),
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
}

impl Kind {
    pub(in crate::config) const ALL: [Kind; 5] =
        [Kind::Endpoints, Kind::Scopes, Kind::Routes, Kind::Runtime, Kind::ExtensionConfigs];

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
        }
    }

    /// Unpacks, validates and parses a resource.
    pub(super) fn parse(self, name: &str, body: &Any) -> Result<Value, FieldError> {
        match self {
            Kind::Endpoints => {
                let named: fn(&ClusterLoadAssignment) -> &str = |message| &message.cluster_name;
                parse(name, body, named, parse::endpoints).map(Value::Endpoints)
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
        }
    }
}

/// What a cluster needs before it may be used.
pub(super) fn cluster_needs(config: &ClusterConfig) -> Vec<Need> {
    match &config.discovery {
        Discovery::Eds { endpoints } => {
            vec![Need { kind: Kind::Endpoints, wanted: endpoints.clone(), optional: false }]
        }
        _ => Vec::new(),
    }
}

/// What a listener needs before it may accept connections; each once. `scopes`: what SRDS has delivered.
pub(super) fn listener_needs(listener: &Listener, scopes: &AllScopes) -> Vec<Need> {
    let mut needs: Vec<Need> = Vec::new();
    let mut known = HashMap::new();
    let mut add = |kind: Kind, name: &Arc<str>, from: &ConfigSource, optional: bool| {
        let index = known.entry((kind, Arc::clone(name), Arc::clone(&from.source))).or_insert_with(|| {
            let wanted = ResourceRef { name: Arc::clone(name), from: from.clone() };
            needs.push(Need { kind, wanted, optional });
            needs.len() - 1
        });
        needs[*index].optional &= optional;
    };
    for filter in listener.discovered_filters() {
        let wanted = &filter.wanted;
        add(Kind::ExtensionConfigs, &wanted.name, &wanted.from, filter.without_warming);
    }
    for manager in listener.connection_managers() {
        if let Some(wanted) = manager.rds() {
            add(Kind::Routes, &wanted.name, &wanted.from, false);
        }
        if let Some(ScopeSource::Srds { scopes: from, routes }) = manager.scoped().map(|scoped| &scoped.scopes) {
            add(Kind::Scopes, &ALL_SCOPES.into(), from, false);
            let named = scopes.get(&from.source).into_iter().flat_map(|set| set.named_routes());
            named.for_each(|name| add(Kind::Routes, name, routes, false));
        }
    }
    needs
}
