//! Snapshots for the tests of the sessions.

use std::sync::Arc;

use crate::kubernetes::manifest::parse;
use crate::mesh::join;
use crate::registry::{Cluster, ClusterInfo, Registry, SourceHealth};
use crate::resources::{Options, Snapshot};

/// A snapshot with these services (name, port name, port), one endpoint each.
pub(crate) fn snapshot(services: &[(&str, &str, u16)]) -> Snapshot {
    snapshot_with(services, &["10.1.0.1"])
}

/// A snapshot with these services, each with endpoints at these addresses.
pub(crate) fn snapshot_with(services: &[(&str, &str, u16)], addresses: &[&str]) -> Snapshot {
    let endpoints: Vec<_> = addresses.iter().map(|address| format!("{{addresses: [{address}]}}")).collect();
    let endpoints = endpoints.join(", ");
    let mut manifests = String::new();
    for (index, (name, port_name, port)) in services.iter().enumerate() {
        let vip = std::net::Ipv4Addr::from(0x0a60_0000 + u32::try_from(index).unwrap());
        manifests.push_str(&format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{clusterIP: {vip}, ports: [{{name: {port_name}, port: {port}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: {port_name}, port: 8080}}]
endpoints: [{endpoints}]
---
"
        ));
    }
    let info = ClusterInfo { name: "east".into(), ..Default::default() };
    let objects = Some(Arc::new(parse(&manifests).unwrap()));
    let cluster = Cluster { info, objects, health: SourceHealth::default(), drained: false };
    Snapshot::build(
        Arc::new(join(&Registry { version: 1, clusters: vec![cluster], waited: false })),
        &Options::default(),
    )
}
