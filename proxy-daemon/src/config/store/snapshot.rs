//! What `/config_dump` and its like are given: see [`Snapshot`].

use std::{collections::BTreeSet, sync::Arc};

use culvert_xds_client::ads::Interest;
use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use prost::Name;

use super::{Apply, ConfigStore, Resources, State};
use crate::config::{
    model::RouteSource,
    status::{Failure, Missing, Resource, Snapshot, Type, Unready, Version},
};

impl<A: Apply> ConfigStore<A> {
    /// All that is known of the resources now.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let mut types = vec![
            of_type(Cluster::type_url(), &state.clusters, &BTreeSet::new()),
            state.listeners_now(|name| self.0.apply.listener_failure(name)),
        ];
        for (type_url, interest) in state.interests() {
            let asked = if let Interest::Names(names) = interest { names } else { BTreeSet::new() };
            if type_url == ClusterLoadAssignment::type_url() {
                types.push(of_type(type_url, &state.endpoints, &asked));
            } else if type_url == RouteConfiguration::type_url() {
                types.push(of_type(type_url, &state.routes, &asked));
            }
        }
        let unready = state.warming.keys().filter_map(|name| state.unready(name)).collect();
        Snapshot { types, unready }
    }
}

/// `asked`: the names that are subscribed to.
fn of_type(type_url: String, known: &Resources, asked: &BTreeSet<String>) -> Type {
    let names: BTreeSet<&String> = known.accepted.keys().chain(known.refused.keys()).chain(asked).collect();
    let resource = |name: &String| {
        let (active, failure) = (known.accepted.get(name).cloned(), known.refused.get(name).cloned());
        let missing = (active.is_none() && failure.is_none()).then_some(Missing::Requested);
        Resource { name: name.clone(), active, failure, missing, ..Resource::default() }
    };
    Type { type_url, version: version_of(known), resources: names.into_iter().map(resource).collect() }
}

/// The one version that all resources have; empty where they differ.
fn version_of(known: &Resources) -> String {
    let mut versions = known.accepted.values().map(|version| &version.version);
    let first = versions.next().cloned().unwrap_or_default();
    if versions.all(|version| *version == first) { first } else { String::new() }
}

impl State {
    fn listeners_now(&self, unbound: impl Fn(&str) -> Option<String>) -> Type {
        let known = &self.listeners;
        let names: BTreeSet<&String> = known.accepted.keys().chain(known.refused.keys()).collect();
        let resource = |name: &String| {
            let accepted = known.accepted.get(name);
            let unbound = |attempt: &Arc<Version>| {
                Some(Arc::new(Failure { details: unbound(name)?, attempt: Arc::clone(attempt) }))
            };
            Resource {
                name: name.clone(),
                active: self.live.get(name).cloned(),
                warming: accepted.filter(|_| self.warming.contains_key(name)).cloned(),
                failure: known.refused.get(name).cloned().or_else(|| accepted.and_then(unbound)),
                ..Resource::default()
            }
        };
        let resources = names.into_iter().map(resource).collect();
        Type { type_url: Listener::type_url(), version: version_of(known), resources }
    }

    fn unready(&self, name: &String) -> Option<Unready> {
        let listener = self.parsed_listeners.get(name)?;
        let routes = listener.connection_managers().filter_map(|manager| match &manager.routes {
            RouteSource::Rds(name) if !self.parsed_routes.contains_key(&**name) => Some(name),
            _ => None,
        });
        let mut targets: Vec<_> =
            routes.map(|name| format!("shared target RdsRouteConfigSubscription RDS init {name}")).collect();
        targets.dedup();
        if targets.is_empty() {
            targets.extend(self.lack(listener));
        }
        Some(Unready { listener: name.clone(), is_static: self.static_listeners.contains(name), targets })
    }
}
