use super::asked::find;
use super::*;
use crate::kubernetes::manifest::parse;
use crate::registry::{Cluster, ClusterInfo, Registry, SourceHealth};

const MANIFESTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.1, selector: {app: users}, ports: [{name: http, port: 80}, {name: tcp-x, port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}, {name: grpc, port: 90}]}
---
apiVersion: v1
kind: Pod
metadata: {name: users-x, labels: {app: users, culvert.dev/offloaded: 'true', culvert.dev/revision: taken}}
status: {podIP: 10.1.0.9}
";

fn mesh() -> Mesh {
    let info = ClusterInfo { name: "east".into(), ..ClusterInfo::default() };
    let objects = Some(parse(MANIFESTS).unwrap().into());
    let cluster = Cluster { info, objects, health: SourceHealth::default(), drained: false };
    crate::mesh::join(&Registry { version: 1, clusters: vec![cluster], waited: false })
}

fn settings() -> Settings {
    // Any ports that are free, as far as that can be: a test that shares the host.
    "127.0.0.1:20000-32000".parse().unwrap()
}

#[test]
fn services_are_found_by_their_names_and_ports() {
    let mesh = mesh();
    for (wanted, port) in [("users", 80), ("users.default", 80), ("users:80", 80), ("orders.shop:90", 90)] {
        assert_eq!(find(&mesh, wanted, "me").unwrap().port, port, "{wanted}");
    }
    for (wanted, revision, status, expected) in [
        ("user", "me", 404, "no service user.default; `culvert services`"),
        ("orders", "me", 404, "there is orders.shop"),
        ("orders.shop", "me", 400, "say orders.shop:80 or orders.shop:90"),
        ("users:81", "me", 400, "no port 81 that speaks HTTP"),
        ("users:x", "me", 400, "`x` of `users:x` is not a port"),
        ("users", "m e", 400, "revision `m e`"),
        ("../x", "me", 400, "service `../x`"),
    ] {
        let (found, reason) = find(&mesh, wanted, revision).unwrap_err();
        assert!(found == status && reason.contains(expected), "{wanted}: {found} {reason}");
    }
}

#[test]
fn settings_say_where() {
    let settings: Settings = "[fd00::1]:19000-19001".parse().unwrap();
    assert_eq!((settings.address, settings.ports), ("fd00::1".parse().unwrap(), 19000..=19001));
    assert_eq!("10.0.0.1:7".parse::<Settings>().unwrap().ports, 7..=7);
    assert_eq!("10.0.0.1:7,quarantine=0".parse::<Settings>().unwrap().quarantine, Duration::ZERO);
    for text in ["10.0.0.1:7,quarantine=", "10.0.0.1:7,quarantine=3601", "10.0.0.1:7,other=1"] {
        assert!(text.parse::<Settings>().is_err(), "{text}");
    }
    for text in ["", "10.0.0.1", "10.0.0.1:x", "10.0.0.1:9-8", "0.0.0.0:1-2", "host:1-2", "10.0.0.1:0-2"] {
        assert!(text.parse::<Settings>().is_err(), "{text}");
    }
}

#[tokio::test]
async fn a_revision_has_one_tunnel_and_the_same_client_may_come_again() {
    let (mesh, settings) = (mesh(), settings());
    let (_shutdown, asked) = watch::channel(false);
    let tunnels = Tunnels::new(Some(settings.clone()), watch::channel(0).0, asked);
    let peer = SocketAddr::from(([10, 0, 0, 1], 1));
    let reserve = |revision: &str, session: &str| {
        let key = find(&mesh, "users", revision).unwrap();
        tunnels.reserve(&settings, key, (session, None), peer, &mesh)
    };
    let refused = |result: Result<Place, Denied>| result.err().unwrap();
    let (status, reason) = refused(reserve("taken", "a"));
    assert!(status == 409 && reason.contains("is pod default/users-x; choose another with --revision"), "{reason}");
    let first = reserve("me", "a").unwrap();
    let (status, reason) = refused(reserve("me", "b"));
    assert!(status == 409 && reason.contains("is a tunnel from 10.0.0.1:1 already"), "{reason}");
    let second = reserve("me", "a").unwrap();
    assert!(*first.replaced.borrow() && !*second.replaced.borrow());
    // Proxies know the port: it is the second one's now, and somebody listens there when the first one did.
    assert_eq!(first.port.number, second.port.number);
    let from = second.port.from;
    assert!(std::ptr::eq(first.port.listen().unwrap(), second.port.listen().unwrap()));
    // The first one's end is not the second one's.
    drop(first);
    assert!(
        tunnels
            .ports()
            .take(&settings, &find(&mesh, "users", "me").unwrap(), Some(second.port.number))
            .is_ok_and(|other| other.address.port() != second.port.number)
    );
    assert!(refused(reserve("me", "b")).0 == 409);
    // Nobody is told of it before the other side is there.
    assert_eq!(tunnels.status(), []);
    tunnels.open().values_mut().for_each(|tunnel| tunnel.listed = true);
    let key = ObjectKey::new("default", "users");
    let offered = tunnels.offered();
    let (mut service, mut warnings) = (MeshService::clone(&mesh.services[&key]), Vec::new());
    offered.join(&key, &mut service, &mut warnings);
    let offloaded = &service.ports[&80].offloaded;
    assert_eq!((offloaded.len(), &*offloaded[1].revision, &*offloaded[1].cluster), (2, "me", "tunnel"));
    offered.join(&key, &mut MeshService::default(), &mut warnings);
    assert!(warnings.len() == 1 && warnings[0].contains("users.default:80, which is gone"), "{warnings:?}");
    assert_eq!(offered.differing(&Offered::default()).collect::<Vec<_>>(), [key]);
    assert_eq!(offered.differing(&tunnels.offered()).next(), None);
    // A third one is known to proxies at once, if the second one was.
    let third = reserve("me", "a").unwrap();
    assert_eq!((tunnels.status().len(), third.port.from), (1, from));
    drop((second, third));
    assert_eq!(tunnels.status(), []);
    reserve("me", "b").unwrap();
}
