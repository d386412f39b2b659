//! VHDS: virtual hosts of route configurations of RDS, pushed by the server or asked for because of a request.
//!
//! The source is asked for all virtual hosts that it has for this node, as Envoy does, and on demand for
//! `<route configuration>/<host>` beside that. What comes is put beside the virtual hosts of the route configuration that its
//! name begins with; those that belong to none are passed over.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Interest, Resource, Update, type_url},
    source::Source,
};
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost as Message};
use prost::Message as _;

use super::{
    Apply, ConfigStore, counts::VhdsCounts, demanded::Demanded, kinds::Kind, refused::Refused, resources, state::State,
    updates::UpdateId,
};
use crate::{
    config::{
        FieldError,
        model::{RouteConfig, VirtualHost},
        parse,
        status::Version,
    },
    http::RouteTable,
    on_demand::Wanted,
};

/// Route configurations with VHDS, by where they come from and their names.
#[derive(Default)]
pub(in crate::config) struct AllHosts {
    by_routes: BTreeMap<(Arc<Source>, Arc<str>), Hosts>,
    /// Names on demand.
    pub(super) demanded: Demanded,
    pub(in crate::config) refused: Refused,
    /// Sources that are asked for everything that they have.
    asked: BTreeSet<Arc<Source>>,
    /// Those of which this has changed.
    changed: BTreeSet<Arc<Source>>,
}

/// The virtual hosts of one route configuration.
struct Hosts {
    /// Where they come from.
    source: Arc<Source>,
    /// As it came.
    base: Arc<RouteConfig>,
    by_name: BTreeMap<String, (Arc<Version>, Arc<VirtualHost>)>,
    /// The source has answered once.
    answered: bool,
}

impl Hosts {
    /// With the virtual hosts of VHDS after its own.
    fn merged(&self) -> Arc<RouteConfig> {
        if self.by_name.is_empty() {
            return Arc::clone(&self.base);
        }
        let mut merged = RouteConfig::clone(&self.base);
        merged.virtual_hosts.extend(self.by_name.values().map(|(_, host)| Arc::clone(host)));
        Arc::new(merged)
    }

    /// Refuses a virtual host with a domain that another one has.
    fn check(&self, name: &str, host: &VirtualHost) -> Result<(), FieldError> {
        let others = self.by_name.iter().filter(|(other, _)| *other != name).map(|(_, (_, host))| host);
        let taken: HashSet<&String> = self.base.virtual_hosts.iter().chain(others).flat_map(|it| &it.domains).collect();
        match host.domains.iter().find(|domain| taken.contains(domain)) {
            Some(domain) => {
                let text = format!("Only unique values for domains are permitted. Duplicate entry of domain {domain}");
                Err(FieldError::new("domains", text))
            }
            None => Ok(()),
        }
    }
}

/// The route configuration that a virtual host belongs to.
fn routes_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(routes, _)| routes)
}

impl AllHosts {
    /// Whether virtual hosts are had from there.
    pub(in crate::config) fn is_source(&self, source: &Source) -> bool {
        self.asked.contains(source)
    }

    /// Those in force, with their names.
    pub(in crate::config) fn entries(&self) -> impl Iterator<Item = (&String, &Arc<Version>)> {
        self.by_routes.values().flat_map(|hosts| hosts.by_name.iter().map(|(name, (stored, _))| (name, stored)))
    }

    /// A route configuration as it is in force, for people: with its virtual hosts of VHDS after its own.
    pub(super) fn merged_version(&self, source: &Arc<Source>, name: &Arc<str>, stored: &Arc<Version>) -> Arc<Version> {
        let Some(hosts) = self.by_routes.get(&(Arc::clone(source), Arc::clone(name))) else {
            return Arc::clone(stored);
        };
        if hosts.by_name.is_empty() {
            return Arc::clone(stored);
        }
        let decoded = hosts.by_name.values().filter_map(|(host, _)| Message::decode(host.body.value.as_slice()).ok());
        let added = RouteConfiguration { virtual_hosts: decoded.collect(), ..RouteConfiguration::default() };
        let mut merged = Version::clone(stored);
        // Of messages that follow one another, lists are joined.
        merged.body.value.extend(added.encode_to_vec());
        Arc::new(merged)
    }

    /// Whether the virtual hosts of a route configuration have not come yet.
    pub(super) fn is_awaited(&self, source: &Source, name: &str) -> bool {
        let mut all = self.by_routes.iter();
        all.any(|((from, routes), hosts)| **routes == *name && **from == *source && !hosts.answered)
    }

    /// Tells whether a host is there that has been asked for as `<route configuration>/<host>`.
    fn resolver(&self, source: &Source) -> impl Fn(&str) -> bool + use<> {
        let all = self.by_routes.iter().filter(|(_, hosts)| *hosts.source == *source);
        let tables = all.map(|((_, name), hosts)| (Arc::clone(name), RouteTable::new(hosts.merged())));
        let tables: Vec<_> = tables.collect();
        move |alias| {
            let of = |name: &str| alias.strip_prefix(name)?.strip_prefix('/');
            tables.iter().any(|(name, table)| of(name).is_some_and(|host| table.virtual_host(host).is_some()))
        }
    }

    fn find_sources(&mut self) {
        let asked: BTreeSet<_> = self.by_routes.values().map(|hosts| Arc::clone(&hosts.source)).collect();
        self.changed.extend(asked.symmetric_difference(&self.asked).cloned());
        self.asked = asked;
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Hands a route configuration to the data plane, with the virtual hosts that VHDS has for it.
    pub(super) fn put_routes(&self, state: &mut State, source: &Source, name: &str, routes: &Arc<RouteConfig>) {
        let key = (Arc::new(source.clone()), Arc::from(name));
        let merged = match &routes.vhds {
            Some(from) => {
                let known = state.vhds.by_routes.remove(&key).filter(|known| known.source == from.source);
                if known.is_none() {
                    let prefixes = state.prefixes_of(source, name);
                    prefixes.iter().for_each(|prefix| VhdsCounts::new(prefix, name).asked());
                }
                let mut hosts = known.unwrap_or_else(|| Hosts {
                    source: Arc::clone(&from.source),
                    base: Arc::clone(routes),
                    by_name: BTreeMap::new(),
                    answered: false,
                });
                hosts.base = Arc::clone(routes);
                let merged = hosts.merged();
                state.vhds.by_routes.insert(key.clone(), hosts);
                merged
            }
            None => {
                state.vhds.by_routes.remove(&key);
                Arc::clone(routes)
            }
        };
        state.vhds.find_sources();
        self.0.apply.set_routes(&key.0, &key.1, merged);
        state.routes_are_there(&key.0, &key.1);
    }

    /// Nobody needs a route configuration any more.
    pub(super) fn drop_hosts(&self, state: &mut State, source: &Arc<Source>, name: &Arc<str>) {
        if state.vhds.by_routes.remove(&(Arc::clone(source), Arc::clone(name))).is_some() {
            state.vhds.find_sources();
        }
    }

    /// Takes an update of VHDS.
    pub(super) fn take_hosts(&self, state: &mut State, source: &Source, update: Update, id: UpdateId) {
        state.vhds.refused.begin(&update);
        let mut changed: BTreeSet<(Arc<Source>, Arc<str>)> = BTreeSet::new();
        let mut accepted = true;
        for resource in update.added {
            if let Err((resource, error)) = state.take_host(source, resource, &mut changed).map_err(|refused| *refused)
            {
                accepted = false;
                state.updates.reject(id, &resource.name, error.to_string());
                state.vhds.refused.refuse(resource, error.to_string());
            }
        }
        for name in &update.removed {
            for (key, hosts) in state.vhds.by_routes.iter_mut().filter(|(_, hosts)| *hosts.source == *source) {
                if hosts.by_name.remove(name).is_some() {
                    changed.insert(key.clone());
                }
            }
        }
        for (from, name) in changed {
            let Some(hosts) = state.vhds.by_routes.get(&(Arc::clone(&from), Arc::clone(&name))) else { continue };
            self.0.apply.set_routes(&from, &name, hosts.merged());
        }
        update.absent.iter().for_each(|name| state.host_is_absent(source, name));
        let waiting = state.vhds.demanded.waiting(source);
        if !waiting.is_empty() || !update.removed.is_empty() {
            let is_there = state.vhds.resolver(source);
            let from = Arc::new(source.clone());
            for name in waiting.iter().filter(|name| is_there(name)) {
                state.vhds.demanded.end(&Wanted::VirtualHost { source: Arc::clone(&from), name: Arc::clone(name) });
            }
            if !update.removed.is_empty() {
                // What is gone is asked for again by the next request.
                let names = state.vhds.demanded.names_of(source);
                let gone = names.iter().filter(|name| !is_there(name) && !waiting.iter().any(|it| **it == ***name));
                gone.for_each(|name| state.host_is_absent(source, name));
            }
        }
        let mut users = Vec::new();
        for ((from, name), hosts) in &mut state.vhds.by_routes {
            if *hosts.source == *source {
                let first = !std::mem::replace(&mut hosts.answered, true);
                users.push((Arc::clone(from), Arc::clone(name), first));
            }
        }
        for (from, name, first) in users {
            for prefix in state.prefixes_of(&from, &name) {
                VhdsCounts::new(&prefix, &name).answered(accepted);
            }
            if first {
                self.settle(state, Kind::Routes, &from, &name);
            }
        }
    }

    /// Tells the sources which virtual hosts are wanted, where that has changed.
    pub(super) fn subscribe_hosts(&self, state: &mut State) {
        let mut sources = state.vhds.demanded.take_changed();
        sources.append(&mut state.vhds.changed);
        for source in sources {
            let names = state.vhds.demanded.names_of(&source);
            let interest = match (state.vhds.is_source(&source), names.is_empty()) {
                (false, _) => Interest::None,
                (true, true) => Interest::Wildcard,
                (true, false) => Interest::WildcardAnd(names),
            };
            self.0.subscriptions.set(Source::clone(&source), type_url::VIRTUAL_HOST, interest);
        }
    }
}

impl State {
    fn take_host(
        &mut self,
        source: &Source,
        resource: Resource,
        changed: &mut BTreeSet<(Arc<Source>, Arc<str>)>,
    ) -> Result<(), Box<(Resource, FieldError)>> {
        let routes = routes_of(&resource.name);
        let all = self.vhds.by_routes.iter_mut();
        let users = all.filter(|((_, name), hosts)| **name == *routes && *hosts.source == *source);
        let mut parsed: Option<Arc<VirtualHost>> = None;
        let mut verdict = Ok(());
        for (key, hosts) in users {
            let host = match &parsed {
                Some(host) => Arc::clone(host),
                None => match resources::parse_any::<Message, _>(&resource.body, parse::virtual_host) {
                    Ok(host) => Arc::clone(parsed.insert(Arc::new(host))),
                    Err(error) => return Err(Box::new((resource, error))),
                },
            };
            match hosts.check(&resource.name, &host) {
                Ok(()) => {
                    hosts.by_name.insert(resource.name.clone(), (resources::version(resource.clone()), host));
                    changed.insert(key.clone());
                }
                Err(error) => verdict = Err(error),
            }
        }
        verdict.map_err(|error| Box::new((resource, error)))
    }

    fn host_is_absent(&mut self, source: &Source, name: &str) {
        let source = Arc::new(source.clone());
        self.vhds.demanded.lost(&Wanted::VirtualHost { source, name: name.into() });
    }

    /// A request has no route: the host is asked for.
    pub(super) fn is_host_there(&self, source: &Source, name: &str) -> bool {
        !self.vhds.is_source(source) || self.vhds.resolver(source)(name)
    }

    fn prefixes_of(&self, source: &Source, name: &str) -> BTreeSet<String> {
        let Some(entry) = self.watched(Kind::Routes).get(source, name) else { return BTreeSet::new() };
        self.rds_prefixes(name, &entry.users)
    }

    /// Counts a virtual host that is asked for.
    pub(super) fn count_host(&self, source: &Source, name: &str) {
        let routes = routes_of(name);
        for ((from, known), hosts) in &self.vhds.by_routes {
            if **known == *routes && *hosts.source == *source {
                let prefixes = self.prefixes_of(from, known);
                prefixes.iter().for_each(|prefix| VhdsCounts::new(prefix, routes).asked());
            }
        }
    }
}
