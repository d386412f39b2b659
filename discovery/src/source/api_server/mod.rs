//! A cluster whose API server is watched: Services, EndpointSlices, Pods and, if asked, Nodes and ServiceManifests.
//!
//! Each kind is listed and watched by a task of its own ([`watch`]); what they find is in one place ([`state`]), from
//! which the registry is told the whole picture a moment after the first change of a burst. What is not used of an
//! object is dropped as it is read.

pub mod auth;
pub mod config;
mod connection;
mod state;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use self::config::KubernetesConfig;
use self::connection::Access;
use self::state::{News, Shared};
use self::watch::Watch;
use super::{Source, SourceError};
use crate::kubernetes::convert::Kind;
use crate::kubernetes::{EndpointSlice, Node, Pod, Service};
use crate::policy::ServiceManifest;
use crate::registry::{RegistryHandle, SourceUpdate};

/// How long changes are gathered: a rollout changes a slice and some pods in a row.
const GATHER: Duration = Duration::from_millis(10);

/// The API server of one cluster.
#[derive(Debug)]
pub struct ApiServer {
    cluster: String,
    config: KubernetesConfig,
}

impl ApiServer {
    /// The API server of the cluster of this name.
    #[must_use]
    pub fn new(cluster: String, config: KubernetesConfig) -> Self {
        Self { cluster, config }
    }
}

impl Source for ApiServer {
    async fn run(self, registry: RegistryHandle) -> Result<(), SourceError> {
        let Self { cluster, config } = self;
        let mut kinds = vec![Service::KIND, EndpointSlice::KIND, Pod::KIND];
        if config.nodes {
            kinds.push(Node::KIND);
        }
        if config.service_manifests {
            kinds.push(ServiceManifest::KIND);
        }
        let shared = Arc::new(Shared::new(cluster, &kinds));
        let access = Arc::new(Access::new(config.clone()));
        let mut watches = JoinSet::new();
        let (a, s) = (&access, &shared);
        watches.spawn(Watch::<Service>::new(Arc::clone(a), Arc::clone(s), config.service_selector).run());
        watches.spawn(Watch::<EndpointSlice>::new(Arc::clone(a), Arc::clone(s), config.endpoint_slice_selector).run());
        watches.spawn(Watch::<Pod>::new(Arc::clone(a), Arc::clone(s), config.pod_selector).run());
        if config.nodes {
            watches.spawn(Watch::<Node>::new(Arc::clone(a), Arc::clone(s), String::new()).run());
        }
        if config.service_manifests {
            watches.spawn(Watch::<ServiceManifest>::new(Arc::clone(a), Arc::clone(s), String::new()).run());
        }
        let mut last = None;
        let mut objects = None;
        loop {
            shared.changed().await;
            tokio::time::sleep(GATHER).await;
            let News { objects: newer, read, health } = shared.news(access.location());
            let same = newer.is_none() && last.as_ref() == Some(&health);
            objects = newer.or(objects);
            if same {
                continue;
            }
            last = Some(health.clone());
            let told = match &objects {
                Some(objects) if read => registry.replace(SourceUpdate { objects: Arc::clone(objects), health }).await,
                _ => registry.health(health).await,
            };
            if told.is_err() {
                return Ok(());
            }
        }
    }
}
