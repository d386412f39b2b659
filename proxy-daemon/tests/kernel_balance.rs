//! Services that the kernel balances at connect() and sendto(), on the running kernel.

mod kernel_lab;

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::programs::links::{FdLink, PinnedLink};
use culvert_proxy_daemon::intercept::{BalancedService, ConnectBalancing, Interception, InterceptionConfig};
use kernel_lab::process::role;
use kernel_lab::puppet::{self, Group, Puppet};
use kernel_lab::*;

/// Not a test of its own: what the process does whose connections are balanced.
#[test]
fn play_the_puppet() {
    puppet::play();
}

fn service(address: &str, udp: bool) -> BalancedService {
    BalancedService { address: address.parse().expect("an address"), udp, cluster: "any".into() }
}

fn shares(shares: &[(&str, f64)]) -> Vec<(SocketAddr, f64)> {
    shares.iter().map(|(address, share)| (address.parse().expect("an address"), *share)).collect()
}

/// Balancing alone, without any pod.
fn config(pin_path: &Path, cgroup: &Path) -> InterceptionConfig {
    let balancing = ConnectBalancing { cgroups: vec![cgroup.to_owned()], ..ConnectBalancing::default() };
    InterceptionConfig { balancing: Some(balancing), pin_path: pin_path.to_owned(), ..InterceptionConfig::default() }
}

fn start(lab: &Lab, cgroup: &Group) -> Interception {
    attached(lab.start(config(&lab.pin_path, cgroup.path()), 1))
}

fn attached(interception: Interception) -> Interception {
    interception.balance();
    eventually("attached", || interception.hooked_cgroups().1 == 1);
    interception
}

/// A service by UDP, with two backends.
struct NameService {
    vip: &'static str,
    /// What a client of this family binds to.
    any: &'static str,
    backends: [&'static str; 2],
}

/// One of each family.
const NAME_SERVICES: [NameService; 2] = [
    NameService { vip: "10.96.0.10:53", any: "0.0.0.0:0", backends: ["10.201.2.2:5301", "10.201.2.2:5302"] },
    NameService { vip: "[fd00:96::10]:53", any: "[::]:0", backends: ["[fd00:201:2::2]:5301", "[fd00:201:2::2]:5302"] },
];

/// A backend that answers each datagram with its own name.
fn name_server(namespace: &Namespace, address: &str, name: &'static str) -> UdpSocket {
    let socket = namespace.run(|| UdpSocket::bind(address)).expect("binds");
    let serving = socket.try_clone().expect("a clone");
    // It ends with the process.
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = serving.recv_from(&mut buffer) {
            let _ = serving.send_to(name.as_bytes(), from);
        }
    });
    socket
}

#[test]
fn connections_go_to_backends_by_their_shares() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let interception = start(&lab, &group);
    for (vip, backends) in [
        ("10.96.0.10:80", ["10.201.2.2:8001", "10.201.2.2:8002", "10.201.9.2:8003"]),
        ("[fd00:96::10]:80", ["[fd00:201:2::2]:8001", "[fd00:201:2::2]:8002", "[fd00:201:9::2]:8003"]),
    ] {
        let listeners: Vec<TcpListener> = [&lab.server, &lab.server, &lab.neighbour]
            .into_iter()
            .zip(backends)
            .map(|(at, it)| at.listen(it))
            .collect();
        let weights: Vec<_> = backends.into_iter().zip([1.0, 3.0, 4.0]).collect();
        interception.set_service(&service(vip, false), &shares(&weights)).expect("taken");
        const ROUNDS: usize = 400;
        // From a pod, and from the node.
        let mut app = Puppet::new(if vip.starts_with('[') { &lab.node } else { &lab.client }, &group);
        let mut taken = [0_usize; 3];
        for round in 0..ROUNDS {
            let (number, peer) = app.connect(vip).expect("connects");
            assert_eq!(peer, vip, "getpeername tells whom it named");
            app.order(&format!("close {number}")).unwrap();
            eventually("one has it", || {
                for (taken, listener) in taken.iter_mut().zip(&listeners) {
                    *taken += usize::from(accept_within(listener, Duration::ZERO).is_some());
                }
                taken.iter().sum::<usize>() == round + 1
            });
        }
        for (taken, expected) in taken.iter().zip([50.0, 150.0, 200.0]) {
            // Five standard deviations and more.
            assert!((*taken as f64 - expected).abs() < 50.0, "{taken} instead of {expected} of {ROUNDS}");
        }
    }
    assert_eq!(counter(&interception, "balanced.connections"), 800);
}

#[test]
fn a_mapped_address_is_the_ipv4_one() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let interception = start(&lab, &group);
    let backend = lab.server.listen("10.201.2.2:8001");
    interception.set_service(&service("10.96.0.10:80", false), &shares(&[("10.201.2.2:8001", 1.0)])).unwrap();
    let _names = name_server(&lab.server, "10.201.2.2:5300", "one");
    interception.set_service(&service("10.96.0.10:53", true), &shares(&[("10.201.2.2:5300", 1.0)])).unwrap();
    let mut app = Puppet::new(&lab.client, &group);
    assert_eq!(app.connect("[::ffff:10.96.0.10]:80").expect("connects").1, "[::ffff:10.96.0.10]:80");
    accept(&backend);
    let socket = app.order("udp [::]:0").unwrap();
    for _ in 0..2 {
        app.order(&format!("sendto {socket} [::ffff:10.96.0.10]:53 who")).expect("sends");
        assert_eq!(app.order(&format!("receive {socket}")).as_deref(), Ok("[::ffff:10.96.0.10]:53 one"));
    }
    assert_eq!(
        app.order(&format!("associate {socket} [::ffff:10.96.0.10]:53")).as_deref(),
        Ok("[::ffff:10.96.0.10]:53")
    );
    app.order(&format!("send {socket} who")).expect("sends");
    assert_eq!(app.order(&format!("receive {socket}")).as_deref(), Ok("[::ffff:10.96.0.10]:53 one"));
}

#[test]
fn backends_that_are_gone_get_nothing_new() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let interception = start(&lab, &group);
    let (vip, [one, two]) = (service("10.96.0.10:80", false), ["10.201.2.2:8001", "10.201.2.2:8002"]);
    let listeners = [one, two].map(|address| lab.server.listen(address));
    let mut app = Puppet::new(&lab.client, &group);
    interception.set_service(&vip, &shares(&[(one, 1.0), (two, 1.0)])).unwrap();
    app.connect("10.96.0.10:80").expect("connects");
    interception.set_service(&vip, &shares(&[(two, 1.0)])).unwrap();
    let before = std::iter::from_fn(|| accept_within(&listeners[0], Duration::from_millis(50))).count();
    assert!(before <= 1);
    for _ in 0..20 {
        app.connect("10.96.0.10:80").expect("connects");
    }
    assert!(accept_within(&listeners[0], Duration::from_millis(50)).is_none());
    // None is left: refused, and not sent anywhere.
    interception.set_service(&vip, &[]).unwrap();
    app.connect("10.96.0.10:80").expect_err("refused");
    assert_eq!(counter(&interception, "balanced.no_backend"), 1);
    // One of the other family is none.
    interception.set_service(&vip, &shares(&[("[fd00:201:2::2]:8001", 1.0)])).unwrap();
    app.connect("10.96.0.10:80").expect_err("refused");
    interception.remove_service(&vip).unwrap();
    let own = lab.neighbour.listen("10.201.9.2:80");
    assert_eq!(app.connect("10.201.9.2:80").expect("what is no service passes").1, "10.201.9.2:80");
    accept(&own);
}

#[test]
fn datagrams_and_their_answers_bear_the_services_address() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let interception = start(&lab, &group);
    for NameService { vip, any, backends: [one, two] } in NAME_SERVICES {
        let _servers = [(one, "one"), (two, "two")].map(|(address, name)| name_server(&lab.server, address, name));
        let vip_service = service(vip, true);
        interception.set_service(&vip_service, &shares(&[(one, 1.0), (two, 1.0)])).unwrap();
        let mut app = Puppet::new(&lab.client, &group);
        let mut heard: HashMap<String, usize> = HashMap::new();
        for _ in 0..40 {
            let socket = app.order(&format!("udp {any}")).unwrap();
            let mut ask = || {
                app.order(&format!("sendto {socket} {vip} who")).expect("sends");
                let answer = app.order(&format!("receive {socket}")).expect("answered");
                let (from, name) = answer.split_once(' ').expect("two words");
                assert_eq!(from, vip);
                name.to_owned()
            };
            let (first, second) = (ask(), ask());
            assert_eq!(first, second, "a socket stays with its backend");
            *heard.entry(first).or_default() += 1;
        }
        assert!(heard.values().all(|times| *times > 5) && heard.len() == 2, "{heard:?}");

        // A socket whose backend goes gets another one with its next datagram.
        let socket = app.order(&format!("udp {any}")).unwrap();
        app.order(&format!("sendto {socket} {vip} who")).expect("sends");
        let answer = app.order(&format!("receive {socket}")).expect("answered");
        let (left, name) = if answer.ends_with("one") { (two, "two") } else { (one, "one") };
        let moved = counter(&interception, "balanced.moved");
        interception.set_service(&vip_service, &shares(&[(left, 1.0)])).unwrap();
        app.order(&format!("sendto {socket} {vip} who")).expect("sends");
        assert_eq!(app.order(&format!("receive {socket}")), Ok(format!("{vip} {name}")));
        assert_eq!(counter(&interception, "balanced.moved"), moved + 1);
        // What comes from elsewhere bears its own address.
        let elsewhere = lab.neighbour.run(|| UdpSocket::bind(any)).unwrap();
        let to = if any.starts_with('[') { "fd00:201:1::2" } else { "10.201.1.2" };
        let stranger = app.order(&format!("udp {}", SocketAddr::new(to.parse().unwrap(), 5999))).unwrap();
        elsewhere.send_to(b"hi", (to, 5999)).expect("sends");
        let answer = app.order(&format!("receive {stranger}")).expect("received");
        assert!(answer.contains("201:9::2]") || answer.contains("10.201.9.2:"), "{answer}");
    }
}

/// DNS clients connect their sockets: a backend that goes must not keep them (cilium#48096).
#[test]
fn connected_udp_is_not_pinned_to_a_dead_backend() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let interception = start(&lab, &group);
    for NameService { vip, any, backends: [one, two] } in NAME_SERVICES {
        let _servers = [(one, "one"), (two, "two")].map(|(address, name)| name_server(&lab.server, address, name));
        let vip_service = service(vip, true);
        interception.set_service(&vip_service, &shares(&[(one, 1.0)])).unwrap();
        let mut app = Puppet::new(&lab.client, &group);
        let socket = app.order(&format!("udp {any}")).unwrap();
        assert_eq!(app.order(&format!("associate {socket} {vip}")).as_deref(), Ok(vip));
        app.order(&format!("send {socket} who")).expect("sends");
        assert_eq!(app.order(&format!("receive {socket}")), Ok(format!("{vip} one")));
        // Changes that leave it its backend do not touch it.
        interception.set_service(&vip_service, &shares(&[(one, 1.0), (two, 1.0)])).unwrap();
        app.order(&format!("send {socket} who")).expect("sends");
        assert_eq!(app.order(&format!("receive {socket}")), Ok(format!("{vip} one")));

        interception.set_service(&vip_service, &shares(&[(two, 1.0)])).unwrap();
        eventually("the socket is told", || {
            matches!(
                app.order(&format!("send {socket} who")),
                Err(nix::libc::ECONNABORTED | nix::libc::EDESTADDRREQ | nix::libc::ENOTCONN)
            )
        });
        assert_eq!(app.order(&format!("associate {socket} {vip}")).as_deref(), Ok(vip));
        // The kernel tells the error with the next call that looks for one.
        eventually("it sends again", || app.order(&format!("send {socket} who")).is_ok());
        // After what the first backend still had answered.
        eventually("the second answers", || {
            app.order(&format!("receive {socket}")).expect("answered") == format!("{vip} two")
        });
    }
}

#[test]
fn a_pod_that_is_redirected_reaches_balanced_services_directly() {
    let mut lab = Lab::new();
    let group = Group::new(None, "pods");
    let base = config(&lab.pin_path, group.path());
    let interception = attached(lab.start(InterceptionConfig { balancing: base.balancing, ..lab.config() }, 1));
    let worker = lab.node.listen_transparent("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    let backend = lab.neighbour.listen("[::]:8001");
    for (vip, to, other) in [
        ("10.96.0.10:80", "10.201.9.2:8001", "10.96.0.11:80"),
        ("[fd00:96::10]:80", "[fd00:201:9::2]:8001", "[fd00:96::11]:80"),
    ] {
        interception.set_service(&service(vip, false), &shares(&[(to, 1.0)])).unwrap();
        let mut app = Puppet::new(&lab.client, &group);
        app.connect(vip).expect("connects");
        accept(&backend);
        app.connect(other).expect("others are redirected");
        accept(&worker);
        // Whoever names the backend itself, in the cgroup or not.
        app.connect(to).expect("redirected");
        accept(&worker);
        let _client = lab.client.connect(to).expect("redirected");
        accept(&worker);
    }
    assert_eq!(counter(&interception, "passed_balanced"), 2);
    let _ = lab.cgroup();
}

#[test]
fn a_full_map_is_an_error_and_the_service_keeps_its_backends() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let interception = start(&lab, &group);
    let backend = lab.server.listen("10.201.2.2:8001");
    let vip = service("10.96.0.10:80", false);
    interception.set_service(&vip, &shares(&[("10.201.2.2:8001", 1.0)])).unwrap();
    let many: Vec<_> = (0..culvert_proxy_ebpf::MAX_BACKENDS as u32 + 1)
        .map(|number| (SocketAddr::from((std::net::Ipv4Addr::from(0x0b00_0000 + number), 80)), 1.0))
        .collect();
    let error = interception.set_service(&vip, &many).expect_err("too many").to_string();
    assert!(error.contains("is full"), "{error}");
    assert_eq!(counter(&interception, "balanced.tables_refused"), 1);
    Puppet::new(&lab.client, &group).connect("10.96.0.10:80").expect("connects");
    accept(&backend);
    // What was begun is undone: there is room for others.
    interception.set_service(&service("10.96.0.11:80", false), &many[..200_000]).expect("taken");
}

/// Not a test of its own: what the process does that plays a daemon that is killed.
#[test]
fn play_the_daemon() {
    let Some([namespace, pin_path, cgroup]) = role() else { return };
    enter(&namespace);
    let interception = Interception::start(config(Path::new(&pin_path), Path::new(&cgroup)), 1).expect("starts");
    interception.set_service(&service("10.96.0.10:80", false), &shares(&[("10.201.2.2:8001", 1.0)])).unwrap();
    let _interception = attached(interception);
    process::serve(std::thread::park);
}

#[test]
fn services_stay_balanced_while_the_daemon_is_replaced() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let backend = lab.server.listen("10.201.2.2:8001");
    let mut dying =
        process::daemon(&[&lab.node.name, &lab.pin_path.display().to_string(), &group.path().display().to_string()]);
    let mut app = Puppet::new(&lab.client, &group);
    let mut works = |when: &str| {
        app.connect("10.96.0.10:80").unwrap_or_else(|errno| panic!("{when}: {errno}"));
        accept(&backend);
    };
    works("with the daemon");
    dying.kill().unwrap();
    dying.wait().unwrap();
    works("after its death");
    let interception = lab.start(config(&lab.pin_path, group.path()), 1);
    works("while its successor knows no hosts");
    interception.set_service(&service("10.96.0.10:80", false), &shares(&[("10.201.2.2:8001", 1.0)])).unwrap();
    let interception = attached(interception);
    works("with its successor");
    let pins = std::fs::read_dir(lab.pin_path.join("cgroups")).unwrap().count();
    assert_eq!(pins, 9, "the links of the first are gone");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
    assert!(!lab.pin_path.exists());
    eventually("nothing is balanced any more", || app.order("tcp-briefly 10.96.0.10:80").is_err());
}

/// What is known of sockets that an earlier daemon's programs led to backends is not lost with it.
#[test]
fn sockets_of_an_earlier_daemon_keep_their_services() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let first = start(&lab, &group);
    let web = service("10.96.0.10:80", false);
    let _listener = lab.server.listen("10.201.2.2:8001");
    first.set_service(&web, &shares(&[("10.201.2.2:8001", 1.0)])).unwrap();
    let mut app = Puppet::new(&lab.client, &group);
    let (stream, _) = app.connect("10.96.0.10:80").expect("connects");
    let mut sockets = Vec::new();
    let _servers: Vec<UdpSocket> = NAME_SERVICES
        .iter()
        .flat_map(|NameService { backends: [one, two], .. }| [(*one, "one"), (*two, "two")])
        .map(|(address, name)| name_server(&lab.server, address, name))
        .collect();
    for NameService { vip, any, backends: [one, two] } in &NAME_SERVICES {
        first.set_service(&service(vip, true), &shares(&[(one, 1.0), (two, 1.0)])).unwrap();
        let free = app.order(&format!("udp {any}")).unwrap();
        app.order(&format!("sendto {free} {vip} who")).expect("sends");
        let name = app.order(&format!("receive {free}")).expect("answered");
        let connected = app.order(&format!("udp {any}")).unwrap();
        app.order(&format!("associate {connected} {vip}")).expect("connects");
        app.order(&format!("send {connected} who")).expect("sends");
        let backend = app.order(&format!("receive {connected}")).expect("answered");
        sockets.push((free, name, connected, backend));
    }
    // As in a crash.
    drop(first);

    let second = lab.start(config(&lab.pin_path, group.path()), 1);
    second.set_service(&web, &shares(&[("10.201.2.2:8001", 1.0)])).unwrap();
    for ((_, _, _, backend), NameService { vip, backends: [one, two], .. }) in sockets.iter().zip(&NAME_SERVICES) {
        // Those who are connected to the one that is gone have to hear of it.
        let left = if backend.ends_with("one") { two } else { one };
        second.set_service(&service(vip, true), &shares(&[(left, 1.0)])).unwrap();
    }
    let second = attached(second);
    assert_eq!(app.order(&format!("peer {stream}")).as_deref(), Ok("10.96.0.10:80"));
    for ((free, name, connected, backend), NameService { vip, .. }) in sockets.iter().zip(&NAME_SERVICES) {
        eventually("the connected socket is told", || {
            matches!(
                app.order(&format!("send {connected} who")),
                Err(nix::libc::ECONNABORTED | nix::libc::EDESTADDRREQ | nix::libc::ENOTCONN)
            )
        });
        // The other one stays with its backend, if that is there, and moves if not: both are counted.
        let moved = counter(&second, "balanced.moved");
        app.order(&format!("sendto {free} {vip} who")).expect("sends");
        let answer = app.order(&format!("receive {free}")).expect("answered");
        assert!(answer.starts_with(vip), "{answer}");
        let stays = name != backend;
        assert_eq!((answer == *name, counter(&second, "balanced.moved") == moved), (stays, stays), "{answer}, {name}");
    }
    lab.node.run(|| second.shutdown()).expect("shuts down");
}

/// What is pinned, and the numbers of the link and of its program.
fn links(lab: &Lab) -> Vec<(PathBuf, u32, u32)> {
    let entries =
        std::fs::read_dir(lab.pin_path.join("cgroups")).expect("pins").map(|entry| entry.expect("one").path());
    let link = |path: PathBuf| {
        let info = FdLink::from(PinnedLink::from_pin(&path).expect("a link")).info().expect("is known");
        (path, info.id(), info.program_id())
    };
    let mut links: Vec<_> = entries.map(link).collect();
    links.sort();
    links
}

/// With both on a cgroup, the earlier daemon's would choose first, among the hosts that it knew.
#[test]
fn a_successors_programs_take_the_places_of_the_earlier_ones() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let (vip, [one, two]) = (service("10.96.0.10:80", false), ["10.201.2.2:8001", "10.201.2.2:8002"]);
    let listeners = [one, two].map(|address| lab.server.listen(address));
    let mut app = Puppet::new(&lab.client, &group);
    let first = start(&lab, &group);
    first.set_service(&vip, &shares(&[(one, 1.0)])).unwrap();
    app.connect("10.96.0.10:80").expect("connects");
    accept(&listeners[0]);
    let before = links(&lab);
    assert_eq!(before.len(), 9);
    // As in a crash.
    drop(first);

    let second = lab.start(config(&lab.pin_path, group.path()), 1);
    second.set_service(&vip, &shares(&[(two, 1.0)])).unwrap();
    let second = attached(second);
    for _ in 0..10 {
        app.connect("10.96.0.10:80").expect("connects");
        accept(&listeners[1]);
    }
    let after = links(&lab);
    let places =
        |links: &[(PathBuf, u32, u32)]| links.iter().map(|(path, id, _)| (path.clone(), *id)).collect::<Vec<_>>();
    assert_eq!(places(&before), places(&after), "the links are the same");
    assert!(before.iter().zip(&after).all(|(before, after)| before.2 != after.2), "{before:?}, {after:?}");
    lab.node.run(|| second.shutdown()).expect("shuts down");
    // Not some time later.
    assert!(app.order("tcp-briefly 10.96.0.10:80").is_err(), "nothing is balanced any more");
}

/// A connected UDP socket that has heard of a service's backend.
fn associated(app: &mut Puppet, NameService { vip, any, .. }: &NameService) -> (String, String) {
    let socket = app.order(&format!("udp {any}")).unwrap();
    app.order(&format!("associate {socket} {vip}")).expect("connects");
    let backend = ask(app, &socket);
    (socket, backend)
}

/// Asks by a connected socket who answers.
fn ask(app: &mut Puppet, socket: &str) -> String {
    app.order(&format!("send {socket} who")).expect("sends");
    app.order(&format!("receive {socket}")).expect("answered")
}

/// The hosts of services come when discovery tells them, which may be long after the programs were replaced.
#[test]
fn sockets_of_a_service_that_is_known_late_hear_of_a_backend_that_is_gone() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let first = start(&lab, &group);
    let mut app = Puppet::new(&lab.client, &group);
    let [stays, goes] = &NAME_SERVICES;
    let mut servers = Vec::new();
    for NameService { vip, backends: [one, two], .. } in &NAME_SERVICES {
        servers.extend([(one, "one"), (two, "two")].map(|(address, name)| name_server(&lab.server, address, name)));
        first.set_service(&service(vip, true), &shares(&[(one, 1.0)])).unwrap();
    }
    let (stayed, _) = associated(&mut app, stays);
    let (gone, _) = associated(&mut app, goes);
    drop(first);

    let second = attached(lab.start(config(&lab.pin_path, group.path()), 1));
    for (socket, vip) in [(&stayed, stays.vip), (&gone, goes.vip)] {
        assert_eq!(ask(&mut app, socket), format!("{vip} one"), "nobody knows better");
    }
    second.set_service(&service(goes.vip, true), &shares(&[(goes.backends[1], 1.0)])).unwrap();
    eventually("the socket is told", || {
        matches!(
            app.order(&format!("send {gone} who")),
            Err(nix::libc::ECONNABORTED | nix::libc::EDESTADDRREQ | nix::libc::ENOTCONN)
        )
    });
    second.set_service(&service(stays.vip, true), &shares(&[(stays.backends[0], 1.0)])).unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&mut app, &stayed), format!("{} one", stays.vip));
    }
    lab.node.run(|| second.shutdown()).expect("shuts down");
}

/// What it hears of services while it drains says nothing of its successor's sockets.
#[test]
fn a_daemon_that_was_replaced_ends_no_sockets() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let mut app = Puppet::new(&lab.client, &group);
    let [known, unknown] = &NAME_SERVICES;
    let mut servers = Vec::new();
    let set = |daemon: &Interception, of: &NameService, backend: usize| {
        daemon.set_service(&service(of.vip, true), &shares(&[(of.backends[backend], 1.0)])).expect("taken");
    };
    let zeroth = start(&lab, &group);
    for of in &NAME_SERVICES {
        servers.extend([(0, "one"), (1, "two")].map(|(at, name)| name_server(&lab.server, of.backends[at], name)));
        set(&zeroth, of, 0);
    }
    let sockets = [associated(&mut app, known).0, associated(&mut app, unknown).0];
    drop(zeroth);
    // This one inherits the sockets, and knows one of the services.
    let first = lab.start(config(&lab.pin_path, group.path()), 1);
    set(&first, known, 0);
    let first = attached(first);
    let second = lab.start(config(&lab.pin_path, group.path()), 1);
    NAME_SERVICES.iter().for_each(|of| set(&second, of, 0));
    let second = attached(second);
    for of in &NAME_SERVICES {
        set(&first, of, 1);
    }
    for _ in 0..100 {
        for (socket, of) in sockets.iter().zip(&NAME_SERVICES) {
            assert_eq!(ask(&mut app, socket), format!("{} one", of.vip));
        }
    }
    // Who has replaced it does end them.
    set(&second, known, 1);
    eventually("the socket is told", || app.order(&format!("send {} who", sockets[0])).is_err());
    lab.node.run(|| first.shutdown()).expect("shuts down");
    lab.node.run(|| second.shutdown()).expect("shuts down");
}
