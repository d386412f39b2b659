//! Chooses the virtual host by name and the route by its first match.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    ops::Deref,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use http::request::Parts;

use crate::config::model::{
    HeaderMatcher, HeaderMutations, HeaderValueMatch, MatchedHeader, PathMatch, QueryParameterMatcher, Route,
    RouteConfig, RouteMatch, VirtualHost,
};
use crate::on_demand::Wanted;

/// A route configuration with the index of its virtual hosts.
#[derive(Debug)]
pub struct RouteTable {
    /// As configured.
    pub config: Arc<RouteConfig>,
    exact: HashMap<String, usize>,
    /// `*.suffix` and `prefix.*` by their text without the star; the lengths, longest first, bound the search.
    suffix: HashMap<String, usize>,
    suffix_lengths: Vec<usize>,
    prefix: HashMap<String, usize>,
    prefix_lengths: Vec<usize>,
    any: Option<usize>,
}

impl RouteTable {
    /// Indexes `config`.
    pub fn new(config: Arc<RouteConfig>) -> RouteTable {
        let (mut exact, mut suffix, mut prefix, mut any) = (HashMap::new(), HashMap::new(), HashMap::new(), None);
        for (index, host) in config.virtual_hosts.iter().enumerate() {
            for domain in &host.domains {
                if domain == "*" {
                    any = Some(index);
                } else if let Some(text) = domain.strip_prefix('*') {
                    suffix.insert(text.to_owned(), index);
                } else if let Some(text) = domain.strip_suffix('*') {
                    prefix.insert(text.to_owned(), index);
                } else {
                    exact.insert(domain.clone(), index);
                }
            }
        }
        let (suffix_lengths, prefix_lengths) = (lengths(&suffix), lengths(&prefix));
        RouteTable { config, exact, suffix, suffix_lengths, prefix, prefix_lengths, any }
    }

    /// The virtual host of a host name, by Envoy's order: exact, longest suffix, longest prefix, `*`.
    pub fn virtual_host(&self, authority: &str) -> Option<usize> {
        let name = if self.config.ignore_port_in_host_matching { without_port(authority) } else { authority };
        // Host names are nearly always lower case already.
        let folded;
        let name = if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            folded = name.to_ascii_lowercase();
            folded.as_str()
        } else {
            name
        };
        if let Some(index) = self.exact.get(name) {
            return Some(*index);
        }
        // A wildcard stands for at least one character.
        let by_suffix = self.suffix_lengths.iter().filter(|length| **length < name.len());
        let mut by_suffix = by_suffix.filter_map(|length| self.suffix.get(name.get(name.len() - length..)?));
        let by_prefix = self.prefix_lengths.iter().filter(|length| **length < name.len());
        let mut by_prefix = by_prefix.filter_map(|length| self.prefix.get(name.get(..*length)?));
        by_suffix.next().or_else(|| by_prefix.next()).copied().or(self.any)
    }

    fn find(&self, request: &Parts, random: u64) -> Option<(usize, usize)> {
        let host = self.virtual_host(authority(request))?;
        let routes = &self.config.virtual_hosts[host].routes;
        let route = routes.iter().position(|route| matches(&route.route_match, request, random))?;
        Some((host, route))
    }
}

fn lengths(map: &HashMap<String, usize>) -> Vec<usize> {
    let lengths: std::collections::BTreeSet<usize> = map.keys().map(String::len).collect();
    lengths.into_iter().rev().collect()
}

/// The host of a request: HTTP/2's `:authority`, or HTTP/1's `host`.
pub fn authority(request: &Parts) -> &str {
    match request.uri.authority() {
        Some(authority) => authority.as_str(),
        None => request.headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default(),
    }
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(':') => host,
        _ => authority,
    }
}

fn matches(rule: &RouteMatch, request: &Parts, random: u64) -> bool {
    path_matches(&rule.path, rule.case_sensitive, request.uri.path())
        && rule.headers.iter().all(|matcher| header_matches(matcher, request))
        && (rule.query_parameters.is_empty()
            || rule.query_parameters.iter().all(|matcher| query_matches(matcher, request.uri.query())))
        && rule.runtime_fraction.as_ref().is_none_or(|share| share.includes(random))
        && (!rule.grpc || super::headers::is_grpc(&request.headers))
}

fn path_matches(rule: &PathMatch, case_sensitive: bool, path: &str) -> bool {
    let same = |a: &str, b: &str| if case_sensitive { a == b } else { a.eq_ignore_ascii_case(b) };
    let begins = |prefix: &str| path.get(..prefix.len()).is_some_and(|start| same(start, prefix));
    match rule {
        PathMatch::Prefix(prefix) => begins(prefix),
        PathMatch::Path(whole) => same(path, whole),
        PathMatch::Regex(regex) => regex.is_match(path),
        PathMatch::PathSeparatedPrefix(prefix) => {
            begins(prefix) && (path.len() == prefix.len() || path.as_bytes()[prefix.len()] == b'/')
        }
    }
}

fn header_matches(matcher: &HeaderMatcher, request: &Parts) -> bool {
    let joined;
    let value = match &matcher.name {
        MatchedHeader::Method => Some(request.method.as_str()),
        MatchedHeader::Path => request.uri.path_and_query().map(|path| path.as_str()),
        MatchedHeader::Authority => Some(authority(request)),
        MatchedHeader::Scheme => Some(request.uri.scheme_str().unwrap_or_else(|| super::redirect::scheme(request))),
        MatchedHeader::Name(name) => {
            let mut values = request.headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            match (values.next(), values.next()) {
                (first, None) => first,
                (Some(first), Some(second)) => {
                    joined = [first, second].into_iter().chain(values).collect::<Vec<_>>().join(",");
                    Some(joined.as_str())
                }
                (None, Some(_)) => None,
            }
        }
    };
    let value = value.or(matcher.treat_missing_header_as_empty.then_some(""));
    let verdict = match (&matcher.value, value) {
        (HeaderValueMatch::Present(wanted), value) => value.is_some() == *wanted,
        // A header that is missing does not match, inverted or not, as in Envoy.
        (_, None) => return false,
        (HeaderValueMatch::String(matcher), Some(value)) => matcher.matches(value),
        (HeaderValueMatch::Range { start, end }, Some(value)) => {
            value.parse::<i64>().is_ok_and(|number| (*start..*end).contains(&number))
        }
    };
    verdict != matcher.invert_match
}

fn query_matches(matcher: &QueryParameterMatcher, query: Option<&str>) -> bool {
    let pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|(name, _)| *name == matcher.name).map(|(_, value)| value);
    match (&matcher.value, values.next()) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(wanted), Some(value)) => wanted.matches(value),
    }
}

/// Where a connection manager finds its routes: filled once from the listener, or again and again by RDS.
#[derive(Debug, Default)]
pub struct RouteSlot {
    table: ArcSwapOption<RouteTable>,
    version: AtomicU64,
}

impl RouteSlot {
    /// Replaces the routes.
    pub fn set(&self, routes: Arc<RouteConfig>) {
        self.table.store(Some(Arc::new(RouteTable::new(routes))));
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Whether routes have arrived.
    pub fn is_ready(&self) -> bool {
        self.version.load(Ordering::Acquire) > 0
    }
}

/// Counted by the worker alone: cloning the `Arc` for each request would make all workers write one cache line.
type LocalTable = Rc<Arc<RouteTable>>;

/// A connection's view of a [`RouteSlot`]: it re-checks a version number, and streams hold on to what they began with
/// without touching a count that other workers write.
#[derive(Debug)]
pub(super) struct RouteCache {
    slot: Arc<RouteSlot>,
    version: Cell<u64>,
    table: RefCell<Option<LocalTable>>,
}

impl RouteCache {
    pub(super) fn new(slot: Arc<RouteSlot>) -> RouteCache {
        RouteCache { slot, version: Cell::new(0), table: RefCell::default() }
    }

    /// The route of a request; `None` where no virtual host or route matches. `random` is the stream's number.
    pub(super) fn route(&self, request: &Parts, random: u64) -> Option<RouteRef> {
        let version = self.slot.version.load(Ordering::Acquire);
        if version != self.version.get() {
            self.version.set(version);
            self.table.replace(self.slot.table.load_full().map(Rc::new));
        }
        let table = self.table.borrow();
        let table = table.as_ref()?;
        let (host, route) = table.find(request, random)?;
        Some(RouteRef { table: Rc::clone(table), host, route })
    }

    /// What is to be asked for where a request has no virtual host.
    pub(super) fn virtual_host_on_demand(&self, request: &Parts) -> Option<Wanted> {
        let table = self.table.borrow();
        let config = &table.as_ref()?.config;
        let source = Arc::clone(&config.vhds.as_ref()?.source);
        let host = authority(request).to_ascii_lowercase();
        let name = format!("{}/{host}", config.name).into();
        (!host.is_empty()).then_some(Wanted::VirtualHost { source, name })
    }
}

/// A chosen route; keeps its table alive.
#[derive(Debug, Clone)]
pub struct RouteRef {
    table: LocalTable,
    host: usize,
    route: usize,
}

impl RouteRef {
    /// The virtual host that the route belongs to.
    pub fn virtual_host(&self) -> &VirtualHost {
        &self.table.config.virtual_hosts[self.host]
    }

    /// The header mutations that apply, in their order: the route's, the virtual host's, the configuration's.
    pub(super) fn header_mutations(&self) -> [&HeaderMutations; 3] {
        [&self.headers, &self.virtual_host().headers, &self.table.config.headers]
    }
}

impl Deref for RouteRef {
    type Target = Route;

    fn deref(&self) -> &Route {
        &self.virtual_host().routes[self.route]
    }
}

#[cfg(test)]
#[path = "route_match_tests.rs"]
mod tests;
