//! Reads pods from a directory of Kubernetes manifests, and follows it. A file that cannot be read as manifests keeps its
//! last good pods, so that a slip of the pen takes no pod out of the mesh.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use culvert_kube_api::directory::{self, WatchError};
use serde::Deserialize;
use serde_json::Value;

use super::State;
use super::config::pod_address;
use super::follower::Follower;
use super::pods::{Known, Origin};
use super::selectors::Enrolment;

/// How often the directory is read without an event, for file systems that do not report each change.
const RESCAN: Duration = Duration::from_secs(2);

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

/// The pods of a file.
#[derive(Debug, Default)]
struct Pods {
    /// Those of this node.
    here: Vec<Dated>,
    /// How many are other nodes'.
    elsewhere: usize,
}

/// The pods of the directory's files.
type Directory = directory::Directory<Pods>;

/// The directory that enrolment goes by.
fn directory_of(enrolment: Enrolment) -> Result<Directory, WatchError> {
    // Counts the versions of files.
    let mut version = 0;
    Directory::new(enrolment.pod_manifests.clone(), RESCAN, move |text| {
        version += 1;
        let mut pods = pods_of(text, &enrolment)?;
        pods.here.iter_mut().for_each(|(_, pod)| pod.version = version);
        Ok(pods)
    })
}

/// All pods.
fn pods(directory: &Directory) -> Vec<Known> {
    let files = directory.files().filter_map(|(_, file)| file.good.as_ref());
    let mut pods: Vec<&Dated> = files.flat_map(|file| &file.here).collect();
    // Of two pods with one address the newer has it.
    pods.sort_by(|(one, _), (other, _)| one.cmp(other));
    pods.into_iter().map(|(_, pod)| pod.clone()).collect()
}

/// Why there may be pods of this node of which nobody knows.
fn faults(directory: &Directory, node_name: &str) -> Vec<String> {
    let path = directory.path().display();
    let unreadable = directory.fault().map(|fault| format!("enrolment.pod_manifests {path}: {fault}"));
    let files = directory.files().filter_map(|(path, file)| {
        let error = file.error.as_ref()?;
        let left =
            if file.good.is_some() { "its last good version stays in force" } else { "nothing of it is in force" };
        Some(format!("enrolment.pod_manifests {}: {error}; {left}", path.display()))
    });
    let mut faults: Vec<String> = unreadable.into_iter().chain(files).collect();
    let known = || directory.files().filter_map(|(_, file)| file.good.as_ref());
    let elsewhere: usize = known().map(|file| file.elsewhere).sum();
    if elsewhere > 0 && known().all(|file| file.here.is_empty()) {
        faults.push(format!(
            "enrolment.node_name {node_name}: none of the {elsewhere} pods of {path} is on a node of this name: is it as in their \
             spec.nodeName?"
        ));
    }
    faults
}

/// The pods of one file.
fn pods_of(text: &str, enrolment: &Enrolment) -> Result<Pods, String> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // A pod may be called `y` or `no`: only `true` and `false` are booleans.
        strict_booleans: true,
        budget: serde_saphyr::budget! { max_documents: 100_000, max_nodes: 8_000_000, max_events: 20_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| error.to_string().lines().collect::<Vec<_>>().join(" "))?;
    let mut pods = Pods::default();
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
                match known(pod, enrolment)? {
                    Some(pod) => pods.here.push(pod),
                    None => pods.elsewhere += 1,
                }
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
    let leaving = metadata.deletion_timestamp.is_some();
    let mut addresses: Vec<IpAddr> = Vec::new();
    let told = status.pod_ips.iter().map(|it| &it.ip).chain([&status.pod_ip]);
    // What such a pod has is not its own, or not any more.
    for text in told.filter(|text| !text.is_empty() && !spec.host_network && !ended) {
        match pod_address(text) {
            Some(address) if addresses.contains(&address) => {}
            Some(address) => addresses.push(address),
            // One that is not to be enrolled, or is going, holds nobody up.
            None if wanted.is_err() || leaving => {}
            None => return Err(format!("Pod {name}: `{text}` is not a pod's address")),
        }
    }
    let created = metadata.creation_timestamp;
    let identity = format!("{name} {} {}", metadata.uid, created.as_deref().unwrap_or_default());
    let origin = Origin::Manifest;
    Ok(Some((created, Known { name, identity, origin, addresses, wanted, leaving, version: 0, interface: None })))
}

/// Reads the directory, and starts the thread that follows it.
pub(super) fn follow(enrolment: Enrolment, state: Arc<Mutex<State>>) -> io::Result<Follower> {
    let node_name = enrolment.node_name.clone();
    let mut directory = directory_of(enrolment).map_err(io::Error::other)?;
    tell(&mut directory, &node_name, &state);
    Follower::start(move || async move {
        loop {
            directory.changed().await;
            tell(&mut directory, &node_name, &state);
        }
    })
}

/// Puts in force what is new in the directory. As long as it, or a file of it, cannot be read, there may be pods of which nobody
/// hears: the node is not ready.
fn tell(directory: &mut Directory, node_name: &str, state: &Mutex<State>) {
    if directory.read() {
        let faults = faults(directory, node_name);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        // The directory itself has said what it cannot read.
        let misnamed = |fault: &&String| fault.starts_with("enrolment.node_name");
        for fault in faults.iter().filter(misnamed).filter(|fault| !state.source_faults.contains(fault)) {
            tracing::warn!("{fault}");
        }
        state.source_faults = faults;
        state.set_pods(Origin::Manifest, pods(directory));
    }
}

#[cfg(test)]
#[path = "manifests_tests.rs"]
mod tests;
