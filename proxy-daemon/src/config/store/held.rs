//! Routes that are not swapped in yet, because clusters that they name still warm: make before break.
//!
//! Envoy swaps them in at once and answers 503 for such a cluster until it is warm. Here the routes before serve on until
//! then, so that traffic can be moved to a new cluster in one push without losing a request. The wait ends with that of the
//! clusters.

use std::{collections::BTreeSet, sync::Arc};

use culvert_xds_client::{ads::Resource, source::Source};

use super::{Apply, ConfigStore, kinds::Kind, resources, state::State, updates::UpdateId};
use crate::config::{model::RouteConfig, status::Version};

/// A version of a route configuration that waits.
pub(super) struct HeldRoutes {
    source: Source,
    name: String,
    routes: Arc<RouteConfig>,
    stored: Arc<Version>,
    /// What it waits for.
    clusters: BTreeSet<String>,
    update: UpdateId,
}

impl<A: Apply> ConfigStore<A> {
    /// Holds routes back, if there are others in force and a cluster that they name is new and warms.
    pub(super) fn hold(
        &self,
        state: &mut State,
        source: &Source,
        resource: &Resource,
        routes: &Arc<RouteConfig>,
        update: UpdateId,
    ) -> bool {
        let known = state.watched(Kind::Routes).get(source, &resource.name);
        if known.is_none_or(|known| known.stored.is_none()) {
            return false;
        }
        let clusters: BTreeSet<String> =
            routes.cluster_names().filter(|name| state.is_new_and_warming(name)).map(str::to_owned).collect();
        if clusters.is_empty() {
            return false;
        }
        state.updates.wait(update);
        state.held.push(HeldRoutes {
            source: source.clone(),
            name: resource.name.clone(),
            routes: Arc::clone(routes),
            stored: resources::version(resource.clone()),
            clusters,
            update,
        });
        true
    }

    /// Something newer has come, or nobody needs the routes any more.
    pub(super) fn drop_held(&self, state: &mut State, source: &Source, name: &str) {
        if let Some(index) = state.held.iter().position(|held| held.name == *name && held.source == *source) {
            let held = state.held.swap_remove(index);
            state.updates.part_done(held.update);
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
