//! ECDS: configurations of HTTP filters, each put into every place that wants it.

use std::{
    sync::{Arc, Weak},
    time::{SystemTime, UNIX_EPOCH},
};

use culvert_xds_client::source::Source;

use super::{
    Apply, ConfigStore,
    kinds::{Kind, Value},
    state::State,
};
use crate::{
    config::{FieldError, model::Listener},
    http::filters::{DiscoveredFilter, Factory},
    stats::{Counter, Gauge, Lease, Scope, version_number},
};

/// Where a configuration says what is wrong.
const PATH: &str = "typed_config";

/// What a resource is for.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Those of all listeners that want it, of those that drain as well.
    filters: Vec<Weak<DiscoveredFilter>>,
    stats: Option<Box<Stats>>,
}

/// `extension_config_discovery.http_filter.<name>.`
#[derive(Debug)]
struct Stats {
    scope: Scope,
    config_reload: Counter,
    config_fail: Counter,
    config_conflict: Counter,
    update_attempt: Counter,
    update_success: Counter,
    update_rejected: Counter,
    update_failure: Counter,
    init_fetch_timeout: Counter,
    update_time: Gauge,
    _lease: Lease,
}

impl Stats {
    fn new(source: &Source, name: &str) -> Stats {
        let scope = Scope::new("extension_config_discovery").child("http_filter").child(name);
        let lease = scope.lease();
        scope.gauge("version").set(0);
        scope.set_text("version_text", "");
        let update_attempt = scope.counter("update_attempt");
        // Envoy counts the first request, and each answer to it.
        if matches!(source, Source::Ads | Source::Grpc(_)) {
            update_attempt.inc();
        }
        Stats {
            config_reload: scope.counter("config_reload"),
            config_fail: scope.counter("config_fail"),
            config_conflict: scope.counter("config_conflict"),
            update_attempt,
            update_success: scope.counter("update_success"),
            update_rejected: scope.counter("update_rejected"),
            update_failure: scope.counter("update_failure"),
            init_fetch_timeout: scope.counter("init_fetch_timeout"),
            update_time: scope.gauge("update_time"),
            scope,
            _lease: lease,
        }
    }
}

impl Places {
    fn live(&self) -> impl Iterator<Item = Arc<DiscoveredFilter>> {
        self.filters.iter().filter_map(Weak::upgrade)
    }

    /// Reads a configuration for each of the places: if one of them cannot have it, none does, as in Envoy.
    pub(super) fn parse(&self, value: &Value) -> Result<Vec<(Arc<DiscoveredFilter>, Factory)>, FieldError> {
        let Value::ExtensionConfig(config) = value else { return Ok(Vec::new()) };
        self.live().map(|place| place.parse(config, PATH).map(|factory| (place, factory))).collect()
    }

    /// The configuration has been put into the places, or taken out of them.
    pub(super) fn reloaded(&self) {
        if let Some(stats) = &self.stats {
            stats.config_reload.inc();
        }
    }

    /// An update of this version was taken, or refused.
    pub(super) fn answered(&self, version: &str, accepted: bool) {
        let Some(stats) = &self.stats else { return };
        stats.update_attempt.inc();
        if !accepted {
            stats.update_rejected.inc();
            stats.config_fail.inc();
            return;
        }
        stats.update_success.inc();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        stats.update_time.set(now.as_millis() as u64);
        if !version.is_empty() {
            stats.scope.set_text("version_text", version);
            stats.scope.gauge("version").set(version_number(version));
        }
    }

    /// The answer was that nothing has changed.
    pub(super) fn attempted(&self) {
        if let Some(stats) = &self.stats {
            stats.update_attempt.inc();
        }
    }

    /// There was no answer.
    pub(super) fn failed(&self) {
        if let Some(stats) = &self.stats {
            stats.update_attempt.inc();
            stats.update_failure.inc();
        }
    }

    /// It was waited for long enough.
    pub(super) fn timed_out(&self) {
        if let Some(stats) = &self.stats {
            stats.update_attempt.inc();
            stats.init_fetch_timeout.inc();
            stats.config_fail.inc();
        }
    }
}

impl<A: Apply> ConfigStore<A> {
    /// The places of a listener's new version, which has asked for what fills them, get what is there already.
    pub(super) fn fill_places(&self, state: &mut State, listener: &Listener) {
        for place in listener.discovered_filters() {
            let wanted = &place.wanted;
            let watched = &mut state.watched[Kind::ExtensionConfigs as usize];
            let Some(entry) = watched.get_mut(&wanted.from.source, &wanted.name) else { continue };
            entry.places.filters.retain(|known| known.strong_count() > 0);
            entry.places.filters.push(Arc::downgrade(place));
            let new = || Box::new(Stats::new(&wanted.from.source, &wanted.name));
            let stats = entry.places.stats.get_or_insert_with(new);
            let Some(Value::ExtensionConfig(config)) = &entry.value else { continue };
            match place.parse(config, PATH) {
                Ok(factory) => self.0.apply.set_filter(place, Some(factory)),
                // It was accepted for other places, and stays there; this one has its default.
                Err(error) => {
                    let name = &wanted.name;
                    tracing::warn!(listener = %listener.name, "what ECDS delivered as {name:?} cannot be used: {error}");
                    stats.config_conflict.inc();
                }
            }
        }
    }

    /// A configuration is gone: its places have their defaults, or nothing.
    pub(super) fn remove_extension_config(&self, state: &mut State, source: &Source, name: &str) {
        let Some(entry) = state.watched[Kind::ExtensionConfigs as usize].get_mut(source, name) else { return };
        (entry.stored, entry.refused) = (None, None);
        if entry.value.take().is_none() {
            return;
        }
        entry.places.live().for_each(|place| self.0.apply.set_filter(&place, None));
        entry.places.reloaded();
    }
}
