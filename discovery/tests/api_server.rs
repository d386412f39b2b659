//! Clusters read from API servers, over real connections.

mod kube_api;

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

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_list_goes_over_into_a_watch() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    assert_eq!(watched.now().health.location, api.url());
    api.put(SLICES, slice("users", &["10.1.0.1", "10.1.0.3"]));
    watched.until_endpoints(&["1", "3"]).await;
    api.put(SLICES, slice("orders", &["10.1.0.9"]));
    watched.until_endpoints(&["9", "1", "3"]).await;
    api.delete(SLICES, "default", "users-1");
    watched.until_endpoints(&["9"]).await;
    assert_eq!((api.count(SLICES, "sendInitialEvents"), api.requests().len()), (1, 3), "{:?}", api.requests());
    assert!(api.count(SLICES, "allowWatchBookmarks=true") == 1 && api.count(SLICES, "NotOlderThan") == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_pods_only_those_are_kept_that_say_more_than_their_slices() {
    let api = with_users().await;
    api.put(PODS, pod("pod-1", "10.1.0.1"));
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    assert_eq!(watched.now().objects.unwrap().pods.len(), 0);
    let mut leaving = pod("pod-1", "10.1.0.1");
    leaving["metadata"]["deletionTimestamp"] = "2024-01-01T00:00:00Z".into();
    api.put(PODS, leaving);
    let pods = |cluster: &Cluster| cluster.objects.as_ref().map_or(0, |objects| objects.pods.len());
    watched.until("the pod that leaves", |cluster| pods(cluster) == 1).await;
    let mesh = mesh::join(&watched.registry.borrow());
    let users = &mesh.services.values().next().unwrap().ports[&80];
    let found: Vec<_> = users.endpoints.iter().map(|endpoint| format!("{:?}", endpoint.health)).collect();
    assert_eq!(found, ["Draining", "Healthy"], "the slice still says that it is ready");
    api.delete(PODS, "default", "pod-1");
    watched.until("the pod to go", |cluster| pods(cluster) == 0).await;
}

/// The controller that writes slices may be away for a while, as when its leader changes.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_gone_is_out_however_long_its_slice_lists_it() {
    let api = KubeApi::start().await;
    api.put(SERVICES, service("users", 80));
    let mut users = slice("users", &["10.1.0.1", "10.1.0.2", "10.1.0.3"]);
    for number in 1..=3 {
        let uid = format!("first-{number}");
        users["endpoints"][number - 1]["targetRef"] =
            json!({"kind": "Pod", "name": format!("pod-{number}"), "uid": uid});
        let mut pod = pod(&format!("pod-{number}"), &format!("10.1.0.{number}"));
        pod["metadata"]["uid"] = uid.into();
        api.put(PODS, pod);
    }
    api.put(SLICES, users.clone());
    let mut watched = Watched::of(&api);
    let is = |numbers: &'static [&str]| {
        move |mesh: &Mesh| {
            let Some(users) = mesh.services.values().next() else { return false };
            let healthy = users.ports[&80].endpoints.iter().filter(|endpoint| endpoint.health == Health::Healthy);
            healthy.map(|endpoint| endpoint.address.ip().to_string()).eq(numbers.iter().map(|n| format!("10.1.0.{n}")))
        }
    };
    watched.until_mesh("all of them", is(&["1", "2", "3"])).await;
    api.delete(PODS, "default", "pod-1");
    watched.until_mesh("the first to be out", is(&["2", "3"])).await;
    // As a StatefulSet does it: another pod of the same name.
    api.delete(PODS, "default", "pod-2");
    let mut second = pod("pod-2", "10.1.0.4");
    second["metadata"]["uid"] = "second-2".into();
    api.put(PODS, second);
    watched.until_mesh("the second to be out", is(&["3"])).await;
    users["endpoints"][1]["targetRef"]["uid"] = "second-2".into();
    users["endpoints"][1]["addresses"] = json!(["10.1.0.4"]);
    api.put(SLICES, users);
    watched.until_mesh("the other one", is(&["3", "4"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_paged_where_they_are_not_streamed_and_nothing_falls_between_list_and_watch() {
    for ignores in [false, true] {
        let api = KubeApi::start().await;
        for i in 1..=7 {
            api.put(SLICES, slice(&format!("s{i}"), &[&format!("10.1.0.{i}")]));
        }
        api.behave(|behaviour| {
            (behaviour.page, behaviour.watch_list, behaviour.ignores_watch_list) = (3, false, ignores);
        });
        // Between the first page and the second, to an object of the first.
        api.after_page(SLICES, slice("s1", &["10.1.0.99"]));
        let mut watched = Watched::of(&api);
        watched.until_endpoints(&["99", "2", "3", "4", "5", "6", "7"]).await;
        assert_eq!(api.count(SLICES, "limit=500"), 3, "{:?}", api.requests());
        assert_eq!(api.count(SLICES, "continue="), 2);
        assert_eq!(api.count(SLICES, "sendInitialEvents"), 1, "it is not asked for again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_have_expired_are_begun_anew() {
    let api = with_users().await;
    api.put(SLICES, slice("orders", &["10.1.0.9"]));
    api.behave(|behaviour| (behaviour.page, behaviour.watch_list, behaviour.expired_pages) = (1, false, true));
    let mut watched = Watched::of(&api);
    eventually("a second try", || api.count(SLICES, "limit=500") > 3).await;
    assert!(watched.now().objects.is_none());
    api.behave(|behaviour| behaviour.expired_pages = false);
    watched.until_endpoints(&["9", "1", "2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_from_its_last_bookmark() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    // Other objects change: only a bookmark tells a watch how far the world is.
    for _ in 0..10 {
        api.pass();
    }
    api.bookmark();
    api.end_watches();
    api.compact();
    for resource in [SERVICES, SLICES, PODS] {
        eventually("a watch from the bookmark", || api.count(resource, "&resourceVersion=112") == 1).await;
    }
    api.put(SLICES, slice("users", &["10.1.0.3"]));
    watched.until_endpoints(&["3"]).await;
    api.cut_watches();
    api.put(SLICES, slice("users", &["10.1.0.4"]));
    watched.until_endpoints(&["4"]).await;
    assert_eq!([SERVICES, SLICES, PODS].map(|resource| api.lists(resource)), [1, 1, 1], "{:?}", api.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_too_far_back_reads_all_anew() {
    for as_status in [false, true] {
        let mut api = with_users().await;
        api.put(SLICES, slice("orders", &["10.1.0.9"]));
        api.behave(|behaviour| behaviour.gone_as_status = as_status);
        let mut watched = Watched::of(&api);
        watched.until_endpoints(&["9", "1", "2"]).await;
        api.down();
        api.delete(SLICES, "default", "orders-1");
        api.put(SLICES, slice("users", &["10.1.0.5"]));
        api.compact();
        api.up().await;
        watched.until_endpoints(&["5"]).await;
        assert_eq!(api.lists(SLICES), 2, "{:?}", api.requests());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_restored_from_a_copy_is_read_anew() {
    let mut api = with_users().await;
    api.put(SLICES, slice("orders", &["10.1.0.9"]));
    let copy = api.version();
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["9", "1", "2"]).await;
    for last in 3..9 {
        api.put(SLICES, slice("users", &[&format!("10.1.0.{last}")]));
    }
    api.delete(SLICES, "default", "orders-1");
    watched.until_endpoints(&["8"]).await;
    api.down();
    api.restore(copy);
    api.up().await;
    watched.until_endpoints(&["9", "1", "2"]).await;
    // Before it is as far as it was.
    api.put(SLICES, slice("users", &["10.1.0.7"]));
    assert!(api.version() < copy + 7);
    watched.until_endpoints(&["9", "7"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_leaves_its_objects_which_are_stale() {
    let mut api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    api.down();
    watched.until("stale", |cluster| cluster.health.stale).await;
    let Cluster { objects, health, .. } = watched.now();
    assert_eq!(objects.unwrap().slices.len(), 1);
    assert!(health.error.as_ref().unwrap().contains("onnect"), "{health:?}");
    let since = health.stale_since.unwrap();
    assert!(since.starts_with("20") && since.ends_with('Z'), "{since}");
    api.put(SLICES, slice("users", &["10.1.0.7"]));
    api.up().await;
    watched.until_endpoints(&["7"]).await;
    watched
        .until("all to be well", |cluster| cluster.health.error.is_none() && cluster.health.stale_since.is_none())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_noticed() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    // Its connections stay open, and say nothing.
    api.behave(|behaviour| behaviour.hangs = true);
    watched.until("stale", |cluster| cluster.health.stale).await;
    let error = watched.now().health.error.unwrap();
    assert!(error.contains("no answer in 10 s"), "{error}");
    assert_eq!(endpoints(&watched.now()), ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_server_is_waited_for() {
    let api = KubeApi::start().await;
    for i in 1..=9 {
        api.put(SLICES, slice(&format!("s{i}"), &[&format!("10.1.0.{i}")]));
    }
    api.behave(|behaviour| behaviour.delay = Duration::from_millis(100));
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2", "3", "4", "5", "6", "7", "8", "9"]).await;
    assert_eq!(api.lists(SLICES), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_reported_and_the_rest_is_used() {
    for streams in [true, false] {
        let api = with_users().await;
        api.behave(|behaviour| behaviour.watch_list = streams);
        let mut wrong = slice("wrong", &["10.1.0.8"]);
        wrong["ports"][0]["port"] = 70_000.into();
        api.put(SLICES, wrong);
        api.put(SLICES, json!({ "kind": "EndpointSlice", "metadata": { "namespace": "x" }, "addressType": "IPv4" }));
        let mut watched = Watched::of(&api);
        watched.until_endpoints(&["1", "2"]).await;
        let errors = |cluster: &Cluster| {
            let errors = cluster.health.file_errors.iter();
            errors.map(|error| (error.error.clone(), error.last_good_in_force)).collect::<Vec<_>>()
        };
        let found = errors(&watched.now());
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].0.contains("missing field `name`"), "{found:?}");
        let expected = "EndpointSlice default/wrong-1: ports[0].port: port 70000 is out of range, 1 to 65535 are valid";
        assert_eq!(found[1], (expected.to_owned(), false));
        // One that was good keeps its last good version; another is not affected.
        let mut users = slice("users", &["10.1.0.3"]);
        users["endpoints"][0]["addresses"] = json!(["nonsense"]);
        api.put(SLICES, users);
        api.put(SLICES, slice("wrong", &["10.1.0.4"]));
        watched.until_endpoints(&["1", "2", "4"]).await;
        watched
            .until("the newer error", |cluster| {
                errors(cluster).iter().any(|(error, kept)| error.contains("nonsense") && *kept)
            })
            .await;
        api.put(SLICES, slice("users", &["10.1.0.5"]));
        watched.until_endpoints(&["5", "4"]).await;
        watched.until("the error to go", |cluster| errors(cluster).len() == 1).await;
        // What is wrong stays in force through a new list, too.
        let mut users = slice("users", &["10.1.0.6"]);
        users["addressType"] = "IPX".into();
        api.put(SLICES, users);
        watched.until("its error", |cluster| errors(cluster).len() == 2).await;
        api.compact();
        api.pass();
        api.inject(SLICES, r#"{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}"#);
        eventually("a new list", || api.lists(SLICES) >= 2).await;
        api.put(SLICES, slice("after", &["10.1.0.7"]));
        watched.until_endpoints(&["7", "5", "4"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_are_not_believed_and_the_truth_is_found_again() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    // An object of another kind.
    api.inject(SLICES, &json!({ "type": "ADDED", "object": service("liar", 80) }).to_string());
    watched
        .until("the lie", |cluster| {
            cluster.health.file_errors.iter().any(|error| error.error.contains("brought a Service"))
        })
        .await;
    for (i, line) in ["<html>busy</html>", r#"{"type":"UNKNOWN","object":{}}"#, "{}", r#"{"type":"ERROR","object":7}"#]
        .iter()
        .enumerate()
    {
        let before = api.count(SLICES, "watch=true");
        api.inject(SLICES, line);
        eventually("a new watch", || api.count(SLICES, "watch=true") > before).await;
        let address = format!("10.1.0.{}", i + 10);
        api.put(SLICES, slice("users", &[&address]));
        watched.until_endpoints(&[&(i + 10).to_string()]).await;
    }
    assert_eq!(api.lists(SLICES), 1, "a lie costs a connection, and no list");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_lies_each_time_stays_stale_until_it_does_not() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    let mut registry = watched.registry.clone();
    let seen = tokio::spawn(async move {
        let mut seen = vec![false];
        while registry.changed().await.is_ok() {
            let stale = registry.borrow_and_update().clusters[0].health.stale;
            if seen.last() != Some(&stale) {
                seen.push(stale);
            }
        }
        seen
    });
    for _ in 0..6 {
        let before = api.count(SLICES, "watch=true");
        let lie_until_there_is_a_new_one = || {
            api.inject(SLICES, "<html>busy</html>");
            api.count(SLICES, "watch=true") > before
        };
        eventually("a new watch", lie_until_there_is_a_new_one).await;
        // Meanwhile all can be listed, and the next watch has begun.
        watched.until("stale", |cluster| cluster.health.stale).await;
    }
    assert_eq!(endpoints(&watched.now()), ["1", "2"]);
    watched.until("a quiet watch", |cluster| !cluster.health.stale).await;
    drop(watched);
    assert_eq!(seen.await.unwrap(), [false, true, false], "it flaps");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_read_again_when_it_is_refused() {
    let api = with_users().await;
    api.behave(|behaviour| behaviour.tokens = ["one".to_owned()].into());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "one\n").unwrap();
    let config = KubernetesConfig { server: Some(api.url()), token_file: Some(file.clone()), ..Default::default() };
    let mut watched = Watched::start(config);
    watched.until_endpoints(&["1", "2"]).await;
    // The server wants the next one before it is there.
    api.behave(|behaviour| behaviour.tokens = ["two".to_owned()].into());
    api.cut_watches();
    watched
        .until("401", |cluster| cluster.health.error.as_ref().is_some_and(|error| error.contains("401 Unauthorized")))
        .await;
    api.put(SLICES, slice("users", &["10.1.0.3"]));
    std::fs::write(&file, "two\n").unwrap();
    watched.until_endpoints(&["3"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_is_run_again_when_its_token_is_refused() {
    let api = with_users().await;
    let directory = tempfile::tempdir().unwrap();
    let (token, count) = (directory.path().join("token"), directory.path().join("count"));
    std::fs::write(&token, "one").unwrap();
    api.behave(|behaviour| behaviour.tokens = ["one".to_owned()].into());
    let script = format!(
        "echo x >> {}; echo \"{{\\\"status\\\": {{\\\"token\\\": \\\"$(cat {})\\\"}}}}\"",
        count.display(),
        token.display()
    );
    let exec = ExecConfig { command: "sh".into(), args: vec!["-c".into(), script], ..Default::default() };
    let mut watched =
        Watched::start(KubernetesConfig { server: Some(api.url()), exec: Some(exec), ..Default::default() });
    watched.until_endpoints(&["1", "2"]).await;
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n", "all watches share one token");
    std::fs::write(&token, "two").unwrap();
    api.behave(|behaviour| behaviour.tokens = ["two".to_owned()].into());
    api.put(SLICES, slice("users", &["10.1.0.3"]));
    watched.until_endpoints(&["3"]).await;
    api.cut_watches();
    eventually("new watches", || api.count(SLICES, "watch=true") >= 2).await;
    api.put(SLICES, slice("users", &["10.1.0.4"]));
    watched.until_endpoints(&["4"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_forbidden_is_named() {
    let api = with_users().await;
    api.behave(|behaviour| behaviour.refused = Some(PODS));
    let mut watched = Watched::of(&api);
    watched.until("the refusal", |cluster| cluster.health.stale).await;
    let Cluster { objects, health, .. } = watched.now();
    assert!(objects.is_none(), "nothing counts before all has been read");
    let error = health.error.unwrap();
    assert!(error.starts_with("Pods: 403 Forbidden: pods is forbidden"), "{error}");
    api.behave(|behaviour| behaviour.refused = None);
    watched.until_endpoints(&["1", "2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn selectors_and_nodes_are_asked_for() {
    let api = with_users().await;
    let mut chosen = slice("chosen", &["10.1.0.5"]);
    chosen["metadata"]["labels"]["mesh"] = "yes".into();
    chosen["endpoints"][0]["nodeName"] = "n1".into();
    api.put(SLICES, chosen);
    let labels = json!({ "topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1" });
    api.put(NODES, json!({ "kind": "Node", "metadata": { "name": "n1", "labels": labels } }));
    let endpoint_slice_selector = "mesh=yes".to_owned();
    let config =
        KubernetesConfig { server: Some(api.url()), endpoint_slice_selector, nodes: true, ..Default::default() };
    let mut watched = Watched::start(config);
    watched.until_endpoints(&["5"]).await;
    let objects = watched.now().objects.unwrap();
    assert_eq!(objects.nodes.values().next().unwrap().region, "eu");
    assert_eq!(api.count(SLICES, "labelSelector=mesh%3Dyes"), 1);
    assert_eq!(api.count(SERVICES, "labelSelector"), 0);
}

/// Regions and zones are not worth a cluster; policies are.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_does_without_nodes_that_it_may_not_read() {
    let api = with_users().await;
    api.behave(|behaviour| behaviour.refused = Some(NODES));
    let config = KubernetesConfig { server: Some(api.url()), nodes: true, ..Default::default() };
    let mut watched = Watched::start(config);
    let error = |cluster: &Cluster| cluster.health.error.clone().unwrap_or_default();
    watched
        .until("the endpoints", |cluster| endpoints(cluster) == ["1", "2"] && error(cluster).contains("403 Forbidden"))
        .await;
    api.behave(|behaviour| behaviour.refused = Some(MANIFESTS));
    let config = KubernetesConfig { server: Some(api.url()), service_manifests: true, ..Default::default() };
    let mut watched = Watched::start(config);
    watched.until("the refusal", |cluster| error(cluster).contains("403 Forbidden")).await;
    assert!(watched.now().objects.is_none(), "calls would be without what is stated about them");
    // Of a kind that is not defined there are none.
    api.behave(|behaviour| (behaviour.refused, behaviour.undefined) = (None, Some(MANIFESTS)));
    let hint = |cluster: &Cluster| cluster.health.warnings.iter().any(|text| text.contains("servicemanifests.yaml"));
    let well = |cluster: &Cluster| endpoints(cluster) == ["1", "2"] && !cluster.health.stale && hint(cluster);
    watched.until("the endpoints, and what to do", well).await;
}

/// The addresses of Services that are not selected are not free for other clusters' services.
#[tokio::test(flavor = "multi_thread")]
async fn of_services_that_are_not_selected_the_addresses_are_known() {
    let api = with_users().await;
    let service_selector = "mesh=yes".to_owned();
    let config = KubernetesConfig { server: Some(api.url()), service_selector, ..Default::default() };
    let mut watched = Watched::start(config);
    let known = |cluster: &Cluster| cluster.objects.as_ref().map(|objects| objects.virtual_ips.len());
    watched.until("the addresses", |cluster| known(cluster) == Some(1)).await;
    let objects = watched.now().objects.unwrap();
    assert!(objects.services.is_empty(), "it is not selected");
    api.delete(SERVICES, "default", "users");
    watched.until("their end", |cluster| known(cluster) == Some(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn service_manifests_are_custom_resources() {
    let api = with_users().await;
    let manifest = |connect: &str| {
        json!({ "kind": "ServiceManifest", "apiVersion": "culvert.dev/v1alpha1",
                "metadata": { "namespace": "default", "name": "users" }, "spec": { "timeouts": { "connect": connect } } })
    };
    api.put(MANIFESTS, manifest("250ms"));
    let config = KubernetesConfig { server: Some(api.url()), service_manifests: true, ..Default::default() };
    let mut watched = Watched::start(config);
    let connect = |watched: &Watched| {
        let mesh = mesh::join(&watched.registry.borrow());
        let users = &mesh.services[&ObjectKey::new("default", "users")];
        users.manifest.as_ref().map(|manifest| manifest.timeouts.connect.unwrap().0.as_millis())
    };
    watched.until_endpoints(&["1", "2"]).await;
    assert_eq!(connect(&watched), Some(250));
    api.put(MANIFESTS, manifest("2s"));
    let is = |millis: u64| {
        move |cluster: &Cluster| {
            let manifests = cluster.objects.iter().flat_map(|objects| objects.manifests.values());
            manifests.map(|m| m.timeouts.connect.unwrap().0).eq([Duration::from_millis(millis)])
        }
    };
    watched.until("the change", is(2000)).await;
    // One that the server has let pass and is wrong all the same.
    api.put(MANIFESTS, manifest("soon"));
    watched.until("the mistake", |cluster| !cluster.health.file_errors.is_empty()).await;
    let error = &watched.now().health.file_errors[0];
    assert!(error.error.contains("ServiceManifest default/users: spec.timeouts.connect: `soon`"), "{error:?}");
    assert!(error.last_good_in_force && is(2000)(&watched.now()));
    api.delete(MANIFESTS, "default", "users");
    watched.until("nothing stated", |cluster| cluster.objects.as_ref().unwrap().manifests.is_empty()).await;
    // Who is not told to read them does not ask for what may not be there.
    let mut other = Watched::of(&api);
    let asked = api.lists(MANIFESTS);
    other.until_endpoints(&["1", "2"]).await;
    assert_eq!(api.lists(MANIFESTS), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_s_authority_and_client_certificate() {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let issue = |name: &str, issuer: Option<&rcgen::Issuer<'_, rcgen::KeyPair>>| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = match issuer {
            Some(issuer) => params.signed_by(&key, issuer).unwrap(),
            None => {
                params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
                params.self_signed(&key).unwrap()
            }
        };
        (certificate, key, params)
    };
    let (ca, ca_key, ca_params) = issue("ca", None);
    let issuer = rcgen::Issuer::new(ca_params, ca_key);
    let (server, server_key, _) = issue("server", Some(&issuer));
    let (client, client_key, _) = issue("client", Some(&issuer));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .unwrap();
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![server.der().clone()], server_key.serialize_der().try_into().unwrap())
        .unwrap();
    let api = KubeApi::start_with(Some(Arc::new(tls))).await;
    api.put(SLICES, slice("users", &["10.1.0.1"]));
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (ca, client) = (write("ca.pem", ca.pem()), write("client.pem", client.pem()));
    let key = write("client.key", client_key.serialize_pem());
    let kubeconfig = write(
        "kubeconfig",
        format!(
            "{{apiVersion: v1, kind: Config, current-context: nowhere,
               clusters: [{{name: c, cluster: {{server: '{}', certificate-authority: {}}}}}],
               contexts: [{{name: here, context: {{cluster: c, user: u}}}}],
               users: [{{name: u, user: {{client-certificate: {}, client-key: {}}}}}]}}",
            api.url(),
            ca.display(),
            client.display(),
            key.display()
        ),
    );
    let context = Some("here".to_owned());
    let mut watched = Watched::start(KubernetesConfig { kubeconfig: Some(kubeconfig), context, ..Default::default() });
    watched.until_endpoints(&["1"]).await;
    // Without the certificate nobody is let in; with another authority nobody is believed.
    let mut nobody = Watched::start(KubernetesConfig {
        server: Some(api.url()),
        certificate_authority: Some(ca),
        ..Default::default()
    });
    nobody.until("the refusal", |cluster| cluster.health.stale).await;
    let mut distrusting = Watched::start(KubernetesConfig {
        server: Some(api.url()),
        certificate_authority: Some(client),
        ..Default::default()
    });
    distrusting.until("the distrust", |cluster| cluster.health.stale).await;
    let error = distrusting.now().health.error.unwrap();
    assert!(error.to_lowercase().contains("certificate"), "{error}");
}
