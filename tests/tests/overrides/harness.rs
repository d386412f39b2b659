//! Discovery, a daemon, two revisions of `users`, and the command line.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::app::App;
use culvert_tests::binaries::binary;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::stats::admin_get;
use culvert_tests::wait_until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The developers' token.
pub const TOKEN: &str = "a-token-of-developers";

/// A program with its output in files; killed when dropped.
pub struct Running {
    child: Child,
    /// What it has written on standard error.
    err: PathBuf,
}

impl Running {
    pub fn spawn(program: &str, arguments: &[&str]) -> Result<Running> {
        let mut command = Command::new(binary(program)?);
        command.args(arguments);
        Running::spawn_command(command).with_context(|| format!("starting {program}"))
    }

    /// The same where these lines are /etc/hosts.
    pub fn spawn_with_hosts(hosts: &str, program: &str, arguments: &[&str]) -> Result<Running> {
        let file = scratch_dir()?.join("hosts");
        fs::write(&file, hosts)?;
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
        command.arg(file).arg(binary(program)?).args(arguments);
        Running::spawn_command(command).context("unshare and mount are needed")
    }

    fn spawn_command(mut command: Command) -> Result<Running> {
        let err = scratch_dir()?.join("err");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&err)?).spawn()?;
        Ok(Running { child, err })
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Waits until it has said something.
    pub fn until_said(&mut self, what: &str) -> Result<String> {
        wait_until(DEADLINE, &format!("`{what}` to be said"), || {
            let said = self.said();
            if let Some(line) = said.lines().find(|line| line.contains(what)) {
                return Ok(line.to_owned());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended ({status}): {said}");
            }
            bail!("so far: {said}")
        })
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).context("signalling")
    }

    pub fn wait(&mut self) -> Result<std::process::ExitStatus> {
        wait_until(DEADLINE, "the program to end", || self.child.try_wait()?.context("it is still running"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A culvert-discovery with one cluster of manifests.
pub struct Discovery {
    pub running: Running,
    pub url: String,
    pub manifests: PathBuf,
    pub token_file: String,
    pub xds: u16,
    /// The port of its status address.
    pub http: u16,
    flags: Vec<String>,
}

impl Discovery {
    pub fn start(further: &[&str]) -> Result<Discovery> {
        Discovery::start_at("127.0.0.1", free_port()?, further)
    }

    /// With its status address here.
    pub fn start_at(address: &str, http: u16, further: &[&str]) -> Result<Discovery> {
        let dir = scratch_dir()?;
        let manifests = dir.join("east");
        fs::create_dir(&manifests)?;
        let token_file = dir.join("token");
        fs::write(&token_file, TOKEN)?;
        let token_file = token_file.display().to_string();
        let (xds, tunnel) = (free_port()?, free_port()?);
        let mut flags = vec![
            "--cluster".to_owned(),
            format!("east={}", manifests.display()),
            "--listen".to_owned(),
            format!("127.0.0.1:{xds}"),
            "--http".to_owned(),
            format!("{address}:{http}"),
            "--developer-token-file".to_owned(),
            token_file.clone(),
        ];
        // One, unless the test says which. Nobody could have had it before.
        if !further.contains(&"--tunnels") {
            flags.extend(["--tunnels".to_owned(), format!("127.0.0.1:{tunnel},quarantine=0")]);
        }
        flags.extend(further.iter().map(|flag| (*flag).to_owned()));
        let running = spawn(&flags)?;
        let url = format!("http://{address}:{http}");
        let discovery = Discovery { running, url, manifests, token_file, xds, http, flags };
        discovery.wait_until_ready()?;
        Ok(discovery)
    }

    fn wait_until_ready(&self) -> Result<()> {
        let address = self.url.trim_start_matches("http://");
        wait_until(DEADLINE, "discovery to be ready", || {
            admin_get(address, "/ready").with_context(|| self.running.said())
        })?;
        Ok(())
    }

    /// Kills it.
    pub fn kill(&mut self) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait().map(drop)
    }

    /// Kills it and starts it again at the same ports.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.start_again()
    }

    /// Starts it again at the same ports, with another value of a flag.
    pub fn start_again_with(&mut self, flag: &str, value: &str) -> Result<()> {
        let at = self.flags.iter().position(|known| known == flag).context("a flag that it has")?;
        self.flags[at + 1] = value.to_owned();
        self.start_again()
    }

    /// Starts it again at the same ports.
    pub fn start_again(&mut self) -> Result<()> {
        self.running = spawn(&self.flags)?;
        self.wait_until_ready()
    }

    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&admin_get(self.url.trim_start_matches("http://"), "/status")?)?)
    }

    /// Writes a manifest in one step.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let partial = self.manifests.join(format!(".{name}"));
        fs::write(&partial, text)?;
        fs::rename(partial, self.manifests.join(name)).context("writing a manifest")
    }
}

fn spawn(flags: &[String]) -> Result<Running> {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Running::spawn("culvert-discovery", &flags)
}

/// A mesh of one service, behind one daemon.
pub struct Mesh {
    pub discovery: Discovery,
    pub daemon: Daemon,
    /// Where the daemon takes requests for `users`.
    pub port: u16,
    /// Where revision feature-x is.
    pub feature: u16,
    main: u16,
}

impl Mesh {
    pub fn start() -> Result<Mesh> {
        Mesh::start_with(&[])
    }

    /// With further flags for discovery.
    pub fn start_with(flags: &[&str]) -> Result<Mesh> {
        let app =
            |pod: &str, revision: &str| App { pod: pod.into(), revision: revision.into(), upstream: None }.start();
        let (main, feature) = (app("users-1", "main")?, app("users-x", "feature-x")?);
        let discovery = Discovery::start(flags)?;
        tell_of_users(&discovery, feature)?;
        let (daemon, port) = daemon("n", main, discovery.xds)?;
        let mesh = Mesh { discovery, daemon, port, feature, main };
        let header = header(&["--set", "users=feature-x"])?;
        mesh.until_revision(&header, "feature-x")?;
        Ok(mesh)
    }

    /// A further replica of discovery, at another address and the same port.
    pub fn replica(&self, address: &str) -> Result<Discovery> {
        let replica = Discovery::start_at(address, self.discovery.http, &[])?;
        tell_of_users(&replica, self.feature)?;
        Ok(replica)
    }

    /// A further node's daemon, and where it takes requests.
    pub fn node(&self, name: &str, xds: u16) -> Result<(Daemon, u16)> {
        daemon(name, self.main, xds)
    }

    /// One request for `users`, with some headers.
    pub fn ask(&self, headers: &[(String, String)]) -> Result<Response> {
        ask(self.port, headers)
    }

    /// The revision that answers a request.
    pub fn revision(&self, headers: &[(String, String)]) -> Result<String> {
        revision(self.port, headers)
    }

    /// Waits until a revision answers.
    pub fn until_revision(&self, headers: &[(String, String)], wanted: &str) -> Result<()> {
        until_revision(self.port, headers, wanted)
    }

    pub fn stat(&self, name: &str) -> Result<u64> {
        Ok(self.daemon.stats()?.get(&format!("http.ingress.override.{name}")))
    }
}

fn ask(port: u16, headers: &[(String, String)]) -> Result<Response> {
    let request = headers.iter().fold(Request::get("/"), |request, (name, value)| request.header(name, value));
    fetch(port, request)
}

/// The revision that answers a request to a daemon's port.
pub fn revision(port: u16, headers: &[(String, String)]) -> Result<String> {
    let response = ask(port, headers)?;
    ensure!(response.status == 200, "{}: {}", response.status, response.text());
    let answer: Value = serde_json::from_str(&response.text())?;
    Ok(answer["revision"].as_str().unwrap_or_default().to_owned())
}

/// Waits until a revision answers at a daemon's port.
pub fn until_revision(port: u16, headers: &[(String, String)], wanted: &str) -> Result<()> {
    wait_until(DEADLINE, &format!("revision {wanted} to answer"), || {
        let found = revision(port, headers)?;
        ensure!(found == wanted, "{found} answers");
        Ok(())
    })
}

fn tell_of_users(discovery: &Discovery, feature: u16) -> Result<()> {
    discovery.write("users.yaml", &service(feature))?;
    discovery.write("users-x.yaml", OFFLOADED)
}

const OFFLOADED: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: users-x
  creationTimestamp: '2026-11-20T08:00:00Z'
  labels: {app: users, culvert.dev/offloaded: 'true', culvert.dev/revision: feature-x}
status: {podIP: 127.0.0.1}
";

fn service(port: u16) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: users}}
spec: {{clusterIP: 10.96.0.1, selector: {{app: users}}, ports: [{{name: http, port: 80, targetPort: {port}}}]}}
"
    )
}

fn daemon(name: &str, main: u16, xds: u16) -> Result<(Daemon, u16)> {
    let port = free_port()?;
    let yaml = bootstrap(port, main, xds);
    Ok((Daemon::start_with(Kind::Culvert, &yaml, &["--service-node", name, "--service-cluster", "c"])?, port))
}

/// A daemon whose routes are its own, and which is told by discovery what can be named. `/front` leads to another service.
fn bootstrap(port: u16, main: u16, xds: u16) -> String {
    let endpoint = |port: u16| {
        format!(
            "[{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]"
        )
    };
    let (main, xds) = (endpoint(main), endpoint(xds));
    format!(
        r#"dynamic_resources:
  ads_config: {{api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: discovery}}}}]}}
cluster_manager:
  load_stats_config: {{api_type: GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: discovery}}}}]}}
static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - {{match: {{path: /front}}, route: {{cluster: "front.default:80"}}}}
              - {{match: {{prefix: /}}, route: {{cluster: "users.default:80"}}}}
          http_filters:
          - name: culvert.filters.http.override
            typed_config:
              "@type": type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override
              original_dst_cluster: original_dst
              watch_context: true
              debug_response: true
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - {{name: "users.default:80", type: STATIC, load_assignment: {{cluster_name: users, endpoints: {main}}}}}
  - {{name: "front.default:80", type: STATIC, load_assignment: {{cluster_name: front, endpoints: {main}}}}}
  - {{name: original_dst, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 1s}}
  - name: discovery
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment: {{cluster_name: discovery, endpoints: {xds}}}
"#
    )
}

/// Runs `culvert` to its end; gives what it printed.
pub fn culvert(arguments: &[&str]) -> Result<String> {
    match run(arguments)? {
        (true, out, _) => Ok(out),
        (false, _, err) => bail!("culvert {arguments:?}: {err}"),
    }
}

/// Runs `culvert` to its end; gives what it says beside what it prints.
pub fn warned(arguments: &[&str]) -> Result<String> {
    match run(arguments)? {
        (true, _, err) => Ok(err),
        (false, _, err) => bail!("culvert {arguments:?}: {err}"),
    }
}

/// Runs `culvert`, which is to fail; gives what it says.
pub fn refused(arguments: &[&str]) -> Result<String> {
    match run(arguments)? {
        (false, _, err) => Ok(err),
        (true, out, _) => bail!("culvert {arguments:?} succeeded: {out}"),
    }
}

fn run(arguments: &[&str]) -> Result<(bool, String, String)> {
    let output = Command::new(binary("culvert")?).args(arguments).stdin(Stdio::null()).output()?;
    Ok((output.status.success(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
}

/// The headers that `culvert override header` makes.
pub fn header(arguments: &[&str]) -> Result<Vec<(String, String)>> {
    let text = culvert(&[&["override", "header"], arguments].concat())?;
    let split = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_owned(), value.to_owned()));
    text.lines().map(|line| split(line).context("no header")).collect()
}
