//! Listeners: of the bootstrap, and of LDS.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Resource, Update},
    source::Source,
};
use envoy_types::pb::envoy::config::listener::v3::Listener as Message;
use tokio::time::Instant;

use super::{
    Apply, ConfigStore,
    addresses::Addresses,
    draining::Draining,
    kinds::{Need, listener_needs},
    refused::Refused,
    resources,
    state::{Due, Phase, RETRY, State},
    updates::UpdateId,
    watched::{Owner, VersionId},
};
use crate::{
    config::{FieldError, model::Listener, parse, status::Version},
    listener::Prints,
};

/// All listeners.
#[derive(Default)]
pub(in crate::config) struct Listeners {
    pub(in crate::config) by_name: BTreeMap<Arc<str>, Entry>,
    /// Of all their versions.
    pub(super) addresses: Addresses,
    /// How many have an active version.
    pub(super) active: usize,
    /// How many have a version that warms.
    pub(super) warming: usize,
    /// Where the newest version of one was refused: that.
    pub(in crate::config) refused: Refused,
    /// Versions that were replaced or removed, while their connections finish.
    pub(in crate::config) draining: Draining,
}

/// One listener; at least one of its versions is there.
#[derive(Default)]
pub(in crate::config) struct Entry {
    /// Of the bootstrap: LDS neither replaces nor removes it.
    pub(in crate::config) is_static: bool,
    pub(in crate::config) active: Option<ListenerVersion>,
    /// Handed to the workers, who have not said yet that they have it; the newest last.
    starting: Vec<ListenerVersion>,
    pub(in crate::config) warming: Option<ListenerVersion>,
    /// Why the newest version that was accepted does not serve.
    pub(in crate::config) failure: Option<String>,
}

/// One version of a listener.
pub(in crate::config) struct ListenerVersion {
    id: VersionId,
    /// `None`: of the bootstrap.
    pub(in crate::config) stored: Option<Arc<Version>>,
    pub(in crate::config) config: Arc<Listener>,
    /// What has been asked for.
    pub(super) needs: Vec<Need>,
    /// How many of its needs are not there.
    waiting: usize,
    bound: Binding,
    /// What is answered once it is bound, or serves.
    update: Option<UpdateId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binding {
    Pending,
    Bound,
    /// To be tried again.
    Failed,
}

impl Entry {
    /// The configuration of one of its versions.
    pub(super) fn version(&self, id: VersionId) -> Option<&Arc<Listener>> {
        self.version_of(id).map(|version| &version.config)
    }

    fn version_of(&self, id: VersionId) -> Option<&ListenerVersion> {
        let mut all = self.active.iter().chain(&self.starting).chain(&self.warming);
        all.find(|version| version.id == id)
    }

    fn version_of_mut(&mut self, id: VersionId) -> Option<&mut ListenerVersion> {
        let mut all = self.active.iter_mut().chain(&mut self.starting).chain(&mut self.warming);
        all.find(|version| version.id == id)
    }

    /// What one of its versions has asked for.
    pub(super) fn needs_of(&self, id: VersionId) -> Option<&[Need]> {
        let all = self.active.iter().chain(&self.starting).chain(&self.warming);
        all.into_iter().find(|version| version.id == id).map(|version| &*version.needs)
    }

    /// One of its versions needs something else as well, and does not wait for it.
    pub(super) fn add_need(&mut self, id: VersionId, need: Need) {
        if let Some(version) = self.version_of_mut(id) {
            version.needs.push(need);
        }
    }

    /// What is to serve next.
    pub(super) fn newest(&self) -> Option<&ListenerVersion> {
        self.warming.as_ref().or(self.starting.last())
    }

    /// Whether something of it is about to serve.
    pub(super) fn is_pending(&self) -> bool {
        !self.starting.is_empty() || self.warming.as_ref().is_some_and(|warming| warming.bound != Binding::Failed)
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Takes an update of LDS. Removed ones go first, so that others may have their addresses, as in Envoy.
    pub(super) fn take_listeners(&self, state: &mut State, source: &Source, update: Update, id: UpdateId) {
        state.listeners.refused.begin(source, &update);
        for name in update.removed {
            self.remove_listener(state, &name);
        }
        let mut rejected = false;
        for resource in update.added {
            if let Err(refused) = self.take_listener(state, source, resource, id) {
                let (resource, error) = *refused;
                rejected = true;
                state.updates.reject(id, &resource.name, error.to_string());
                state.listeners.refused.refuse(source, resource, error.to_string());
            }
        }
        self.0.stats.listeners.answered(!rejected);
    }

    fn take_listener(
        &self,
        state: &mut State,
        source: &Source,
        resource: Resource,
        id: UpdateId,
    ) -> Result<(), Box<(Resource, FieldError)>> {
        let name = resource.name.as_str();
        let known = state.listeners.by_name.get_mut(name);
        if known.as_ref().is_some_and(|known| known.is_static) {
            // As in Envoy: accepted, and without effect.
            tracing::info!(listener = name, "LDS names a listener of the bootstrap, which stays as it is");
            return Ok(());
        }
        if let Some(known) = known {
            let newest = known.warming.as_mut().or(known.starting.last_mut()).or(known.active.as_mut());
            if let Some(newest) = newest
                && resources::is_unchanged(&mut newest.stored, &resource)
            {
                state.listeners.refused.accept(source, name);
                // One that could not be bound is not in force, and is said so again.
                if let (Some(failure), Binding::Failed) = (&known.failure, newest.bound) {
                    state.updates.reject(id, &resource.name, failure.clone());
                } else if let Some(before) = newest.update.replace(id) {
                    state.updates.wait(id);
                    state.updates.part_done(before);
                } else {
                    newest.update = None;
                }
                return Ok(());
            }
        }
        let parsed = resources::parse(name, &resource.body, |message: &Message| &message.name, parse::listener);
        let checked = parsed.and_then(|listener| {
            state.check_listener(&listener)?;
            state.check_listener_needs(&listener, &resource.body)?;
            state.check_addresses(&listener)?;
            Ok(listener)
        });
        let listener = match checked {
            Ok(listener) => listener,
            Err(error) => return Err(Box::new((resource, error))),
        };
        state.listeners.refused.accept(source, name);
        self.add_listener(state, listener, Some(resources::version(resource)), Some(id));
        Ok(())
    }

    /// A new listener, or a new version of one: it is bound at once, and serves when it has what it needs.
    pub(super) fn add_listener(
        &self,
        state: &mut State,
        config: Listener,
        stored: Option<Arc<Version>>,
        update: Option<UpdateId>,
    ) {
        let (name, id) = (Arc::clone(&config.name), state.new_version());
        let config = Arc::new(config);
        if let Some(update) = update {
            state.updates.wait(update);
        }
        let entry = state.listeners.by_name.entry(Arc::clone(&name)).or_default();
        entry.is_static = stored.is_none();
        entry.failure = None;
        let stats = &self.0.stats.listeners;
        if entry.active.is_none() && entry.starting.is_empty() && entry.warming.is_none() {
            stats.added.inc();
        } else {
            stats.modified.inc();
        }
        state.overriding += usize::from(overrides(&config));
        // Until the clusters are there, it waits for them alone.
        let version =
            ListenerVersion { id, stored, config, needs: Vec::new(), waiting: 1, bound: Binding::Pending, update };
        state.listeners.addresses.add(&version.config);
        let replaced = entry.warming.replace(version);
        state.listeners.warming += usize::from(replaced.is_none());
        if state.phase >= Phase::Listeners {
            self.ask_for_needs(state, &name);
        }
        if let Some(replaced) = replaced {
            self.drop_listener_version(state, replaced);
        }
        self.prepare(state, &name);
    }

    /// The clusters are there: what else the listener needs is asked for.
    pub(super) fn ask_for_needs(&self, state: &mut State, name: &Arc<str>) {
        let Some(warming) = state.listeners.by_name.get(name).and_then(|entry| entry.warming.as_ref()) else { return };
        let (id, config) = (warming.id, Arc::clone(&warming.config));
        let needs = listener_needs(&config, &state.scopes);
        let waiting = state.acquire(&needs, &Owner::Listener(Arc::clone(name)), id, Instant::now());
        self.fill_places(state, &config);
        let warming = state.listeners.by_name.get_mut(name).and_then(|entry| entry.warming.as_mut());
        let Some(warming) = warming else { return };
        (warming.needs, warming.waiting) = (needs, waiting);
        self.start_if_ready(state, name);
    }

    /// The scopes of a source have changed: its users need other route configurations from now on.
    pub(super) fn change_needs(&self, state: &mut State, owner: &Arc<str>, id: VersionId) {
        let version = |state: &State| {
            let version = state.listeners.by_name.get(owner)?.version_of(id)?;
            Some((Arc::clone(&version.config), version.needs.clone()))
        };
        let Some((config, before)) = version(state) else { return };
        let needs = listener_needs(&config, &state.scopes);
        let key = |need: &Need| (need.kind, Arc::clone(&need.wanted.name), Arc::clone(&need.wanted.from.source));
        let known: HashSet<_> = before.iter().map(key).collect();
        let wanted: HashSet<_> = needs.iter().map(key).collect();
        let new: Vec<_> = needs.iter().filter(|need| !known.contains(&key(need))).cloned().collect();
        let gone: Vec<_> = before.into_iter().filter(|need| !wanted.contains(&key(need))).collect();
        let waiting = state.acquire(&new, &Owner::Listener(Arc::clone(owner)), id, Instant::now());
        let entry = state.listeners.by_name.get_mut(owner);
        if let Some(version) = entry.and_then(|entry| entry.version_of_mut(id)) {
            version.needs = needs;
            version.waiting += waiting;
        }
        state.release(&gone, id);
    }

    fn prepare(&self, state: &State, name: &Arc<str>) {
        let Some(warming) = state.listeners.by_name.get(name).and_then(|entry| entry.warming.as_ref()) else { return };
        let prints = warming.stored.as_ref().and_then(|stored| Prints::of(&stored.body.value));
        let (store, name, id) = (self.clone(), Arc::clone(name), warming.id);
        let told = Box::new(move |result| store.changed(|state| store.bound(state, &name, id, result)));
        self.0.apply.prepare_listener(Arc::clone(&warming.config), prints, told);
    }

    /// A version has been bound, or could not be.
    fn bound(&self, state: &mut State, name: &Arc<str>, id: VersionId, result: Result<(), String>) {
        let Some(entry) = state.listeners.by_name.get_mut(name) else { return };
        let Some(warming) = entry.warming.as_mut().filter(|warming| warming.id == id) else { return };
        match result {
            Ok(()) => {
                if warming.bound == Binding::Failed {
                    tracing::info!(listener = %name, "listener is bound after all");
                }
                warming.bound = Binding::Bound;
                entry.failure = None;
                // A listener that still waits is answered for: servers may send routes only then.
                if warming.waiting > 0
                    && let Some(update) = warming.update.take()
                {
                    state.updates.part_done(update);
                }
                self.start_if_ready(state, name);
            }
            Err(error) => self.not_bound(state, name, error),
        }
    }

    /// The warming version cannot serve: that is said once, and tried again.
    fn not_bound(&self, state: &mut State, name: &Arc<str>, error: String) {
        let Some(entry) = state.listeners.by_name.get_mut(name) else { return };
        let Some(warming) = entry.warming.as_mut() else { return };
        let again = std::mem::replace(&mut warming.bound, Binding::Failed) == Binding::Failed;
        entry.failure = Some(error.clone());
        let (id, update) = (warming.id, warming.update.take());
        if !again {
            self.0.stats.listeners.failed.inc();
            // Then that is the end, and whoever ends says why.
            let fatal = entry.is_static && state.phase < Phase::Running;
            if fatal {
                self.0.progress.send_modify(|progress| {
                    progress.fatal.get_or_insert_with(|| format!("listener {name:?}: {error}"));
                });
            }
            if update.is_none() && !fatal {
                tracing::error!(listener = %name, %error, "listener is not serving; trying again every second");
            }
        }
        if let Some(update) = update {
            state.updates.reject(update, name, error);
            state.updates.part_done(update);
        }
        state.at(Instant::now() + RETRY, Due::Listener(Arc::clone(name), id));
    }

    /// A listener that could not be bound is tried again.
    pub(super) fn retry_listener(&self, state: &mut State, name: &Arc<str>, id: VersionId) {
        let warming = state.listeners.by_name.get(name).and_then(|entry| entry.warming.as_ref());
        if warming.is_some_and(|warming| warming.id == id && warming.bound == Binding::Failed) {
            self.prepare(state, name);
        }
    }

    /// A need of a listener's version is there, or not waited for any more.
    pub(super) fn listener_settled(&self, state: &mut State, name: &Arc<str>, id: VersionId) {
        let warming = state.listeners.by_name.get_mut(name).and_then(|entry| entry.warming.as_mut());
        let Some(warming) = warming.filter(|warming| warming.id == id) else { return };
        warming.waiting -= 1;
        self.start_if_ready(state, name);
    }

    /// Hands the warming version to the workers, if it is bound and has what it needs.
    fn start_if_ready(&self, state: &mut State, name: &Arc<str>) {
        let Some(entry) = state.listeners.by_name.get_mut(name) else { return };
        let ready = |warming: &mut ListenerVersion| warming.waiting == 0 && warming.bound == Binding::Bound;
        let Some(version) = entry.warming.take_if(ready) else { return };
        state.listeners.warming -= 1;
        let (store, id, whom) = (self.clone(), version.id, Arc::clone(name));
        entry.starting.push(version);
        let told = Box::new(move |result| store.changed(|state| store.started(state, &whom, id, result)));
        self.0.apply.start_listener(name, told);
    }

    /// The workers serve a version, or it could not be.
    fn started(&self, state: &mut State, name: &Arc<str>, id: VersionId, result: Result<(), String>) {
        let Some(entry) = state.listeners.by_name.get_mut(name) else { return };
        let Some(index) = entry.starting.iter().position(|version| version.id == id) else { return };
        let mut version = entry.starting.remove(index);
        match result {
            Ok(()) => {
                self.0.stats.listeners.succeeded.inc();
                let update = version.update.take();
                let prints = |version: &ListenerVersion| Prints::of(&version.stored.as_ref()?.body.value);
                let new = prints(&version);
                let before = entry.active.replace(version);
                state.listeners.active += usize::from(before.is_none());
                if let Some(before) = before {
                    let kept = prints(&before).zip(new).filter(|(old, new)| old.rest == new.rest);
                    let gone = kept.map(|(old, new)| old.gone_in(&new));
                    if gone.is_some() {
                        self.0.stats.only_listeners.in_place_updated.inc();
                    }
                    state.drain_listener(name, before.stored.as_ref(), gone);
                    self.drop_listener_version(state, before);
                }
                update.into_iter().for_each(|update| state.updates.part_done(update));
            }
            // Something newer is on its way: it is that which is to be tried.
            Err(_) if entry.warming.is_some() => self.drop_listener_version(state, version),
            Err(error) => {
                entry.warming = Some(version);
                state.listeners.warming += 1;
                self.not_bound(state, name, error);
            }
        }
    }

    fn drop_listener_version(&self, state: &mut State, version: ListenerVersion) {
        state.overriding -= usize::from(overrides(&version.config));
        state.listeners.addresses.remove(&version.config);
        state.release(&version.needs, version.id);
        version.update.into_iter().for_each(|update| state.updates.part_done(update));
    }

    fn remove_listener(&self, state: &mut State, name: &str) {
        if state.listeners.by_name.get(name).is_none_or(|entry| entry.is_static) {
            return;
        }
        let Some(entry) = state.listeners.by_name.remove(name) else { return };
        state.listeners.active -= usize::from(entry.active.is_some());
        state.listeners.warming -= usize::from(entry.warming.is_some());
        if let Some(active) = &entry.active {
            state.drain_listener(&name.into(), active.stored.as_ref(), None);
        }
        for version in entry.warming.into_iter().chain(entry.starting).chain(entry.active) {
            self.drop_listener_version(state, version);
        }
        self.0.apply.remove_listener(name);
        self.0.stats.listeners.removed.inc();
    }
}

/// Whether the listener needs the offloaded services.
fn overrides(listener: &Listener) -> bool {
    let mut filters = listener.connection_managers().flat_map(|manager| &manager.http_filters);
    filters.any(|filter| filter.source.needs_offloaded_services())
}
