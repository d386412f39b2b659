//! Pods that are gone, on the running kernel: their connections end, and whoever has their addresses next finds no port taken.
//! ztunnel#1629, istio#46628.

mod kernel_lab;

use std::io::{ErrorKind, Read as _};
use std::time::Duration;

use culvert_proxy_daemon::intercept::InterceptionConfig;
use kernel_lab::puppet::{self, Group, Puppet};
use kernel_lab::relay::talk;
use kernel_lab::*;

/// Not a test of its own: what another process of the node does.
#[test]
fn play_the_puppet() {
    puppet::play();
}

#[test]
fn connections_of_a_pod_that_is_gone_end_and_their_ports_are_free() {
    let lab = Lab::new();
    let (interception, worker) = start(&lab, InterceptionConfig { pods: Vec::new(), ..lab.config() });
    let enrol = |name: &str, addresses: [&str; 2]| {
        let addresses = addresses.map(|address| address.parse().unwrap()).to_vec();
        interception.enrol(Some(name.to_owned()), addresses, None, None, None).expect("enrols");
    };
    enrol("client", [CLIENT, CLIENT_V6]);
    enrol("server", [SERVER, SERVER_V6]);
    let targets = ["10.201.9.2:80", "[fd00:201:9::2]:80"];
    let far = lab.neighbour.listen("[::]:80");

    let mut other = lab.server.connect(targets[0]).expect("redirected");
    let (mut others, _) = accept(&worker);
    let mut open = Vec::new();
    for (own, to) in ["10.201.1.2:0", "[fd00:201:1::2]:0"].into_iter().zip(targets) {
        let mut client = lab.client.connect(to).expect("redirected");
        let (mut accepted, _) = accept(&worker);
        talk(&mut client, &mut accepted);
        let mut upstream = lab.node.run(|| connect_as(own, to)).expect("connects in the pod's name");
        let (mut served, _) = accept(&far);
        talk(&mut upstream, &mut served);
        open.push((client, accepted, upstream, served));
    }

    // A pod that is taken out and lives keeps them.
    interception.unenrol("client").expect("unenrols");
    for (client, accepted, upstream, served) in &mut open {
        talk(client, accepted);
        talk(upstream, served);
    }
    assert_eq!(counter(&interception, "ended_connections"), 0);

    lab.node.ip("link delete pod1");
    let mut ports = Vec::new();
    for (client, mut accepted, mut upstream, mut served) in open {
        ports.push([client.local_addr().unwrap(), upstream.local_addr().unwrap()]);
        for stream in [&mut accepted, &mut upstream] {
            let error = stream.read(&mut [0]).expect_err("it goes on");
            assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
        }
        let error = served.read(&mut [0]).expect_err("it goes on");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        // Its namespace goes with a pod.
        socket2::SockRef::from(&client.0).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    }
    eventually("they are counted", || counter(&interception, "ended_connections") == 4);
    talk(&mut other, &mut others);

    // Another pod, of which nobody says anything, has the address and uses the ports.
    lab.rewire_client();
    for (from, to) in ports.into_iter().zip(targets).flat_map(|(ports, to)| ports.map(|port| (port, to))) {
        let mut client = lab.client.run(|| connect_as(&from.to_string(), to)).unwrap_or_else(|error| {
            panic!("{from} -> {to}: {error}");
        });
        talk(&mut client, &mut accept(&far).0);
    }
    stop(&lab, interception);
}

/// The kubelet connects to pods, and so do others of the node: in its own name, as the daemon does without `original_src`. Only
/// what the daemon has is its to end.
#[test]
fn connections_of_others_in_the_nodes_own_name_are_left_alone() {
    let lab = Lab::new();
    let (interception, _worker) = start(&lab, InterceptionConfig { pods: Vec::new(), ..lab.config() });
    let group = Group::new(None, "kubelet");
    let mut other = Puppet::new(&lab.node, &group);
    let mut open = Vec::new();
    // The node's addresses on its uplink outlive the pods.
    let sources = [NODE, "fd00:201:9::1"];
    for (pod, interface, addresses) in
        [(&lab.client, "pod1", [CLIENT, CLIENT_V6]), (&lab.server, "pod2", [SERVER, SERVER_V6])]
    {
        let all = addresses.map(|address| address.parse().unwrap()).to_vec();
        interception.enrol(Some(interface.to_owned()), all, None, None, None).expect("enrols");
        let app = pod.listen("[::]:80");
        for (address, source) in addresses.into_iter().zip(sources) {
            lab.node.ip(&format!("route add {address} dev {interface} src {source}"));
        }
        let [v4, v6] = addresses;
        for to in [format!("{v4}:80"), format!("[{v6}]:80")] {
            let (number, _) = other.connect(&to).expect("connects");
            let theirs = accept(&app).0;
            let mut mine = lab.node.connect(&to).expect("connects");
            let (mut served, _) = accept(&app);
            talk(&mut mine, &mut served);
            assert!(sources.contains(&&*mine.local_addr().unwrap().ip().to_string()));
            open.push((interface, number, mine, theirs, served));
        }
    }
    // With the second one it is over what the first one began.
    for gone in ["pod1", "pod2"] {
        lab.node.ip(&format!("link delete {gone}"));
        for (_, _, mine, _, _) in open.iter_mut().filter(|(interface, ..)| *interface == gone) {
            let error = mine.read(&mut [0]).expect_err("it goes on");
            assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
        }
    }
    eventually("they are counted", || counter(&interception, "ended_connections") == 4);
    for (interface, number, ..) in &open {
        let peer = other.order(&format!("peer {number}"));
        assert!(peer.is_ok(), "{interface}: the other process's connection is gone: {peer:?}");
    }
    stop(&lab, interception);
}
