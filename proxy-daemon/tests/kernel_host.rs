//! Host mode on the running kernel: connections of the node's own processes, redirected when they connect.

mod kernel_lab;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Instant;

use culvert_proxy_daemon::intercept::{
    FailurePolicy, HostFlows, HostMode, Interception, InterceptionConfig, Policy, Range,
};
use kernel_lab::process::role;
use kernel_lab::puppet::{self, Group, Puppet};
use kernel_lab::*;

/// Not a test of its own: what the process does that is redirected.
#[test]
fn play_the_puppet() {
    puppet::play();
}

/// Host mode alone, without any pod.
fn host_config(pin_path: &Path, cgroup: &Path, failure_policy: FailurePolicy) -> InterceptionConfig {
    InterceptionConfig {
        host: Some(HostMode { cgroups: vec![cgroup.to_owned()], failure_policy }),
        excluded_ports: vec![9090],
        excluded_ranges: vec![Range::parse("10.201.1.0/24").unwrap()],
        pin_path: pin_path.to_owned(),
        ..InterceptionConfig::default()
    }
}

struct Stage {
    interception: Interception,
    flows: HostFlows,
    worker: Option<TcpListener>,
}

/// The daemon, with one worker that takes both families.
fn start(lab: &Lab, cgroup: &Path, failure_policy: FailurePolicy) -> Stage {
    let interception = lab.start(host_config(&lab.pin_path, cgroup, failure_policy), 1);
    let worker = lab.node.listen_transparent("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    let flows = interception.host_flows().expect("readable").expect("host mode is on");
    Stage { interception, flows, worker: Some(worker) }
}

impl Stage {
    /// What the worker accepts next, and where it was going.
    fn accepted(&self) -> (Stream, Option<SocketAddr>) {
        let (stream, client) = accept(self.worker.as_ref().expect("listens"));
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        (stream, self.flows.take(client, 15001))
    }
}

/// Answers what it hears.
fn echo(mut stream: Stream) {
    let mut word = [0; 5];
    stream.read_exact(&mut word).expect("reads");
    stream.write_all(&word).expect("writes");
}

#[test]
fn connections_of_host_processes_reach_a_worker_with_their_destination() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let stage = start(&lab, group.path(), FailurePolicy::Open);
    let mut app = Puppet::new(&lab.node, &group);
    for destination in
        ["10.96.0.10:80", "[fd00:96::10]:443", "[::ffff:10.96.0.11]:8080", "10.201.9.2:80", "[fd00:201:9::2]:5432"]
    {
        let (number, peer) = app.connect(destination).expect(destination);
        assert_eq!(peer, destination, "getpeername tells whom it named");
        let (stream, original) = stage.accepted();
        let wanted: SocketAddr = destination.parse().unwrap();
        assert_eq!(original, Some(SocketAddr::new(wanted.ip().to_canonical(), wanted.port())));
        let answering = std::thread::spawn(move || echo(stream));
        assert_eq!(app.order(&format!("talk {number}")), Ok("hello".to_owned()));
        answering.join().unwrap();
    }
    assert!(stage.flows.is_empty(), "what was accepted is forgotten");
    assert_eq!(counter(&stage.interception, "host.redirected"), 5);
}

#[test]
fn a_client_that_closes_at_once_is_still_known() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let stage = start(&lab, group.path(), FailurePolicy::Open);
    let mut app = Puppet::new(&lab.node, &group);
    let (number, _) = app.connect("10.96.0.10:80").expect("connects");
    app.order(&format!("close {number}")).unwrap();
    let (_, original) = stage.accepted();
    assert_eq!(original, Some("10.96.0.10:80".parse().unwrap()));
    assert!(stage.flows.is_empty());
}

#[test]
fn what_is_excluded_passes() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let stage = start(&lab, group.path(), FailurePolicy::Closed);
    let mut app = Puppet::new(&lab.node, &group);
    for (namespace, destination) in [
        (&lab.neighbour, "10.201.9.2:9090"), // a port
        (&lab.client, "10.201.1.2:80"),      // a range
        (&lab.node, "127.0.0.1:8081"),       // the host itself
        (&lab.node, "[::1]:8081"),
        (&lab.node, "10.201.9.1:8082"), // the node's own address
    ] {
        let own = namespace.listen(destination);
        let (_, peer) = app.connect(destination).expect(destination);
        assert_eq!(peer, destination);
        accept(&own);
    }
    assert!(accept_within(stage.worker.as_ref().unwrap(), std::time::Duration::from_millis(50)).is_none());
    assert_eq!(counter(&stage.interception, "host.passed_excluded"), 5);
    assert_eq!(counter(&stage.interception, "host.redirected"), 0);
}

#[test]
fn processes_in_other_namespaces_and_cgroups_pass() {
    let lab = Lab::new();
    let (group, other) = (Group::new(None, "apps"), Group::new(None, "others"));
    let stage = start(&lab, group.path(), FailurePolicy::Closed);
    let server = lab.neighbour.listen("[::]:80");
    Puppet::new(&lab.client, &group).connect("10.201.9.2:80").expect("a pod's process connects");
    accept(&server);
    assert_eq!(counter(&stage.interception, "host.passed_namespace"), 1);
    Puppet::new(&lab.node, &other).connect("[fd00:201:9::2]:80").expect("another cgroup's process connects");
    accept(&server);
    assert_eq!(counter(&stage.interception, "host.redirected"), 0);
}

#[test]
fn the_daemons_own_connections_are_not_redirected() {
    let mut lab = Lab::new();
    // This process, which plays the daemon, is in the cgroup as well.
    let cgroup = lab.cgroup();
    let stage = start(&lab, &cgroup, FailurePolicy::Open);
    let server = lab.neighbour.listen("[::]:80");
    for destination in ["10.201.9.2:80", "[fd00:201:9::2]:80"] {
        let client = lab.node.connect(destination).expect("connects");
        assert_eq!(client.peer_addr().unwrap().to_string(), destination);
        accept(&server);
    }
    assert_eq!(counter(&stage.interception, "host.redirected"), 0);
}

#[test]
fn without_a_worker_connections_are_refused_or_pass() {
    for policy in [FailurePolicy::Closed, FailurePolicy::Open] {
        let lab = Lab::new();
        let group = Group::new(None, "apps");
        let mut stage = start(&lab, group.path(), policy);
        let server = lab.neighbour.listen("[::]:80");
        let mut app = Puppet::new(&lab.node, &group);
        stage.worker = None;
        for destination in ["10.201.9.2:80", "[fd00:201:9::2]:80", "[::ffff:10.201.9.2]:80"] {
            let began = Instant::now();
            let connected = app.connect(destination);
            if policy == FailurePolicy::Closed {
                assert_eq!(connected.expect_err(destination), refusal(), "{destination}");
                assert!(began.elapsed() < REFUSAL, "at once");
            } else {
                assert_eq!(connected.expect(destination).1, destination);
                accept(&server);
            }
        }
        let name = if policy == FailurePolicy::Closed { "host.failed_closed" } else { "host.failed_open" };
        assert_eq!(counter(&stage.interception, name), 3);
    }
}

/// How the kernel refuses: from 6.1 on as if nobody listened.
fn refusal() -> i32 {
    let release = nix::sys::utsname::uname().expect("uname").release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 1) { nix::libc::ECONNREFUSED } else { nix::libc::EPERM }
}

#[test]
fn a_connection_that_fails_leaves_nothing() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let stage = start(&lab, group.path(), FailurePolicy::Open);
    let mut app = Puppet::new(&lab.node, &group);
    // Answers of the listener do not come back.
    lab.node.ip("route add blackhole 127.0.0.1/32 table 77");
    lab.node.ip("rule add iif lo sport 15001 lookup 77 priority 0");
    lab.node.ip("rule del table local priority 0");
    lab.node.ip("rule add lookup local priority 10");
    app.order("tcp-briefly 10.96.0.10:80").expect_err("times out");
    assert_eq!(counter(&stage.interception, "host.redirected"), 1);
    assert!(stage.flows.is_empty(), "{} entries stay", stage.flows.len());
}

#[test]
fn cgroups_that_appear_later_are_attached() {
    let lab = Lab::new();
    let slice = Group::new(None, "slice");
    let stage = start(&lab, &slice.path().join("shop-*.service"), FailurePolicy::Open);
    assert_eq!(stage.interception.hooked_cgroups(), (0, 0));
    let pins = || fs::read_dir(lab.pin_path.join("cgroups")).unwrap().count();
    assert_eq!(pins(), 0);

    let (web, other) = (Group::new(Some(&slice), "shop-web.service"), Group::new(Some(&slice), "bank.service"));
    eventually("attached", || stage.interception.hooked_cgroups().0 == 1);
    let inner = Group::new(Some(&web), "inner");
    for group in [&web, &inner] {
        let (_, peer) = Puppet::new(&lab.node, group).connect("10.96.0.10:80").expect("redirected");
        assert_eq!(peer, "10.96.0.10:80");
        assert_eq!(stage.accepted().1, Some("10.96.0.10:80".parse().unwrap()));
    }
    let own = lab.neighbour.listen("10.201.9.2:80");
    Puppet::new(&lab.node, &other).connect("10.201.9.2:80").expect("passes");
    accept(&own);
    assert_eq!(pins(), 5);
    eventually("what does not change is not looked at", || sleeps("intercept-cgrp"));
    drop(inner);
    drop(web);
    eventually("the pins are gone", || pins() == 0);
    // The name comes again.
    let web = Group::new(Some(&slice), "shop-web.service");
    eventually("attached again", || stage.interception.hooked_cgroups().0 == 1);
    Puppet::new(&lab.node, &web).connect("10.96.0.10:80").expect("redirected");
    stage.accepted();
    lab.node.run(|| stage.interception.shutdown()).expect("shuts down");
    assert!(!lab.pin_path.exists());
}

#[test]
fn cgroups_that_appear_after_a_daemon_took_over_are_attached() {
    let lab = Lab::new();
    let slice = Group::new(None, "slice");
    let host = HostMode { cgroups: vec![slice.path().join("shop-*")], failure_policy: FailurePolicy::Open };
    let config = || InterceptionConfig { host: Some(host.clone()), ..lab.config() };
    let worker = lab.node.listen_transparent("[::]:15001");
    let first = lab.start(config(), 1);
    lab.node.run(|| first.set_listener(0, worker.as_fd())).expect("listener");
    // As in a crash: its programs stay.
    drop(first);
    let second = lab.start(config(), 1);
    eventually("the first look is over", || sleeps("intercept-cgrp"));
    lab.node.run(|| second.set_listener(0, worker.as_fd())).expect("listener");
    let _web = Group::new(Some(&slice), "shop-web");
    eventually("attached", || second.hooked_cgroups().0 == 1);
    lab.node.run(|| second.shutdown()).expect("shuts down");
}

#[test]
fn a_cgroup_without_programs_is_told_and_tried_again() {
    let lab = Lab::new();
    let slice = Group::new(None, "slice");
    let stage = start(&lab, &slice.path().join("shop-*"), FailurePolicy::Closed);
    assert_eq!(stage.interception.faults(), Vec::<String>::new());
    let pins = lab.pin_path.join("cgroups");
    fs::remove_dir(&pins).expect("nothing is pinned");
    let web = Group::new(Some(&slice), "shop-web");
    let told = format!("host.cgroups {}: ", web.path().display());
    eventually("the node is not ready", || stage.interception.faults().iter().any(|fault| fault.starts_with(&told)));
    assert_eq!(stage.interception.hooked_cgroups(), (0, 0));
    fs::create_dir(&pins).expect("a directory");
    eventually("ready", || stage.interception.faults().is_empty());
    assert_eq!(stage.interception.hooked_cgroups(), (1, 0));
    lab.node.run(|| stage.interception.shutdown()).expect("shuts down");
}

#[test]
fn a_directory_that_is_no_cgroup_is_refused_in_words() {
    let lab = Lab::new();
    let config = host_config(&lab.pin_path, Path::new("/proc"), FailurePolicy::Open);
    let error = lab.node.run(|| Interception::start(config, 1)).err().expect("refused").to_string();
    assert!(error.starts_with("host.cgroups /proc: is not a cgroup v2 directory"), "{error}");
    assert!(!lab.pin_path.exists());
}

/// Not a test of its own: what the process does that plays a daemon that is killed.
#[test]
fn play_the_daemon() {
    let Some([namespace, pin_path, cgroup]) = role() else { return };
    enter(&namespace);
    let config = host_config(Path::new(&pin_path), Path::new(&cgroup), FailurePolicy::Closed);
    let interception = Interception::start(config, 1).expect("interception starts");
    let worker = transparent_listener("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    process::serve(|| std::mem::forget(worker.accept()));
}

#[test]
fn a_daemon_that_dies_leaves_its_policy_and_its_successor_takes_over() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let mut dying =
        process::daemon(&[&lab.node.name, &lab.pin_path.display().to_string(), &group.path().display().to_string()]);
    let mut app = Puppet::new(&lab.node, &group);
    app.connect("10.96.0.10:80").expect("the daemon serves");
    dying.kill().unwrap();
    dying.wait().unwrap();
    let _server = lab.neighbour.listen("10.201.9.2:80");
    assert_eq!(app.connect("10.201.9.2:80").expect_err("refused"), refusal());

    let stage = start(&lab, group.path(), FailurePolicy::Closed);
    let (_, peer) = app.connect("10.201.9.2:80").expect("the successor serves");
    assert_eq!(peer, "10.201.9.2:80");
    assert_eq!(stage.accepted().1, Some("10.201.9.2:80".parse().unwrap()));
    assert_eq!(fs::read_dir(lab.pin_path.join("cgroups")).unwrap().count(), 5, "its links are gone");
    lab.node.run(|| stage.interception.shutdown()).expect("shuts down");
    eventually("an orderly end lets everything pass", || app.connect("10.201.9.2:80").is_ok());
}

#[test]
fn cgroups_are_enrolled_by_command_and_a_restart_keeps_it() {
    let lab = Lab::new();
    let group = Group::new(None, "apps");
    let path = group.path().to_str().expect("a path");
    let config = || InterceptionConfig {
        host: Some(HostMode { cgroups: Vec::new(), failure_policy: FailurePolicy::Closed }),
        state_path: lab.state_path(),
        ..host_config(&lab.pin_path, group.path(), FailurePolicy::Closed)
    };
    let without = lab.start(InterceptionConfig { host: None, ..lab.config() }, 1);
    let refused = without.enrol_cgroup(path).unwrap_err().to_string();
    assert!(refused.contains("there is no host mode"), "{refused}");
    stop(&lab, without);

    let interception = lab.start(config(), 1);
    let mut app = Puppet::new(&lab.node, &group);
    let far = lab.neighbour.listen("10.201.9.2:80");
    let is_refused = |app: &mut Puppet| match app.connect("10.201.9.2:80") {
        Ok((number, _)) => {
            accept(&far);
            app.order(&format!("close {number}")).expect("closes");
            false
        }
        Err(errno) => {
            assert_eq!(errno, nix::libc::ECONNREFUSED);
            true
        }
    };
    assert!(!is_refused(&mut app), "nobody has said anything");
    for (bad, words) in [
        ("/proc/self", "not a cgroup v2 directory"),
        ("apps", "absolute"),
        ("/sys/../sys", "`..`"),
        ("/nowhere", "not a"),
    ] {
        let error = interception.enrol_cgroup(bad).unwrap_err().to_string();
        assert!(error.contains(words), "{bad}: {error}");
    }
    assert_eq!(interception.cgroups(), []);
    interception.enrol_cgroup(path).expect("enrols");
    interception.enrol_cgroup(path).expect("is enrolled");
    assert!(is_refused(&mut app), "no worker listens");
    let status = interception.cgroups();
    assert!(status.len() == 1 && status[0].attached && status[0].by_command && status[0].role == "host", "{status:?}");

    // A crash and a restart.
    drop(interception);
    let interception = lab.start(config(), 1);
    assert!(is_refused(&mut app));
    assert_eq!(interception.cgroups(), status);

    // Host mode is taken out of the configuration, and comes again.
    drop(interception);
    let policy = |failure_policy| Policy { failure_policy, ..Policy::default() };
    for (failure_policy, faults) in [(FailurePolicy::Closed, 1), (FailurePolicy::Open, 0)] {
        let config = InterceptionConfig { host: None, policy: policy(failure_policy), ..lab.config() };
        let without = lab.start(InterceptionConfig { pods: Vec::new(), ..config }, 1);
        assert!(!is_refused(&mut app));
        let missing = without.cgroups();
        assert!(missing.len() == 1 && missing[0].by_command && !missing[0].attached, "{missing:?}");
        let told = without.faults();
        assert_eq!(
            told.iter().filter(|it| it.contains(path) && it.contains("has no `host`")).count(),
            faults,
            "{told:?}"
        );
        stop(&lab, without);
    }
    let interception = lab.start(config(), 1);
    assert_eq!(interception.cgroups(), status);
    interception.unenrol(path).expect("unenrols");
    assert!(!is_refused(&mut app));
    assert!(interception.unenrol(path).unwrap_err().to_string().contains("was not enrolled by command"));

    // One that goes and comes again, as a unit's does.
    let unit = Group::new(None, "unit");
    let path = unit.path().to_owned();
    interception.enrol_cgroup(path.to_str().expect("a path")).expect("enrols");
    drop(unit);
    eventually("it is gone", || interception.cgroups().iter().all(|cgroup| !cgroup.attached));
    assert_eq!(interception.cgroups().len(), 1);
    fs::create_dir(&path).expect("a cgroup");
    eventually("it has the programs again", || interception.cgroups().iter().all(|cgroup| cgroup.attached));
    fs::remove_dir(&path).expect("remove");
    assert_eq!(interception.faults(), Vec::<String>::new());
    stop(&lab, interception);
}
