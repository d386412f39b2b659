//! What is counted for each resource that is asked for by name, under the names of Envoy's subscriptions. It is kept with the
//! resource and written out when somebody looks, so that it goes with it.

use std::{collections::BTreeMap, sync::Arc};

use culvert_xds_client::{ads::Counted, source::Source};

use super::{
    Apply, ConfigStore,
    counts::now_ms,
    kinds::Kind,
    state::State,
    watched::{Entry, Owner},
};
use crate::stats::{Metric, version_number};

/// The counters of one subscription.
#[derive(Debug, Clone, Default)]
pub(super) struct Subscribed {
    attempts: u32,
    successes: u32,
    failures: u32,
    rejected: u32,
    timeouts: u32,
    empty: u32,
    /// Endpoints: how often they came with an end, and how often that came.
    ending: u32,
    stale: u32,
    /// Updates that brought something else than what was in force.
    changes: u32,
    /// When the last of them was, in milliseconds since 1970; 0: never.
    changed: u64,
    /// When an update was last accepted, in milliseconds since 1970; 0: never.
    updated: u64,
    /// The version that was accepted last.
    version: Option<Arc<str>>,
}

impl Subscribed {
    /// Envoy counts the first request of a stream as an attempt, and then each answer.
    pub(super) fn new(source: &Source) -> Subscribed {
        let attempts = u32::from(matches!(source, Source::Ads | Source::Grpc(_)));
        Subscribed { attempts, ..Subscribed::default() }
    }

    /// An update of this version was taken, or refused.
    pub(super) fn answered(&mut self, version: &Arc<str>, accepted: bool) {
        self.attempts += 1;
        if !accepted {
            self.rejected += 1;
            return;
        }
        self.successes += 1;
        self.updated = now_ms();
        if !version.is_empty() {
            self.version = Some(Arc::clone(version));
        }
    }

    /// Endpoints have come that are good for a while only.
    pub(super) fn ends(&mut self) {
        self.ending += 1;
    }

    /// Endpoints are not good any more.
    pub(super) fn is_stale(&mut self) {
        self.stale += 1;
    }

    /// Something else is in force than before.
    pub(super) fn changed(&mut self) {
        self.changes += 1;
        self.changed = now_ms();
    }

    /// There was no answer.
    pub(super) fn failed(&mut self) {
        self.attempts += 1;
        self.failures += 1;
    }

    /// It was waited for long enough.
    pub(super) fn timed_out(&mut self) {
        self.attempts += 1;
        self.timeouts += 1;
    }

    /// An answer had none of what is asked for.
    pub(super) fn was_empty(&mut self) {
        self.empty += 1;
    }

    /// Several subscriptions that share a name.
    fn add(&mut self, other: &Subscribed) {
        self.attempts += other.attempts;
        self.successes += other.successes;
        self.failures += other.failures;
        self.rejected += other.rejected;
        self.timeouts += other.timeouts;
        self.empty += other.empty;
        self.ending += other.ending;
        self.stale += other.stale;
        self.changes += other.changes;
        self.changed = self.changed.max(other.changed);
        if other.updated >= self.updated {
            (self.updated, self.version) = (other.updated, other.version.clone());
        }
    }

    fn metrics(&self, scope: &str, has_empty: bool, metrics: &mut Vec<Metric>) {
        let counter = |name: &str, value: u32| Metric::external(&format!("{scope}.{name}"), value.into());
        let version = self.version.as_deref().unwrap_or_default();
        metrics.extend([
            counter("update_attempt", self.attempts),
            counter("update_success", self.successes),
            counter("update_failure", self.failures),
            counter("update_rejected", self.rejected),
            counter("init_fetch_timeout", self.timeouts),
            Metric::external_gauge(&format!("{scope}.update_time"), self.updated),
            Metric::external_gauge(&format!("{scope}.version"), version_number(version)),
            Metric::external_text(&format!("{scope}.version_text"), version),
        ]);
        if has_empty {
            metrics.push(counter("update_empty", self.empty));
        }
    }
}

impl<A: Apply> ConfigStore<A> {
    /// What is counted for the resources that are asked for by name.
    pub fn metrics(&self) -> Vec<Metric> {
        self.lock().subscriptions_now()
    }

    /// An attempt to get resources from a source has failed: those of a type, or of all.
    pub(super) fn count_failure(&self, source: &Source, type_url: Option<&str>) {
        let mut state = self.lock();
        for kind in Kind::ALL.into_iter().filter(|kind| type_url.is_none_or(|type_url| kind.type_url() == type_url)) {
            state.watched[kind as usize].of_mut(source).for_each(|entry| {
                entry.subscribed.failed();
                entry.places.failed();
            });
        }
    }
}

impl<A: Apply> ConfigStore<A> {
    /// A file or an answer to a poll only counts: for each resource that is asked for with it, as Envoy asks for each alone.
    pub(super) fn count(&self, source: &Source, type_url: &str, answer: Counted) {
        let Some(kind) = Kind::of(type_url) else { return };
        let mut state = self.lock();
        let none: Arc<str> = Arc::default();
        state.watched[kind as usize].of_mut(source).for_each(|entry| {
            let accepted = match answer {
                Counted::Unmodified => {
                    entry.subscribed.attempts += 1;
                    return entry.places.attempted();
                }
                Counted::Rejected => false,
                // Scopes are one resource; of others each is for itself.
                Counted::Same { accepted } if kind == Kind::Scopes => accepted,
                Counted::Same { .. } => entry.refused.is_none(),
            };
            entry.subscribed.answered(&none, accepted);
            entry.places.answered(&none, accepted);
        });
    }
}

impl State {
    fn subscriptions_now(&self) -> Vec<Metric> {
        // What a cluster that stays the same cluster had of an earlier source is not added up.
        let mut metrics: Vec<_> = self
            .clusters
            .warming_stat_names()
            .map(|name| Metric::external_gauge(&format!("cluster.{}.warming_state", name.replace(':', "_")), 1))
            .collect();
        for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::ExtensionConfigs) {
            let mut all: BTreeMap<String, Subscribed> = BTreeMap::new();
            for (source, name, entry) in self.watched(kind).entries() {
                for scope in self.scopes_of(kind, source, name, entry) {
                    all.entry(scope).or_default().add(&entry.subscribed);
                }
            }
            let has_empty = matches!(kind, Kind::Endpoints | Kind::Routes | Kind::Scopes);
            for (scope, subscribed) in all {
                subscribed.metrics(&scope, has_empty, &mut metrics);
                if kind == Kind::Routes {
                    metrics.extend([
                        Metric::external(&format!("{scope}.config_reload"), subscribed.changes.into()),
                        Metric::external_gauge(&format!("{scope}.config_reload_time_ms"), subscribed.changed),
                    ]);
                }
                if kind == Kind::Endpoints {
                    let same = subscribed.successes.saturating_sub(subscribed.changes);
                    metrics.push(Metric::external(&format!("{scope}.update_no_rebuild"), same.into()));
                    // Endpoints are not cached.
                    let counted = [
                        ("assignment_stale", subscribed.stale),
                        ("assignment_timeout_received", subscribed.ending),
                        ("assignment_use_cached", 0),
                    ];
                    let shown = |(name, count): (&str, u32)| Metric::external(&format!("{scope}.{name}"), count.into());
                    metrics.extend(counted.map(shown));
                }
            }
        }
        metrics
    }

    /// The scopes that a subscription is counted in, as Envoy names them.
    fn scopes_of(&self, kind: Kind, source: &Source, name: &str, entry: &Entry) -> Vec<String> {
        // As in all labels of Envoy's.
        let label = |text: &str| text.replace(':', "_");
        match kind {
            Kind::Endpoints => {
                let clusters = entry.users.iter().filter_map(|user| match &user.owner {
                    Owner::Cluster(cluster) => self.cluster_stat_name(cluster, user.version),
                    _ => None,
                });
                let mut scopes: Vec<_> = clusters.map(|cluster| format!("cluster.{}", label(&cluster))).collect();
                // Both versions of a cluster that is being replaced.
                scopes.sort_unstable();
                scopes.dedup();
                scopes
            }
            Kind::Routes => {
                let prefixes = self.rds_prefixes(name, &entry.users).into_iter();
                prefixes.map(|prefix| format!("http.{}.rds.{}", label(&prefix), label(name))).collect()
            }
            Kind::Scopes => {
                let names = self.scoped_names(source).into_iter();
                names.map(|(prefix, name)| format!("http.{}.scoped_rds.{}", label(&prefix), label(&name))).collect()
            }
            Kind::Runtime => vec!["runtime".to_owned()],
            Kind::Secrets => vec![format!("sds.{}", label(name))],
            Kind::ExtensionConfigs => Vec::new(),
        }
    }
}
