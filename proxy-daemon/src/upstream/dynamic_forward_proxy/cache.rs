//! What is known of the names that requests ask for. Workers read it without locks; one task of the control thread for each cache looks
//! names up, first when a request waits for one, and then again for as long as somebody uses it.

use std::{
    collections::HashMap,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::sync::{mpsc, oneshot};

use super::{
    ByName,
    authority::{split, with_port},
};
use crate::{
    config::model::DnsCacheOptions,
    stats::{Counter, Gauge, Lease, Scope},
    upstream::{
        Cluster,
        dns::{Found as Answer, Names, after_failure},
    },
};

/// A name that a request has asked for, with its port.
#[derive(Debug)]
pub(crate) struct Entry {
    /// `host:port`
    pub(super) authority: Arc<str>,
    name: Box<str>,
    port: u16,
    /// `None`: the first look-up has not ended.
    pub(super) found: ArcSwapOption<Found>,
    /// Seconds since the cache began.
    last_used: AtomicU64,
}

/// What a name stands for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Empty: nobody knows.
    pub(crate) addresses: Box<[SocketAddr]>,
    /// Why, for access logs.
    pub(crate) details: Box<str>,
}

/// A cache, by its name in the whole process.
pub struct DnsCache {
    /// As configured.
    pub options: DnsCacheOptions,
    stats: CacheStats,
    began: Instant,
    entries: ArcSwap<ByName<Arc<Entry>>>,
    /// Grows when a name is new or forgotten, or leads elsewhere.
    version: AtomicU64,
    pending: AtomicU32,
    questions: mpsc::UnboundedSender<Question>,
    /// Until somebody answers them.
    unanswered: Mutex<Option<mpsc::UnboundedReceiver<Question>>>,
    /// Whose hosts these are. Held while their hosts change.
    clusters: Mutex<Vec<Weak<Cluster>>>,
}

/// A name that is to be looked up, and who waits.
struct Question {
    authority: Arc<str>,
    waits: Option<oneshot::Sender<Arc<Found>>>,
}

#[derive(Debug)]
struct CacheStats {
    dns_query_attempt: Counter,
    dns_query_success: Counter,
    dns_query_failure: Counter,
    dns_query_timeout: Counter,
    dns_rq_pending_overflow: Counter,
    host_added: Counter,
    host_removed: Counter,
    host_address_changed: Counter,
    host_overflow: Counter,
    num_hosts: Gauge,
    rq_pending_open: Gauge,
    rq_pending_remaining: Gauge,
    _lease: Lease,
}

impl CacheStats {
    fn new(options: &DnsCacheOptions) -> CacheStats {
        let scope = Scope::new("dns_cache").child(&options.name);
        let lease = scope.lease();
        // What these count does not exist here: key_value_config, and resolved_address_filter.
        for name in ["cache_load", "dns_address_filter_out"] {
            let _: Counter = scope.counter(name);
        }
        let stats = CacheStats {
            dns_query_attempt: scope.counter("dns_query_attempt"),
            dns_query_success: scope.counter("dns_query_success"),
            dns_query_failure: scope.counter("dns_query_failure"),
            dns_query_timeout: scope.counter("dns_query_timeout"),
            dns_rq_pending_overflow: scope.counter("dns_rq_pending_overflow"),
            host_added: scope.counter("host_added"),
            host_removed: scope.counter("host_removed"),
            host_address_changed: scope.counter("host_address_changed"),
            host_overflow: scope.counter("host_overflow"),
            num_hosts: scope.gauge("num_hosts"),
            rq_pending_open: scope.gauge("circuit_breakers.rq_pending_open"),
            rq_pending_remaining: scope.gauge("circuit_breakers.rq_pending_remaining"),
            _lease: lease,
        };
        stats.rq_pending_remaining.set(options.max_pending.into());
        stats.rq_pending_open.set(0);
        stats
    }
}

/// What a request is told of a name.
pub(crate) enum Asked {
    /// It is known.
    Known(Arc<Found>),
    /// There are as many names as there may be.
    HostOverflow,
    /// As many requests wait as may.
    PendingOverflow,
    /// It is being looked up.
    Pending(Pending),
}

/// A request that waits for a name.
#[derive(Debug)]
pub(crate) struct Pending {
    cache: Arc<DnsCache>,
    told: oneshot::Receiver<Arc<Found>>,
}

impl Pending {
    /// What the name stands for; `None`: it will not be known any more.
    pub(crate) async fn over(&mut self) -> Option<Arc<Found>> {
        (&mut self.told).await.ok()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let cache = &self.cache;
        cache.stats.rq_pending_remaining.add(1);
        if cache.pending.fetch_sub(1, Relaxed) == cache.options.max_pending {
            cache.stats.rq_pending_open.dec();
        }
    }
}

impl std::fmt::Debug for DnsCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DnsCache").field("options", &self.options).finish_non_exhaustive()
    }
}

impl PartialEq for DnsCache {
    fn eq(&self, other: &DnsCache) -> bool {
        self.options == other.options
    }
}

impl Eq for DnsCache {}

impl DnsCache {
    /// The cache of this configuration: where one of the same name is in use already, that.
    ///
    /// # Errors
    /// That one is configured otherwise.
    pub fn of(options: DnsCacheOptions) -> Result<Arc<DnsCache>, String> {
        static CACHES: LazyLock<Mutex<HashMap<Box<str>, Weak<DnsCache>>>> = LazyLock::new(Mutex::default);
        let mut caches = CACHES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = caches.get(&options.name).and_then(Weak::upgrade) {
            return match known.options == options {
                true => Ok(known),
                false => Err(format!("config specified DNS cache '{}' with different settings", options.name)),
            };
        }
        caches.retain(|_, cache| cache.strong_count() > 0);
        let (questions, unanswered) = mpsc::unbounded_channel();
        let name = options.name.clone();
        let cache = Arc::new(DnsCache {
            stats: CacheStats::new(&options),
            options,
            began: Instant::now(),
            entries: ArcSwap::default(),
            version: AtomicU64::new(1),
            pending: AtomicU32::new(0),
            questions,
            unanswered: Mutex::new(Some(unanswered)),
            clusters: Mutex::default(),
        });
        caches.insert(name, Arc::downgrade(&cache));
        Ok(cache)
    }

    /// A cluster has its hosts from here. Names are looked up from now on.
    pub(crate) fn serve(
        self: &Arc<DnsCache>,
        cluster: &Arc<Cluster>,
        names: &Arc<Names>,
        control: &tokio::runtime::Handle,
    ) {
        let known = self.entries.load().values().filter(|entry| entry.is_known()).count();
        cluster.stats.membership_total.set(known as u64);
        cluster.stats.membership_healthy.set(known as u64);
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        // Before it is told of changes.
        cluster.named.add(cluster, self.known());
        clusters.retain(|cluster| cluster.strong_count() > 0);
        clusters.push(Arc::downgrade(cluster));
        drop(clusters);
        let unanswered = self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(questions) = unanswered {
            let resolving = Resolving {
                cache: Arc::downgrade(self),
                options: Arc::new(self.options.clone()),
                names: Arc::clone(names),
                hosts: HashMap::new(),
                rounds: FuturesUnordered::new(),
            };
            control.spawn(resolving.run(questions));
            for authority in &self.options.preresolved {
                let _ = self.questions.send(Question { authority: (&**authority).into(), waits: None });
            }
        }
    }

    /// What is known of a name; where nothing is, it is looked up.
    pub(crate) fn ask(self: &Arc<DnsCache>, host: &str, default_port: u16) -> Asked {
        let options = &self.options;
        if self.pending.load(Relaxed) >= options.max_pending {
            self.stats.dns_rq_pending_overflow.inc();
            return Asked::PendingOverflow;
        }
        let authority = with_port(host, default_port);
        let entries = self.entries.load();
        if let Some(found) = entries.get(&*authority).and_then(|entry| entry.found.load_full()) {
            return Asked::Known(found);
        }
        if entries.size() >= options.max_hosts as usize {
            self.stats.host_overflow.inc();
            return Asked::HostOverflow;
        }
        let (waits, told) = oneshot::channel();
        if self.pending.fetch_add(1, Relaxed) + 1 == options.max_pending {
            self.stats.rq_pending_open.inc();
        }
        self.stats.rq_pending_remaining.sub(1);
        let pending = Pending { cache: Arc::clone(self), told };
        // Where nobody answers, the wait ends at once.
        let _ = self.questions.send(Question { authority: authority.as_ref().into(), waits: Some(waits) });
        Asked::Pending(pending)
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(Relaxed)
    }

    /// What is known now, for [`Self::used`].
    pub(super) fn entries(&self) -> Guard<Arc<ByName<Arc<Entry>>>> {
        self.entries.load()
    }

    /// A name whose addresses are known, which is used.
    pub(super) fn used<'a>(&self, entries: &'a ByName<Arc<Entry>>, authority: &str) -> Option<&'a Arc<Entry>> {
        let entry = entries.get(authority)?;
        if !entry.is_known() {
            return None;
        }
        let now = self.began.elapsed().as_secs();
        // Written once a second at most: all workers read it.
        if entry.last_used.load(Relaxed) != now {
            entry.last_used.store(now, Relaxed);
        }
        Some(entry)
    }

    pub(super) fn has(&self, entry: &Arc<Entry>) -> bool {
        self.entries.load().get(&entry.authority).is_some_and(|known| Arc::ptr_eq(known, entry))
    }

    /// What names stand for that have addresses.
    fn known(&self) -> impl Iterator<Item = (Arc<Entry>, Arc<Found>)> + use<> {
        let entries: Vec<_> = self.entries.load().values().cloned().collect();
        entries.into_iter().filter_map(|entry| {
            let found = entry.found.load_full().filter(|found| !found.addresses.is_empty())?;
            Some((entry, found))
        })
    }

    /// A name stands for this from now on. The clusters are told first, before workers find it.
    fn publish(&self, entry: &Arc<Entry>, found: Arc<Found>) {
        let clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters.iter().filter_map(Weak::upgrade) {
            cluster.named.add(&cluster, std::iter::once((Arc::clone(entry), Arc::clone(&found))));
        }
        // A cluster that comes meanwhile finds it afterwards.
        entry.found.store(Some(found));
    }

    /// The clusters have this host no more.
    fn retract(&self, entry: &Entry) {
        for cluster in self.clusters.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            cluster.named.remove(&entry.authority);
        }
    }

    /// Of the clusters' hosts, one more or fewer.
    fn membership_changed(&self, added: bool) {
        for cluster in self.clusters.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            let stats = &cluster.stats;
            stats.membership_change.inc();
            for gauge in [stats.membership_total, stats.membership_healthy] {
                if added { gauge.inc() } else { gauge.dec() }
            }
        }
    }

    /// The names are these from now on.
    fn set_entries(&self, entries: ByName<Arc<Entry>>) {
        self.entries.store(Arc::new(entries));
        self.moved();
    }

    fn moved(&self) {
        self.version.fetch_add(1, Relaxed);
    }
}

impl Entry {
    fn is_known(&self) -> bool {
        self.found.load().as_ref().is_some_and(|found| !found.addresses.is_empty())
    }
}

/// What comes of one look-up.
enum Outcome {
    Found(Answer),
    Failed(String),
    TimedOut,
    /// Nobody has used the name for too long.
    Unused,
}

type Waiting = Vec<oneshot::Sender<Arc<Found>>>;
type Round = Pin<Box<dyn Future<Output = (Arc<Entry>, Outcome)> + Send>>;

/// The task that looks names up.
struct Resolving {
    cache: Weak<DnsCache>,
    options: Arc<DnsCacheOptions>,
    names: Arc<Names>,
    /// Who waits for a name, and how often in a row its look-up has failed.
    hosts: HashMap<Arc<str>, (Waiting, u32)>,
    rounds: FuturesUnordered<Round>,
}

impl Resolving {
    /// Ends with the cache.
    async fn run(mut self, mut questions: mpsc::UnboundedReceiver<Question>) {
        loop {
            tokio::select! {
                question = questions.recv() => {
                    let Some((question, cache)) = question.zip(self.cache.upgrade()) else { return };
                    self.take(&cache, question);
                }
                Some((entry, outcome)) = self.rounds.next(), if !self.rounds.is_empty() => {
                    let Some(cache) = self.cache.upgrade() else { return };
                    self.end(&cache, &entry, outcome);
                }
            }
        }
    }

    fn take(&mut self, cache: &Arc<DnsCache>, Question { authority, waits }: Question) {
        if let Some(entry) = cache.entries.load().get(&authority).map(Arc::clone) {
            match (entry.found.load_full(), self.hosts.get_mut(&authority)) {
                (Some(found), _) => waits.into_iter().for_each(|waits| drop(waits.send(Arc::clone(&found)))),
                (None, Some((waiting, _))) => waiting.extend(waits),
                (None, None) => {}
            }
            return;
        }
        let (name, port) = split(&authority);
        let entry = Arc::new(Entry {
            authority: Arc::clone(&authority),
            name: name.into(),
            port: port.unwrap_or_default(),
            found: ArcSwapOption::empty(),
            last_used: AtomicU64::new(cache.began.elapsed().as_secs()),
        });
        cache.stats.host_added.inc();
        cache.stats.num_hosts.inc();
        self.hosts.insert(Arc::clone(&authority), (waits.into_iter().collect(), 0));
        cache.set_entries(cache.entries.load().insert(authority, Arc::clone(&entry)));
        self.look_up(cache, entry, Duration::ZERO);
    }

    /// Looks a name up, after a while.
    fn look_up(&self, cache: &DnsCache, entry: Arc<Entry>, after: Duration) {
        let (options, names) = (Arc::clone(&self.options), Arc::clone(&self.names));
        let (began, attempts) = (cache.began, cache.stats.dns_query_attempt);
        self.rounds.push(Box::pin(async move {
            tokio::time::sleep(after).await;
            let idle = began.elapsed().saturating_sub(Duration::from_secs(entry.last_used.load(Relaxed)));
            if entry.found.load().is_some() && idle > options.host_ttl {
                return (entry, Outcome::Unused);
            }
            attempts.inc();
            let answer = names.ask(&entry.name, &options.dns);
            let answer = match options.query_timeout {
                Some(limit) => tokio::time::timeout(limit, answer).await,
                None => Ok(answer.await),
            };
            let outcome = match answer {
                Ok(Ok(answer)) => Outcome::Found(answer),
                Ok(Err(error)) => Outcome::Failed(error.to_string()),
                Err(_elapsed) => Outcome::TimedOut,
            };
            (entry, outcome)
        }));
    }

    fn end(&mut self, cache: &Arc<DnsCache>, entry: &Arc<Entry>, outcome: Outcome) {
        let stats = &cache.stats;
        let (options, before) = (Arc::clone(&self.options), entry.found.load_full());
        let Some((waiting, failures)) = self.hosts.get_mut(&entry.authority) else { return };
        let failed = |text: &str| format!("dns_resolution_failure{{{}}}", text.replace(' ', "_")).into_boxed_str();
        let (addresses, details, wait) = match outcome {
            Outcome::Unused => {
                self.hosts.remove(&entry.authority);
                stats.host_removed.inc();
                stats.num_hosts.dec();
                cache.set_entries(cache.entries.load().remove(&entry.authority));
                if entry.is_known() {
                    cache.retract(entry);
                    cache.membership_changed(false);
                }
                return;
            }
            Outcome::Found(Answer { addresses, ttl }) => {
                stats.dns_query_success.inc();
                *failures = 0;
                let addresses: Vec<_> = addresses.iter().map(|ip| SocketAddr::new(*ip, entry.port)).collect();
                match addresses.is_empty() {
                    true => (addresses, failed("cares_norecords:Domain name not found"), options.dns.refresh_rate),
                    false => (addresses, Box::default(), ttl.unwrap_or_default().max(options.min_refresh)),
                }
            }
            Outcome::Failed(error) => {
                stats.dns_query_failure.inc();
                let wait = after_failure(*failures, &options.dns);
                *failures = failures.saturating_add(1);
                (Vec::new(), failed(&error), wait)
            }
            Outcome::TimedOut => {
                stats.dns_query_timeout.inc();
                stats.dns_query_failure.inc();
                let wait = after_failure(*failures, &options.dns);
                *failures = failures.saturating_add(1);
                (Vec::new(), failed("resolve_timeout"), wait)
            }
        };
        let had = before.as_ref().map(|found| &*found.addresses).unwrap_or_default();
        // In another order they are the same, as in Envoy; what had an address keeps it where there is none now.
        let differ = addresses.len() != had.len() || addresses.iter().any(|address| !had.contains(address));
        if !addresses.is_empty() && differ {
            let is_new = had.is_empty();
            let found = Arc::new(Found { addresses: addresses.into(), details });
            cache.publish(entry, found);
            stats.host_address_changed.inc();
            cache.moved();
            if is_new {
                cache.membership_changed(true);
            }
        } else if had.is_empty() {
            entry.found.store(Some(Arc::new(Found { addresses: Box::default(), details })));
        }
        if let Some(found) = entry.found.load_full() {
            waiting.drain(..).for_each(|waits| drop(waits.send(Arc::clone(&found))));
        }
        self.look_up(cache, Arc::clone(entry), wait);
    }
}
