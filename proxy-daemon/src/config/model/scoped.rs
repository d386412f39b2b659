use std::sync::Arc;

use super::{ConfigSource, MatchedHeader, RouteConfig};

/// The name under which the store keeps all scopes of one source.
pub const ALL_SCOPES: &str = "*";

/// A checked `ScopedRoutes`.
#[derive(Debug, Clone)]
pub struct ScopedRoutes {
    /// `http.<stat_prefix>.scoped_rds.<name>.` in stats names.
    pub name: Arc<str>,
    /// Makes a request's key, one fragment each.
    pub key_builder: Vec<FragmentBuilder>,
    /// Where the scopes come from.
    pub scopes: ScopeSource,
}

/// Where scopes come from.
#[derive(Debug, Clone)]
pub enum ScopeSource {
    /// Written into the listener. All of them hold their routes.
    Inline(Arc<[Arc<Scope>]>),
    /// The scoped route discovery service.
    Srds {
        /// Where the scopes come from.
        scopes: ConfigSource,
        /// Where the route configurations come from that scopes name.
        routes: ConfigSource,
    },
}

/// `HeaderValueExtractor`: a part of the first value of a header.
#[derive(Debug, Clone)]
pub struct FragmentBuilder {
    /// Which header.
    pub header: MatchedHeader,
    /// What stands between the elements of the value; empty: the value is one element.
    pub element_separator: Box<str>,
    /// Which element.
    pub pick: FragmentPick,
}

/// `HeaderValueExtractor.extract_type`
#[derive(Debug, Clone)]
pub enum FragmentPick {
    /// This element, from 0.
    Index(usize),
    /// What follows the key in the first element with that key.
    Element {
        /// Between key and value.
        separator: Box<str>,
        /// The key.
        key: Box<str>,
    },
}

/// A checked `ScopedRouteConfiguration`.
#[derive(Debug)]
pub struct Scope {
    /// Its name.
    pub name: Box<str>,
    /// The fragments that a request's key must have.
    pub key: Box<[Box<str>]>,
    /// The routes of the requests that have it.
    pub routes: ScopeRoutes,
}

/// The routes of a scope.
#[derive(Debug)]
pub enum ScopeRoutes {
    /// In the scope itself.
    Inline(Arc<RouteConfig>),
    /// To be had by RDS, by this name.
    Named {
        /// The name.
        name: Arc<str>,
        /// Not before a request needs them.
        on_demand: bool,
    },
}
