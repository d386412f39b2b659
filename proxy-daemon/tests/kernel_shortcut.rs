//! The short cut, attached, on the running kernel: nothing lost, nothing reordered, nothing unbounded.

mod kernel_lab;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use culvert_proxy_daemon::intercept::{Acceleration, Interception};
use kernel_lab::*;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

const MIB: u64 = 1 << 20;

/// A node with the short cut on, both ways, and its worker's listener.
fn start(lab: &mut Lab) -> (Interception, TcpListener) {
    start_with(lab, Acceleration::BothWays)
}

/// Likewise, with pods of this level.
fn start_with(lab: &mut Lab, level: Acceleration) -> (Interception, TcpListener) {
    let mut config = lab.config();
    config.pods.iter_mut().for_each(|pod| pod.policy.acceleration = level);
    config.shortcut_cgroup = Some(lab.cgroup());
    config.excluded_ports = vec![9090];
    let interception = lab.start(config, 1);
    let worker = lab.node.listen_transparent("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    (interception, worker)
}

/// How many bytes a socket sent by TCP.
fn tcp_bytes_sent(stream: &Stream) -> u64 {
    let mut info = [0_u8; 256];
    let mut length = info.len() as nix::libc::socklen_t;
    // SAFETY: `length` tells the size of `info`.
    let result = unsafe {
        nix::libc::getsockopt(
            stream.0.as_raw_fd(),
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    assert_eq!(result, 0, "TCP_INFO");
    // tcpi_bytes_sent less tcpi_bytes_retrans (Linux 4.19).
    let field = |at: usize| u64::from_ne_bytes(info[at..at + 8].try_into().unwrap());
    field(200) - field(208)
}

/// Lets a listener's connections be established when their first bytes come.
fn defer_accept(listener: &TcpListener) {
    let seconds: nix::libc::c_int = 1;
    // SAFETY: the option's value is an int.
    let result = unsafe {
        nix::libc::setsockopt(
            listener.as_raw_fd(),
            nix::libc::IPPROTO_TCP,
            nix::libc::TCP_DEFER_ACCEPT,
            (&raw const seconds).cast(),
            size_of_val(&seconds) as nix::libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "TCP_DEFER_ACCEPT");
}

/// The byte at a place of a stream: neighbours, and places a power of two apart, differ.
fn byte_at(seed: u64, place: u64) -> u8 {
    ((place ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Numbers that look random, and are the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// Sends a stream in pieces of all sizes.
fn send(stream: &mut Stream, seed: u64, length: u64) {
    let mut dice = Dice(seed);
    let mut at = 0;
    while at < length {
        let most = [1, 100, 4_096, 70_000, 300_000][dice.roll(5) as usize];
        let size = (1 + dice.roll(most)).min(length - at);
        let piece: Vec<u8> = (at..at + size).map(|place| byte_at(seed, place)).collect();
        stream.write_all(&piece).unwrap_or_else(|error| panic!("write at {at}: {error}"));
        at += size;
    }
}

/// Receives a stream and compares each byte; pauses now and then if asked.
fn receive(stream: &mut Stream, seed: u64, length: u64, pauses: bool) {
    let mut dice = Dice(seed ^ 77);
    let mut buffer = vec![0; 128 * 1024];
    let mut at = 0;
    while at < length {
        let size = 1 + dice.roll(buffer.len() as u64) as usize;
        let got = stream.read(&mut buffer[..size]).unwrap_or_else(|error| panic!("read at {at}: {error}"));
        assert_ne!(got, 0, "the stream ended at {at} of {length}");
        for byte in &buffer[..got] {
            assert_eq!(*byte, byte_at(seed, at), "at {at} of {length}");
            at += 1;
        }
        if pauses && dice.roll(64) == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Expects the end of the stream, and nothing before it.
fn receive_end(stream: &mut Stream) {
    let mut byte = [0];
    assert_eq!(stream.read(&mut byte).expect("end of stream"), 0, "one byte too many");
}

/// Copies until the end, and passes the end on. (Not `std::io::copy`: splice(2) does not see what came by the short cut.)
fn relay(mut from: Stream, mut to: Stream) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(got) => to.write_all(&buffer[..got]).expect("relay writes"),
            Err(error) => panic!("relay reads: {error}"),
        }
    }
    to.shutdown(Shutdown::Write).expect("relay ends");
}

#[test]
fn both_hops_of_a_proxied_connection_carry_every_byte_in_order() {
    const LENGTH: u64 = 8 * MIB;
    for (seed, destination, server, from) in
        [(1, "10.96.0.10:80", SERVER, CLIENT), (2, "[fd00:96::10]:80", "[fd00:201:2::2]", "[fd00:201:1::2]")]
    {
        let mut lab = Lab::new();
        let (interception, worker) = start(&mut lab);
        let app = lab.server.listen(&format!("{server}:8080"));
        let mut client = lab.client.connect(destination).expect("connects");
        let (down, _) = accept(&worker);
        let up = lab.node.run(|| connect_as(&format!("{from}:0"), &format!("{server}:8080"))).expect("upstream");
        let (mut served, peer) = accept(&app);
        assert_eq!(peer.ip(), client.local_addr().unwrap().ip(), "the server sees the client's address");

        std::thread::scope(|scope| {
            scope.spawn(|| relay(down.try_clone().unwrap(), up.try_clone().unwrap()));
            scope.spawn(|| relay(up.try_clone().unwrap(), down.try_clone().unwrap()));
            let mut client_reads = client.try_clone().unwrap();
            let mut served_reads = served.try_clone().unwrap();
            scope.spawn(move || {
                receive(&mut client_reads, seed ^ 1000, LENGTH, false);
                receive_end(&mut client_reads);
            });
            // Half close: the request ends, and only then the answer begins to end.
            scope.spawn(|| {
                send(&mut client, seed, LENGTH);
                client.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                receive(&mut served_reads, seed, LENGTH, false);
                receive_end(&mut served_reads);
            });
            scope.spawn(|| {
                send(&mut served, seed ^ 1000, LENGTH);
                served.shutdown(Shutdown::Write).unwrap();
            });
        });

        // Two hops, two directions. TCP itself tells what it carried: the short cut had the rest.
        let by_tcp: u64 = [&client, &down, &up, &served].into_iter().map(tcp_bytes_sent).sum();
        let (short, tcp) = (counter(&interception, "shortcut.bytes"), counter(&interception, "shortcut.tcp_bytes"));
        assert_eq!(short + by_tcp, 4 * LENGTH, "{:?}", interception.counters());
        assert!(tcp <= by_tcp, "{tcp} counted, {by_tcp} sent");
        println!("by the short cut: {:.1} %", 100.0 * short as f64 / (4 * LENGTH) as f64);
        assert_ne!(short, 0);
        assert_eq!(counter(&interception, "shortcut.sockets"), 4);
        drop((client, down, up, served));
        eventually("the rest is counted when the connections close", || {
            counter(&interception, "shortcut.tcp_bytes").abs_diff(by_tcp) <= 8
        });
        lab.node.run(|| interception.shutdown()).expect("shuts down");
    }
}

#[test]
fn requests_and_answers_bypass_tcp() {
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (mut down, _) = accept(&worker);
    for round in 0..1000 {
        send(&mut client, round, 300);
        receive(&mut down, round, 300, false);
        send(&mut down, round ^ 99, 2000);
        receive(&mut client, round ^ 99, 2000, false);
    }
    // The first message may come before the daemon's end is registered.
    assert!(tcp_bytes_sent(&client) <= 300, "{}", tcp_bytes_sent(&client));
    assert_eq!(tcp_bytes_sent(&down), 0);
    assert!(counter(&interception, "shortcut.bytes") >= 2300 * 1000 - 300);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn bytes_sent_before_the_peer_is_registered_are_not_overtaken() {
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    // The daemon's end is not established, and so not registered, before the first bytes have come: by TCP.
    defer_accept(&worker);
    for seed in 0..50 {
        let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                send(&mut client, seed, 200_000);
                client.shutdown(Shutdown::Write).unwrap();
            });
            let (mut down, _) = accept(&worker);
            receive(&mut down, seed, 200_000, seed % 2 == 0);
            receive_end(&mut down);
        });
    }
    assert!(counter(&interception, "shortcut.peer_missing") >= 50, "{:?}", interception.counters());
    assert_ne!(counter(&interception, "shortcut.resumed"), 0, "{:?}", interception.counters());
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_receiver_that_does_not_read_stops_its_sender() {
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (mut down, _) = accept(&worker);
    let mut sent = 0;
    let piece: Vec<u8> = vec![0; 50_000];
    loop {
        let bytes: Vec<u8> = (sent..sent + piece.len() as u64).map(|place| byte_at(5, place)).collect();
        match (&*client).write(&bytes) {
            Ok(wrote) => sent += wrote as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("after {sent} bytes: {error}"),
        }
        assert!(sent < 64 * MIB, "nothing stops the sender");
    }
    assert_eq!(counter(&interception, "shortcut.receiver_behind"), 1);
    // All of it is there, in order, by whichever lane it came; and then the short cut is taken again. (Not at once: the
    // kernel lets the verdict on a message that it could not send stand for the next one.)
    receive(&mut down, 5, sent, false);
    for seed in 0..3 {
        send(&mut client, seed, 10);
        receive(&mut down, seed, 10, false);
    }
    assert_eq!(counter(&interception, "shortcut.resumed"), 1, "{:?}", interception.counters());
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_pod_that_fell_behind_gets_the_rest_by_tcp() {
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (mut down, _) = accept(&worker);
    std::thread::scope(|scope| {
        scope.spawn(|| send(&mut down, 9, 16 * MIB));
        receive(&mut client, 9, 16 * MIB, true);
    });
    if counter(&interception, "shortcut.receiver_behind") > 0 {
        let before = counter(&interception, "shortcut.bytes");
        send(&mut down, 10, 1000);
        receive(&mut client, 10, 1000, false);
        assert_eq!(counter(&interception, "shortcut.bytes"), before, "a pod's program may wait inside TCP");
    }
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// Linux 6.12.79 lost these wake-ups on sockmap sockets.
#[test]
fn an_edge_triggered_writer_is_woken_up() {
    const LENGTH: u64 = 8 * MIB;
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (down, _) = accept(&worker);
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    epoll.add(&down.0, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 1)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| receive(&mut client, 3, LENGTH, true));
        let mut at = 0;
        while at < LENGTH {
            let piece: Vec<u8> = (at..(at + 200_000).min(LENGTH)).map(|place| byte_at(3, place)).collect();
            match (&*down).write(&piece) {
                Ok(wrote) => at += wrote as u64,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut events = [EpollEvent::empty()];
                    let woken = epoll.wait(&mut events, EpollTimeout::from(10_000_u16)).unwrap();
                    assert_eq!(woken, 1, "no EPOLLOUT at {at} of {LENGTH}");
                }
                Err(error) => panic!("write at {at}: {error}"),
            }
        }
    });
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn many_short_connections_lose_nothing() {
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    std::thread::scope(|scope| {
        for lane in 0..4_u64 {
            let lab = &lab;
            scope.spawn(move || {
                for round in 0..100 {
                    let seed = lane << 32 | round;
                    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
                    client.write_all(&seed.to_be_bytes()).unwrap();
                    client.shutdown(Shutdown::Write).unwrap();
                    receive(&mut client, seed, 30_000, false);
                    receive_end(&mut client);
                }
            });
        }
        for _ in 0..400 {
            let (mut down, _) = accept(&worker);
            scope.spawn(move || {
                let mut seed = [0; 8];
                down.read_exact(&mut seed).unwrap();
                receive_end(&mut down);
                send(&mut down, u64::from_be_bytes(seed), 30_000);
            });
        }
    });
    let (short, tcp) = (counter(&interception, "shortcut.bytes"), counter(&interception, "shortcut.tcp_bytes"));
    println!("by the short cut: {:.1} %: {:?}", 100.0 * short as f64 / (short + tcp) as f64, interception.counters());
    assert_eq!(short + tcp, 400 * 30_008);
    assert!(short > tcp, "{short} by the short cut, {tcp} by TCP");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn only_hops_through_the_daemon_are_registered() {
    let mut lab = Lab::new();
    let (interception, _worker) = start(&mut lab);
    // From pod to pod past the daemon, inside a pod, and from the node itself.
    let direct = lab.server.listen("0.0.0.0:9090");
    let inside = lab.client.listen("0.0.0.0:9091");
    for (from, to, listener) in [
        (&lab.client, "10.201.2.2:9090", &direct),
        (&lab.client, "10.201.1.2:9091", &inside),
        (&lab.client, "127.0.0.1:9091", &inside),
        (&lab.node, "10.201.2.2:9090", &direct),
        (&lab.neighbour, "10.201.2.2:9090", &direct),
    ] {
        let mut stream = from.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
        let (mut accepted, _) = accept(listener);
        send(&mut stream, 1, 10_000);
        receive(&mut accepted, 1, 10_000, false);
        send(&mut accepted, 2, 10_000);
        receive(&mut stream, 2, 10_000, false);
        assert!(tcp_bytes_sent(&stream) >= 10_000);
    }
    // The passive end in a pod cannot tell another pod's connection from the daemon's in that pod's name.
    assert!(counter(&interception, "shortcut.sockets") <= 1, "{:?}", interception.counters());
    assert_eq!(counter(&interception, "shortcut.bytes"), 0);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_program_that_waits_inside_the_kernel_is_left_to_tcp() {
    let mut lab = Lab::new();
    let (interception, worker) = start(&mut lab);
    for _ in 0..20 {
        let client = lab.client.connect_blocking("10.96.0.10:80").expect("connects");
        let (mut down, _) = accept(&worker);
        std::thread::scope(|scope| {
            let mut reader = client.try_clone().unwrap();
            let answer = scope.spawn(move || {
                let mut answer = Vec::new();
                reader.read_to_end(&mut answer).map(|_| answer)
            });
            (&client).write_all(b"question").unwrap();
            // On a socket in a sockmap, this would end the read in the other thread with EAGAIN.
            client.shutdown(Shutdown::Write).unwrap();
            let mut question = Vec::new();
            down.read_to_end(&mut question).unwrap();
            assert_eq!(question, b"question");
            down.write_all(b"answer").unwrap();
            drop(down);
            assert_eq!(answer.join().unwrap().expect("reads"), b"answer");
        });
    }
    assert_eq!(counter(&interception, "shortcut.blocking"), 20);
    assert_eq!(counter(&interception, "shortcut.sockets"), 0);
    // Their bytes are known when they close: question and answer, SYN and FIN.
    eventually("the bytes are counted", || (20 * 14..20 * 18).contains(&counter(&interception, "shortcut.tcp_bytes")));
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// How many bytes a socket has for its program, as the kernel tells programs that ask.
fn waiting(stream: &Stream) -> usize {
    let mut bytes: nix::libc::c_int = 0;
    // SAFETY: the request writes an int.
    let result = unsafe { nix::libc::ioctl(stream.0.as_raw_fd(), nix::libc::FIONREAD, &raw mut bytes) };
    assert_eq!(result, 0, "FIONREAD");
    bytes as usize
}

/// splice(2) looks at TCP's queue only.
#[test]
fn pods_read_from_tcp_unless_told_otherwise() {
    let mut lab = Lab::new();
    let (interception, worker) = start_with(&mut lab, Acceleration::Shortcut);
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (mut down, _) = accept(&worker);
    let (from, to) = nix::unistd::pipe().expect("a pipe");
    for round in 0..100 {
        send(&mut client, round, 300);
        receive(&mut down, round, 300, false);
        send(&mut down, round ^ 99, 2000);
        eventually("all of it is there", || client.peek(&mut [0; 4000]).is_ok_and(|length| length == 2000));
        let (socket, pipe, nowhere) = (client.0.as_raw_fd(), to.as_raw_fd(), std::ptr::null_mut());
        // SAFETY: two open descriptors, and no offsets.
        let moved = unsafe { nix::libc::splice(socket, nowhere, pipe, nowhere, 2000, 0) };
        assert_eq!(moved, 2000, "{}", std::io::Error::last_os_error());
        let mut got = [0; 2000];
        let mut at = 0;
        while at < got.len() {
            at += nix::unistd::read(&from, &mut got[at..]).expect("reads the pipe");
        }
        assert!((0..2000).all(|at| got[at] == byte_at(round ^ 99, at as u64)));
    }
    assert_eq!(tcp_bytes_sent(&down), 100 * 2000);
    assert!(tcp_bytes_sent(&client) <= 300, "{}", tcp_bytes_sent(&client));
    assert!(counter(&interception, "shortcut.bytes") >= 99 * 300);
    drop((client, down));
    eventually("what went by TCP is counted", || counter(&interception, "shortcut.tcp_bytes") >= 100 * 2000 - 8);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// Newer kernels say that nothing is there to read on a socket in a sockmap, whatever came by TCP; nginx believes it.
#[test]
fn by_default_programs_are_told_what_there_is_to_read() {
    let mut lab = Lab::new();
    let (interception, worker) = start_with(&mut lab, Acceleration::default());
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (mut down, _) = accept(&worker);
    for round in 0..10 {
        send(&mut client, round, 300);
        receive(&mut down, round, 300, false);
        send(&mut down, round ^ 99, 2000);
        eventually("the client is told how much there is", || waiting(&client) == 2000);
        receive(&mut client, round ^ 99, 2000, false);
    }
    let automatic = interception.acceleration().automatic;
    println!("automatic is {automatic} on this kernel");
    assert_eq!(counter(&interception, "shortcut.bytes") > 0, automatic == "shortcut");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// A read that waits on a socket in a sockmap ends with EAGAIN when anything wakes it up.
#[test]
fn a_server_that_waits_inside_the_kernel_is_left_to_tcp() {
    let mut lab = Lab::new();
    let (interception, _worker) = start_with(&mut lab, Acceleration::Shortcut);
    let (waits, polls) = (lab.server.listen("0.0.0.0:8080"), lab.server.listen("0.0.0.0:8081"));
    for _ in 0..20 {
        let mut up = lab.node.run(|| connect_as(&format!("{CLIENT}:0"), &format!("{SERVER}:8080"))).expect("connects");
        let (served, _) = waits.accept().expect("accepts");
        served.set_read_timeout(Some(DEADLINE)).expect("a deadline");
        let mut reader = served.try_clone().unwrap();
        std::thread::scope(|scope| {
            let rest = scope.spawn(move || {
                let mut rest = Vec::new();
                reader.read_to_end(&mut rest).map(|_| rest)
            });
            (&served).write_all(b"greeting").unwrap();
            // Its acknowledgement wakes the reader up.
            served.shutdown(Shutdown::Write).unwrap();
            let mut greeting = Vec::new();
            up.read_to_end(&mut greeting).unwrap();
            assert_eq!(greeting, b"greeting");
            up.write_all(b"rest").unwrap();
            up.shutdown(Shutdown::Write).unwrap();
            assert_eq!(rest.join().unwrap().expect("reads"), b"rest");
        });
    }
    assert_eq!(counter(&interception, "shortcut.bytes"), 0);
    // A program that waits in poll(2) is known by its first connection's first answer.
    eventually("a later connection's answers take the short cut", || {
        let mut up = lab.node.run(|| connect_as(&format!("{CLIENT}:0"), &format!("{SERVER}:8081"))).expect("connects");
        let (mut served, _) = accept(&polls);
        for round in 0..3 {
            send(&mut up, round, 100);
            receive(&mut served, round, 100, false);
            send(&mut served, round ^ 99, 2000);
            receive(&mut up, round ^ 99, 2000, false);
        }
        assert_eq!(tcp_bytes_sent(&up), 300, "the pod reads from TCP");
        tcp_bytes_sent(&served) == 0
    });
    assert!(counter(&interception, "shortcut.bytes") >= 6000);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn a_kernel_with_known_bugs_has_no_short_cut_and_says_why() {
    let mut lab = Lab::new();
    let mut config = lab.config();
    config.shortcut_cgroup = Some(lab.cgroup());
    config.kernel_release = Some("6.12.79-amd64".to_owned());
    let interception = lab.start(config, 1);
    let worker = lab.node.listen_transparent("[::]:15001");
    interception.set_listener(0, worker.as_fd()).expect("listener");
    let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
    let (mut down, _) = accept(&worker);
    send(&mut client, 1, 10_000);
    receive(&mut down, 1, 10_000, false);
    assert!(tcp_bytes_sent(&client) >= 10_000);
    assert_eq!(counter(&interception, "acceleration.withheld"), 2);
    assert_eq!(counter(&interception, "shortcut.sockets"), 0);
    let status = interception.acceleration();
    assert_eq!((status.available, status.reason_number), (false, Some(2)));
    assert!(status.reason.as_ref().is_some_and(|reason| reason.contains("6.12.79")), "{status:?}");
    let error = interception.accelerate("shortcut", None).unwrap_err().to_string();
    assert!(error.contains("known sockmap bugs"), "{error}");
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

#[test]
fn listeners_and_pods_can_have_the_short_cut_off() {
    let mut lab = Lab::new();
    let mut config = lab.config();
    config.shortcut_cgroup = Some(lab.cgroup());
    for (pods, listener, sockets) in [
        (Acceleration::Off, Acceleration::Joined, 0),
        (Acceleration::Shortcut, Acceleration::Off, 0),
        (Acceleration::Shortcut, Acceleration::Shortcut, 2),
    ] {
        config.pods.iter_mut().for_each(|pod| pod.policy.acceleration = pods);
        config.listener_acceleration[0] = listener;
        let interception = lab.start(config.clone(), 1);
        let worker = lab.node.listen_transparent("[::]:15001");
        interception.set_listener(0, worker.as_fd()).expect("listener");
        let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
        let (mut down, _) = accept(&worker);
        send(&mut client, 1, 10_000);
        receive(&mut down, 1, 10_000, false);
        assert_eq!(counter(&interception, "shortcut.sockets"), sockets, "{pods:?} {listener:?}");
        assert_eq!(counter(&interception, "shortcut.sockets_off"), 2 - sockets);
        assert_eq!(counter(&interception, "shortcut.bytes") > 0, sockets > 0);
        drop((client, down, worker));
        lab.node.run(|| interception.shutdown()).expect("shuts down");
    }
}
