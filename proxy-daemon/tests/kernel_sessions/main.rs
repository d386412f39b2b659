//! Payload past TCP beside plain connections: random sessions through `culvertd`, with the short cut off, on, on both ways,
//! and with pods joined, must come to what they come to without a proxy.
//!
//! The seed of a run is printed; `CULVERT_SESSIONS_SEED` takes it, `CULVERT_SESSIONS` another number of sessions.
//! `CULVERT_SESSIONS_MIB` says how much a receiver is to have no room for.

#[path = "../kernel_lab/mod.rs"]
mod kernel_lab;
mod session;

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use kernel_lab::*;
use session::{Outcome, Run, Session};

/// Connections to these ports pass the daemon by.
const DIRECT: u16 = 9000;
/// Connections to these go through it.
const PROXIED: u16 = 8000;
/// Sessions that run at a time.
const LANES: u16 = 8;
/// A second address of each pod, which gets its payload by TCP: programs that splice(2) need that.
const TCP_CLIENT: &str = "10.201.1.3";
const TCP_SERVER: &str = "10.201.2.3";

/// `culvertd` on the lab's node, which carries the pods' connections to where they were going.
struct Daemon {
    process: Child,
    dir: tempfile::TempDir,
    lab: Lab,
}

/// The daemon's bootstrap. `idle`: the TCP proxy's idle timeout.
fn bootstrap(lab: &mut Lab, dir: &Path, idle: &str) -> String {
    let cgroup = lab.cgroup();
    let direct: Vec<String> = (0..LANES).map(|lane| (DIRECT + lane).to_string()).collect();
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 9901}}}}}}
static_resources:
  clusters:
  - {{name: original, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 10s}}
  listeners:
  - name: outbound
    address: {{socket_address: {{address: "::", port_value: 15001, ipv4_compat: true}}}}
    transparent: true
    listener_filters:
    - {{name: dst, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}}}
    - {{name: src, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: original
          idle_timeout: {idle}
          access_log:
          - name: file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {log}
              log_format: {{text_format_source: {{inline_string: "%DOWNSTREAM_REMOTE_ADDRESS% %BYTES_RECEIVED% %BYTES_SENT%\n"}}}}
bootstrap_extensions:
- name: culvert.bootstrap.interception
  typed_config:
    "@type": type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception
    interfaces: ["pod*"]
    pods:
    - {{address: {CLIENT}}}
    - {{address: {SERVER}}}
    - {{address: {TCP_CLIENT}, acceleration: SHORTCUT}}
    - {{address: {TCP_SERVER}, acceleration: SHORTCUT}}
    acceleration: JOINED
    excluded_ports: [{direct}]
    shortcut_cgroup: {cgroup}
    pin_path: {pins}
    state_path: {state}
"#,
        log = dir.join("access.log").display(),
        direct = direct.join(", "),
        cgroup = cgroup.display(),
        pins = lab.pin_path.display(),
        state = lab.state_path().display(),
    )
}

/// `culvertd` on the lab's node.
fn culvertd(lab: &Lab, dir: &Path, config: &str) -> Command {
    let path = dir.join("culvertd.yaml");
    fs::write(&path, config).expect("bootstrap");
    let namespace = format!("--net=/run/netns/{}", lab.node.name);
    let mut command = Command::new("nsenter");
    command.args([&namespace, env!("CARGO_BIN_EXE_culvertd"), "--concurrency", "2", "-c"]).arg(path);
    command
}

impl Daemon {
    /// `idle`: the TCP proxy's idle timeout.
    fn start(idle: &str) -> Self {
        let mut lab = Lab::new();
        lab.client.ip(&format!("addr add {TCP_CLIENT}/24 dev eth0"));
        lab.server.ip(&format!("addr add {TCP_SERVER}/24 dev eth0"));
        let dir = tempfile::tempdir().expect("a directory");
        let config = bootstrap(&mut lab, dir.path(), idle);
        let process = culvertd(&lab, dir.path(), &config).spawn().expect("culvertd starts");
        Self::of(process, dir, lab)
    }

    /// When it is ready.
    fn of(process: Child, dir: tempfile::TempDir, lab: Lab) -> Self {
        let daemon = Self { process, dir, lab };
        let start = Instant::now();
        while !daemon.ask("GET", "/ready").is_some_and(|answer| answer.contains("LIVE")) {
            assert!(start.elapsed() < 3 * DEADLINE, "culvertd is not ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    /// Asks the admin interface; `None`: it does not answer.
    fn ask(&self, method: &str, path: &str) -> Option<String> {
        self.lab.node.run(|| {
            let mut stream = std::net::TcpStream::connect("127.0.0.1:9901").ok()?;
            write!(stream, "{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                .ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            Some(answer)
        })
    }

    fn stat(&self, name: &str) -> u64 {
        let answer = self.ask("GET", "/stats?filter=interception").expect("stats");
        let line = answer.lines().find_map(|line| line.strip_prefix(&format!("interception.{name}: ")));
        line.unwrap_or_else(|| panic!("no {name} in {answer}")).trim().parse().expect("a number")
    }

    fn accelerate(&self, level: &str) {
        let answer = self.ask("POST", &format!("/interception/acceleration?level={level}")).expect("answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    /// What there is to know when something does not go on: the sockets, with what waits in them, and the counters.
    fn describe(&self) -> String {
        let sockets = |name: &str| {
            let output = Command::new("ip")
                .args(["netns", "exec", name, "ss", "-tnmoi", "state", "connected", "exclude", "time-wait"])
                .output();
            output.map_or_else(|error| error.to_string(), |output| String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let places = [&self.lab.client, &self.lab.node, &self.lab.server];
        let mut text: String =
            places.iter().map(|place| format!("{}:\n{}", place.name, sockets(&place.name))).collect();
        text.push_str(&self.ask("GET", "/stats?filter=interception").unwrap_or_else(|| "no statistics".to_owned()));
        text
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("access.log")
    }

    /// What the access log says of connections: the client's address, what it sent, what it got.
    fn logged(&self) -> HashSet<(String, u64, u64)> {
        let _ = self.ask("POST", "/reopen_logs");
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let entry = |line: &str| {
            let [client, up, down] = line.split(' ').collect::<Vec<_>>().try_into().expect("three words");
            (client.to_owned(), up.parse().expect("bytes"), down.parse().expect("bytes"))
        };
        text.lines().map(entry).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let process = nix::unistd::Pid::from_raw(self.process.id() as i32);
            let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM);
            let _ = self.process.wait();
        }
    }
}

/// Runs all sessions, and returns what each came to. Of the first failure on none is begun any more.
fn run_all(daemon: &Daemon, seed: u64, level: &'static str, sessions: &[Session], first_port: u16) -> Vec<Outcome> {
    let lab = &daemon.lab;
    let run = Run { seed, level, failed: OnceLock::new(), describe: &|| daemon.describe() };
    let lanes: Vec<std::thread::Result<Vec<(usize, Outcome)>>> = std::thread::scope(|scope| {
        let lane = |lane: u16| {
            let run = &run;
            scope.spawn(move || {
                let port = first_port + lane;
                let listener = lab.server.listen(&format!("0.0.0.0:{port}"));
                let own = sessions.iter().enumerate().skip(lane.into()).step_by(LANES.into());
                own.take_while(|_| run.failed.get().is_none())
                    .map(|(number, session)| (number, session.run(run, number, lab, &listener, port)))
                    .collect()
            })
        };
        let threads: Vec<_> = (0..LANES).map(lane).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    // Said once more, as the last word.
    assert!(run.failed.get().is_none(), "{}", run.failed.get().expect("not none"));
    let lane = |lane: std::thread::Result<_>| lane.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let mut all: Vec<_> = lanes.into_iter().flat_map(lane).collect();
    all.sort_by_key(|(number, _)| *number);
    all.into_iter().map(|(_, outcome)| outcome).collect()
}

fn number_from(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}: not a number")))
}

#[test]
fn random_sessions_come_to_what_plain_connections_come_to() {
    let seed = number_from("CULVERT_SESSIONS_SEED", fastrand::u64(..));
    let count = number_from("CULVERT_SESSIONS", 1000);
    println!("CULVERT_SESSIONS_SEED={seed} repeats this run");
    let sessions: Vec<Session> = (0..count).map(|number| Session::random(seed, number)).collect();
    let daemon = Daemon::start("3600s");
    let began = Instant::now();
    let plain = run_all(&daemon, seed, "plain", &sessions, DIRECT);
    println!("plain: {:?}", began.elapsed());
    for level in ["off", "shortcut", "both-ways", "joined"] {
        daemon.accelerate(level);
        let before = ["shortcut.bytes", "joined.bytes", "joined.connections"].map(|name| daemon.stat(name));
        let began = Instant::now();
        let outcomes = run_all(&daemon, seed, level, &sessions, PROXIED);
        let after = ["shortcut.bytes", "joined.bytes", "joined.connections"].map(|name| daemon.stat(name));
        let [short, joined, connections] = [0, 1, 2].map(|index| after[index] - before[index]);
        println!("{level}: {:?}, {short} bytes by the short cut, {joined} joined, of {connections}", began.elapsed());
        assert_eq!(short > 0, level != "off");
        assert_eq!((joined > 0, connections > 0), (level == "joined", level == "joined"));
        for (number, (outcome, plain)) in outcomes.iter().zip(&plain).enumerate() {
            let session = &sessions[number];
            let agrees = outcome.agrees_with(plain);
            assert!(
                agrees,
                "CULVERT_SESSIONS_SEED={seed}, {level}, session {number}: {outcome:?}, plain {plain:?}: {session:?}"
            );
        }
        let expected: Vec<_> = outcomes.iter().filter_map(Outcome::logged).collect();
        eventually("the access log has every connection, with its bytes", || {
            let logged = daemon.logged();
            expected.iter().all(|entry| logged.contains(entry))
        });
    }
    // What cannot join is carried all the same, and counted: programs that wait inside the kernel, and pods that have it off.
    // Among a few sessions there may be none of these.
    let refused = ["joined.refused_client", "joined.refused_off"].map(|name| daemon.stat(name));
    assert!(count < 200 || refused.iter().all(|count| *count > 0), "{refused:?}");
}

/// A connection whose pods are joined: at first bytes pass the daemon, and then they do not.
fn joined(daemon: &Daemon) -> (Stream, Stream) {
    let listener = daemon.lab.server.listen("0.0.0.0:8100");
    let mut client = daemon.lab.client.connect(&format!("{SERVER}:8100")).expect("connects");
    let (mut served, _) = accept(&listener);
    eventually("payload goes past the daemon", || {
        let before = daemon.stat("joined.bytes");
        exchange(&mut client, &mut served);
        daemon.stat("joined.bytes") == before + 10
    });
    (client, served)
}

fn exchange(client: &mut Stream, served: &mut Stream) {
    say(client, served);
    say(served, client);
}

fn say(from: &mut Stream, to: &mut Stream) {
    from.write_all(b"hello").expect("writes");
    let mut word = [0; 5];
    to.read_exact(&mut word).expect("reads");
    assert_eq!(&word, b"hello");
}

fn fails_to_write(stream: &Stream) {
    eventually("writing fails", || {
        (&stream.0).write(&[0; 10]).is_err_and(|error| error.kind() != ErrorKind::WouldBlock)
    });
}

fn receive_end(stream: &mut Stream) {
    assert_eq!(stream.read(&mut [0; 16]).expect("the end"), 0);
}

/// Else a connection of the pod's own to the same server, past the daemon, might have the port of one of ours, and its answers
/// would be steered to the daemon.
#[test]
fn connections_in_a_pods_name_have_ports_that_the_pod_does_not_take_itself() {
    let daemon = Daemon::start("3600s");
    let listener = daemon.lab.server.listen("0.0.0.0:8100");
    let range = daemon.lab.client.run(|| fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")).expect("reads");
    let range: Vec<u16> = range.split_whitespace().map(|port| port.parse().expect("a port")).collect();
    let connections: Vec<_> = std::iter::repeat_with(|| {
        let client = daemon.lab.client.connect(&format!("{SERVER}:8100")).expect("connects");
        let (served, peer) = accept(&listener);
        assert_eq!(peer.ip().to_string(), CLIENT);
        assert!(!(range[0]..=range[1]).contains(&peer.port()), "{peer} is in {range:?}");
        (client, served)
    })
    .take(50)
    .collect();
    drop(connections);
}

#[test]
fn joined_connections_keep_half_closes() {
    let daemon = Daemon::start("3600s");
    let (mut client, mut served) = joined(&daemon);
    client.write_all(b"last words").expect("writes");
    client.shutdown(Shutdown::Write).expect("half close");
    let mut got = Vec::new();
    served.read_to_end(&mut got).expect("reads");
    assert_eq!(got, b"last words");
    let before = daemon.stat("joined.bytes");
    served.write_all(b"answer").expect("writes");
    let mut answer = [0; 6];
    client.read_exact(&mut answer).expect("reads");
    assert_eq!(daemon.stat("joined.bytes"), before + 6, "the other direction stays joined");
    served.shutdown(Shutdown::Write).expect("half close");
    receive_end(&mut client);
}

#[test]
fn the_idle_timeout_knows_what_goes_past_the_daemon() {
    let daemon = Daemon::start("3s");
    let (mut client, mut served) = joined(&daemon);
    let start = Instant::now();
    // Twice as long as it may be idle, and never idle.
    while start.elapsed() < Duration::from_secs(6) {
        exchange(&mut client, &mut served);
        std::thread::sleep(Duration::from_millis(100));
    }
    let quiet = Instant::now();
    receive_end(&mut client);
    receive_end(&mut served);
    assert!(quiet.elapsed() > Duration::from_secs(1), "{:?}", quiet.elapsed());
}

#[test]
fn a_reset_of_a_joined_connection_reaches_the_other_side() {
    let daemon = Daemon::start("3600s");
    let (client, mut served) = joined(&daemon);
    socket2::SockRef::from(&client.0).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
    drop(client);
    // As end or as reset, as through any proxy; and what it says then comes to nothing.
    let _ = served.read(&mut [0; 16]);
    fails_to_write(&served);
}

#[test]
fn the_daemon_gets_what_a_receiver_has_no_room_for() {
    let length = usize::try_from(number_from("CULVERT_SESSIONS_MIB", 24) << 20).expect("a length");
    let daemon = Daemon::start("3600s");
    let (mut client, mut served) = joined(&daemon);
    let piece: Vec<u8> = (0..length).map(|at| session::byte_at(7, at as u64)).collect();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            client.write_all(&piece).expect("writes");
            client.shutdown(Shutdown::Write).expect("half close");
        });
        // It begins to read when its window has long been full.
        eventually("the receiver is behind", || daemon.stat("joined.receiver_behind") > 0);
        let mut got = Vec::new();
        served.read_to_end(&mut got).expect("reads");
        assert_eq!(got.len(), length);
        assert!((0..length).all(|at| got[at] == session::byte_at(7, at as u64)));
    });
}

/// The runtime takes a short read for an empty socket; what came by TCP after the short cut was full would wait for ever.
#[test]
fn the_daemon_reads_what_came_by_both_ways() {
    const LENGTH: usize = 600_000;
    let daemon = Daemon::start("3600s");
    daemon.accelerate("shortcut");
    let listener = daemon.lab.server.listen("0.0.0.0:8100");
    let mut client = daemon.lab.client.connect(&format!("{SERVER}:8100")).expect("connects");
    let (mut served, _) = accept(&listener);
    exchange(&mut client, &mut served);
    let behind = daemon.stat("shortcut.receiver_behind");
    let process = nix::unistd::Pid::from_raw(daemon.process.id() as i32);
    for _ in 0..5 {
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGSTOP).expect("stops");
        client.write_all(&[7; LENGTH]).expect("writes");
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGCONT).expect("goes on");
        let mut got = vec![0; LENGTH];
        served.read_exact(&mut got).expect("all of it comes");
    }
    assert!(daemon.stat("shortcut.receiver_behind") > behind, "it came by one way only");
}

#[test]
fn the_switch_holds_at_once() {
    let daemon = Daemon::start("3600s");
    let (mut client, mut served) = joined(&daemon);
    daemon.accelerate("shortcut");
    let before = ["joined.bytes", "shortcut.bytes"].map(|name| daemon.stat(name));
    exchange(&mut client, &mut served);
    assert_eq!(daemon.stat("joined.bytes"), before[0]);
    assert!(daemon.stat("shortcut.bytes") > before[1]);
    daemon.accelerate("off");
    let before = daemon.stat("shortcut.bytes");
    exchange(&mut client, &mut served);
    assert_eq!(daemon.stat("shortcut.bytes"), before);
    assert!(daemon.stat("shortcut.switched_off") > 0);
    // New connections are not even registered, and there is nothing to wait for.
    let sockets = daemon.stat("shortcut.sockets");
    let listener = daemon.lab.server.listen("0.0.0.0:8101");
    let mut other = daemon.lab.client.connect(&format!("{SERVER}:8101")).expect("connects");
    exchange(&mut other, &mut accept(&listener).0);
    assert_eq!(daemon.stat("shortcut.sockets"), sockets);
    assert!(daemon.stat("shortcut.sockets_off") > 0);
    let answer = daemon.ask("POST", "/interception/acceleration?level=up").expect("answers");
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("off, automatic, shortcut, both-ways or joined"),
        "{answer}"
    );
    let answer = daemon.ask("POST", "/interception/acceleration?level=off&listener=x").expect("answers");
    assert!(answer.contains("listener is outbound or inbound"), "{answer}");
    let status = daemon.ask("GET", "/interception/pods").expect("answers");
    assert!(status.contains("\"run_time\": \"off\"") || status.contains("\"run_time\":\"off\""), "{status}");
}

#[test]
fn when_the_daemon_dies_joined_connections_end() {
    let mut daemon = Daemon::start("3600s");
    let (mut client, mut served) = joined(&daemon);
    daemon.process.kill().expect("killed");
    let _ = daemon.process.wait();
    for stream in [&mut client, &mut served] {
        let end = stream.read(&mut [0; 16]);
        assert!(!matches!(end, Ok(1..)), "{end:?}");
    }
    fails_to_write(&client);
}

/// What a daemon says that ends at once, with this bootstrap; none: it serves.
fn refusal(lab: &Lab, dir: &Path, config: &str) -> Option<String> {
    let said = fs::File::create(dir.join("said")).expect("a file");
    let mut process = culvertd(lab, dir, config).stderr(said).spawn().expect("starts");
    let start = Instant::now();
    let status = loop {
        match process.try_wait().expect("waits") {
            Some(status) => break Some(status),
            None if start.elapsed() > DEADLINE => break None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let _ = process.kill();
    let _ = process.wait();
    status.filter(|status| !status.success()).map(|_| fs::read_to_string(dir.join("said")).expect("text"))
}

/// Its connections would come back to itself, and time out.
#[test]
fn original_src_with_the_mark_of_interception_is_refused() {
    const FILTER: &str = "{name: src, typed_config: {\"@type\": \
                          type.googleapis.com/envoy.extensions.filters.http.original_src.v3.OriginalSrc, mark: 0xC17}}";
    let mut lab = Lab::new();
    let dir = tempfile::tempdir().expect("a directory");
    let plain = bootstrap(&mut lab, dir.path(), "1s");
    let manager = format!(
        "default_filter_chain: {{filters: [{{name: http, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
         stat_prefix: http, route_config: {{}}, http_filters: [{FILTER}, {{name: router, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]}}"
    );
    for (config, place) in [
        (plain.replace("v3.OriginalSrc}", "v3.OriginalSrc, mark: 0xC17}"), "listener_filters"),
        (plain.replace("    filter_chains:\n", &format!("    {manager}\n    filter_chains:\n")), "http_filters"),
    ] {
        assert!(config.contains("mark: 0xC17"));
        let said = refusal(&lab, dir.path(), &config).expect("it is refused");
        let expected = format!("{place}: original_src.mark 0xc17 is the mark of culvert.bootstrap.interception");
        assert!(said.contains(&expected), "{said}");
    }
}

/// A mark that a cluster sets itself: the connection fails at once, and does not come back again and again.
#[test]
fn a_clusters_own_mark_of_interception_fails_its_connections() {
    let mut lab = Lab::new();
    let dir = tempfile::tempdir().expect("a directory");
    // SOL_SOCKET, SO_MARK; 0xC17.
    const BIND: &str = "upstream_bind_config: {socket_options: [{level: 1, name: 36, int_value: 3095}]}";
    let config = bootstrap(&mut lab, dir.path(), "1s");
    let config = config.replace("connect_timeout: 10s", &format!("connect_timeout: 10s, {BIND}"));
    // The client's address would come before it.
    let own = config.lines().filter(|line| !line.contains("name: src")).collect::<Vec<_>>().join("\n");
    let process = culvertd(&lab, dir.path(), &own).spawn().expect("culvertd starts");
    let daemon = Daemon::of(process, dir, lab);
    let begun = Instant::now();
    let mut client = daemon.lab.client.connect("10.201.2.2:8000").expect("connects");
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    assert!(begun.elapsed() < DEADLINE / 2, "it waited for the timeout of the connection");
    assert_eq!(daemon.stat("redirected"), 1);
}
