//! Connections to pods, attached, on the running kernel: what is redirected with both addresses kept, what passes, and
//! what resets look like.

mod kernel_lab;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};

use culvert_proxy_daemon::intercept::{Interception, InterceptionConfig, Range, Traffic};
use kernel_lab::packets::{checksum, run_packet, syn};
use kernel_lab::relay::{canonical, mapped, relayed, talk};
use kernel_lab::*;

/// A configuration that redirects these connections of both pods.
fn config(lab: &Lab, traffic: Traffic) -> InterceptionConfig {
    let mut config = lab.config();
    config.pods.iter_mut().for_each(|pod| pod.policy.traffic = traffic);
    config
}

/// Interception with one worker, and its outbound and inbound listeners.
fn start(lab: &Lab, config: InterceptionConfig) -> (Interception, [TcpListener; 2]) {
    let interception = lab.start(config, 1);
    let listeners = [lab.node.listen_transparent("[::]:15001"), lab.node.listen_transparent("[::]:15006")];
    interception.set_listener(0, listeners[0].as_fd()).expect("outbound listener");
    interception.set_inbound_listener(0, listeners[1].as_fd()).expect("inbound listener");
    (interception, listeners)
}

#[test]
fn connections_from_elsewhere_keep_both_addresses() {
    let lab = Lab::new();
    let (interception, [_outbound, inbound]) = start(&lab, config(&lab, Traffic::Both));
    let app = lab.server.listen("[::]:80");
    let to = ["10.201.2.2:80", "[fd00:201:2::2]:80"];
    for to in to {
        relayed(&lab, &lab.neighbour, to, &inbound, &app);
    }
    relayed(&lab, &lab.neighbour, &mapped(to[0]), &inbound, &app);
    assert_eq!(counter(&interception, "redirected_inbound"), 3);
    assert_eq!(counter(&interception, "assign_failed"), 0);
    let pods = interception.pods();
    let server = pods.iter().find(|pod| pod.name == SERVER).expect("the server's status");
    assert!(server.enrolled);
    assert_eq!((server.inbound_connections, server.outbound_connections), (2, 0));
    assert!(server.bytes_received > 0 && server.bytes_sent > 0, "{server:?}");
    stop(&lab, interception);
}

#[test]
fn a_neighbour_on_the_node_is_redirected_once() {
    let lab = Lab::new();
    let mut one = config(&lab, Traffic::Both);
    one.pods.retain(|pod| pod.address.to_string() == SERVER || pod.address.to_string() == SERVER_V6);
    let (interception, [_outbound, inbound]) = start(&lab, one);
    let app = lab.server.listen("[::]:80");
    // The client is not enrolled: the server's policy counts.
    for to in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        relayed(&lab, &lab.client, to, &inbound, &app);
    }
    assert_eq!((counter(&interception, "redirected"), counter(&interception, "redirected_inbound")), (0, 2));
    stop(&lab, interception);
    drop((_outbound, inbound));

    // Both are: the client's counts, and what the daemon opens for it is not redirected again.
    let (interception, [outbound, _inbound]) = start(&lab, config(&lab, Traffic::Both));
    for to in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        relayed(&lab, &lab.client, to, &outbound, &app);
    }
    assert_eq!((counter(&interception, "redirected"), counter(&interception, "redirected_inbound")), (2, 0));
    stop(&lab, interception);
}

#[test]
fn by_default_connections_to_pods_pass_untouched() {
    let lab = Lab::new();
    let (interception, _listeners) = start(&lab, lab.config());
    let app = lab.server.listen("[::]:80");
    for to in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        let mut client = lab.neighbour.connect(to).expect("connects");
        let (mut accepted, peer) = accept(&app);
        assert_eq!(canonical(peer), client.local_addr().unwrap());
        talk(&mut client, &mut accepted);
    }
    assert_eq!(counter(&interception, "redirected_inbound"), 0);
    stop(&lab, interception);
}

/// istio#58531, cilium#48444.
#[test]
fn kubelet_probes_pass_untouched() {
    let lab = Lab::new();
    // Even without a worker, and although the pod is closed.
    let mut closed = closed_config();
    closed.pin_path = lab.pin_path.clone();
    closed.pods.iter_mut().for_each(|pod| pod.policy.traffic = Traffic::Both);
    let interception = lab.start(closed, 1);
    let app = lab.server.listen("[::]:80");
    for to in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        let mut probe = lab.node.connect(to).expect("the node connects");
        let (mut accepted, peer) = accept(&app);
        assert_eq!(canonical(peer), probe.local_addr().unwrap(), "from the node's own address");
        talk(&mut probe, &mut accepted);
    }
    assert_eq!(counter(&interception, "redirected_inbound"), 0);
    stop(&lab, interception);
}

#[test]
fn what_is_excluded_inbound_passes_untouched() {
    let lab = Lab::new();
    let mut both = config(&lab, Traffic::Both);
    both.inbound_excluded_ports = vec![9090];
    both.inbound_excluded_ranges = vec![Range::parse("fd00:201:9::/64").unwrap()];
    let (interception, [_outbound, inbound]) = start(&lab, both);
    for (to, name) in [
        ("10.201.2.2:9090", "passed_excluded_port"),
        ("[fd00:201:2::2]:9090", "passed_excluded_port"),
        ("[fd00:201:2::2]:80", "passed_excluded_range"),
    ] {
        let app = lab.server.listen(&format!("[::]:{}", to.rsplit_once(':').unwrap().1));
        let before = counter(&interception, name);
        let mut client = lab.neighbour.connect(to).expect("connects");
        talk(&mut client, &mut accept(&app).0);
        assert_eq!(counter(&interception, name), before + 1, "{to}");
    }
    lab.neighbour.connect("10.201.2.2:80").expect("the rest is redirected");
    accept(&inbound);
    // The outbound exclusions are others: port 9090 elsewhere is redirected.
    assert_eq!(counter(&interception, "redirected"), 0);
    lab.client.connect("10.96.0.10:9090").expect("redirected");
    assert_eq!(counter(&interception, "redirected"), 1);
    stop(&lab, interception);
}

#[test]
fn users_can_be_excluded() {
    const USER: u32 = 1337;
    let lab = Lab::new();
    let mut config = lab.config();
    config.excluded_uids = vec![USER];
    let (interception, [outbound, _inbound]) = start(&lab, config);
    let app = lab.server.listen("[::]:80");
    for to in ["10.201.2.2:80", "[fd00:201:2::2]:80"] {
        let connect = || {
            // SAFETY: no memory is passed; the thread ends with the closure.
            unsafe { nix::libc::setfsuid(USER) };
            connect_as("[::]:0", &mapped(to)).or_else(|_| std::net::TcpStream::connect(to).map(Stream))
        };
        let _client = lab.client.run(connect).expect("connects");
        accept(&app);
    }
    assert_eq!(counter(&interception, "passed_excluded_uid"), 2);
    lab.client.connect("10.201.2.2:80").expect("others are redirected");
    accept(&outbound);
    stop(&lab, interception);
}

#[test]
fn without_a_worker_closed_pods_get_a_reset_at_once() {
    let lab = Lab::new();
    let mut closed = closed_config();
    closed.pin_path = lab.pin_path.clone();
    closed.pods.iter_mut().for_each(|pod| pod.policy.traffic = Traffic::Both);
    let interception = lab.start(closed, 1);
    let _app = lab.server.listen("[::]:80");
    let from_elsewhere = [(&lab.neighbour, "10.201.2.2:80"), (&lab.neighbour, "[fd00:201:2::2]:80")];
    let from_pods = [(&lab.client, "10.96.0.10:80"), (&lab.client, "[fd00:96::10]:80"), (&lab.client, "10.201.2.2:80")];
    let mapped = (&lab.client, "[::ffff:10.201.9.2]:80");
    for (count, (client, to)) in from_elsewhere.into_iter().chain(from_pods).chain([mapped]).enumerate() {
        let error = client.connect_within(to, REFUSAL).err().unwrap_or_else(|| panic!("{to} connects"));
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}: {error}");
        assert_eq!(
            counter(&interception, "failed_closed"),
            count as u64 + 1,
            "{to}: not the first packet was answered"
        );
    }
    assert_eq!(counter(&interception, "reset_failed"), 0);
    stop(&lab, interception);
}

/// cilium#33168: a router on the way has a smaller MTU, and tells the pod, in whose name the daemon connected.
#[test]
fn packet_too_big_reaches_the_daemon() {
    let lab = Lab::new();
    let (interception, _listeners) = start(&lab, lab.config());
    let beyond = lab.beyond("10.201.10", "fd00:201:10:", 1300);
    let app = beyond.listen("[::]:80");
    for (from, to) in [("10.201.1.2:0", "10.201.10.2:80"), ("[fd00:201:1::2]:0", "[fd00:201:10::2]:80")] {
        let mut upstream = lab.node.run(|| connect_as(from, to)).expect("connects in the pod's name");
        let (mut accepted, _) = accept(&app);
        let payload = vec![7; 300_000];
        let writer = std::thread::spawn(move || upstream.write_all(&payload).map(|()| upstream));
        let mut received = vec![0; 300_000];
        accepted.read_exact(&mut received).unwrap_or_else(|error| panic!("{to}: the way's MTU is not known: {error}"));
        writer.join().unwrap().expect("writes");
    }
    assert!(counter(&interception, "icmp_steered") >= 2);
    stop(&lab, interception);
}

/// A sender that forbids no fragments, behind a router with a smaller MTU.
#[test]
fn fragments_of_redirected_connections_are_put_together() {
    const LENGTH: usize = 200_000;
    let lab = Lab::new();
    let (interception, [_outbound, worker]) = start(&lab, config(&lab, Traffic::Inbound));
    let beyond = lab.beyond("10.201.8", "fd00:201:8:", 1500);
    lab.neighbour.ip("link set eth0 mtu 1000");
    let mut client = beyond.connect(&format!("{CLIENT}:80")).expect("connects");
    let (never, length) = (nix::libc::IP_PMTUDISC_DONT, size_of::<nix::libc::c_int>() as nix::libc::socklen_t);
    // SAFETY: the option's value is an int.
    let result = unsafe {
        nix::libc::setsockopt(
            client.0.as_raw_fd(),
            nix::libc::IPPROTO_IP,
            nix::libc::IP_MTU_DISCOVER,
            (&raw const never).cast(),
            length,
        )
    };
    assert_eq!(result, 0, "IP_MTU_DISCOVER");
    let (mut accepted, _) = accept(&worker);
    let sent: Vec<u8> = (0..LENGTH).map(|place| (place % 251) as u8).collect();
    let mut received = vec![0; LENGTH];
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&sent).expect("writes"));
        accepted.read_exact(&mut received).expect("reads");
    });
    assert!(sent == received);
    let snmp = lab.node.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).expect("reads");
    let mut lines = snmp.lines().filter(|line| line.starts_with("Ip:")).map(|line| line.split_whitespace());
    let (names, numbers) = (lines.next().expect("names"), lines.next().expect("numbers"));
    let put_together = names.zip(numbers).find(|(name, _)| *name == "ReasmOKs").expect("is counted").1;
    assert_ne!(put_together, "0", "nothing came in pieces: {snmp}");
    assert_eq!(counter(&interception, "passed_fragment"), 0);
    stop(&lab, interception);
}

#[test]
fn ping_and_udp_pass() {
    let lab = Lab::new();
    let (interception, _listeners) = start(&lab, config(&lab, Traffic::Both));
    for (from, to) in
        [(&lab.client, SERVER), (&lab.client, SERVER_V6), (&lab.neighbour, SERVER), (&lab.client, NEIGHBOUR)]
    {
        let any = if to.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
        let to_port = |port: u16| SocketAddr::new(to.parse().unwrap(), port);
        let owner = if to == NEIGHBOUR { &lab.neighbour } else { &lab.server };
        let server = owner.run(|| std::net::UdpSocket::bind(to_port(53))).expect("UDP server");
        let client = from.run(|| std::net::UdpSocket::bind(any)).expect("UDP client");
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        server.set_read_timeout(Some(DEADLINE)).unwrap();
        // ztunnel#2060: more than 512 bytes, and more than a packet, which is sent in fragments.
        for size in [40, 1_200, 4_000] {
            client.send_to(&vec![1; size], to_port(53)).expect("sends");
            let mut answer = [0; 8_000];
            let (length, peer) = server.recv_from(&mut answer).expect("arrives");
            assert_eq!(length, size);
            assert_eq!(peer.port(), client.local_addr().unwrap().port());
            server.send_to(&answer[..length], peer).expect("answers");
            assert_eq!(client.recv(&mut answer).expect("the answer arrives"), size);
        }
        ping(from, to);
    }
    assert_eq!(counter(&interception, "redirected"), 0);
    stop(&lab, interception);
}

/// Waits for the answer to an echo request that is sent in fragments.
fn ping(from: &Namespace, to: &str) {
    from.sysctl("net/ipv4/ping_group_range", "0 2147483647");
    let to = SocketAddr::new(to.parse().unwrap(), 0);
    let (protocol, request, reply) =
        if to.is_ipv4() { (socket2::Protocol::ICMPV4, 8, 0) } else { (socket2::Protocol::ICMPV6, 128, 129) };
    let socket = from
        .run(|| socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::DGRAM, Some(protocol)))
        .expect("an ICMP socket");
    let mut message = vec![0_u8; 3_000];
    message[0] = request;
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send_to(&message, &to.into()).expect("sends");
    let mut socket = socket;
    let length = socket.read(&mut message).expect("an answer");
    assert_eq!((length, message[0]), (3_000, reply), "{to}");
}

#[test]
fn vlan_tags_do_no_harm() {
    let lab = Lab::new();
    let (interception, _listeners) = start(&lab, config(&lab, Traffic::Both));
    let mut frame = syn(false, &[]);
    // Priority 0, VLAN 5, on an interface that has no such VLAN: the kernel takes the tag off, and notes it.
    frame.splice(12..12, [0x81, 0, 0, 5]);
    lab.client.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, None).expect("packet socket");
        // SAFETY: plain integers, for which zero is a value.
        let mut address: nix::libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = nix::libc::AF_PACKET as u16;
        address.sll_ifindex = nix::net::if_::if_nametoindex("eth0").expect("eth0").cast_signed();
        // SAFETY: frame and address are as long as said.
        let sent = unsafe {
            nix::libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as nix::libc::socklen_t,
            )
        };
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
    });
    eventually("the tagged packet is left alone", || counter(&interception, "passed_vlan") == 1);
    assert_eq!(counter(&interception, "redirected"), 0);
    stop(&lab, interception);
}

/// Whether the program takes a packet is asked of the program alone, without a network.
#[test]
fn resets_are_well_formed() {
    const TC_ACT_REDIRECT: u32 = 7;
    let lab = Lab::new();
    let mut closed = closed_config();
    closed.pin_path = lab.pin_path.clone();
    let interception = lab.start(closed, 1);
    for (ipv6, options) in [(false, &[][..]), (false, &[1, 1, 1, 0]), (true, &[])] {
        let packet = syn(ipv6, options);
        let (verdict, reset) = run_packet(&lab, "pod1", &packet).expect("runs");
        assert_eq!(verdict, TC_ACT_REDIRECT);
        assert_eq!(reset.len(), packet.len());
        assert_eq!((&reset[..6], &reset[6..12]), (&packet[6..12], &packet[..6]), "the link addresses");
        let (ip, tcp) = if ipv6 { (14 + 8, 14 + 40) } else { (14 + 12, 14 + 20 + options.len()) };
        let length = if ipv6 { 16 } else { 4 };
        assert_eq!(reset[ip..ip + length], packet[ip + length..ip + 2 * length], "from the destination");
        assert_eq!(reset[ip + length..ip + 2 * length], packet[ip..ip + length], "to the source");
        if !ipv6 {
            assert_eq!(checksum(&[&reset[14..tcp]]), 0, "the IP header's checksum");
        }
        let segment = &reset[tcp..];
        assert_eq!(segment[..4], [0, 80, 0x9c, 0x40], "ports");
        assert_eq!(segment[4..12], [0, 0, 0, 0, 1, 2, 3, 5], "it acknowledges the SYN");
        assert_eq!(segment[13], 0x14, "RST and ACK");
        let sum = checksum(&[&reset[ip..ip + 2 * length], &[0, 6, 0, segment.len() as u8], segment]);
        assert_eq!(sum, 0, "the TCP checksum");
    }
    assert_eq!(counter(&interception, "failed_closed"), 3);
    stop(&lab, interception);
}

/// Whatever a pod sends, the programs neither drop nor change what is not theirs.
#[test]
fn odd_packets_pass_unchanged() {
    const UNTOUCHED: u32 = u32::MAX;
    let lab = Lab::new();
    let mut closed = closed_config();
    closed.pin_path = lab.pin_path.clone();
    closed.pods.iter_mut().for_each(|pod| pod.policy.traffic = Traffic::Both);
    let interception = lab.start(closed, 1);
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut passed = 0;
    for round in 0..4_000 {
        let mut packet = syn(round % 2 == 0, &[]);
        // Not a SYN: it belongs to nobody here.
        let flags = packet.len() - 24 + 13;
        packet[flags] = 0x10;
        for _ in 0..random() % 4 {
            let at = (random() % packet.len() as u64) as usize;
            packet[at] = random() as u8;
        }
        if round % 3 == 0 {
            packet.truncate(14 + (random() % (packet.len() as u64 - 14)) as usize);
        }
        for interface in ["pod1", "up0"] {
            // The kernel itself refuses what is no frame.
            let Some((verdict, after)) = run_packet(&lab, interface, &packet) else { continue };
            if verdict == UNTOUCHED {
                assert_eq!(after, packet, "changed on {interface}");
                passed += 1;
            }
            assert!(matches!(verdict, UNTOUCHED | 0 | 7), "{verdict} for {packet:02x?}");
        }
    }
    assert!(passed > 4_000, "{passed}");
    stop(&lab, interception);
}
