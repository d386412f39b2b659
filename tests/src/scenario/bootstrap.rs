//! The daemons' bootstrap.

use std::net::Ipv4Addr;

use super::ADMIN;
use crate::lab::{Node, Pod};

/// What a pod may do while no daemon serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailurePolicy {
    /// Connect as if it were not enrolled.
    Open,
    /// Nothing.
    Closed,
}

/// An Envoy bootstrap that gets all its resources from `xds` and intercepts what `pods` send.
pub(super) fn node_bootstrap<'a>(
    node: &Node,
    pods: impl Iterator<Item = &'a Pod>,
    xds: (Ipv4Addr, u16),
    delta: bool,
    policy: FailurePolicy,
) -> String {
    let pods: String = pods
        .flat_map(|pod| [pod.ipv4().to_string(), pod.ipv6().to_string()])
        .map(|address| format!("    - {{address: \"{address}\"}}\n"))
        .collect();
    let (admin_address, admin_port) = ADMIN.split_once(':').unwrap_or((ADMIN, "0"));
    let (xds_address, xds_port) = xds;
    let api_type = if delta { "DELTA_GRPC" } else { "GRPC" };
    let failure_policy = match policy {
        FailurePolicy::Open => "FAIL_OPEN",
        FailurePolicy::Closed => "FAIL_CLOSED",
    };
    let (cgroup, pins) = (node.cgroup().display(), node.bpf_dir().join("culvert").display().to_string());
    format!(
        r#"admin: {{address: {{socket_address: {{address: {admin_address}, port_value: {admin_port}}}}}}}
dynamic_resources:
  ads_config: {{api_type: {api_type}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: discovery}}}}]}}
  lds_config: {{resource_api_version: V3, ads: {{}}}}
  cds_config: {{resource_api_version: V3, ads: {{}}}}
static_resources:
  clusters:
  - name: discovery
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: discovery
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {xds_address}, port_value: {xds_port}}}}}}}}}]}}]
bootstrap_extensions:
- name: culvert.bootstrap.interception
  typed_config:
    "@type": type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception
    interfaces: ["veth-*"]
    uplinks: [eth0]
    failure_policy: {failure_policy}
    shortcut_cgroup: {cgroup}
    acceleration: BOTH_WAYS
    pin_path: {pins}
    pods:
{pods}"#
    )
}
