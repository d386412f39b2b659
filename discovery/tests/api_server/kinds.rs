//! What is made of objects of each kind.

use super::*;

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

/// A slice of `users` with these Pods.
fn users(numbers: &[u8]) -> serde_json::Value {
    let addresses: Vec<_> = numbers.iter().map(|number| format!("10.1.0.{number}")).collect();
    let mut slice = slice("users", &addresses.iter().map(String::as_str).collect::<Vec<_>>());
    for (i, number) in numbers.iter().enumerate() {
        slice["endpoints"][i]["targetRef"] =
            json!({"kind": "Pod", "name": format!("pod-{number}"), "uid": format!("first-{number}")});
    }
    slice
}

/// The Pod of this number.
fn numbered(number: u8) -> serde_json::Value {
    let mut pod = pod(&format!("pod-{number}"), &format!("10.1.0.{number}"));
    pod["metadata"]["uid"] = format!("first-{number}").into();
    pod
}

fn offloaded(mut pod: serde_json::Value) -> serde_json::Value {
    pod["metadata"]["labels"] = json!({"app": "users", "culvert.dev/offloaded": "true", "culvert.dev/revision": "x"});
    pod
}

/// Whether these, by the last parts of their addresses, take the requests to `users`.
fn takes(numbers: &'static [u8]) -> impl Fn(&Mesh) -> bool {
    move |mesh| {
        let Some(users) = mesh.services.values().next() else { return false };
        let healthy = users.ports[&80].endpoints.iter().filter(|endpoint| endpoint.health == Health::Healthy);
        healthy.map(|endpoint| endpoint.address.ip().to_string()).eq(numbers.iter().map(|n| format!("10.1.0.{n}")))
    }
}

/// The controller that writes slices may be away for a while, as when its leader changes.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_gone_is_out_however_long_its_slice_lists_it() {
    let api = KubeApi::start().await;
    api.put(SERVICES, service("users", 80));
    (1..=3).for_each(|number| api.put(PODS, numbered(number)));
    api.put(SLICES, users(&[1, 2, 3]));
    let mut watched = Watched::of(&api);
    watched.until_mesh("all of them", takes(&[1, 2, 3])).await;
    api.delete(PODS, "default", "pod-1");
    watched.until_mesh("the first to be out", takes(&[2, 3])).await;
    // As a StatefulSet does it: another pod of the same name.
    api.delete(PODS, "default", "pod-2");
    let mut second = pod("pod-2", "10.1.0.4");
    second["metadata"]["uid"] = "second-2".into();
    api.put(PODS, second);
    watched.until_mesh("the second to be out", takes(&[3])).await;
    let mut later = users(&[1, 2, 3]);
    later["endpoints"][1]["targetRef"]["uid"] = "second-2".into();
    later["endpoints"][1]["addresses"] = json!(["10.1.0.4"]);
    api.put(SLICES, later);
    watched.until_mesh("the other one", takes(&[3, 4])).await;
}

/// It may be an offloaded one.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_comes_while_pods_cannot_be_read_is_held_back() {
    let api = KubeApi::start().await;
    api.put(SERVICES, service("users", 80));
    api.put(PODS, offloaded(numbered(9)));
    (1..=4).for_each(|number| api.put(PODS, numbered(number)));
    api.put(SLICES, users(&[1, 2, 3]));
    // Of Pods that are not selected nothing is known at any time.
    let pod_selector = "mesh=yes".to_owned();
    let selective = KubernetesConfig { server: Some(api.url()), pod_selector, ..Default::default() };
    let (mut watched, mut selecting) = (Watched::of(&api), Watched::start(selective));
    watched.until_mesh("those that are ready", takes(&[1, 2, 3])).await;
    selecting.until_mesh("those that are ready", takes(&[1, 2, 3])).await;
    api.behave(|behaviour| behaviour.refused = Some(PODS));
    api.cut_watches();
    let stale = |cluster: &Cluster| cluster.health.error.as_ref().is_some_and(|error| error.contains("Pods: 403"));
    watched.until("the refusal", stale).await;
    selecting.until("the refusal", stale).await;
    let mut registry = watched.registry.clone();
    let seen = tokio::spawn(async move {
        let mut seen = false;
        while registry.changed().await.is_ok() {
            let mesh = mesh::join(&registry.borrow_and_update());
            let mut endpoints = mesh.services.values().flat_map(|service| &service.ports[&80].endpoints);
            seen |= endpoints.any(|endpoint| endpoint.address.ip().to_string() == "10.1.0.5");
        }
        seen
    });
    // The fourth was seen before it was ready. The offloaded one is the last that is told of when all that was missed is.
    api.put(PODS, numbered(6));
    (10..40).for_each(|number| api.put(PODS, numbered(number)));
    api.put(PODS, offloaded(numbered(5)));
    api.put(SLICES, users(&[1, 2, 3, 4, 5, 6]));
    let held =
        |mesh: &Mesh| mesh.warnings.iter().any(|text| text.starts_with("2 endpoints of cluster east are held back, "));
    watched.until_mesh("what is known", |mesh| takes(&[1, 2, 3, 4])(mesh) && held(mesh)).await;
    // Here nothing has ever been offloaded that is selected.
    selecting.until_mesh("all", takes(&[1, 2, 3, 4, 5, 6])).await;
    api.behave(|behaviour| (behaviour.refused, behaviour.delay) = (None, Duration::from_millis(20)));
    watched.until_mesh("what is not offloaded", |mesh| takes(&[1, 2, 3, 4, 6])(mesh) && !held(mesh)).await;
    drop(watched);
    assert!(!seen.await.unwrap(), "an offloaded pod took requests");
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
