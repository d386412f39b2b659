//! The routes that the workers use: by RDS, by SRDS, and of listeners.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use culvert_xds_client::source::Source;

use crate::{
    config::model::{RouteConfig, RouteSource, Scope, ScopeRoutes, ScopeSource},
    http::{RouteSlot, Routes, ScopeSlot, ScopeTable},
};

/// Hands out the slots in which connection managers find their routes, and fills them.
#[derive(Default)]
pub(super) struct RouteSlots(Mutex<Slots>);

#[derive(Default)]
struct Slots {
    routes: HashMap<(Arc<Source>, Arc<str>), Arc<RouteSlot>>,
    scopes: HashMap<Arc<Source>, Scopes>,
}

/// The scopes of one source.
#[derive(Default)]
struct Scopes {
    /// `None`: nothing has come yet.
    known: Option<Arc<[Arc<Scope>]>>,
    /// By where their route configurations come from.
    slots: HashMap<Arc<Source>, Arc<ScopeSlot>>,
}

impl RouteSlots {
    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Whatever a panic left behind in here is replaced by the next change.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn set_routes(&self, source: &Arc<Source>, name: &Arc<str>, routes: Arc<RouteConfig>) {
        let slot = self.lock().route(source, name);
        slot.set(routes);
    }

    pub(super) fn remove_routes(&self, source: &Arc<Source>, name: &Arc<str>) {
        self.lock().routes.remove(&(Arc::clone(source), Arc::clone(name)));
    }

    pub(super) fn set_scopes(&self, source: &Arc<Source>, known: Arc<[Arc<Scope>]>) {
        let mut slots = self.lock();
        let scopes = slots.scopes.entry(Arc::clone(source)).or_default();
        scopes.known = Some(Arc::clone(&known));
        for (routes, slot) in scopes.slots.clone() {
            slot.set(slots.table(&known, Some(&routes)));
        }
        slots.forget_unused();
    }

    pub(super) fn remove_scopes(&self, source: &Arc<Source>) {
        let mut slots = self.lock();
        slots.scopes.remove(source);
        slots.forget_unused();
    }

    /// Where a connection manager finds its routes.
    pub(super) fn of(&self, source: &RouteSource) -> Routes {
        match source {
            RouteSource::Static(routes) => Routes::Single(filled(routes)),
            RouteSource::Rds(wanted) => Routes::Single(self.lock().route(&wanted.from.source, &wanted.name)),
            RouteSource::Scoped(config) => {
                let slot = match &config.scopes {
                    ScopeSource::Inline(scopes) => {
                        let slot = Arc::<ScopeSlot>::default();
                        slot.set(self.lock().table(scopes, None));
                        slot
                    }
                    ScopeSource::Srds { scopes, routes } => self.lock().scoped(&scopes.source, &routes.source),
                };
                Routes::Scoped(Arc::clone(config), slot)
            }
        }
    }
}

impl Slots {
    fn route(&mut self, source: &Arc<Source>, name: &Arc<str>) -> Arc<RouteSlot> {
        Arc::clone(self.routes.entry((Arc::clone(source), Arc::clone(name))).or_default())
    }

    /// Forgets the slots of routes on demand that nobody has asked for, when the scopes that named them have gone.
    fn forget_unused(&mut self) {
        self.routes.retain(|_, slot| slot.is_ready() || Arc::strong_count(slot) > 1);
    }

    fn scoped(&mut self, source: &Arc<Source>, routes: &Arc<Source>) -> Arc<ScopeSlot> {
        let scopes = self.scopes.entry(Arc::clone(source)).or_default();
        if let Some(slot) = scopes.slots.get(routes) {
            return Arc::clone(slot);
        }
        let slot = Arc::<ScopeSlot>::default();
        scopes.slots.insert(Arc::clone(routes), Arc::clone(&slot));
        if let Some(known) = scopes.known.clone() {
            slot.set(self.table(&known, Some(routes)));
        }
        slot
    }

    /// `from`: where the route configurations come from that scopes name.
    fn table(&mut self, scopes: &[Arc<Scope>], from: Option<&Arc<Source>>) -> ScopeTable {
        ScopeTable::new(scopes, |scope| match (&scope.routes, from) {
            (ScopeRoutes::Inline(routes), _) => filled(routes),
            (ScopeRoutes::Named { name, .. }, Some(from)) => self.route(from, name),
            // The parser lets no such scope pass.
            (ScopeRoutes::Named { .. }, None) => Arc::default(),
        })
    }
}

fn filled(routes: &Arc<RouteConfig>) -> Arc<RouteSlot> {
    let slot = Arc::<RouteSlot>::default();
    slot.set(Arc::clone(routes));
    slot
}
