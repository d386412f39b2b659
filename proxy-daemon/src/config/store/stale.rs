//! `endpoint_stale_after`: endpoints that have not been said again for too long are forgotten.

use std::sync::Arc;

use culvert_xds_client::source::Source;
use tokio::time::Instant;

use super::{
    Apply, ConfigStore,
    kinds::{Kind, Value},
    state::{Due, State},
    watched::Owner,
};

/// How long endpoints are good for.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    /// As the resource has it.
    after: Option<std::time::Duration>,
    /// Until then, where nothing comes before.
    until: Option<Instant>,
    /// They are not good any more.
    pub(super) over: bool,
}

impl<A: Apply> ConfigStore<A> {
    /// Endpoints have come; `new`: they are other than before.
    pub(super) fn keep_fresh(&self, state: &mut State, (source, name): (&Source, &str), new: Option<&Value>) {
        let Some(entry) = state.watched[Kind::Endpoints as usize].get_mut(source, name) else { return };
        if let Some(Value::Endpoints(endpoints)) = new {
            entry.freshness.after = endpoints.first().and_then(|group| group.policy.stale_after);
        }
        entry.freshness.over = false;
        let due = || Due::Stale(Arc::new(source.clone()), name.into());
        let until = entry.freshness.after.map(|after| Instant::now() + after);
        if until.is_some() {
            entry.subscribed.ends();
        }
        let before = std::mem::replace(&mut entry.freshness.until, until);
        before.into_iter().for_each(|at| state.not_due(at, due()));
        if let Some(at) = until {
            state.at(at, due());
        }
    }

    /// Endpoints may be too old.
    pub(super) fn forget_stale(&self, state: &mut State, source: &Source, name: &str, now: Instant) {
        let Some(entry) = state.watched[Kind::Endpoints as usize].get_mut(source, name) else { return };
        if entry.freshness.until.is_none_or(|until| until > now) {
            return;
        }
        (entry.freshness.until, entry.freshness.over) = (None, true);
        entry.subscribed.is_stale();
        let users = entry.users.clone();
        tracing::warn!("the endpoints {name:?} have not been said again in time: they are forgotten");
        for user in &users {
            if let Owner::Cluster(cluster) = &user.owner
                && state.is_active_cluster(cluster, user.version)
            {
                self.0.apply.set_endpoints(cluster, &[]);
            }
        }
    }
}
