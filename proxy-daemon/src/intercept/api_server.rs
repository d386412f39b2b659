//! Follows the pods of this node in an API server.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use culvert_kube_api::{Access, KubernetesConfig, Object, Objects, Selection, Watch};
use tokio::sync::Notify;

use super::follower::Follower;
use super::manifests::{Dated, RawPod, known};
use super::pods::Origin;
use super::selectors::Enrolment;
use super::state::State;

/// How long changes are gathered: a pod that starts changes some times in a row.
const GATHER: Duration = Duration::from_millis(10);

/// Starts the thread that follows an API server. Until it has read all pods the node is not ready.
pub(super) fn follow(
    enrolment: Enrolment,
    kubernetes: KubernetesConfig,
    state: Arc<Mutex<State>>,
) -> io::Result<Follower> {
    let pods = Arc::new(NodePods { enrolment, found: Mutex::default(), changed: Notify::new() });
    pods.tell(&state);
    Follower::start(move || async move { watch(pods, kubernetes, &state).await })
}

async fn watch(pods: Arc<NodePods>, kubernetes: KubernetesConfig, state: &Mutex<State>) {
    let fields = format!("spec.nodeName={}", pods.enrolment.node_name);
    let selection = Selection { labels: String::new(), fields };
    let watch = Watch::new(Arc::new(Access::new(kubernetes)), Arc::clone(&pods), selection);
    let tell = async {
        loop {
            pods.changed.notified().await;
            tokio::time::sleep(GATHER).await;
            pods.tell(state);
        }
    };
    tokio::select! {
        () = watch.run() => {}
        () = tell => {}
    }
}

/// What the API server says of this node's pods.
struct NodePods {
    enrolment: Enrolment,
    found: Mutex<Found>,
    changed: Notify,
}

#[derive(Default)]
struct Found {
    /// By namespace and name.
    pods: BTreeMap<String, Dated>,
    /// What cannot be used of them, and why.
    unread: BTreeMap<String, String>,
    /// All of them have been read once.
    is_whole: bool,
    /// Why they cannot be read.
    failing: Option<String>,
    /// Counts what is told.
    version: u64,
}

/// A pod as it came, by its key; or what is wrong with it.
type Picture = BTreeMap<String, Result<RawPod, String>>;

impl NodePods {
    fn with(&self, change: impl FnOnce(&mut Found)) {
        change(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
    }

    /// Takes in a pod. One that cannot be used keeps its last good version.
    fn take(&self, found: &mut Found, key: String, pod: Result<RawPod, String>, before: Option<Dated>) {
        found.version += 1;
        found.unread.remove(&key);
        match pod.and_then(|pod| known(pod, &self.enrolment)) {
            Ok(Some((created, mut pod))) => {
                (pod.origin, pod.version) = (Origin::Kubernetes, found.version);
                found.pods.insert(key, (created, pod));
            }
            Ok(None) => {}
            Err(reason) => {
                tracing::warn!(pod = key, reason, "a pod of the API server stays as it was");
                found.pods.extend(before.map(|before| (key.clone(), before)));
                found.unread.insert(key, reason);
            }
        }
    }

    /// Puts in force what is known.
    fn tell(&self, state: &Mutex<State>) {
        let (faults, pods) = {
            let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            let fault = match &found.failing {
                _ if found.is_whole => None,
                Some(reason) => Some(format!("pods cannot be read from the API server: {reason}")),
                None => Some("pods have not been read from the API server yet".to_owned()),
            };
            let unread = found.unread.iter().map(|(pod, reason)| {
                format!("pod {pod}: what the API server says of it cannot be read, and it stays as it was: {reason}")
            });
            let faults = fault.into_iter().chain(unread).collect();
            let mut pods: Vec<Dated> = found.pods.values().cloned().collect();
            // Of two pods with one address the newer has it.
            pods.sort_by(|(one, _), (other, _)| one.cmp(other));
            (faults, pods.into_iter().map(|(_, pod)| pod).collect())
        };
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        state.source_faults = faults;
        state.set_pods(Origin::Kubernetes, pods);
    }
}

fn read(object: &Object<'_>) -> (String, Result<RawPod, String>) {
    if let Some(kind) = object.foreign {
        return (String::new(), Err(format!("a watch of Pods brought a {}", kind.escape_debug())));
    }
    match serde_json::from_str::<RawPod>(object.text) {
        Ok(pod) => (pod.key(), Ok(pod)),
        Err(error) => (key_of(object), Err(error.to_string())),
    }
}

/// The key of an object that may be wrong in every other respect.
fn key_of(object: &Object<'_>) -> String {
    let object: serde_json::Value = serde_json::from_str(object.text).unwrap_or_default();
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

impl Objects for NodePods {
    const KIND: &'static str = "Pod";
    const PATH: &'static str = "/api/v1/pods";
    type Picture = Picture;

    fn collect(picture: &mut Picture, object: &Object<'_>) {
        let (key, pod) = read(object);
        picture.insert(key, pod);
    }

    fn discard(picture: &mut Picture, object: &Object<'_>) {
        picture.remove(&key_of(object));
    }

    fn replace(&self, picture: Picture) {
        self.with(|found| {
            let mut before = std::mem::take(&mut found.pods);
            found.unread.clear();
            for (key, pod) in picture {
                let last = before.remove(&key);
                self.take(found, key, pod, last);
            }
            found.is_whole = true;
        });
    }

    fn add(&self, object: &Object<'_>) {
        let (key, pod) = read(object);
        self.with(|found| {
            let before = found.pods.remove(&key);
            self.take(found, key, pod, before);
        });
    }

    fn remove(&self, object: &Object<'_>) {
        self.with(|found| {
            found.pods.remove(&key_of(object));
            found.unread.remove(&key_of(object));
        });
    }

    fn works(&self) {
        let failing = self.found.lock().unwrap_or_else(PoisonError::into_inner).failing.take();
        if failing.is_some() {
            tracing::info!("the API server's pods can be read again");
        }
    }

    fn fails(&self, error: &str) {
        self.with(|found| {
            if found.failing.as_deref() != Some(error) {
                tracing::warn!(error, "the API server's pods cannot be read, and stay as they were");
                found.failing = Some(error.to_owned());
            }
        });
    }
}
