//! How long connections to hosts are used, and which hosts they go to, with culvertd and with the real Envoy on the same bootstrap.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const OPTIONS: &str = "\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// A host that says how many connections it has had. `/check` fails while it is ill, `/held` is answered when it is let go; a line `hello` is
/// answered by itself.
#[derive(Clone, Default)]
struct Host {
    port: u16,
    ill: Arc<AtomicBool>,
    let_go: Arc<AtomicBool>,
}

impl Host {
    fn start() -> Result<Host> {
        let mut host = Host::default();
        let (connections, served) = (AtomicU32::new(0), host.clone());
        host.port = server::start(move |stream| {
            let connection = connections.fetch_add(1, SeqCst);
            let mut lines = BufReader::new(stream.try_clone()?);
            let (mut stream, mut line, mut target) = (stream, String::new(), String::new());
            while lines.read_line(&mut line)? > 0 {
                if line == "hello\n" {
                    stream.write_all(line.as_bytes())?;
                }
                if let Some(rest) = line.strip_prefix("GET ") {
                    target = rest.split(' ').next().unwrap_or_default().to_owned();
                }
                if line == "\r\n" {
                    let ill = target == "/check" && served.ill.load(SeqCst);
                    if target.ends_with("/held") {
                        wait_until(DEADLINE, "being let go", || {
                            ensure!(served.let_go.load(SeqCst));
                            Ok(())
                        })?;
                    }
                    let status = if ill { 503 } else { 200 };
                    Response::new(status, "text/plain", connection.to_string().into_bytes())
                        .write(&mut stream, false)?;
                }
                line.clear();
            }
            Ok(())
        })?;
        Ok(host)
    }
}

/// A client of a TCP proxy that has said `hello`, and heard it.
fn greeted(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    greet(&stream)?;
    Ok(stream)
}

fn greet(mut stream: &TcpStream) -> Result<()> {
    stream.write_all(b"hello\n")?;
    let mut heard = [0; 6];
    stream.read_exact(&mut heard)?;
    ensure!(&heard == b"hello\n", "{heard:?}");
    Ok(())
}

fn start(kind: Kind, bootstrap: &Bootstrap) -> Result<Daemon> {
    start_with(kind, bootstrap, &[], "")
}

/// `further`: what is at the top of the file besides.
fn start_with(kind: Kind, bootstrap: &Bootstrap, flags: &[&str], further: &str) -> Result<Daemon> {
    Daemon::start_with(kind, &format!("node: {{id: a, cluster: b}}\n{further}{}", bootstrap.yaml()), flags)
}

/// Routes by the first part of paths, which names the cluster.
fn routes(clusters: &[&str]) -> String {
    let route = |name: &&str| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}}}}}");
    let routes: Vec<_> = clusters.iter().map(route).collect();
    format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "))
}

fn get(port: u16, path: &str) -> Result<String> {
    let response = fetch(port, Request::get(path))?;
    ensure!(response.status == 200, "{path}: {} {}", response.status, response.text());
    Ok(response.text())
}

/// Waits until a statistic is this.
fn comes_to(daemon: &Daemon, name: &str, value: u64) -> Result<()> {
    wait_until(DEADLINE, name, || {
        let now = daemon.stats()?.get(name);
        ensure!(now == value, "{name} is {now} and not {value}");
        Ok(())
    })
}

#[test]
fn old_connections_are_not_used_again() -> Result<()> {
    for kind in KINDS {
        let host = Host::start()?;
        let http2 = server::start_async(|stream| async move {
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(request) = connection.accept().await {
                let (_, mut respond) = request?;
                respond.send_response(http::Response::new(()), true)?;
            }
            Ok(())
        })?;
        let (web, tcp) = (free_port()?, free_port()?);
        let aged = |protocol| {
            format!(
                "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{{OPTIONS}, \
                 explicit_http_config: {{{protocol}: {{}}}}, common_http_protocol_options: {{max_connection_duration: 1s}}}}}}"
            )
        };
        let bootstrap = Bootstrap::new()
            .http(web, &routes(&["one", "two"]), &[])
            .tcp(tcp, "plain")
            .cluster("one", &[host.port], &[&aged("http_protocol_options")])
            .cluster("two", &[http2], &[&aged("http2_protocol_options")])
            .cluster("plain", &[host.port], &[&aged("http_protocol_options")]);
        let daemon = start(kind, &bootstrap)?;
        let client = greeted(tcp)?;
        let held = thread::spawn(move || get(web, "/one/held"));
        comes_to(&daemon, "cluster.one.upstream_cx_max_duration_reached", 1)?;
        host.let_go.store(true, SeqCst);
        // What is under way is finished.
        let first = held.join().ok().context("a panic")??;
        comes_to(&daemon, "cluster.one.upstream_cx_active", 0)?;
        let second = get(web, "/one")?;
        assert_ne!(first, second, "{kind:?}");
        // An idle one is closed at once.
        comes_to(&daemon, "cluster.one.upstream_cx_max_duration_reached", 2)?;
        comes_to(&daemon, "cluster.one.upstream_cx_active", 0)?;
        get(web, "/two")?;
        comes_to(&daemon, "cluster.two.upstream_cx_max_duration_reached", 1)?;
        comes_to(&daemon, "cluster.two.upstream_cx_active", 0)?;
        get(web, "/two")?;
        assert_eq!(daemon.stats()?.get("cluster.two.upstream_cx_http2_total"), 2, "{kind:?}");
        // That of a TCP proxy is counted, and goes on.
        comes_to(&daemon, "cluster.plain.upstream_cx_max_duration_reached", 1)?;
        greet(&client).with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

#[test]
fn connections_to_a_host_that_fails_its_checks_are_not_used_again() -> Result<()> {
    for kind in KINDS {
        let host = Host::start()?;
        let (web, kept, closed) = (free_port()?, free_port()?, free_port()?);
        let check = "health_checks: [{timeout: 5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, \
                     healthy_threshold: 1, http_health_check: {path: /check}}]";
        let bootstrap = Bootstrap::new()
            .http(web, &routes(&["kept", "closed"]), &[])
            .tcp(kept, "kept")
            .tcp(closed, "closed")
            .cluster("kept", &[host.port], &[check])
            .cluster("closed", &[host.port], &[check, "close_connections_on_host_health_failure: true"]);
        let daemon = start(kind, &bootstrap)?;
        let (kept, closed) = (greeted(kept)?, greeted(closed)?);
        let held = ["/kept/held", "/closed/held"].map(|path| thread::spawn(move || get(web, path)));
        for cluster in ["kept", "closed"] {
            comes_to(&daemon, &format!("cluster.{cluster}.upstream_cx_active"), 2)?;
        }
        // One more, which is idle.
        get(web, "/kept")?;
        comes_to(&daemon, "cluster.kept.upstream_cx_active", 3)?;
        host.ill.store(true, SeqCst);
        let ended = (&closed).read(&mut [0; 1]).with_context(|| format!("{kind:?}: the client is not told"))?;
        assert_eq!(ended, 0, "{kind:?}");
        comes_to(&daemon, "cluster.kept.upstream_cx_active", 2)?;
        host.let_go.store(true, SeqCst);
        for held in held {
            held.join().ok().context("a panic")?.with_context(|| format!("{kind:?}: a request under way"))?;
        }
        greet(&kept).with_context(|| format!("{kind:?}: a connection that goes on"))?;
        comes_to(&daemon, "cluster.kept.upstream_cx_active", 1)?;
        comes_to(&daemon, "cluster.closed.upstream_cx_active", 0)?;
    }
    Ok(())
}

fn write_endpoints(dir: &Path, cluster: &str, ports: &[u16], policy: &str) -> Result<()> {
    let at = |port: &u16| {
        format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}")
    };
    let hosts: Vec<_> = ports.iter().map(at).collect();
    let text = format!(
        "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: {cluster}, \
         {policy}endpoints: [{{lb_endpoints: [{}]}}]}}\n",
        hosts.join(", ")
    );
    fs::write(dir.join("new"), text)?;
    fs::rename(dir.join("new"), dir.join(format!("{cluster}.yaml")))?;
    Ok(())
}

/// A cluster whose endpoints are in a file.
fn by_file(dir: &Path, cluster: &str) -> [String; 2] {
    let path = dir.join(format!("{cluster}.yaml")).display().to_string();
    ["type: EDS".to_owned(), format!("eds_cluster_config: {{eds_config: {{path_config_source: {{path: {path}}}}}}}")]
}

#[test]
fn a_change_of_the_hosts_ends_connections_where_that_is_wanted() -> Result<()> {
    for kind in KINDS {
        let (host, other, dir, web) = (Host::start()?, Host::start()?, scratch_dir()?, free_port()?);
        let mut bootstrap = Bootstrap::new().http(web, &routes(&["stays", "drains"]), &[]);
        for cluster in ["stays", "drains"] {
            write_endpoints(&dir, cluster, &[host.port], "")?;
            let [kind, from] = by_file(&dir, cluster);
            let drains = format!("common_lb_config: {{close_connections_on_host_set_change: {}}}", cluster == "drains");
            bootstrap = bootstrap.cluster_of(cluster, &[&kind, &from, &drains]);
        }
        let daemon = start(kind, &bootstrap)?;
        for cluster in ["stays", "drains"] {
            get(web, &format!("/{cluster}"))?;
            comes_to(&daemon, &format!("cluster.{cluster}.upstream_cx_active"), 1)?;
            write_endpoints(&dir, cluster, &[host.port, other.port], "")?;
            comes_to(&daemon, &format!("cluster.{cluster}.membership_total"), 2)?;
        }
        comes_to(&daemon, "cluster.drains.upstream_cx_destroy", 1)?;
        assert_eq!(daemon.stats()?.get("cluster.stays.upstream_cx_destroy"), 0, "{kind:?}");
        // A request under way is finished. Its host stays: of one that leaves Envoy does not close connections then.
        write_endpoints(&dir, "drains", &[host.port], "")?;
        comes_to(&daemon, "cluster.drains.membership_total", 1)?;
        let held = thread::spawn(move || get(web, "/drains/held"));
        comes_to(&daemon, "cluster.drains.upstream_rq_active", 1)?;
        write_endpoints(&dir, "drains", &[host.port, other.port], "")?;
        comes_to(&daemon, "cluster.drains.membership_total", 2)?;
        host.let_go.store(true, SeqCst);
        held.join().ok().context("a panic")?.with_context(|| format!("{kind:?}"))?;
        comes_to(&daemon, "cluster.drains.upstream_cx_active", 0).with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

#[test]
fn requests_are_dropped_as_the_assignment_says() -> Result<()> {
    const REQUESTS: usize = 400;
    let told = |kind| -> Result<Vec<String>> {
        let (host, dir, web) = (Host::start()?, scratch_dir()?, free_port()?);
        let log = dir.join("access.log");
        let access_log = format!(
            "access_log: [{{name: file, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: \
             {{text_format_source: {{inline_string: \"%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%\\n\"}}}}}}}}]",
            log.display()
        );
        let share = |numerator, denominator| {
            format!(
                "policy: {{drop_overloads: [{{category: much, drop_percentage: {{numerator: {numerator}, denominator: {denominator}}}}}]}}, "
            )
        };
        let clusters = [("all", share(100, "HUNDRED")), ("half", share(5000, "TEN_THOUSAND")), ("none", String::new())];
        let mut bootstrap = Bootstrap::new().http(web, &routes(&["all", "half", "none"]), &[&access_log]);
        for (cluster, policy) in &clusters {
            write_endpoints(&dir, cluster, &[host.port], policy)?;
            let [kind, from] = by_file(&dir, cluster);
            bootstrap = bootstrap.cluster_of(cluster, &[&kind, &from]);
        }
        let flags: &[&str] = if kind == Kind::Envoy { &["--file-flush-interval-msec", "50"] } else { &[] };
        let daemon = start_with(kind, &bootstrap, flags, "")?;
        let mut seen = Vec::new();
        let mut ask = |path: &str| -> Result<u16> {
            let response = fetch(web, Request::get(path))?;
            let drop = |name: &str| response.headers.get(name).unwrap_or_default().to_owned();
            let (some, all) = (drop("x-envoy-drop-overload"), drop("x-envoy-unconditional-drop-overload"));
            let body = if response.status == 200 { String::new() } else { response.text() };
            let line = format!("{path} {} {some} {all} {body}", response.status);
            if !seen.contains(&line) {
                seen.push(line);
            }
            Ok(response.status)
        };
        let mut dropped = 0;
        for _ in 0..REQUESTS {
            dropped += usize::from(ask("/half")? == 503);
        }
        // Eight standard deviations.
        ensure!((REQUESTS / 2).abs_diff(dropped) < 80, "{kind:?}: {dropped} were dropped");
        ask("/all")?;
        ask("/none")?;
        // Nothing more is said, and nothing more dropped: by Envoy only where hosts are others as well.
        let other = Host::start()?;
        write_endpoints(&dir, "all", &[other.port], "")?;
        wait_until(DEADLINE, "requests that are not dropped", || {
            ensure!(fetch(web, Request::get("/all"))?.status == 200);
            Ok(())
        })?;
        let stats = daemon.stats()?;
        assert_eq!(stats.get("cluster.half.upstream_rq_503"), dropped as u64, "{kind:?}");
        assert_eq!(stats.get("cluster.half.upstream_rq_total"), (REQUESTS - dropped) as u64, "{kind:?}");
        wait_until(DEADLINE, "lines of all requests", || {
            let text = fs::read_to_string(&log)?;
            ensure!(text.lines().count() > REQUESTS + 2, "{} lines", text.lines().count());
            // Whether the last one is there is a matter of time.
            for line in text.lines().filter(|line| !line.starts_with("/all 200")) {
                if !seen.iter().any(|seen| seen == line) {
                    seen.push(line.to_owned());
                }
            }
            Ok(())
        })?;
        seen.sort();
        Ok(seen)
    };
    let (envoy, culvert) = (told(Kind::Envoy)?, told(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    Ok(())
}

#[test]
fn a_runtime_value_limits_what_is_dropped() -> Result<()> {
    for kind in KINDS {
        let (host, dir, web) = (Host::start()?, scratch_dir()?, free_port()?);
        write_endpoints(
            &dir,
            "all",
            &[host.port],
            "policy: {drop_overloads: [{category: much, drop_percentage: {numerator: 100}}]}, ",
        )?;
        let [of, from] = by_file(&dir, "all");
        let bootstrap = Bootstrap::new().http(web, &routes(&["all"]), &[]).cluster_of("all", &[&of, &from]);
        let limit = "{load_balancing_policy.drop_overload_limit: 0}";
        let runtime = format!("layered_runtime: {{layers: [{{name: a, static_layer: {limit}}}]}}\n");
        let _daemon = start_with(kind, &bootstrap, &[], &runtime)?;
        for _ in 0..5 {
            get(web, "/all").with_context(|| format!("{kind:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn tcp_proxies_choose_hosts_by_metadata() -> Result<()> {
    for kind in KINDS {
        let named = |name: &'static str| server::start(move |mut stream| Ok(stream.write_all(name.as_bytes())?));
        let (first, second) = (named("1")?, named("2")?);
        let at = |port, version| {
            format!(
                "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}, \
                 metadata: {{filter_metadata: {{envoy.lb: {{version: '{version}', stage: prod}}}}}}}}"
            )
        };
        let hosts = format!(
            "load_assignment: {{cluster_name: app, endpoints: [{{lb_endpoints: [{}, {}]}}]}}",
            at(first, 1),
            at(second, 2)
        );
        let subsets = "lb_subset_config: {fallback_policy: NO_FALLBACK, subset_selectors: [{keys: [version]}, {keys: [stage, version]}]}";
        let asks = |fields: &str| format!("metadata_match: {{filter_metadata: {{envoy.lb: {{{fields}}}}}}}");
        let weighted = |own: &str| format!("weighted_clusters: {{clusters: [{{name: app, weight: 1{own}}}]}}");
        let own = format!(", {}", asks("version: '1'"));
        let cases = [
            (format!("cluster: app, {}", asks("version: '1'")), "1"),
            (format!("cluster: app, {}", asks("version: '2'")), "2"),
            (format!("cluster: app, {}", asks("version: '3'")), ""),
            ("cluster: app".to_owned(), ""),
            (format!("{}, {}", weighted(""), asks("version: '2'")), "2"),
            (format!("{}, {}", weighted(&own), asks("version: '2'")), "1"),
            (format!("{}, {}", weighted(&own), asks("version: '2', stage: prod")), "1"),
            (format!("{}, {}", weighted(&own), asks("stage: test")), ""),
        ];
        let mut bootstrap = Bootstrap::new().cluster_of("app", &["connect_timeout: 5s", &hosts, subsets]);
        let mut ports = Vec::new();
        for (proxy, _) in &cases {
            ports.push(free_port()?);
            bootstrap = bootstrap.tcp_of(ports[ports.len() - 1], proxy);
        }
        let daemon = start(kind, &bootstrap)?;
        for ((proxy, expected), port) in cases.iter().zip(ports) {
            // Several, so that none is right by chance.
            for _ in 0..4 {
                let mut stream = TcpStream::connect(("127.0.0.1", port))?;
                stream.set_read_timeout(Some(DEADLINE))?;
                let mut seen = String::new();
                // A connection that nobody takes may be broken off.
                let _ = stream.read_to_string(&mut seen);
                assert_eq!(seen, *expected, "{kind:?}: {proxy}");
            }
        }
        assert_eq!(daemon.stats()?.get("cluster.app.upstream_cx_none_healthy"), 12, "{kind:?}");
    }
    Ok(())
}

#[test]
fn connections_to_spare_are_opened() -> Result<()> {
    const RATIOS: [(&str, f64); 3] = [("some", 1.5), ("two", 2.0), ("three", 3.0)];
    for kind in KINDS {
        let host = Host::start()?;
        let web = free_port()?;
        let mut bootstrap = Bootstrap::new().http(web, &routes(&RATIOS.map(|(name, _)| name)), &[]);
        for (name, ratio) in RATIOS {
            let policy = format!("preconnect_policy: {{per_upstream_preconnect_ratio: {ratio}}}");
            bootstrap = bootstrap.cluster(name, &[host.port], &[&policy]);
        }
        let daemon = start(kind, &bootstrap)?;
        for (name, ratio) in RATIOS {
            let (active, path) = (format!("cluster.{name}.upstream_cx_active"), format!("/{name}"));
            get(web, &path)?;
            comes_to(&daemon, &active, ratio.ceil() as u64)?;
            // They are used, and no more are opened than requests ask for.
            get(web, &path)?;
            let mut held = Vec::new();
            for number in 1..=3_u32 {
                let path = format!("/{name}/held");
                held.push(thread::spawn(move || get(web, &path)));
                comes_to(&daemon, &active, (f64::from(number) * ratio).ceil() as u64)
                    .with_context(|| format!("{kind:?}: {name}, {number} requests"))?;
            }
            host.let_go.store(true, SeqCst);
            for held in held {
                held.join().ok().context("a panic")??;
            }
            host.let_go.store(false, SeqCst);
        }
        // The first of them had one connection, and one to spare.
        assert_eq!(daemon.stats()?.get("cluster.two.upstream_rq_total"), 5, "{kind:?}");
    }
    Ok(())
}

/// Before a request needs them, there are connections to the hosts that the next ones will get.
#[test]
fn connections_are_opened_for_requests_to_come() -> Result<()> {
    let mut seen = Vec::new();
    for (kind, policy) in [
        (Kind::Envoy, "ROUND_ROBIN"),
        (Kind::Culvert, "ROUND_ROBIN"),
        (Kind::Envoy, "MAGLEV"),
        (Kind::Culvert, "MAGLEV"),
    ] {
        let hosts = [Host::start()?, Host::start()?, Host::start()?];
        let (web, ports) = (free_port()?, hosts.each_ref().map(|host| host.port));
        let policy = format!("lb_policy: {policy}");
        let fields = ["preconnect_policy: {predictive_preconnect_ratio: 2}", &policy];
        let bootstrap = Bootstrap::new().http(web, &routes(&["ahead"]), &[]).cluster("ahead", &ports, &fields);
        let daemon = start(kind, &bootstrap)?;
        let (mut counts, mut clients) = (Vec::new(), Vec::new());
        for held in 1..=5 {
            clients.push(thread::spawn(move || get(web, "/ahead/held")));
            comes_to(&daemon, "cluster.ahead.upstream_rq_active", held)?;
            // Those for the next ones are begun before the request itself has one.
            counts.push(daemon.stats()?.get("cluster.ahead.upstream_cx_total"));
        }
        hosts.iter().for_each(|host| host.let_go.store(true, SeqCst));
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        // They serve those that come then. Without hashes MAGLEV chooses any host, which may have none.
        for _ in (0..6).filter(|_| policy.contains("ROUND_ROBIN")) {
            get(web, "/ahead")?;
        }
        counts.push(daemon.stats()?.get("cluster.ahead.upstream_cx_total"));
        comes_to(&daemon, "cluster.ahead.upstream_cx_connect_fail", 0)?;
        seen.push(counts);
    }
    ensure!(seen[0] == seen[1] && seen[2] == seen[3], "{seen:?}");
    ensure!(seen[0][0] > 1 && seen[2][0] == 1, "{seen:?}");
    Ok(())
}

/// Those connections are of pools, of which there may be only so many.
#[test]
fn pools_for_requests_to_come_are_counted() -> Result<()> {
    let mut seen = Vec::new();
    for kind in KINDS {
        let hosts = [Host::start()?, Host::start()?, Host::start()?];
        let (web, ports) = (free_port()?, hosts.each_ref().map(|host| host.port));
        let fields = [
            "preconnect_policy: {predictive_preconnect_ratio: 3}",
            "circuit_breakers: {thresholds: [{track_remaining: true, max_connection_pools: 2}]}",
        ];
        let bootstrap = Bootstrap::new().http(web, &routes(&["ahead"]), &[]).cluster("ahead", &ports, &fields);
        let daemon = start(kind, &bootstrap)?;
        let mut answers = Vec::new();
        for _ in 0..6 {
            let client = fetch(web, Request::get("/ahead"))?;
            let stats = daemon.stats()?;
            let counted = ["circuit_breakers.default.remaining_cx_pools", "circuit_breakers.default.cx_pool_open"]
                .map(|name| stats.get(&format!("cluster.ahead.{name}")));
            answers.push((client.status, counted));
        }
        // With which host it begins is chance.
        answers.sort_unstable();
        let stats = daemon.stats()?;
        let counted = ["upstream_cx_total", "upstream_cx_pool_overflow", "upstream_cx_none_healthy"]
            .map(|name| stats.get(&format!("cluster.ahead.{name}")));
        seen.push((answers, counted));
    }
    ensure!(seen[0] == seen[1], "Envoy:    {:?}\nculvertd: {:?}", seen[0], seen[1]);
    Ok(())
}

#[test]
fn clients_have_connections_of_their_own_where_that_is_wanted() -> Result<()> {
    for kind in KINDS {
        let (host, port) = (Host::start()?, free_port()?);
        let own = "connection_pool_per_downstream_connection: true";
        let bootstrap = Bootstrap::new()
            .http(port, &routes(&["own", "shared"]), &[])
            .cluster("own", &[host.port], &[own])
            .cluster("shared", &[host.port], &[]);
        let daemon = start_with(kind, &bootstrap, &["--concurrency", "1"], "")?;
        let clients = [TcpStream::connect(("127.0.0.1", port))?, TcpStream::connect(("127.0.0.1", port))?];
        let ask = |client: &TcpStream, path: &str| -> Result<String> {
            let mut client = client;
            client.write_all(format!("GET /{path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())?;
            Ok(Response::read(&mut BufReader::new(client), "GET")?.text())
        };
        let mut seen = Vec::new();
        for path in ["own", "shared"] {
            for client in [0, 1, 0, 1] {
                seen.push(ask(&clients[client], path)?);
            }
        }
        // A connection for each client, and then one that they share.
        assert_eq!(seen, ["0", "1", "0", "1", "2", "2", "2", "2"], "{kind:?}");
        let open = "cluster.own.upstream_cx_active";
        assert_eq!(daemon.stats()?.get(open), 2, "{kind:?}");
        drop(clients);
        comes_to(&daemon, "http.ingress.downstream_cx_active", 0)?;
        // Nobody else could use them. Envoy leaves them to `idle_timeout`.
        match kind {
            Kind::Envoy => assert_eq!(daemon.stats()?.get(open), 2),
            Kind::Culvert => comes_to(&daemon, open, 0)?,
        }
        assert_eq!(daemon.stats()?.get("cluster.shared.upstream_cx_active"), 1, "{kind:?}");
    }
    Ok(())
}
