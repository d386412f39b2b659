//! Clusters: of the bootstrap, and of CDS.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use culvert_xds_client::{
    ads::{Resource, Update},
    source::Source,
};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use tokio::time::Instant;

use super::{
    Apply, ConfigStore,
    kinds::{Kind, Need, Value, cluster_needs},
    refused::Refused,
    resources,
    state::{Due, State},
    updates::UpdateId,
    watched::{Owner, VersionId},
};
use crate::{
    config::{
        FieldError,
        model::{ClusterConfig, Discovery, LocalityEndpoints},
        parse,
        status::Version,
    },
    upstream::{ClusterChange, health_check::ClusterChecks},
};

/// How long what has been looked up waits for more of it.
pub(super) const GATHERED: Duration = Duration::from_millis(10);

/// All clusters.
#[derive(Default)]
pub(in crate::config) struct Clusters {
    pub(in crate::config) by_name: BTreeMap<Arc<str>, Entry>,
    /// Where the newest version of one was refused: that.
    pub(in crate::config) refused: Refused,
    /// How many are warming.
    pub(super) warming: usize,
    /// How many serve.
    pub(super) active: usize,
    /// How many look-ups of names of new versions have not ended.
    looking_up: usize,
    /// Those that have ended, and not been taken up.
    looked_up: Vec<LookedUp>,
}

/// The names of a cluster's version have been looked up.
struct LookedUp {
    name: Arc<str>,
    id: VersionId,
    /// `None`: that failed.
    found: Option<Arc<[LocalityEndpoints]>>,
}

/// One cluster; at least one of its versions is there.
#[derive(Default)]
pub(in crate::config) struct Entry {
    /// Of the bootstrap: CDS neither replaces nor removes it.
    pub(in crate::config) is_static: bool,
    /// Where it comes from: mostly one. The newest version of any of them is the one that counts, and it goes when none of
    /// them has it any more.
    sources: Vec<Arc<Source>>,
    pub(in crate::config) active: Option<ClusterVersion>,
    pub(in crate::config) warming: Option<Box<Warming>>,
}

impl Clusters {
    /// What the clusters that are warming are called in statistics.
    pub(super) fn warming_stat_names(&self) -> impl Iterator<Item = &str> {
        let warming = self.by_name.values().filter(|_| self.warming > 0).filter_map(|entry| entry.warming.as_ref());
        warming.map(|warming| &*warming.version.stat_name)
    }
}

impl Entry {
    /// A source has it.
    fn is_had_from(&mut self, source: &Arc<Source>) {
        if !self.sources.contains(source) {
            self.sources.reserve_exact(1);
            self.sources.push(Arc::clone(source));
        }
    }

    /// What one of its versions needs.
    pub(super) fn needs_of(&self, id: VersionId) -> Option<&[Need]> {
        let all = self.active.iter().chain(self.warming.iter().map(|warming| &warming.version));
        all.into_iter().find(|version| version.id == id).map(|version| &*version.needs)
    }
}

/// One version of a cluster.
pub(in crate::config) struct ClusterVersion {
    id: VersionId,
    /// `None`: of the bootstrap.
    pub(in crate::config) stored: Option<Arc<Version>>,
    pub(super) needs: Box<[Need]>,
    /// `cluster.<this>` in stats names.
    stat_name: Arc<str>,
}

/// A version that is not used yet.
pub(in crate::config) struct Warming {
    pub(in crate::config) version: ClusterVersion,
    config: Box<ClusterConfig>,
    /// How many of its needs are not there; the first look-up of its names is one.
    waiting: usize,
    /// Of STRICT_DNS: what its names were found to be.
    resolved: Option<Arc<[LocalityEndpoints]>>,
    /// Its hosts are being checked, as they are before it is used.
    checks: Option<Arc<ClusterChecks>>,
    /// What is answered once it is used.
    update: Option<UpdateId>,
}

impl<A: Apply> ConfigStore<A> {
    /// Takes an update of CDS.
    pub(super) fn take_clusters(&self, state: &mut State, source: &Source, update: Update, id: UpdateId) {
        let on_demand = state.demanded.is_in(source, &update);
        let source = &state.shared_source(source);
        let counts = &self.0.stats.clusters;
        let changes = || counts.added.value() + counts.modified.value() + counts.removed.value();
        let before = changes();
        state.clusters.refused.begin(source, &update);
        let mut rejected = false;
        for resource in update.added {
            if let Err(refused) = self.take_cluster(state, source, resource, id) {
                let (resource, error) = *refused;
                rejected = true;
                state.updates.reject(id, &resource.name, error.to_string());
                if !state.clusters.by_name.contains_key(resource.name.as_str()) {
                    state.cluster_is_decided(&resource.name.as_str().into());
                }
                state.clusters.refused.refuse(source, resource, error.to_string());
            }
        }
        for name in update.removed {
            self.remove_cluster(state, source, &name);
            state.cluster_is_absent(source, &name);
        }
        update.absent.iter().for_each(|name| state.cluster_is_absent(source, name));
        if on_demand {
            state.demanded.answered(!rejected);
        }
        if state.cds.is(source) {
            if changes() != before {
                self.0.stats.only_clusters.reloaded();
            }
            self.0.stats.clusters.answered(!rejected);
        }
    }

    fn take_cluster(
        &self,
        state: &mut State,
        source: &Arc<Source>,
        resource: Resource,
        id: UpdateId,
    ) -> Result<(), Box<(Resource, FieldError)>> {
        let name = resource.name.as_str();
        let known = state.clusters.by_name.get_mut(name);
        if known.as_ref().is_some_and(|known| known.is_static) {
            // As in Envoy: accepted, and without effect.
            tracing::info!(cluster = name, "CDS names a cluster of the bootstrap, which stays as it is");
            return Ok(());
        }
        if let Some(known) = known {
            if let Some(active) = &mut known.active
                && resources::is_unchanged(&mut active.stored, &resource)
            {
                state.clusters.refused.accept(source, name);
                known.is_had_from(source);
                // What was to replace it is not wanted any more.
                if let Some(warming) = known.warming.take() {
                    state.clusters.warming -= 1;
                    self.drop_warming_cluster(state, *warming);
                }
                return Ok(());
            }
            if let Some(warming) = &mut known.warming
                && resources::is_unchanged(&mut warming.version.stored, &resource)
            {
                state.clusters.refused.accept(source, name);
                // This update is in force no sooner than the one before.
                let before = warming.update.replace(id);
                known.is_had_from(source);
                state.updates.wait(id);
                before.into_iter().for_each(|before| state.updates.part_done(before));
                return Ok(());
            }
        }
        let parsed = resources::parse(name, &resource.body, |message: &Cluster| &message.name, parse::cluster);
        let checked = parsed.and_then(|config| {
            state.check_cluster(&config)?;
            state.check_needs(&cluster_needs(&config), &resource.body)?;
            Ok(config)
        });
        let config = match checked {
            Ok(config) => config,
            Err(error) => return Err(Box::new((resource, error))),
        };
        state.clusters.refused.accept(source, name);
        let name = Arc::clone(&config.name);
        self.add_cluster(state, config, Some(resources::version(resource)), Some(id));
        if let Some(entry) = state.clusters.by_name.get_mut(&name) {
            entry.is_had_from(source);
        }
        Ok(())
    }

    /// A new cluster, or a new version of one: in use when it has what it needs.
    pub(super) fn add_cluster(
        &self,
        state: &mut State,
        mut config: ClusterConfig,
        stored: Option<Arc<Version>>,
        update: Option<UpdateId>,
    ) {
        if let Some(all) = &state.bind {
            config.bind = Some(match config.bind.take() {
                Some(own) => Arc::new(Arc::unwrap_or_clone(own).over(all)),
                None => Arc::clone(all),
            });
        }
        let name = Arc::clone(&config.name);
        let id = state.new_version();
        let needs: Box<[Need]> = cluster_needs(&config).into();
        let mut waiting = state.acquire(&needs, &Owner::Cluster(Arc::clone(&name)), id, Instant::now());
        if config.discovery.dns().is_some_and(|options| options.wait_for_warm) {
            waiting += 1;
            let (store, name) = (self.clone(), Arc::clone(&name));
            let told = move |found| store.changed(|state| store.looked_up(state, LookedUp { name, id, found }));
            state.clusters.looking_up += 1;
            self.0.apply.resolve(&config, Box::new(told));
        }
        if let Some(update) = update {
            state.updates.wait(update);
        }
        let stat_name = if config.stat_name == *name { Arc::clone(&name) } else { config.stat_name.as_str().into() };
        let version = ClusterVersion { id, needs, stat_name, stored };
        let entry = state.clusters.by_name.entry(Arc::clone(&name)).or_default();
        entry.is_static = version.stored.is_none();
        match (&entry.active, &entry.warming) {
            (None, None) => self.0.stats.clusters.added.inc(),
            _ => self.0.stats.clusters.modified.inc(),
        }
        let warming =
            Box::new(Warming { version, config: Box::new(config), waiting, resolved: None, checks: None, update });
        match entry.warming.replace(warming) {
            Some(replaced) => self.drop_warming_cluster(state, *replaced),
            None => state.clusters.warming += 1,
        }
        if waiting == 0 {
            self.activate_cluster(state, &name);
        }
    }

    fn drop_warming_cluster(&self, state: &mut State, warming: Warming) {
        state.release(&warming.version.needs, warming.version.id);
        warming.update.into_iter().for_each(|update| state.updates.part_done(update));
    }

    /// A need of a cluster's version is there, or not waited for any more.
    pub(super) fn cluster_settled(&self, state: &mut State, name: &Arc<str>, id: VersionId) {
        let warming = state.clusters.by_name.get_mut(name).and_then(|entry| entry.warming.as_mut());
        let Some(warming) = warming.filter(|warming| warming.version.id == id) else { return };
        warming.waiting -= 1;
        if warming.waiting == 0 {
            self.activate_cluster(state, name);
        }
    }

    /// A look-up has ended. Each change of clusters costs as much as there are clusters, so those that end about the same time are
    /// taken up together, and a lone one at once.
    fn looked_up(&self, state: &mut State, ended: LookedUp) {
        let clusters = &mut state.clusters;
        clusters.looking_up -= 1;
        clusters.looked_up.push(ended);
        if clusters.looking_up == 0 {
            self.take_up_looked_up(state);
        } else if clusters.looked_up.len() == 1 {
            state.at(Instant::now() + GATHERED, Due::LookedUp);
        }
    }

    /// Takes up what has been looked up; where that failed a cluster begins with the hosts that it has, as in Envoy.
    pub(super) fn take_up_looked_up(&self, state: &mut State) {
        for LookedUp { name, id, found } in std::mem::take(&mut state.clusters.looked_up) {
            let warming = state.clusters.by_name.get_mut(&name).and_then(|entry| entry.warming.as_mut());
            let Some(warming) = warming.filter(|warming| warming.version.id == id) else { continue };
            warming.resolved = found;
            self.cluster_settled(state, &name, id);
        }
    }

    /// Begins to check the hosts of the warming version, where it has checks: it is used when each has been checked once.
    fn has_to_be_checked(&self, state: &mut State, name: &Arc<str>) -> bool {
        let Some(warming) = state.clusters.by_name.get(name).and_then(|entry| entry.warming.as_ref()) else {
            return false;
        };
        if warming.config.health.checks.is_empty() || warming.checks.is_some() {
            return false;
        }
        let id = warming.version.id;
        let endpoints = match warming.config.discovery {
            Discovery::Static => Arc::from(warming.config.endpoints.clone()),
            _ => warming.resolved.clone().or_else(|| state.endpoints_of(&warming.config)).unwrap_or_default(),
        };
        let (store, told) = (self.clone(), Arc::clone(name));
        let warm = Box::new(move || store.changed(|state| store.cluster_settled(state, &told, id)));
        let checks = self.0.apply.check_first(&warming.config, &endpoints, warm);
        let begun = checks.is_some();
        if let Some(warming) = state.clusters.by_name.get_mut(name).and_then(|entry| entry.warming.as_mut())
            && begun
        {
            warming.checks = checks;
            warming.waiting += 1;
        }
        begun
    }

    /// The warming version is used from now on.
    fn activate_cluster(&self, state: &mut State, name: &Arc<str>) {
        if self.has_to_be_checked(state, name) {
            return;
        }
        let Some(entry) = state.clusters.by_name.get_mut(name) else { return };
        let Some(warming) = entry.warming.take() else { return };
        let Warming { version, config, update, resolved, checks, .. } = *warming;
        state.clusters.warming -= 1;
        let before = entry.active.replace(version);
        let endpoints = resolved.or_else(|| state.endpoints_of(&config));
        state.changes.push(ClusterChange::Upsert(config, endpoints, checks));
        match before {
            Some(before) => state.release(&before.needs, before.id),
            None => {
                state.clusters.active += 1;
                state.cluster_is_decided(name);
            }
        }
        update.into_iter().for_each(|update| state.updates.part_done(update));
    }

    /// A source does not have a cluster any more.
    fn remove_cluster(&self, state: &mut State, source: &Source, name: &str) {
        let Some(entry) = state.clusters.by_name.get_mut(name).filter(|entry| !entry.is_static) else { return };
        entry.sources.retain(|known| **known != *source);
        if !entry.sources.is_empty() {
            return;
        }
        let Some((name, entry)) = state.clusters.by_name.remove_entry(name) else { return };
        if let Some(warming) = entry.warming {
            state.clusters.warming -= 1;
            self.drop_warming_cluster(state, *warming);
        }
        if let Some(active) = entry.active {
            state.clusters.active -= 1;
            state.release(&active.needs, active.id);
            state.changes.push(ClusterChange::Remove(name));
        }
        self.0.stats.clusters.removed.inc();
    }
}

impl State {
    /// A source, where it is that of CDS as all others hold it.
    fn shared_source(&self, source: &Source) -> Arc<Source> {
        let cds = self.cds.from.as_ref().map(|from| &from.source);
        cds.filter(|cds| ***cds == *source).map_or_else(|| Arc::new(source.clone()), Arc::clone)
    }

    /// The endpoints of a cluster, where EDS has sent them.
    fn endpoints_of(&self, config: &ClusterConfig) -> Option<Arc<[LocalityEndpoints]>> {
        let Discovery::Eds { endpoints } = &config.discovery else { return None };
        let entry = self.watched(Kind::Endpoints).get(&endpoints.from.source, &endpoints.name)?;
        if entry.freshness.over {
            return Some(Arc::default());
        }
        if let Some(Value::Endpoints(fresh)) = &entry.value {
            return Some(Arc::clone(fresh));
        }
        let stored = entry.stored.as_ref()?;
        match Kind::Endpoints.parse(&endpoints.name, &stored.body) {
            Ok(Value::Endpoints(parsed)) => Some(parsed),
            // It was taken as it is.
            _ => None,
        }
    }

    /// Which of `users` are clusters in use.
    pub(super) fn is_active_cluster(&self, name: &str, version: VersionId) -> bool {
        let active = self.clusters.by_name.get(name).and_then(|entry| entry.active.as_ref());
        active.is_some_and(|active| active.id == version)
    }

    /// The `cluster.<name>` of a cluster's statistics.
    pub(super) fn cluster_stat_name(&self, name: &str, version: VersionId) -> Option<Arc<str>> {
        let entry = self.clusters.by_name.get(name)?;
        let versions = entry.active.iter().chain(entry.warming.iter().map(|warming| &warming.version));
        versions.into_iter().find(|it| it.id == version).map(|it| Arc::clone(&it.stat_name))
    }
}
