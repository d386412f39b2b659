//! The main job on two nodes: what `cargo xtask demo` shows, step by step, and what tests/demo.rs asserts.
//!
//! ```text
//! node-a (cluster a)                     node-b (cluster b)
//!   client                                 users-b
//!   front    -> calls users                users-fx   users, offloaded, revision feature-x
//!   users-a
//!   echo     plain TCP
//!          control: culvert-discovery
//! ```

mod bootstrap;
mod manifests;
mod steps;
mod tools;

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::binaries::binary_arg;
use crate::lab::{Lab, Node, Pod, Process};
use crate::stats::{Stats, admin_get};
use crate::wait_until;

pub use bootstrap::FailurePolicy;
pub use steps::{Log, STEPS, Step, addresses};

/// The virtual address of the service `front`.
pub const FRONT_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The virtual address of the service `users`.
pub const USERS_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 20);
/// The virtual address of the service `echo`.
pub const ECHO_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 30);
/// The virtual address of the service `users-v6`, which is the same pods by IPv6.
pub const USERS_VIP_V6: &str = "fd00:10:96::20";
/// The port of the service `echo`.
pub const ECHO_PORT: u16 = 7;
/// The port that the pods' HTTP programs listen on; their services' port is 80.
const APP_PORT: u16 = 8080;
/// The port of discovery's xDS, on the control node.
const XDS_PORT: u16 = 18000;
/// The port of discovery's status pages, on the control node.
const STATUS_PORT: u16 = 18001;
/// The ports of discovery's tunnels, on the control node.
const TUNNEL_PORTS: &str = "19000-19009";
/// The developers' token, in a file of [`Scenario::token_file`].
const DEVELOPER_TOKEN: &str = "demo";
/// culvertd's admin interface, inside its node.
pub const ADMIN: &str = "127.0.0.1:9901";

/// How long the programs may take to start and to converge.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// The lab with everything started.
pub struct Scenario {
    // Dropped before the lab that they run in.
    discovery: Process,
    daemons: Vec<(Node, Process)>,
    _apps: Vec<Process>,
    /// Both nodes, in order.
    pub nodes: Vec<Node>,
    control: Node,
    /// The pod that calls.
    pub client: Pod,
    /// The service that calls `users`.
    pub front: Pod,
    /// `users` in cluster a.
    pub users_a: Pod,
    /// `users` in cluster b.
    pub users_b: Pod,
    /// `users` of revision feature-x, offloaded.
    pub users_fx: Pod,
    /// The plain TCP service.
    pub echo: Pod,
    manifests: PathBuf,
    /// The lab.
    pub lab: Lab,
}

impl Scenario {
    /// Builds the lab `name` and starts everything: the pods' programs, discovery, a culvertd a node. `progress` is told
    /// what is being done. The pods of node-a have `policy` while their daemon is dead.
    pub fn start(name: &str, policy: FailurePolicy, mut progress: impl FnMut(&str)) -> Result<Self> {
        progress("building two nodes and six pods");
        let lab = Lab::new(name)?;
        let (node_a, node_b, control) = (lab.node("node-a")?, lab.node("node-b")?, lab.node("control")?);
        let client = node_a.pod("client")?;
        let (front, users_a, echo) = (node_a.pod("front")?, node_a.pod("users-a")?, node_a.pod("echo")?);
        let (users_b, users_fx) = (node_b.pod("users-b")?, node_b.pod("users-fx")?);
        lab.add_host(&FRONT_VIP.to_string(), &["front", "front.default.svc.cluster.local"])?;
        lab.add_host(&USERS_VIP.to_string(), &["users", "users.default.svc.cluster.local"])?;
        lab.add_host(&ECHO_VIP.to_string(), &["echo", "echo.default.svc.cluster.local"])?;

        progress("starting the services: front, users (three pods), echo");
        let mut apps = Vec::new();
        apps.push(start_app(&front, "main", Some("http://users"))?);
        apps.push(start_app(&users_a, "main", None)?);
        apps.push(start_app(&users_b, "main", None)?);
        apps.push(start_app(&users_fx, "feature-x", None)?);
        apps.push(echo.spawn("socat", &["socat", &format!("TCP6-LISTEN:{ECHO_PORT},fork,reuseaddr"), "EXEC:cat"])?);

        progress("starting culvert-discovery over the clusters a and b");
        let manifests = lab.dir().join("manifests");
        let discovery = spawn_discovery(&control, &manifests)?;
        let nodes = vec![node_a, node_b];
        let mut scenario = Self {
            discovery,
            daemons: Vec::new(),
            _apps: apps,
            nodes,
            control,
            client,
            front,
            users_a,
            users_b,
            users_fx,
            echo,
            manifests,
            lab,
        };
        scenario.write_manifests(&[&scenario.users_b])?;
        scenario.wait_for_discovery()?;

        progress("starting one culvertd a node: node-a over delta xDS, node-b over state of the world");
        for node in scenario.nodes.clone() {
            let daemon = scenario.spawn_daemon(&node, policy)?;
            scenario.daemons.push((node, daemon));
        }
        progress("waiting for the mesh to converge");
        scenario.wait_until_ready()?;
        Ok(scenario)
    }

    /// Waits until each daemon serves what discovery has, seen from the client and from front.
    pub fn wait_until_ready(&mut self) -> Result<()> {
        for (node, daemon) in &mut self.daemons {
            wait_until(START_DEADLINE, &format!("culvertd on {} to be ready", node.name()), || {
                daemon.check_running()?;
                node.inside(|| admin_get(ADMIN, "/ready"))
            })?;
        }
        // The daemon of node-b serves no client of its own here, but its pods can call.
        for (pod, url) in [(&self.client, "http://front/"), (&self.users_b, "http://users/")] {
            wait_until(START_DEADLINE, &format!("{url} to answer the pod {}", pod.name()), || {
                let answer = pod.run(&["curl", "-sS", "--fail-with-body", "-m", "2", url])?;
                let shown = format!("{}{}", answer.stdout, answer.stderr);
                answer.success().context(shown)
            })?;
        }
        Ok(())
    }

    /// The counters of the daemon on a node.
    pub fn stats(&self, node: &Node) -> Result<Stats> {
        node.inside(|| Stats::read(ADMIN))
    }

    /// The sum of a counter over both daemons, by the end of its name.
    pub fn counter(&self, suffix: &str) -> Result<u64> {
        self.nodes.iter().map(|node| Ok(self.stats(node)?.sum(suffix))).sum()
    }

    /// Rewrites the endpoints of `users` in cluster b, each file in one step (as an editor or kubectl does).
    pub fn set_users_b(&self, pods: &[&Pod]) -> Result<()> {
        self.write_manifests(pods)
    }

    /// Kills discovery without notice.
    pub fn kill_discovery(&mut self) -> Result<()> {
        self.discovery.signal(Signal::SIGKILL)?;
        wait_until(START_DEADLINE, "discovery to be dead", || {
            ensure!(self.discovery.check_running().is_err(), "it is still running");
            Ok(())
        })
    }

    /// Starts discovery again and waits until it serves.
    pub fn restart_discovery(&mut self) -> Result<()> {
        self.discovery = spawn_discovery(&self.control, &self.manifests)?;
        self.wait_for_discovery()
    }

    /// Kills the daemon of the node number `index` without notice.
    pub fn kill_daemon(&mut self, index: usize) -> Result<()> {
        let (_, daemon) = &mut self.daemons[index];
        daemon.signal(Signal::SIGKILL)?;
        wait_until(START_DEADLINE, "culvertd to be dead", || {
            ensure!(daemon.check_running().is_err(), "it is still running");
            Ok(())
        })
    }

    /// Tells the daemon of the node number `index` to end, and waits until it has; the others stay.
    pub fn stop_daemon(&mut self, index: usize, deadline: Duration) -> Result<()> {
        let (_, daemon) = &mut self.daemons[index];
        daemon.signal(Signal::SIGTERM)?;
        wait_until(deadline, "culvertd to end after SIGTERM", || {
            ensure!(daemon.check_running().is_err(), "it is still running");
            Ok(())
        })
    }

    /// Starts the daemon of the node number `index` again, after it ended, and waits until it serves.
    pub fn restart_daemon(&mut self, index: usize, policy: FailurePolicy) -> Result<()> {
        let node = self.nodes[index].clone();
        self.daemons[index].1 = self.spawn_daemon(&node, policy)?;
        self.wait_until_ready()
    }

    /// Discovery's status page.
    pub fn discovery_status(&self) -> Result<String> {
        self.control.inside(|| admin_get(&format!("127.0.0.1:{STATUS_PORT}"), "/status"))
    }

    /// The directory of cluster `name`'s manifests.
    pub fn cluster_dir(&self, name: &str) -> PathBuf {
        self.manifests.join(name)
    }

    /// Discovery's status address, for programs on the control node and in pods.
    pub fn discovery_url(&self) -> String {
        format!("http://{}:{STATUS_PORT}", self.control.ipv4())
    }

    /// The file with the developers' token.
    pub fn token_file(&self) -> String {
        token_file(&self.manifests)
    }

    /// Leaves everything running when this is dropped.
    pub fn keep(&self) {
        self.lab.keep();
    }

    /// The log files of the daemons and of discovery.
    pub fn logs(&self) -> Vec<PathBuf> {
        let daemons = self.daemons.iter().map(|(_, daemon)| daemon.stderr_path());
        daemons.chain([self.discovery.stderr_path()]).map(PathBuf::from).collect()
    }

    /// Commands to try in a lab that was kept.
    pub fn commands(&self) -> Vec<String> {
        let client = format!("ip netns exec {} ", self.client.netns());
        let node = format!("ip netns exec {} ", self.nodes[0].netns());
        let culvert = binary_arg("culvert").unwrap_or_else(|_| "culvert".to_owned());
        let culvert_here = format!(
            "ip netns exec {} env CULVERT_DEVELOPER_TOKEN_FILE={} {culvert}",
            self.control.netns(),
            self.token_file()
        );
        vec![
            format!("{client}curl -s --resolve users:80:{USERS_VIP} http://users/"),
            format!(
                "{client}curl -s --resolve front:80:{FRONT_VIP} http://front/ \\\n      $({culvert} override header --set users=feature-x --output curl)"
            ),
            format!("{culvert_here} override list"),
            format!("{culvert_here} override share create mine --set users=feature-x"),
            format!(
                "{client}{culvert} override proxy --set users=feature-x    # and, elsewhere: {client}curl -s -x http://127.0.0.1:8888 http://front/"
            ),
            format!(
                "{culvert_here} override connect users=localhost:8080 --revision me    # with a program of yours in {}",
                self.control.netns()
            ),
            format!("{node}curl -s http://{ADMIN}/stats | grep -E 'interception|override'"),
            format!("{node}curl -s http://{ADMIN}/clusters"),
            format!("ip netns exec {} curl -s http://127.0.0.1:{STATUS_PORT}/status", self.control.netns()),
            format!("ls {}    # edit a manifest and watch it take effect", self.manifests.join("b").display()),
            format!("tail -f {}", self.logs()[0].display()),
        ]
    }

    fn wait_for_discovery(&mut self) -> Result<()> {
        wait_until(START_DEADLINE, "culvert-discovery to be ready", || {
            self.discovery.check_running()?;
            self.control.inside(|| admin_get(&format!("127.0.0.1:{STATUS_PORT}"), "/ready"))
        })?;
        Ok(())
    }

    fn spawn_daemon(&self, node: &Node, policy: FailurePolicy) -> Result<Process> {
        let pods = [&self.client, &self.front, &self.users_a, &self.users_b, &self.users_fx, &self.echo];
        let pods = pods.into_iter().filter(|pod| pod.node_name() == node.name());
        let delta = node.name() == "node-a";
        let xds = (self.control.ipv4(), XDS_PORT);
        let yaml = bootstrap::node_bootstrap(node, pods, xds, delta, policy);
        let path = self.lab.dir().join(format!("{}.yaml", node.name()));
        fs::write(&path, yaml).with_context(|| format!("writing {}", path.display()))?;
        let path = path.display().to_string();
        let culvertd = binary_arg("culvertd")?;
        let flags = ["--service-node", node.name(), "--service-cluster", "demo", "--concurrency", "2"];
        node.spawn("culvertd", &[&[culvertd.as_str(), "-c", &path], flags.as_slice()].concat())
    }

    fn write_manifests(&self, users_b: &[&Pod]) -> Result<()> {
        manifests::write_cluster(&self.cluster_dir("a"), &manifests::cluster_a(self))?;
        manifests::write_cluster(&self.cluster_dir("b"), &manifests::cluster_b(self, users_b))
    }
}

/// The file with the developers' token.
fn token_file(manifests: &std::path::Path) -> String {
    manifests.with_file_name("developer-token").display().to_string()
}

fn start_app(pod: &Pod, revision: &str, upstream: Option<&str>) -> Result<Process> {
    let lab_http = binary_arg("lab-http")?;
    let listen = format!("[::]:{APP_PORT}");
    let mut command = vec![lab_http.as_str(), "--listen", &listen, "--pod", pod.name(), "--revision", revision];
    if let Some(upstream) = upstream {
        command.extend(["--upstream", upstream]);
    }
    pod.spawn("lab-http", &command)
}

fn spawn_discovery(control: &Node, manifests: &std::path::Path) -> Result<Process> {
    for cluster in ["a", "b"] {
        fs::create_dir_all(manifests.join(cluster))?;
    }
    let token = token_file(manifests);
    fs::write(&token, DEVELOPER_TOKEN).with_context(|| format!("writing {token}"))?;
    // Nobody had a port before this discovery.
    let tunnels = format!("{}:{TUNNEL_PORTS},quarantine=0", control.ipv4());
    let discovery = binary_arg("culvert-discovery")?;
    let cluster = |name: &str| format!("{name}={}/{name},region=region-{name},zone=zone-{name}", manifests.display());
    let (a, b) = (cluster("a"), cluster("b"));
    let (listen, http) = (format!("0.0.0.0:{XDS_PORT}"), format!("0.0.0.0:{STATUS_PORT}"));
    let developers = ["--developer-token-file", &token, "--tunnels", &tunnels];
    let flags = ["--cluster", &a, "--cluster", &b, "--listen", &listen, "--http", &http];
    control.spawn("discovery", &[&[discovery.as_str()], &flags[..], &developers].concat())
}
