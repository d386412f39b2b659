//! One node with two pods and a neighbour, out of network namespaces of this process's own, for the tests that need
//! a real kernel. They need root, and fail without it.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod manifests;
pub mod packets;
pub mod process;
pub mod puppet;
pub mod relay;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, PerCpuArray};
use culvert_proxy_daemon::intercept::{FailurePolicy, Interception, InterceptionConfig, Pod, Policy};
use culvert_proxy_ebpf::{LAYOUT, Reason};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// The client pod.
pub const CLIENT: &str = "10.201.1.2";
/// The client pod, IPv6.
pub const CLIENT_V6: &str = "fd00:201:1::2";
/// The server pod on the same node.
pub const SERVER: &str = "10.201.2.2";
/// The server pod on the same node, IPv6.
pub const SERVER_V6: &str = "fd00:201:2::2";
/// A host beyond the node's uplink.
pub const NEIGHBOUR: &str = "10.201.9.2";
/// A host beyond the node's uplink, IPv6.
pub const NEIGHBOUR_V6: &str = "fd00:201:9::2";
/// The node's own address on the uplink.
pub const NODE: &str = "10.201.9.1";
/// An address that no host has.
pub const VIP: &str = "10.96.0.10";
/// An address that no host has, IPv6.
pub const VIP_V6: &str = "fd00:96::10";

/// How long anything may take that should happen.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How long a connection that should not be made is waited for: a few retransmissions of its SYN.
pub const REFUSAL: Duration = Duration::from_millis(1500);

/// Tests in one process share its cgroup: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A network namespace.
pub struct Namespace {
    /// Its name for `ip netns`.
    pub name: String,
}

impl Namespace {
    /// A new one.
    pub fn new(name: String) -> Self {
        ip(&format!("netns add {name}"));
        let namespace = Self { name };
        // Addresses work at once, without looking for duplicates first.
        namespace.sysctl("net/ipv6/conf/all/accept_dad", "0");
        namespace.sysctl("net/ipv6/conf/default/accept_dad", "0");
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `ip` in it.
    pub fn ip(&self, arguments: &str) -> String {
        ip(&format!("-n {} {arguments}", self.name))
    }

    /// Runs a function in it, in a thread of its own.
    pub fn run<T: Send>(&self, function: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter();
                function()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread into it.
    pub fn enter(&self) {
        enter(&self.name);
    }

    /// Connects from it, as an event-driven program does.
    pub fn connect(&self, to: &str) -> std::io::Result<Stream> {
        self.connect_within(to, DEADLINE)
    }

    /// Connects from it, within a time.
    pub fn connect_within(&self, to: &str, time: Duration) -> std::io::Result<Stream> {
        self.run(|| connect_nonblocking(None, to, time))
    }

    /// Connects from it, as a program does that lets the kernel wait.
    pub fn connect_blocking(&self, to: &str) -> std::io::Result<TcpStream> {
        let stream = self.run(|| TcpStream::connect(to))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(stream)
    }

    /// Listens in it.
    pub fn listen(&self, address: &str) -> TcpListener {
        self.run(|| TcpListener::bind(address)).unwrap_or_else(|error| panic!("listen on {address}: {error}"))
    }

    /// Listens in it, transparently.
    pub fn listen_transparent(&self, address: &str) -> TcpListener {
        self.run(|| transparent_listener(address))
    }

    /// Writes a sysctl of it.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/{name}");
        self.run(|| fs::write(&path, value)).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}

/// Moves the calling thread into a namespace.
pub fn enter(name: &str) {
    let path = format!("/run/netns/{name}");
    let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| panic!("setns {name}: {error} (not root?)"));
}

/// Listens transparently in the calling thread's namespace.
pub fn transparent_listener(address: &str) -> TcpListener {
    let address: SocketAddr = address.parse().expect("a socket address");
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).expect("socket");
    // A daemon that died has left connections.
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true).expect("IP_TRANSPARENT");
    } else {
        socket.set_only_v6(false).expect("dual stack");
        socket.set_ip_transparent_v6(true).expect("IPV6_TRANSPARENT");
    }
    socket.bind(&address.into()).expect("bind");
    socket.listen(1024).expect("listen");
    socket.into()
}

/// A connected socket that never waits inside the kernel: reads and writes wait in poll(2), up to the deadline.
pub struct Stream(pub TcpStream);

impl Stream {
    /// Another handle of the same socket.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    fn when_ready<T>(
        &self,
        flags: PollFlags,
        mut operation: impl FnMut(&TcpStream) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        loop {
            match operation(&self.0) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
            wait(&self.0, flags, DEADLINE)?;
        }
    }
}

impl std::ops::Deref for Stream {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.0
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.when_ready(PollFlags::POLLIN, |mut stream| stream.read(buffer))
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.when_ready(PollFlags::POLLOUT, |mut stream| stream.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Waits for a socket, up to a time.
fn wait(socket: &impl AsFd, flags: PollFlags, time: Duration) -> std::io::Result<()> {
    let timeout = PollTimeout::try_from(time).expect("a short time");
    match poll(&mut [PollFd::new(socket.as_fd(), flags)], timeout)? {
        0 => Err(std::io::Error::new(ErrorKind::TimedOut, "nothing happened until the deadline")),
        _ => Ok(()),
    }
}

/// Connects from one of the addresses of the calling thread's namespace.
pub fn connect_from(from: &str, to: &str) -> std::io::Result<Stream> {
    let (from, to) = (format!("{from}:0"), to.parse::<SocketAddr>().expect("a socket address"));
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&from.parse::<SocketAddr>().expect("a socket address").into())?;
    finish_connecting(socket, to, DEADLINE)
}

/// Connects in another's name from the calling thread's namespace.
pub fn connect_as(from: &str, to: &str) -> std::io::Result<Stream> {
    connect_nonblocking(Some(from), to, DEADLINE)
}

fn connect_nonblocking(from: Option<&str>, to: &str, time: Duration) -> std::io::Result<Stream> {
    let to: SocketAddr = to.parse().expect("a socket address");
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(from) = from {
        if to.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&from.parse::<SocketAddr>().expect("a socket address").into())?;
    }
    finish_connecting(socket, to, time)
}

fn finish_connecting(socket: Socket, to: SocketAddr, time: Duration) -> std::io::Result<Stream> {
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {
            wait(&socket, PollFlags::POLLOUT, time)?;
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
        }
        result => result?,
    }
    Ok(Stream(socket.into()))
}

/// Starts interception with one worker, and its listener for outbound connections.
pub fn start(lab: &Lab, config: InterceptionConfig) -> (Interception, TcpListener) {
    let interception = lab.start(config, 1);
    let worker = lab.node.listen_transparent("[::]:0");
    lab.node.run(|| interception.set_listener(0, worker.as_fd())).expect("listener");
    (interception, worker)
}

/// Takes it down.
pub fn stop(lab: &Lab, interception: Interception) {
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}

/// Accepts within the deadline.
pub fn accept(listener: &TcpListener) -> (Stream, SocketAddr) {
    accept_within(listener, DEADLINE).expect("no connection arrived")
}

/// Accepts within a time.
pub fn accept_within(listener: &TcpListener, time: Duration) -> Option<(Stream, SocketAddr)> {
    wait(listener, PollFlags::POLLIN, time).ok()?;
    let (stream, peer) = listener.accept().expect("accept");
    stream.set_nonblocking(true).expect("non-blocking");
    stream.set_nodelay(true).expect("no delay");
    Some((Stream(stream), peer))
}

/// Polls until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "did not happen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the threads of this process that have this name have nothing to do: they slept for a while.
pub fn sleeps(name: &str) -> bool {
    let switches = || -> Vec<String> {
        let tasks = fs::read_dir("/proc/self/task").expect("tasks").map(|task| task.expect("a task").path());
        let named = tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
        let status = named.filter_map(|task| fs::read_to_string(task.join("status")).ok());
        let tells = |line: &&str| line.contains("ctxt_switches") || line.starts_with("State:");
        let lines = |text: String| text.lines().filter(tells).collect::<String>();
        status.map(lines).collect()
    };
    let before = switches();
    std::thread::sleep(Duration::from_millis(100));
    // A thread that has just begun has no name yet; one that has work may wait for a processor all this time.
    let sleep = before.iter().all(|status| status.contains("(sleeping)"));
    !before.is_empty() && sleep && before == switches()
}

/// Runs `ip`; panics with its words if it fails.
pub fn ip(arguments: &str) -> String {
    command("ip", arguments)
}

/// Runs a command; panics with its words if it fails.
pub fn command(program: &str, arguments: &str) -> String {
    let output: Output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask setup` installs it"));
    assert!(
        output.status.success(),
        "{program} {arguments}: {}(these tests need root)",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A configuration that enrols both pods, whose connections fail open.
pub fn open_config() -> InterceptionConfig {
    config_with(FailurePolicy::Open)
}

/// A configuration that enrols both pods, whose connections fail closed.
pub fn closed_config() -> InterceptionConfig {
    config_with(FailurePolicy::Closed)
}

fn config_with(failure_policy: FailurePolicy) -> InterceptionConfig {
    let policy = Policy { failure_policy, ..Policy::default() };
    let pod = |address: &str| Pod { address: address.parse::<IpAddr>().expect("an address"), policy };
    InterceptionConfig {
        interfaces: vec!["pod*".to_owned()],
        uplinks: vec!["up?".to_owned()],
        pods: [CLIENT, CLIENT_V6, SERVER, SERVER_V6].map(pod).to_vec(),
        ..InterceptionConfig::default()
    }
}

/// The node, its pods, and its neighbour.
pub struct Lab {
    /// The node.
    pub node: Namespace,
    /// A pod.
    pub client: Namespace,
    /// Another pod.
    pub server: Namespace,
    /// A host beyond the uplink.
    pub neighbour: Namespace,
    /// Where interception pins.
    pub pin_path: PathBuf,
    cgroup: Option<Cgroup>,
    _alone: MutexGuard<'static, ()>,
}

impl Lab {
    /// Builds it.
    pub fn new() -> Self {
        let _ = tracing_subscriber::fmt().with_test_writer().with_env_filter("info").try_init();
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let id = format!("cv{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let namespace = |name: &str| Namespace::new(format!("{id}-{name}"));
        let lab = Self {
            node: namespace("node"),
            client: namespace("client"),
            server: namespace("server"),
            neighbour: namespace("far"),
            pin_path: PathBuf::from(format!("/sys/fs/bpf/culvert-test-{id}")),
            cgroup: None,
            _alone: alone,
        };
        lab.wire(&lab.client, "pod1", "10.201.1", "fd00:201:1:");
        lab.wire(&lab.server, "pod2", "10.201.2", "fd00:201:2:");
        lab.wire(&lab.neighbour, "up0", "10.201.9", "fd00:201:9:");
        lab.node.sysctl("net/ipv4/ip_forward", "1");
        lab.node.sysctl("net/ipv6/conf/all/forwarding", "1");
        lab
    }

    /// Wires a namespace to the node: .2 is its address, .1 the node's, which is its default route.
    fn wire(&self, to: &Namespace, interface: &str, net: &str, net6: &str) {
        self.node.ip(&format!("link add {interface} type veth peer name eth0 netns {}", to.name));
        for (namespace, interface, host) in [(&self.node, interface, 1), (to, "eth0", 2)] {
            namespace.ip(&format!("addr add {net}.{host}/24 dev {interface}"));
            namespace.ip(&format!("addr add {net6}:{host}/64 dev {interface} nodad"));
            namespace.ip(&format!("link set {interface} up"));
        }
        to.ip(&format!("route add default via {net}.1"));
        to.ip(&format!("-6 route add default via {net6}:1"));
    }

    /// Gives the client's address to a new interface, after the one before was deleted.
    pub fn rewire_client(&self) {
        self.wire(&self.client, "pod1", "10.201.1", "fd00:201:1:");
    }

    /// A host beyond the neighbour, who routes to it with a smaller MTU. `.2` is its address.
    pub fn beyond(&self, net: &str, net6: &str, mtu: u32) -> Namespace {
        let beyond = Namespace::new(self.neighbour.name.replace("-far", "-beyond"));
        self.neighbour.sysctl("net/ipv4/ip_forward", "1");
        self.neighbour.sysctl("net/ipv6/conf/all/forwarding", "1");
        self.neighbour.ip(&format!("link add narrow type veth peer name eth0 netns {}", beyond.name));
        for (namespace, interface, host) in [(&self.neighbour, "narrow", 1), (&beyond, "eth0", 2)] {
            namespace.ip(&format!("addr add {net}.{host}/24 dev {interface}"));
            namespace.ip(&format!("addr add {net6}:{host}/64 dev {interface} nodad"));
            namespace.ip(&format!("link set {interface} up"));
        }
        self.neighbour.ip(&format!("link set narrow mtu {mtu}"));
        beyond.ip(&format!("route add default via {net}.1"));
        beyond.ip(&format!("-6 route add default via {net6}:1"));
        // Forwarding made the neighbour a router, which forgets what it learned but not its routes.
        self.node.ip(&format!("route add {net}.0/24 via {NEIGHBOUR}"));
        self.node.ip(&format!("-6 route add {net6}:/64 via {NEIGHBOUR_V6}"));
        beyond
    }

    /// A configuration that enrols both pods.
    pub fn config(&self) -> InterceptionConfig {
        InterceptionConfig { pin_path: self.pin_path.clone(), state_path: self.state_path(), ..open_config() }
    }

    /// Where interception writes down what is enrolled by command.
    pub fn state_path(&self) -> PathBuf {
        std::env::temp_dir().join(self.pin_path.file_name().expect("a name")).join("enrolled.json")
    }

    /// Starts interception on the node.
    pub fn start(&self, config: InterceptionConfig, workers: usize) -> Interception {
        self.node.run(|| Interception::start(config, workers)).expect("interception starts")
    }

    /// Moves this process into a cgroup of its own, whose sockets may take the short cut.
    pub fn cgroup(&mut self) -> PathBuf {
        self.cgroup.get_or_insert_with(Cgroup::new).path.clone()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What a failed test's daemon left pinned.
        let _ = fs::remove_dir_all(&self.pin_path);
        let _ = fs::remove_dir_all(self.state_path().parent().expect("a directory"));
    }
}

/// The value of a counter of the pinned maps, which outlive daemons.
pub fn pinned_counter(lab: &Lab, reason: Reason) -> u64 {
    let path = lab.pin_path.join(format!("maps-{LAYOUT}/COUNTERS"));
    let map = Map::from_map_data(MapData::from_pin(path).expect("pinned")).expect("a map");
    let counters = PerCpuArray::<_, u64>::try_from(map).expect("of this kind");
    counters.get(&(reason as u32), 0).expect("readable").iter().sum()
}

/// The value of a counter.
pub fn counter(interception: &Interception, name: &str) -> u64 {
    let counters = interception.counters();
    let found = counters.iter().find(|(counter, _)| counter.strip_prefix("interception.") == Some(name));
    found.unwrap_or_else(|| panic!("no counter {name} in {counters:?}")).1
}

struct Cgroup {
    path: PathBuf,
    before: PathBuf,
}

impl Cgroup {
    fn new() -> Self {
        let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
        let fields: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
        let root = fields.iter().find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1];
        let own = fs::read_to_string("/proc/self/cgroup").expect("/proc/self/cgroup");
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("this process is in a v2 cgroup");
        let path = PathBuf::from(root).join(format!("culvert-test-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        fs::write(path.join("cgroup.procs"), "0").expect("move into the cgroup");
        Self { path, before: PathBuf::from(root).join(own) }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.before.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.path);
    }
}
