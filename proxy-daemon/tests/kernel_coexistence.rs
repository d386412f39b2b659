//! What others have on the same hooks and in the same tables keeps working, and is left when interception ends; on the
//! running kernel.

mod kernel_lab;

use std::ffi::CString;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use culvert_proxy_daemon::intercept::{BalancedService, ConnectBalancing, InterceptionConfig, Pod, Policy, clean};
use kernel_lab::puppet::{self, Group, Puppet};
use kernel_lab::*;

/// Not a test of its own: what the process does whose connections are balanced.
#[test]
fn play_the_puppet() {
    puppet::play();
}

/// Whether a datagram of the pod gets to the neighbour within a time.
fn arrives(lab: &Lab, pod: &Namespace, to: &str, time: Duration) -> bool {
    let bind = |namespace: &Namespace, address: &str| namespace.run(|| UdpSocket::bind(address)).expect("binds");
    let any = if to.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
    let (server, client) = (bind(&lab.neighbour, to), bind(pod, any));
    server.set_read_timeout(Some(time)).expect("a timeout");
    client.send_to(b"hello", to).expect("sends");
    server.recv_from(&mut [0; 16]).is_ok()
}

/// How long is waited for a datagram that should not arrive.
const SILENCE: Duration = Duration::from_millis(300);
const V4: &str = "10.201.9.2:5300";
const V6: &str = "[fd00:201:9::2]:5300";

/// A network plugin's policy on an interface of the node: UDP over IPv4 is dropped, all else is somebody else's to decide.
fn add_policy(lab: &Lab, interface: &str) {
    /// The protocol at its place in an Ethernet frame; TC_ACT_SHOT, TC_ACT_UNSPEC.
    const PROGRAM: [&str; 2] = ["bytecode", "4,48 0 0 23,21 0 1 17,6 0 0 2,6 0 0 4294967295"];
    // It is there already where interception needs it too.
    let qdiscs = command("tc", &format!("-n {} qdisc show dev {interface}", lab.node.name));
    if !qdiscs.contains("clsact") {
        command("tc", &format!("-n {} qdisc add dev {interface} clsact", lab.node.name));
    }
    let node = &lab.node.name;
    let filter = ["-n", node, "filter", "add", "dev", interface, "ingress", "bpf", "da", PROGRAM[0], PROGRAM[1]];
    let output = std::process::Command::new("tc").args(filter).output().expect("tc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn other_programs_on_the_same_interfaces_decide_as_before() {
    for force_clsact in [false, true] {
        let lab = Lab::new();
        // One is there before interception, one comes later.
        assert!(arrives(&lab, &lab.client, V4, DEADLINE));
        add_policy(&lab, "pod1");
        let (interception, worker) = start(&lab, InterceptionConfig { force_clsact, ..lab.config() });
        assert!(arrives(&lab, &lab.server, V4, DEADLINE));
        add_policy(&lab, "pod2");
        for pod in [&lab.client, &lab.server] {
            assert!(!arrives(&lab, pod, V4, SILENCE), "the other program drops it");
            assert!(arrives(&lab, pod, V6, DEADLINE), "and leaves that");
            for to in ["10.96.0.10:80", "[fd00:96::10]:80"] {
                pod.connect(to).unwrap_or_else(|error| panic!("{to} is redirected: {error}"));
                accept(&worker);
            }
        }
        assert_eq!(counter(&interception, "redirected"), 4);
        lab.node.run(|| interception.shutdown()).expect("shuts down");
        for (pod, interface) in [(&lab.client, "pod1"), (&lab.server, "pod2")] {
            assert!(!arrives(&lab, pod, V4, SILENCE), "the other program is there still");
            let filters = command("tc", &format!("-n {} filter show dev {interface} ingress", lab.node.name));
            assert!(filters.contains("bytecode") && !filters.contains("redirect_"), "{filters}");
        }
    }
}

/// All rules and routes of the node.
fn tables(lab: &Lab) -> String {
    let list = |arguments: &str| lab.node.ip(arguments);
    ["-4 rule list", "-6 rule list", "-4 route list table all", "-6 route list table all"].map(list).concat()
}

#[test]
fn mark_and_table_are_settings_and_other_rules_are_left() {
    let lab = Lab::new();
    // Somebody else's, of the same kind, and a table with the number that ours has by default.
    lab.node.ip("rule add fwmark 0x7 lookup 3095 pref 90");
    lab.node.ip("route add blackhole 10.77.0.0/16 table 3095");
    lab.node.ip("-6 rule add fwmark 0xc17 lookup 777 pref 50000");
    let before = tables(&lab);
    let config = || InterceptionConfig { mark: 0x5a, route_table: 4242, ..lab.config() };
    for crashes in [false, true] {
        let (interception, worker) = start(&lab, config());
        let rules = lab.node.ip("-4 rule list");
        assert!(rules.contains("fwmark 0x5a lookup 4242"), "{rules}");
        for to in ["10.96.0.10:80", "[fd00:96::10]:80"] {
            lab.client.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
            accept(&worker);
        }
        if crashes {
            drop((interception, worker));
            lab.node.run(|| clean(&lab.pin_path, 0x5a, 4242)).expect("cleans");
        } else {
            lab.node.run(|| interception.shutdown()).expect("shuts down");
        }
        assert_eq!(tables(&lab), before, "after a crash: {crashes}");
    }
}

/// Somebody else's program at connect() by IPv4, which refuses one port.
struct Refusing {
    _link: OwnedFd,
}

impl Refusing {
    /// Attaches it to a cgroup.
    fn attach(cgroup: &Path, port: u16) -> Self {
        const PROG_LOAD: i32 = 5;
        const LINK_CREATE: i32 = 28;
        const CGROUP_SOCK_ADDR: u32 = 18;
        const INET4_CONNECT: u32 = 10;
        /// The part of `union bpf_attr` for BPF_PROG_LOAD (linux/bpf.h).
        #[repr(C)]
        struct Load {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log: [u64; 2],
            version_and_flags: [u32; 2],
            name: [u8; 16],
            interface: u32,
            attach: u32,
        }
        let instruction =
            |code: u64, registers: u64, offset: u64, value: u64| code | registers << 8 | offset << 16 | value << 32;
        let instructions = [
            // The port is at 24 in `struct bpf_sock_addr`, in network order.
            instruction(0x61, 0x12, 24, 0),
            instruction(0xb7, 0x00, 0, 1),
            instruction(0x55, 0x02, 1, port.to_be().into()),
            instruction(0xb7, 0x00, 0, 0),
            instruction(0x95, 0x00, 0, 0),
        ];
        let license = CString::new("GPL").expect("a word");
        let mut load = Load {
            kind: CGROUP_SOCK_ADDR,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr() as u64,
            license: license.as_ptr() as u64,
            log: [0; 2],
            version_and_flags: [0; 2],
            name: [0; 16],
            interface: 0,
            attach: INET4_CONNECT,
        };
        let bpf = |command: i32, attributes: *mut u8, size: usize| {
            // SAFETY: the attributes are laid out as the kernel's, and what they point to outlives the call.
            let result = unsafe { nix::libc::syscall(nix::libc::SYS_bpf, command, attributes, size as u32) };
            assert!(result >= 0, "bpf({command}): {}", std::io::Error::last_os_error());
            // SAFETY: a descriptor that the kernel has just made for us.
            unsafe { OwnedFd::from_raw_fd(result as i32) }
        };
        let program = bpf(PROG_LOAD, (&raw mut load).cast(), size_of::<Load>());
        let cgroup = std::fs::File::open(cgroup).expect("the cgroup");
        let mut link = [program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32, INET4_CONNECT, 0];
        Self { _link: bpf(LINK_CREATE, link.as_mut_ptr().cast(), size_of_val(&link)) }
    }
}

#[test]
fn other_programs_on_the_same_cgroups_decide_as_before() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let backend = lab.server.listen("10.201.2.2:8001");
    let own = lab.server.listen("10.201.2.2:81");
    let balancing = ConnectBalancing { cgroups: vec![group.path().to_owned()], ..ConnectBalancing::default() };
    let config = InterceptionConfig {
        balancing: Some(balancing),
        pin_path: lab.pin_path.clone(),
        ..InterceptionConfig::default()
    };
    // One is there before interception, one comes later.
    let _before = Refusing::attach(group.path(), 81);
    let interception = lab.start(config, 1);
    let service =
        BalancedService { address: "10.96.0.10:80".parse().expect("an address"), udp: false, cluster: "any".into() };
    interception.set_service(&service, &[("10.201.2.2:8001".parse().expect("an address"), 1.0)]).expect("taken");
    interception.balance();
    eventually("attached", || interception.hooked_cgroups().1 == 1);
    let _after = Refusing::attach(group.path(), 82);
    let mut app = Puppet::new(&lab.client, &group);
    assert_eq!(app.connect("10.96.0.10:80").expect("is balanced").1, "10.96.0.10:80");
    accept(&backend);
    for refused in ["10.201.2.2:81", "10.201.2.2:82"] {
        assert_eq!(app.connect(refused).expect_err("another program refuses it"), nix::libc::EPERM, "{refused}");
    }
    lab.node.run(|| interception.shutdown()).expect("shuts down");
    eventually("nothing is balanced any more", || app.order("tcp-briefly 10.96.0.10:80").is_err());
    for refused in ["10.201.2.2:81", "10.201.2.2:82"] {
        assert_eq!(app.connect(refused).expect_err("refused still"), nix::libc::EPERM, "{refused}");
    }
    drop(own);
}

/// What both ends of a connection say to each other, more than a packet of it.
fn talk(one: &mut Stream, other: &mut Stream) {
    let sent: Vec<u8> = (0..40_000_u32).map(|at| (at / 3) as u8).collect();
    let mut got = vec![0; sent.len()];
    for way in 0..2 {
        let (from, to) = if way == 0 { (&mut *one, &mut *other) } else { (&mut *other, &mut *one) };
        std::thread::scope(|scope| {
            scope.spawn(|| from.write_all(&sent).expect("writes"));
            to.read_exact(&mut got).expect("reads");
        });
        assert!(got == sent, "other bytes than were sent");
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Runs nft on the node; returns what it says.
fn nft(lab: &Lab, arguments: &[&str], input: &str) -> String {
    lab.node.run(|| {
        let mut child = Command::new("nft");
        let child = child.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().expect("nft: `cargo xtask setup` installs it");
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("writes");
        let output = child.wait_with_output().expect("ends");
        assert!(output.status.success(), "nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    })
}

/// How many packets a counter has seen.
fn packets(lab: &Lab, counter: &str) -> u64 {
    let text = nft(lab, &["list", "counter", "inet", "others", counter], "");
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    words.next().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no number in {text}"))
}

/// As network plugins, load balancers and policies have them: one port is translated, one is marked, by packet and by tracked
/// connection, and what passes is counted.
const RULES: &str = "
table inet others {
  counter translated {}
  counter marked {}
  counter ours {}
  counter ours_astray {}
  chain translate {
    type nat hook prerouting priority dstnat;
    meta nfproto ipv4 tcp dport 8088 counter name translated dnat ip to 10.201.9.2:9099
    meta nfproto ipv6 tcp dport 8088 counter name translated dnat ip6 to [fd00:201:9::2]:9099
  }
  chain mark_them {
    type filter hook prerouting priority mangle;
    meta mark 0xc17 counter name ours
    tcp dport 8089 ct mark set 0x40
    ct mark 0x40 meta mark set 0x40
  }
  chain count_them {
    type filter hook forward priority filter;
    meta mark 0x40 counter name marked
    meta mark 0xc17 counter name ours_astray
  }
}
";

#[test]
fn other_peoples_rules_and_tracked_connections_are_left_alone() {
    let lab = Lab::new();
    nft(&lab, &["-f", "-"], RULES);
    let rules = || nft(&lab, &["--stateless", "list", "ruleset"], "");
    let before = (rules(), tables(&lab));
    let (translated, marked) = (lab.neighbour.listen("[::]:9099"), lab.neighbour.listen("[::]:8089"));
    let app = lab.server.listen("[::]:8080");
    // These are tracked before there is any interception.
    let vips = ["10.96.0.10", "[fd00:96::10]"];
    let mut tracked = Vec::new();
    for vip in vips {
        let mut client = lab.client.connect(&format!("{vip}:8088")).expect("connects");
        let (mut served, peer) = accept(&translated);
        assert_eq!(canonical(peer), client.local_addr().expect("an address"), "the source is kept");
        talk(&mut client, &mut served);
        tracked.push((client, served));
    }
    let config = InterceptionConfig { excluded_ports: vec![8088, 8089], ..lab.config() };
    let (interception, worker) = start(&lab, config);
    for (vip, own, server, far) in [
        (vips[0], "10.201.1.2:0", "10.201.2.2:8080", "10.201.9.2:8089"),
        (vips[1], "[fd00:201:1::2]:0", "[fd00:201:2::2]:8080", "[fd00:201:9::2]:8089"),
    ] {
        let mut client = lab.client.connect(&format!("{vip}:80")).expect("is redirected");
        let (mut down, _) = accept(&worker);
        assert_eq!(canonical(down.local_addr().expect("an address")).to_string(), format!("{vip}:80"));
        let mut up = lab.node.run(|| connect_as(own, server)).expect("connects in the pod's name");
        let (mut served, _) = accept(&app);
        talk(&mut client, &mut down);
        talk(&mut up, &mut served);
        let (seen, passed) = (packets(&lab, "translated"), packets(&lab, "marked"));
        let mut client = lab.client.connect(&format!("{vip}:8088")).expect("is translated");
        talk(&mut client, &mut accept(&translated).0);
        assert_eq!(packets(&lab, "translated"), seen + 1, "by its first packet");
        let mut client = lab.client.connect(far).expect("is marked");
        talk(&mut client, &mut accept(&marked).0);
        assert!(packets(&lab, "marked") >= passed + 4, "both ways, not only what opened it");
    }
    assert_eq!((counter(&interception, "redirected"), counter(&interception, "passed_excluded_port")), (2, 4));
    for (client, served) in &mut tracked {
        talk(client, served);
    }
    assert!(packets(&lab, "ours") > 0, "our mark is there, for rules that look at it");
    assert_eq!(packets(&lab, "ours_astray"), 0);
    stop(&lab, interception);
    for (client, served) in &mut tracked {
        talk(client, served);
    }
    assert_eq!((rules(), tables(&lab)), before);
}

/// Gives both ends of the client's wire an interface for the VLAN 5; `false`: the kernel has no VLANs.
fn add_vlan(lab: &Lab) -> bool {
    for (namespace, parent, host) in [(&lab.node, "pod1", 1), (&lab.client, "eth0", 2)] {
        let add = [
            "-n",
            &namespace.name,
            "link",
            "add",
            "link",
            parent,
            "name",
            &format!("{parent}.5"),
            "type",
            "vlan",
            "id",
            "5",
        ];
        let output = Command::new("ip").args(add).output().expect("ip");
        let words = String::from_utf8_lossy(&output.stderr);
        if words.contains("Unknown device type") {
            return false;
        }
        assert!(output.status.success(), "{words}");
        namespace.ip(&format!("addr add 10.201.5.{host}/24 dev {parent}.5"));
        namespace.ip(&format!("addr add fd00:201:5::{host}/64 dev {parent}.5 nodad"));
        namespace.ip(&format!("link set {parent}.5 up"));
    }
    for (family, net, via) in [
        ("-4", "10.96.5.0/24", "10.201.5.1"),
        ("-6", "fd00:96:5::/64", "fd00:201:5::1"),
        ("-4", "10.201.9.2/32", "10.201.5.1"),
        ("-6", "fd00:201:9::2/128", "fd00:201:5::1"),
    ] {
        lab.client.ip(&format!("{family} route add {net} via {via}"));
    }
    true
}

/// Whose packets have VLAN tags is intercepted on the VLAN's own interface, if that is one of the pods', and else let alone.
#[test]
fn tagged_connections_of_pods_are_redirected_on_the_vlans_own_interface() {
    let lab = Lab::new();
    if !add_vlan(&lab) {
        assert!(std::env::var_os("CULVERT_VM").is_none(), "the kernels of `cargo xtask vm-test` have VLANs");
        println!("this kernel has no VLANs: those of `cargo xtask vm-test` have");
        return;
    }
    let pods = ["10.201.5.2", "fd00:201:5::2"]
        .map(|address| Pod { address: address.parse().expect("an address"), policy: Policy::default() });
    let config = || InterceptionConfig { pods: pods.to_vec(), ..lab.config() };
    let (interception, worker) = start(&lab, config());
    let app = lab.client.listen("[::]:8080");
    for (to, own, other) in [
        ("10.96.5.10:80", "10.201.5.2:8080", "10.201.2.2:0"),
        ("[fd00:96:5::10]:80", "[fd00:201:5::2]:8080", "[fd00:201:2::2]:0"),
    ] {
        let mut client = lab.client.connect(to).expect("is redirected");
        let (mut down, peer) = accept(&worker);
        assert_eq!(canonical(down.local_addr().expect("an address")).to_string(), to);
        assert_eq!(canonical(peer), client.local_addr().expect("an address"));
        talk(&mut client, &mut down);
        // And its answers to the daemon, that connects in another's name.
        let mut up = lab.node.run(|| connect_as(other, own)).expect("connects");
        talk(&mut up, &mut accept(&app).0);
    }
    assert_eq!(counter(&interception, "redirected"), 2);
    assert!(counter(&interception, "passed_vlan") > 0, "the interface below let them be");
    stop(&lab, interception);
    drop(worker);

    let interfaces = vec!["pod?".to_owned()];
    let (interception, _worker) = start(&lab, InterceptionConfig { interfaces, ..config() });
    let far = lab.neighbour.listen("[::]:80");
    for to in ["10.201.9.2:80", "[fd00:201:9::2]:80"] {
        let mut client = lab.client.connect(to).expect("passes");
        let (mut served, peer) = accept(&far);
        assert_eq!(canonical(peer), client.local_addr().expect("an address"));
        talk(&mut client, &mut served);
    }
    assert_eq!(counter(&interception, "redirected"), 0);
    stop(&lab, interception);
}
