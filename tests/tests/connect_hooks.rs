//! What happens when processes connect: host mode and balanced services, with the real daemon and real programs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::binaries::binary_arg;
use culvert_tests::lab::{Lab, Node, Pod, Process};
use culvert_tests::wait_until;

const DEADLINE: Duration = Duration::from_secs(20);

/// A listener as for pods: by address an HTTP service and a TCP one, and what else there is goes where it was going.
const LISTENER: &str = r#"
  listeners:
  - name: outbound
    transparent: true
    address: {socket_address: {address: "::", port_value: 15001, ipv4_compat: true}}
    listener_filters:
    - {name: envoy.filters.listener.original_dst, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}
    - {name: envoy.filters.listener.original_src, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc}}
    filter_chains:
    - filter_chain_match: {destination_port: 80, prefix_ranges: [{address_prefix: 10.96.0.20, prefix_len: 32}]}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: web
          http_filters: [{name: envoy.filters.http.router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
          route_config:
            response_headers_to_add: [{header: {key: x-proxied, value: "yes"}}]
            virtual_hosts: [{name: any, domains: ["*"], routes: [{match: {prefix: /}, route: {cluster: web}}]}]
    - filter_chain_match: {destination_port: 80, prefix_ranges: [{address_prefix: 10.96.0.30, prefix_len: 32}, {address_prefix: "fd00:96::30", prefix_len: 128}]}
      filters: [{name: envoy.filters.network.tcp_proxy, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: plain, cluster: service}}]
    default_filter_chain:
      filters: [{name: envoy.filters.network.tcp_proxy, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: rest, cluster: rest}}]
"#;

fn bootstrap(node: &Node, pods: &[&Pod], extension: &str, endpoints: &Path) -> String {
    let addresses = pods.iter().flat_map(|pod| [pod.ipv4().to_string(), pod.ipv6().to_string()]);
    let enrolled: String = addresses.map(|address| format!("{{address: \"{address}\"}}, ")).collect();
    format!(
        r#"
node: {{id: node, cluster: lab}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 9901}}}}}}
static_resources:
  clusters:
  - name: service
    type: EDS
    eds_cluster_config: {{eds_config: {{path_config_source: {{path: {endpoints}}}}}}}
  - name: web
    type: STATIC
    load_assignment:
      cluster_name: web
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {web}, port_value: 8080}}}}}}}}]}}]
  - {{name: rest, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED}}
{LISTENER}
bootstrap_extensions:
- name: culvert.bootstrap.interception
  typed_config:
    "@type": type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception
    interfaces: ["veth-*"]
    uplinks: [eth0]
    pods: [{enrolled}]
    excluded_ports: [9901]
    pin_path: {pins}
    {extension}
"#,
        endpoints = endpoints.display(),
        web = pods[1].ipv4(),
        pins = node.bpf_dir().join("culvert").display(),
    )
}

/// Writes the assignment of the cluster, in one step as a watched file has to be.
fn assign(path: &Path, hosts: &[(String, u32, &str)]) -> Result<()> {
    let hosts: Vec<String> = hosts
        .iter()
        .map(|(address, weight, health)| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: \"{address}\", port_value: 8080}}}}}}, \
                 load_balancing_weight: {weight}, health_status: {health}}}"
            )
        })
        .collect();
    let text = format!(
        "version_info: \"1\"\nresources:\n- \"@type\": \
         type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\n  cluster_name: service\n  endpoints:\n  \
         - lb_endpoints: [{}]\n",
        hosts.join(", ")
    );
    let fresh = path.with_extension("fresh");
    fs::write(&fresh, text)?;
    fs::rename(&fresh, path).context("renaming")
}

struct Stage {
    node: Node,
    client: Pod,
    one: Pod,
    two: Pod,
    endpoints: std::path::PathBuf,
    daemon: Process,
    _services: Vec<Process>,
    _lab: Lab,
}

impl Stage {
    fn start(name: &str, extension: impl FnOnce(&Node) -> String) -> Result<Self> {
        let lab = Lab::new(name)?;
        let node = lab.node("node-a")?;
        let (client, one, two) = (node.pod("client")?, node.pod("one")?, node.pod("two")?);
        let app = binary_arg("lab-http")?;
        let serve = |pod: &Pod| pod.spawn("app", &[&app, "--listen", "[::]:8080", "--pod", pod.name()]);
        let services = vec![serve(&one)?, serve(&two)?];
        let endpoints = lab.dir().join("endpoints.yaml");
        let host = |pod: &Pod| (pod.ipv4().to_string(), 1, "HEALTHY");
        let host6 = |pod: &Pod| (pod.ipv6().to_string(), 1, "HEALTHY");
        assign(&endpoints, &[host(&one), host(&two), host6(&one), host6(&two)])?;
        let config = lab.dir().join("bootstrap.yaml");
        fs::write(&config, bootstrap(&node, &[&client, &one, &two], &extension(&node), &endpoints))?;
        let config = config.display().to_string();
        let daemon = node.spawn("culvertd", &[&binary_arg("culvertd")?, "-c", &config, "--concurrency", "2"])?;
        let stage = Self { node, client, one, two, endpoints, daemon, _services: services, _lab: lab };
        let ready = wait_until(DEADLINE, "culvertd to be ready", || {
            stage.node.run(&["curl", "-sf", "-m", "2", "http://127.0.0.1:9901/ready"])?.success()
        });
        ready.with_context(|| stage.daemon.stderr())?;
        Ok(stage)
    }

    /// What the kernel programs counted, for people.
    fn counters(&self) -> String {
        let url = "http://127.0.0.1:9901/stats?filter=^interception&usedonly";
        let text = self.node.run(&["curl", "-sfg", "-m", "5", url]).and_then(|finished| finished.success());
        text.unwrap_or_else(|error| format!("{error:#}\n{}", self.daemon.stderr()))
    }

    /// The value of a statistic.
    fn stat(&self, name: &str) -> Result<u64> {
        let url = format!("http://127.0.0.1:9901/stats?filter=^{}$", name.replace('.', "\\."));
        let text = self.node.run(&["curl", "-sfg", "-m", "5", &url])?.success()?;
        let value = text.trim().rsplit(' ').next().and_then(|value| value.parse().ok());
        value.with_context(|| format!("no statistic {name}: {text}"))
    }
}

fn curl(url: &str) -> [&str; 6] {
    ["curl", "-gsSi", "-m", "5", "--fail-with-body", url]
}

#[test]
fn programs_of_the_host_go_through_the_daemon() -> Result<()> {
    // The daemon itself is in the cgroup as well, and so are the pods.
    let stage = Stage::start("host-mode", |node| {
        format!("host: {{cgroups: [\"{}\"], failure_policy: FAIL_CLOSED}}", node.cgroup().display())
    })?;
    let answer = stage.node.run(&curl("http://10.96.0.20/"))?.success();
    let answer = answer.with_context(|| stage.counters())?;
    ensure!(answer.contains("x-proxied: yes"), "{answer}");
    // No service of ours: where it was going, by the destination that the kernel noted.
    for url in [format!("http://{}:8080/", stage.one.ipv4()), format!("http://[{}]:8080/", stage.one.ipv6())] {
        let answer = stage.node.run(&curl(&url))?.success()?;
        ensure!(answer.contains("\"pod\":\"one\"") && !answer.contains("x-proxied"), "{answer}");
    }
    ensure!(stage.stat("interception.host.redirected")? == 3, "each was redirected");
    ensure!(stage.stat("tcp.rest.downstream_cx_total")? == 2, "by the proxy, once");
    // Pods in cgroups below are intercepted by packets.
    let answer = stage.client.run(&curl("http://10.96.0.20/"))?.success()?;
    ensure!(answer.contains("x-proxied: yes"), "{answer}");
    ensure!(stage.stat("interception.host.passed_namespace")? > 0, "host mode leaves pods alone");

    // Killed, it leaves the policy.
    stage.daemon.signal(nix::sys::signal::Signal::SIGKILL)?;
    let url = format!("http://{}:8080/", stage.one.ipv4());
    wait_until(DEADLINE, "connections to be refused", || {
        let answer = stage.node.run(&curl(&url))?.success().map_err(|error| format!("{error:#}"));
        let error = answer.err().context("it connects")?;
        ensure!(error.contains("Failed to connect"), "{error}");
        Ok(())
    })?;
    Ok(())
}

#[test]
fn plain_services_are_balanced_without_the_daemon() -> Result<()> {
    let stage = Stage::start("balancing", |node| {
        format!("balancing: {{cgroups: [\"{}\"], tcp_proxies: true}}", node.cgroup().display())
    })?;
    wait_until(DEADLINE, "the programs to be attached", || {
        stage.client.run(&curl("http://10.96.0.30/"))?.success()?;
        ensure!(stage.stat("interception.balanced.connections")? > 0);
        Ok(())
    })?;
    let proxied = stage.stat("tcp.plain.downstream_cx_total")?;
    for url in ["http://10.96.0.30/", "http://[fd00:96::30]/"] {
        let mut heard = [0, 0];
        for _ in 0..24 {
            let answer = stage.client.run(&curl(url))?.success()?;
            // It comes from the pod itself: no proxy is between.
            let own = if url.contains('[') { stage.client.ipv6().to_string() } else { stage.client.ipv4().to_string() };
            ensure!(answer.contains(&format!("\"peer\":\"{own}\"")), "{answer}");
            heard[usize::from(answer.contains("\"pod\":\"two\""))] += 1;
        }
        ensure!(heard[0] > 2 && heard[1] > 2, "{heard:?}");
    }
    ensure!(stage.stat("tcp.plain.downstream_cx_total")? == proxied, "the daemon saw none of it");
    ensure!(stage.stat("interception.passed_balanced")? >= 48, "the packets passed");
    // A service with a filter stays with the daemon.
    let answer = stage.client.run(&curl("http://10.96.0.20/"))?.success()?;
    ensure!(answer.contains("x-proxied: yes"), "{answer}");

    // Health counts: what is unhealthy gets nothing.
    let host = |pod: &Pod, health: &'static str| (pod.ipv4().to_string(), 1, health);
    assign(&stage.endpoints, &[host(&stage.one, "UNHEALTHY"), host(&stage.two, "HEALTHY")])?;
    let mut in_a_row = 0;
    wait_until(DEADLINE, "the unhealthy host to get nothing", || {
        let answer = stage.client.run(&curl("http://10.96.0.30/"))?.success()?;
        in_a_row = if answer.contains("\"pod\":\"two\"") { in_a_row + 1 } else { 0 };
        ensure!(in_a_row > 20, "{in_a_row} in a row");
        Ok(())
    })?;
    // Without a host, a connection is refused at once.
    assign(&stage.endpoints, &[])?;
    wait_until(DEADLINE, "connections to be refused", || {
        ensure!(stage.client.run(&curl("http://10.96.0.30/"))?.success().is_err(), "it connects");
        Ok(())
    })?;
    ensure!(stage.stat("interception.balanced.no_backend")? > 0, "by the kernel");
    Ok(())
}
