//! Several checks of the same hosts, each with a name of its own: a host is well where it passes all of them.

use super::*;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::http1::Response;
use culvert_tests::name_server::{NameServer, Says};
use culvert_tests::server;
use nix::sys::signal::Signal;

/// What the host answers to the paths of its checks.
type Answers = Arc<Mutex<BTreeMap<&'static str, &'static str>>>;

/// A host that answers checks as it is told, and tells the headers of those of `/told`. To requests it says that it is ill.
fn host(answers: &Answers, told: &Arc<Mutex<BTreeSet<String>>>) -> Result<u16> {
    let (answers, told) = (Arc::clone(answers), Arc::clone(told));
    server::start(move |stream| {
        let mut lines = BufReader::new(stream.try_clone()?);
        let (mut stream, mut line, mut path, mut headers) = (stream, String::new(), String::new(), Vec::new());
        while lines.read_line(&mut line)? > 0 {
            if let Some(rest) = line.strip_prefix("GET ") {
                rest.split(' ').next().unwrap_or_default().clone_into(&mut path);
            } else if line.starts_with("x-") && path == "/told" {
                headers.push(line.trim_end().to_owned());
            }
            if line == "\r\n" {
                told.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.extend(headers.drain(..));
                let answers = answers.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
                if answers.get(path.as_str()) == Some(&"hang") {
                    line.clear();
                    continue;
                }
                let (status, header) = match (path.as_str(), answers.get(path.as_str()).copied()) {
                    ("/request", _) => ("200", "x-envoy-immediate-health-check-fail: true\r\n"),
                    (_, Some("degraded")) => ("200", "x-envoy-degraded: true\r\n"),
                    (_, status) => (status.unwrap_or("200"), ""),
                };
                drop(answers);
                write!(stream, "HTTP/1.1 {status} x\r\n{header}content-length: 0\r\n\r\n")?;
            }
            line.clear();
        }
        Ok(())
    })
}

fn check(name: &str, more: &str, logs: &Path) -> String {
    let log = logs.join(name.replace(':', "_"));
    format!(
        "{{name: '{name}', timeout: 9s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 2, healthy_threshold: 2, \
         {more}, event_log_path: {}}}",
        log.display()
    )
}

struct Several {
    kind: Kind,
    daemon: Daemon,
    port: u16,
}

impl Several {
    /// `cluster.<this>` is so, and stays so as long as nothing changes.
    fn waits_for(&self, flags: &str, gauges: &[(&str, u64)]) -> Result<()> {
        wait_until(DEADLINE, &format!("{:?}: {flags}", self.kind), || {
            let text = self.daemon.admin("/clusters")?;
            let seen = text.lines().find(|line| line.starts_with("both::") && line.contains("::health_flags::"));
            let seen = seen.and_then(|line| line.rsplit("::").next()).unwrap_or_default();
            ensure!(seen == flags, "{seen}");
            let stats = self.daemon.stats()?;
            for (name, value) in gauges {
                let name = format!("cluster.both.{name}");
                ensure!(stats.has(&name), "{name}");
                ensure!(stats.get(&name) == *value, "{name} is {}", stats.get(&name));
            }
            Ok(())
        })
    }

    fn ask(&self, path: &str) -> Result<Response> {
        fetch(self.port, Request::get(path))
    }
}

#[test]
fn a_host_is_well_where_it_passes_all_its_checks() -> Result<()> {
    let does = |answers: &Answers, path, what| -> Result<()> {
        answers.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.insert(path, what);
        Ok(())
    };
    let mut seen = Vec::new();
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (answers, told) = (Answers::default(), Arc::default());
        does(&answers, "/b", "503")?;
        let (upstream, port, logs) = (host(&answers, &told)?, free_port()?, scratch_dir()?);
        let http = |name: &str, path: &str| check(name, &format!("http_health_check: {{path: {path}}}"), &logs);
        let both = format!("health_checks: [{}, {}]", http("a", "/a"), http("b:c", "/b"));
        let headers: Vec<_> = ["DOWNSTREAM_LOCAL_ADDRESS", "DOWNSTREAM_REMOTE_ADDRESS", "PROTOCOL", "UPSTREAM_HOST"]
            .iter()
            .map(|name| format!("{{header: {{key: x-{name}, value: '%{name}%'}}}}"))
            .collect();
        let told_check =
            format!("http_health_check: {{path: /told, request_headers_to_add: [{}]}}", headers.join(", "));
        let only = format!("health_checks: [{}]", check("only", &told_check, &logs));
        let bootstrap = Bootstrap::new()
            .http(port, "- {name: a, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: both}}]}", &[])
            .cluster("both", &[upstream], &["common_lb_config: {healthy_panic_threshold: {value: 0}}", &both])
            .cluster("only", &[upstream], &[&only]);
        let mut proxy = Several { kind, daemon: Daemon::start(kind, &bootstrap.yaml())?, port };
        let failed = [
            ("health_check.healthy", 0),
            ("health_check.degraded", 0),
            ("health_check.name.a.healthy", 1),
            ("health_check.name.b_c.healthy", 0),
            ("membership_healthy", 0),
        ];
        proxy.waits_for("/failed_active_hc", &failed)?;
        ensure!(proxy.ask("/")?.status == 503, "{kind:?}: nobody is well");
        does(&answers, "/b", "200")?;
        let well = [
            ("health_check.healthy", 1),
            ("health_check.name.a.healthy", 1),
            ("health_check.name.b_c.healthy", 1),
            ("membership_healthy", 1),
        ];
        proxy.waits_for("healthy", &well)?;
        ensure!(proxy.ask("/")?.status == 200, "{kind:?}: it passes");
        // The other one fails, and while it does the first says that it is degraded.
        does(&answers, "/a", "503")?;
        proxy.waits_for("/failed_active_hc", &[("health_check.healthy", 0), ("health_check.name.b_c.healthy", 1)])?;
        does(&answers, "/b", "degraded")?;
        let flags = "/failed_active_hc/degraded_active_hc";
        proxy.waits_for(flags, &[("health_check.degraded", 1), ("health_check.name.b_c.degraded", 1)])?;
        does(&answers, "/a", "200")?;
        proxy.waits_for("/degraded_active_hc", &[("health_check.healthy", 1), ("health_check.degraded", 1)])?;
        does(&answers, "/b", "200")?;
        proxy.waits_for("healthy", &[("health_check.healthy", 1), ("health_check.degraded", 0)])?;
        // One of them is told what the host says of itself, and passes soon after.
        ensure!(proxy.ask("/request")?.status == 200, "{kind:?}: an answer");
        let passive = [("health_check.name.a.passive_failure", 0), ("health_check.name.b_c.passive_failure", 1)];
        proxy.waits_for("healthy", &passive)?;
        let stats = proxy.daemon.stats()?;
        let names: Vec<_> = stats.names().filter(|name| name.contains(".health_check.")).map(str::to_owned).collect();
        let metrics = proxy.daemon.admin("/stats/prometheus")?;
        let metrics = metrics.lines().filter(|line| line.starts_with("envoy_cluster_health_check_"));
        // Labels come in no order that matters.
        let metrics: BTreeSet<_> = metrics
            .filter_map(|line| {
                let (name, labels) = line.rsplit_once(' ')?.0.strip_suffix('}')?.split_once('{')?;
                Some((name.to_owned(), labels.split(',').map(str::to_owned).collect::<BTreeSet<_>>()))
            })
            .collect();
        let dump: Value = serde_json::from_str(&proxy.daemon.admin("/config_dump?resource=static_clusters")?)?;
        let checks =
            dump["configs"].as_array().into_iter().flatten().map(|it| it["cluster"]["health_checks"].to_string());
        let checks: Vec<_> = checks.map(|text| text.replace(&logs.display().to_string(), "")).collect();
        let told = told.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
        let told: Vec<_> = told.iter().map(|line| line.replace(&upstream.to_string(), "port")).collect();
        proxy.daemon.signal(Signal::SIGTERM)?;
        proxy.daemon.wait(DEADLINE)?;
        seen.push((names, metrics, checks, told, events(&logs)?));
    }
    let [envoy, culvert] = seen.as_slice() else { anyhow::bail!("two proxies") };
    assert!(envoy.0.contains(&"cluster.only.health_check.name.only.attempt".to_owned()), "{:?}", envoy.0);
    assert!(!envoy.0.contains(&"cluster.only.health_check.healthy".to_owned()), "{:?}", envoy.0);
    assert_eq!(culvert.0, envoy.0);
    assert_eq!(envoy.1.len(), 26, "{:?}", envoy.1);
    assert_eq!(culvert.1, envoy.1);
    assert_eq!(culvert.2, envoy.2);
    assert!(envoy.3.iter().any(|line| line == "x-downstream_local_address: 127.0.0.1:0"), "{:?}", envoy.3);
    assert_eq!(culvert.3, envoy.3);
    assert_eq!(envoy.4.len(), 3);
    assert_eq!(culvert.4, envoy.4);
    Ok(())
}

/// Hosts of such clusters are taken to be well until a check fails: with culvertd the first failure counts at once, with Envoy when each check
/// has said something.
#[test]
fn one_failure_is_enough_while_another_check_hangs() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (answers, told, names) = (Answers::default(), Arc::default(), NameServer::start()?);
        names.say("both.test", Says::Unknown);
        answers.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.extend([("/a", "503"), ("/b", "hang")]);
        let (upstream, port) = (host(&answers, &told)?, free_port()?);
        let check = |name: &str| {
            format!(
                "{{name: {name}, timeout: 600s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, \
                 healthy_threshold: 1, http_health_check: {{path: /{name}}}}}"
            )
        };
        let checks = format!("health_checks: [{}, {}]", check("a"), check("b"));
        let resolver = format!(
            "typed_dns_resolver_config: {{name: envoy.network.dns_resolver.cares, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig, resolvers: \
             [{{socket_address: {{address: 127.0.0.1, port_value: {}}}}}], dns_resolver_options: \
             {{no_default_search_domain: true}}}}}}",
            names.port
        );
        let assignment = format!(
            "load_assignment: {{cluster_name: both, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
             {{address: both.test, port_value: {upstream}}}}}}}}}]}}]}}"
        );
        let (panic, rate) = ("common_lb_config: {healthy_panic_threshold: {value: 0}}", "dns_refresh_rate: 0.2s");
        let logical = ["type: LOGICAL_DNS", "dns_lookup_family: V4_ONLY", rate, panic, &resolver, &assignment, &checks];
        let named = [
            "type: ORIGINAL_DST",
            "lb_policy: CLUSTER_PROVIDED",
            "original_dst_lb_config: {use_http_header: true}",
            &checks,
        ];
        for fields in [&logical[..], &named] {
            let bootstrap = Bootstrap::new()
                .http(port, "- {name: a, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: both}}]}", &[])
                .cluster_of("both", fields);
            let proxy = Several { kind, daemon: Daemon::start(kind, &bootstrap.yaml())?, port };
            // Before it has an address, so that nobody waits for its checks.
            names.say("both.test", Says::Addresses(vec![Ipv4Addr::LOCALHOST.into()], 1));
            let request = Request::get("/").header("x-envoy-original-dst-host", &format!("127.0.0.1:{upstream}"));
            fetch(port, request)?;
            let (flags, well) = if kind == Kind::Envoy { ("healthy", 1) } else { ("/failed_active_hc", 0) };
            wait_until(DEADLINE, "checks that fail", || {
                ensure!(proxy.daemon.stats()?.get("cluster.both.health_check.name.a.failure") >= 3);
                Ok(())
            })?;
            proxy.waits_for(flags, &[("membership_healthy", well), ("health_check.name.a.healthy", 0)])?;
            names.say("both.test", Says::Unknown);
        }
    }
    Ok(())
}

/// What each check has logged, without times and ports.
fn events(dir: &Path) -> Result<BTreeMap<String, Vec<Value>>> {
    let mut logs = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let mut lines = Vec::new();
        for line in fs::read_to_string(entry.path())?.lines() {
            let mut event: Value = serde_json::from_str(line)?;
            event["timestamp"].take();
            event["host"].take();
            lines.push(event);
        }
        logs.insert(entry.file_name().to_string_lossy().into_owned(), lines);
    }
    Ok(logs)
}
