//! Interception as an operator has it: `culvertd` and `culvert` on nodes of the lab, with ordinary programs in the pods.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::binaries::binary_arg;
use culvert_tests::lab::{Lab, Node, Pod, Process};
use culvert_tests::stats::{Stats, admin_get};
use culvert_tests::wait_until;
use nix::sys::signal::Signal;

#[path = "interception/upgrades.rs"]
mod upgrades;

const DEADLINE: Duration = Duration::from_secs(20);
const ADMIN: &str = "127.0.0.1:9901";
/// An address that only the daemon knows: connections to its port 80 go to the pod that is configured.
const VIP: &str = "10.96.0.50";
/// An address that the kernel balances.
const BALANCED: &str = "10.96.0.60";

/// The node under test with a pod, and a pod elsewhere.
struct Stage {
    // Dropped before the lab.
    _apps: Vec<Process>,
    node: Node,
    pod: Pod,
    far: Pod,
    lab: Lab,
}

impl Stage {
    fn new(name: &str) -> Result<Self> {
        let lab = Lab::new(name)?;
        let (node, elsewhere) = (lab.node("node-a")?, lab.node("node-b")?);
        let (pod, far) = (node.pod("web")?, elsewhere.pod("far")?);
        let lab_http = binary_arg("lab-http")?;
        let serve = |pod: &Pod| pod.spawn("lab-http", &[&lab_http, "--listen", "[::]:8080", "--pod", pod.name()]);
        let apps = vec![serve(&pod)?, serve(&far)?];
        Ok(Self { _apps: apps, node, pod, far, lab })
    }

    fn manifests(&self) -> PathBuf {
        self.lab.dir().join("pods")
    }

    fn pins(&self) -> PathBuf {
        self.node.bpf_dir().join("culvert")
    }

    /// Writes the node's bootstrap. `enrolled` are fields of the extension; connections to the virtual address go to `to`.
    fn bootstrap(&self, enrolled: &str, to: Ipv4Addr) -> Result<String> {
        let filters = |chains: &str| {
            format!(
                "    transparent: true\n    listener_filters:\n    - {{name: a, typed_config: {{\"@type\": \
                 type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst}}}}\n    - {{name: b, \
                 typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc}}}}\n    \
                 filter_chains:\n{chains}    - filters: [{}]\n",
                proxy("original")
            )
        };
        let proxy_to_pod = format!(
            "    - filter_chain_match: {{destination_port: 80, prefix_ranges: [{{address_prefix: {VIP}, prefix_len: 32}}]}}\n      \
             filters: [{}]\n",
            proxy("pod")
        );
        let yaml = format!(
            "admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 9901}}}}}}\n\
             static_resources:\n  clusters:\n  - name: original\n    type: ORIGINAL_DST\n    lb_policy: CLUSTER_PROVIDED\n    \
             connect_timeout: 5s\n  - name: pod\n    type: STATIC\n    connect_timeout: 5s\n    load_assignment:\n      \
             cluster_name: pod\n      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {to}, \
             port_value: 8080}}}}}}}}]}}]\n  listeners:\n  - name: outbound\n    address: {{socket_address: {{address: \"::\", \
             port_value: 15001, ipv4_compat: true}}}}\n{outbound}  - name: inbound\n    address: {{socket_address: {{address: \"::\", \
             port_value: 15006, ipv4_compat: true}}}}\n{inbound}bootstrap_extensions:\n- name: culvert.bootstrap.interception\n  \
             typed_config:\n    \"@type\": type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception\n    \
             interfaces: [\"veth-*\"]\n    uplinks: [eth0]\n    direction: BOTH\n    shortcut_cgroup: {cgroup}\n    \
             pin_path: {pins}\n    state_path: {state}\n{enrolled}",
            outbound = filters(&proxy_to_pod),
            inbound = filters(""),
            cgroup = self.node.cgroup().display(),
            pins = self.pins().display(),
            state = self.lab.dir().join("enrolled.json").display(),
        );
        let path = self.lab.dir().join("culvertd.yaml");
        fs::write(&path, yaml)?;
        Ok(path.display().to_string())
    }

    /// The extension's fields that enrol the pod by its addresses.
    fn by_address(&self) -> String {
        format!("    pods: [{{address: {}}}, {{address: \"{}\"}}]\n", self.pod.ipv4(), self.pod.ipv6())
    }

    fn daemon(&self, bootstrap: &str, before: &[&str]) -> Result<Process> {
        self.daemon_that_drains(bootstrap, before, "5")
    }

    /// Likewise, with so many seconds for its connections when it ends.
    fn daemon_that_drains(&self, bootstrap: &str, before: &[&str], seconds: &str) -> Result<Process> {
        let culvertd = binary_arg("culvertd")?;
        let flags = [&culvertd, "-c", bootstrap, "--concurrency", "2", "--drain-time-s", seconds];
        self.node.spawn("culvertd", &[before, flags.as_slice()].concat())
    }

    fn ready(&self) -> Result<String> {
        self.node.inside(|| admin_get(ADMIN, "/ready"))
    }

    fn wait_until_ready(&self, daemon: &mut Process) -> Result<()> {
        wait_until(DEADLINE, "culvertd to be ready", || {
            daemon.check_running()?;
            self.ready()
        })?;
        Ok(())
    }

    fn stat(&self, name: &str) -> Result<u64> {
        Ok(self.node.inside(|| Stats::read(ADMIN))?.get(name))
    }

    /// Since when the pod is enrolled, and how many connections it opened.
    fn account(&self) -> Result<(String, u64)> {
        let pods: serde_json::Value =
            serde_json::from_str(&self.node.inside(|| admin_get(ADMIN, "/interception/pods"))?)?;
        let own = self.pod.ipv4().to_string();
        let pod = pods["pods"].as_array().and_then(|pods| pods.iter().find(|pod| pod["name"] == own.as_str()));
        let pod = pod.with_context(|| format!("no pod {own}: {pods}"))?;
        let since = pod["since"].as_str().context("not enrolled")?.to_owned();
        Ok((since, pod["outbound_connections"].as_u64().context("no number")?))
    }

    fn culvert(&self, arguments: &[&str]) -> Result<String> {
        self.node.run(&[&[binary_arg("culvert")?.as_str()], arguments].concat())?.success()
    }
}

fn proxy(cluster: &str) -> String {
    format!(
        "{{name: tcp, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, \
         stat_prefix: {cluster}, cluster: {cluster}}}}}"
    )
}

/// What the program at a URL answers a pod; whom it saw is in it.
fn call(from: &Pod, url: &str) -> Result<serde_json::Value> {
    let answer = from.run(&["curl", "-sS", "--fail", "-m", "5", url])?.success()?;
    Ok(serde_json::from_str(&answer)?)
}

fn urls(pod: &Pod) -> [String; 2] {
    [format!("http://{}:8080/", pod.ipv4()), format!("http://[{}]:8080/", pod.ipv6())]
}

fn addresses(pod: &Pod) -> [String; 2] {
    [pod.ipv4().to_string(), pod.ipv6().to_string()]
}

/// Calls in both directions and families, redirected, with the callers' addresses kept.
fn both_directions(stage: &Stage) -> Result<()> {
    let (out, inbound) = (stage.stat("interception.redirected")?, stage.stat("interception.redirected_inbound")?);
    for (from, to) in [(&stage.pod, &stage.far), (&stage.far, &stage.pod)] {
        for (url, own) in urls(to).iter().zip(addresses(from)) {
            let answer = call(from, url)?;
            ensure!(answer["pod"] == to.name() && answer["peer"] == own.as_str(), "{url}: {answer}");
        }
    }
    ensure!(stage.stat("interception.redirected")? == out + 2, "outbound connections are redirected");
    ensure!(stage.stat("interception.redirected_inbound")? == inbound + 2, "inbound connections are redirected");
    Ok(())
}

/// docs/operations.md names the capabilities: the daemon gets exactly these.
#[test]
fn exactly_the_documented_capabilities_are_enough() -> Result<()> {
    /// CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF.
    const CAPABILITIES: u64 = 1 << 12 | 1 << 38 | 1 << 39;
    let stage = Stage::new("capabilities")?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.far.ipv4())?;
    let only = ["setpriv", "--bounding-set=-all,+net_admin,+cap_38,+cap_39", "--inh-caps=-all", "--no-new-privs"];
    let mut daemon = stage.daemon(&bootstrap, &only)?;
    stage.wait_until_ready(&mut daemon)?;
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id()))?;
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let found = status.lines().find_map(|line| line.strip_prefix(set)).context("no such set")?;
        let found = u64::from_str_radix(found.trim_start_matches(':').trim(), 16)?;
        assert_eq!(found, CAPABILITIES, "{set}: {found:#x}");
    }
    both_directions(&stage)?;
    assert!(daemon.stderr().contains("take the short cut"), "{}", daemon.stderr());
    assert!(!daemon.stderr().contains("ERROR"), "{}", daemon.stderr());
    // It removes all that it made, too.
    daemon.signal(Signal::SIGTERM)?;
    let ended = daemon.wait(DEADLINE)?;
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(!stage.pins().exists());
    assert!(!stage.node.run(&["ip", "rule"])?.success()?.contains("3095"));

    // Processes of the node: through the daemon, and straight to a backend.
    let cgroup = stage.node.cgroup().display();
    let balanced = format!("services: [{{address: {BALANCED}, port: 80, cluster: pod}}]");
    for (hooks, url, counter) in [
        (format!("host: {{cgroups: [{cgroup}]}}"), &urls(&stage.far)[1], "interception.host.redirected"),
        (
            format!("balancing: {{cgroups: [{cgroup}], {balanced}}}"),
            &format!("http://{BALANCED}/"),
            "interception.balanced.connections",
        ),
    ] {
        let mut daemon = stage.daemon(&stage.bootstrap(&format!("    {hooks}\n"), stage.far.ipv4())?, &only)?;
        stage.wait_until_ready(&mut daemon)?;
        // A service is known when its hosts are.
        wait_until(DEADLINE, counter, || {
            let before = stage.stat(counter)?;
            let answer = stage.node.run(&["curl", "-sS", "--fail", "-m", "2", url])?.success()?;
            ensure!(answer.contains("\"pod\":\"far\"") && stage.stat(counter)? == before + 1, "{url}: {answer}");
            Ok(())
        })?;
        assert!(!daemon.stderr().contains("ERROR"), "{}", daemon.stderr());
        daemon.signal(Signal::SIGTERM)?;
        let ended = daemon.wait(DEADLINE)?;
        assert!(ended.status.success(), "{}", ended.stderr);
        assert!(!stage.pins().exists());
    }
    Ok(())
}

/// cilium#39531: by the service's address, of which the pod itself is the only host, and by its own.
#[test]
fn a_pod_that_calls_its_own_service_gets_there() -> Result<()> {
    let stage = Stage::new("own-service")?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.pod.ipv4())?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut daemon)?;
    for url in [format!("http://{VIP}/"), urls(&stage.pod)[0].clone(), urls(&stage.pod)[1].clone()] {
        let answer = call(&stage.pod, &url)?;
        assert_eq!(answer["pod"], "web", "{answer}");
    }
    // The node's own programs, such as the kubelet's probes, reach the pod past the daemon.
    let before = stage.stat("interception.redirected_inbound")?;
    for url in urls(&stage.pod) {
        let answer = stage.node.run(&["curl", "-sS", "--fail", "-m", "5", &url])?.success()?;
        assert!(answer.contains("\"pod\":\"web\""), "{answer}");
    }
    assert_eq!(stage.stat("interception.redirected_inbound")?, before);
    Ok(())
}

/// As of `uplinks: [eth0]` where the interface is called otherwise.
#[test]
fn an_uplink_that_is_not_there_keeps_the_node_from_being_ready() -> Result<()> {
    let stage = Stage::new("no-uplink")?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.far.ipv4())?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut daemon)?;
    call(&stage.pod, &urls(&stage.far)[0])?;
    // Only who sends elsewhere misses answers from there.
    stage.node.run(&["ip", "route", "replace", "default", "dev", "eth0"])?.success()?;
    stage.node.run(&["ip", "link", "set", "eth0", "name", "up0"])?.success()?;
    wait_until(DEADLINE, "/ready to say what is missing", || {
        daemon.check_running()?;
        let answer = format!("{:#}", stage.ready().err().context("it is ready")?);
        ensure!(answer.contains("the default route leads over up0"), "{answer}");
        Ok(())
    })?;
    stage.node.run(&["ip", "link", "set", "up0", "name", "eth0"])?.success()?;
    stage.wait_until_ready(&mut daemon)?;
    call(&stage.pod, &urls(&stage.far)[0])?;
    Ok(())
}

/// Its name may be misspelt, or discovery may have taken it away.
#[test]
fn a_listener_that_there_is_not_keeps_the_node_from_being_ready() -> Result<()> {
    let stage = Stage::new("no-listener")?;
    let fields = format!("{}    outbound_listener: other\n", stage.by_address());
    let bootstrap = stage.bootstrap(&fields, stage.far.ipv4())?;
    let listeners = stage.lab.dir().join("lds.yaml");
    fs::write(&listeners, "resources: []\n")?;
    let source = format!("{{lds_config: {{path_config_source: {{path: {}}}}}}}", listeners.display());
    let yaml = fs::read_to_string(&bootstrap)?;
    fs::write(&bootstrap, format!("node: {{id: node-a, cluster: nodes}}\ndynamic_resources: {source}\n{yaml}"))?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    let said = "outbound_listener: there is no listener `other`";
    wait_until(DEADLINE, "/ready to say what is missing", || {
        daemon.check_running()?;
        let answer = format!("{:#}", stage.ready().err().context("it is ready")?);
        ensure!(answer.contains("503") && answer.contains(said), "{answer}");
        Ok(())
    })?;
    assert!(daemon.stderr().contains(said), "{}", daemon.stderr());
    Ok(())
}

/// A service of a program in the node's own network, as the API server of a cluster often is: it cannot answer the pod's address by way
/// of the daemon, and is called in the node's name.
#[test]
fn a_service_of_the_node_itself_is_reached() -> Result<()> {
    let stage = Stage::new("node-service")?;
    let server = [&binary_arg("lab-http")?, "--listen", "[::]:8080", "--pod", "node"];
    let _server = stage.node.spawn("lab-http", &server)?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.node.ipv4())?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut daemon)?;
    wait_until(DEADLINE, "the node's program to listen", || {
        call(&stage.pod, &format!("http://{}:8080/", stage.node.ipv4()))
    })?;
    let before = stage.stat("interception.redirected")?;
    let answer = call(&stage.pod, &format!("http://{VIP}/"))?;
    assert_eq!((&answer["pod"], &answer["peer"]), (&"node".into(), &stage.node.ipv4().to_string().into()), "{answer}");
    assert_eq!(stage.stat("interception.redirected")?, before + 1);
    Ok(())
}

/// As kube-proxy does with Services' addresses, of which those that are not the mesh's pass through: answers in the pod's name would go to
/// the pod.
#[test]
fn an_address_that_the_node_translates_is_reached() -> Result<()> {
    let stage = Stage::new("translated")?;
    let fields = format!("{}    node_source_ranges: [10.244.2.192/26]\n", stage.by_address());
    let bootstrap = stage.bootstrap(&fields, stage.far.ipv4())?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut daemon)?;
    let rules = format!(
        "table ip services {{ chain output {{ type nat hook output priority -100; ip daddr 10.244.2.200 dnat to {}; }}; }}",
        stage.far.ipv4()
    );
    stage.node.spawn("nft", &["nft", &rules])?.wait(DEADLINE)?.success()?;
    let answer = call(&stage.pod, "http://10.244.2.200:8080/")?;
    assert_eq!((&answer["pod"], &answer["peer"]), (&"far".into(), &stage.node.ipv4().to_string().into()), "{answer}");
    // Elsewhere it is the pod's own.
    let answer = call(&stage.pod, &urls(&stage.far)[0])?;
    assert_eq!(answer["peer"], stage.pod.ipv4().to_string(), "{answer}");
    Ok(())
}

#[test]
fn pods_are_enrolled_and_the_node_says_when_one_is_not() -> Result<()> {
    let stage = Stage::new("enrolment")?;
    fs::create_dir_all(stage.manifests())?;
    let write = |name: &str, mesh: &str, addresses: [String; 2]| -> Result<()> {
        let [v4, v6] = addresses;
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{mesh: '{mesh}'}}}}\n\
             spec: {{nodeName: node-a}}\nstatus: {{phase: Running, podIP: '{v4}', podIPs: [{{ip: '{v4}'}}, {{ip: '{v6}'}}]}}\n"
        );
        Ok(fs::write(stage.manifests().join(format!("{name}.yaml")), text)?)
    };
    write("web", "on", addresses(&stage.pod))?;
    let enrolled = format!(
        "    enrolment:\n      pod_manifests: {}\n      node_name: node-a\n      selectors: [{{namespaces: [shop], match_labels: \
         {{mesh: 'on'}}}}]\n",
        stage.manifests().display()
    );
    let bootstrap = stage.bootstrap(&enrolled, stage.far.ipv4())?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut daemon)?;
    both_directions(&stage)?;
    let status = stage.culvert(&["status", "--node"])?;
    let web = status.lines().find(|line| line.contains("shop/web")).context(status.clone())?;
    assert!(web.contains(" enrolled ") && web.contains("both") && web.contains("manifest"), "{status}");

    // One that has no interface here, and its end.
    write("lost", "on", ["10.244.1.250".to_owned(), "fd00:10:244:1::250".to_owned()])?;
    let told = wait_until(DEADLINE, "/ready to tell", || {
        let answer =
            stage.node.run(&["curl", "-sS", "-m", "2", "-w", "%{http_code}", &format!("http://{ADMIN}/ready")])?;
        ensure!(answer.stdout.contains("shop/lost"), "{}", answer.stdout);
        Ok(answer.stdout)
    })?;
    assert!(told.ends_with("503") && told.contains("no interface"), "{told}");
    assert!(stage.culvert(&["status", "--node"])?.contains("NOT READY"));
    fs::remove_file(stage.manifests().join("lost.yaml"))?;
    wait_until(DEADLINE, "the node to be ready again", || stage.ready())?;

    // By command: a pod that no selector matches; it survives a crash.
    write("web", "off", addresses(&stage.pod))?;
    let redirected = || stage.stat("interception.redirected");
    wait_until(DEADLINE, "the pod to be left alone", || {
        let before = redirected()?;
        call(&stage.pod, &urls(&stage.far)[0])?;
        ensure!(redirected()? == before, "still redirected");
        Ok(())
    })?;
    stage.culvert(&["enroll", "--netns", stage.pod.netns(), "--name", "by-hand"])?;
    both_directions(&stage)?;
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait(DEADLINE)?;
    let mut daemon = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut daemon)?;
    both_directions(&stage)?;
    let refused = stage.culvert(&["clean", "--pin-path", &stage.pins().display().to_string()]).unwrap_err();
    assert!(format!("{refused:#}").contains("a culvertd works with"), "{refused:#}");
    stage.culvert(&["unenroll", "by-hand"])?;
    let before = redirected()?;
    call(&stage.pod, &urls(&stage.far)[0])?;
    assert_eq!(redirected()?, before);

    // How far payload may go past TCP is switched, and shown.
    stage.culvert(&["acceleration", "off", "--listener", "outbound"])?;
    let status = stage.culvert(&["status", "--node"])?;
    for line in
        ["outbound: at most off (configured joined, at run time off)", "inbound: at most joined (configured joined"]
    {
        assert!(status.contains(line), "{status}");
    }
    let refused = stage.culvert(&["acceleration", "off", "--listener", "nobody"]).unwrap_err();
    assert!(format!("{refused:#}").contains("listener is outbound or inbound"), "{refused:#}");
    stage.culvert(&["acceleration", "joined"])?;

    // What a killed daemon leaves, `culvert clean` removes, and says so.
    daemon.signal(Signal::SIGKILL)?;
    daemon.wait(DEADLINE)?;
    let told = stage.culvert(&["clean", "--pin-path", &stage.pins().display().to_string()])?;
    assert!(told.contains("removed program on veth-web") && told.contains("removed IPv6 rule"), "{told}");
    assert!(!stage.pins().exists());
    assert_eq!(stage.culvert(&["clean", "--pin-path", &stage.pins().display().to_string()])?, "nothing to remove\n");
    call(&stage.pod, &urls(&stage.far)[0])?;
    Ok(())
}
