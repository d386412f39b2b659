//! The types of resources that are asked for by name, and what names them.

use std::{collections::HashMap, sync::Arc};

use culvert_xds_client::{Any, ads::type_url};
use envoy_types::pb::envoy::{
    config::{endpoint::v3::ClusterLoadAssignment, route::v3::RouteConfiguration},
    service::runtime::v3::Runtime,
};

use super::resources::parse;
use crate::{
    config::{
        FieldError,
        model::{ClusterConfig, Discovery, Listener, LocalityEndpoints, ResourceRef, RouteConfig},
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
    /// RDS
    Routes,
    /// RTDS
    Runtime,
}

/// A resource that was taken.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// Not kept: what was received is parsed again for a cluster that comes later.
    Endpoints(Vec<LocalityEndpoints>),
    Routes(Arc<RouteConfig>),
    Runtime(Arc<HashMap<String, Entry>>),
}

/// A resource that a cluster, a listener or the process itself cannot do without.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Its type.
    pub kind: Kind,
    /// Which, and from where.
    pub wanted: ResourceRef,
}

impl Kind {
    pub(in crate::config) const ALL: [Kind; 3] = [Kind::Endpoints, Kind::Routes, Kind::Runtime];

    /// The type that this type URL names.
    pub(super) fn of(type_url: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    pub(in crate::config) fn type_url(self) -> &'static str {
        match self {
            Kind::Endpoints => type_url::ENDPOINT,
            Kind::Routes => type_url::ROUTE,
            Kind::Runtime => type_url::RUNTIME,
        }
    }

    /// What a wait for it is called in the log.
    pub(super) fn noun(self) -> &'static str {
        match self {
            Kind::Endpoints => "the endpoints",
            Kind::Routes => "the route configuration",
            Kind::Runtime => "the runtime layer",
        }
    }

    /// What waits for it, in the words of Envoy's init targets.
    pub(super) fn target(self, name: &str) -> String {
        match self {
            Kind::Endpoints => format!("shared target EdsClusterImpl init {name}"),
            Kind::Routes => format!("shared target RdsRouteConfigSubscription RDS init {name}"),
            Kind::Runtime => format!("target RTDS {name}"),
        }
    }

    /// Unpacks, validates and parses a resource.
    pub(super) fn parse(self, name: &str, body: &Any) -> Result<Value, FieldError> {
        match self {
            Kind::Endpoints => {
                let named: fn(&ClusterLoadAssignment) -> &str = |message| &message.cluster_name;
                parse(name, body, named, parse::endpoints).map(Value::Endpoints)
            }
            Kind::Routes => {
                let named: fn(&RouteConfiguration) -> &str = |message| &message.name;
                parse(name, body, named, parse::route_config).map(|routes| Value::Routes(Arc::new(routes)))
            }
            Kind::Runtime => {
                let named: fn(&Runtime) -> &str = |message| &message.name;
                parse(name, body, named, parse::runtime_values).map(|values| Value::Runtime(Arc::new(values)))
            }
        }
    }
}

/// What a cluster needs before it may be used.
pub(super) fn cluster_needs(config: &ClusterConfig) -> Vec<Need> {
    match &config.discovery {
        Discovery::Eds { endpoints } => vec![Need { kind: Kind::Endpoints, wanted: endpoints.clone() }],
        _ => Vec::new(),
    }
}

/// What a listener needs before it may accept connections; each once.
pub(super) fn listener_needs(listener: &Listener) -> Vec<Need> {
    let mut needs: Vec<Need> = Vec::new();
    let routes = listener.rds().map(|wanted| Need { kind: Kind::Routes, wanted: wanted.clone() });
    for need in routes {
        let same = |known: &Need| {
            (known.kind, &known.wanted.name, &known.wanted.from.source)
                == (need.kind, &need.wanted.name, &need.wanted.from.source)
        };
        if !needs.iter().any(same) {
            needs.push(need);
        }
    }
    needs
}
