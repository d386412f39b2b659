//! Clusters read from API servers, over real connections.

mod access;
mod kinds;
#[path = "../kube_api/mod.rs"]
mod kube_api;
mod lists;

use std::sync::Arc;
use std::time::Duration;

use culvert_discovery::kubernetes::ObjectKey;
use culvert_discovery::mesh::{self, Health, Mesh};
use culvert_discovery::registry::{self, Cluster, ClusterInfo, Registry};
use culvert_discovery::source::Source as _;
use culvert_discovery::source::api_server::ApiServer;
use culvert_discovery::source::api_server::config::{ExecConfig, KubernetesConfig};
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::kube_api::{KubeApi, MANIFESTS, NODES, PODS, SERVICES, SLICES, pod, service, slice};

const DEADLINE: Duration = Duration::from_secs(60);

struct Watched {
    registry: watch::Receiver<Arc<Registry>>,
    task: JoinHandle<()>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watched {
    fn start(config: KubernetesConfig) -> Self {
        let (mut handles, registry) = registry::start(vec![ClusterInfo { name: "east".into(), ..Default::default() }]);
        let source = ApiServer::new("east".into(), config);
        let handle = handles.remove(0);
        Self { registry, task: tokio::spawn(async move { source.run(handle).await.unwrap() }) }
    }

    fn of(api: &KubeApi) -> Self {
        Self::start(KubernetesConfig { server: Some(api.url()), ..Default::default() })
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&Cluster) -> bool) {
        let reached = self.registry.wait_for(|registry| holds(&registry.clusters[0]));
        let reached = tokio::time::timeout(DEADLINE, reached).await.map(|reached| reached.is_ok());
        assert!(reached == Ok(true), "not reached: {what}: {:#?}", self.registry.borrow().clusters[0]);
    }

    async fn until_mesh(&mut self, what: &str, holds: impl Fn(&Mesh) -> bool) {
        let reached = self.registry.wait_for(|registry| holds(&mesh::join(registry)));
        let reached = tokio::time::timeout(DEADLINE, reached).await.map(|reached| reached.is_ok());
        assert!(reached == Ok(true), "not reached: {what}: {:#?}", self.registry.borrow().clusters[0]);
    }

    /// Waits for these endpoints, and for the source to be well.
    async fn until_endpoints(&mut self, expected: &[&str]) {
        self.until(&format!("{expected:?}"), |cluster| !cluster.health.stale && endpoints(cluster) == expected).await;
    }

    fn now(&self) -> Cluster {
        self.registry.borrow().clusters[0].clone()
    }
}

/// Last parts of the addresses.
fn endpoints(cluster: &Cluster) -> Vec<String> {
    let slices = cluster.objects.iter().flat_map(|objects| objects.slices.values());
    let addresses = slices.flat_map(|slice| slice.endpoints.iter().map(|endpoint| endpoint.address.to_string()));
    addresses.map(|address| address.rsplit('.').next().unwrap().to_owned()).collect()
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "not reached: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn with_users() -> KubeApi {
    let api = KubeApi::start().await;
    api.put(SERVICES, service("users", 80));
    api.put(SLICES, slice("users", &["10.1.0.1", "10.1.0.2"]));
    api
}
