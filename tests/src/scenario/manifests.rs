//! The two clusters' manifests, as `kubectl get -o yaml` would show them, reduced to what matters.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};

use super::{APP_PORT, ECHO_PORT, ECHO_VIP, FRONT_VIP, Scenario, USERS_VIP, USERS_VIP_V6};
use crate::lab::Pod;

/// File names and their contents.
pub(super) type Files = Vec<(&'static str, String)>;

pub(super) fn cluster_a(scenario: &Scenario) -> Files {
    let Scenario { front, users_a, echo, .. } = scenario;
    vec![
        ("front.yaml", service("front", "front", &FRONT_VIP.into(), "http", 80, APP_PORT)),
        ("front-endpoints.yaml", endpoint_slice("front", false, "http", APP_PORT, &[front])),
        ("users.yaml", users_services()),
        ("users-endpoints.yaml", users_endpoints(&[users_a])),
        ("echo.yaml", service("echo", "echo", &ECHO_VIP.into(), "tcp", ECHO_PORT, ECHO_PORT)),
        ("echo-endpoints.yaml", endpoint_slice("echo", false, "tcp", ECHO_PORT, &[echo])),
    ]
}

/// `users` are the pods that the slice lists besides the offloaded one, which Kubernetes lists as it does any other.
pub(super) fn cluster_b(scenario: &Scenario, users: &[&Pod]) -> Files {
    let fx = &scenario.users_fx;
    let listed = [users, &[fx]].concat();
    vec![
        ("users.yaml", users_services()),
        ("users-endpoints.yaml", users_endpoints(&listed)),
        ("users-fx.yaml", offloaded_pod(fx)),
    ]
}

/// Writes each file beside its place and renames it, so that no reader ever sees half of one. Unchanged files are left.
pub(super) fn write_cluster(dir: &Path, files: &Files) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    for (name, content) in files {
        let path = dir.join(name);
        if fs::read_to_string(&path).is_ok_and(|old| old == *content) {
            continue;
        }
        let temporary = dir.join(format!("{name}.tmp"));
        fs::write(&temporary, content).with_context(|| format!("writing {}", temporary.display()))?;
        fs::rename(&temporary, &path).with_context(|| format!("replacing {}", path.display()))?;
    }
    Ok(())
}

fn users_services() -> String {
    let v6 = USERS_VIP_V6.parse().expect("the constant is an address");
    let v4 = service("users", "users", &USERS_VIP.into(), "http", 80, APP_PORT);
    format!("{v4}---\n{}", service("users-v6", "users", &v6, "http", 80, APP_PORT))
}

fn users_endpoints(pods: &[&Pod]) -> String {
    let v4 = endpoint_slice("users", false, "http", APP_PORT, pods);
    format!("{v4}---\n{}", endpoint_slice("users-v6", true, "http", APP_PORT, pods))
}

fn service(name: &str, app: &str, vip: &IpAddr, protocol: &str, port: u16, target_port: u16) -> String {
    format!(
        r#"apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  clusterIP: "{vip}"
  selector: {{app: {app}}}
  ports:
  - {{name: {protocol}, appProtocol: {protocol}, port: {port}, targetPort: {target_port}}}
"#
    )
}

fn endpoint_slice(service: &str, ipv6: bool, port_name: &str, port: u16, pods: &[&Pod]) -> String {
    let address_type = if ipv6 { "IPv6" } else { "IPv4" };
    let endpoints: String = pods
        .iter()
        .map(|pod| {
            let address = if ipv6 { IpAddr::from(pod.ipv6()) } else { pod.ipv4().into() };
            format!(
                "- {{addresses: [\"{address}\"], conditions: {{ready: true}}, targetRef: {{kind: Pod, name: {}}}}}\n",
                pod.name()
            )
        })
        .collect();
    let endpoints =
        if endpoints.is_empty() { "endpoints: []\n".to_owned() } else { format!("endpoints:\n{endpoints}") };
    format!(
        r#"apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {service}-1
  namespace: default
  labels: {{kubernetes.io/service-name: {service}}}
addressType: {address_type}
ports:
- {{name: {port_name}, port: {port}}}
{endpoints}"#
    )
}

fn offloaded_pod(pod: &Pod) -> String {
    format!(
        r#"apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: default
  labels: {{app: users, culvert.dev/offloaded: "true", culvert.dev/revision: feature-x}}
spec: {{containers: [{{name: users, ports: [{{containerPort: {APP_PORT}}}]}}]}}
status: {{phase: Running, podIP: "{ipv4}", podIPs: [{{ip: "{ipv4}"}}, {{ip: "{ipv6}"}}]}}
"#,
        name = pod.name(),
        ipv4 = pod.ipv4(),
        ipv6 = pod.ipv6(),
    )
}
