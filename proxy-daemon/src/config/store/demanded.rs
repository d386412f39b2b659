//! What requests need: names that are asked for because of them, and those who wait.
//!
//! A name is asked for from the first request that needs it on. It stays asked for while it exists or somebody waits for it,
//! and for [`KEPT`] after that: a server that takes longer than a request waits is heard for the next one. Of more than
//! [`MAX_NAMES`], or [`MAX_BYTES`] of them, those go first that nobody has waited for the longest; where all are needed,
//! nothing more is asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use culvert_xds_client::{
    ads::{Interest, Update, type_url},
    source::Source,
};
use tokio::time::Instant;

use super::{
    Apply, ConfigStore,
    state::{Due, Phase, State},
};
use crate::{
    on_demand::{Message, Messages, Waiter, Waiting, Wanted},
    stats::{Counter, Scope},
};

/// How many names may be asked for on demand.
pub(super) const MAX_NAMES: usize = 10_000;
/// How long they may be together: a request has them all, and gRPC servers take 4 MiB unless told otherwise.
pub(super) const MAX_BYTES: usize = 2 << 20;
/// How long a name is asked for that nobody waits for and that does not exist.
pub(super) const KEPT: Duration = Duration::from_secs(60);

/// Names on demand, and who waits for them.
#[derive(Default)]
pub(in crate::config) struct Demanded {
    waiting: Waiting,
    /// What is asked for, by where from.
    names: BTreeMap<Arc<Source>, BTreeSet<Arc<str>>>,
    count: usize,
    /// How long all names are together.
    bytes: usize,
    /// Names that do not exist and that nobody waits for, by since when.
    idle: BTreeSet<(Instant, Arc<Source>, Arc<str>)>,
    idle_since: BTreeMap<(Arc<Source>, Arc<str>), Instant>,
    /// It is known when [`Due::OnDemand`] comes next.
    scheduled: bool,
    /// Names of which the sources do not know yet whether they are asked for, and whether they were before.
    changed: BTreeMap<Arc<Source>, BTreeMap<Arc<str>, bool>>,
    stats: Option<Stats>,
    /// Whoever may go on as soon as the data plane has what they waited for.
    over: Vec<Waiter>,
}

/// How what is asked for of a source has changed.
pub(super) struct Changed {
    /// Names, and whether they are asked for.
    pub(super) names: Vec<(String, bool)>,
    /// Some name was asked for before, and some is now.
    pub(super) stays: bool,
}

/// `cluster_manager.odcds.`, from the first name on.
struct Stats {
    update_attempt: Counter,
    update_success: Counter,
    update_rejected: Counter,
}

impl Stats {
    fn new() -> Stats {
        let scope = Scope::new("cluster_manager").child("odcds");
        scope.counter("update_failure");
        scope.counter("init_fetch_timeout");
        Stats {
            update_attempt: scope.counter("update_attempt"),
            update_success: scope.counter("update_success"),
            update_rejected: scope.counter("update_rejected"),
        }
    }
}

impl Demanded {
    /// Whether an update of clusters has something that was asked for on demand.
    pub(super) fn is_in(&self, source: &Source, update: &Update) -> bool {
        let Some(names) = self.names.get(source) else { return false };
        let sent = update.added.iter().map(|resource| &resource.name).chain(&update.removed).chain(&update.absent);
        sent.map(String::as_str).chain(update.unchanged.iter().map(|name| &**name)).any(|name| names.contains(name))
    }

    /// An update with something that was asked for on demand was taken, or refused.
    pub(super) fn answered(&self, accepted: bool) {
        let Some(stats) = &self.stats else { return };
        // Envoy counts each answer as an attempt as well.
        stats.update_attempt.inc();
        if accepted { stats.update_success.inc() } else { stats.update_rejected.inc() }
    }

    /// Whether clusters are had from there on demand.
    pub(super) fn is_source(&self, source: &Source) -> bool {
        self.names.contains_key(source)
    }

    /// Whoever may go on now.
    pub(super) fn over(&mut self) -> Vec<Waiter> {
        std::mem::take(&mut self.over)
    }

    /// Asks for a name; whether it is new, and `None` where there is no room.
    fn want(&mut self, source: &Arc<Source>, name: &Arc<str>) -> Option<bool> {
        self.is_needed(source, name);
        if self.names.get(source).is_some_and(|names| names.contains(name)) {
            return Some(false);
        }
        while self.count >= MAX_NAMES || self.bytes + name.len() > MAX_BYTES {
            let (_, source, name) = self.idle.first().cloned()?;
            self.forget(&source, &name);
        }
        self.names.entry(Arc::clone(source)).or_default().insert(Arc::clone(name));
        self.count += 1;
        self.bytes += name.len();
        self.has_changed(source, name, false);
        Some(true)
    }

    /// What is waited for from there.
    pub(super) fn waiting(&self, source: &Source) -> Vec<Arc<str>> {
        self.waiting.names(source)
    }

    /// What is asked for from there.
    pub(super) fn names_of(&self, source: &Source) -> BTreeSet<String> {
        self.names.get(source).into_iter().flatten().map(|name| name.to_string()).collect()
    }

    /// The sources of which other names are asked for than they know.
    pub(super) fn take_changed(&mut self) -> Vec<(Arc<Source>, Changed)> {
        let all = std::mem::take(&mut self.changed).into_iter().map(|(source, names)| {
            let known = self.names.get(&source);
            let now = |name: &str| known.is_some_and(|names| names.contains(name));
            let names = names.into_iter().filter_map(|(name, before)| {
                let now = now(&name);
                (now != before).then(|| (name.to_string(), now))
            });
            let names: Vec<_> = names.collect();
            let now = known.map_or(0, BTreeSet::len);
            let new = names.iter().filter(|(_, now)| *now).count();
            let had = now + names.len() - new > new;
            (source, Changed { names, stays: had && now > 0 })
        });
        all.filter(|(_, changed)| !changed.names.is_empty()).collect()
    }

    /// What was asked for does not exist, or not any more: it is not asked for until the next request needs it.
    pub(super) fn lost(&mut self, wanted: &Wanted) {
        self.end(wanted);
        let (source, name) = wanted.parts();
        self.forget(source, name);
    }

    /// Nobody waits for something that does not exist. Whether [`State::forget_idle`] is to be called then.
    fn nobody_waits(&mut self, wanted: &Wanted, now: Instant) -> bool {
        let (source, name) = wanted.parts();
        self.is_idle(source, name, now);
        !std::mem::replace(&mut self.scheduled, true)
    }

    /// Forgets what nobody has waited for for long enough; when to come back.
    fn forget_idle(&mut self, now: Instant) -> Option<Instant> {
        while let Some((_, source, name)) = self.idle.first().filter(|idle| idle.0 + KEPT <= now).cloned() {
            self.forget(&source, &name);
        }
        let next = self.idle.first().map(|idle| idle.0 + KEPT);
        self.scheduled = next.is_some();
        next
    }

    fn forget(&mut self, source: &Arc<Source>, name: &Arc<str>) {
        self.is_needed(source, name);
        let Some(names) = self.names.get_mut(source) else { return };
        if names.remove(name) {
            self.count -= 1;
            self.bytes -= name.len();
            if names.is_empty() {
                self.names.remove(source);
            }
            self.has_changed(source, name, true);
        }
    }

    fn has_changed(&mut self, source: &Arc<Source>, name: &Arc<str>, before: bool) {
        let names = self.changed.entry(Arc::clone(source)).or_default();
        names.entry(Arc::clone(name)).or_insert(before);
    }

    fn is_needed(&mut self, source: &Arc<Source>, name: &Arc<str>) {
        let key = (Arc::clone(source), Arc::clone(name));
        if let Some(since) = self.idle_since.remove(&key) {
            self.idle.remove(&(since, key.0, key.1));
        }
    }

    fn is_idle(&mut self, source: &Arc<Source>, name: &Arc<str>, now: Instant) {
        self.is_needed(source, name);
        self.idle.insert((now, Arc::clone(source), Arc::clone(name)));
        self.idle_since.insert((Arc::clone(source), Arc::clone(name)), now);
    }

    /// Whoever waits for this goes on.
    pub(super) fn end(&mut self, wanted: &Wanted) {
        let waiters = self.waiting.end(wanted);
        self.over.extend(waiters);
    }

    /// The sources that are asked for this name.
    fn sources_of(&self, name: &str) -> Vec<Arc<Source>> {
        let asked = self.names.iter().filter(|(_, names)| names.contains(name));
        asked.map(|(source, _)| Arc::clone(source)).collect()
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Asks for what requests need, and has them go on. Runs as long as the workers.
    pub async fn serve_on_demand(self, mut messages: Messages) {
        while let Some(messages) = messages.next().await {
            self.heed(messages);
        }
    }

    /// Hears what requests say.
    pub(super) fn heed(&self, messages: Vec<Message>) {
        self.changed(|state| {
            let now = Instant::now();
            for message in messages {
                match message {
                    Message::Asked(wanted, waiter) => state.ask(wanted, waiter),
                    Message::TakenBack(id) => {
                        state.routes_demanded.take_back(id);
                        let all = [&mut state.demanded, &mut state.vhds.demanded];
                        let wanted = all.into_iter().find_map(|some| some.waiting.take_back(id));
                        if let Some(wanted) = wanted {
                            state.nobody_waits(&wanted, now);
                        }
                    }
                }
            }
        });
    }
}

impl State {
    fn ask(&mut self, wanted: Wanted, waiter: Waiter) {
        let (source, name) = wanted.parts();
        let is_there = match &wanted {
            Wanted::Cluster { .. } => self.clusters.by_name.get(name).is_some_and(|entry| entry.active.is_some()),
            Wanted::VirtualHost { .. } => self.is_host_there(source, name),
            Wanted::Routes { .. } => return self.ask_for_routes(wanted, waiter),
        };
        let is_cluster = matches!(wanted, Wanted::Cluster { .. });
        if is_cluster && self.is_refused(source, name) {
            return self.demanded.over.push(waiter);
        }
        let demanded = if is_cluster { &mut self.demanded } else { &mut self.vhds.demanded };
        let asked = if is_there { None } else { demanded.want(source, name) };
        let Some(is_new) = asked else { return demanded.over.push(waiter) };
        if is_new && is_cluster {
            demanded.stats.get_or_insert_with(Stats::new).update_attempt.inc();
        } else if is_new {
            self.count_host(source, name);
        }
        let demanded = if is_cluster { &mut self.demanded } else { &mut self.vhds.demanded };
        demanded.waiting.add(wanted, waiter);
    }

    /// What the server has under a name that is asked for already was refused: it would be waited for in vain.
    fn is_refused(&self, source: &Source, name: &str) -> bool {
        self.demanded.names.get(source).is_some_and(|names| names.contains(name))
            && !self.clusters.by_name.contains_key(name)
            && self.clusters.refused.contains(source, name)
    }

    fn nobody_waits(&mut self, wanted: &Wanted, now: Instant) {
        let due = match wanted {
            Wanted::Cluster { name, .. } => {
                !self.clusters.by_name.contains_key(name) && self.demanded.nobody_waits(wanted, now)
            }
            // One that is there has no request that waits.
            Wanted::VirtualHost { .. } => self.vhds.demanded.nobody_waits(wanted, now),
            // They stay asked for.
            Wanted::Routes { .. } => false,
        };
        if due {
            self.at(now + KEPT, Due::OnDemand);
        }
    }

    /// A cluster can be used, or its first version was refused.
    pub(super) fn cluster_is_decided(&mut self, name: &Arc<str>) {
        for source in self.demanded.sources_of(name) {
            let wanted = Wanted::Cluster { source, name: Arc::clone(name) };
            self.demanded.end(&wanted);
            self.nobody_waits(&wanted, Instant::now());
        }
    }

    /// A source has no cluster of this name.
    pub(super) fn cluster_is_absent(&mut self, source: &Arc<Source>, name: &str) {
        self.demanded.lost(&Wanted::Cluster { source: Arc::clone(source), name: name.into() });
    }

    /// Forgets what nobody has waited for for long enough.
    pub(super) fn forget_idle(&mut self, now: Instant) {
        let next = [self.demanded.forget_idle(now), self.vhds.demanded.forget_idle(now)];
        next.into_iter().flatten().for_each(|next| self.at(next, Due::OnDemand));
    }

    /// What is wanted of the clusters of a source.
    pub(super) fn cluster_interest(&self, source: &Source) -> Interest {
        let names = self.demanded.names.get(source).into_iter().flatten().map(|name| name.to_string());
        let mut names: BTreeSet<String> = names.collect();
        let cds = self.cds.is(source) && self.phase >= Phase::Clusters;
        if cds {
            names.extend(self.cds.name.clone());
        }
        match (cds && self.cds.name.is_none(), names.is_empty()) {
            (true, true) => Interest::Wildcard,
            (true, false) => Interest::WildcardAnd(names),
            (false, true) => Interest::None,
            (false, false) => Interest::Names(names),
        }
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Tells the sources which clusters are wanted, where that has changed.
    pub(super) fn subscribe_clusters(&self, state: &mut State) {
        for (source, changed) in state.demanded.take_changed() {
            // Everything was and is asked for there besides: since then at least, see `advance`.
            let all = state.cds.is(&source) && state.phase >= Phase::Clusters;
            match changed.stays || all {
                true => self.0.subscriptions.set_names(Source::clone(&source), type_url::CLUSTER, changed.names),
                false => {
                    let interest = state.cluster_interest(&source);
                    self.0.subscriptions.set(Source::clone(&source), type_url::CLUSTER, interest);
                }
            }
        }
    }
}
