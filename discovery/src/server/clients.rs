//! The connected clients, for the status endpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::csds::Held;
use super::polled::Polled;
use super::{named_services, viewer};
use crate::kubernetes::ObjectKey;
use crate::mesh::Mesh;
use crate::resources::{ResourceSet, Role, TypeResources, Viewer};

/// The longest rejection that is kept and logged, in characters.
const MAX_REASON: usize = 1000;

/// The most secrets that a client is told not to be given.
const MOST_MISSING: usize = 10;

/// What is known of one client's stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ClientStatus {
    /// The address it connected from.
    pub peer: String,
    /// `sotw` or `delta`.
    pub variant: &'static str,
    /// The id of its node.
    pub node: String,
    /// The cluster of its node.
    pub cluster: String,
    /// What it says it is, `envoy` or `culvert` for example.
    pub user_agent: String,
    /// What it is for.
    pub role: Role,
    /// Of a sidecar: the services of its pod.
    #[serde(skip)]
    pub own_services: BTreeSet<ObjectKey>,
    /// The services that its metadata names.
    #[serde(skip)]
    pub named_services: BTreeSet<ObjectKey>,
    /// Which version of it. Empty if it does not say.
    pub user_agent_version: String,
    /// Since when it is connected, in seconds since the epoch.
    pub connected_since: u64,
    /// How many responses it was sent.
    pub responses: u64,
    /// How many of them it rejected.
    pub rejections: u64,
    /// Its subscriptions by type URL.
    pub types: BTreeMap<String, TypeStatus>,
    /// Secrets that it asks for and is not given, the first of them.
    #[serde(skip)]
    pub missing_secrets: Vec<String>,
}

/// What a client has of one type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TypeStatus {
    /// The version that was sent last.
    pub sent: Option<String>,
    /// The version that it acknowledged last.
    pub acked: Option<String>,
    /// The last version that it rejected.
    pub nack: Option<Nack>,
}

/// What keeps a node from being given what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClientProblem {
    /// The id of the node.
    pub node: String,
    /// What it is.
    pub problem: String,
}

/// A rejection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nack {
    /// The version that was rejected.
    pub version: String,
    /// Why, in the client's words.
    pub reason: String,
}

impl ClientStatus {
    /// A client that speaks this variant of the protocol.
    #[must_use]
    pub fn new(variant: &'static str) -> Self {
        Self { variant, ..Self::default() }
    }

    /// `rejected`, `waiting` or `in sync`: whether it has all that it was sent.
    #[must_use]
    pub fn state(&self) -> &'static str {
        // A rejection that a later version has made up for is history.
        let rejected =
            |status: &TypeStatus| status.nack.as_ref().is_some_and(|nack| Some(&nack.version) == status.sent.as_ref());
        if self.types.values().any(rejected) {
            "rejected"
        } else if self.types.values().all(|status| status.sent == status.acked) {
            "in sync"
        } else {
            "waiting"
        }
    }

    /// Takes in who the client is. Only the first request of a stream need say so.
    pub(super) fn identify(&mut self, node: Option<&Node>) {
        if let Some(node) = node {
            self.node.clone_from(&node.id);
            self.cluster.clone_from(&node.cluster);
            self.user_agent.clone_from(&node.user_agent_name);
            let Viewer { role, services, .. } = viewer(node);
            self.role = role;
            self.own_services = if role == Role::Sidecar { services } else { BTreeSet::new() };
            self.named_services = named_services(node);
            self.user_agent_version = match &node.user_agent_version_type {
                Some(UserAgentVersionType::UserAgentVersion(version)) => version.clone(),
                Some(UserAgentVersionType::UserAgentBuildVersion(build)) => {
                    let version = build.version.unwrap_or_default();
                    format!("{}.{}.{}", version.major_number, version.minor_number, version.patch)
                }
                None => String::new(),
            };
        }
    }

    /// The client came with all that there is of a type, in this version.
    pub(super) fn came_with(&mut self, type_url: &str, version: &str) {
        if !self.types.contains_key(type_url) {
            let version = Some(version.to_owned());
            let status = TypeStatus { sent: version.clone(), acked: version, nack: None };
            self.types.insert(type_url.to_owned(), status);
        }
    }

    /// Notes which of the secrets that it asks for it is not given.
    pub(super) fn asks<'a>(&mut self, names: impl Iterator<Item = &'a str>, given: Option<&Arc<TypeResources>>) {
        let is_missing = |name: &&str| !given.is_some_and(|given| given.resources.contains_key(*name));
        self.missing_secrets = names.filter(is_missing).take(MOST_MISSING).map(one_line).collect();
    }

    pub(super) fn sent(&mut self, type_url: &str, version: &str) {
        self.types.entry(type_url.to_owned()).or_default().sent = Some(version.to_owned());
        self.responses += 1;
    }

    /// Takes in the answer to what was sent last.
    pub(super) fn answered(&mut self, type_url: &str, rejection: Option<&str>) {
        let node = &self.node;
        let status = self.types.entry(type_url.to_owned()).or_default();
        match rejection {
            None => status.acked.clone_from(&status.sent),
            Some(reason) => {
                self.rejections += 1;
                let version = status.sent.clone().unwrap_or_default();
                let reason = one_line(reason);
                let short = type_url.rsplit('.').next().unwrap_or(type_url);
                warn!("client {node}: rejected {short} version {version}: {reason}");
                status.nack = Some(Nack { version, reason });
            }
        }
    }
}

/// What a client says, for a log.
fn one_line(reason: &str) -> String {
    reason.chars().map(|c| if c == '\n' { ' ' } else { c }).take(MAX_REASON).collect()
}

/// All connected clients.
#[derive(Debug, Clone, Default)]
pub struct Clients {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next_id: AtomicU64,
    connected: Mutex<BTreeMap<u64, Entry>>,
    /// Who was refused, by id, when last and why.
    refused: Mutex<BTreeMap<String, (Instant, String)>>,
    polled: Polled,
    totals: Totals,
}

/// How long it is told that a node was refused. Who tries again does so within half a minute.
const TOLD: Duration = Duration::from_secs(120);
/// The most nodes that this is told of.
const MOST_TOLD: usize = 100;

/// What a stream is asked: which resources its client has. It answers between two responses.
pub(super) type Question = oneshot::Sender<Vec<Held>>;
/// How long a stream may take to answer. It has to be busy, or gone, not to do so at once.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Entry {
    status: ClientStatus,
    questions: mpsc::Sender<Question>,
}

/// What has happened since the start, of all clients.
#[derive(Debug, Default)]
pub struct Totals {
    /// Responses that were sent.
    pub responses: AtomicU64,
    /// Responses that were rejected.
    pub rejections: AtomicU64,
    /// Requests of clients that poll, over REST.
    pub polls: AtomicU64,
}

impl Inner {
    fn connected(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        // The map is whole after every operation on it, so a panic elsewhere does not spoil it.
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clients {
    /// The clients that are connected now, in the order in which they came.
    #[must_use]
    pub fn list(&self) -> Vec<ClientStatus> {
        self.inner.connected().values().map(|entry| entry.status.clone()).collect()
    }

    /// The clients that are wanted, each with the resources that it has.
    pub(super) async fn held(&self, wanted: impl Fn(&ClientStatus) -> bool) -> Vec<(ClientStatus, Vec<Held>)> {
        let entries: Vec<_> = {
            let connected = self.inner.connected();
            let entries = connected.values().filter(|entry| wanted(&entry.status));
            entries.map(|entry| (entry.status.clone(), entry.questions.clone())).collect()
        };
        let mut asked = Vec::with_capacity(entries.len());
        for (status, questions) in entries {
            let (question, answer) = oneshot::channel();
            // One that has ended, or been asked a lot, has no answer.
            let _ = questions.try_send(question);
            asked.push((status, answer));
        }
        let until = Instant::now() + PATIENCE;
        let mut held = Vec::with_capacity(asked.len());
        for (status, answer) in asked {
            if let Ok(Ok(resources)) = timeout_at(until, answer).await {
                held.push((status, resources));
            }
        }
        held
    }

    /// Notes a request over REST, and what the client says about the version before.
    pub(super) fn polled(&self, node: &str, rejection: Option<String>) {
        self.inner.totals.polls.fetch_add(1, Ordering::Relaxed);
        if let Some(reason) = rejection {
            self.inner.totals.rejections.fetch_add(1, Ordering::Relaxed);
            warn!("client {node}: rejected what it polled: {}", one_line(&reason));
        }
    }

    /// Keeps what was given over REST for the next time.
    pub(super) fn keep_polled(&self, set: &Arc<ResourceSet>) {
        self.inner.polled.keep(set);
    }

    /// Notes why a node is not served.
    pub(super) fn refused(&self, node: &str, why: &str) {
        let mut refused = self.inner.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|_, (when, _)| when.elapsed() < TOLD);
        if refused.len() < MOST_TOLD || refused.contains_key(node) {
            let news = refused.insert(node.to_owned(), (Instant::now(), why.to_owned()));
            if news.is_none_or(|(_, known)| known != why) {
                warn!("node `{}` is not served: {why}", one_line(node));
            }
        }
    }

    /// What keeps nodes from being given what they ask for.
    #[must_use]
    pub fn problems(&self, mesh: &Mesh) -> Vec<ClientProblem> {
        let refused = self.inner.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let refused = refused.into_iter().filter(|(_, (when, _))| when.elapsed() < TOLD);
        let mut problems: Vec<_> = refused.map(|(node, (_, why))| (node, why)).collect();
        for entry in self.inner.connected().values() {
            let ClientStatus { node, role, own_services: own, named_services, missing_secrets: missing, .. } =
                &entry.status;
            if !missing.is_empty() {
                problems.push((
                    node.clone(),
                    format!(
                        "asks for secrets that there are not, or that no rule of `authorization` gives it: {}",
                        missing.join(", ")
                    ),
                ));
            }
            let is_known = |key: &ObjectKey| mesh.services.contains_key(key) || mesh.callers.contains_key(key);
            let unknown: Vec<_> = named_services.iter().filter(|key| !is_known(key)).collect();
            let lost = *role == Role::Sidecar && !own.iter().any(is_known);
            if !unknown.is_empty() && !lost {
                let more = if unknown.len() > MOST_MISSING { ", ..." } else { "" };
                let shown: Vec<_> = unknown.iter().take(MOST_MISSING).map(ToString::to_string).collect();
                problems.push((
                    node.clone(),
                    format!(
                        "its metadata `services` names what is no service of the mesh and has no manifest: {}{more}",
                        shown.join(", ")
                    ),
                ));
            }
            if lost {
                let named: Vec<_> = own.iter().map(ToString::to_string).collect();
                let named = if named.is_empty() { "none".to_owned() } else { named.join(", ") };
                problems.push((node.clone(), format!(
                    "is a sidecar of no service of the mesh (its metadata `services`, else its cluster: {named}): what comes in \
                     is passed through"
                )));
            }
        }
        problems.into_iter().map(|(node, problem)| ClientProblem { node, problem }).collect()
    }

    /// What has happened since the start.
    #[must_use]
    pub fn totals(&self) -> &Totals {
        &self.inner.totals
    }

    /// How many streams have been opened.
    #[must_use]
    pub fn streams(&self) -> u64 {
        self.inner.next_id.load(Ordering::Relaxed)
    }

    /// Adds a client until the handle is dropped.
    pub(super) fn connect(&self, peer: String) -> (ClientHandle, mpsc::Receiver<Question>) {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (questions, asked) = mpsc::channel(4);
        let status = ClientStatus { peer, connected_since: since, ..ClientStatus::default() };
        self.inner.connected().insert(id, Entry { status, questions });
        (ClientHandle { id, inner: Arc::clone(&self.inner) }, asked)
    }
}

/// One entry of the list of clients.
#[derive(Debug)]
pub(super) struct ClientHandle {
    id: u64,
    inner: Arc<Inner>,
}

impl ClientHandle {
    pub(super) fn update(&self, status: &ClientStatus) {
        let (responses, rejections) = (status.responses, status.rejections);
        let mut connected = self.inner.connected();
        let Some(Entry { status: known, .. }) = connected.get_mut(&self.id) else { return };
        let totals = &self.inner.totals;
        totals.responses.fetch_add(responses.saturating_sub(known.responses), Ordering::Relaxed);
        totals.rejections.fetch_add(rejections.saturating_sub(known.rejections), Ordering::Relaxed);
        let (peer, connected_since) = (std::mem::take(&mut known.peer), known.connected_since);
        *known = ClientStatus { peer, connected_since, ..status.clone() };
    }
}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        self.inner.connected().remove(&self.id);
    }
}

impl fmt::Display for ClientHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.inner.connected();
        write!(f, "client {}", connected.get(&self.id).map_or("unknown", |entry| entry.status.peer.as_str()))
    }
}
