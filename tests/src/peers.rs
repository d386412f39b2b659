//! Control planes that are not ours, as programs: gRPC's own stack in Python (`tests/peers`), and sovereign.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::binaries::peers;
use crate::daemon::{free_port, scratch_dir};
use crate::stats::admin_get;
use crate::wait_until;

const START_DEADLINE: Duration = Duration::from_secs(30);

/// A running peer; dropping it ends it.
pub struct Peer {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Its port of 127.0.0.1.
    pub port: u16,
    /// Where it reads its configuration.
    pub dir: PathBuf,
    events: Arc<Mutex<Vec<Value>>>,
}

impl Peer {
    /// A control plane on gRPC's own stack that serves the resources, a list of messages with `@type`.
    pub fn grpc(resources: &Value) -> Result<Peer> {
        let dir = scratch_dir()?;
        fs::write(dir.join("resources.json"), resources.to_string())?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/control_plane.py");
        let mut command = python()?;
        command.arg(script).arg(&dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut peer = Peer::spawn(command, dir, 0)?;
        let events = Arc::clone(&peer.events);
        let output = peer.child.stdout.take().context("no standard output")?;
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(event) = serde_json::from_str(&line) {
                    events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
                }
            }
        });
        let port = peer.event(|event| event["port"].as_u64().is_some())?["port"].as_u64();
        peer.port = port.and_then(|port| u16::try_from(port).ok()).context("it printed no port")?;
        Ok(peer)
    }

    /// Serves these resources from now on.
    pub fn serve(&mut self, resources: &Value) -> Result<()> {
        fs::write(self.dir.join("resources.json"), resources.to_string())?;
        let stdin = self.stdin.as_mut().context("it takes no commands")?;
        writeln!(stdin, "read").context("telling it to read again")
    }

    /// sovereign, with `files` (name and content) in its directory, which the files call `@DIR@`. One of them is
    /// `sovereign.yaml`.
    pub fn sovereign(files: &[(&str, &str)]) -> Result<Peer> {
        let (dir, port) = (scratch_dir()?, free_port()?);
        let path = dir.display().to_string();
        for (name, content) in files {
            fs::write(dir.join(name), content.replace("@DIR@", &path))?;
        }
        let mut command = python()?;
        command.args(["-m", "sovereign.server"]).stdin(Stdio::null());
        command.stdout(fs::File::create(dir.join("out"))?);
        command.env("SOVEREIGN_CONFIG", format!("file://{path}/sovereign.yaml"));
        command
            .env("SOVEREIGN_HOST", "127.0.0.1")
            .env("SOVEREIGN_PORT", port.to_string())
            .env("SOVEREIGN_WORKERS", "1");
        let mut peer = Peer::spawn(command, dir, port)?;
        wait_until(START_DEADLINE, "sovereign to listen", || {
            if let Some(status) = peer.child.try_wait()? {
                bail!("it ended ({status}): {}", peer.stderr());
            }
            admin_get(&format!("127.0.0.1:{port}"), "/healthcheck")
        })?;
        Ok(peer)
    }

    fn spawn(mut command: Command, dir: PathBuf, port: u16) -> Result<Peer> {
        command.stderr(fs::File::create(dir.join("err"))?);
        let mut child = command.spawn().context("starting python3: is it installed?")?;
        let stdin = child.stdin.take();
        Ok(Peer { child, stdin, port, dir, events: Arc::default() })
    }

    /// What it printed as errors.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir.join("err")).unwrap_or_default()
    }

    /// All that it reported so far.
    pub fn events(&self) -> Vec<Value> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for an event; the first that fits, from the start.
    pub fn event(&self, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = wait_until(START_DEADLINE, "an event of the control plane", || {
            let events = self.events();
            events.iter().find(|event| fits(event)).cloned().with_context(|| format!("it reported {events:?}"))
        });
        found.with_context(|| self.stderr())
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // gunicorn's worker ends with its master only if the master is asked, not killed.
        let process = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGTERM);
        let ended = wait_until(Duration::from_secs(3), "the peer to end", || {
            self.child.try_wait()?.context("it is still running")
        });
        if ended.is_err() {
            // Both fail only if it has ended.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if !thread::panicking() {
            // A failed test leaves the directory to look at.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn python() -> Result<Command> {
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", peers()?).env("PYTHONUNBUFFERED", "1").env("PYTHONWARNINGS", "ignore");
    Ok(command)
}
