//! culvertd, or the real Envoy, on this machine's loopback with a given bootstrap: for tests that need no lab.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use crate::binaries::{binary, envoy};
use crate::http1::{Request, Response};
use crate::stats::{Stats, admin_get};
use crate::wait_until;

/// How long a proxy may take to become ready.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// How long any response may take.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// Which proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// culvertd, as this workspace builds it.
    Culvert,
    /// The real Envoy: `$ENVOY`, else the one that `cargo xtask test` put into target/envoy.
    Envoy,
}

/// A running proxy. Dropping it kills it.
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    admin: String,
}

impl Kind {
    fn command(self) -> Result<Command> {
        match self {
            Self::Culvert => Ok(Command::new(binary("culvertd")?)),
            Self::Envoy => Ok(Command::new(envoy()?)),
        }
    }
}

impl Daemon {
    /// Starts a proxy on the bootstrap `yaml` (without `admin`, which is added on a port of its own) with one worker, and
    /// waits until it is ready.
    pub fn start(kind: Kind, yaml: &str) -> Result<Self> {
        Self::start_with(kind, yaml, &[])
    }

    /// Like [`Self::start`] with further flags.
    pub fn start_with(kind: Kind, yaml: &str, flags: &[&str]) -> Result<Self> {
        let dir = scratch_dir()?;
        let admin_port = free_port()?;
        let config = dir.join("bootstrap.yaml");
        let admin =
            format!("admin:\n  address: {{socket_address: {{address: 127.0.0.1, port_value: {admin_port}}}}}\n{yaml}");
        fs::write(&config, admin).with_context(|| format!("writing {}", config.display()))?;
        let mut command = kind.command()?;
        if kind == Kind::Envoy {
            // Envoys that share an id share a shared-memory segment; several run at a time here.
            command.arg("--disable-hot-restart");
        }
        command.arg("-c").arg(&config).args(["-l", "warning"]).args(flags);
        if !flags.contains(&"--concurrency") {
            command.args(["--concurrency", "1"]);
        }
        command.stdin(Stdio::null());
        command.stdout(fs::File::create(dir.join("out"))?).stderr(fs::File::create(dir.join("err"))?);
        let child = command.spawn().with_context(|| format!("starting {kind:?}: is it installed?"))?;
        let mut daemon = Self { child, dir, admin: format!("127.0.0.1:{admin_port}") };
        wait_until(START_DEADLINE, &format!("{kind:?} to be ready"), || {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("it ended ({status}): {}", daemon.stderr());
            }
            admin_get(&daemon.admin, "/ready")
        })?;
        Ok(daemon)
    }

    /// A file name in this daemon's own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it has printed as errors and log lines.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir.join("err")).unwrap_or_default()
    }

    /// What it has printed.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.dir.join("out")).unwrap_or_default()
    }

    /// GET from the admin interface.
    pub fn admin(&self, path: &str) -> Result<String> {
        admin_get(&self.admin, path)
    }

    /// The admin interface's `host:port`.
    pub fn admin_address(&self) -> &str {
        &self.admin
    }

    /// Its counters and gauges.
    pub fn stats(&self) -> Result<Stats> {
        Stats::read(&self.admin)
    }

    /// What it has of the machine's memory, in bytes (`VmRSS`).
    pub fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("VmRSS is `{line}`"))?;
        Ok(kib * 1024)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).context("signalling the daemon")
    }

    /// Waits for it to end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        wait_until(deadline, "the daemon to end", || self.child.try_wait()?.context("it is still running"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            // A failed test leaves the directory to look at.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// What a program that ends by itself printed.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; none if it was killed.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs culvertd with `arguments` and, if given, `yaml` as its `-c` file; kills it and fails after `deadline`.
pub fn culvertd_to_end(yaml: Option<&str>, arguments: &[&str], deadline: Duration) -> Result<Ended> {
    let dir = scratch_dir()?;
    let mut command = Command::new(binary("culvertd")?);
    if let Some(yaml) = yaml {
        let config = dir.join("bootstrap.yaml");
        fs::write(&config, yaml)?;
        command.arg("-c").arg(config);
    }
    let (out, err) = (dir.join("out"), dir.join("err"));
    let mut child = command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out)?)
        .stderr(fs::File::create(&err)?)
        .spawn()?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if start.elapsed() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("culvertd {arguments:?} was still running after {deadline:?}: {}", fs::read_to_string(&err)?);
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let ended = Ended { code: status.code(), stdout: fs::read_to_string(out)?, stderr: fs::read_to_string(err)? };
    fs::remove_dir_all(dir)?;
    Ok(ended)
}

/// Sends one request to 127.0.0.1:`port` on a connection of its own.
pub fn fetch(port: u16, mut request: Request) -> Result<Response> {
    if request.headers.get("host").is_none() {
        request = request.header("host", "test.example");
    }
    let stream = TcpStream::connect(("127.0.0.1", port)).with_context(|| format!("connecting to port {port}"))?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    let mut stream = std::io::BufReader::new(stream);
    request.write(stream.get_mut())?;
    Response::read(&mut stream, &request.method)
}

/// Sends `bytes` as they are to 127.0.0.1:`port` and reads the response to them; `method` says whether it has a body.
pub fn fetch_raw(port: u16, bytes: &[u8], method: &str) -> Result<Response> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).with_context(|| format!("connecting to port {port}"))?;
    stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
    // The other side may refuse, and close, before it has read all; its response tells.
    let _ = stream.write_all(bytes);
    Response::read(&mut std::io::BufReader::new(stream), method)
}

/// The sockets that hold what [`free_port`] gave.
static HELD: Mutex<Vec<Socket>> = Mutex::new(Vec::new());

/// A port of 127.0.0.1 that nobody else is given as long as this process lives.
///
/// A port that was only free a moment ago may be another test's by the time at which it is used; with proxies, which listen with
/// `SO_REUSEPORT`, both would even get some of the connections. So the port is bound here, never listened on: connections to it are refused
/// until somebody who is told of it listens, which all can that set `SO_REUSEADDR`. The kernel gives it to none who asks for any port.
pub fn free_port() -> Result<u16> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
    let port = socket.local_addr()?.as_socket().context("an address of IP")?.port();
    HELD.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
    Ok(port)
}

/// A new directory below the system's directory for temporary files.
pub fn scratch_dir() -> Result<PathBuf> {
    static SERIAL: AtomicU32 = AtomicU32::new(0);
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("culvert-test-{}-{serial}", std::process::id()));
    ensure!(!dir.exists() || fs::remove_dir_all(&dir).is_ok(), "cannot replace {}", dir.display());
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}
