//! What is known of a cluster: what its watches write, and its registry is told.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::kubernetes::convert::Kind;
use crate::kubernetes::{Node, ObjectKey, Objects, Pod, PodId};
use crate::policy::ServiceManifest;
use crate::registry::{FileError, SourceHealth};
use crate::secrets::Secret;

/// How many objects that cannot be used are shown.
const MOST_SHOWN: usize = 100;

/// How long a deleted Pod is remembered that no slice lists: one that does may be on its way. Also how often that is looked at.
const REMEMBERED: Duration = Duration::from_secs(60);

/// Shared by the watches of a cluster.
#[derive(Debug)]
pub(super) struct Shared {
    cluster: String,
    /// Whether Pods with certain labels only are read: of the others nothing is known at any time.
    selects_pods: bool,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    objects: Objects,
    kinds: BTreeMap<&'static str, KindState>,
    objects_changed: bool,
    /// Pods that there are, as far as could be read, whether they matter or not.
    pods: HashSet<PodId>,
    /// When the Pods of `objects.gone` were deleted.
    gone_since: BTreeMap<String, Instant>,
    tidied: Option<Instant>,
}

#[derive(Debug, Default)]
struct KindState {
    /// Whether all objects have been read once.
    read: bool,
    /// Since when and why they cannot be read.
    failing: Option<(Timestamp, String)>,
    /// Objects that cannot be used.
    wrong: BTreeMap<ObjectKey, String>,
}

/// What there is to tell.
pub(super) struct News {
    /// The objects, `None` until all have been read, or when they have not changed.
    pub(super) objects: Option<Arc<Objects>>,
    /// Whether the objects have all been read once.
    pub(super) read: bool,
    /// How the source is doing.
    pub(super) health: SourceHealth,
}

/// Objects of a kind that are being read, and those that cannot be used.
pub(super) struct Collected<K> {
    objects: BTreeMap<ObjectKey, Arc<K>>,
    wrong: BTreeMap<ObjectKey, String>,
    /// Of Pods, those also that do not matter.
    pods: HashSet<PodId>,
}

impl<K> Default for Collected<K> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), wrong: BTreeMap::new(), pods: HashSet::new() }
    }
}

/// One object: used, not for us, or wrong.
pub(super) type Read<K> = Result<Option<K>, String>;

impl<K: Kind> Collected<K> {
    pub(super) fn add(&mut self, key: ObjectKey, object: Read<K>, pod: Option<PodId>) {
        self.remove(&key, None);
        self.pods.extend(pod);
        match object {
            Ok(Some(object)) => {
                self.objects.insert(key, Arc::new(object));
            }
            Ok(None) => {}
            Err(error) => {
                self.wrong.insert(key, error);
            }
        }
    }

    pub(super) fn remove(&mut self, key: &ObjectKey, pod: Option<PodId>) {
        self.objects.remove(key);
        self.wrong.remove(key);
        if let Some(pod) = pod {
            self.pods.remove(&pod);
        }
    }
}

impl State {
    /// From now on slices may list Pods that are not known: those that come while Pods cannot be read. A watch that is dead is
    /// found to be so after a while only: what slices list by then may have come in that time.
    fn lose_sight_of_pods(&mut self, selects: bool) {
        let mut known = self.pods.clone();
        if selects {
            let listed = self.objects.slices.values().flat_map(|slice| &slice.endpoints);
            known.extend(listed.filter_map(|endpoint| endpoint.target_uid.as_deref().map(PodId::of)));
        }
        self.objects.known_pods = Some(Arc::new(known));
        self.objects_changed = true;
    }

    /// Takes in Pods that there are.
    fn see_pods(&mut self, pods: impl IntoIterator<Item = PodId>) {
        for pod in pods {
            self.pods.insert(pod);
            if let Some(known) = self.objects.known_pods.as_mut().filter(|known| !known.contains(&pod)) {
                Arc::make_mut(known).insert(pod);
                self.objects_changed = true;
            }
        }
    }

    /// Pods can be read again, and all that there are have been seen.
    fn regain_sight_of_pods(&mut self) {
        self.objects_changed |= self.objects.known_pods.take().is_some();
    }

    /// Forgets deleted Pods that no slice lists any more.
    fn tidy_up(&mut self, now: Instant) {
        let recent = |since: Instant| now.saturating_duration_since(since) < REMEMBERED;
        if self.gone_since.is_empty() || self.tidied.is_some_and(recent) {
            return;
        }
        self.tidied = Some(now);
        let listed = self.objects.slices.values().flat_map(|slice| &slice.endpoints);
        let listed: HashSet<&str> = listed.filter_map(|endpoint| endpoint.target_uid.as_deref()).collect();
        self.gone_since.retain(|uid, since| recent(*since) || listed.contains(&**uid));
        let gone_since = &self.gone_since;
        Arc::make_mut(&mut self.objects.gone).retain(|uid, _| gone_since.contains_key(uid));
    }
}

impl Shared {
    pub(super) fn new(cluster: String, kinds: &[&'static str], selects_pods: bool) -> Self {
        let kinds = kinds.iter().map(|kind| (*kind, KindState::default())).collect();
        let state = Mutex::new(State { kinds, ..State::default() });
        Self { cluster, selects_pods, state, changed: Notify::new() }
    }

    /// Waits until there may be something to tell.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // Every change leaves the state whole, so that a panic in one of them spoils nothing.
        let result = change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
        result
    }

    /// Takes in all objects of a kind. An object that cannot be used any more keeps its last good version.
    pub(super) fn replace<K: Kind>(&self, collected: Collected<K>) {
        let Collected { mut objects, wrong, pods } = collected;
        self.with(|state| {
            let known = K::among(&mut state.objects);
            for key in wrong.keys() {
                if let Some(last) = known.get(key) {
                    objects.insert(key.clone(), Arc::clone(last));
                }
            }
            if **known != objects {
                *known = Arc::new(objects);
                state.objects_changed = true;
            }
            if K::NAME == Pod::NAME {
                state.pods.clear();
                state.see_pods(pods);
            }
            let kind = state.kinds.entry(K::NAME).or_default();
            for error in wrong.iter().filter(|(key, error)| kind.wrong.get(key) != Some(error)).map(|(_, error)| error)
            {
                warn!("cluster `{}`: {error}", self.cluster);
            }
            kind.wrong = wrong;
            if !kind.read {
                kind.read = true;
                state.objects_changed = true;
            }
        });
    }

    /// Takes in one object.
    pub(super) fn add<K: Kind>(&self, key: ObjectKey, object: Read<K>, pod: Option<PodId>) {
        self.with(|state| {
            state.see_pods(pod);
            let wrong = &mut state.kinds.entry(K::NAME).or_default().wrong;
            let known = K::among(&mut state.objects);
            match object {
                Ok(object) => {
                    wrong.remove(&key);
                    // Most changes of a Pod are none to us.
                    state.objects_changed |= match object {
                        Some(object) if known.get(&key).is_some_and(|known| **known == object) => false,
                        Some(object) => {
                            Arc::make_mut(known).insert(key, Arc::new(object));
                            true
                        }
                        None => known.contains_key(&key) && Arc::make_mut(known).remove(&key).is_some(),
                    };
                }
                Err(error) => {
                    warn!("cluster `{}`: {error}", self.cluster);
                    wrong.insert(key, error);
                }
            }
        });
    }

    /// Forgets one object.
    pub(super) fn remove<K: Kind>(&self, key: &ObjectKey) {
        self.with(|state| {
            state.kinds.entry(K::NAME).or_default().wrong.remove(key);
            let known = K::among(&mut state.objects);
            state.objects_changed |= known.contains_key(key) && Arc::make_mut(known).remove(key).is_some();
        });
    }

    /// Forgets a Pod that is not told of any more: it was deleted, or is not selected any more.
    pub(super) fn pod_out_of_sight(&self, uid: &str) {
        self.with(|state| state.pods.remove(&PodId::of(uid)));
    }

    /// Remembers that a Pod is no more, whatever slices say of it.
    pub(super) fn pod_gone(&self, uid: String, key: ObjectKey) {
        self.with(|state| {
            state.gone_since.insert(uid.clone(), Instant::now());
            Arc::make_mut(&mut state.objects.gone).insert(uid, key);
            state.objects_changed = true;
        });
    }

    /// Notes that objects of this kind can be read.
    pub(super) fn works<K: Kind>(&self) {
        let failing = self.with(|state| {
            if K::NAME == Pod::NAME {
                state.regain_sight_of_pods();
            }
            state.kinds.entry(K::NAME).or_default().failing.take()
        });
        if let Some((since, _)) = failing {
            info!("cluster `{}`: {}s can be read again, for the first time since {since:.0}", self.cluster, K::NAME);
        }
    }

    /// Notes that objects of this kind cannot be read.
    pub(super) fn fails<K: Kind>(&self, error: &str) {
        let news = self.with(|state| {
            let kind = state.kinds.entry(K::NAME).or_default();
            if K::NAME == Pod::NAME && kind.read && kind.failing.is_none() {
                state.lose_sight_of_pods(self.selects_pods);
            }
            let failing = &mut state.kinds.entry(K::NAME).or_default().failing;
            let news = failing.as_ref().is_none_or(|(_, known)| known != error);
            let since = failing.as_ref().map_or_else(Timestamp::now, |(since, _)| *since);
            *failing = Some((since, error.to_owned()));
            news
        });
        if news {
            warn!("cluster `{}`: {}s cannot be read: {error}", self.cluster, K::NAME);
        }
    }

    /// What there is to tell now. Objects are told once.
    pub(super) fn news(&self, location: String) -> News {
        let state = &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // What is said of nodes and secrets is not worth a cluster where it may not be read, and of a kind that is not defined there are none.
        let is_undefined = |name: &str, error: &str| name == ServiceManifest::KIND && error.contains("404 Not Found");
        let can_wait = |name: &str, kind: &KindState| {
            let error = kind.failing.as_ref().map_or("", |(_, error)| error);
            let refused = [Node::KIND, Secret::KIND].contains(&name) && error.contains("403 Forbidden");
            refused || is_undefined(name, error)
        };
        let read = state.kinds.iter().all(|(name, kind)| kind.read || can_wait(name, kind));
        let changed = read && std::mem::take(&mut state.objects_changed);
        if changed {
            state.tidy_up(Instant::now());
        }
        let objects = changed.then(|| Arc::new(state.objects.clone()));
        let failing = state.kinds.iter().filter_map(|(name, kind)| Some((name, kind.failing.as_ref()?)));
        let (undefined, failing): (Vec<_>, Vec<_>) = failing.partition(|(name, (_, error))| is_undefined(name, error));
        let warnings = undefined.iter().map(|(_, (_, error))| format!("cluster {}: {error}", self.cluster)).collect();
        let mut errors: Vec<&str> = failing.iter().map(|(_, (_, error))| &**error).collect();
        errors.dedup();
        let error = match (&*failing, &*errors) {
            ([], _) => None,
            // What is wrong with all of them is wrong with the cluster.
            (_, [error]) if failing.len() == state.kinds.len() => Some((*error).to_owned()),
            (failing, _) => {
                let each: Vec<_> = failing.iter().map(|(name, (_, error))| format!("{name}s: {error}")).collect();
                Some(each.join("; "))
            }
        };
        let since = failing.iter().map(|(_, (since, _))| *since).min();
        let mut wrong = Vec::new();
        let known = |name: &str, key: &ObjectKey| match name {
            "Service" => state.objects.services.contains_key(key),
            "EndpointSlice" => state.objects.slices.contains_key(key),
            "Pod" => state.objects.pods.contains_key(key),
            "ServiceManifest" => state.objects.manifests.contains_key(key),
            "Secret" => state.objects.secrets.contains_key(key),
            "VirtualIP" => state.objects.virtual_ips.contains_key(key),
            _ => state.objects.nodes.contains_key(key),
        };
        for (name, kind) in &state.kinds {
            for (key, error) in kind.wrong.iter().take(MOST_SHOWN) {
                wrong.push(FileError {
                    file: location.clone(),
                    error: error.clone(),
                    last_good_in_force: known(name, key),
                });
            }
        }
        let health = SourceHealth {
            location,
            stale: error.is_some(),
            error,
            stale_since: since.map(|since| format!("{since:.0}")),
            file_errors: wrong,
            warnings,
        };
        News { objects, read, health }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::manifest::parse;

    /// A slice that lists a Pod of this unique id.
    fn slice_of(uid: &str) -> Objects {
        let text = format!(
            "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: s}}, addressType: IPv4, endpoints: \
             [{{addresses: [10.1.0.1], targetRef: {{kind: Pod, name: p, uid: {uid}}}}}]}}"
        );
        parse(&text).unwrap()
    }

    #[test]
    fn deleted_pods_are_forgotten_when_no_slice_lists_them() {
        let start = Instant::now();
        let mut state = State { objects: slice_of("listed"), ..State::default() };
        for (uid, after) in [("listed", 0), ("unlisted", 0), ("later", 50)] {
            let since = start + Duration::from_secs(after);
            state.gone_since.insert(uid.to_owned(), since);
            Arc::make_mut(&mut state.objects.gone).insert(uid.to_owned(), ObjectKey::new("default", uid));
        }
        let gone = |state: &mut State, after: Duration| {
            state.tidy_up(start + after);
            assert!(state.gone_since.keys().eq(state.objects.gone.keys()), "{state:?}");
            state.objects.gone.keys().cloned().collect::<Vec<_>>().join(" ")
        };
        let second = Duration::from_secs(1);
        // A slice that lists it may be on its way.
        assert_eq!(gone(&mut state, REMEMBERED - second), "later listed unlisted");
        assert_eq!(
            gone(&mut state, REMEMBERED * 2 - second * 2),
            "later listed unlisted",
            "it is not looked again so soon"
        );
        assert_eq!(gone(&mut state, REMEMBERED * 2 - second), "listed");
        state.objects.slices = slice_of("another").slices;
        assert_eq!(gone(&mut state, REMEMBERED * 3 - second), "");
    }

    #[test]
    fn what_slices_list_is_known_where_pods_are_selected_only() {
        for selects in [false, true] {
            let mut state = State { objects: slice_of("listed"), ..State::default() };
            state.see_pods([PodId::of("seen")]);
            state.objects_changed = false;
            state.lose_sight_of_pods(selects);
            assert!(std::mem::take(&mut state.objects_changed));
            let knows = |state: &State, uid: &str| state.objects.known_pods.as_ref().unwrap().contains(&PodId::of(uid));
            assert_eq!(["seen", "listed", "later"].map(|uid| knows(&state, uid)), [true, selects, false]);
            // What is told of bit by bit.
            state.see_pods([PodId::of("later")]);
            assert!(knows(&state, "later") && std::mem::take(&mut state.objects_changed));
            state.see_pods([PodId::of("seen")]);
            assert!(!state.objects_changed, "nothing new");
            state.regain_sight_of_pods();
            assert!(state.objects.known_pods.is_none() && state.objects_changed);
        }
    }
}
