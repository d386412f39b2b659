//! Resources that are asked for by name: taken, handed to who needs them, given up.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Resource, Update},
    source::Source,
};

use super::{
    Apply, ConfigStore,
    kinds::{Kind, Value},
    read_ahead::Read,
    resources, secrets,
    state::{Due, State},
    updates::UpdateId,
    watched::{Owner, User},
};
use crate::config::{
    FieldError,
    model::{RouteConfig, RouteSource, ScopeSource},
};

impl<A: Apply> ConfigStore<A> {
    /// Takes an update of resources that are asked for by name.
    ///
    /// What the server removes stays in force for as long as somebody needs it, as in Envoy.
    pub(super) fn take_named(
        &self,
        state: &mut State,
        kind: Kind,
        source: &Source,
        (update, mut read): (Update, Read),
        id: UpdateId,
    ) {
        if kind == Kind::Scopes {
            return self.take_scopes(state, source, update, id);
        }
        let version: Arc<str> = update.version.as_str().into();
        if matches!(source, Source::File(_) | Source::Rest(_)) && update.added.is_empty() && update.unchanged.is_empty()
        {
            state.watched[kind as usize].of_mut(source).for_each(|entry| entry.subscribed.was_empty());
        }
        for name in &update.unchanged {
            if let Some(entry) = state.watched[kind as usize].get_mut(source, name) {
                entry.refused = None;
                self.answered(state, kind, (source, name), &version, true);
            }
        }
        // What does not exist is not waited for.
        for name in &update.absent {
            self.settle(state, kind, source, name);
        }
        for resource in update.added {
            let name = resource.name.clone();
            let result = self.take_one(state, kind, source, (resource, read.remove(&name)), id);
            self.answered(state, kind, (source, &name), &version, result.is_ok());
            if let Err(error) = result {
                state.updates.reject(id, &name, error.to_string());
            }
        }
        for name in update.removed {
            match kind {
                // In use, they stay, as in Envoy.
                Kind::Endpoints | Kind::Routes | Kind::Scopes | Kind::Secrets => {}
                Kind::Runtime => {
                    self.remove_runtime(state, source, &name);
                    self.answered(state, kind, (source, &name), &version, true);
                }
                Kind::ExtensionConfigs => {
                    self.remove_extension_config(state, source, &name);
                    self.answered(state, kind, (source, &name), &version, true);
                }
            }
        }
    }

    fn remove_runtime(&self, state: &mut State, source: &Source, name: &str) {
        let Some(entry) = state.watched[Kind::Runtime as usize].get_mut(source, name) else { return };
        (entry.stored, entry.refused, entry.value) = (None, None, None);
        self.0.apply.set_runtime(source, name, HashMap::new());
        self.settle(state, Kind::Runtime, source, name);
    }

    fn take_one(
        &self,
        state: &mut State,
        kind: Kind,
        source: &Source,
        (resource, read): (Resource, Option<Result<Value, FieldError>>),
        id: UpdateId,
    ) -> Result<(), FieldError> {
        let name = resource.name.clone();
        // Nobody asked for it: accepted and forgotten, as in Envoy.
        let Some(entry) = state.watched[kind as usize].get_mut(source, &name) else { return Ok(()) };
        if !entry.freshness.over && entry.is_unchanged(&resource) {
            entry.refused = None;
            if kind == Kind::Endpoints {
                self.keep_fresh(state, (source, &name), None);
            }
            self.drop_held(state, source, &name);
            return Ok(());
        }
        let users = entry.users.clone();
        let parsed = read.unwrap_or_else(|| kind.parse(&name, &resource.body));
        let parsed = parsed.and_then(|value| state.check(&value, (source, &name), &users).map(|()| value));
        let Some(entry) = state.watched[kind as usize].get_mut(source, &name) else { return Ok(()) };
        if let Ok(Value::Endpoints(endpoints)) = &parsed
            && !entry.freshness.over
            && entry.has_in_another_order(&name, &resource, endpoints)
        {
            (entry.stored, entry.refused) = (Some(resources::version(resource)), None);
            self.keep_fresh(state, (source, &name), None);
            return Ok(());
        }
        let parsed = parsed.and_then(|value| entry.places.parse(&value).map(|filters| (value, filters)));
        let parsed = parsed.and_then(|(value, filters)| {
            filters.iter().try_for_each(|(_, filter)| state.check_filter(&**filter, &resource.body))?;
            Ok((value, filters))
        });
        match &parsed {
            Ok((Value::Routes(routes), _)) if self.hold(state, source, &resource, routes, id) => return Ok(()),
            _ => self.drop_held(state, source, &name),
        };
        let Some(entry) = state.watched[kind as usize].get_mut(source, &name) else { return Ok(()) };
        let followed = match &parsed {
            Ok((Value::Secret(read), _)) => self.follow_secret(&resource, read).map(Some),
            _ => Ok(None),
        };
        let parsed = followed.and_then(|followed| parsed.map(|(value, filters)| (value, filters, followed)));
        let result = match parsed {
            Ok((value, filters, followed)) => {
                (entry.stored, entry.files) = match followed {
                    Some((stored, files)) => (Some(stored), files),
                    None => (Some(resources::version(resource)), None),
                };
                entry.refused = None;
                entry.subscribed.changed();
                entry.value = Some(value.clone());
                if kind == Kind::ExtensionConfigs {
                    entry.places.reloaded();
                }
                filters.into_iter().for_each(|(place, factory)| self.0.apply.set_filter(&place, Some(factory)));
                self.deliver(state, source, &name, &users, &value);
                if kind == Kind::Endpoints {
                    self.keep_fresh(state, (source, &name), Some(&value));
                }
                Ok(())
            }
            Err(error) => {
                if kind == Kind::Secrets && entry.stored.is_none() {
                    entry.files = self.follow_refused(&resource);
                }
                entry.refused = Some(resources::failure(resource, error.to_string()));
                Err(error)
            }
        };
        // A resource that is refused is not waited for any longer, as in Envoy.
        // Routes with VHDS are there when the first virtual hosts are.
        if kind != Kind::Routes || !state.vhds.is_awaited(source, &name) {
            self.settle(state, kind, source, &name);
        }
        if matches!(kind, Kind::Endpoints | Kind::Secrets)
            && let Some(entry) = state.watched[kind as usize].get_mut(source, &name)
        {
            entry.value = None;
        }
        result
    }

    /// Hands a resource to those who use it already. Who warms finds it when it is done with that.
    fn deliver(&self, state: &mut State, source: &Source, name: &str, users: &[User], value: &Value) {
        match value {
            Value::Endpoints(endpoints) => {
                for user in users {
                    if let Owner::Cluster(cluster) = &user.owner
                        && state.is_active_cluster(cluster, user.version)
                    {
                        self.0.apply.set_endpoints(cluster, endpoints);
                    }
                }
            }
            Value::Routes(routes) => {
                self.put_routes(state, source, name, routes);
            }
            Value::Runtime(values) => self.0.apply.set_runtime(source, name, HashMap::clone(values)),
            // Each place has what was read for it.
            Value::ExtensionConfig(_) => {}
            Value::Secret(read) => self.0.apply.set_secret(secrets::name(source, name), read.secret.clone()),
        }
    }

    /// Counts the answer to one resource of an update.
    pub(super) fn answered(
        &self,
        state: &mut State,
        kind: Kind,
        (source, name): (&Source, &str),
        version: &Arc<str>,
        accepted: bool,
    ) {
        if let Some(entry) = state.watched[kind as usize].get_mut(source, name) {
            entry.subscribed.answered(version, accepted);
            entry.places.answered(version, accepted);
        }
    }

    /// A resource is there, or was refused, or is waited for no longer.
    pub(super) fn settle(&self, state: &mut State, kind: Kind, source: &Source, name: &str) {
        let Some(entry) = state.watched[kind as usize].get_mut(source, name) else { return };
        let deadline = entry.deadline;
        let waited = entry.settle();
        if let Some(at) = deadline {
            state.not_due(at, Due::Resource(kind, Arc::new(source.clone()), name.into()));
        }
        for (owner, version) in waited {
            match owner {
                Owner::Cluster(name) => self.cluster_settled(state, &name, version),
                Owner::Listener(name) => self.listener_settled(state, &name, version),
                Owner::Process => state.first_waiting -= 1,
            }
        }
    }

    /// A resource was waited for long enough.
    pub(super) fn give_up(&self, state: &mut State, kind: Kind, source: &Source, name: &str) {
        let Some(entry) = state.watched[kind as usize].get_mut(source, name) else { return };
        if entry.settled {
            return;
        }
        let users = entry.users.clone();
        for user in &users {
            match &user.owner {
                Owner::Cluster(cluster) => {
                    tracing::warn!(%cluster, "{} {name:?} did not come in time: going on without", kind.noun());
                }
                Owner::Listener(listener) => {
                    tracing::warn!(%listener, "{} {name:?} did not come in time: going on without", kind.noun());
                }
                Owner::Process => tracing::warn!("{} {name:?} did not come in time: going on without", kind.noun()),
            }
        }
        if let Some(entry) = state.watched[kind as usize].get_mut(source, name) {
            entry.subscribed.timed_out();
            entry.places.timed_out();
        }
        self.settle(state, kind, source, name);
    }

    /// Forgets what nobody needs any more, and has the data plane forget it.
    pub(super) fn drop_unused(&self, state: &mut State) {
        for kind in Kind::ALL {
            for (source, name) in state.watched[kind as usize].take_unused() {
                match kind {
                    Kind::Routes => {
                        self.drop_held(state, &source, &name);
                        self.drop_hosts(state, &source, &name);
                        self.0.apply.remove_routes(&source, &name);
                    }
                    Kind::Scopes => {
                        state.scopes.remove(&source);
                        state.end_unnamed_routes(&source);
                        self.0.apply.remove_scopes(&source);
                    }
                    Kind::Secrets => self.0.apply.remove_secret(&secrets::name(&source, &name)),
                    Kind::Endpoints | Kind::Runtime | Kind::ExtensionConfigs => {}
                }
            }
        }
    }
}

impl State {
    /// What a resource is held to besides its own fields.
    pub(super) fn check(&self, value: &Value, named: (&Source, &str), users: &[User]) -> Result<(), FieldError> {
        match value {
            Value::Routes(routes) => self.check_routes(routes, false),
            Value::Secret(read) => self.check_secret(&read.secret, named, users),
            _ => Ok(()),
        }
    }

    /// `validate`: whether routes are held to the clusters that there are where they do not say so themselves.
    pub(super) fn check_routes(&self, routes: &RouteConfig, validate: bool) -> Result<(), FieldError> {
        if !routes.validate_clusters.unwrap_or(validate) {
            return Ok(());
        }
        match routes.unknown_cluster(|name| self.clusters.by_name.contains_key(name)) {
            Some((path, text)) => Err(FieldError::new(path, text)),
            None => Ok(()),
        }
    }

    /// The `http.<prefix>` of the connection managers that use a route configuration.
    pub(super) fn rds_prefixes(&self, name: &str, users: &[User]) -> BTreeSet<String> {
        let listeners = users.iter().filter_map(|user| match &user.owner {
            Owner::Listener(listener) => self.listeners.by_name.get(listener)?.version(user.version),
            _ => None,
        });
        let managers = listeners.flat_map(|listener| listener.connection_managers());
        let uses = managers.filter(|manager| match &manager.routes {
            RouteSource::Rds(rds) => *rds.name == *name,
            RouteSource::Scoped(scoped) => match &scoped.scopes {
                ScopeSource::Srds { scopes: from, .. } => {
                    self.scopes.get(&from.source).is_some_and(|set| set.names_routes(name))
                }
                ScopeSource::Inline(_) => false,
            },
            RouteSource::Static(_) => false,
        });
        uses.map(|manager| manager.stat_prefix.clone()).collect()
    }
}
