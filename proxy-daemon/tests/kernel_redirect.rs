//! The packet programs, attached, on the running kernel: what is redirected, what passes, what is dropped.

mod kernel_lab;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use culvert_proxy_daemon::intercept::{Interception, Range};
use kernel_lab::*;

/// Interception with one worker that takes both families.
fn start(lab: &Lab) -> (Interception, TcpListener) {
    let mut config = lab.config();
    config.excluded_ports = vec![9090];
    config.excluded_ranges = ["10.201.9.0/24", "fd00:201:9::/64"].map(|text| Range::parse(text).unwrap()).to_vec();
    let interception = lab.start(config, 1);
    let worker = lab.node.listen_transparent("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    (interception, worker)
}

/// Sends a word each way.
fn talk(one: &mut Stream, other: &mut Stream) {
    say(one, other);
    say(other, one);
}

fn say(from: &mut Stream, to: &mut Stream) {
    from.write_all(b"hello").expect("write");
    let mut word = [0; 5];
    to.read_exact(&mut word).expect("read");
    assert_eq!(&word, b"hello");
}

/// The address as which an IPv4 connection appears on a dual-stack listener, in its IPv4 form.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[test]
fn new_connections_reach_a_worker_with_their_destination() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 2);
    let workers = [lab.node.listen_transparent("0.0.0.0:15001"), lab.node.listen_transparent("[::]:15002")];
    interception.set_listener(0, workers[0].as_fd()).expect("IPv4 listener");
    interception.set_listener(1, workers[1].as_fd()).expect("dual-stack listener");

    // Worker 1 is the only one that takes IPv6; IPv4 goes to both.
    for destination in ["[fd00:96::10]:80", "[fd00:201:9::2]:443"] {
        let mut client = lab.client.connect(destination).expect("IPv6 connects");
        let (mut accepted, peer) = accept(&workers[1]);
        assert_eq!(accepted.local_addr().unwrap().to_string(), destination);
        assert_eq!(peer, client.local_addr().unwrap());
        talk(&mut client, &mut accepted);
    }
    let mut taken = [0, 0];
    while taken.contains(&0) {
        assert!(taken[0] + taken[1] < 100, "one worker gets everything: {taken:?}");
        let mut client = lab.client.connect("10.96.0.10:80").expect("IPv4 connects");
        let (worker, (mut accepted, peer)) = (0..2)
            .cycle()
            .find_map(|worker| accept_within(&workers[worker], Duration::from_millis(5)).map(|found| (worker, found)))
            .expect("a worker accepts");
        taken[worker] += 1;
        assert_eq!(canonical(accepted.local_addr().unwrap()).to_string(), "10.96.0.10:80");
        assert_eq!(canonical(peer), client.local_addr().unwrap());
        talk(&mut client, &mut accepted);
    }
    assert_eq!(counter(&interception, "redirected"), 2 + taken[0] + taken[1]);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_worker_that_does_not_listen_is_stood_in_for() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 8);
    let worker = lab.node.listen_transparent("0.0.0.0:15001");
    interception.set_listener(5, worker.as_fd()).expect("listener");
    for _ in 0..20 {
        lab.client.connect("10.96.0.10:80").expect("connects");
        accept(&worker);
    }
    assert!(counter(&interception, "listener_missing") > 0);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn what_is_excluded_passes_untouched() {
    let lab = Lab::new();
    let (interception, worker) = start(&lab);
    let by_port = lab.server.listen("[::]:9090");
    let by_range = lab.neighbour.listen("[::]:80");
    let own = lab.node.listen("[::]:8081");
    for (destination, listener, name) in [
        ("10.201.2.2:9090", &by_port, "passed_excluded_port"),
        ("[fd00:201:2::2]:9090", &by_port, "passed_excluded_port"),
        ("10.201.9.2:80", &by_range, "passed_excluded_range"),
        ("[fd00:201:9::2]:80", &by_range, "passed_excluded_range"),
        ("10.201.1.1:8081", &own, "passed_local"),
        ("[fd00:201:1::1]:8081", &own, "passed_local"),
    ] {
        let before = counter(&interception, name);
        let mut client = lab.client.connect(destination).unwrap_or_else(|error| panic!("{destination}: {error}"));
        let (mut accepted, peer) = accept(listener);
        assert_eq!(canonical(peer), client.local_addr().unwrap(), "{destination}: the source is kept");
        talk(&mut client, &mut accepted);
        assert_eq!(counter(&interception, name), before + 1, "{destination}");
    }
    assert_eq!(counter(&interception, "redirected"), 0);
    assert!(accept_within(&worker, Duration::ZERO).is_none());
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn an_address_that_is_not_enrolled_passes_untouched() {
    let lab = Lab::new();
    let mut config = lab.config();
    config.pods.retain(|pod| pod.address.to_string() == SERVER);
    let interception = lab.start(config, 1);
    let worker = lab.node.listen_transparent("0.0.0.0:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    let app = lab.server.listen("0.0.0.0:80");
    // Replies of the enrolled server pass too.
    let mut client = lab.client.connect("10.201.2.2:80").expect("connects");
    talk(&mut client, &mut accept(&app).0);
    let mut neighbour = lab.neighbour.connect("10.201.2.2:80").expect("connects");
    talk(&mut neighbour, &mut accept(&app).0);
    assert_eq!(counter(&interception, "passed_not_enrolled"), 1);
    assert_eq!(counter(&interception, "redirected"), 0);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn the_daemon_connects_in_a_pods_name() {
    let lab = Lab::new();
    let (interception, _worker) = start(&lab);
    // On the same node, replies come in from the server's interface; from elsewhere, from the uplink.
    let near = lab.server.listen("[::]:80");
    let far = lab.neighbour.listen("[::]:80");
    for (from, to, listener) in [
        ("10.201.1.2:0", "10.201.2.2:80", &near),
        ("[fd00:201:1::2]:0", "[fd00:201:2::2]:80", &near),
        ("10.201.1.2:0", "10.201.9.2:80", &far),
        ("[fd00:201:1::2]:0", "[fd00:201:9::2]:80", &far),
    ] {
        let mut upstream =
            lab.node.run(|| connect_as(from, to)).unwrap_or_else(|error| panic!("{from} to {to}: {error}"));
        let (mut accepted, peer) = accept(listener);
        assert_eq!(canonical(peer).ip(), from.parse::<SocketAddr>().unwrap().ip(), "the server sees the pod");
        talk(&mut upstream, &mut accepted);
    }
    assert!(counter(&interception, "steered") > 0);
    assert_eq!(counter(&interception, "assign_failed"), 0);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn ip_options_do_not_hide_a_connection() {
    let lab = Lab::new();
    let (interception, worker) = start(&lab);
    let client = lab.client.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("socket");
        // Three no-operations and the end of the list: a header of six words.
        let options = [1_u8, 1, 1, 0];
        // SAFETY: the option's value is bytes, as many as the length says.
        let result = unsafe {
            nix::libc::setsockopt(
                socket.as_raw_fd(),
                nix::libc::IPPROTO_IP,
                nix::libc::IP_OPTIONS,
                options.as_ptr().cast(),
                options.len() as nix::libc::socklen_t,
            )
        };
        assert_eq!(result, 0, "IP_OPTIONS");
        let to: SocketAddr = "10.96.0.10:80".parse().unwrap();
        socket.connect_timeout(&to.into(), DEADLINE).map(|()| socket)
    });
    client.expect("connects");
    assert_eq!(canonical(accept(&worker).0.local_addr().unwrap()).to_string(), "10.96.0.10:80");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn packets_that_cannot_be_read_pass_and_are_counted() {
    let lab = Lab::new();
    let (interception, _worker) = start(&lab);
    let destination = "10.201.9.2";
    // A fragment of a TCP packet, a header that is too short, and a TCP header that is cut off.
    let fragment = ipv4_packet(0x45, 0x2000, &[0; 20]);
    let short_header = ipv4_packet(0x44, 0, &[0; 20]);
    let cut_off = ipv4_packet(0x45, 0, &[0; 4]);
    for (packet, name) in
        [(fragment, "passed_fragment"), (short_header, "passed_truncated"), (cut_off, "passed_truncated")]
    {
        let before = counter(&interception, name);
        lab.client.run(|| send_frame("eth0", &packet));
        eventually(name, || counter(&interception, name) > before);
    }
    // A hop-by-hop header, and a fragment's; what is not TCP (here UDP) is nobody's business.
    for (header, name) in [(0, "passed_extension_header"), (44, "passed_fragment")] {
        let before = counter(&interception, name);
        for protocol in [17, 6] {
            let packet = ipv6_packet(header, protocol);
            lab.client.run(|| send_frame("eth0", &packet));
        }
        eventually(name, || counter(&interception, name) > before);
        assert_eq!(counter(&interception, name), before + 1, "{name}");
    }
    assert_eq!(counter(&interception, "redirected"), 0, "{destination}");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// An IPv4 TCP packet from the client pod to the neighbour.
fn ipv4_packet(version_and_length: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let [fragment_high, fragment_low] = fragment.to_be_bytes();
    let length = 20 + payload.len() as u8;
    let mut packet = vec![version_and_length, 0, 0, length, 0, 1, fragment_high, fragment_low, 64, 6, 0, 0];
    packet.extend([10, 201, 1, 2, 10, 201, 9, 2]);
    packet.extend(payload);
    packet
}

/// An IPv6 packet with an extension header of eight bytes before what it carries.
fn ipv6_packet(header: u8, protocol: u8) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 28, header, 64];
    for address in ["fd00:201:1::2", "fd00:201:9::2"] {
        packet.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    packet.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
    packet.extend([0; 20]);
    packet
}

/// Puts a packet on an interface as it is; the kernel adds the link-layer header.
fn send_frame(interface: &str, packet: &[u8]) {
    let is_ipv6 = packet[0] >> 4 == 6;
    let protocol = if is_ipv6 { nix::libc::ETH_P_IPV6 } else { nix::libc::ETH_P_IP } as u16;
    let socket = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::DGRAM, None).expect("packet socket");
    // SAFETY: plain integers, for which zero is a value.
    let mut address: nix::libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = nix::libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(interface).expect("interface") as i32;
    address.sll_halen = 6;
    // Any destination: the other end of a veth pair hears broadcasts.
    address.sll_addr = [0xff; 8];
    // SAFETY: packet and address are as long as said.
    let sent = unsafe {
        nix::libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as nix::libc::socklen_t,
        )
    };
    assert_eq!(sent, packet.len() as isize, "{}", std::io::Error::last_os_error());
}

/// How often a socket has sent something again.
fn retransmissions(stream: &Stream) -> u32 {
    // SAFETY: plain integers, for which zero is a value.
    let mut info: nix::libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as nix::libc::socklen_t;
    // SAFETY: `length` tells the size of `info`.
    let result = unsafe {
        nix::libc::getsockopt(
            stream.0.as_raw_fd(),
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "TCP_INFO");
    info.tcpi_total_retrans
}

#[test]
fn a_port_may_be_used_again_while_the_daemon_remembers_its_last_connection() {
    let lab = Lab::new();
    let (interception, worker) = start(&lab);
    for (round, (from, to)) in [("10.201.1.2:45678", "10.96.0.10:80"), ("[fd00:201:1::2]:45678", "[fd00:96::10]:80")]
        .into_iter()
        .cycle()
        .take(4)
        .enumerate()
    {
        let mut client = lab.client.run(|| connect_as(from, to)).expect("connects");
        assert_eq!(retransmissions(&client), 0, "round {round}: the first packet got no answer");
        let (mut accepted, peer) = accept(&worker);
        assert_eq!(peer.port(), 45678);
        talk(&mut client, &mut accepted);
        // Who closes first remembers: the daemon does.
        drop(accepted);
        assert_eq!(client.read(&mut [0]).expect("the end"), 0);
        drop(client);
    }
    assert_eq!((counter(&interception, "redirected"), counter(&interception, "reopened")), (2, 2));
    for own in [CLIENT, CLIENT_V6] {
        let pod = interception.pods().into_iter().find(|pod| pod.name == own).expect("the pod is known");
        assert_eq!(pod.outbound_connections, 2, "{own}: each is one of its connections");
    }
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_listener_that_cannot_serve_is_refused_in_words() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 1);
    let plain = lab.node.listen("0.0.0.0:15001");
    let error = interception.set_listener(0, plain.as_fd()).unwrap_err().to_string();
    assert!(error.contains("worker 0's listener") && error.contains("transparent"), "{error}");
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let error = interception.set_listener(0, silent.as_fd()).unwrap_err().to_string();
    assert!(error.contains("does not listen"), "{error}");
    let good = lab.node.listen_transparent("0.0.0.0:15002");
    let error = interception.set_listener(128, good.as_fd()).unwrap_err().to_string();
    assert!(error.contains("128 workers"), "{error}");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}
