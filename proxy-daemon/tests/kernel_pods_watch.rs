//! Enrolment by what an API server says of this node's pods, on the running kernel.

mod kernel_lab;
#[path = "../../discovery/tests/kube_api/mod.rs"]
mod kube_api;

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use culvert_kube_api::KubernetesConfig;
use culvert_proxy_daemon::intercept::{Enrolment, Interception, InterceptionConfig, PodStatus, Policy, Selector};
use kernel_lab::*;
use kube_api::{KubeApi, PODS};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
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
        Self::with(KubeApi::start())
    }

    fn with(api: impl Future<Output = KubeApi> + Send) -> Self {
        let lab = Lab::new();
        let (runtime, api) = lab.node.run(|| {
            // Its threads are in the node's namespace as well.
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            let runtime = runtime.expect("a runtime");
            let api = runtime.block_on(api);
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
        let kubernetes = KubernetesConfig { server: Some(self.api.url()), ..KubernetesConfig::default() };
        let interception = self.lab.start(self.config(kubernetes), 1);
        let worker = self.lab.node.listen_transparent("[::]:0");
        interception.set_listener(0, worker.as_fd()).expect("listener");
        (interception, worker)
    }

    fn config(&self, kubernetes: KubernetesConfig) -> InterceptionConfig {
        let match_labels = [("mesh".to_owned(), "on".to_owned())].into();
        let selector = Selector { namespaces: vec!["shop".to_owned()], match_labels, policy: Policy::default() };
        let enrolment = Enrolment {
            kubernetes: Some(kubernetes),
            node_name: "node-a".to_owned(),
            selectors: vec![selector],
            ..Enrolment::default()
        };
        InterceptionConfig { pods: Vec::new(), enrolment: Some(enrolment), ..self.lab.config() }
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

/// A pod's service account: files that the kubelet replaces all at once, in a file system that only one thread and those
/// that it starts see.
struct ServiceAccount {
    directory: File,
}

impl ServiceAccount {
    /// For the calling thread.
    fn mount(authority: &str) -> Self {
        const PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private");
        mount(Some("tmpfs"), "/var/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("a tmpfs");
        fs::create_dir_all(PATH).expect("a directory");
        let account = Self { directory: File::open(PATH).expect("the directory") };
        for (name, target) in [("token", "..data/token"), ("ca.crt", "ca")] {
            symlink(target, account.path().join(name)).expect("a link");
        }
        fs::write(account.path().join("ca"), authority).expect("the authority");
        account
    }

    /// The directory, whatever the calling thread sees.
    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.directory.as_raw_fd().to_string())
    }

    /// As the kubelet does it: another directory takes the place of the one before.
    fn renew(&self, token: &str) {
        let (data, fresh) = (self.path().join(format!("..{token}")), self.path().join("..data_tmp"));
        fs::create_dir(&data).expect("a directory");
        fs::write(data.join("token"), token).expect("the token");
        symlink(format!("..{token}"), &fresh).expect("a link");
        fs::rename(&fresh, self.path().join("..data")).expect("renamed");
    }
}

/// A certificate for 127.0.0.1, and the server's configuration with it.
fn self_signed() -> (String, Arc<rustls::ServerConfig>) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("a certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let key = key.serialize_der().try_into().expect("a key");
    let config = config.expect("versions").with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key);
    (certificate.pem(), Arc::new(config.expect("a certificate")))
}

/// As in a pod: the server's place in the environment, the authority and a token that is renewed in the service account.
#[test]
fn in_a_cluster_the_service_account_is_used_as_it_is_renewed() {
    const NAME: &str = "in_a_cluster_the_service_account_is_used_as_it_is_renewed";
    const VARIABLE: &str = "KUBERNETES_SERVICE_HOST";
    const PORT: u16 = 6443;
    if std::env::var_os(VARIABLE).is_none() {
        // Once more, in an environment that a pod has.
        let mut again = Command::new(std::env::current_exe().expect("this program"));
        again.args(["--exact", NAME, "--nocapture"]).env(VARIABLE, "127.0.0.1");
        // A small image has no authorities but the cluster's.
        again.envs([("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent")]);
        // What it says of its result is not this binary's.
        let output = again.env("KUBERNETES_SERVICE_PORT", PORT.to_string()).output().expect("starts");
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        assert!(output.status.success(), "{}: {said}", output.status);
        return;
    }
    let (authority, tls) = self_signed();
    let stage = Stage::with(async move {
        let mut api = KubeApi::start_with(Some(tls)).await;
        api.down();
        api.address.set_port(PORT);
        api.up().await;
        api
    });
    let takes = |token: &str| stage.api.behave(|behaviour| behaviour.tokens = [token.to_owned()].into());
    stage.put("client", "on", CLIENT, json!({}));
    takes("one");
    let config = stage.config(KubernetesConfig { in_cluster: true, ..KubernetesConfig::default() });
    let (account, interception) = stage.lab.node.run(|| {
        let account = ServiceAccount::mount(&authority);
        account.renew("zero");
        (account, Interception::start(config, 1).expect("starts"))
    });
    let worker = stage.lab.node.listen_transparent("[::]:0");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    eventually("the refusal is told", || {
        interception.faults() == ["pods cannot be read from the API server: 401 Unauthorized: Unauthorized"]
    });
    account.renew("one");
    eventually("enrolled", || is_enrolled(&interception, "shop/client") && interception.faults().is_empty());

    // The new token is there before the old one ends.
    account.renew("two");
    takes("two");
    stage.api.end_watches();
    stage.put("second", "off", SERVER, json!({}));
    eventually("the second is known", || pod(&interception, "shop/second").is_some());

    // The old one ends first: nothing that is known is lost, and what is new is known with the new token.
    takes("three");
    stage.api.cut_watches();
    let asked = stage.api.requests().len();
    eventually("it is refused", || stage.api.requests().len() > asked + 1);
    stage.put("third", "off", NEIGHBOUR, json!({}));
    assert!(is_enrolled(&interception, "shop/client") && interception.faults().is_empty());
    assert!(is_redirected(&stage.lab, &interception));
    account.renew("three");
    eventually("the third is known", || pod(&interception, "shop/third").is_some());
    stage.lab.node.run(|| interception.shutdown()).expect("shuts down");
}
