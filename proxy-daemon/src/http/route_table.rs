//! Finds the route of a request: the virtual host by name, and there the first route that matches.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    collections::HashMap,
    ops::Deref,
    rc::Rc,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use http::request::Parts;

use super::{
    headers::names::*,
    request_stats::{HostStats, StatsTable},
    route_index::RouteIndex,
    route_match::{MatchCx, authority, matches},
};
use crate::config::model::{
    ClusterChoice, HeaderMutations, MirrorPolicy, PathMatch, PerFilterConfig, PerFilterConfigs, RedirectAction,
    RedirectPath, Route, RouteAction, RouteConfig, RouteMatch, TlsRequirement, VirtualHost, WeightedOptions,
};
use crate::on_demand::Wanted;

/// The route of requests that `require_tls` sends to https.
static TO_HTTPS: LazyLock<Route> = LazyLock::new(|| Route {
    body_buffer_limit: None,
    stat_prefix: None,
    metadata: None,
    name: String::new(),
    route_match: RouteMatch::new(PathMatch::Prefix("/".into())),
    action: RouteAction::Redirect(Box::new(RedirectAction {
        status: http::StatusCode::MOVED_PERMANENTLY,
        scheme: Some("https".into()),
        host: None,
        port: None,
        path: RedirectPath::Keep,
        strip_query: false,
    })),
    headers: HeaderMutations::default(),
    per_filter: PerFilterConfigs::new(),
});

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
    /// By virtual host: one, or one for each list of its matcher.
    indexes: Vec<Box<[RouteIndex]>>,
    per_filter: PerFilterTable,
    stats: StatsTable,
}

/// What filters are told by the levels of a route configuration: filters have numbers here, so that nothing is compared when a
/// request comes.
#[derive(Debug, Default)]
struct PerFilterTable {
    numbers: HashMap<Box<str>, usize>,
    /// By virtual host and route, and then by filter: the least specific first. Empty where nobody is told anything.
    routes: Vec<Vec<ToldByRoute>>,
}

/// What the requests of one route have the filters told.
#[derive(Debug)]
struct ToldByRoute {
    told: Told,
    /// With what its weighted clusters say, by their numbers; empty: they say nothing.
    weighted: Box<[Told]>,
}

type Told = Arc<[Vec<Arc<PerFilterConfig>>]>;

impl PerFilterTable {
    fn new(config: &RouteConfig) -> PerFilterTable {
        let hosts = &config.virtual_hosts;
        let of_hosts = hosts.iter().flat_map(|host| {
            let of_routes = host.routes.iter().flat_map(|route| {
                let of_clusters = weighted_options(route).iter().flat_map(|options| options.per_filter.keys());
                route.per_filter.keys().chain(of_clusters)
            });
            host.per_filter.keys().chain(of_routes)
        });
        let mut numbers = HashMap::new();
        for name in config.per_filter.keys().chain(of_hosts) {
            let next = numbers.len();
            numbers.entry(name.clone()).or_insert(next);
        }
        if numbers.is_empty() {
            return PerFilterTable::default();
        }
        let with = |told: &Told, more: &PerFilterConfigs| -> Told {
            if more.is_empty() {
                return Arc::clone(told);
            }
            let mut told = told.to_vec();
            more.iter().for_each(|(name, config)| told[numbers[name]].push(Arc::clone(config)));
            told.into()
        };
        let by_config = with(&vec![Vec::new(); numbers.len()].into(), &config.per_filter);
        let routes = hosts.iter().map(|host| {
            let by_host = with(&by_config, &host.per_filter);
            let of_route = |route: &Arc<Route>| {
                let told = with(&by_host, &route.per_filter);
                let options = weighted_options(route).iter();
                let weighted = options.map(|options| with(&told, &options.per_filter)).collect();
                ToldByRoute { told, weighted }
            };
            host.routes.iter().map(of_route).collect()
        });
        let routes = routes.collect();
        PerFilterTable { numbers, routes }
    }
}

/// What the route's weighted clusters say; empty: nothing.
fn weighted_options(route: &Route) -> &[WeightedOptions] {
    match &route.action {
        RouteAction::Forward(action) => match &action.cluster {
            ClusterChoice::Weighted(weighted) => &weighted.options,
            _ => &[],
        },
        _ => &[],
    }
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
        let indexes = config.virtual_hosts.iter().map(|host| indexes(host)).collect();
        let per_filter = PerFilterTable::new(&config);
        let stats = StatsTable::new(&config);
        RouteTable { config, exact, suffix, suffix_lengths, prefix, prefix_lengths, any, indexes, per_filter, stats }
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

    /// The virtual host and what becomes of the request there.
    pub(super) fn find(&self, request: &Parts, cx: &MatchCx<'_>) -> Option<(usize, Chosen)> {
        self.find_by(request, |index, list, path, routes| {
            let holds = |at: usize| matches(&routes[at].route_match, path, request, cx);
            self.indexes[index][list].find(path, holds)
        })
    }

    /// The same without an index, route by route: what the fuzzers hold [`find`](Self::find) against.
    pub(super) fn find_slowly(&self, request: &Parts, cx: &MatchCx<'_>) -> Option<(usize, Chosen)> {
        self.find_by(request, |_, _, path, routes| {
            routes.iter().position(|route| matches(&route.route_match, path, request, cx))
        })
    }

    /// `find`: the first route of a list, by the numbers of the virtual host and of the list there, the path, and the routes.
    fn find_by(
        &self,
        request: &Parts,
        find: impl FnOnce(usize, usize, &str, &[Arc<Route>]) -> Option<usize>,
    ) -> Option<(usize, Chosen)> {
        let name = match &self.config.vhost_header {
            None => authority(request),
            Some(header) => request.headers.get(header)?.to_str().ok()?,
        };
        let index = self.virtual_host(name)?;
        let host = &self.config.virtual_hosts[index];
        if host.require_tls != TlsRequirement::None && !came_by_tls(request, host.require_tls) {
            return Some((index, Chosen::ToHttps));
        }
        let path = match self.config.ignore_path_parameters_in_path_matching {
            true => without_parameters(request.uri.path()),
            false => Cow::Borrowed(request.uri.path()),
        };
        let (list, routes) = match &host.matcher {
            None => (0, 0..host.routes.len()),
            Some(matcher) => {
                let list = *matcher.tree.find(request)?;
                (list, matcher.lists[list].clone())
            }
        };
        let first = routes.start;
        let route = find(index, list, &path, &host.routes[routes])?;
        Some((index, Chosen::Route(first + route)))
    }
}

/// An index for each list of routes that a virtual host has.
fn indexes(host: &VirtualHost) -> Box<[RouteIndex]> {
    match &host.matcher {
        None => [RouteIndex::new(&host.routes)].into(),
        Some(matcher) => matcher.lists.iter().map(|list| RouteIndex::new(&host.routes[list.clone()])).collect(),
    }
}

/// What becomes of a request at its virtual host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chosen {
    /// This route.
    Route(usize),
    /// `require_tls` redirects it.
    ToHttps,
}

fn came_by_tls(request: &Parts, required: TlsRequirement) -> bool {
    request.headers.get(X_FORWARDED_PROTO).is_some_and(|scheme| scheme == "https")
        || required == TlsRequirement::ExternalOnly && request.headers.contains_key(X_ENVOY_INTERNAL)
}

fn lengths(map: &HashMap<String, usize>) -> Vec<usize> {
    let lengths: std::collections::BTreeSet<usize> = map.keys().map(String::len).collect();
    lengths.into_iter().rev().collect()
}

/// As in Envoy whatever stands behind the last colon is a port, unless that colon is part of an IPv6 address.
fn without_port(authority: &str) -> &str {
    authority.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map_or(authority, |(host, _)| host)
}

/// `/a;b=c/d` without what follows semicolons: `/a/d`.
fn without_parameters(path: &str) -> Cow<'_, str> {
    if !path.contains(';') {
        return Cow::Borrowed(path);
    }
    let segments = path.split('/').map(|segment| segment.split(';').next().unwrap_or_default());
    Cow::Owned(segments.collect::<Vec<_>>().join("/"))
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
    /// The names of the connection manager's filters.
    filters: Arc<[Arc<str>]>,
    /// The numbers that they have in the table; empty where it tells filters nothing.
    numbers: RefCell<Rc<[Option<usize>]>>,
}

impl RouteCache {
    pub(super) fn new(slot: Arc<RouteSlot>, filters: Arc<[Arc<str>]>) -> RouteCache {
        let (version, table, numbers) = (Cell::new(0), RefCell::default(), RefCell::new(Rc::new([])));
        RouteCache { slot, version, table, filters, numbers }
    }

    fn renew(&self) {
        let table = self.slot.table.load_full();
        let known = table.as_ref().map(|table| &table.per_filter.numbers).filter(|numbers| !numbers.is_empty());
        let numbers = known.map(|known| self.filters.iter().map(|name| known.get(&**name).copied()).collect());
        self.numbers.replace(numbers.unwrap_or_default());
        self.table.replace(table.map(Rc::new));
    }

    /// Takes over what has changed.
    fn refresh(&self) {
        let version = self.slot.version.load(Ordering::Acquire);
        if version != self.version.get() {
            self.version.set(version);
            self.renew();
        }
    }

    /// Removes the configuration's `internal_only_headers`.
    pub(super) fn remove_internal_only(&self, request: &mut Parts) {
        self.refresh();
        if let Some(table) = self.table.borrow().as_ref() {
            table.config.internal_only_headers.iter().for_each(|name| drop(request.headers.remove(name)));
        }
    }

    /// The route of a request; `None` where no virtual host or route matches.
    pub(super) fn route(&self, request: &Parts, cx: &MatchCx<'_>) -> Option<RouteRef> {
        self.refresh();
        let table = self.table.borrow();
        let table = table.as_ref()?;
        let (host, route) = table.find(request, cx)?;
        let filters = Rc::clone(&self.numbers.borrow());
        Some(RouteRef { table: Rc::clone(table), host, route, filters, weighted: None })
    }

    /// Whether the routes had not arrived when one was looked for.
    pub(super) fn is_empty(&self) -> bool {
        self.table.borrow().is_none()
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
    route: Chosen,
    filters: Rc<[Option<usize>]>,
    /// The number of the weighted cluster that was chosen.
    weighted: Option<usize>,
}

impl RouteRef {
    /// Notes which of the route's weighted clusters was chosen.
    pub(super) fn choose_weighted(&mut self, index: usize) {
        self.weighted = Some(index);
    }

    /// The number of the chosen weighted cluster.
    pub(super) fn weighted(&self) -> Option<usize> {
        self.weighted
    }

    /// What the chosen weighted cluster asks for.
    pub(super) fn weighted_options(&self) -> Option<&WeightedOptions> {
        weighted_options(self).get(self.weighted?)
    }

    /// What the filter at this place of its connection manager's list is told, the least specific first.
    pub(super) fn per_filter(&self, position: usize) -> &[Arc<PerFilterConfig>] {
        let number = self.filters.get(position).copied().flatten();
        match (number, self.route) {
            (Some(number), Chosen::Route(route)) => {
                let ToldByRoute { told, weighted } = &self.table.per_filter.routes[self.host][route];
                let told = self.weighted.and_then(|index| weighted.get(index)).unwrap_or(told);
                &told[number]
            }
            _ => &[],
        }
    }

    /// The virtual host that the route belongs to.
    pub fn virtual_host(&self) -> &VirtualHost {
        &self.table.config.virtual_hosts[self.host]
    }

    /// What requests of the virtual host are counted under, where that is anything, and the number of the route there.
    pub(super) fn stats(&self) -> Option<(&HostStats, Option<usize>)> {
        let stats = self.table.stats.host(self.host)?;
        match self.route {
            Chosen::Route(route) => Some((stats, Some(route))),
            Chosen::ToHttps => Some((stats, None)),
        }
    }

    /// Who gets a copy of requests, where neither the route nor the virtual host says.
    pub(super) fn mirrors_of_config(&self) -> &[MirrorPolicy] {
        &self.table.config.mirrors
    }

    /// The header mutations of the route, the virtual host and the configuration. A redirect to https has none.
    pub(super) fn header_mutations(&self) -> [Option<&HeaderMutations>; 3] {
        match self.route {
            Chosen::Route(_) => [&self.headers, &self.virtual_host().headers, &self.table.config.headers].map(Some),
            Chosen::ToHttps => [None; 3],
        }
    }

    pub(super) fn most_specific_header_mutations_wins(&self) -> bool {
        self.table.config.most_specific_header_mutations_wins
    }
}

impl Deref for RouteRef {
    type Target = Route;

    fn deref(&self) -> &Route {
        match self.route {
            Chosen::Route(route) => &self.virtual_host().routes[route],
            Chosen::ToHttps => &TO_HTTPS,
        }
    }
}

#[cfg(test)]
#[path = "route_table_tests.rs"]
mod tests;
