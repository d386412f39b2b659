use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use culvert_xds_client::source::Source;
use envoy_types::pb::google::protobuf::{Struct, value::Kind};
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{ModifyKind, RenameMode},
};
use serde_json::{Value as Json, json};

use super::{
    Entry,
    disk::DiskLayer,
    slots::{self, Values},
};
use crate::{
    config::model::ResourceRef,
    stats::{self, Counter, Gauge},
};

/// Keys that `/runtime_modify` may set: an endless client must not use up the memory.
const MAX_ADMIN_KEYS: usize = 100_000;

/// One layer of the bootstrap's `layered_runtime`.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Its name, as `/runtime` shows it.
    pub name: String,
    /// Where its values come from.
    pub source: LayerSource,
}

/// `RuntimeLayer.layer_specifier`.
#[derive(Debug, Clone, PartialEq)]
pub enum LayerSource {
    /// Written into the bootstrap.
    Static(HashMap<String, Entry>),
    /// A directory.
    Disk(DiskLayer),
    /// `/runtime_modify`
    Admin,
    /// The control plane: the values of the resource of this name.
    Rtds(ResourceRef),
}

/// The values of a static layer or of an RTDS resource, by full key.
///
/// # Errors
/// The key of a value that is a list or a null.
pub fn check_values(values: &Struct) -> Result<HashMap<String, Entry>, String> {
    let mut flat = Values::new();
    flatten(values, "", &mut flat)?;
    Ok(flat)
}

fn flatten(values: &Struct, prefix: &str, flat: &mut Values) -> Result<(), String> {
    for (name, value) in &values.fields {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match &value.kind {
            Some(Kind::StructValue(inner)) if !is_value(inner) => flatten(inner, &key, flat)?,
            _ => match Entry::from_value(value) {
                Some(entry) => drop(flat.insert(key, entry)),
                None => return Err(key),
            },
        }
    }
    Ok(())
}

/// Whether an object is a `FractionalPercent`, and not keys below a key.
fn is_value(fields: &Struct) -> bool {
    fields.fields.is_empty() || fields.fields.contains_key("numerator") || fields.fields.contains_key("denominator")
}

/// Why `/runtime_modify` changed nothing. The texts are Envoy's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModifyError {
    /// The bootstrap has none.
    #[error("No admin layer specified")]
    NoAdminLayer,
    /// A value is not YAML.
    #[error("{0}")]
    Invalid(String),
    /// There are too many already.
    #[error("too many keys: the admin layer holds at most {MAX_ADMIN_KEYS}")]
    TooMany,
}

/// The layers, and what they amount to. Cheap to clone.
#[derive(Clone)]
pub struct Runtime(Arc<Inner>);

struct Inner {
    layers: Vec<Layer>,
    stats: RuntimeStats,
    state: Mutex<State>,
    /// Ends with the last handle.
    watcher: Mutex<Option<RecommendedWatcher>>,
}

#[derive(Default)]
struct State {
    admin: Values,
    /// By the resource's source and name.
    rtds: HashMap<(Source, String), Values>,
    /// The layers of the last load: those that are there, in their order.
    loaded: Vec<(String, Arc<Values>)>,
}

struct RuntimeStats {
    admin_overrides_active: Gauge,
    load_error: Counter,
    load_success: Counter,
    num_keys: Gauge,
    num_layers: Gauge,
    override_dir_exists: Counter,
    override_dir_not_exists: Counter,
}

impl RuntimeStats {
    fn new() -> RuntimeStats {
        // Shown from the start, and counted where deprecated fields are found.
        stats::counter("runtime.deprecated_feature_use");
        stats::gauge("runtime.deprecated_feature_seen_since_process_start");
        RuntimeStats {
            admin_overrides_active: stats::gauge("runtime.admin_overrides_active"),
            load_error: stats::counter("runtime.load_error"),
            load_success: stats::counter("runtime.load_success"),
            num_keys: stats::gauge("runtime.num_keys"),
            num_layers: stats::gauge("runtime.num_layers"),
            override_dir_exists: stats::counter("runtime.override_dir_exists"),
            override_dir_not_exists: stats::counter("runtime.override_dir_not_exists"),
        }
    }
}

impl Runtime {
    /// Loads the layers, puts their values in force, and watches the disk layers' links from then on.
    ///
    /// # Errors
    /// A link that cannot be watched: its directory does not exist, for example.
    pub fn start(layers: Vec<Layer>) -> Result<Runtime, String> {
        let inner = Inner { layers, stats: RuntimeStats::new(), state: Mutex::default(), watcher: Mutex::default() };
        let runtime = Runtime(Arc::new(inner));
        runtime.0.load();
        runtime.watch()?;
        // Again, as Envoy does: what changed before the watch began is not missed.
        runtime.0.load();
        Ok(runtime)
    }

    /// Reloads when something is moved onto a disk layer's link. Like Envoy it takes no notice of files that change below.
    fn watch(&self) -> Result<(), String> {
        let links: BTreeSet<_> = self.0.layers.iter().filter_map(Layer::link).map(Path::to_path_buf).collect();
        if links.is_empty() {
            return Ok(());
        }
        let (weak, watched): (Weak<Inner>, _) = (Arc::downgrade(&self.0), links.clone());
        let on_event = move |event: notify::Result<notify::Event>| match event {
            Ok(event) => {
                let moved = matches!(event.kind, EventKind::Modify(ModifyKind::Name(RenameMode::To)));
                let lost = event.need_rescan();
                if (lost || moved && event.paths.iter().any(|path| watched.contains(path)))
                    && let Some(runtime) = weak.upgrade()
                {
                    runtime.load();
                }
            }
            Err(error) => tracing::warn!(%error, "the runtime's disk layers are not watched any more"),
        };
        let mut watcher = notify::recommended_watcher(on_event).map_err(|error| error.to_string())?;
        let directories: BTreeSet<&Path> = links.iter().filter_map(|link| link.parent()).collect();
        for directory in directories {
            let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
            watcher
                .watch(directory, RecursiveMode::NonRecursive)
                .map_err(|error| format!("cannot watch {}: {error}", directory.display()))?;
        }
        *lock(&self.0.watcher) = Some(watcher);
        Ok(())
    }

    /// What `/runtime_modify` does: sets keys of the admin layer, and removes those whose value is empty. All or nothing;
    /// when this returns, the values are in force.
    ///
    /// # Errors
    /// There is no admin layer, or a value is not YAML.
    pub fn modify<'a>(&self, values: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), ModifyError> {
        if !self.0.layers.iter().any(|layer| layer.source == LayerSource::Admin) {
            return Err(ModifyError::NoAdminLayer);
        }
        let mut changes: HashMap<&str, Option<Entry>> = HashMap::new();
        for (key, text) in values {
            // Of several values of one key the first counts.
            if !changes.contains_key(key) {
                let entry = (!text.is_empty()).then(|| Entry::from_text(text)).transpose();
                changes.insert(key, entry.map_err(ModifyError::Invalid)?);
            }
        }
        let mut state = lock(&self.0.state);
        if state.admin.len() + changes.len() > MAX_ADMIN_KEYS {
            return Err(ModifyError::TooMany);
        }
        for (key, entry) in changes {
            match entry {
                Some(entry) => drop(state.admin.insert(key.to_owned(), entry)),
                None => drop(state.admin.remove(key)),
            }
        }
        self.0.stats.admin_overrides_active.set(u64::from(!state.admin.is_empty()));
        self.0.reload(&mut state);
        Ok(())
    }

    /// The control plane's values for the layers of an RTDS resource; none: it has removed it. When this returns, the values
    /// are in force.
    pub fn set_rtds(&self, source: &Source, resource: &str, values: HashMap<String, Entry>) {
        let mut state = lock(&self.0.state);
        state.rtds.insert((source.clone(), resource.to_owned()), values);
        self.0.reload(&mut state);
    }

    /// The RTDS resources that the layers come from.
    pub fn rtds(&self) -> impl Iterator<Item = &ResourceRef> {
        self.0.layers.iter().filter_map(|layer| match &layer.source {
            LayerSource::Rtds(wanted) => Some(wanted),
            _ => None,
        })
    }

    /// `/runtime`: the layers' names, and for each key its value in each layer and what comes of them.
    pub fn to_json(&self) -> Json {
        let state = lock(&self.0.state);
        let keys: BTreeSet<&String> = state.loaded.iter().flat_map(|(_, values)| values.keys()).collect();
        let entries: BTreeMap<&String, Json> = keys
            .into_iter()
            .map(|key| {
                let values = state.loaded.iter().map(|(_, values)| values.get(key).map_or("", |entry| &entry.raw));
                let values: Vec<&str> = values.collect();
                let last = values.iter().rfind(|value| !value.is_empty()).copied().unwrap_or_default();
                (key, json!({ "final_value": last, "layer_values": values }))
            })
            .collect();
        let layers: Vec<&String> = state.loaded.iter().map(|(name, _)| name).collect();
        json!({ "layers": layers, "entries": entries })
    }
}

impl Layer {
    /// The link that is watched.
    fn link(&self) -> Option<&Path> {
        match &self.source {
            LayerSource::Disk(disk) => Some(&disk.symlink_root),
            LayerSource::Static(_) | LayerSource::Admin | LayerSource::Rtds(_) => None,
        }
    }
}

impl Inner {
    fn load(&self) {
        self.reload(&mut lock(&self.state));
    }

    /// Reads the layers and puts the values in force. Under the lock, so that loads take effect in their order.
    fn reload(&self, state: &mut State) {
        let (mut loaded, mut directories, mut errors) = (Vec::new(), 0, 0);
        for layer in &self.layers {
            let values = match &layer.source {
                LayerSource::Static(values) => values.clone(),
                LayerSource::Admin => state.admin.clone(),
                LayerSource::Rtds(ResourceRef { name, from }) => {
                    let key = (Source::clone(&from.source), name.to_string());
                    state.rtds.get(&key).cloned().unwrap_or_default()
                }
                LayerSource::Disk(disk) => match disk.read() {
                    Ok(Some(values)) => {
                        directories += 1;
                        values
                    }
                    Ok(None) => continue,
                    Err(error) => {
                        errors += 1;
                        tracing::warn!(layer = %layer.name, %error, "runtime layer is left out");
                        continue;
                    }
                },
            };
            loaded.push((layer.name.clone(), Arc::new(values)));
        }
        let mut merged = Values::new();
        for (_, values) in &loaded {
            merged.extend(values.iter().map(|(key, entry)| (key.clone(), entry.clone())));
        }
        let (layers, keys) = (loaded.len() as u64, merged.len() as u64);
        state.loaded = loaded;
        slots::publish(merged);
        // Last: what is counted has happened.
        let stats = &self.stats;
        stats.num_layers.set(layers);
        stats.num_keys.set(keys);
        // More than one, not one: as in Envoy.
        if directories > 1 {
            stats.override_dir_exists.inc()
        } else {
            stats.override_dir_not_exists.inc()
        }
        if errors == 0 { stats.load_success.inc() } else { stats.load_error.inc() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic leaves values that are not in force yet: the next load puts them in force.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
