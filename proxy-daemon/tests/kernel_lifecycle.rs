//! Interception from start to end, on the running kernel: what a dead daemon leaves, what its successor takes over, what
//! an orderly end leaves (nothing).

mod kernel_lab;

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::process::Child;

use aya::programs::{SchedClassifier, TcAttachType};
use culvert_proxy_daemon::intercept::{Enrolment, FailurePolicy, HostMode, Interception, InterceptionConfig, Selector};
use culvert_proxy_ebpf::Reason;
use kernel_lab::process::role;
use kernel_lab::puppet::Group;
use kernel_lab::*;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Not a test of its own: what the process does that plays the daemon.
#[test]
fn play_the_daemon() {
    let Some([namespace, pin_path, policy]) = role() else { return };
    enter(&namespace);
    let config = config_of(&pin_path, policy == "closed");
    let interception = Interception::start(config, 1).expect("interception starts");
    let worker = transparent_listener("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    // Accepted connections stay open as long as this process lives.
    process::serve(|| std::mem::forget(worker.accept()));
}

fn config_of(pin_path: &str, closed: bool) -> InterceptionConfig {
    let mut config = if closed { closed_config() } else { open_config() };
    config.pin_path = pin_path.into();
    config
}

/// A daemon with a failure policy, to be killed.
fn daemon(lab: &Lab, policy: &str) -> Child {
    process::daemon(&[&lab.node.name, &lab.pin_path.display().to_string(), policy])
}

/// How many programs see what comes in on an interface of the node.
fn attached(lab: &Lab, interface: &str) -> usize {
    lab.node.run(|| SchedClassifier::query_tcx(interface, TcAttachType::Ingress)).expect("query").1.len()
}

/// The node's rules and routes that have to do with interception.
fn routing(lab: &Lab) -> String {
    let mut found = String::new();
    for family in ["-4", "-6"] {
        let rules = lab.node.ip(&format!("{family} rule list"));
        found.extend(rules.lines().filter(|line| line.contains("0xc17")).map(|line| format!("{line}\n")));
        let routes = lab.node.ip(&format!("{family} route list table all"));
        found.extend(routes.lines().filter(|line| line.contains("table 3095")).map(|line| format!("{line}\n")));
    }
    found
}

/// A server pod that answers on its own, and what a client gets to hear from it.
fn serve(lab: &Lab) -> TcpListener {
    lab.server.listen("[::]:80")
}

fn is_answered(lab: &Lab, app: &TcpListener, destination: &str) -> bool {
    let Ok(mut client) = lab.client.connect_within(destination, REFUSAL) else { return false };
    let (mut accepted, _) = accept(app);
    accepted.write_all(b"hello").expect("write");
    let mut word = [0; 5];
    client.read_exact(&mut word).is_ok()
}

#[test]
fn pods_of_a_dead_daemon_fail_open() {
    let lab = Lab::new();
    let app = serve(&lab);
    let mut daemon = daemon(&lab, "open");
    lab.client.connect("10.96.0.10:80").expect("the daemon serves");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert_eq!(attached(&lab, "pod1"), 1, "the program outlives the daemon");
    for destination in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        assert!(is_answered(&lab, &app, destination), "{destination}");
    }
}

#[test]
fn pods_of_a_dead_daemon_fail_closed() {
    let lab = Lab::new();
    let app = serve(&lab);
    let mut daemon = daemon(&lab, "closed");
    lab.client.connect("10.96.0.10:80").expect("the daemon serves");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    for destination in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        let before = pinned_counter(&lab, Reason::FailedClosed);
        let error = lab.client.connect_within(destination, REFUSAL).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{destination}: {error}");
        assert_eq!(pinned_counter(&lab, Reason::FailedClosed), before + 1, "{destination}: by the first packet");
    }
    // Connections that others open to the pod are not its own: they work.
    for destination in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        let mut neighbour = lab.neighbour.connect(destination).expect("connects");
        let (mut accepted, _) = accept(&app);
        accepted.write_all(b"hello").unwrap();
        neighbour.read_exact(&mut [0; 5]).expect("reads");
    }
}

#[test]
fn a_connection_of_a_dead_daemon_ends() {
    let lab = Lab::new();
    let mut daemon = daemon(&lab, "open");
    let mut client = lab.client.connect("10.96.0.10:80").expect("the daemon serves");
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)), "the client hears of the end");
    // And of the reset, when it goes on: the node still steers what belongs to the daemon's closed sockets.
    eventually("the connection is reset", || client.write_all(b"more").is_err());
}

#[test]
fn a_new_daemon_takes_over_and_leaves_nothing_when_it_ends() {
    let lab = Lab::new();
    let app = serve(&lab);
    let mut dead = daemon(&lab, "closed");
    dead.kill().unwrap();
    dead.wait().unwrap();
    // An interface that goes while nobody looks: its pin must go too.
    lab.node.ip("link add pod9 type veth peer name other9");

    for _ in 0..2 {
        let interception = lab.start(closed(&lab), 1);
        let worker = lab.node.listen_transparent("[::]:15001");
        // The dead daemon's programs stay until then.
        lab.node.run(|| interception.set_listener(0, worker.as_fd())).expect("listener");
        for interface in ["pod1", "pod2", "up0", "pod9"] {
            assert_eq!(attached(&lab, interface), 1, "{interface}: one program, the new one");
        }
        let client = lab.client.connect("10.201.2.2:80").expect("the new daemon serves");
        let (accepted, _) = accept(&worker);
        assert_eq!(accepted.local_addr().unwrap().port(), 80);
        drop(client);

        lab.node.run(|| interception.shutdown()).expect("shuts down");
        for interface in ["pod1", "pod2", "up0", "pod9"] {
            assert_eq!(attached(&lab, interface), 0, "{interface}");
        }
        assert_eq!(routing(&lab), "");
        assert!(!lab.pin_path.exists());
        assert!(is_answered(&lab, &app, "10.201.2.2:80"), "pods go their own way");
    }
}

fn closed(lab: &Lab) -> InterceptionConfig {
    config_of(lab.pin_path.to_str().expect("plain"), true)
}

#[test]
fn interfaces_are_followed() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 1);
    lab.node.ip("link add late type veth peer name other7");
    assert_eq!(attached(&lab, "late"), 0);
    // As network plugins do: made under one name, used under another.
    lab.node.ip("link set late name pod7");
    eventually("attached to pod7", || attached(&lab, "pod7") == 1);
    let pins = || fs::read_dir(lab.pin_path.join("links")).unwrap().count();
    eventually("pinned", || pins() == 4);
    lab.node.ip("link set pod7 name late");
    eventually("detached from late", || attached(&lab, "late") == 0);
    lab.node.ip("link set late name pod7");
    eventually("attached to pod7 again", || attached(&lab, "pod7") == 1);
    lab.node.ip("link delete pod7");
    eventually("the pin is gone", || pins() == 3);

    // A pod's end that passes through the node on its way to the pod must not take the program along.
    lab.node.ip("link add pod8 type veth peer name other8");
    eventually("attached to pod8", || attached(&lab, "pod8") == 1);
    lab.node.ip(&format!("link set pod8 netns {}", lab.client.name));
    let in_pod = || lab.client.run(|| SchedClassifier::query_tcx("pod8", TcAttachType::Ingress)).unwrap().1.len();
    eventually("detached from pod8 in the pod", || in_pod() == 0);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// As network managers do with rules that are not theirs, and `culvert clean` with another pin path: redirected packets would go astray.
#[test]
fn rule_and_route_that_others_remove_come_back() {
    let lab = Lab::new();
    let (interception, worker) = start(&lab, closed(&lab));
    let before = routing(&lab);
    assert_eq!(before.lines().count(), 4, "{before}");
    for removed in [
        "-4 rule delete fwmark 0xc17 lookup 3095",
        "-6 rule delete fwmark 0xc17 lookup 3095",
        "-4 route flush table 3095",
        "-6 route flush table 3095",
    ] {
        lab.node.ip(removed);
        eventually("it is there again", || routing(&lab) == before);
    }
    for destination in ["10.96.0.10:80", "[fd00:96::10]:80"] {
        lab.client.connect(destination).expect("connects");
        accept(&worker);
    }
    stop(&lab, interception);
    assert_eq!(routing(&lab), "");
}

#[test]
fn the_nodes_own_addresses_are_followed() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 1);
    let worker = lab.node.listen_transparent("0.0.0.0:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    lab.client.connect("10.201.8.8:80").expect("redirected");
    accept(&worker);
    lab.node.ip("addr add 10.201.8.8/32 dev lo");
    let own = lab.node.listen("10.201.8.8:80");
    eventually("the new address passes", || {
        let _client = lab.client.connect("10.201.8.8:80");
        accept_within(&own, std::time::Duration::from_millis(100)).is_some()
    });
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn kernels_without_tcx_get_filters() {
    let lab = Lab::new();
    for _ in 0..2 {
        let config = InterceptionConfig { force_clsact: true, ..lab.config() };
        let interception = lab.start(config, 1);
        let worker = lab.node.listen_transparent("[::]:15001");
        interception.set_listener(0, worker.as_fd()).expect("listener");
        for destination in ["10.96.0.10:80", "[fd00:96::10]:80"] {
            lab.client.connect(destination).expect("connects");
            let local: SocketAddr = accept(&worker).0.local_addr().unwrap();
            assert_eq!(SocketAddr::new(local.ip().to_canonical(), 80).to_string(), destination);
        }
        let filters = || command("tc", &format!("-n {} filter show dev pod1 ingress", lab.node.name));
        assert_eq!(filters().matches("redirect_outbound").count(), 1, "{}", filters());
        lab.node.run(|| interception.shutdown()).expect("shuts down");
        assert_eq!(filters().trim(), "");
        assert_eq!(routing(&lab), "");
    }
}

#[test]
fn a_host_without_ipv6_goes_without() {
    let lab = Lab::new();
    lab.node.run(|| fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1")).expect("disable_ipv6");
    let interception = lab.start(lab.config(), 1);
    let worker = lab.node.listen_transparent("0.0.0.0:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    lab.client.connect("10.96.0.10:80").expect("IPv4 connects");
    accept(&worker);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_start_that_fails_leaves_nothing() {
    let lab = Lab::new();
    let mut config = lab.config();
    config.shortcut_cgroup = Some("/proc".into());
    let error = lab.node.run(|| Interception::start(config, 1)).err().expect("refused").to_string();
    assert!(error.contains("shortcut_cgroup /proc"), "{error}");
    assert_eq!(routing(&lab), "");
    assert!(!lab.pin_path.exists());

    lab.node.ip("link set lo down");
    let error = lab.node.run(|| Interception::start(lab.config(), 1)).err().expect("refused").to_string();
    assert!(error.contains("is lo up?"), "{error}");
    assert!(!lab.pin_path.exists());

    let too_many = lab.node.run(|| Interception::start(lab.config(), 129)).err().expect("refused").to_string();
    assert!(too_many.contains("--concurrency"), "{too_many}");
}

/// Each step opens something: with fewer and fewer files the start fails earlier and earlier.
#[test]
fn a_start_that_fails_late_leaves_nothing() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let manifests = tempfile::tempdir().expect("a directory");
    let config = || InterceptionConfig {
        host: Some(HostMode { cgroups: vec![group.path().to_owned()], failure_policy: FailurePolicy::Closed }),
        enrolment: Some(Enrolment {
            pod_manifests: manifests.path().to_owned(),
            kubernetes: None,
            node_name: String::new(),
            selectors: vec![Selector::default()],
        }),
        ..closed(&lab)
    };
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
    let start = |limit: u64| {
        lab.node.run(|| {
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard).expect("setrlimit");
            let started = Interception::start(config(), 1);
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("setrlimit");
            started
        })
    };
    let interception = start(soft).expect("starts");
    let files = fs::read_dir("/proc/self/fd").expect("files").map(|file| file.unwrap().file_name());
    let top = files.filter_map(|name| name.to_str()?.parse::<u64>().ok()).max().expect("files");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
    let mut reasons = Vec::new();
    let mut starts = |limit: u64| {
        let started = start(limit);
        let starts = started.is_ok();
        match started {
            Ok(interception) => lab.node.run(|| interception.shutdown()).expect("shuts down"),
            Err(error) => reasons.push(error.to_string()),
        }
        assert_eq!(routing(&lab), "", "{reasons:?}");
        assert!(!lab.pin_path.exists(), "{reasons:?}");
        for interface in ["pod1", "pod2", "up0"] {
            assert_eq!(attached(&lab, interface), 0, "{interface}: {reasons:?}");
        }
        starts
    };
    // How few suffice.
    let (mut too_few, mut enough) = (3, top + 1);
    while too_few + 1 < enough {
        let middle = u64::midpoint(too_few, enough);
        *if starts(middle) { &mut enough } else { &mut too_few } = middle;
    }
    for fewer in 0..10 {
        assert!(!starts(too_few - fewer));
    }
    for late in ["cgroups", &manifests.path().display().to_string()] {
        assert!(reasons.iter().any(|reason| reason.contains(late)), "{late}: {reasons:#?}");
    }
}

#[test]
fn without_capabilities_one_line_says_what_is_needed() {
    let lab = Lab::new();
    let config = lab.config();
    let error = lab.node.run(|| {
        // This thread's own: the others keep theirs.
        drop_capabilities();
        Interception::start(config, 1).err().expect("refused").to_string()
    });
    assert!(error.starts_with("interception needs root"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

/// Drops every capability of the calling thread.
fn drop_capabilities() {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    // _LINUX_CAPABILITY_VERSION_3: two sets of effective, permitted, inheritable.
    let header = Header { version: 0x2008_0522, pid: 0 };
    let sets = [0_u32; 6];
    // SAFETY: both are laid out as capset(2) says, and only read.
    let result = unsafe { nix::libc::syscall(nix::libc::SYS_capset, &raw const header, sets.as_ptr()) };
    assert_eq!(result, 0, "capset: {}", std::io::Error::last_os_error());
}
