//! Enrolment by what an API server says of this node's pods, on the running kernel.

mod kernel_lab;
#[path = "../../discovery/tests/kube_api/mod.rs"]
mod kube_api;

use std::net::TcpListener;
use std::os::fd::AsFd as _;

use culvert_kube_api::KubernetesConfig;
use culvert_proxy_daemon::intercept::{Enrolment, Interception, InterceptionConfig, PodStatus, Policy, Selector};
use kernel_lab::*;
use kube_api::{KubeApi, PODS};
use serde_json::json;
use tokio::runtime::Runtime;

/// A node, and an API server that listens on it.
struct Stage {
    runtime: Runtime,
    api: KubeApi,
    lab: Lab,
}

impl Stage {
    fn new() -> Self {
        let lab = Lab::new();
        let (runtime, api) = lab.node.run(|| {
            // Its threads are in the node's namespace as well.
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            let runtime = runtime.expect("a runtime");
            let api = runtime.block_on(KubeApi::start());
            (runtime, api)
        });
        Self { runtime, api, lab }
    }

    fn put(&self, name: &str, mesh: &str, address: &str, more: serde_json::Value) {
        let mut metadata =
            json!({"namespace": "shop", "name": name, "uid": format!("u-{name}"), "labels": {"mesh": mesh}});
        if let (Some(metadata), Some(more)) = (metadata.as_object_mut(), more.as_object()) {
            metadata.extend(more.clone());
        }
        let pod = json!({"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": {"nodeName": "node-a"},
                         "status": {"phase": "Running", "podIP": address}});
        self.runtime.block_on(async { self.api.put(PODS, pod) });
    }

    fn delete(&self, name: &str) {
        self.runtime.block_on(async { self.api.delete(PODS, "shop", name) });
    }

    fn start(&self) -> (Interception, TcpListener) {
        let match_labels = [("mesh".to_owned(), "on".to_owned())].into();
        let selector = Selector { namespaces: vec!["shop".to_owned()], match_labels, policy: Policy::default() };
        let kubernetes = KubernetesConfig { server: Some(self.api.url()), ..KubernetesConfig::default() };
        let enrolment = Enrolment {
            kubernetes: Some(kubernetes),
            node_name: "node-a".to_owned(),
            selectors: vec![selector],
            ..Enrolment::default()
        };
        let config = InterceptionConfig { pods: Vec::new(), enrolment: Some(enrolment), ..self.lab.config() };
        let interception = self.lab.start(config, 1);
        let worker = self.lab.node.listen_transparent("[::]:0");
        interception.set_listener(0, worker.as_fd()).expect("listener");
        (interception, worker)
    }
}

fn pod(interception: &Interception, name: &str) -> Option<PodStatus> {
    interception.pods().into_iter().find(|pod| pod.name == name)
}

fn is_enrolled(interception: &Interception, name: &str) -> bool {
    pod(interception, name).is_some_and(|pod| pod.enrolled)
}

fn is_redirected(lab: &Lab, interception: &Interception) -> bool {
    let before = counter(interception, "redirected");
    // Nothing else listens there.
    let _ = lab.client.connect_within("10.201.2.2:80", REFUSAL);
    counter(interception, "redirected") > before
}

#[test]
fn pods_of_the_node_are_enrolled_as_the_api_server_says() {
    let stage = Stage::new();
    stage.put("client", "on", CLIENT, json!({}));
    let (interception, _worker) = stage.start();
    eventually("the pod is enrolled", || is_enrolled(&interception, "shop/client"));
    assert_eq!(interception.faults(), Vec::<String>::new());
    assert!(is_redirected(&stage.lab, &interception));
    assert!(stage.api.requests().iter().any(|request| request.contains("fieldSelector=spec%2EnodeName%3Dnode%2Da")));

    // Every pod of the node is listed, with what keeps it out; those of other nodes are not.
    stage.put("plain", "off", SERVER, json!({}));
    stage.put("starting", "on", "", json!({}));
    let elsewhere = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"namespace": "shop", "name": "far"},
                           "spec": {"nodeName": "node-b"}, "status": {"podIP": "10.9.9.9"}});
    stage.runtime.block_on(async { stage.api.put(PODS, elsewhere) });
    let reason = |name: &str| pod(&interception, name).and_then(|pod| pod.reason);
    eventually("the others are listed", || {
        reason("shop/plain").as_deref() == Some("no selector matches it")
            && reason("shop/starting").as_deref() == Some("it has no address yet")
    });
    assert!(pod(&interception, "shop/far").is_none());

    // Another label, no restart.
    stage.put("client", "off", CLIENT, json!({}));
    eventually("it is not enrolled any more", || !is_enrolled(&interception, "shop/client"));
    assert!(!is_redirected(&stage.lab, &interception));
    stage.put("client", "on", CLIENT, json!({}));
    eventually("enrolled again", || is_enrolled(&interception, "shop/client"));
    stage.delete("client");
    eventually("forgotten", || pod(&interception, "shop/client").is_none());
    assert!(!is_redirected(&stage.lab, &interception));
    stage.lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// istio#46628, with a watch that is late.
#[test]
fn a_deleted_pods_address_does_not_inherit_its_policy() {
    let stage = Stage::new();
    stage.put("old", "on", CLIENT, json!({}));
    let (interception, _worker) = stage.start();
    eventually("enrolled", || is_enrolled(&interception, "shop/old"));
    assert!(is_redirected(&stage.lab, &interception));
    // Another pod has its address and an interface of its own before the API server says so.
    stage.lab.node.ip("link delete pod1");
    stage.lab.rewire_client();
    assert!(!is_redirected(&stage.lab, &interception));
    // What is still told of the old one does not make the address its own again.
    stage.put("old", "on", CLIENT, json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}));
    eventually("it is known to go", || !is_enrolled(&interception, "shop/old") && interception.faults().is_empty());
    assert!(!is_redirected(&stage.lab, &interception));
    stage.put("new", "off", CLIENT, json!({"creationTimestamp": "2026-01-01T00:00:01Z"}));
    stage.delete("old");
    eventually("the new one is known", || pod(&interception, "shop/new").is_some());
    assert!(!is_redirected(&stage.lab, &interception));
    stage.lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn without_the_api_server_the_node_is_not_ready_or_keeps_what_it_knows() {
    let mut stage = Stage::new();
    stage.put("client", "on", CLIENT, json!({}));
    stage.api.down();
    let (interception, _worker) = stage.start();
    eventually("the reason is told", || {
        interception.faults().iter().any(|fault| fault.starts_with("pods cannot be read from the API server: "))
    });
    let api = &mut stage.api;
    stage.lab.node.run(|| stage.runtime.block_on(api.up()));
    eventually("ready", || is_enrolled(&interception, "shop/client") && interception.faults().is_empty());
    stage.api.down();
    assert!(is_redirected(&stage.lab, &interception));
    assert!(is_enrolled(&interception, "shop/client") && interception.faults().is_empty());
    stage.lab.node.run(|| interception.shutdown()).expect("shuts down");
}
