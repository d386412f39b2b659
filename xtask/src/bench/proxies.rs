//! The proxies that are measured, and the server behind them.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// How long a server may take to listen.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// A proxy that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Contender {
    Culvert,
    Envoy,
    HaProxy,
    Nginx,
}

/// In the order of each round.
pub(super) const CONTENDERS: [Contender; 4] =
    [Contender::Culvert, Contender::Envoy, Contender::HaProxy, Contender::Nginx];

impl Contender {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Culvert => "culvertd",
            Self::Envoy => "Envoy",
            Self::HaProxy => "HAProxy",
            Self::Nginx => "nginx",
        }
    }
}

/// Ports of 127.0.0.1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    pub(super) http1: u16,
    pub(super) http2: u16,
    pub(super) tcp: u16,
    /// HTTP/1.1, with filters.
    pub(super) filters: u16,
    admin: u16,
    upstream: u16,
    /// Prior knowledge HTTP/2.
    upstream_http2: u16,
}

impl Ports {
    /// Ports that are free now.
    pub(super) fn free() -> Result<Self> {
        // All are held until all are chosen, so that they differ.
        let listeners = (0..7).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
        let ports = listeners.iter().map(|l| Ok(l.local_addr()?.port())).collect::<Result<Vec<u16>>>()?;
        let [http1, http2, tcp, filters, admin, upstream, upstream_http2] = ports[..] else {
            bail!("expected seven ports")
        };
        Ok(Self { http1, http2, tcp, filters, admin, upstream, upstream_http2 })
    }
}

/// What is measured, and where its files go.
pub(super) struct Programs {
    pub(super) culvertd: PathBuf,
    pub(super) envoy: PathBuf,
    pub(super) dir: PathBuf,
    pub(super) ports: Ports,
}

/// A running server; dropping it ends it.
pub(super) struct Server {
    child: Child,
}

impl Server {
    /// The server behind the proxies.
    pub(super) fn upstream(programs: &Programs) -> Result<Self> {
        let config = programs.config("upstream.conf", include_str!("upstream.conf"))?;
        let mut command = on_core(OTHERS_CORE, Path::new("nginx"));
        command.arg("-c").arg(config);
        Self::spawn("upstream", command, programs, programs.ports.upstream)
    }

    /// A proxy with one worker.
    pub(super) fn start(proxy: Contender, programs: &Programs) -> Result<Self> {
        let (program, arguments): (&Path, &[&str]) = match proxy {
            Contender::Culvert => (&programs.culvertd, &["--concurrency", "1", "-l", "warning", "-c"]),
            Contender::Envoy => {
                (&programs.envoy, &["--concurrency", "1", "-l", "warning", "--disable-hot-restart", "-c"])
            }
            Contender::HaProxy => (Path::new("haproxy"), &["-db", "-f"]),
            Contender::Nginx => (Path::new("nginx"), &["-c"]),
        };
        let config = match proxy {
            Contender::Culvert | Contender::Envoy => programs.config("envoy.yaml", include_str!("envoy.yaml"))?,
            Contender::HaProxy => programs.config("haproxy.cfg", include_str!("haproxy.cfg"))?,
            Contender::Nginx => programs.config("nginx.conf", include_str!("nginx.conf"))?,
        };
        let mut command = on_core(PROXY_CORE, program);
        command.args(arguments).arg(config);
        let server = Self::spawn(proxy.name(), command, programs, programs.ports.http1)?;
        wait_for_port(programs.ports.tcp).with_context(|| format!("{} did not start", proxy.name()))?;
        Ok(server)
    }

    fn spawn(name: &str, mut command: Command, programs: &Programs, port: u16) -> Result<Self> {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            bail!("port {port} is in use: something of the last run is left");
        }
        let errors = programs.dir.join(format!("{name}.err"));
        command.stdin(Stdio::null()).stdout(File::create(programs.dir.join(format!("{name}.out")))?);
        let child = command.stderr(File::create(&errors)?).spawn().with_context(|| format!("starting {name}"))?;
        let mut server = Self { child };
        let waited = wait_for_port(port);
        if let Some(status) = server.child.try_wait()? {
            bail!("{name} ended ({status}): {}", fs::read_to_string(&errors)?.trim());
        }
        waited.with_context(|| format!("{name} did not start, see {}", errors.display()))?;
        Ok(server)
    }

    /// The processor time that the process and its children (nginx's worker) have used, user and system, all threads.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let ticks = self.sum(|process| {
            let path = format!("/proc/{process}/stat");
            let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            // The second field is a name in parentheses that may hold anything; utime and stime are the 14th and 15th.
            let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            let fields: Vec<&str> = rest.split_whitespace().collect();
            let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
            ticks(11).zip(ticks(12)).map(|(user, system)| user + system).with_context(|| format!("{path} is malformed"))
        })?;
        // SAFETY: no memory is passed.
        let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
        Ok(Duration::from_micros(ticks * 1_000_000 / per_second))
    }

    /// The resident memory, in bytes.
    pub(super) fn rss_bytes(&self) -> Result<u64> {
        self.sum(|process| {
            let path = format!("/proc/{process}/status");
            let status = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            let kib = status
                .lines()
                .find_map(|line| line.strip_prefix("VmRSS:"))
                .and_then(|value| value.trim().strip_suffix(" kB").and_then(|kib| kib.trim().parse::<u64>().ok()));
            Ok(kib.with_context(|| format!("{path} has no VmRSS"))? * 1024)
        })
    }

    fn sum(&self, of: impl Fn(u32) -> Result<u64>) -> Result<u64> {
        let own = self.child.id();
        let children = fs::read_to_string(format!("/proc/{own}/task/{own}/children")).unwrap_or_default();
        let children = children.split_whitespace().filter_map(|process| process.parse().ok());
        std::iter::once(own).chain(children).map(of).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // nginx's worker ends with its master only if the master is asked, not killed.
        let process = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGINT);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(3) {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Programs {
    fn config(&self, name: &str, template: &str) -> Result<PathBuf> {
        let Ports { http1, http2, tcp, filters, admin, upstream, upstream_http2 } = self.ports;
        let dir = self.dir.display().to_string();
        let mut text = template.replace("@DIR@", &dir).replace("@LOG@", &format!("{dir}/access.log"));
        for (key, port) in [
            ("@HTTP1@", http1),
            ("@HTTP2@", http2),
            ("@TCP@", tcp),
            ("@FILTERS@", filters),
            ("@ADMIN@", admin),
            ("@UPSTREAM@", upstream),
            ("@UPSTREAM_HTTP2@", upstream_http2),
        ] {
            text = text.replace(key, &port.to_string());
        }
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        // Each proxy starts with an empty log.
        File::create(self.dir.join("access.log"))?;
        Ok(path)
    }
}

/// The proxy has a core of its own, where there are two.
const PROXY_CORE: usize = 0;
/// The load generator and the upstream share the others' core.
pub(super) const OTHERS_CORE: usize = 1;

/// A command that runs on one core only; anywhere on a machine with one core.
pub(super) fn on_core(core: usize, program: &Path) -> Command {
    if std::thread::available_parallelism().is_ok_and(|cores| cores.get() > core) {
        let mut command = Command::new("taskset");
        command.arg("--cpu-list").arg(core.to_string()).arg(program);
        return command;
    }
    Command::new(program)
}

fn wait_for_port(port: u16) -> Result<()> {
    let start = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if start.elapsed() > START_DEADLINE {
            bail!("nothing listens on port {port}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
