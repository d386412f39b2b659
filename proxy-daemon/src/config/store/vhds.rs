//! VHDS: virtual hosts of route configurations of RDS, pushed by the server or asked for because of a request.
//!
//! The source is asked for all virtual hosts that it has for this node, as Envoy does, and on demand for
//! `<route configuration>/<host>` beside that. What comes is put beside the virtual hosts of the route configuration that its
//! name begins with. Those that belong to none are kept for one that comes later ([`Early`]): the server has been told that they
//! are in force, and does not send them again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Interest, Resource, Update, type_url},
    source::Source,
};
use envoy_types::pb::envoy::config::route::v3::VirtualHost as Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::{
    Apply, ConfigStore, counts::VhdsCounts, demanded::Demanded, kinds::Kind, refused::Refused, resources, state::State,
    updates::UpdateId,
};
use crate::{
    config::{
        FieldError,
        model::{RouteConfig, VirtualHost},
        parse,
        status::{Failure, Version},
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
    /// Those of them that have answered.
    answered: BTreeSet<Arc<Source>>,
    early: Early,
    /// Those of which this has changed.
    changed: BTreeSet<Arc<Source>>,
}

/// Virtual hosts whose route configurations are not there.
#[derive(Default)]
struct Early {
    by_source: BTreeMap<Arc<Source>, BTreeMap<String, Arc<Version>>>,
    /// Of their bodies.
    bytes: usize,
}

/// How many bytes of [`Early`] virtual hosts are kept.
const MAX_EARLY_BYTES: usize = 16 << 20;
/// What one costs besides its body.
const EARLY_BYTES: usize = 256;

impl Early {
    fn cost(name: &str, version: &Version) -> usize {
        version.body.value.len() + name.len() + EARLY_BYTES
    }

    fn keep(&mut self, source: &Arc<Source>, name: String, version: Arc<Version>) {
        self.remove(source, &name);
        let cost = Early::cost(&name, &version);
        if self.bytes + cost > MAX_EARLY_BYTES {
            tracing::warn!(%name, "too many virtual hosts have no route configuration: this one is passed over");
            return;
        }
        self.bytes += cost;
        self.by_source.entry(Arc::clone(source)).or_default().insert(name, version);
    }

    fn remove(&mut self, source: &Source, name: &str) {
        let Some(version) = self.by_source.get_mut(source).and_then(|names| names.remove(name)) else { return };
        self.bytes -= Early::cost(name, &version);
    }

    /// Those of a route configuration.
    fn take(&mut self, source: &Source, routes: &str) -> Vec<(String, Arc<Version>)> {
        let Some(names) = self.by_source.get_mut(source) else { return Vec::new() };
        let taken: Vec<_> = names.extract_if(.., |name, _| routes_of(name) == routes).collect();
        self.bytes -= taken.iter().map(|(name, version)| Early::cost(name, version)).sum::<usize>();
        taken
    }

    fn forget(&mut self, source: &Source) {
        let names = self.by_source.remove(source).unwrap_or_default();
        self.bytes -= names.iter().map(|(name, version)| Early::cost(name, version)).sum::<usize>();
    }
}

/// The virtual hosts of one route configuration.
struct Hosts {
    /// Where they come from.
    source: Arc<Source>,
    /// As it came.
    base: Arc<RouteConfig>,
    by_name: BTreeMap<String, (Arc<Version>, Arc<VirtualHost>)>,
    /// The virtual host of VHDS that has a domain; `None`: one of its own.
    domains: HashMap<String, Option<String>>,
    /// What finds them, as long as nothing changes.
    table: Option<Arc<RouteTable>>,
    /// The source has answered once.
    answered: bool,
}

impl Hosts {
    fn new(source: &Arc<Source>, base: &Arc<RouteConfig>, answered: bool) -> Hosts {
        Hosts {
            source: Arc::clone(source),
            base: Arc::clone(base),
            by_name: BTreeMap::new(),
            domains: HashMap::new(),
            table: None,
            answered,
        }
    }

    /// Another version of what they are put beside.
    fn set_base(&mut self, base: &Arc<RouteConfig>) {
        (self.base, self.table) = (Arc::clone(base), None);
        self.domains.clear();
        for (name, (_, host)) in &self.by_name {
            self.domains.extend(host.domains.iter().map(|domain| (domain.clone(), Some(name.clone()))));
        }
        let own = base.virtual_hosts.iter().flat_map(|host| &host.domains);
        self.domains.extend(own.map(|domain| (domain.clone(), None)));
    }

    fn insert(&mut self, name: &str, stored: Arc<Version>, host: Arc<VirtualHost>) {
        self.remove(name);
        self.table = None;
        self.domains.extend(host.domains.iter().map(|domain| (domain.clone(), Some(name.to_owned()))));
        self.by_name.insert(name.to_owned(), (stored, host));
    }

    /// Whether it was there.
    fn remove(&mut self, name: &str) -> bool {
        let Some((_, host)) = self.by_name.remove(name) else { return false };
        self.table = None;
        for domain in &host.domains {
            if self.domains.get(domain).is_some_and(|owner| owner.as_deref() == Some(name)) {
                self.domains.remove(domain);
            }
        }
        true
    }

    /// With the virtual hosts of VHDS after its own.
    fn merged(&self) -> Arc<RouteConfig> {
        if self.by_name.is_empty() {
            return Arc::clone(&self.base);
        }
        let mut merged = RouteConfig::clone(&self.base);
        merged.virtual_hosts.extend(self.by_name.values().map(|(_, host)| Arc::clone(host)));
        Arc::new(merged)
    }

    fn table(&mut self) -> Arc<RouteTable> {
        let table = self.table.take().unwrap_or_else(|| Arc::new(RouteTable::new(self.merged())));
        Arc::clone(self.table.insert(table))
    }

    /// Refuses a virtual host with a domain that another one has.
    fn check(&self, name: &str, host: &VirtualHost) -> Result<(), FieldError> {
        let is_taken = |domain: &&String| self.domains.get(*domain).is_some_and(|it| it.as_deref() != Some(name));
        match host.domains.iter().find(is_taken) {
            Some(domain) => {
                let text = format!("Only unique values for domains are permitted. Duplicate entry of domain {domain}");
                Err(FieldError::new("domains", text))
            }
            None => Ok(()),
        }
    }
}

/// The number of `RouteConfiguration.virtual_hosts`.
const VIRTUAL_HOSTS: u32 = 2;

/// The route configuration that a virtual host belongs to.
fn routes_of(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(routes, _)| routes)
}

impl AllHosts {
    /// Whether virtual hosts are had from there.
    pub(in crate::config) fn is_source(&self, source: &Source) -> bool {
        self.asked.contains(source)
    }

    /// Those in force, with where they come from and their names.
    pub(in crate::config) fn entries(&self) -> impl Iterator<Item = (&Arc<Source>, &String, &Arc<Version>)> {
        let all = self.by_routes.values();
        all.flat_map(|hosts| hosts.by_name.iter().map(move |(name, (stored, _))| (&hosts.source, name, stored)))
    }

    /// A route configuration as it is in force, for people: with its virtual hosts of VHDS after its own.
    pub(super) fn merged_version(&self, source: &Arc<Source>, name: &Arc<str>, stored: &Arc<Version>) -> Arc<Version> {
        let Some(hosts) = self.by_routes.get(&(Arc::clone(source), Arc::clone(name))) else {
            return Arc::clone(stored);
        };
        if hosts.by_name.is_empty() {
            return Arc::clone(stored);
        }
        let mut merged = Version::clone(stored);
        // Of messages that follow one another, lists are joined.
        for (host, _) in hosts.by_name.values() {
            encode_key(VIRTUAL_HOSTS, WireType::LengthDelimited, &mut merged.body.value);
            encode_varint(host.body.value.len() as u64, &mut merged.body.value);
            merged.body.value.extend_from_slice(&host.body.value);
        }
        Arc::new(merged)
    }

    /// Whether the virtual hosts of a route configuration have not come yet.
    pub(super) fn is_awaited(&self, source: &Source, name: &str) -> bool {
        let mut all = self.by_routes.iter();
        all.any(|((from, routes), hosts)| **routes == *name && **from == *source && !hosts.answered)
    }

    /// Tells whether a host is there that has been asked for as `<route configuration>/<host>`.
    fn resolver(&mut self, source: &Source) -> impl Fn(&str) -> bool + use<> {
        let all = self.by_routes.iter_mut().filter(|(_, hosts)| *hosts.source == *source);
        let tables = all.map(|((_, name), hosts)| (Arc::clone(name), hosts.table()));
        let tables: Vec<_> = tables.collect();
        move |alias| {
            let of = |name: &str| alias.strip_prefix(name)?.strip_prefix('/');
            tables.iter().any(|(name, table)| of(name).is_some_and(|host| table.virtual_host(host).is_some()))
        }
    }

    /// A route configuration is gone, or has its virtual hosts from elsewhere: they are kept.
    fn set_aside(&mut self, routes: &str, hosts: Hosts) {
        if self.like(&hosts.source, routes).is_some() {
            return;
        }
        for (name, (stored, _)) in hosts.by_name {
            self.early.keep(&hosts.source, name, stored);
        }
        self.refused.forget(&hosts.source, |name| routes_of(name) == routes);
    }

    /// A route configuration of this name, from wherever, that has its virtual hosts from this source.
    fn like(&self, source: &Arc<Source>, routes: &str) -> Option<&Hosts> {
        let mut all = self.by_routes.iter();
        all.find(|((_, name), hosts)| **name == *routes && hosts.source == *source).map(|(_, hosts)| hosts)
    }

    /// Puts virtual hosts that came before it beside a route configuration.
    fn take_early(&mut self, routes: &str, hosts: &mut Hosts) {
        if let Some(like) = self.like(&hosts.source, routes) {
            for (name, (stored, host)) in &like.by_name {
                if hosts.check(name, host).is_ok() {
                    hosts.insert(name, Arc::clone(stored), Arc::clone(host));
                }
            }
        }
        for (name, stored) in self.early.take(&hosts.source, routes) {
            let parsed = resources::parse_any::<Message, _>(&stored.body, parse::virtual_host);
            match parsed.and_then(|host| hosts.check(&name, &host).map(|()| host)) {
                Ok(host) => hosts.insert(&name, stored, Arc::new(host)),
                Err(error) => {
                    tracing::warn!(%name, "a virtual host that came before its route configuration is not used: {error}");
                    let failure = Failure { attempt: stored, details: error.to_string() };
                    self.refused.insert(&hosts.source, name, Arc::new(failure));
                }
            }
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
                let known = state.vhds.by_routes.remove(&key);
                let known = match known {
                    Some(hosts) if hosts.source != from.source => {
                        state.vhds.set_aside(name, hosts);
                        None
                    }
                    known => known,
                };
                let is_new = known.is_none();
                if is_new {
                    let prefixes = state.prefixes_of(source, name);
                    prefixes.iter().for_each(|prefix| VhdsCounts::new(prefix, name).asked());
                }
                let answered = state.vhds.answered.contains(&from.source);
                let mut hosts = known.unwrap_or_else(|| Hosts::new(&from.source, routes, answered));
                hosts.set_base(routes);
                if is_new {
                    state.vhds.take_early(name, &mut hosts);
                }
                let merged = hosts.merged();
                state.vhds.by_routes.insert(key.clone(), hosts);
                merged
            }
            None => {
                if let Some(hosts) = state.vhds.by_routes.remove(&key) {
                    state.vhds.set_aside(name, hosts);
                }
                Arc::clone(routes)
            }
        };
        state.vhds.find_sources();
        self.0.apply.set_routes(&key.0, &key.1, merged);
        state.routes_are_there(&key.0, &key.1);
    }

    /// Nobody needs a route configuration any more.
    pub(super) fn drop_hosts(&self, state: &mut State, source: &Arc<Source>, name: &Arc<str>) {
        if let Some(hosts) = state.vhds.by_routes.remove(&(Arc::clone(source), Arc::clone(name))) {
            state.vhds.set_aside(name, hosts);
            state.vhds.find_sources();
        }
    }

    /// Takes an update of VHDS.
    pub(super) fn take_hosts(&self, state: &mut State, source: &Source, update: Update, id: UpdateId) {
        state.vhds.refused.begin(source, &update);
        if state.vhds.is_source(source) {
            state.vhds.answered.insert(Arc::new(source.clone()));
        }
        let mut changed: BTreeSet<(Arc<Source>, Arc<str>)> = BTreeSet::new();
        let mut accepted = true;
        for resource in update.added {
            if let Err((resource, error)) = state.take_host(source, resource, &mut changed).map_err(|refused| *refused)
            {
                accepted = false;
                state.updates.reject(id, &resource.name, error.to_string());
                state.vhds.refused.refuse(source, resource, error.to_string());
            }
        }
        for name in &update.removed {
            state.vhds.early.remove(source, name);
            for (key, hosts) in state.vhds.by_routes.iter_mut().filter(|(_, hosts)| *hosts.source == *source) {
                if hosts.remove(name) {
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
        let mut sources = std::mem::take(&mut state.vhds.changed);
        for (source, changed) in state.vhds.demanded.take_changed() {
            if state.vhds.is_source(&source) && !sources.contains(&source) {
                self.0.subscriptions.set_names(Source::clone(&source), type_url::VIRTUAL_HOST, changed.names);
            } else {
                sources.insert(source);
            }
        }
        for source in sources {
            let names = state.vhds.demanded.names_of(&source);
            let interest = match (state.vhds.is_source(&source), names.is_empty()) {
                (false, _) => Interest::None,
                (true, true) => Interest::Wildcard,
                (true, false) => Interest::WildcardAnd(names),
            };
            if interest == Interest::None {
                // It sends everything again when it is asked again.
                state.vhds.answered.remove(&source);
                state.vhds.early.forget(&source);
            }
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
        let (mut verdict, mut is_used) = (Ok(()), false);
        for (key, hosts) in users {
            is_used = true;
            let host = match &parsed {
                Some(host) => Arc::clone(host),
                None => match resources::parse_any::<Message, _>(&resource.body, parse::virtual_host) {
                    Ok(host) => Arc::clone(parsed.insert(Arc::new(host))),
                    Err(error) => return Err(Box::new((resource, error))),
                },
            };
            match hosts.check(&resource.name, &host) {
                Ok(()) => {
                    hosts.insert(&resource.name, resources::version(resource.clone()), host);
                    changed.insert(key.clone());
                }
                Err(error) => verdict = Err(error),
            }
        }
        if let Err(error) = verdict {
            return Err(Box::new((resource, error)));
        }
        self.vhds.refused.accept(source, &resource.name);
        if !is_used && self.vhds.is_source(source) {
            let name = resource.name.clone();
            self.vhds.early.keep(&Arc::new(source.clone()), name, resources::version(resource));
        }
        Ok(())
    }

    fn host_is_absent(&mut self, source: &Source, name: &str) {
        let source = Arc::new(source.clone());
        self.vhds.demanded.lost(&Wanted::VirtualHost { source, name: name.into() });
    }

    /// A request has no route: the host is asked for.
    pub(super) fn is_host_there(&mut self, source: &Source, name: &str) -> bool {
        let mut all = self.vhds.by_routes.iter_mut().filter(|(_, hosts)| *hosts.source == *source);
        !self.vhds.asked.contains(source)
            || all.any(|((_, routes), hosts)| {
                let host = name.strip_prefix(&**routes).and_then(|host| host.strip_prefix('/'));
                host.is_some_and(|host| hosts.table().virtual_host(host).is_some())
            })
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
