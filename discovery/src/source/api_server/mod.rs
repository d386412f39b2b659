//! A cluster whose API server is watched: Services, EndpointSlices, Pods and, if asked, Nodes and ServiceManifests.
//!
//! Each kind is listed and watched by a task of its own ([`culvert_kube_api`]); what they find is in one place ([`state`]), from
//! which the registry is told the whole picture a moment after the first change of a burst. What is not used of an
//! object is dropped as it is read.

mod state;

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

pub use culvert_kube_api::config;
use culvert_kube_api::{Access, KubernetesConfig, Object, Objects, Selection, Watch};

use self::state::{Collected, News, Read, Shared};
use super::{Source, SourceError};
use crate::kubernetes::convert::{self, Deleted, Kind};
use crate::kubernetes::{EndpointSlice, Node, ObjectKey, Pod, PodId, Service, VirtualIps};
use crate::policy::ServiceManifest;
use crate::registry::{RegistryHandle, SourceUpdate};
use crate::secrets::{self, Secret};

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
        let mut kinds = vec![Service::NAME, EndpointSlice::NAME, Pod::NAME];
        if config.nodes {
            kinds.push(Node::NAME);
        }
        if config.service_manifests {
            kinds.push(ServiceManifest::NAME);
        }
        if config.secrets {
            kinds.push(Secret::NAME);
        }
        // Of Services that are not selected only this: their addresses are not free for those of other clusters.
        let selects = !config.service_selector.is_empty();
        if selects {
            kinds.push(VirtualIps::NAME);
        }
        let shared = Arc::new(Shared::new(cluster, &kinds, !config.pod_selector.is_empty()));
        let access = Arc::new(Access::new(config.clone()));
        let mut watches = JoinSet::new();
        watches.spawn(watch::<Service>(&access, &shared, config.service_selector).run());
        if selects {
            watches.spawn(watch::<VirtualIps>(&access, &shared, String::new()).run());
        }
        watches.spawn(watch::<EndpointSlice>(&access, &shared, config.endpoint_slice_selector).run());
        watches.spawn(watch::<Pod>(&access, &shared, config.pod_selector).run());
        if config.nodes {
            watches.spawn(watch::<Node>(&access, &shared, String::new()).run());
        }
        if config.service_manifests {
            watches.spawn(watch::<ServiceManifest>(&access, &shared, String::new()).run());
        }
        if config.secrets {
            // Others do not even come here.
            watches.spawn(watch::<Secret>(&access, &shared, format!("{}=true", secrets::LABEL)).run());
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

fn watch<K: Kind>(access: &Arc<Access>, shared: &Arc<Shared>, labels: String) -> Watch<Told<K>> {
    let told = Told { shared: Arc::clone(shared), selects: !labels.is_empty(), kind: PhantomData };
    Watch::new(Arc::clone(access), Arc::new(told), Selection { labels, fields: String::new() })
}

/// Tells of the objects of one kind.
struct Told<K> {
    shared: Arc<Shared>,
    /// Objects with certain labels only: one that loses them is told of as deleted, too.
    selects: bool,
    kind: PhantomData<fn() -> K>,
}

impl<K: Kind> Objects for Told<K> {
    const KIND: &'static str = K::KIND;
    const PATH: &'static str = K::PATH;
    type Picture = Collected<K>;

    fn collect(picture: &mut Collected<K>, object: &Object<'_>) {
        let (key, object, pod) = read(object);
        picture.add(key, object, pod);
    }

    fn discard(picture: &mut Collected<K>, object: &Object<'_>) {
        picture.remove(&key_of(object), pod_id::<K>(object));
    }

    fn replace(&self, picture: Collected<K>) {
        self.shared.replace(picture);
    }

    fn add(&self, object: &Object<'_>) {
        let (key, object, pod) = read::<K>(object);
        self.shared.add(key, object, pod);
    }

    fn remove(&self, object: &Object<'_>) {
        let key = key_of(object);
        self.shared.remove::<K>(&key);
        if let Some(Deleted { uid, was_leaving }) = deleted_pod::<K>(object) {
            self.shared.pod_out_of_sight(&uid);
            if was_leaving || !self.selects {
                self.shared.pod_gone(uid, key);
            }
        }
    }

    fn works(&self) {
        self.shared.works::<K>();
    }

    fn fails(&self, error: &str) {
        // Where its definition is missing, the path is.
        if K::KIND == ServiceManifest::KIND && error.contains("404 Not Found") {
            let hint =
                "`kubectl apply -f deploy/kubernetes/servicemanifests.yaml` defines them, and may not have been run";
            return self.shared.fails::<K>(&format!("{error} ({hint})"));
        }
        self.shared.fails::<K>(error);
    }
}

/// An object's key; one for all objects that do not say their name.
fn key_of(object: &Object<'_>) -> ObjectKey {
    convert::key_of(object.text).unwrap_or_else(|| ObjectKey::new("", ""))
}

/// What an API server says of a Pod that it tells of as deleted.
fn deleted_pod<K: Kind>(object: &Object<'_>) -> Option<Deleted> {
    (K::KIND == Pod::KIND).then(|| Deleted::read(object.text)).flatten()
}

/// The id of what is a Pod, however wrong it is.
fn pod_id<K: Kind>(object: &Object<'_>) -> Option<PodId> {
    deleted_pod::<K>(object).map(|pod| PodId::of(&pod.uid))
}

/// Reads one object, which others do not suffer from. Of a Pod also its id, whether the Pod matters, or is wrong, or not.
fn read<K: Kind>(object: &Object<'_>) -> (ObjectKey, Read<K>, Option<PodId>) {
    if let Some(kind) = object.foreign {
        let key = key_of(object);
        let error = format!("a watch of {}s brought a {}: {key}", K::KIND, kind.escape_debug());
        return (key, Err(error), None);
    }
    match convert::read_json::<K>(object.text) {
        Ok((key, read)) => {
            let pod = read.as_ref().and_then(K::pod_id);
            (key, Ok(read.filter(K::matters)), pod)
        }
        Err(error) => match convert::key_of(object.text) {
            // Its slice counts, then as when Pods cannot be read.
            Some(key) => (key, Err(error.to_string()), pod_id::<K>(object)),
            None => {
                let place = match object.index {
                    Some(index) => format!("object {index} of a list"),
                    None => "an object of a watch".to_owned(),
                };
                (key_of(object), Err(format!("{place}: {error}")), None)
            }
        },
    }
}
