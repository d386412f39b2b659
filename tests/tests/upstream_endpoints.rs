//! What assignments say of endpoints besides where they are, with culvertd and with the real Envoy on the same bootstrap.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, fetch_raw, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];

/// A host that says its name to whoever connects.
fn host(name: &'static str) -> Result<u16> {
    server::start(move |mut stream| {
        let mut lines = BufReader::new(stream.try_clone()?);
        while Request::read(&mut lines)?.is_some() {
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len())?;
        }
        Ok(())
    })
}

#[test]
fn endpoints_that_are_not_said_again_are_forgotten() -> Result<()> {
    for kind in KINDS {
        let (host, dir, web) = (host("a")?, scratch_dir()?, free_port()?);
        let path = dir.join("eds.yaml");
        let write = |after: &str| -> Result<()> {
            let text = format!(
                "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: app, policy: \
                 {{endpoint_stale_after: {after}}}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: \
                 127.0.0.1, port_value: {host}}}}}}}}}]}}]}}\n"
            );
            fs::write(dir.join("new"), text)?;
            Ok(fs::rename(dir.join("new"), &path)?)
        };
        write("600s")?;
        let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let eds = format!("eds_cluster_config: {{eds_config: {{path_config_source: {{path: {}}}}}}}", path.display());
        let bootstrap = Bootstrap::new().http(web, routes, &[]).cluster_of("app", &["type: EDS", &eds]);
        let daemon = Daemon::start(kind, &format!("node: {{id: a, cluster: b}}\n{}", bootstrap.yaml()))?;
        let answers = |status: u16| {
            wait_until(DEADLINE, "the answer", || {
                let answer = fetch(web, Request::get("/"))?;
                ensure!(answer.status == status, "{kind:?}: {} {}", answer.status, answer.text());
                Ok(())
            })
        };
        answers(200)?;
        write("1s")?;
        answers(503)?;
        let stats = daemon.stats()?;
        assert_eq!(stats.get("cluster.app.assignment_stale"), 1, "{kind:?}");
        assert_eq!(stats.get("cluster.app.membership_total"), 0, "{kind:?}");
        // The very same as before is news then.
        write("600s")?;
        answers(200)?;
        // Envoy reads the file once more at its start.
        ensure!(daemon.stats()?.get("cluster.app.assignment_timeout_received") >= 3, "{kind:?}");
        assert_eq!(daemon.stats()?.get("cluster.app.assignment_stale"), 1, "{kind:?}");
    }
    Ok(())
}

#[test]
fn sessions_keep_to_hosts_that_stand_as_is_said() -> Result<()> {
    const REQUESTS: usize = 24;
    for kind in KINDS {
        let (first, second, web) = (host("a")?, host("b")?, free_port()?);
        let cluster = |status: &str| {
            let at = |port, status: &str| {
                format!(
                    "{{health_status: {status}, endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
                )
            };
            format!(
                "load_assignment: {{cluster_name: x, endpoints: [{{lb_endpoints: [{}, {}]}}]}}",
                at(first, "HEALTHY"),
                at(second, status)
            )
        };
        let allows = |statuses: &str| format!("common_lb_config: {{override_host_status: {{statuses: [{statuses}]}}}}");
        let clusters = [
            ("free", "HEALTHY", String::new(), "ab"),
            ("usual", "DRAINING", String::new(), "a"),
            ("degraded", "DEGRADED", String::new(), "b"),
            ("draining", "DRAINING", allows("HEALTHY, DRAINING"), "b"),
            ("ill", "UNHEALTHY", allows("HEALTHY, UNHEALTHY"), "b"),
            ("timeout", "TIMEOUT", allows("TIMEOUT"), "b"),
            ("others", "TIMEOUT", allows("HEALTHY, DRAINING"), "a"),
            ("nobody", "HEALTHY", allows("DEGRADED"), "ab"),
        ];
        let routes: Vec<_> = clusters
            .iter()
            .map(|(name, ..)| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}}}}}"))
            .collect();
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let mut bootstrap = Bootstrap::new().http(web, &hosts, &[]);
        for (name, status, fields, _) in &clusters {
            let assignment = cluster(status);
            let fields: Vec<_> = [assignment.as_str(), fields].into_iter().filter(|it| !it.is_empty()).collect();
            bootstrap = bootstrap.cluster_of(name, &fields);
        }
        let session = "          http_filters:
          - name: envoy.filters.http.stateful_session
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.stateful_session.v3.StatefulSession
              session_state:
                name: envoy.http.stateful_session.header
                typed_config: {\"@type\": type.googleapis.com/envoy.extensions.http.stateful_session.header.v3.HeaderBasedSessionState, name: x-session}
";
        let yaml = bootstrap.yaml().replacen("          http_filters:\n", session, 1);
        let _daemon = Daemon::start(kind, &yaml)?;
        let mut sessions = BTreeMap::new();
        for _ in 0..REQUESTS {
            let answer = fetch(web, Request::get("/free"))?;
            let session = answer.headers.get("x-session").unwrap_or_default().to_owned();
            sessions.insert(answer.text(), session);
        }
        ensure!(sessions.len() == 2, "{kind:?}: {sessions:?}");
        for (name, .., expected) in clusters.iter().skip(1) {
            let mut seen = BTreeSet::new();
            for _ in 0..REQUESTS {
                let request = Request::get(&format!("/{name}")).header("x-session", &sessions["b"]);
                seen.insert(fetch(web, request)?.text());
            }
            let seen: String = seen.into_iter().collect();
            assert_eq!(seen, *expected, "{kind:?}: {name}");
        }
    }
    Ok(())
}

/// Canaries are hosts whose metadata says so, and responses that do.
#[test]
fn responses_of_canaries_are_counted_as_by_envoy() -> Result<()> {
    let host = || {
        server::start(|mut stream| {
            let mut lines = BufReader::new(stream.try_clone()?);
            while let Some(request) = Request::read(&mut lines)? {
                let said = request.headers.get("x-say").map(|said| format!("x-envoy-upstream-canary: {said}\r\n"));
                if request.headers.get("x-hang").is_some() {
                    continue;
                }
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n{}\r\nok", said.unwrap_or_default())?;
            }
            Ok(())
        })
    };
    let met = |kind| -> Result<Vec<String>> {
        let (host, closed, web) = (host()?, free_port()?, free_port()?);
        let cluster = |port: u16, canary: bool| {
            format!(
                "load_assignment: {{cluster_name: x, endpoints: [{{lb_endpoints: [{{metadata: {{filter_metadata: {{envoy.lb: {{canary: \
                 {canary}}}}}}}, endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"
            )
        };
        let clusters = [("meta", host, true), ("header", host, false), ("plain", host, false), ("gone", closed, true)];
        let route = |name: &str| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}, timeout: 0.5s}}}}");
        let routes = clusters.map(|(name, ..)| route(name)).join(", ");
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{routes}]}}");
        let bootstrap =
            clusters.iter().fold(Bootstrap::new().http(web, &hosts, &[]), |bootstrap, (name, port, canary)| {
                bootstrap.cluster_of(name, &[&cluster(*port, *canary)])
            });
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let requests = [
            ("meta", "", 200),
            ("meta", "x-say: false", 200),
            ("meta", "x-hang: 1", 504),
            ("header", "", 200),
            ("header", "x-say: true", 200),
            ("header", "x-say: true", 200),
            ("header", "x-say: True", 200),
            ("header", "x-hang: 1", 504),
            ("plain", "x-say: false", 200),
            ("gone", "", 503),
        ];
        for (name, header, status) in requests {
            let mut request = Request::get(&format!("/{name}"));
            if let Some((name, value)) = header.split_once(": ") {
                request = request.header(name, value);
            }
            assert_eq!(fetch(web, request)?.status, status, "{kind:?}: {name} {header}");
        }
        let stats = daemon.admin("/stats?filter=canary")?;
        ensure!(stats.contains("cluster.header.canary.upstream_rq_time"), "{kind:?}: {stats}");
        // What was measured Envoy says some seconds later.
        let counters = stats.lines().filter(|line| !line.contains("upstream_rq_time"));
        let mut counted: Vec<_> = counters.map(str::to_owned).collect();
        counted.sort();
        Ok(counted)
    };
    let (envoy, culvert) = (met(Kind::Envoy)?, met(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    ensure!(envoy.contains(&"cluster.header.canary.upstream_rq_200: 2".to_owned()), "{envoy:?}");
    Ok(())
}

/// Whoever asks whether a daemon is ready is not kept waiting by what it is told of hosts.
#[test]
fn many_new_hosts_do_not_keep_the_admin_interface_waiting() -> Result<()> {
    const HOSTS: u32 = 30_000;
    let dir = scratch_dir()?;
    let path = dir.join("eds.json");
    let write = |from: u32| -> Result<()> {
        let hosts: Vec<String> = (from..from + HOSTS)
            .map(|host| {
                let [_, a, b, c] = host.to_be_bytes();
                format!("{{\"endpoint\":{{\"address\":{{\"socket_address\":{{\"address\":\"10.{a}.{b}.{c}\",\"port_value\":80}}}}}}}}")
            })
            .collect();
        let text = format!(
            "{{\"resources\":[{{\"@type\":\"type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment\",\
             \"cluster_name\":\"app\",\"endpoints\":[{{\"lb_endpoints\":[{}]}}]}}]}}",
            hosts.join(",")
        );
        fs::write(dir.join("new"), text)?;
        Ok(fs::rename(dir.join("new"), &path)?)
    };
    write(0)?;
    let eds = format!("eds_cluster_config: {{eds_config: {{path_config_source: {{path: {}}}}}}}", path.display());
    let bootstrap = Bootstrap::new().cluster_of("app", &["type: EDS", &eds]);
    let daemon = Daemon::start(Kind::Culvert, &format!("node: {{id: a, cluster: b}}\n{}", bootstrap.yaml()))?;
    let updates = || -> Result<u64> { Ok(daemon.stats()?.get("cluster.app.update_success")) };
    let before = updates()?;
    write(7)?;
    let (began, done) = (Instant::now(), AtomicBool::new(false));
    let worst = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let mut worst = Duration::ZERO;
            while !done.load(Ordering::SeqCst) {
                let asked = Instant::now();
                if daemon.admin("/ready").is_err() {
                    return DEADLINE;
                }
                worst = worst.max(asked.elapsed());
            }
            worst
        });
        let updated = wait_until(DEADLINE, "the update", || {
            ensure!(updates()? > before, "not yet");
            Ok(())
        });
        done.store(true, Ordering::SeqCst);
        updated.map(|()| asked.join().unwrap_or(DEADLINE))
    })?;
    let took = began.elapsed();
    // Whoever waits for the update waits for about all of it.
    ensure!(worst < took / 2, "/ready took {worst:?} of the {took:?} that the update did");
    Ok(())
}

/// The lines of `/stats` or `/stats/prometheus` that have this in them.
fn lines(text: &str, part: &str) -> Vec<String> {
    text.lines().filter(|line| line.contains(part) && !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn what_is_tracked_only_where_somebody_asks() -> Result<()> {
    let host = server::start(|mut stream| {
        let mut requests = BufReader::new(stream.try_clone()?);
        while let Some(request) = Request::read(&mut requests)? {
            if request.target.ends_with("hang") {
                // Until the proxy breaks it off.
                while requests.read(&mut [0; 64])? > 0 {}
                return Ok(());
            }
            if request.target.ends_with("slow") {
                std::thread::sleep(Duration::from_millis(800));
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })?;
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /plain}, route: {cluster: app, timeout: 2s}}, \
                  {match: {prefix: /try}, route: {cluster: app, timeout: 4s, retry_policy: {retry_on: 5xx, num_retries: 1, \
                  per_try_timeout: 1s}}}, {match: {prefix: /}, route: {cluster: other}}]}";
    let told = |kind: Kind| -> Result<Vec<String>> {
        let web = free_port()?;
        let tracked = "track_cluster_stats: {timeout_budgets: true, per_endpoint_stats: true}";
        let bootstrap = Bootstrap::new().http(web, routes, &[]).cluster("app", &[host], &[tracked]);
        let daemon = Daemon::start(kind, &bootstrap.cluster("other", &[host], &[]).yaml())?;
        let paths = [
            ("/plain/fast", 200),
            ("/plain/slow", 200),
            ("/plain/hang", 504),
            ("/try/hang", 504),
            ("/try/slow", 200),
            ("/other", 200),
        ];
        for (path, status) in paths {
            assert_eq!(fetch(web, Request::get(path))?.status, status, "{kind:?}: {path}");
        }
        let mut told = Vec::new();
        wait_until(DEADLINE, "the statistics", || {
            let text = daemon.admin("/stats/prometheus")?;
            let value = |name: &str, end: &str| -> Result<f64> {
                let found = lines(&text, &format!("envoy_cluster_upstream_rq_timeout_budget_{name}_{end}"));
                ensure!(found.len() == 1, "{kind:?}: {found:?}");
                Ok(found[0].rsplit(' ').next().unwrap_or_default().parse()?)
            };
            // Requests: 0 %, 40 %, 100 %, 50 %, 20 %. Attempts: none of the one whose request was over, two of 100 %, one of 80 %.
            for (name, sum) in [("percent_used", 210.0), ("per_try_percent_used", 280.0)] {
                let (count, got) = (value(name, "count")?, value(name, "sum")?);
                ensure!(count == 5.0, "{kind:?}: {name}: {count}");
                ensure!((got - sum).abs() < 60.0, "{kind:?}: {name}: {got}, and not {sum}");
            }
            let stats = daemon.admin("/stats?filter=endpoint")?;
            // Each worker has connections of its own.
            told = lines(&stats, ".endpoint.").into_iter().filter(|line| !line.contains("cx_")).collect();
            let names = lines(&text, "envoy_cluster_endpoint_");
            told.extend(names.iter().filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())));
            // Of a host it is not counted by culvertd, as in `/clusters`.
            told.retain(|line| !line.contains("rq_pending_active"));
            told.sort();
            ensure!(told.iter().any(|line| line.ends_with("rq_active: 0")), "{kind:?}: {told:?}");
            Ok(())
        })?;
        Ok(told)
    };
    let (ours, theirs) = (told(Kind::Culvert)?, told(Kind::Envoy)?);
    ensure!(ours == theirs, "culvertd: {ours:#?}\nEnvoy: {theirs:#?}");
    Ok(())
}

/// How large messages are, of each attempt, as Envoy counts it.
#[test]
fn sizes_are_told_where_somebody_asks() -> Result<()> {
    let host = server::start(|mut stream| {
        let mut requests = BufReader::new(stream.try_clone()?);
        while let Some(request) = Request::read(&mut requests)? {
            let answer = match request.target.rsplit('/').next().unwrap_or_default() {
                "none" => "HTTP/1.1 204 No Content\r\nx-a: b\r\n\r\n",
                "chunks" => {
                    "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
                }
                "fails" => "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno",
                "last" => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
                _ => "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: a=b\r\nset-cookie: c=d\r\n\r\nok",
            };
            stream.write_all(answer.as_bytes())?;
            if answer.contains("close") {
                return Ok(());
            }
        }
        Ok(())
    })?;
    let routes = "- {name: all, domains: ['*'], include_request_attempt_count: true, routes: [{match: {prefix: /dead}, route: {cluster: \
                  dead}}, {match: {prefix: /again}, route: {cluster: again, retry_policy: {retry_on: 5xx, num_retries: 2}}}, {match: {prefix: \
                  /other}, route: {cluster: other}}, {match: {prefix: /}, route: {cluster: app}}]}";
    let told = |kind: Kind| -> Result<Vec<String>> {
        let web = free_port()?;
        let tracked = "track_cluster_stats: {request_response_sizes: true}";
        let bootstrap = Bootstrap::new()
            .http(web, routes, &[])
            .cluster("app", &[host], &[tracked])
            .cluster("again", &[host], &[tracked])
            .cluster("dead", &[1], &[tracked])
            .cluster("other", &[host], &[]);
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let chunks = "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let length = "content-length: 4\r\nx-b: \r\n\r\nbody";
        for (line, rest) in [
            ("GET /plain", "x-a: 1\r\nx-a: 2\r\n\r\n"),
            ("GET /none?a=b", "\r\n"),
            ("HEAD /plain", "\r\n"),
            ("POST /chunks", chunks),
            ("POST /last", length),
            ("POST /fails", length),
            ("POST /again/fails", length),
            ("POST /dead", length),
            ("GET /other", "\r\n"),
        ] {
            let request = format!("{line} HTTP/1.1\r\nhost: sizes.test\r\nuser-agent: test\r\n{rest}");
            fetch_raw(web, request.as_bytes(), line.split(' ').next().unwrap_or_default())?;
        }
        let mut told = Vec::new();
        wait_until(DEADLINE, "the statistics", || {
            let text = daemon.admin("/stats/prometheus")?;
            told = ["rq_headers", "rq_body", "rs_headers", "rs_body"]
                .iter()
                .flat_map(|what| lines(&text, &format!("envoy_cluster_upstream_{what}_")))
                .filter(|line| line.contains("_sum{") || line.contains("_count{"))
                .collect();
            told.sort();
            // Those of six requests to the first cluster.
            let all = "envoy_cluster_upstream_rq_headers_size_count{envoy_cluster_name=\"app\"} 6";
            ensure!(told.iter().any(|line| line == all), "{kind:?}: {told:#?}");
            Ok(())
        })?;
        Ok(told)
    };
    let (ours, theirs) = (told(Kind::Culvert)?, told(Kind::Envoy)?);
    let value = |line: &str| -> Result<(String, f64)> {
        let (name, value) = line.rsplit_once(' ').context("no value")?;
        Ok((name.to_owned(), value.parse()?))
    };
    ensure!(ours.len() == theirs.len(), "culvertd: {ours:#?}\nEnvoy: {theirs:#?}");
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let ((name, our), (other, their)) = (value(ours)?, value(theirs)?);
        // Envoy's sums are those of what its buckets stand for.
        let is_near = (our - their).abs() <= if name.contains("_sum{") { their * 0.07 } else { 0.0 };
        ensure!(name == other && is_near, "culvertd: {ours}\nEnvoy: {theirs}");
    }
    Ok(())
}
