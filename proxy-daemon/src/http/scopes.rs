//! Scoped routes: which of many route configurations a request's key stands for.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::{BuildHasher, Hasher, RandomState},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use hashbrown::HashTable;
use http::request::Parts;

use super::{
    RouteRef, RouteSlot,
    route_match::{MatchCx, authority},
    route_table::RouteCache,
};
use crate::config::model::{
    FragmentBuilder, FragmentPick, MatchedHeader, Scope, ScopeRoutes, ScopeSource, ScopedRoutes,
};
use crate::on_demand::Wanted;

/// Scopes by their keys.
#[derive(Debug)]
pub struct ScopeTable {
    /// Keyed anew for each table: what keys collide is nobody's to choose.
    hasher: RandomState,
    by_key: HashTable<usize>,
    scopes: Vec<(Arc<Scope>, Arc<RouteSlot>)>,
}

impl ScopeTable {
    /// Indexes `scopes`, of which `routes` gives the routes. Of a key that occurs twice the last scope has it.
    pub fn new(scopes: &[Arc<Scope>], mut routes: impl FnMut(&Scope) -> Arc<RouteSlot>) -> ScopeTable {
        let scopes: Vec<_> = scopes.iter().map(|scope| (Arc::clone(scope), routes(scope))).collect();
        let mut table =
            ScopeTable { hasher: RandomState::new(), by_key: HashTable::with_capacity(scopes.len()), scopes };
        let fragments = |index: usize| table.scopes[index].0.key.iter().map(|fragment| &**fragment);
        let hash = |index: usize| hash(&table.hasher, fragments(index));
        for index in 0..table.scopes.len() {
            let of_scope = hash(index);
            match table.by_key.find_mut(of_scope, |known| fragments(*known).eq(fragments(index))) {
                Some(known) => *known = index,
                None => drop(table.by_key.insert_unique(of_scope, index, |known| hash(*known))),
            }
        }
        table
    }

    /// The scope that a request belongs to. Neither copies nor allocates.
    fn find(&self, builder: &[FragmentBuilder], request: &Parts) -> Option<usize> {
        let fragments = || builder.iter().map_while(|fragment| extract(fragment, request));
        let hash = hash(&self.hasher, fragments());
        let is_key = |index: &usize| {
            let key = &self.scopes[*index].0.key;
            key.len() == builder.len() && key.iter().map(|fragment| &**fragment).eq(fragments())
        };
        self.by_key.find(hash, is_key).copied()
    }
}

/// The hash of a key; fragments end where they end: `a`, `bc` is not `ab`, `c`.
fn hash<'a>(hasher: &RandomState, fragments: impl Iterator<Item = &'a str>) -> u64 {
    let mut state = hasher.build_hasher();
    for fragment in fragments {
        state.write(fragment.as_bytes());
        state.write_u8(0xff);
    }
    state.finish()
}

/// A fragment of a request's key. Of a header that came several times the first value counts, as in Envoy.
fn extract<'a>(builder: &FragmentBuilder, request: &'a Parts) -> Option<&'a str> {
    let value = match &builder.header {
        MatchedHeader::Method => request.method.as_str(),
        MatchedHeader::Path => request.uri.path_and_query()?.as_str(),
        MatchedHeader::Authority => authority(request),
        MatchedHeader::Scheme => request.uri.scheme_str().unwrap_or("http"),
        MatchedHeader::Name(name) => std::str::from_utf8(request.headers.get(name)?.as_bytes()).ok()?,
    };
    let separator = &*builder.element_separator;
    match &builder.pick {
        FragmentPick::Index(index) if separator.is_empty() => (*index == 0).then_some(value),
        FragmentPick::Index(index) => value.split(separator).nth(*index),
        FragmentPick::Element { separator: between, key } => {
            let pick = |element: &'a str| {
                let (name, rest) = element.split_once(&**between).unwrap_or((element, ""));
                (name == &**key).then_some(rest)
            };
            if separator.is_empty() { pick(value) } else { value.split(separator).find_map(pick) }
        }
    }
}

/// Where a connection manager finds its scopes: filled once from the listener, or again and again by SRDS.
#[derive(Debug, Default)]
pub struct ScopeSlot {
    table: ArcSwapOption<ScopeTable>,
    version: AtomicU64,
}

impl ScopeSlot {
    /// Replaces the scopes.
    pub fn set(&self, table: ScopeTable) {
        self.table.store(Some(Arc::new(table)));
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// Where a connection manager finds its routes.
#[derive(Debug, Clone)]
pub enum Routes {
    /// In one route configuration.
    Single(Arc<RouteSlot>),
    /// In one for each scope.
    Scoped(Arc<ScopedRoutes>, Arc<ScopeSlot>),
}

/// A connection's view of its manager's [`Routes`].
#[derive(Debug)]
pub(super) enum RouteFinder {
    Single(RouteCache),
    Scoped(ScopeCache),
}

/// A connection's view of a [`ScopeSlot`], and of the routes of those scopes that its requests belonged to.
#[derive(Debug)]
pub(super) struct ScopeCache {
    config: Arc<ScopedRoutes>,
    slot: Arc<ScopeSlot>,
    version: Cell<u64>,
    table: RefCell<Option<Arc<ScopeTable>>>,
    routes: RefCell<HashMap<usize, Rc<RouteCache>>>,
    filters: Arc<[Arc<str>]>,
}

impl RouteFinder {
    /// `filters` are the names of the connection manager's filters.
    pub(super) fn new(routes: &Routes, filters: &Arc<[Arc<str>]>) -> RouteFinder {
        match routes {
            Routes::Single(slot) => RouteFinder::Single(RouteCache::new(Arc::clone(slot), Arc::clone(filters))),
            Routes::Scoped(config, slot) => RouteFinder::Scoped(ScopeCache {
                config: Arc::clone(config),
                slot: Arc::clone(slot),
                filters: Arc::clone(filters),
                version: Cell::new(0),
                table: RefCell::default(),
                routes: RefCell::default(),
            }),
        }
    }

    /// The route of a request; `None` where no scope, virtual host or route matches.
    pub(super) fn route(&self, request: &Parts, cx: &MatchCx<'_>) -> Option<RouteRef> {
        match self {
            RouteFinder::Single(routes) => routes.route(request, cx),
            RouteFinder::Scoped(scopes) => scopes.routes(request)?.route(request, cx),
        }
    }
}

impl RouteFinder {
    /// Removes the `internal_only_headers` of the configuration that a request's route is looked for in.
    pub(super) fn remove_internal_only(&self, request: &mut Parts) {
        match self {
            RouteFinder::Single(routes) => routes.remove_internal_only(request),
            RouteFinder::Scoped(scopes) => {
                if let Some(routes) = scopes.routes(request) {
                    routes.remove_internal_only(request);
                }
            }
        }
    }

    /// What is to be asked for where a request has no route: the routes of its scope, or its virtual host.
    pub(super) fn on_demand(&self, request: &Parts) -> Option<Wanted> {
        match self {
            RouteFinder::Single(routes) => routes.virtual_host_on_demand(request),
            RouteFinder::Scoped(scopes) => {
                let routes = scopes.routes(request)?;
                if routes.is_empty() {
                    scopes.routes_on_demand(request)
                } else {
                    routes.virtual_host_on_demand(request)
                }
            }
        }
    }
}

impl ScopeCache {
    /// The routes of a request's scope, to be asked for.
    fn routes_on_demand(&self, request: &Parts) -> Option<Wanted> {
        let ScopeSource::Srds { scopes, routes } = &self.config.scopes else { return None };
        let table = self.table.borrow();
        let table = table.as_ref()?;
        let scope = &table.scopes[table.find(&self.config.key_builder, request)?].0;
        let ScopeRoutes::Named { name, .. } = &scope.routes else { return None };
        let (scopes, source) = (Arc::clone(&scopes.source), Arc::clone(&routes.source));
        Some(Wanted::Routes { scopes, source, name: Arc::clone(name) })
    }

    /// The routes of a request's scope.
    fn routes(&self, request: &Parts) -> Option<Rc<RouteCache>> {
        let version = self.slot.version.load(Ordering::Acquire);
        if version != self.version.get() {
            self.version.set(version);
            self.table.replace(self.slot.table.load_full());
            self.routes.borrow_mut().clear();
        }
        let table = self.table.borrow();
        let table = table.as_ref()?;
        let scope = table.find(&self.config.key_builder, request)?;
        let mut routes = self.routes.borrow_mut();
        let known = routes.entry(scope);
        let new = || Rc::new(RouteCache::new(Arc::clone(&table.scopes[scope].1), Arc::clone(&self.filters)));
        Some(Rc::clone(known.or_insert_with(new)))
    }
}

#[cfg(test)]
#[path = "scopes_tests.rs"]
mod tests;
