//! Control planes that are not ours, as programs: gRPC's own stack in Python (`tests/peers`), and sovereign.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

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
        let mut command = script("control_plane.py")?;
        command.arg(&dir);
        Peer::reporting(command, dir)?.with_port()
    }

    /// A gRPC service that answers every call with `name`, on all addresses.
    pub fn grpc_service(name: &str) -> Result<Peer> {
        let mut command = script("xds_client.py")?;
        command.args(["serve", name]);
        Peer::reporting(command, scratch_dir()?)?.with_port()
    }

    /// A caller that finds `target` by gRPC's own xDS client, at the control plane on that port of 127.0.0.1; see
    /// [`Peer::call`].
    pub fn grpc_caller(target: &str, control_plane: u16) -> Result<Peer> {
        Peer::grpc_client("call", target, control_plane)
    }

    /// The same, that does not wait for a service that there is not, and reads what a control plane says of missing resources.
    pub fn grpc_asker(target: &str, control_plane: u16) -> Result<Peer> {
        Peer::grpc_client("ask", target, control_plane)
    }

    fn grpc_client(mode: &str, target: &str, control_plane: u16) -> Result<Peer> {
        let bootstrap = json!({
            "node": { "id": "grpc-1", "cluster": "callers" },
            "xds_servers": [{
                "server_uri": format!("127.0.0.1:{control_plane}"),
                "channel_creds": [{ "type": "insecure" }],
                "server_features": ["xds_v3"],
            }],
        });
        let mut command = script("xds_client.py")?;
        command.args([mode, target]).env("GRPC_XDS_BOOTSTRAP_CONFIG", bootstrap.to_string());
        if mode == "ask" {
            command.env("GRPC_EXPERIMENTAL_XDS_DATA_ERROR_HANDLING", "true");
        }
        Peer::reporting(command, scratch_dir()?)
    }

    /// One call of a [`Peer::grpc_caller`]: the answer.
    pub fn call(&mut self) -> Result<String> {
        let before = self.events().len();
        self.tell("call")?;
        let event = wait_until(START_DEADLINE, "the call to end", || {
            self.events().get(before).cloned().context("no answer yet")
        })?;
        let answer =
            event["answer"].as_str().with_context(|| format!("the call failed: {event}: {}", self.stderr()))?;
        Ok(answer.to_owned())
    }

    /// A program that reports events on its standard output, and is told what to do on its standard input.
    fn reporting(mut command: Command, dir: PathBuf) -> Result<Peer> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
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
        Ok(peer)
    }

    /// Takes the port from its first report.
    fn with_port(mut self) -> Result<Peer> {
        let port = self.event(|event| event["port"].as_u64().is_some())?["port"].as_u64();
        self.port = port.and_then(|port| u16::try_from(port).ok()).context("it printed no port")?;
        Ok(self)
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("it takes no commands")?;
        writeln!(stdin, "{line}").context("telling it what to do")
    }

    /// Serves these resources from now on.
    pub fn serve(&mut self, resources: &Value) -> Result<()> {
        fs::write(self.dir.join("resources.json"), resources.to_string())?;
        self.tell("read")
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

/// A script of ours on gRPC's Python packages.
fn script(name: &str) -> Result<Command> {
    let mut command = python()?;
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("peers").join(name));
    Ok(command)
}

fn python() -> Result<Command> {
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", peers()?).env("PYTHONUNBUFFERED", "1").env("PYTHONWARNINGS", "ignore");
    Ok(command)
}
