//! What users of node proxies suffered from, where no other test has it; docs/complaints.md has the list.

mod kernel_lab;

use std::collections::HashSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use culvert_proxy_daemon::intercept::{Acceleration, Interception, InterceptionConfig};
use kernel_lab::process::role;
use kernel_lab::*;

/// Not a test of its own: what the process does that plays the daemon. It echoes.
#[test]
fn play_the_daemon() {
    let Some([namespace, pin_path]) = role() else { return };
    enter(&namespace);
    let config = InterceptionConfig { pin_path: pin_path.into(), ..open_config() };
    let interception = Interception::start(config, 1).expect("interception starts");
    let worker = transparent_listener("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    process::serve(|| {
        let (mut stream, _) = worker.accept().expect("accepts");
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok(got @ 1..) = stream.read(&mut buffer) {
                let _ = stream.write_all(&buffer[..got]);
            }
        });
    });
}

fn daemon(lab: &Lab) -> std::process::Child {
    process::daemon(&[&lab.node.name, &lab.pin_path.display().to_string()])
}

fn say(from: &mut Stream, to: &mut Stream) {
    from.write_all(b"hello").expect("writes");
    let mut word = [0; 5];
    to.read_exact(&mut word).expect("reads");
    assert_eq!(&word, b"hello");
}

/// cilium#24191.
#[test]
fn an_open_connection_outlives_an_upgrade() {
    let lab = Lab::new();
    let mut old = daemon(&lab);
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let mut echo = client.try_clone().expect("a clone");
    say(&mut client, &mut echo);
    let (interception, worker) = start(&lab, lab.config());
    say(&mut client, &mut echo);
    let mut newer = lab.client.connect("10.96.0.10:80").expect("connects");
    say(&mut newer, &mut accept(&worker).0);
    say(&mut client, &mut echo);
    old.kill().expect("killed");
    old.wait().expect("ends");
    assert!(!matches!(client.read(&mut [0]), Ok(1..)), "it ends with the process that has it, and does not hang");
    stop(&lab, interception);
}

/// cilium#36953, cilium#36063.
#[test]
fn a_listener_that_is_made_anew_elsewhere_serves_at_once() {
    let lab = Lab::new();
    let (interception, worker) = start(&lab, lab.config());
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    say(&mut client, &mut accept(&worker).0);
    for _ in 0..20 {
        let port = worker.local_addr().expect("an address").port();
        let again = lab.node.listen_transparent("[::]:0");
        assert_ne!(again.local_addr().expect("an address").port(), port);
        interception.set_listener(0, again.as_fd()).expect("listener");
        let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
        say(&mut client, &mut accept(&again).0);
    }
    stop(&lab, interception);
}

/// kmesh#774.
#[test]
fn sockets_are_registered_again_after_a_restart() {
    let mut lab = Lab::new();
    let mut config = InterceptionConfig { shortcut_cgroup: Some(lab.cgroup()), ..lab.config() };
    config.pods.iter_mut().for_each(|pod| pod.policy.acceleration = Acceleration::BothWays);
    let mut kept = Vec::new();
    for _ in 0..3 {
        let (interception, worker) = start(&lab, config.clone());
        // They go on from where they were.
        let before = ["shortcut.sockets", "shortcut.bytes"].map(|name| counter(&interception, name));
        let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
        let (mut down, _) = accept(&worker);
        for _ in 0..3 {
            say(&mut client, &mut down);
            say(&mut down, &mut client);
        }
        assert_eq!(counter(&interception, "shortcut.sockets"), before[0] + 2);
        assert_eq!(counter(&interception, "shortcut.sockets_refused"), 0);
        assert!(counter(&interception, "shortcut.bytes") > before[1]);
        // As in a crash; and the connections stay open, and registered.
        drop(interception);
        kept.push((client, down));
    }
    let (interception, _worker) = start(&lab, config);
    stop(&lab, interception);
}

/// istio#53843, istio#60882, linkerd2#11325: nothing of a pod's start waits for the daemon, and it is enrolled when the daemon is
/// there.
#[test]
fn a_pod_that_starts_without_a_daemon_has_its_network_and_is_enrolled_later() {
    let lab = Lab::new();
    let mut old = daemon(&lab);
    old.kill().expect("killed");
    old.wait().expect("ends");
    lab.node.ip("link delete pod1");
    lab.rewire_client();
    let app = lab.neighbour.listen("10.201.9.2:80");
    let mut client = lab.client.connect("10.201.9.2:80").expect("connects without a daemon");
    say(&mut client, &mut accept(&app).0);
    let (interception, worker) = start(&lab, lab.config());
    let mut client = lab.client.connect("10.201.9.2:80").expect("connects");
    say(&mut client, &mut accept(&worker).0);
    stop(&lab, interception);
}

/// istio#60882: of what a daemon made nothing outlives a reboot, and nothing of it is needed.
#[test]
fn after_a_reboot_everything_is_in_force_again() {
    let lab = Lab::new();
    let config = || InterceptionConfig { pin_path: lab.pin_path.clone(), ..closed_config() };
    let (interception, worker) = start(&lab, config());
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    say(&mut client, &mut accept(&worker).0);
    drop((interception, worker, client));
    // Pins, and with them programs and maps; the rules and routes; the pods' interfaces.
    fs::remove_dir_all(&lab.pin_path).expect("unpins");
    for family in ["-4", "-6"] {
        lab.node.ip(&format!("{family} rule delete fwmark 0xc17 lookup 3095"));
        lab.node.ip(&format!("{family} route flush table 3095"));
    }
    lab.node.ip("link delete pod1");
    lab.rewire_client();
    let (interception, worker) = start(&lab, config());
    for to in ["10.96.0.10:80", "[fd00:96::10]:80"] {
        let mut client = lab.client.connect(to).expect("connects");
        say(&mut client, &mut accept(&worker).0);
    }
    assert_eq!(counter(&interception, "redirected"), 2);
    assert_eq!(interception.faults(), Vec::<String>::new());
    stop(&lab, interception);
}

/// cilium#30406: one worker, and many connections in one pod's name to one server.
#[test]
fn one_pod_has_many_connections_to_one_server() {
    const MANY: usize = 200;
    let lab = Lab::new();
    let (interception, worker) = start(&lab, lab.config());
    let app = lab.server.listen("[::]:8080");
    let mut open = Vec::new();
    for _ in 0..MANY {
        let mut client = lab.client.connect("10.201.2.2:8080").expect("connects");
        let (mut down, _) = accept(&worker);
        let mut up = lab.node.run(|| connect_as("10.201.1.2:0", "10.201.2.2:8080")).expect("upstream");
        let (mut served, _) = accept(&app);
        say(&mut client, &mut down);
        say(&mut up, &mut served);
        open.push((client, down, up, served));
    }
    for (client, down, up, served) in &mut open {
        say(client, down);
        say(up, served);
    }
    stop(&lab, interception);
}

/// istio#52260.
#[test]
fn a_pod_may_listen_on_the_daemons_port() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 1);
    let worker = lab.node.listen_transparent("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    let app = lab.client.listen("0.0.0.0:15001");
    let mut probe = lab.node.connect("10.201.1.2:15001").expect("the kubelet connects");
    say(&mut probe, &mut accept(&app).0);
    // Nor do connections in its name take its ports: they are in the node's namespace.
    let server = lab.server.listen("[::]:8080");
    let mut up = lab.node.run(|| connect_as("10.201.1.2:8081", "10.201.2.2:8080")).expect("upstream");
    let own = lab.client.listen("0.0.0.0:8081");
    say(&mut up, &mut accept(&server).0);
    drop(own);
    stop(&lab, interception);
}

/// ztunnel#2060: answers of more than 512 bytes, and of more than a packet.
#[test]
fn large_datagrams_pass() {
    let lab = Lab::new();
    let (interception, _worker) = start(&lab, lab.config());
    for (from, to) in [("10.201.1.2:0", "10.201.9.2:53"), ("[fd00:201:1::2]:0", "[fd00:201:9::2]:53")] {
        let server = lab.neighbour.run(|| std::net::UdpSocket::bind(to)).expect("binds");
        let client = lab.client.run(|| std::net::UdpSocket::bind(from)).expect("binds");
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        }
        for size in [20, 600, 1400, 4096, 16_000] {
            let mut buffer = vec![0; 20_000];
            client.send_to(&[1; 40], to).expect("asks");
            let (got, asker) = server.recv_from(&mut buffer).expect("is asked");
            assert_eq!(got, 40);
            server.send_to(&vec![2; size], asker).expect("answers");
            assert_eq!(client.recv_from(&mut buffer).expect("is answered").0, size);
        }
    }
    stop(&lab, interception);
}

/// cilium#33168: interfaces of all sizes, and ends of a way that do not agree.
#[test]
fn odd_mtus_lose_nothing() {
    const BYTES: usize = 1 << 20;
    let lab = Lab::new();
    let (interception, worker) = start(&lab, lab.config());
    // Of the client, of the node towards it, and of both ends of the server's link.
    for (number, (client, node, server)) in
        [(1280, 1280, 9000), (9000, 9000, 1281), (1400, 1501, 1313), (65_535, 65_535, 1500)].into_iter().enumerate()
    {
        lab.client.ip(&format!("link set eth0 mtu {client}"));
        lab.node.ip(&format!("link set pod1 mtu {node}"));
        lab.server.ip(&format!("link set eth0 mtu {server}"));
        lab.node.ip(&format!("link set pod2 mtu {server}"));
        for (own, to) in [("10.201.1.2:0", "10.201.2.2:8080"), ("[fd00:201:1::2]:0", "[fd00:201:2::2]:8080")] {
            let app = lab.server.listen(to);
            let client = lab.client.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
            let (down, _) = accept(&worker);
            let up = lab.node.run(|| connect_as(own, to)).expect("upstream");
            let (served, _) = accept(&app);
            let payload: Vec<u8> = (0..BYTES).map(|place| (place * 7 + place / 251 + number) as u8).collect();
            // Both hops, both ways at a time.
            std::thread::scope(|scope| {
                for (from, to) in [(&client, &down), (&down, &client), (&up, &served), (&served, &up)] {
                    let (mut from, mut to) = (from.try_clone().expect("a clone"), to.try_clone().expect("a clone"));
                    let sent = &payload;
                    scope.spawn(move || from.write_all(sent).expect("writes"));
                    scope.spawn(move || {
                        let mut received = vec![0; BYTES];
                        to.read_exact(&mut received).expect("reads");
                        assert!(received == *sent, "other bytes than were sent");
                    });
                }
            });
        }
    }
    assert_eq!(counter(&interception, "redirected"), 8);
    stop(&lab, interception);
}

/// The list names tests that there are.
#[test]
fn every_complaint_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let text = fs::read_to_string(root.join("docs/complaints.md")).expect("docs/complaints.md");
    let mut functions = HashSet::new();
    let mut files: Vec<PathBuf> = [
        "proxy-daemon/tests",
        "proxy-daemon/src/intercept",
        "tests/tests",
        "tests/tests/interception",
        "discovery/tests",
    ]
    .iter()
    .flat_map(|directory| fs::read_dir(root.join(directory)).expect("a directory"))
    .map(|entry| entry.expect("an entry").path())
    .collect();
    files.retain(|path| path.extension().is_some_and(|it| it == "rs"));
    for file in files {
        let source = fs::read_to_string(file).expect("a source file");
        let names = source.lines().filter_map(|line| line.trim().strip_prefix("fn ")?.split('(').next());
        functions.extend(names.map(str::to_owned));
    }
    let rows: Vec<&str> = text.lines().filter(|line| line.contains('#') && line.starts_with('|')).collect();
    assert_eq!(rows.len(), 26, "a row for each complaint");
    for row in rows {
        let named: Vec<&str> = row.split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "no test: {row}");
        for name in named {
            assert!(functions.contains(name), "there is no test {name}: {row}");
        }
    }
}
