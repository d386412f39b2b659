//! Scopes, of SRDS: all of a source are taken together, for no two may have the same key.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Resource, Update},
    source::Source,
};
use envoy_types::pb::envoy::config::route::v3::ScopedRouteConfiguration;

use super::{
    Apply, ConfigStore, counts::ScopedCounts, kinds::Kind, refused::Refused, resources, state::State,
    updates::UpdateId, watched::Owner,
};
use crate::config::{
    FieldError,
    model::{ALL_SCOPES, HttpConnectionManagerConfig, Scope, ScopeRoutes, ScopeSource},
    parse,
    status::{Failure, Scoped, Version},
};

/// By where they come from.
pub(in crate::config) type AllScopes = BTreeMap<Arc<Source>, ScopeSet>;

/// The scopes of one source.
#[derive(Default)]
pub(in crate::config) struct ScopeSet {
    pub(in crate::config) by_name: BTreeMap<String, Entry>,
    /// Where the newest version of one was refused: that.
    pub(in crate::config) refused: Refused,
    /// The route configurations that are asked for because of them, and whether listeners wait for each: not for one that a
    /// request has asked for.
    named_routes: BTreeMap<Arc<str>, bool>,
    /// Those that are asked for when a request needs them, be they asked for or not.
    on_demand: BTreeSet<Arc<str>>,
}

/// A scope in force.
#[derive(Clone)]
pub(in crate::config) struct Entry {
    pub(in crate::config) stored: Option<Arc<Version>>,
    scope: Arc<Scope>,
}

impl ScopeSet {
    /// The route configurations that are asked for because of the scopes, each once, and whether listeners wait for it.
    pub(super) fn named_routes(&self) -> impl Iterator<Item = (&Arc<str>, bool)> {
        self.named_routes.iter().map(|(name, waits)| (name, *waits))
    }

    pub(super) fn names_routes(&self, name: &str) -> bool {
        self.named_routes.contains_key(name)
    }

    /// Finds out what is to be asked for. Routes on demand that have been asked for still are, as long as a scope names them.
    fn find_routes(&mut self) {
        let before = std::mem::take(&mut self.named_routes);
        self.on_demand.clear();
        for entry in self.by_name.values() {
            match &entry.scope.routes {
                ScopeRoutes::Named { name, on_demand: false } => drop(self.named_routes.insert(Arc::clone(name), true)),
                ScopeRoutes::Named { name, on_demand: true } => {
                    self.on_demand.insert(Arc::clone(name));
                    if before.contains_key(name) {
                        self.named_routes.entry(Arc::clone(name)).or_insert(false);
                    }
                }
                ScopeRoutes::Inline(_) => {}
            }
        }
    }

    /// Asks for routes on demand; whether they were not asked for before, and `None` where no scope names them.
    pub(super) fn want(&mut self, name: &Arc<str>) -> Option<bool> {
        if self.names_routes(name) {
            return Some(false);
        }
        let known = self.on_demand.get(name)?;
        self.named_routes.insert(Arc::clone(known), false);
        Some(true)
    }

    /// Takes new versions of scopes. Of two scopes with one key the one that is in force already, or came first, has it;
    /// the other keeps its last good version, as long as nobody else has taken that one's key.
    fn replace(&mut self, new: Vec<(String, Entry)>) -> Vec<(String, Entry, String)> {
        let mut before: HashMap<String, Entry> = HashMap::new();
        for (name, _) in &new {
            before.extend(self.by_name.remove_entry(name));
        }
        let mut keys: HashMap<Box<[Box<str>]>, String> =
            self.by_name.iter().map(|(name, entry)| (entry.scope.key.clone(), name.clone())).collect();
        let mut refused = Vec::new();
        for (name, entry) in new {
            // A refusal brings the version before back, which may take its key from one that was accepted: each name goes
            // through here twice at most.
            let mut next = Some((name, entry));
            while let Some((name, entry)) = next.take() {
                let Some(owner) = keys.get(&entry.scope.key).cloned() else {
                    keys.insert(entry.scope.key.clone(), name.clone());
                    self.by_name.insert(name, entry);
                    continue;
                };
                let Some(old) = before.remove(&name) else {
                    refused.push((name.clone(), entry, conflict(&owner, &name)));
                    continue;
                };
                refused.push((name.clone(), entry, conflict(&owner, &name)));
                if let Some(usurper) = keys.insert(old.scope.key.clone(), name.clone())
                    && let Some(entry) = self.by_name.remove(&usurper)
                {
                    // Its key is free again only for the one that had it.
                    next = Some((usurper, entry));
                }
                self.by_name.insert(name, old);
            }
        }
        refused
    }
}

fn conflict(first: &str, second: &str) -> String {
    format!("scope key conflict found, first scope is '{first}', second scope is '{second}'")
}

impl<A: Apply> ConfigStore<A> {
    /// Takes an update of SRDS.
    pub(super) fn take_scopes(&self, state: &mut State, source: &Source, update: Update, id: UpdateId) {
        // Nobody asked for it: accepted and forgotten, as in Envoy.
        let Some(entry) = state.watched[Kind::Scopes as usize].get(source, ALL_SCOPES) else { return };
        let users = entry.users.clone();
        let source = Arc::new(source.clone());
        let mut set = state.scopes.remove(&source).unwrap_or_default();
        set.refused.begin(&source, &update);
        let mut changed = false;
        for name in &update.removed {
            changed |= set.by_name.remove(name).is_some();
        }
        let version: Arc<str> = update.version.as_str().into();
        let (mut new, mut accepted) = (Vec::new(), true);
        let mut refuse = |set: &mut ScopeSet, state: &mut State, name: &str, attempt: Arc<Version>, details: String| {
            accepted = false;
            state.updates.reject(id, name, details.clone());
            set.refused.insert(&source, name.to_owned(), Arc::new(Failure { attempt, details }));
        };
        for resource in update.added {
            let name = resource.name.clone();
            let known = set.by_name.get_mut(&name);
            if known.is_some_and(|known| resources::is_unchanged(&mut known.stored, &resource)) {
                set.refused.accept(&source, &name);
                continue;
            }
            let parsed = parse_scope(state, &resource);
            let stored = resources::version(resource);
            match parsed {
                Ok(scope) => new.push((name, Entry { stored: Some(stored), scope: Arc::new(scope) })),
                Err(error) => refuse(&mut set, state, &name, stored, error.to_string()),
            }
        }
        let count = new.len();
        new.iter().for_each(|(name, _)| set.refused.accept(&source, name));
        let conflicts = set.replace(new);
        changed |= conflicts.len() < count;
        for (name, entry, details) in conflicts {
            if let Some(attempt) = entry.stored {
                refuse(&mut set, state, &name, attempt, details);
            }
        }
        set.find_routes();
        let scopes: Arc<[_]> = set.by_name.values().map(|entry| Arc::clone(&entry.scope)).collect();
        state.scopes.insert(Arc::clone(&source), set);
        state.end_unnamed_routes(&source);
        state.scopes_changed = true;
        for counts in state.scoped_managers(&source) {
            counts.updated(changed);
        }
        self.answered(state, Kind::Scopes, (&source, ALL_SCOPES), &version, accepted);
        if changed {
            self.0.apply.set_scopes(&source, scopes);
            for user in users {
                if let Owner::Listener(listener) = &user.owner {
                    self.change_needs(state, listener, user.version);
                }
            }
        }
        self.settle(state, Kind::Scopes, &source, ALL_SCOPES);
    }
}

fn parse_scope(state: &State, resource: &Resource) -> Result<Scope, FieldError> {
    let named: fn(&ScopedRouteConfiguration) -> &str = |message| &message.name;
    let scope = resources::parse(&resource.name, &resource.body, named, parse::scoped_route)?;
    if let ScopeRoutes::Inline(routes) = &scope.routes {
        // As in Envoy, like routes within a listener.
        let checked = state.check_routes(routes, true);
        checked.map_err(|error| FieldError::new(format!("route_configuration.{}", error.path), error.message))?;
    }
    Ok(scope)
}

impl State {
    /// The connection managers whose scopes come from this source.
    fn users_of_scopes(&self, source: &Source) -> Vec<Arc<HttpConnectionManagerConfig>> {
        let Some(entry) = self.watched(Kind::Scopes).get(source, ALL_SCOPES) else { return Vec::new() };
        let listeners = entry.users.iter().filter_map(|user| match &user.owner {
            Owner::Listener(listener) => self.listeners.by_name.get(listener)?.version(user.version),
            _ => None,
        });
        let managers = listeners.flat_map(|listener| listener.connection_managers());
        let uses = managers.filter(|manager| {
            let scopes = manager.scoped().map(|scoped| &scoped.scopes);
            matches!(scopes, Some(ScopeSource::Srds { scopes, .. }) if *scopes.source == *source)
        });
        uses.cloned().collect()
    }

    /// What is counted for them, each once.
    pub(super) fn scoped_managers(&self, source: &Source) -> Vec<ScopedCounts> {
        self.scoped_names(source).into_iter().map(|(prefix, name)| ScopedCounts::new(&prefix, &name)).collect()
    }

    /// Their `stat_prefix`, and the name of their scopes.
    pub(super) fn scoped_names(&self, source: &Source) -> BTreeSet<(String, Arc<str>)> {
        let managers = self.users_of_scopes(source);
        let names = managers.iter().filter_map(|it| Some((it.stat_prefix.clone(), it.scoped()?.name.clone())));
        names.collect()
    }

    /// For `/config_dump`: nothing of a source that has not answered, as in Envoy.
    pub(super) fn scoped_now(&self) -> Vec<Scoped> {
        let mut all = Vec::new();
        for (source, set) in &self.scopes {
            let managers = self.users_of_scopes(source);
            let names: BTreeSet<_> = managers.iter().filter_map(|manager| Some(&manager.scoped()?.name)).collect();
            let scopes: Vec<_> = set.by_name.values().filter_map(|entry| entry.stored.clone()).collect();
            all.extend(names.into_iter().map(|name| Scoped { name: Arc::clone(name), scopes: scopes.clone() }));
        }
        all
    }

    /// Sets the gauges of scopes.
    pub(super) fn count_scopes(&self) {
        for (source, set) in &self.scopes {
            for manager in self.users_of_scopes(source) {
                let Some(scoped) = manager.scoped() else { continue };
                let named = set.by_name.values().filter_map(|entry| match &entry.scope.routes {
                    ScopeRoutes::Named { name, on_demand } => Some((name, *on_demand)),
                    ScopeRoutes::Inline(_) => None,
                });
                // As in Envoy: those whose routes are asked for, be they there or not.
                let active = named.clone().filter(|(name, _)| set.names_routes(name)).count();
                let on_demand = named.filter(|(_, on_demand)| *on_demand).count();
                let counts = ScopedCounts::new(&manager.stat_prefix, &scoped.name);
                counts.scopes(set.by_name.len(), active, on_demand);
            }
        }
    }
}
