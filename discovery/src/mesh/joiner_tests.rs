//! Whatever happens, a mesh that is kept up to date is the mesh that is made from nothing.

use super::*;
use crate::kubernetes::manifest::parse;
use crate::mesh::{MeshPort, Protocol, join};
use crate::registry::{Cluster, SourceHealth};
use crate::resources::{Options, PUSH_ORDER, ProxyKind, Role, Snapshot, Viewer};

const NAMES: [&str; 4] = ["users", "orders", "mail", "db"];

/// A random document, which may be none.
fn document(random: &mut fastrand::Rng, cluster: usize, index: usize, kind: usize) -> String {
    let name = NAMES[index];
    let mut one_of = |texts: &[&'static str]| texts[random.usize(..texts.len())];
    match kind {
        0 => {
            let port = one_of(&["{name: http, port: 80}", "{name: db, port: 80}", "{name: http, port: 81}"]);
            let vip = one_of(&["10.96.0.1", "10.96.0.2", "None"]);
            let merge = one_of(&["", "culvert.dev/merge: 'false'", "culvert.dev/weight: '30'"]);
            match one_of(&["", "service", "service", "external"]) {
                "" => String::new(),
                "external" => format!(
                    "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{type: ExternalName, externalName: \
                     a.example, ports: [{port}]}}}}\n---\n"
                ),
                _ => format!(
                    "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, annotations: {{{merge}}}}}, spec: {{clusterIP: \
                     {vip}, selector: {{app: {name}}}, ports: [{port}]}}}}\n---\n"
                ),
            }
        }
        1 => {
            let state =
                one_of(&["", "conditions: {ready: false}, ", "conditions: {serving: true, terminating: true}, "]);
            let target = one_of(&["", "targetRef: {kind: Pod, name: p0}, ", "nodeName: n, "]);
            match one_of(&["", "slice", "slice"]) {
                "" => String::new(),
                _ => format!(
                    "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: s{index}, labels: \
                     {{kubernetes.io/service-name: {}}}}}, addressType: IPv4, ports: [{{name: http, port: 8080}}], endpoints: \
                     [{{{state}{target}addresses: [10.{cluster}.0.{index}]}}, {{addresses: [10.9.0.9]}}]}}\n---\n",
                    one_of(&NAMES)
                ),
            }
        }
        2 => {
            let labels = one_of(&[
                "",
                "culvert.dev/offloaded: 'true', culvert.dev/revision: r",
                "culvert.dev/offloaded: 'true'",
            ]);
            let leaving = one_of(&["", ", deletionTimestamp: '2024-01-01T00:00:00Z'"]);
            match one_of(&["", "pod"]) {
                "" => String::new(),
                _ => format!(
                    "{{apiVersion: v1, kind: Pod, metadata: {{name: p{index}{leaving}, labels: {{app: {}, {labels}}}}}, status: \
                     {{podIP: 10.{cluster}.0.{index}}}}}\n---\n",
                    one_of(&NAMES)
                ),
            }
        }
        3 => match one_of(&["", "", "manifest"]) {
            "" => String::new(),
            _ => format!(
                "{{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {{name: {name}}}, spec: {{{}}}}}\n---\n",
                one_of(&[
                    "egress: [orders]",
                    "protocol: grpc, edge: {domains: [a.example]}",
                    "timeouts: {connect: 1s}, egress: []"
                ])
            ),
        },
        _ => match one_of(&["", "a", "b"]) {
            "" => String::new(),
            region => format!(
                "{{apiVersion: v1, kind: Node, metadata: {{name: n, labels: {{topology.kubernetes.io/region: {region}}}}}}}\n---\n"
            ),
        },
    }
}

#[test]
fn a_mesh_that_is_kept_up_to_date_is_the_one_made_from_nothing() {
    let mut random = fastrand::Rng::with_seed(42);
    let mut documents: Vec<Vec<String>> = vec![vec![String::new(); 17]; 2];
    let clusters = ["east", "west"].map(|name| Cluster {
        info: ClusterInfo { name: name.into(), apart: name == "west", ..Default::default() },
        objects: None,
        health: SourceHealth::default(),
        drained: false,
    });
    let mut registry = Registry { clusters: clusters.into(), ..Default::default() };
    let mut joiner = Joiner::default();
    let mut snapshot = Snapshot::default();
    let mut views = Vec::new();
    let viewers = [
        (Role::Node, &["users"][..]),
        (Role::Node, &["users", "db"]),
        (Role::Node, &[]),
        (Role::Sidecar, &["users"]),
        (Role::Sidecar, &["orders", "db"]),
        (Role::Edge, &[]),
        (Role::Edge, &["users"]),
    ];
    for (role, services) in viewers {
        let services = services.iter().map(|name| ObjectKey::new("default", *name)).collect();
        views.push((Viewer { kind: ProxyKind::Culvert, role, services, ..Viewer::default() }, None));
    }
    let mut seen = [0; 3];
    for step in 0..250 {
        for _ in 0..=random.usize(..3) {
            let cluster = random.usize(..2);
            match random.usize(..20) {
                17 => registry.clusters[cluster].drained ^= true,
                i => {
                    let i = i.min(16);
                    documents[cluster][i] = document(&mut random, cluster, i % 4, i / 4);
                    let objects = parse(&documents[cluster].concat()).unwrap();
                    registry.clusters[cluster].objects = Some(Arc::new(objects));
                }
            }
        }
        let (mesh, changed) = joiner.update(&registry);
        let fresh = join(&registry);
        assert_eq!(*mesh, fresh, "step {step}, {documents:#?}");
        let differ = |key: &&ObjectKey| snapshot.mesh.services.get(*key) != mesh.services.get(*key);
        let keys: BTreeSet<_> =
            snapshot.mesh.services.keys().chain(mesh.services.keys()).filter(differ).cloned().collect();
        assert_eq!(changed, keys, "step {step}");
        snapshot = snapshot.next(mesh, &changed);
        let scratch = Snapshot::build(Arc::new(fresh), &Options::default());
        for kind in ProxyKind::ALL {
            for type_url in PUSH_ORDER {
                let [kept, made] = [&snapshot, &scratch].map(|s| s.resources(kind).of_type(type_url).unwrap());
                assert_eq!(
                    (&kept.version, &kept.resources),
                    (&made.version, &made.resources),
                    "step {step} {type_url}"
                );
            }
        }
        for (viewer, before) in &mut views {
            // Some clients are behind.
            if random.bool() {
                continue;
            }
            let view = snapshot.view(viewer, before.as_ref());
            let made = scratch.view(viewer, None);
            for type_url in PUSH_ORDER {
                let [kept, made] = [&view, &made].map(|view| view.set.of_type(type_url).unwrap());
                assert_eq!(
                    (&kept.version, &kept.resources),
                    (&made.version, &made.resources),
                    "step {step} {type_url}"
                );
            }
            *before = Some(view);
        }
        seen[0] += usize::from(!changed.is_empty());
        seen[1] += usize::from(!snapshot.mesh.warnings.is_empty());
        seen[2] += usize::from(
            views[0].1.as_ref().is_some_and(|view| !Arc::ptr_eq(&view.set, snapshot.resources(ProxyKind::Culvert))),
        );
    }
    assert!(seen.iter().all(|count| *count > 50), "nothing much happened: {seen:?}");
}

#[test]
fn registered_hosts_and_pods_weigh_on_one_scale() {
    let endpoint = |cluster: &str, weight: Option<u32>| crate::mesh::Endpoint {
        address: ([10, 0, 0, 1], 80).into(),
        other_family: None,
        locality: crate::mesh::Locality::default(),
        health: crate::mesh::Health::Healthy,
        cluster: cluster.to_owned(),
        weight: weight.and_then(std::num::NonZeroU32::new),
        canary: false,
    };
    let weights = |endpoints: Vec<crate::mesh::Endpoint>| {
        let port = MeshPort {
            protocol: Protocol::Http1,
            vips: vec![],
            external: None,
            endpoints,
            offloaded: vec![],
            targets: [80].into(),
        };
        let mut service = MeshService { ports: [(80, port)].into(), ..Default::default() };
        weigh(&mut service);
        let endpoints = &service.ports[&80].endpoints;
        endpoints.iter().map(|endpoint| endpoint.weight.map(u32::from)).collect::<Vec<_>>()
    };
    let half = || endpoint(REGISTERED, Some(50));
    assert_eq!(weights(vec![endpoint("east", None), half()]), [Some(100), Some(50)]);
    assert_eq!(weights(vec![endpoint(REGISTERED, None), half()]), [None, Some(50)], "as in their own API");
    assert_eq!(weights(vec![endpoint("east", None), endpoint(REGISTERED, None)]), [None, None]);
}
