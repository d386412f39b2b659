//! What the bootstrap holds and xDS delivers: checked, handed to the data plane, kept for `/config_dump`.
//!
//! `LIFECYCLE.md` has the states of a cluster, a listener and an update. In short:
//!
//! - Each resource is accepted or refused by itself; a refused one leaves its last good version in force.
//! - A version of a cluster or listener has *needs*: resources that are asked for by name from a source of its own
//!   ([`kinds`]). It warms until each of them has arrived, was refused, or was waited for as long as its `ConfigSource`
//!   says. The version before serves on meanwhile.
//! - An update is answered when all of it has taken effect ([`updates`]).
//! - The start has phases ([`state::Phase`]): what comes before everything (RTDS), then clusters, then listeners.
//!
//! # A new type of resources that are asked for by name
//!
//! 1. `kinds.rs`: a variant of [`Kind`](kinds::Kind) and of `Value`, and their arms: the type URL, what the log calls it, how
//!    it is parsed.
//! 2. `kinds.rs`: `cluster_needs` or `listener_needs` says where a configuration names one (a
//!    [`ResourceRef`](super::model::ResourceRef)). Subscribing, warming, timeouts, NACKs and answers follow from that.
//! 3. `apply.rs`: how the data plane gets it, and forgets it; called from `deliver` and `drop_unused` in `named.rs`.
//! 4. `named.rs`: what is counted for it.
//!
//! Scopes, of SRDS, are one need for all of a source ([`scopes`]): they name route configurations, which are needs of the
//! listeners that use them from then on.
//!
//! A type that the process itself waits for at its start is put into [`StartUp::first`].

mod addresses;
mod apply;
mod clusters;
mod counts;
mod demanded;
mod draining;
mod extensions;
mod held;
mod kinds;
mod listeners;
mod named;
mod read_ahead;
mod refused;
mod resources;
mod rotation;
mod scoped_demand;
mod scopes;
mod secrets;
mod snapshot;
mod sourced;
mod stale;
mod state;
mod subscribed;
mod updates;
mod vhds;
mod watched;

use std::{
    collections::HashSet,
    future::pending,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use culvert_xds_client::{
    ads::{Counted, Done, Interest, Sink, Update, type_url},
    api::culvert::overrides::v1::{OffloadedService, OverrideShare},
    json::{self, UnknownFields},
    source::Source,
    sources::{self, Subscriptions},
    watches::Watches,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as ProtoSecret;
use prost::Name;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub use self::{
    apply::{Applier, Apply, Resolved, Told},
    kinds::{Kind, Need},
};
use self::{
    counts::StoreStats,
    rotation::Follower,
    state::{Due, Phase, State},
    updates::UpdateId,
    watched::{Owner, VersionId},
};
use super::{
    FieldError,
    model::{self, ClusterConfig, ConfigSource, SecretName, SecretType, UpstreamBind},
};
use crate::{http::filters::OffloadedTable, on_demand::Waiter};

/// An update of so many bytes or more is followed by [`ConfigStore::tidy_up`], after so long.
const LARGE: usize = 512 << 10;
const TIDY_AFTER: Duration = Duration::from_millis(100);

/// What becomes of unknown fields of xDS resources: a property of the process, as the flags are that say it.
static UNKNOWN_FIELDS: OnceLock<UnknownFields> = OnceLock::new();

/// Sets what becomes of fields of xDS resources that the API does not have, once, before the first resource.
pub fn set_unknown_fields(unknown: UnknownFields) {
    // Who comes second has been started in the same process, with the same flags.
    let _ = UNKNOWN_FIELDS.set(unknown);
}

/// What becomes of unknown fields in xDS resources. Envoy's default, and ours, is to warn of them.
pub fn unknown_fields() -> UnknownFields {
    UNKNOWN_FIELDS.get().copied().unwrap_or(UnknownFields::Warn(&json::DYNAMIC_FIELDS))
}

/// What is asked for from the start.
#[derive(Debug, Default)]
pub struct StartUp {
    /// What comes before everything else.
    pub first: Vec<Need>,
    /// Where clusters come from, besides the bootstrap.
    pub cds: Option<ConfigSource>,
    /// The collection that they are of; `None`: everything that the source has.
    pub cds_collection: Option<String>,
    /// Where listeners come from, besides the bootstrap.
    pub lds: Option<ConfigSource>,
    /// The collection that they are of; `None`: everything that the source has.
    pub lds_collection: Option<String>,
    /// The bootstrap's secrets.
    pub secrets: HashSet<(SecretType, Arc<str>)>,
    /// Those of them whose files are read again when something is moved into a directory: how, and which.
    pub followed: Vec<(SecretName, ProtoSecret, PathBuf)>,
    /// Notices such moves.
    pub watches: Arc<Watches>,
    /// The sources that there are.
    pub sources: sources::Config,
    /// Where connections of clusters come from that do not say it themselves.
    pub bind: Option<Arc<UpstreamBind>>,
    /// How long the connections of a listener that is replaced or removed may go on.
    pub drain_time: Duration,
}

/// How far the start has come.
#[derive(Debug, Clone, Default)]
struct Progress {
    initialized: bool,
    /// Why the process cannot start.
    fatal: Option<String>,
}

struct Shared<A> {
    state: Mutex<State>,
    first: Vec<Need>,
    apply: A,
    stats: StoreStats,
    changed: Notify,
    /// A large update has been taken.
    large: Notify,
    /// See [`ConfigStore::tidy_up`].
    give_back: OnceLock<fn()>,
    follower: Follower,
    progress: watch::Sender<Progress>,
    subscriptions: Subscriptions,
}

/// The sink of the xDS clients. Cheap to clone: `/config_dump` holds one as well.
pub struct ConfigStore<A = Applier>(Arc<Shared<A>>);

impl<A> Clone for ConfigStore<A> {
    fn clone(&self) -> ConfigStore<A> {
        ConfigStore(Arc::clone(&self.0))
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Empty, and asking for nothing until [`start`](Self::start).
    pub fn new(apply: A, start: StartUp, subscriptions: Subscriptions) -> ConfigStore<A> {
        let follower = Follower::new(Arc::clone(&start.watches));
        let mut state = State::new(&start);
        state.static_files = rotation::static_files(&follower, &start.followed);
        ConfigStore(Arc::new(Shared {
            state: Mutex::new(state),
            follower,
            first: start.first,
            apply,
            stats: StoreStats::new(),
            changed: Notify::new(),
            large: Notify::new(),
            give_back: OnceLock::new(),
            progress: watch::channel(Progress::default()).0,
            subscriptions,
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here leaves resources that were not applied yet: the next update applies them.
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes the bootstrap's resources in, and asks for what is wanted besides. Listeners are bound at once; they accept
    /// connections when the clusters are warm and they have what they need.
    pub fn start(&self, clusters: Vec<ClusterConfig>, listeners: Vec<model::Listener>) {
        self.changed(|state| {
            let now = Instant::now();
            state.phase = Phase::First;
            state.first_waiting = state.acquire(&self.0.first, &Owner::Process, VersionId(0), now);
            state.static_clusters = clusters;
            for listener in listeners {
                self.add_listener(state, listener, None, None);
            }
        });
    }

    /// Waits until everything that is asked for from the start is there, or was waited for long enough.
    ///
    /// # Errors
    /// Why the process cannot start: a listener of the bootstrap that cannot be bound.
    pub async fn initialized(&self) -> Result<(), String> {
        let mut progress = self.0.progress.subscribe();
        // The sender lives as long as `self`.
        let done = progress.wait_for(|progress| progress.initialized || progress.fatal.is_some()).await;
        done.ok().and_then(|progress| progress.fatal.clone()).map_or(Ok(()), Err)
    }

    /// Whether the control plane has answered all that it is asked for from the start.
    pub fn is_answered(&self) -> bool {
        let state = self.lock();
        [&state.cds, &state.lds].into_iter().all(|wanted| wanted.from.is_none() || wanted.answered)
    }

    /// Whether all clusters and listeners are in force as they were sent last.
    pub fn is_in_force(&self) -> bool {
        let state = self.lock();
        let refused = [&state.clusters.refused, &state.listeners.refused];
        refused.into_iter().all(|refused| refused.entries().next().is_none())
            && state.listeners.by_name.values().all(|entry| entry.failure.is_none())
    }

    /// Ends waits that have lasted for long enough. Runs as long as the process.
    pub async fn keep_time(self) {
        loop {
            let next = self.lock().next_due();
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = due => self.expire(Instant::now()),
                () = self.0.changed.notified() => {}
            }
        }
    }

    /// Has memory given back after each large update, when what it took has been freed, and so often besides: `give_back` does that for
    /// the thread on which it is called, which is the one that took the update, and once more the control thread. Runs as long as the
    /// process.
    pub async fn tidy_up(self, give_back: fn(), every: Duration) {
        let _ = self.0.give_back.set(give_back);
        loop {
            tokio::select! {
                // Answering it takes some more, and another update may follow.
                () = self.0.large.notified() => tokio::time::sleep(TIDY_AFTER).await,
                () = tokio::time::sleep(every) => {}
            }
            give_back();
        }
    }

    /// Does what is due by now.
    fn expire(&self, now: Instant) {
        self.changed(|state| {
            for due in state.take_due(now) {
                match due {
                    Due::Resource(kind, source, name) => {
                        let entry = state.watched[kind as usize].get(&source, &name);
                        if entry.and_then(|entry| entry.deadline).is_some_and(|deadline| deadline <= now) {
                            self.give_up(state, kind, &source, &name);
                        }
                    }
                    Due::Cds if !state.cds.settled => {
                        tracing::warn!("the first clusters did not come in time: going on without");
                        self.0.stats.clusters.init_fetch_timeout.inc();
                        state.cds.settled = true;
                    }
                    Due::Lds if !state.lds.settled => {
                        tracing::warn!("the first listeners did not come in time: going on without");
                        self.0.stats.listeners.init_fetch_timeout.inc();
                        state.lds.settled = true;
                    }
                    Due::Cds | Due::Lds => {}
                    Due::Drained => self.drained(state, now),
                    Due::HeldRoutes => self.end_holds(state, now),
                    Due::Stale(source, name) => self.forget_stale(state, &source, &name, now),
                    Due::LookedUp => self.take_up_looked_up(state),
                    Due::OnDemand => state.forget_idle(now),
                    Due::Listener(name, id) => self.retry_listener(state, &name, id),
                }
            }
        });
    }

    /// Makes a change, does what follows from it, and answers what is to be answered now.
    fn changed(&self, change: impl FnOnce(&mut State)) {
        let (finished, over) = {
            let mut state = self.lock();
            change(&mut state);
            self.follow_up(&mut state);
            let mut over = state.demanded.over();
            over.extend(state.vhds.demanded.over());
            over.extend(state.routes_demanded.over());
            (state.updates.finished(), over)
        };
        self.0.apply.tell_secret_users();
        self.0.changed.notify_one();
        for (done, outcome) in finished {
            done.finish(outcome);
        }
        over.into_iter().for_each(Waiter::go_on);
    }

    /// Changes clusters all at once, goes on with the start, and tells the sources what is wanted.
    fn follow_up(&self, state: &mut State) {
        loop {
            let changes = std::mem::take(&mut state.changes);
            if !changes.is_empty() {
                self.0.apply.change_clusters(changes);
            }
            self.let_go(state);
            if !self.advance(state) {
                break;
            }
        }
        self.drop_unused(state);
        self.subscribe_clusters(state);
        self.subscribe_hosts(state);
        for watched in &mut state.watched {
            watched.subscribe(&self.0.subscriptions);
        }
        let overriding = state.overriding > 0;
        if std::mem::replace(&mut state.asks_for_overrides, overriding) != overriding {
            let heard = state.sources.check(&Source::Ads, &OffloadedService::type_url());
            if let (true, Err(why)) = (overriding, heard) {
                tracing::warn!("overrides find no endpoints and no shares, which come by ADS alone: {why}");
            } else {
                let interest = if overriding { Interest::Wildcard } else { Interest::None };
                for type_url in [OffloadedService::type_url(), OverrideShare::type_url()] {
                    self.0.subscriptions.set(Source::Ads, type_url, interest.clone());
                }
            }
        }
        if std::mem::take(&mut state.scopes_changed) {
            state.count_scopes();
        }
        self.publish(state);
    }

    /// The next phase of the start, where the one before is over.
    fn advance(&self, state: &mut State) -> bool {
        let now = Instant::now();
        match state.phase {
            Phase::First if state.first_waiting == 0 => {
                state.phase = Phase::Clusters;
                if let Some(from) = state.cds.from.clone() {
                    let interest = state.cluster_interest(&from.source);
                    self.0.subscriptions.set(Source::clone(&from.source), type_url::CLUSTER, interest);
                    from.initial_fetch_timeout.into_iter().for_each(|timeout| state.at(now + timeout, Due::Cds));
                }
                for cluster in std::mem::take(&mut state.static_clusters) {
                    self.add_cluster(state, cluster, None, None);
                }
            }
            Phase::Clusters if state.cds.settled && state.clusters.warming == 0 => {
                state.phase = Phase::Listeners;
                if let Some(from) = state.lds.from.clone() {
                    let interest = state.lds.interest();
                    self.0.subscriptions.set(Source::clone(&from.source), type_url::LISTENER, interest);
                    from.initial_fetch_timeout.into_iter().for_each(|timeout| state.at(now + timeout, Due::Lds));
                }
                let names: Vec<_> = state.listeners.by_name.keys().cloned().collect();
                names.iter().for_each(|name| self.ask_for_needs(state, name));
            }
            Phase::Listeners
                if state.lds.settled && !state.listeners.by_name.values().any(|listener| listener.is_pending()) =>
            {
                state.phase = Phase::Running;
                self.0.progress.send_modify(|progress| progress.initialized = true);
            }
            _ => return false,
        }
        true
    }

    fn offloaded(&self, state: &mut State, update: Update, id: UpdateId) {
        for resource in update.added {
            let parsed = json::unpack::<OffloadedService>(&resource.body, "").map_err(FieldError::from);
            match parsed.and_then(|service| OffloadedTable::from_resources([&service]).map(|_| service)) {
                Ok(service) => drop(state.offloaded.insert(resource.name, service)),
                Err(error) => state.updates.reject(id, &resource.name, error.to_string()),
            }
        }
        for name in update.removed {
            state.offloaded.remove(&name);
        }
        self.set_offloaded(state);
    }

    fn shares(&self, state: &mut State, update: Update, id: UpdateId) {
        for resource in update.added {
            let parsed = json::unpack::<OverrideShare>(&resource.body, "").map_err(FieldError::from);
            let table = OffloadedTable::default();
            match parsed.and_then(|share| table.with_shares([&share]).map(|_| share)) {
                Ok(share) => drop(state.shares.insert(resource.name, share)),
                Err(error) => state.updates.reject(id, &resource.name, error.to_string()),
            }
        }
        for name in update.removed {
            state.shares.remove(&name);
        }
        self.set_offloaded(state);
    }

    fn set_offloaded(&self, state: &State) {
        let table = OffloadedTable::from_resources(state.offloaded.values());
        match table.and_then(|table| table.with_shares(state.shares.values())) {
            Ok(table) => self.0.apply.set_offloaded(table),
            // Each was checked by itself above.
            Err(error) => tracing::error!(%error, "offloaded services are inconsistent"),
        }
    }

    fn publish(&self, state: &State) {
        let (clusters, listeners) = (&self.0.stats.clusters, &self.0.stats.listeners);
        clusters.active.set(state.clusters.active as u64);
        clusters.warming.set(state.clusters.warming as u64);
        listeners.active.set(state.listeners.active as u64);
        listeners.warming.set(state.listeners.warming as u64);
        let (whole, chains) = state.listeners.draining.counts();
        self.0.stats.only_listeners.draining.set(whole as u64);
        self.0.stats.only_listeners.draining_chains.set(chains as u64);
    }
}

impl<A: Apply> Sink for ConfigStore<A> {
    fn failed(&self, source: &Source, type_url: Option<&str>) {
        self.count_failure(source, type_url);
    }

    fn counted(&self, source: &Source, type_url: &str, answer: Counted) {
        self.count(source, type_url, answer);
    }

    fn update(&self, source: &Source, update: Update, done: Done) {
        let bytes = read_ahead::bytes(&update);
        // As in Envoy, files and polls are not timed.
        let timed = matches!(source, Source::Ads | Source::Grpc(_)).then(Instant::now);
        let read = read_ahead::read(&update);
        let kind = update.type_url.clone();
        let take = |state: &mut State| {
            let id = state.updates.begin(done);
            let type_url = update.type_url.clone();
            let is_cds = state.cds.is(source);
            if type_url == type_url::CLUSTER && (is_cds || state.demanded.is_source(source)) {
                state.cds.answered |= is_cds;
                state.cds.settled |= is_cds;
                self.take_clusters(state, source, update, id);
            } else if type_url == type_url::LISTENER && state.lds.is(source) {
                (state.lds.answered, state.lds.settled) = (true, true);
                self.take_listeners(state, source, update, id);
            } else if type_url == type_url::VIRTUAL_HOST {
                self.take_hosts(state, source, update, id);
            } else if let Some(kind) = Kind::of(&type_url) {
                self.take_named(state, kind, source, (update, read), id);
            } else if type_url == OffloadedService::type_url() {
                self.offloaded(state, update, id);
            } else if type_url == OverrideShare::type_url() {
                self.shares(state, update, id);
            }
            state.updates.part_done(id);
        };
        match bytes {
            ..read_ahead::LONG => self.changed(take),
            read_ahead::LONG..LARGE => read_ahead::aside(|| self.changed(take)),
            _ => {
                read_ahead::aside(|| {
                    self.changed(take);
                    self.0.give_back.get().inspect(|give_back| give_back());
                });
                self.0.large.notify_one();
            }
        }
        let stats = &self.0.stats;
        match (timed, kind.as_str()) {
            (Some(start), type_url::CLUSTER) => stats.clusters.took(start.elapsed()),
            (Some(start), type_url::LISTENER) => stats.listeners.took(start.elapsed()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
