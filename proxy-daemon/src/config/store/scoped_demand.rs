//! Routes of scopes that are asked for when the first request needs them.
//!
//! They stay asked for as long as a scope names them. A request waits until they come, or until its own time is over: that
//! the server has none, or that they were refused, ends no wait, as in Envoy, for others may follow.

use std::sync::Arc;

use culvert_xds_client::source::Source;
use tokio::time::Instant;

use super::{
    kinds::{Kind, Need},
    state::State,
    watched::Owner,
};
use crate::{
    config::model::{ALL_SCOPES, ResourceRef, ScopeSource},
    on_demand::{WaitId, Waiter, Waiting, Wanted},
};

/// Who waits for the routes of a scope.
#[derive(Default)]
pub(in crate::config) struct RoutesDemanded {
    waiting: Waiting,
    /// Whoever may go on as soon as the data plane has what they waited for.
    over: Vec<Waiter>,
}

impl RoutesDemanded {
    /// Whoever may go on now.
    pub(super) fn over(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.over)
    }

    /// A request has gone.
    pub(super) fn take_back(&mut self, id: WaitId) {
        self.waiting.take_back(id);
    }

    fn end(&mut self, wanted: &Wanted) {
        let waiters = self.waiting.end(wanted);
        self.over.extend(waiters);
    }
}

impl State {
    /// A request of a scope has no routes: they are asked for, where a scope still names them.
    pub(super) fn ask_for_routes(&mut self, wanted: Wanted, waiter: Waiter) {
        let Wanted::Routes { scopes, source, name } = &wanted else { return };
        let is_there = self.watched(Kind::Routes).get(source, name).is_some_and(|entry| entry.value.is_some());
        let set = self.scopes.get_mut(scopes).filter(|_| !is_there);
        let Some(is_new) = set.and_then(|set| set.want(name)) else { return self.routes_demanded.over.push(waiter) };
        if is_new {
            self.need_routes(scopes, name);
            self.scopes_changed = true;
        }
        self.routes_demanded.waiting.add(wanted, waiter);
    }

    /// All listeners with these scopes need a route configuration from now on, each from where it has its routes.
    fn need_routes(&mut self, scopes: &Arc<Source>, name: &Arc<str>) {
        let Some(entry) = self.watched(Kind::Scopes).get(scopes, ALL_SCOPES) else { return };
        let now = Instant::now();
        for user in entry.users.clone() {
            let Owner::Listener(listener) = &user.owner else { continue };
            let known = self.listeners.by_name.get(listener);
            let Some(config) = known.and_then(|known| known.version(user.version)).cloned() else { continue };
            for manager in config.connection_managers() {
                let Some(ScopeSource::Srds { scopes: from, routes }) = manager.scoped().map(|it| &it.scopes) else {
                    continue;
                };
                let known = self.watched(Kind::Routes).get(&routes.source, name);
                if from.source != *scopes || known.is_some_and(|known| known.is_used_by(user.version)) {
                    continue;
                }
                let wanted = ResourceRef { name: Arc::clone(name), from: routes.clone() };
                let need = Need { optional: true, ..Need::new(Kind::Routes, wanted) };
                self.acquire(std::slice::from_ref(&need), &user.owner, user.version, now);
                if let Some(known) = self.listeners.by_name.get_mut(listener) {
                    known.add_need(user.version, need);
                }
            }
        }
    }

    /// The data plane has a route configuration.
    pub(super) fn routes_are_there(&mut self, source: &Arc<Source>, name: &Arc<str>) {
        if self.routes_demanded.waiting.is_empty() {
            return;
        }
        for scopes in self.scopes.keys() {
            let (scopes, source, name) = (Arc::clone(scopes), Arc::clone(source), Arc::clone(name));
            self.routes_demanded.end(&Wanted::Routes { scopes, source, name });
        }
    }

    /// The scopes of a source have changed: who waits for the routes of one that has gone waits no longer.
    pub(super) fn end_unnamed_routes(&mut self, scopes: &Source) {
        let set = self.scopes.get(scopes);
        let gone = |wanted: &&Wanted| match wanted {
            Wanted::Routes { scopes: of, name, .. } => {
                **of == *scopes && !set.is_some_and(|set| set.names_routes(name))
            }
            _ => false,
        };
        let gone: Vec<_> = self.routes_demanded.waiting.wanted().filter(gone).cloned().collect();
        gone.iter().for_each(|wanted| self.routes_demanded.end(wanted));
    }
}
