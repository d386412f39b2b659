//! Routes that are not swapped in yet, because clusters that they name still warm: make before break.
//!
//! Envoy swaps them in at once and answers 503 for such a cluster until it is warm. Here the routes before serve on for
//! as long as the endpoints of the same push take to come, [`HELD`] at most, so that traffic can be moved to a new cluster
//! without losing a request. Routes are a whole: what else is new in them is held back as well, hence the limit.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use culvert_xds_client::{ads::Resource, source::Source};
use tokio::time::Instant;

use super::{
    Apply, ConfigStore,
    kinds::{Kind, Value},
    resources,
    state::{Due, State},
    updates::UpdateId,
};
use crate::config::{model::RouteConfig, status::Version};

/// How long routes wait for the clusters that they newly name.
const HELD: Duration = Duration::from_secs(1);

/// A version of a route configuration that waits.
pub(super) struct HeldRoutes {
    source: Source,
    name: String,
    routes: Arc<RouteConfig>,
    stored: Arc<Version>,
    /// What it waits for.
    clusters: BTreeSet<String>,
    /// And until when.
    until: Instant,
    update: UpdateId,
}

impl HeldRoutes {
    /// The version that waits, where it is one of this name.
    pub(super) fn version_of(&self, source: &Source, name: &str) -> Option<Arc<Version>> {
        (self.name == *name && self.source == *source).then(|| Arc::clone(&self.stored))
    }

    /// What it waits for, for people.
    pub(super) fn waits_for(&self) -> Vec<String> {
        self.clusters.iter().map(|name| format!("the cluster {name:?}")).collect()
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Holds routes back, if there are others in force and a cluster that only they name is new and warms. They take the
    /// place of others that wait, and have what is left of their time.
    pub(super) fn hold(
        &self,
        state: &mut State,
        source: &Source,
        resource: &Resource,
        routes: &Arc<RouteConfig>,
        update: UpdateId,
    ) -> bool {
        let before = self.drop_held(state, source, &resource.name);
        let known = state.watched(Kind::Routes).get(source, &resource.name);
        let Some(Value::Routes(in_force)) = known.and_then(|known| known.value.as_ref()) else { return false };
        let mut clusters: BTreeSet<String> =
            routes.cluster_names().filter(|name| state.is_new_and_warming(name)).map(str::to_owned).collect();
        if !clusters.is_empty() {
            for name in in_force.cluster_names() {
                clusters.remove(name);
            }
        }
        let now = Instant::now();
        let until = before.unwrap_or(now + HELD);
        if clusters.is_empty() || until <= now {
            return false;
        }
        let (name, version) = (&resource.name, &resource.version);
        tracing::info!(%name, %version, ?clusters, "routes wait for new clusters, {HELD:?} at most");
        state.updates.wait(update);
        state.at(until, Due::HeldRoutes);
        state.held.push(HeldRoutes {
            source: source.clone(),
            name: resource.name.clone(),
            routes: Arc::clone(routes),
            stored: resources::version(resource.clone()),
            clusters,
            until,
            update,
        });
        true
    }

    /// Something newer has come, or nobody needs the routes any more. Until when they would have waited.
    pub(super) fn drop_held(&self, state: &mut State, source: &Source, name: &str) -> Option<Instant> {
        let index = state.held.iter().position(|held| held.name == *name && held.source == *source)?;
        let held = state.held.swap_remove(index);
        state.updates.part_done(held.update);
        Some(held.until)
    }

    /// Routes have waited long enough: 503 for what is not warm yet, as in Envoy.
    pub(super) fn end_holds(&self, state: &mut State, now: Instant) {
        for held in state.held.iter_mut().filter(|held| held.until <= now) {
            let (name, clusters) = (&held.name, std::mem::take(&mut held.clusters));
            tracing::info!(%name, ?clusters, "routes come into force before the clusters that they name");
        }
    }

    /// Swaps in what waits for nothing any more.
    pub(super) fn let_go(&self, state: &mut State) {
        let all = std::mem::take(&mut state.held);
        for mut held in all {
            held.clusters.retain(|name| state.is_new_and_warming(name));
            if held.clusters.is_empty() {
                self.swap_in(state, &held.source, &held.name, held.stored, held.routes);
                state.updates.part_done(held.update);
            } else {
                state.held.push(held);
            }
        }
    }

    fn swap_in(&self, state: &mut State, source: &Source, name: &str, stored: Arc<Version>, routes: Arc<RouteConfig>) {
        let Some(entry) = state.watched[Kind::Routes as usize].get_mut(source, name) else { return };
        (entry.stored, entry.refused) = (Some(stored), None);
        entry.value = Some(Value::Routes(Arc::clone(&routes)));
        entry.subscribed.changed();
        self.put_routes(state, source, name, &routes);
    }
}

impl State {
    /// Whether the cluster is coming, and no version of it can be used yet.
    fn is_new_and_warming(&self, name: &str) -> bool {
        self.clusters.by_name.get(name).is_some_and(|entry| entry.active.is_none() && entry.warming.is_some())
    }
}
