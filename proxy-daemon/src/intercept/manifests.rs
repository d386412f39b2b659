//! Reads pods from a directory of Kubernetes manifests, and follows it.
//!
//! Files named `*.yaml`, `*.yml` and `*.json` directly in the directory count. A file that cannot be read as manifests
//! keeps its last good pods, so that a slip of the pen takes no pod out of the mesh.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use serde::Deserialize;
use serde_json::Value;

use super::State;
use super::config::pod_address;
use super::pods::{Known, Origin};
use super::selectors::Enrolment;

/// How long a burst of events must be over before the directory is read.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// How often the directory is read without an event, for file systems that do not report each change, and to be watched
/// again after it was replaced.
const RESCAN: Duration = Duration::from_secs(2);
/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 32 * 1024 * 1024;

/// What is read of a pod.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct RawPod {
    metadata: Metadata,
    spec: Spec,
    status: Status,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: String,
    uid: String,
    labels: BTreeMap<String, String>,
    creation_timestamp: Option<String>,
    deletion_timestamp: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    node_name: String,
    host_network: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Status {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: String,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Debug, Deserialize)]
struct PodIp {
    ip: String,
}

impl RawPod {
    /// Its namespace and name.
    pub(super) fn key(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }
}

/// A pod, and when it was made.
pub(super) type Dated = (Option<String>, Known);

/// The directory, and what was read of it.
struct Directory {
    enrolment: Enrolment,
    /// By file: its bytes, and the pods of its last good version.
    files: BTreeMap<PathBuf, (Vec<u8>, Vec<Dated>)>,
    /// Counts the versions of files.
    version: u64,
}

impl Directory {
    /// Reads the directory: its pods, if any file changed.
    fn read(&mut self) -> io::Result<Option<Vec<Known>>> {
        let mut changed = false;
        let mut seen = Vec::new();
        for entry in fs::read_dir(&self.enrolment.pod_manifests)? {
            let path = entry?.path();
            if !is_manifest(&path) {
                continue;
            }
            let text = match read_file(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "pods of this file stay as they were");
                    seen.push(path);
                    continue;
                }
            };
            seen.push(path.clone());
            let before = self.files.get(&path);
            if before.is_some_and(|(old, _)| *old == text) {
                continue;
            }
            changed = true;
            self.version += 1;
            let pods = match pods_of(&text, &self.enrolment) {
                Ok(mut pods) => {
                    pods.iter_mut().for_each(|(_, pod)| pod.version = self.version);
                    pods
                }
                Err(reason) => {
                    tracing::warn!(path = %path.display(), reason, "pods of this file stay as they were");
                    before.map(|(_, pods)| pods.clone()).unwrap_or_default()
                }
            };
            self.files.insert(path, (text, pods));
        }
        let before = self.files.len();
        self.files.retain(|path, _| seen.contains(path));
        if !changed && before == self.files.len() {
            return Ok(None);
        }
        let mut pods: Vec<&Dated> = self.files.values().flat_map(|(_, pods)| pods).collect();
        // Of two pods with one address the newer has it.
        pods.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(Some(pods.into_iter().map(|(_, pod)| pod.clone()).collect()))
    }
}

/// The pods of one file that this node has.
fn pods_of(text: &[u8], enrolment: &Enrolment) -> Result<Vec<Dated>, String> {
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    let options = serde_saphyr::options! {
        with_snippet: false,
        // A pod may be called `y` or `no`: only `true` and `false` are booleans.
        strict_booleans: true,
        budget: serde_saphyr::budget! { max_documents: 100_000, max_nodes: 8_000_000, max_events: 20_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| error.to_string().lines().collect::<Vec<_>>().join(" "))?;
    let mut pods = Vec::new();
    for document in documents {
        let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
        let items = match document {
            Value::Object(mut list) if kind.ends_with("List") => match list.remove("items") {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            },
            document => vec![document],
        };
        for item in items {
            // `kubectl get pods -o json` leaves the kind of its items out where the list is one of pods.
            let item_kind = item.get("kind").and_then(Value::as_str);
            if item_kind == Some("Pod") || (item_kind.is_none() && kind == "PodList") {
                let pod: RawPod = serde_json::from_value(item).map_err(|error| format!("Pod: {error}"))?;
                pods.extend(known(pod, enrolment)?);
            }
        }
    }
    Ok(pods)
}

/// A pod as enrolment sees it; none of another node's.
pub(super) fn known(pod: RawPod, enrolment: &Enrolment) -> Result<Option<Dated>, String> {
    let RawPod { metadata, spec, status } = pod;
    if !enrolment.node_name.is_empty() && spec.node_name != enrolment.node_name {
        return Ok(None);
    }
    if metadata.name.is_empty() {
        return Err("Pod: metadata.name is missing".to_owned());
    }
    let namespace = if metadata.namespace.is_empty() { "default" } else { &metadata.namespace };
    let name = format!("{namespace}/{}", metadata.name);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in status.pod_ips.iter().map(|it| &it.ip).chain([&status.pod_ip]).filter(|text| !text.is_empty()) {
        let address = pod_address(text).ok_or_else(|| format!("Pod {name}: `{text}` is not a pod's address"))?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let ended = matches!(status.phase.as_str(), "Succeeded" | "Failed");
    let wanted = if spec.host_network {
        Err("it uses the node's network".to_owned())
    } else if ended {
        Err("it has ended".to_owned())
    } else {
        match enrolment.policy_of(namespace, &metadata.labels) {
            Some(policy) => Ok(policy),
            None => Err("no selector matches it".to_owned()),
        }
    };
    if spec.host_network || ended {
        // What it has is not its own, or not any more.
        addresses.clear();
    }
    let leaving = metadata.deletion_timestamp.is_some();
    let created = metadata.creation_timestamp;
    let identity = format!("{name} {} {}", metadata.uid, created.as_deref().unwrap_or_default());
    let origin = Origin::Manifest;
    Ok(Some((created, Known { name, identity, origin, addresses, wanted, leaving, version: 0, interface: None })))
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|it| it == "yaml" || it == "yml" || it == "json")
}

fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    // Opening a pipe would wait for a writer.
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(io::Error::other(format!("not a file of at most {MAX_FILE} bytes")));
    }
    fs::read(path)
}

/// The thread that follows a directory. Dropping it stops the thread.
pub(super) struct Follower {
    // Dropped first, which ends the thread's wait.
    watcher: Option<notify::RecommendedWatcher>,
    stop: Option<std::sync::mpsc::Sender<Wake>>,
    thread: Option<JoinHandle<()>>,
}

enum Wake {
    Changed,
    Stop,
}

impl Follower {
    /// Reads the directory, and starts the thread.
    pub(super) fn start(enrolment: Enrolment, state: Arc<Mutex<State>>) -> io::Result<Self> {
        let (sender, inbox) = channel();
        let stop = sender.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading causes the others.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                let _ = sender.send(Wake::Changed);
            }
        })
        .map_err(io::Error::other)?;
        let path = enrolment.pod_manifests.clone();
        if let Err(error) = watcher.watch(&path, RecursiveMode::NonRecursive) {
            tracing::warn!(path = %path.display(), %error, "changes of pods are found out late");
        }
        let mut directory = Directory { enrolment, files: BTreeMap::new(), version: 0 };
        directory.apply(&state);
        let thread = std::thread::Builder::new()
            .name("intercept-pods".to_owned())
            .spawn(move || follow(&mut directory, &inbox, &state))?;
        Ok(Self { watcher: Some(watcher), stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.watcher.take());
        if let Some(stop) = self.stop.take() {
            // Fails only when the thread is gone.
            let _ = stop.send(Wake::Stop);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that followed the pods' manifests had panicked");
        }
    }
}

impl Directory {
    fn apply(&mut self, state: &Mutex<State>) {
        match self.read() {
            Ok(Some(pods)) => state.lock().unwrap_or_else(PoisonError::into_inner).set_pods(Origin::Manifest, pods),
            Ok(None) => {}
            Err(error) => {
                let path = self.enrolment.pod_manifests.display();
                tracing::warn!(%path, %error, "pods cannot be read, and stay as they were");
            }
        }
    }
}

fn follow(directory: &mut Directory, inbox: &Receiver<Wake>, state: &Mutex<State>) {
    loop {
        match inbox.recv_timeout(RESCAN) {
            Ok(Wake::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Ok(Wake::Changed) => loop {
                match inbox.recv_timeout(DEBOUNCE) {
                    Ok(Wake::Changed) => {}
                    Ok(Wake::Stop) => return,
                    Err(_) => break,
                }
            },
            Err(RecvTimeoutError::Timeout) => {}
        }
        directory.apply(state);
    }
}

#[cfg(test)]
#[path = "manifests_tests.rs"]
mod tests;
