//! Who serves when daemons end, on the running kernel: the one that was replaced takes over again when its successor is gone, and
//! who ends in order lets connections pass before its listeners close.

mod kernel_lab;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use culvert_proxy_daemon::intercept::{HostMode, Interception, InterceptionConfig};
use kernel_lab::puppet::{self, Group, Puppet};
use kernel_lab::*;

/// Not a test of its own: what the process does whose connections are redirected.
#[test]
fn play_the_puppet() {
    puppet::play();
}

/// The pods' connections fail closed.
fn closed(lab: &Lab) -> InterceptionConfig {
    InterceptionConfig { pin_path: lab.pin_path.clone(), state_path: lab.state_path(), ..closed_config() }
}

/// Whether a new connection of the client gets to one of these; `None`: it gets nowhere.
fn taken_by<const LISTENERS: usize>(lab: &Lab, listeners: [&TcpListener; LISTENERS]) -> Option<usize> {
    let _client = lab.client.connect_within("10.201.2.2:80", REFUSAL).ok()?;
    let mut taker = None;
    eventually("accepted", || {
        taker = listeners.iter().position(|listener| accept_within(listener, Duration::ZERO).is_some());
        taker.is_some()
    });
    taker
}

fn say(from: &mut Stream, to: &mut Stream) {
    from.write_all(b"hello").expect("writes");
    to.read_exact(&mut [0; 5]).expect("reads");
}

/// Programs on the client's interface, which are to be one.
fn programs(lab: &Lab) -> Vec<u32> {
    let found = lab.node.run(|| SchedClassifier::query_tcx("pod1", TcAttachType::Ingress)).expect("query").1;
    found.iter().map(|program| program.id()).collect()
}

#[test]
fn a_daemon_takes_over_again_when_its_successor_dies() {
    let lab = Lab::new();
    let app = lab.server.listen("[::]:80");
    let (first, old) = start(&lab, closed(&lab));
    let before = programs(&lab);
    let (second, new) = start(&lab, closed(&lab));
    assert_eq!(taken_by(&lab, [&old, &new, &app]), Some(1));
    // As in a crash. Until the first one takes over, nothing gets past.
    drop((second, new));
    eventually("the first one serves again", || match taken_by(&lab, [&old, &app]) {
        Some(0) => true,
        Some(_) => panic!("a bypass"),
        None => false,
    });
    assert_eq!(programs(&lab), before);
    assert!(!first.is_followed());
    // It follows the node again.
    lab.node.ip("link add pod7 type veth peer name other7");
    let attached =
        || lab.node.run(|| SchedClassifier::query_tcx("pod7", TcAttachType::Ingress)).expect("query").1.len();
    eventually("attached", || attached() == 1);
    // And may be replaced again.
    let (third, newest) = start(&lab, closed(&lab));
    assert_eq!(taken_by(&lab, [&old, &newest, &app]), Some(1));
    stop(&lab, first);
    assert_eq!(taken_by(&lab, [&newest, &app]), Some(0));
    stop(&lab, third);
    assert!(!lab.pin_path.exists());
    assert_eq!(taken_by(&lab, [&app]), Some(0));
}

/// What went while another daemon served is seen by the one that takes over again.
#[test]
fn connections_of_a_pod_that_went_meanwhile_end() {
    let lab = Lab::new();
    let config = || InterceptionConfig { pods: Vec::new(), ..closed(&lab) };
    let (first, old) = start(&lab, config());
    let enrol = |address: &str| first.enrol(None, vec![address.parse().unwrap()], None, None, None).expect("enrols");
    enrol(CLIENT);
    enrol(SERVER);
    let mut going = lab.client.connect("10.96.0.10:80").expect("redirected");
    let (mut served, _) = accept(&old);
    let mut staying = lab.server.connect("10.96.0.10:80").expect("redirected");
    let (mut served_on, _) = accept(&old);
    say(&mut going, &mut served);
    let second = start(&lab, config());
    assert!(first.is_followed());
    drop(second);
    // Nobody's connections end with a daemon that is followed, and another pod has the address at once.
    lab.node.ip("link delete pod1");
    lab.rewire_client();
    let error = served.read(&mut [0]).expect_err("it goes on");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted, "{error}");
    assert!(!first.is_followed());
    say(&mut staying, &mut served_on);
    stop(&lab, first);
}

/// An upgrade that is taken back: no connection fails, and none passes.
#[test]
fn a_daemon_takes_over_again_when_its_successor_is_told_to_end() {
    let lab = Lab::new();
    let app = lab.server.listen("[::]:80");
    let (first, old) = start(&lab, closed(&lab));
    let (second, new) = start(&lab, closed(&lab));
    assert!(second.hand_back(), "the first one may serve");
    eventually("handed back", || {
        let taker = taken_by(&lab, [&old, &new, &app]);
        assert!(matches!(taker, Some(0 | 1)), "{taker:?}");
        second.is_followed()
    });
    // Its maps are pinned before its programs are attached.
    eventually("the first one serves", || match taken_by(&lab, [&old, &new, &app]) {
        Some(0) => true,
        taker => taker.filter(|taker| *taker == 1).map(|_| false).expect("a bypass, or nobody"),
    });
    // It is not its own to say any more.
    second.let_pass().expect("does nothing");
    stop(&lab, second);
    drop(new);
    assert_eq!(taken_by(&lab, [&old, &app]), Some(0));
    assert!(!first.hand_back(), "nobody is left");
    stop(&lab, first);
    assert!(!lab.pin_path.exists());
}

/// A successor of a release that hands nothing back removes everything when it ends.
#[test]
fn a_daemon_takes_over_again_when_its_successor_removed_everything() {
    let lab = Lab::new();
    let app = lab.server.listen("[::]:80");
    let (first, old) = start(&lab, closed(&lab));
    let (second, new) = start(&lab, closed(&lab));
    stop(&lab, second);
    drop(new);
    eventually("the first one serves again", || taken_by(&lab, [&old, &app]) == Some(0));
    assert!(lab.node.ip("rule list").contains("0xc17"));
    stop(&lab, first);
    assert!(!lab.pin_path.exists());
}

/// What keeps a daemon from taking over again is told, and tried again.
#[test]
fn a_daemon_that_cannot_take_over_again_says_so_until_it_can() {
    let lab = Lab::new();
    let (first, old) = start(&lab, closed(&lab));
    let successor = start(&lab, closed(&lab));
    // There is no route to a device that is down.
    lab.node.ip("link set lo down");
    drop(successor);
    let says_so = || first.faults().iter().any(|fault| fault.starts_with("cannot take over again"));
    eventually("said", says_so);
    lab.node.ip("link set lo up");
    eventually("the first one serves again", || taken_by(&lab, [&old]) == Some(0));
    eventually("not said any more", || first.faults().is_empty());
    stop(&lab, first);
    assert!(!lab.pin_path.exists());
}

/// Whichever of two takes over from the third, it hands back to the other.
#[test]
fn of_three_daemons_the_last_one_serves() {
    let lab = Lab::new();
    let app = lab.server.listen("[::]:80");
    let (first, of_first) = start(&lab, closed(&lab));
    let (second, of_second) = start(&lab, closed(&lab));
    let third = start(&lab, closed(&lab));
    drop(third);
    let mut taker = None;
    eventually("one of two serves again", || {
        taker = taken_by(&lab, [&of_first, &of_second, &app]);
        taker.is_some()
    });
    let (ends, stays) = match taker {
        Some(0) => ((first, of_first), (second, of_second)),
        Some(1) => ((second, of_second), (first, of_first)),
        other => panic!("a bypass: {other:?}"),
    };
    assert!(ends.0.hand_back(), "the other one may serve");
    eventually("handed back", || ends.0.is_followed());
    eventually("the other one serves", || match taken_by(&lab, [&ends.1, &stays.1, &app]) {
        Some(1) => true,
        taker => taker.filter(|taker| *taker == 0).map(|_| false).expect("a bypass, or nobody"),
    });
    stop(&lab, ends.0);
    assert_eq!(taken_by(&lab, [&stays.1, &app]), Some(0));
    eventually("nobody is left", || !stays.0.has_predecessor());
    assert!(!stays.0.hand_back());
    stop(&lab, stays.0);
    assert!(!lab.pin_path.exists());
}

/// Also where the programs are not ones that are put in each other's place: on kernels before 6.6, and on cgroups alone.
#[test]
fn a_successor_waits_for_its_listeners() {
    let lab = Lab::new();
    let group = Group::new(None, "waits");
    let host = HostMode { cgroups: vec![group.path().to_owned()], ..HostMode::default() };
    let by_clsact = InterceptionConfig { force_clsact: true, ..closed(&lab) };
    let of_host = InterceptionConfig { host: Some(host), interfaces: Vec::new(), ..closed(&lab) };
    for (config, is_host) in [(by_clsact, false), (of_host, true)] {
        let mut process = Puppet::new(&lab.node, &group);
        let mut connects = || match is_host {
            true => drop(process.connect("10.201.9.2:80").expect("connects")),
            false => drop(lab.client.connect("10.201.2.2:80").expect("connects")),
        };
        let (first, old) = start(&lab, config.clone());
        let second = lab.start(config, 1);
        connects();
        accept(&old);
        let new = lab.node.listen_transparent("[::]:0");
        lab.node.run(|| second.set_listener(0, new.as_fd())).expect("listener");
        connects();
        accept(&new);
        stop(&lab, first);
        connects();
        accept(&new);
        stop(&lab, second);
        assert!(!lab.pin_path.exists());
    }
}

/// Who is told to end has pods' connections go their own way before its listeners close, and not when its last connection has ended.
#[test]
fn who_ends_in_order_lets_connections_pass_at_once() {
    let lab = Lab::new();
    let group = Group::new(None, "host");
    let host = HostMode { cgroups: vec![group.path().to_owned()], ..HostMode::default() };
    let app = lab.server.listen("[::]:80");
    let far = lab.neighbour.listen("[::]:80");
    let (interception, worker) = start(&lab, InterceptionConfig { host: Some(host), ..closed(&lab) });
    let mut process = Puppet::new(&lab.node, &group);
    process.connect("10.201.9.2:80").expect("connects");
    accept(&worker);
    let mut client = lab.client.connect("10.201.2.2:80").expect("connects");
    let (mut accepted, _) = accept(&worker);
    assert!(!interception.hand_back(), "there is no other daemon");
    interception.let_pass().expect("lets pass");
    assert_eq!(taken_by(&lab, [&worker, &app]), Some(1), "although the listener is there");
    drop(worker);
    assert_eq!(taken_by(&lab, [&app]), Some(0));
    process.connect("10.201.9.2:80").expect("connects");
    accept(&far);
    assert_eq!(counter(&interception, "passed_ending"), 3);
    assert_eq!(counter(&interception, "failed_closed"), 0);
    // What is open goes on.
    say(&mut client, &mut accepted);
    say(&mut accepted, &mut client);
    stop(&lab, interception);
    assert!(!lab.pin_path.exists());
}

/// A successor that comes while the daemon before it ends takes over as ever.
#[test]
fn who_ends_in_order_may_be_replaced_meanwhile() {
    let lab = Lab::new();
    let app = lab.server.listen("[::]:80");
    let (first, old) = start(&lab, closed(&lab));
    first.let_pass().expect("lets pass");
    assert_eq!(taken_by(&lab, [&old, &app]), Some(1));
    let (second, new) = start(&lab, closed(&lab));
    assert_eq!(taken_by(&lab, [&old, &new, &app]), Some(1));
    // Who ends does not take over again.
    drop((second, new));
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(taken_by(&lab, [&old, &app]), None, "the failure policy is in force");
    let (third, newest): (Interception, TcpListener) = start(&lab, closed(&lab));
    assert_eq!(taken_by(&lab, [&old, &newest, &app]), Some(1));
    lab.node.run(|| third.set_listener(0, newest.as_fd())).expect("again");
    stop(&lab, first);
    stop(&lab, third);
    assert!(!lab.pin_path.exists());
}
