//! Pods that are ports of one bridge, as Docker and the bridge plugin wire them: what they send to each other is for the
//! daemon too, although the bridge would not have shown it to the node.

mod kernel_lab;

use std::io::{ErrorKind, Read as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;

use culvert_proxy_daemon::intercept::{FailurePolicy, Interception, InterceptionConfig, Pod, Policy, Traffic};
use kernel_lab::manifests::{Manifests, pod};
use kernel_lab::packets::run_packet;
use kernel_lab::relay::{canonical, mapped, relayed, talk};
use kernel_lab::*;

/// The pods' addresses, of both families.
const ONE: [&str; 2] = ["10.201.5.2", "fd00:201:5::2"];
const OTHER: [&str; 2] = ["10.201.5.3", "fd00:201:5::3"];

/// Two pods on the bridge `br5`, over the ports `pod5` and `pod6`.
fn bridge(lab: &Lab) -> [Namespace; 2] {
    lab.node.ip("link add br5 type bridge");
    lab.node.ip("addr add 10.201.5.1/24 dev br5");
    lab.node.ip("addr add fd00:201:5::1/64 dev br5 nodad");
    lab.node.ip("link set br5 up");
    [("one", "pod5", ONE), ("other", "pod6", OTHER)].map(|(name, port, [v4, v6])| {
        let pod = Namespace::new(lab.client.name.replace("-client", &format!("-{name}")));
        lab.node.ip(&format!("link add {port} type veth peer name eth0 netns {}", pod.name));
        lab.node.ip(&format!("link set {port} master br5"));
        lab.node.ip(&format!("link set {port} up"));
        pod.ip(&format!("addr add {v4}/24 dev eth0"));
        pod.ip(&format!("addr add {v6}/64 dev eth0 nodad"));
        pod.ip("link set eth0 up");
        pod.ip("route add default via 10.201.5.1");
        pod.ip("-6 route add default via fd00:201:5::1");
        pod
    })
}

fn config(lab: &Lab, interfaces: &str, pods: &[[&str; 2]], policy: Policy) -> InterceptionConfig {
    let pods = pods.iter().flatten().map(|address| Pod { address: address.parse().unwrap(), policy }).collect();
    InterceptionConfig { interfaces: vec![interfaces.to_owned()], pods, ..lab.config() }
}

fn policy(traffic: Traffic, failure_policy: FailurePolicy) -> Policy {
    Policy { traffic, failure_policy, ..Policy::default() }
}

/// Interception with one worker, and its outbound and inbound listeners.
fn start(lab: &Lab, config: InterceptionConfig) -> (Interception, [TcpListener; 2]) {
    let interception = lab.start(config, 1);
    let listeners = [(); 2].map(|()| lab.node.listen_transparent("[::]:0"));
    lab.node.run(|| {
        interception.set_listener(0, listeners[0].as_fd()).expect("outbound listener");
        interception.set_inbound_listener(0, listeners[1].as_fd()).expect("inbound listener");
    });
    (interception, listeners)
}

/// An address with a port, also in the form that a dual-stack program uses.
fn urls([v4, v6]: [&str; 2]) -> [String; 3] {
    let v4 = format!("{v4}:80");
    [mapped(&v4), v4, format!("[{v6}]:80")]
}

#[test]
fn what_neighbours_on_a_bridge_send_to_each_other_is_redirected() {
    let lab = Lab::new();
    let [one, other] = bridge(&lab);
    let (at_one, at_other) = (one.listen("[::]:80"), other.listen("[::]:80"));
    // Named are the ports, or the bridge, which stands for them.
    for interfaces in ["pod*", "br5"] {
        let both = policy(Traffic::Both, FailurePolicy::Closed);
        let (interception, [outbound, inbound]) = start(&lab, config(&lab, interfaces, &[ONE, OTHER], both));
        for to in urls(OTHER) {
            relayed(&lab, &one, &to, &outbound, &at_other);
        }
        for to in urls(ONE) {
            relayed(&lab, &other, &to, &outbound, &at_one);
        }
        assert_eq!((counter(&interception, "redirected"), counter(&interception, "redirected_inbound")), (6, 0));
        // Others than neighbours.
        let far = lab.neighbour.listen("[::]:80");
        for to in urls([NEIGHBOUR, NEIGHBOUR_V6]) {
            let _client = one.connect(&to).expect("elsewhere");
            let (accepted, _) = accept(&outbound);
            assert_eq!(canonical(accepted.local_addr().unwrap()).port(), 80);
        }
        drop(far);
        // The node's own probes.
        for to in urls(ONE) {
            let mut probe = lab.node.connect(&to).expect("a probe");
            talk(&mut probe, &mut accept(&at_one).0);
        }
        assert_eq!(counter(&interception, "assign_failed"), 0);
        stop(&lab, interception);
        drop((outbound, inbound));
    }
    // Nobody is left in the way.
    for to in urls(OTHER) {
        let mut client = one.connect(&to).expect("connects");
        talk(&mut client, &mut accept(&at_other).0);
    }
}

#[test]
fn a_neighbour_on_a_bridge_is_subject_to_the_receivers_policy() {
    let lab = Lab::new();
    let [one, other] = bridge(&lab);
    let app = other.listen("[::]:80");
    let inbound = policy(Traffic::Inbound, FailurePolicy::Open);
    let (interception, [_outbound, worker]) = start(&lab, config(&lab, "pod*", &[OTHER], inbound));
    for to in urls(OTHER) {
        relayed(&lab, &one, &to, &worker, &app);
    }
    assert_eq!((counter(&interception, "redirected"), counter(&interception, "redirected_inbound")), (0, 3));
    // A port that comes later, and one that is given to the bridge later.
    lab.node.ip("link set pod5 nomaster");
    lab.node.ip("link set pod5 master br5");
    eventually("the port is led up again", || {
        let Ok(_client) = one.connect_within("10.201.5.3:80", REFUSAL) else { return false };
        // By the bridge, until that is known.
        accept_within(&worker, std::time::Duration::from_millis(50)).is_some() || {
            accept(&app);
            false
        }
    });
    stop(&lab, interception);
}

#[test]
fn failure_policies_hold_between_neighbours_on_a_bridge() {
    let lab = Lab::new();
    let [one, other] = bridge(&lab);
    let app = other.listen("[::]:80");
    for (traffic, enrolled) in [(Traffic::Outbound, ONE), (Traffic::Inbound, OTHER)] {
        // No worker listens.
        let interception = lab.start(config(&lab, "pod*", &[enrolled], policy(traffic, FailurePolicy::Closed)), 1);
        for to in urls(OTHER) {
            let error = one.connect_within(&to, REFUSAL).err().unwrap_or_else(|| panic!("{to} connects"));
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}: {error}");
        }
        assert_eq!(counter(&interception, "failed_closed"), 3);
        stop(&lab, interception);
        let interception = lab.start(config(&lab, "pod*", &[enrolled], policy(traffic, FailurePolicy::Open)), 1);
        for to in urls(OTHER) {
            let mut client = one.connect(&to).unwrap_or_else(|error| panic!("{to}: {error}"));
            talk(&mut client, &mut accept(&app).0);
        }
        assert_eq!(counter(&interception, "failed_open"), 3);
        stop(&lab, interception);
    }
}

/// Where a bridge lets go of the socket that a program has chosen, the lookup of listeners chooses again: the successor's, and not those that
/// are about to close.
#[test]
fn a_successor_has_what_neighbours_on_a_bridge_send() {
    let lab = Lab::new();
    let [one, _other] = bridge(&lab);
    let config = || config(&lab, "pod*", &[ONE, OTHER], policy(Traffic::Outbound, FailurePolicy::Closed));
    let (first, _old) = start(&lab, config());
    let (second, [new, _]) = start(&lab, config());
    let connects = || {
        for to in urls(OTHER) {
            let _client = one.connect(&to).unwrap_or_else(|error| panic!("{to}: {error}"));
            accept(&new);
        }
    };
    connects();
    stop(&lab, first);
    connects();
    stop(&lab, second);
}

/// What comes over them would pass the daemon by, whatever pods are behind them.
#[test]
fn ports_that_nothing_names_keep_the_node_from_being_ready() {
    let lab = Lab::new();
    let _pods = bridge(&lab);
    let wanted = policy(Traffic::Both, FailurePolicy::Closed);
    let (interception, _listeners) = start(&lab, config(&lab, "pod5", &[], wanted));
    let addresses = OTHER.map(|address| address.parse().unwrap()).to_vec();
    interception.enrol(Some("other".to_owned()), addresses, None, None, None).expect("enrols");
    let is_told = || interception.faults().iter().any(|fault| fault.contains("pod6 of br5"));
    assert!(is_told(), "{:?}", interception.faults());
    lab.node.ip("link set pod6 nomaster");
    eventually("there is no such port any more", || !is_told());
    stop(&lab, interception);
}

/// Over which port of a bridge a pod comes is not known: what Kubernetes says tells that it is gone.
#[test]
fn connections_of_a_pod_on_a_bridge_end_with_the_pod() {
    let lab = Lab::new();
    let [one, _other] = bridge(&lab);
    let manifests = Manifests::new(&lab);
    let (interception, [outbound, _inbound]) = start(&lab, manifests.config(&lab));
    let enrolled = |name: &str| pod(&interception, name).is_some_and(|pod| pod.enrolled);
    manifests.write("one", "on", ONE[0], "");
    eventually("enrolled", || enrolled("default/one"));
    let mut client = one.connect("10.96.0.10:80").expect("redirected");
    let (mut accepted, _) = accept(&outbound);
    // Of another policy, and enrolled again.
    manifests.write("one", "off", ONE[0], "");
    eventually("not enrolled", || !enrolled("default/one"));
    talk(&mut client, &mut accepted);
    manifests.write("one", "on", ONE[0], "");
    eventually("enrolled", || enrolled("default/one"));
    talk(&mut client, &mut accepted);
    manifests.remove("one");
    let error = accepted.read(&mut [0]).expect_err("it goes on");
    assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
    eventually("it is counted", || counter(&interception, "ended_connections") == 1);
    stop(&lab, interception);
}

/// What a packet becomes is asked of the program alone: one that is for the daemon has the port's own link-layer address
/// afterwards, which makes the bridge give it to the node.
#[test]
fn packets_for_the_daemon_are_addressed_to_the_port() {
    const TAKEN: u32 = 0;
    const UNTOUCHED: u32 = u32::MAX;
    let lab = Lab::new();
    let _pods = bridge(&lab);
    let both = policy(Traffic::Both, FailurePolicy::Open);
    let (interception, _listeners) = start(&lab, config(&lab, "pod*", &[ONE, OTHER], both));
    let app = lab.neighbour.listen("10.201.9.2:80");
    let upstream = lab.node.run(|| connect_as("10.201.5.2:0", "10.201.9.2:80")).expect("connects in the pod's name");
    accept(&app);
    let port = upstream.local_addr().unwrap().port();
    let own_address = |interface: &str| -> Vec<u8> {
        let shown = lab.node.ip(&format!("link show {interface}"));
        let mut words = shown.split_whitespace();
        let address = words.by_ref().find(|word| *word == "link/ether").and_then(|_| words.next()).expect("an address");
        address.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
    };
    let about_daemon = too_big(port);
    let about_nobody = too_big(port ^ 1);
    for (interface, is_port) in [("pod5", true), ("pod6", true), ("pod1", false)] {
        let (verdict, after) = run_packet(&lab, interface, &about_daemon).expect("runs");
        assert_eq!(verdict, TAKEN, "{interface}");
        let addressed_to = if is_port { own_address(interface) } else { about_daemon[..6].to_vec() };
        assert_eq!(after[..6], addressed_to, "{interface}");
        assert_eq!(after[6..], about_daemon[6..], "{interface}");
        let (verdict, after) = run_packet(&lab, interface, &about_nobody).expect("runs");
        assert_eq!((verdict, after), (UNTOUCHED, about_nobody.clone()), "{interface}");
    }
    stop(&lab, interception);
}

/// An ICMP error that a neighbour sends about a connection of [`ONE`], from this port, to a host elsewhere.
fn too_big(port: u16) -> Vec<u8> {
    let header = |protocol: u8, length: u8, source: &str, destination: &str| -> Vec<u8> {
        let of = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
        [&[0x45, 0, 0, length, 0, 1, 0, 0, 17, protocol, 0, 0], &of(source)[..], &of(destination)[..]].concat()
    };
    let tcp = [&port.to_be_bytes()[..], &[0, 80, 1, 2, 3, 4]].concat();
    let inner = header(6, 200, ONE[0], NEIGHBOUR);
    let icmp = [3, 4, 0, 0, 0, 0, 2, 88];
    let outer = header(1, (20 + icmp.len() + inner.len() + tcp.len()) as u8, OTHER[0], ONE[0]);
    let ethernet = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    [&ethernet[..], &outer, &icmp, &inner, &tcp].concat()
}
