//! What each proxy is given of the whole: by what its services may call, by what it asks for, and by what it is for.

mod in_process;

use std::fs;

use culvert_discovery::resources::type_url;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};
use in_process::{Delta, Running, Sotw, within, write_service};
use tonic::Code;

/// A proxy asks for a cluster by its name, beside what it is given, and gets all that goes with it; then it wants it no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_given_the_rest_when_it_asks() {
    let running = Running::with_service("users").await;
    for name in ["orders", "payments"] {
        write_service(running.directory.path(), name, "10.1.0.3");
    }
    let manifest = "{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {name: users}, spec: {egress: [], onDemand: true}}";
    fs::write(running.directory.path().join("policy.yaml"), manifest).unwrap();
    running.status_until("the manifest", |status| status["services"][2]["manifest"] == true).await;
    let of_users =
        Node { id: "n".into(), cluster: "users".into(), user_agent_name: "culvert".into(), ..Default::default() };
    let mut proxy = Delta::open(&running).await;
    let node = || Some(of_users.clone());
    proxy.send_as(type_url::CLUSTER, DeltaDiscoveryRequest { node: node(), ..Default::default() }).await;
    assert_eq!(proxy.next_as(&of_users).await.0, ["original_dst", "users.default:80"]);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let ask = DeltaDiscoveryRequest {
        node: node(),
        resource_names_subscribe: names(&["orders.default:80", "nobody.default:80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::CLUSTER, ask).await;
    let (added, removed) = proxy.next_as(&of_users).await;
    assert_eq!((added, removed), (names(&["orders.default:80"]), names(&["nobody.default:80"])));
    // Its endpoints, and what its policy is.
    let ask = DeltaDiscoveryRequest {
        node: node(),
        resource_names_subscribe: names(&["orders.default:80", "payments.default:80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::ENDPOINT, ask).await;
    let (added, removed) = proxy.next_as(&of_users).await;
    assert_eq!((added, removed), (names(&["orders.default:80"]), names(&["payments.default:80"])));
    // The routes know all of them.
    let ask = DeltaDiscoveryRequest {
        node: node(),
        resource_names_subscribe: names(&["outbound_http_80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::ROUTE, ask).await;
    assert_eq!(proxy.next_as(&of_users).await.0, ["outbound_http_80"]);
    let leave = DeltaDiscoveryRequest {
        node: node(),
        resource_names_unsubscribe: names(&["orders.default:80", "nobody.default:80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::CLUSTER, leave).await;
    let (added, removed) = proxy.next_as(&of_users).await;
    assert_eq!((added, removed), (names(&[]), names(&["orders.default:80"])));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_given_what_its_service_may_call() {
    let running = Running::with_service("users").await;
    for name in ["orders", "payments"] {
        write_service(running.directory.path(), name, "10.1.0.3");
    }
    let manifest = |egress: &str| {
        let text = format!(
            "{{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {{name: users}}, spec: {{egress: {egress}}}}}"
        );
        let temporary = running.directory.path().join(".tmp");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, running.directory.path().join("policy.yaml")).unwrap();
    };
    manifest("[orders]");
    running.status_until("the manifest", |status| status["services"][2]["manifest"] == true).await;
    let subscribe = |node: Node| DeltaDiscoveryRequest { node: Some(node), ..Default::default() };
    let of_users =
        Node { id: "n".into(), cluster: "users".into(), user_agent_name: "culvert".into(), ..Default::default() };
    let mut scoped = Delta::open(&running).await;
    scoped.send_as(type_url::CLUSTER, subscribe(of_users.clone())).await;
    assert_eq!(scoped.next_as(&of_users).await.0, ["orders.default:80", "original_dst", "users.default:80"]);
    // Another one is given everything.
    let mut all = Delta::open(&running).await;
    all.send(type_url::CLUSTER, DeltaDiscoveryRequest::default()).await;
    assert_eq!(all.next().await.0.len(), 4);
    // What may be called changes.
    manifest("[payments]");
    let (mut added, mut removed) = scoped.next_as(&of_users).await;
    if removed.is_empty() {
        removed = scoped.next_as(&of_users).await.1;
    }
    assert_eq!(
        (added.pop().as_deref(), removed.pop().as_deref()),
        (Some("payments.default:80"), Some("orders.default:80"))
    );
    // An edge, a worker or a cron job is nobody whom others call, and has a manifest all the same.
    let of_cron = Node { cluster: "cron".into(), ..of_users };
    let mut cron = Delta::open(&running).await;
    cron.send_as(type_url::CLUSTER, subscribe(of_cron.clone())).await;
    assert_eq!(cron.next_as(&of_cron).await.0.len(), 4);
    let manifest =
        "{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {name: cron}, spec: {egress: [orders]}}";
    fs::write(running.directory.path().join("cron.yaml"), manifest).unwrap();
    let gone = ["payments.default:80", "users.default:80"].map(str::to_owned).to_vec();
    assert_eq!(cron.next_as(&of_cron).await, (Vec::new(), gone));
    running.stop().await;
}

/// A node that says what it is for, and of which service.
fn node_for(role: &str, cluster: &str) -> Option<Node> {
    let fields = [("culvert.proxy".to_owned(), Value { kind: Some(Kind::StringValue(role.to_owned())) })].into();
    Some(Node {
        id: format!("{role}-1"),
        cluster: cluster.into(),
        metadata: Some(Struct { fields }),
        ..Node::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_proxy_says_it_is_for_is_one_of_those_that_there_are() {
    let running = Running::with_service("users").await;
    for (role, problem) in [
        ("gateway", "node.metadata `culvert.proxy`: `gateway` is not node, sidecar or edge"),
        ("edge", "node.metadata `culvert.proxy`: is edge, and discovery is configured without `edge`"),
    ] {
        let mut refused = Delta::open(&running).await;
        let ask = DeltaDiscoveryRequest { node: node_for(role, ""), ..Default::default() };
        refused.send_as(type_url::LISTENER, ask).await;
        let error = within("a refusal", refused.responses.message()).await.unwrap_err();
        assert_eq!((error.code(), error.message()), (Code::InvalidArgument, problem));
        let told = format!("{role}-1");
        running
            .status_until("the problem", |status| {
                let problems = status["client_problems"].as_array().unwrap();
                problems.iter().any(|it| it["node"] == *told && it["problem"] == problem)
            })
            .await;
    }
    // Nor is it read some other way than it was meant.
    let of_services = |kind: Kind| {
        let fields = [("services".to_owned(), Value { kind: Some(kind) })].into();
        Some(Node { id: "named-1".into(), metadata: Some(Struct { fields }), ..Node::default() })
    };
    let text = |name: &str| Value { kind: Some(Kind::StringValue(name.to_owned())) };
    for kind in [
        text("users").kind.unwrap(),
        Kind::ListValue(ListValue { values: vec![Value { kind: Some(Kind::NumberValue(1.0)) }] }),
    ] {
        let mut refused = Delta::open(&running).await;
        let ask = DeltaDiscoveryRequest { node: of_services(kind), ..Default::default() };
        refused.send_as(type_url::LISTENER, ask).await;
        let error = within("a refusal", refused.responses.message()).await.unwrap_err();
        assert!(error.message().starts_with("node.metadata `services`: is no list of names"), "{error}");
    }
    // Names that nobody has are told.
    let list = Kind::ListValue(ListValue { values: vec![text("users"), text("usres.shop")] });
    let mut named = Delta::open(&running).await;
    let node = of_services(list).map(|node| Node { id: "named-2".into(), ..node });
    let ask = DeltaDiscoveryRequest { node: node.clone(), ..Default::default() };
    named.send_as(type_url::LISTENER, ask).await;
    assert_eq!(named.next_as(&node.unwrap()).await.0, ["outbound"]);
    running
        .status_until("the name that nobody has", |status| {
            let problems = status["client_problems"].as_array().unwrap();
            let problem = |it: &serde_json::Value| {
                it["node"] == "named-2" && it["problem"].as_str().unwrap().ends_with(": shop/usres")
            };
            problems.iter().any(problem)
        })
        .await;
    drop(named);
    // State of the world is no way around it.
    let mut refused = Sotw::open(&running).await;
    let ask =
        DiscoveryRequest { node: node_for("gateway", ""), type_url: type_url::CLUSTER.into(), ..Default::default() };
    refused.requests.send(ask).await.unwrap();
    assert_eq!(within("a refusal", refused.responses.message()).await.unwrap_err().code(), Code::InvalidArgument);

    // A sidecar of no service is served, and told of while it is connected.
    let mut lost = Delta::open(&running).await;
    let ask = DeltaDiscoveryRequest { node: node_for("sidecar", "nobody"), ..Default::default() };
    lost.send_as(type_url::LISTENER, ask).await;
    assert_eq!(lost.next_as(&node_for("sidecar", "nobody").unwrap()).await.0, ["inbound", "outbound"]);
    let of_sidecar = |status: &serde_json::Value| {
        let problems = status["client_problems"].as_array().unwrap().clone();
        problems.into_iter().find(|it| it["node"] == "sidecar-1")
    };
    running.status_until("the problem", |status| of_sidecar(status).is_some()).await;
    let problem = of_sidecar(&running.status().await).unwrap()["problem"].as_str().unwrap().to_owned();
    assert!(problem.contains("of no service of the mesh") && problem.contains("default/nobody"), "{problem}");
    write_service(running.directory.path(), "nobody", "10.1.0.9");
    running.status_until("no problem", |status| of_sidecar(status).is_none()).await;
    running.stop().await;
}
