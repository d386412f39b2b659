//! The proxies that are measured, the servers behind them, and a client in front.

use std::fs::{self, File};
use std::io::{BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use culvert_tests::http1::{Request, Response};
use culvert_tests::wait_until;

/// A proxy that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Contender {
    Culvert,
    Envoy,
}

impl Contender {
    pub(super) fn name(self) -> &'static str {
        match self {
            Contender::Culvert => "culvertd",
            Contender::Envoy => "Envoy",
        }
    }
}

/// Where the programs are, and where their files go.
pub(super) struct Programs {
    pub(super) culvertd: PathBuf,
    pub(super) envoy: PathBuf,
    pub(super) dir: PathBuf,
}

/// A running proxy; dropping it ends it.
pub(super) struct Proxy {
    child: Child,
    /// Where it listens.
    pub(super) listener: SocketAddr,
}

/// A listener that routes by the header `x-cluster`, with clusters from ADS.
const BOOTSTRAP: &str = r#"
node: { id: bench, cluster: bench }
admin: { address: { socket_address: { address: 127.0.0.1, port_value: 0 } } }
dynamic_resources:
  ads_config:
    api_type: @API@
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services: [{ envoy_grpc: { cluster_name: xds } }]
  cds_config: { resource_api_version: V3, ads: {} }
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }
    load_assignment:
      cluster_name: xds
      endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: @XDS@ } } } }] }]
  - name: light
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: light
      endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: @ORIGIN@ } } } }] }]
  listeners:
  - name: in
    address: { socket_address: { address: 127.0.0.1, port_value: @LISTEN@ } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config:
            name: local
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: { prefix: /light }
                route: { cluster: light }
              - match: { prefix: / }
                route: { cluster_header: x-cluster }
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
"#;

impl Proxy {
    /// Starts a proxy with one worker that asks the control plane at `xds`. It listens when it has its clusters.
    pub(super) fn start(
        contender: Contender,
        programs: &Programs,
        xds: SocketAddr,
        origin: u16,
        delta: bool,
    ) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let text = BOOTSTRAP
            .replace("@API@", if delta { "DELTA_GRPC" } else { "GRPC" })
            .replace("@XDS@", &xds.port().to_string())
            .replace("@ORIGIN@", &origin.to_string())
            .replace("@LISTEN@", &listener.port().to_string());
        let config = programs.dir.join("xds.yaml");
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let mut command = match contender {
            Contender::Culvert => on_first_core(&programs.culvertd),
            Contender::Envoy => {
                let mut command = on_first_core(&programs.envoy);
                command.arg("--disable-hot-restart");
                command
            }
        };
        let errors = programs.dir.join(format!("{}-xds.err", contender.name()));
        command.args(["--concurrency", "1", "-l", "warning", "-c"]).arg(&config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&errors)?);
        let child = command.spawn().with_context(|| format!("starting {}", contender.name()))?;
        Ok(Proxy { child, listener })
    }

    /// The processor time used by all its threads, user and system, to the nanosecond.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let tasks = format!("/proc/{}/task", self.child.id());
        let mut total = 0;
        for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}: has it ended?"))? {
            let path = task?.path().join("schedstat");
            // A thread may end in between.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            total += text.split(' ').next().and_then(|first| first.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(total))
    }

    /// Resident memory in bytes.
    pub(super) fn rss(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(&path).with_context(|| format!("reading {path}: has it ended?"))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = kib.and_then(|value| value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{path} has no VmRSS"))? * 1024)
    }

    /// Waits until the listener answers.
    pub(super) fn wait_until_listening(&self) -> Result<()> {
        wait_until(Duration::from_secs(60), "the listener", || Ok(TcpStream::connect(self.listener).map(drop)?))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The proxy has a core of its own, where there are two; this process keeps to the other (see [`leave_first_core`]).
fn on_first_core(program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", "0"]).arg(program);
    command
}

/// Keeps this process off the proxy's core, where there are two.
pub(super) fn leave_first_core() -> Result<()> {
    let cores = thread::available_parallelism()?.get();
    let mut set = nix::sched::CpuSet::new();
    for core in 1..cores {
        set.set(core)?;
    }
    if cores > 1 {
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).context("leaving the proxy's core")?;
    }
    Ok(())
}

/// A server on all addresses that answers every request with one letter. Runs as long as this process.
pub(super) fn origin(letter: char) -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || answer(stream, letter));
        }
    });
    Ok(port)
}

fn answer(mut stream: TcpStream, letter: char) {
    let response = format!("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{letter}");
    let (mut buffer, mut held) = ([0; 4096], Vec::new());
    let _ = stream.set_nodelay(true);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        held.extend_from_slice(&buffer[..count]);
        while let Some(end) = held.windows(4).position(|window| window == b"\r\n\r\n") {
            held.drain(..end + 4);
            if stream.write_all(response.as_bytes()).is_err() {
                return;
            }
        }
    }
}

/// A client with one connection.
pub(super) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub(super) fn connect(to: SocketAddr) -> Result<Client> {
        let stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Client { stream: BufReader::new(stream) })
    }

    /// The status and body that the cluster answers with.
    pub(super) fn get(&mut self, target: &str, cluster: &str) -> Result<(u16, String)> {
        let request = Request::get(target).header("host", "bench").header("x-cluster", cluster);
        request.write(self.stream.get_mut())?;
        let response = Response::read(&mut self.stream, "GET")?;
        let text = response.text();
        Ok((response.status, text))
    }

    /// Asks until the cluster answers with `body`, and returns when it did.
    pub(super) fn ask_until(&mut self, cluster: &str, body: &str, limit: Duration) -> Result<Instant> {
        let start = Instant::now();
        loop {
            let (status, text) = self.get("/", cluster)?;
            if status == 200 && text == body {
                return Ok(Instant::now());
            }
            if start.elapsed() > limit {
                bail!("{cluster} still answers {status} {text:?} after {limit:?}");
            }
        }
    }
}
