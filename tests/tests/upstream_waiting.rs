//! Requests that wait for a connection: to hosts that take few streams at a time, to hosts that do not answer, and those that are given up;
//! with culvertd and with the real Envoy on the same bootstrap.

use std::io::{BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];

/// An HTTP/2 host that takes so many streams at a time. Requests for `.../held` are answered when they are let go.
fn http2_host(streams: Option<u32>, let_go: &watch::Sender<bool>) -> Result<u16> {
    let let_go = let_go.subscribe();
    server::start_async(move |stream| {
        let let_go = let_go.clone();
        async move {
            let mut builder = h2::server::Builder::new();
            if let Some(streams) = streams {
                builder.max_concurrent_streams(streams);
            }
            let mut connection = builder.handshake::<_, bytes::Bytes>(stream).await?;
            while let Some(request) = connection.accept().await {
                let (request, mut respond) = request?;
                let mut let_go = let_go.clone();
                tokio::spawn(async move {
                    if request.uri().path().ends_with("/held") {
                        let _ = let_go.wait_for(|let_go| *let_go).await;
                    }
                    respond.send_response(http::Response::new(()), true).map(drop)
                });
            }
            Ok(())
        }
    })
}

/// A host whose requests have no bodies, and are answered when they are let go.
fn http1_host(let_go: &watch::Sender<bool>) -> Result<u16> {
    let let_go = let_go.subscribe();
    server::start_async(move |mut stream| {
        let mut let_go = let_go.clone();
        async move {
            let (mut head, mut piece) = (Vec::new(), [0; 4096]);
            loop {
                let read = stream.read(&mut piece).await?;
                head.extend_from_slice(&piece[..read]);
                if read == 0 {
                    return Ok(());
                }
                if head.ends_with(b"\r\n\r\n") {
                    head.clear();
                    let _ = let_go.wait_for(|let_go| *let_go).await;
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await?;
                }
            }
        }
    })
}

fn http2_of(options: &str) -> String {
    format!(
        "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": \
         type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
         {{http2_protocol_options: {{{options}}}}}}}}}"
    )
}

/// Routes by the first part of paths, which names the cluster.
fn routes(clusters: &[&str]) -> String {
    let route = |name: &&str| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}, timeout: 0s}}}}");
    let routes: Vec<_> = clusters.iter().map(route).collect();
    format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "))
}

fn start(kind: Kind, bootstrap: &Bootstrap) -> Result<Daemon> {
    Daemon::start_with(kind, &format!("node: {{id: a, cluster: b}}\n{}", bootstrap.yaml()), &[])
}

fn status(port: u16, path: &str) -> Result<u16> {
    Ok(fetch(port, Request::get(path))?.status)
}

/// So many requests, each on a thread of its own, begun one after the other.
fn begin(port: u16, path: &str, number: usize) -> Vec<thread::JoinHandle<Result<u16>>> {
    let one = |_| {
        let path = path.to_owned();
        thread::spawn(move || status(port, &path))
    };
    (0..number).map(one).collect()
}

fn all(requests: Vec<thread::JoinHandle<Result<u16>>>) -> Result<Vec<u16>> {
    requests.into_iter().map(|request| request.join().ok().context("a panic")?).collect()
}

/// Waits until statistics of a cluster are these.
fn come_to(daemon: &Daemon, cluster: &str, values: &[(&str, u64)]) -> Result<()> {
    wait_until(DEADLINE, cluster, || {
        let stats = daemon.stats()?;
        for (name, value) in values {
            let now = stats.get(&format!("cluster.{cluster}.{name}"));
            ensure!(now == *value, "{cluster}: {name} is {now} and not {value}");
        }
        Ok(())
    })
}

#[test]
fn no_connection_has_more_streams_than_its_host_takes() -> Result<()> {
    for kind in KINDS {
        let (let_go, _) = watch::channel(false);
        let (two, any) = (http2_host(Some(2), &let_go)?, http2_host(None, &let_go)?);
        let web = free_port()?;
        let limited = "circuit_breakers: {thresholds: [{max_connections: 2, max_pending_requests: 2}]}";
        let bootstrap = Bootstrap::new()
            .http(web, &routes(&["said", "configured", "limited"]), &[])
            .cluster("said", &[two], &[&http2_of("")])
            .cluster("configured", &[any], &[&http2_of("max_concurrent_streams: 1")])
            .cluster("limited", &[two], &[&http2_of(""), limited]);
        let daemon = start(kind, &bootstrap)?;
        let mut held = Vec::new();
        for (name, requests, connections) in [("said", 5, 3), ("configured", 3, 3), ("limited", 4, 2)] {
            // After this the host's settings are known.
            ensure!(status(web, &format!("/{name}"))? == 200);
            // One after the other: of a connection that is new, nobody knows how many streams its host takes.
            for number in 1..=requests {
                held.extend(begin(web, &format!("/{name}/held"), 1));
                come_to(&daemon, name, &[("upstream_rq_total", number + 1)])
                    .with_context(|| format!("{kind:?}: {number} requests"))?;
            }
            come_to(&daemon, name, &[("upstream_cx_total", connections), ("upstream_rq_active", requests)])
                .with_context(|| format!("{kind:?}"))?;
        }
        // No further connection, and no further stream on those that there are.
        held.extend(begin(web, "/limited/held", 2));
        let waiting = [("upstream_rq_pending_active", 2), ("upstream_rq_total", 5), ("upstream_cx_active", 2)];
        come_to(&daemon, "limited", &waiting).with_context(|| format!("{kind:?}"))?;
        assert_eq!(status(web, "/limited")?, 503, "{kind:?}");
        come_to(&daemon, "limited", &[("upstream_rq_pending_overflow", 1)]).with_context(|| format!("{kind:?}"))?;
        let_go.send_replace(true);
        ensure!(all(held)?.iter().all(|status| *status == 200));
        come_to(&daemon, "limited", &[("upstream_rq_pending_active", 0), ("upstream_rq_total", 7)])?;
    }
    Ok(())
}

/// A port that neither accepts nor refuses: whoever waits to be accepted fills the queue.
fn fill(listener: &TcpListener) -> Result<Vec<TcpStream>> {
    let address = listener.local_addr()?;
    Ok((0..2).filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok()).collect())
}

fn short_queue() -> Result<TcpListener> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listen(&listener, Backlog::new(0)?)?;
    Ok(listener)
}

/// A cluster of one host, with that time for connects.
fn cluster(bootstrap: Bootstrap, name: &str, port: u16, timeout: &str, further: &[&str]) -> Bootstrap {
    let assignment = format!(
        "load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
         {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}"
    );
    let timeout = format!("connect_timeout: {timeout}");
    bootstrap.cluster_of(name, &[&["type: STATIC", &timeout, &assignment], further].concat())
}

#[test]
fn all_that_wait_fail_with_a_connect() -> Result<()> {
    for kind in KINDS {
        let host = short_queue()?;
        let _waiting = fill(&host)?;
        let (web, port) = (free_port()?, host.local_addr()?.port());
        let one = "circuit_breakers: {thresholds: [{max_connections: 1}]}";
        let mut bootstrap = Bootstrap::new().http(web, &routes(&["one", "two"]), &[]);
        bootstrap = cluster(bootstrap, "one", port, "6s", &[one]);
        bootstrap = cluster(bootstrap, "two", port, "6s", &[&http2_of("")]);
        let daemon = start(kind, &bootstrap)?;
        for name in ["one", "two"] {
            let requests = begin(web, &format!("/{name}"), 4);
            come_to(&daemon, name, &[("upstream_rq_pending_active", 4), ("upstream_cx_active", 1)])?;
            assert_eq!(all(requests)?, [503; 4], "{kind:?}: {name}");
            let failed = [
                ("upstream_cx_total", 1),
                ("upstream_cx_connect_timeout", 1),
                ("upstream_cx_connect_fail", 1),
                ("upstream_rq_pending_failure_eject", 4),
                ("upstream_rq_pending_active", 0),
                ("upstream_cx_overflow", if name == "one" { 3 } else { 0 }),
            ];
            come_to(&daemon, name, &failed).with_context(|| format!("{kind:?}"))?;
        }
    }
    Ok(())
}

/// Answers one request on a connection.
fn answer(stream: &TcpStream) -> Result<()> {
    Request::read(&mut BufReader::new(stream))?.context("a request")?;
    Response::new(200, "text/plain", Vec::new()).write(&mut &*stream, false)?;
    Ok((&*stream).flush()?)
}

#[test]
fn connects_do_not_end_with_the_requests_that_they_were_for() -> Result<()> {
    for kind in KINDS {
        let host = short_queue()?;
        let (web, port) = (free_port()?, host.local_addr()?.port());
        let bootstrap = Bootstrap::new().http(web, &routes(&["one"]), &[]);
        let daemon = start(kind, &cluster(bootstrap, "one", port, "25s", &[]))?;
        let first = begin(web, "/one", 1);
        let (taken, _) = host.accept()?;
        let waiting = fill(&host)?;
        // It has a connect of its own, and then the connection that is released meanwhile.
        let second = begin(web, "/one", 1);
        come_to(&daemon, "one", &[("upstream_rq_pending_active", 1), ("upstream_cx_active", 2)])?;
        answer(&taken)?;
        assert_eq!(all(first)?, [200], "{kind:?}");
        come_to(&daemon, "one", &[("upstream_rq_pending_active", 0), ("upstream_rq_total", 2)])
            .with_context(|| format!("{kind:?}"))?;
        // A request that is given up.
        let mut third = TcpStream::connect(("127.0.0.1", web))?;
        third.write_all(b"GET /one HTTP/1.1\r\nhost: a\r\n\r\n")?;
        come_to(&daemon, "one", &[("upstream_rq_pending_active", 1), ("upstream_cx_active", 2)])?;
        drop(third);
        come_to(&daemon, "one", &[("upstream_rq_pending_active", 0), ("upstream_cx_active", 2)])?;
        answer(&taken)?;
        assert_eq!(all(second)?, [200], "{kind:?}");
        // Room in the queue: the connect is through, and the connection is one for further requests.
        for _ in &waiting {
            host.accept()?;
        }
        let (connected, _) = host.accept()?;
        let both = begin(web, "/one", 2);
        come_to(&daemon, "one", &[("upstream_rq_active", 2), ("upstream_rq_total", 4)])?;
        answer(&taken)?;
        answer(&connected)?;
        assert_eq!(all(both)?, [200, 200], "{kind:?}");
        come_to(&daemon, "one", &[("upstream_cx_total", 2), ("upstream_cx_connect_fail", 0)])
            .with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

/// What waits for a connection is none of the requests that may be under way.
#[test]
fn requests_count_from_when_they_have_a_connection() -> Result<()> {
    for kind in KINDS {
        let (let_go, _) = watch::channel(false);
        let host = http1_host(&let_go)?;
        let web = free_port()?;
        let limits = |figures| format!("circuit_breakers: {{thresholds: [{{{figures}}}]}}");
        let route = |name| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}, timeout: 0s}}}}");
        let routes = ["few", "many"].map(route).join(", ");
        let mut bootstrap =
            Bootstrap::new().http(web, &format!("- {{name: all, domains: ['*'], routes: [{routes}]}}"), &[]);
        for (name, figures) in [("few", "max_connections: 3, max_requests: 5"), ("many", "max_requests: 5")] {
            bootstrap = bootstrap.cluster(name, &[host], &[&limits(figures)]);
        }
        let daemon = start(kind, &bootstrap)?;
        let few = begin(web, "/few/held", 14);
        come_to(&daemon, "few", &[("upstream_rq_total", 3), ("upstream_rq_pending_active", 11)])
            .with_context(|| format!("{kind:?}"))?;
        let many = begin(web, "/many/held", 14);
        come_to(&daemon, "many", &[("upstream_rq_active_overflow", 9), ("upstream_rq_total", 5)])
            .with_context(|| format!("{kind:?}"))?;
        let_go.send_replace(true);
        ensure!(all(few)?.iter().all(|status| *status == 200), "{kind:?}");
        let refused = all(many)?.iter().filter(|status| **status == 503).count();
        ensure!(refused == 9, "{kind:?}: {refused} are refused");
    }
    Ok(())
}

#[test]
fn priorities_are_counted_apart() -> Result<()> {
    for kind in KINDS {
        let (let_go, _) = watch::channel(false);
        let hosts = [http2_host(None, &let_go)?, http2_host(Some(1), &let_go)?];
        let web = free_port()?;
        let limits =
            |figures| format!("circuit_breakers: {{thresholds: [{{{figures}}}, {{priority: HIGH, {figures}}}]}}");
        let waits = "max_connections: 1, max_pending_requests: 1";
        let clusters = [("requests", "max_requests: 2"), ("waits", waits)];
        let route = |(name, _): &(&str, _)| {
            format!(
                "{{match: {{prefix: /{name}/high}}, route: {{cluster: {name}, priority: HIGH, timeout: 0s}}}}, \
                 {{match: {{prefix: /{name}}}, route: {{cluster: {name}, timeout: 0s}}}}"
            )
        };
        let routes = clusters.each_ref().map(route).join(", ");
        let mut bootstrap =
            Bootstrap::new().http(web, &format!("- {{name: all, domains: ['*'], routes: [{routes}]}}"), &[]);
        for ((name, figures), host) in clusters.into_iter().zip(hosts) {
            bootstrap = bootstrap.cluster(name, &[host], &[&http2_of(""), &limits(figures)]);
        }
        let daemon = start(kind, &bootstrap)?;
        let open = |cluster: &str, breaker: &str, values: [u64; 2]| {
            let names = ["default", "high"].map(|priority| format!("circuit_breakers.{priority}.{breaker}"));
            come_to(&daemon, cluster, &[(&names[0], values[0]), (&names[1], values[1])])
                .with_context(|| format!("{kind:?}"))
        };
        let mut held = begin(web, "/requests/held", 2);
        come_to(&daemon, "requests", &[("upstream_rq_active", 2)])?;
        open("requests", "rq_open", [1, 0])?;
        assert_eq!(status(web, "/requests")?, 503, "{kind:?}");
        held.extend(begin(web, "/requests/high/held", 2));
        come_to(&daemon, "requests", &[("upstream_rq_active", 4)]).with_context(|| format!("{kind:?}"))?;
        open("requests", "rq_open", [1, 1])?;
        assert_eq!(status(web, "/requests/high")?, 503, "{kind:?}");
        // One has the connection, and one waits for it.
        for (path, [connections, pending], breakers) in [("", [1, 1], [1, 0]), ("/high", [2, 2], [1, 1])] {
            ensure!(status(web, &format!("/waits{path}"))? == 200);
            held.extend(begin(web, &format!("/waits{path}/held"), 1));
            come_to(&daemon, "waits", &[("upstream_cx_active", connections), ("upstream_rq_total", connections * 2)])?;
            held.extend(begin(web, &format!("/waits{path}/held"), 1));
            come_to(&daemon, "waits", &[("upstream_rq_pending_active", pending), ("upstream_cx_active", connections)])
                .with_context(|| format!("{kind:?}"))?;
            open("waits", "rq_pending_open", breakers)?;
            open("waits", "cx_open", breakers)?;
            assert_eq!(status(web, &format!("/waits{path}"))?, 503, "{kind:?}");
        }
        let_go.send_replace(true);
        ensure!(all(held)?.iter().all(|status| *status == 200));
        open("requests", "rq_open", [0, 0])?;
        open("waits", "rq_pending_open", [0, 0])?;
    }
    Ok(())
}

/// Answers each line with itself, and closes with the client.
fn echo() -> Result<u16> {
    server::start(|mut stream| {
        let mut from = BufReader::new(stream.try_clone()?);
        std::io::copy(&mut from, &mut stream)?;
        Ok(())
    })
}

fn echoes(stream: &mut TcpStream) -> Result<()> {
    use std::io::Read as _;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"hello")?;
    let mut back = [0; 5];
    stream.read_exact(&mut back)?;
    ensure!(&back == b"hello", "{back:?}");
    Ok(())
}

/// `per_host_thresholds`, and `track_remaining`.
#[test]
fn no_host_has_more_connections_than_it_may() -> Result<()> {
    for kind in KINDS {
        let (let_go, _) = watch::channel(false);
        let hosts = [http2_host(None, &let_go)?, http2_host(None, &let_go)?];
        let (web, tcp) = (free_port()?, free_port()?);
        let limited = "circuit_breakers: {thresholds: [{track_remaining: true, max_connections: 9, max_pending_requests: 1}], \
                       per_host_thresholds: [{max_connections: 2}, {max_connections: 7}, {priority: HIGH, max_connections: 1}]}";
        let one =
            "circuit_breakers: {thresholds: [{max_pending_requests: 1}], per_host_thresholds: [{max_connections: 1}]}";
        let bootstrap = Bootstrap::new()
            .http(web, &routes(&["limited"]), &[])
            .tcp(tcp, "one")
            .cluster("limited", &hosts, &[&http2_of("max_concurrent_streams: 1"), limited])
            .cluster("one", &[echo()?], &[one]);
        let daemon = start(kind, &bootstrap)?;
        let cx = |kind: Kind| move || format!("{kind:?}");
        let mut held = Vec::new();
        for number in 1..=4 {
            held.extend(begin(web, "/limited/held", 1));
            let connected =
                [("upstream_cx_active", number), ("upstream_rq_total", number), ("upstream_cx_overflow", 0)];
            come_to(&daemon, "limited", &connected).with_context(cx(kind))?;
        }
        held.extend(begin(web, "/limited/held", 1));
        let waits = [
            ("upstream_cx_active", 4),
            ("upstream_rq_total", 4),
            ("upstream_rq_pending_active", 1),
            ("upstream_cx_overflow", 1),
            ("circuit_breakers.default.remaining_cx", 5),
            ("circuit_breakers.default.remaining_pending", 0),
            ("circuit_breakers.default.remaining_rq", 1020),
            ("circuit_breakers.default.remaining_retries", 3),
            ("circuit_breakers.default.cx_open", 0),
            ("circuit_breakers.default.rq_pending_open", 1),
        ];
        come_to(&daemon, "limited", &waits).with_context(cx(kind))?;
        ensure!(!daemon.stats()?.has("cluster.one.circuit_breakers.default.remaining_cx"), "{kind:?}: nobody asked");
        assert_eq!(status(web, "/limited")?, 503, "{kind:?}: no more may wait");
        let_go.send_replace(true);
        ensure!(all(held)?.iter().all(|status| *status == 200));
        come_to(&daemon, "limited", &[("upstream_cx_total", 4), ("upstream_rq_total", 5)]).with_context(cx(kind))?;

        let mut first = TcpStream::connect(("127.0.0.1", tcp))?;
        echoes(&mut first)?;
        let mut second = TcpStream::connect(("127.0.0.1", tcp))?;
        let waits = [("upstream_cx_active", 1), ("upstream_rq_pending_active", 1), ("upstream_cx_overflow", 1)];
        come_to(&daemon, "one", &waits).with_context(cx(kind))?;
        let mut third = TcpStream::connect(("127.0.0.1", tcp))?;
        third.set_read_timeout(Some(DEADLINE))?;
        ensure!(matches!(std::io::Read::read(&mut third, &mut [0]), Ok(0) | Err(_)), "{kind:?}: it has a connection");
        come_to(&daemon, "one", &[("upstream_rq_pending_overflow", 1)]).with_context(cx(kind))?;
        drop(first);
        echoes(&mut second).with_context(cx(kind))?;
        come_to(&daemon, "one", &[("upstream_cx_total", 2), ("upstream_cx_active", 1)]).with_context(cx(kind))?;
    }
    Ok(())
}

/// `max_connection_pools`: a pool is a host's in one worker, for as long as it has a connection.
#[test]
fn there_are_as_many_pools_as_may_be() -> Result<()> {
    let mut seen = Vec::new();
    for kind in KINDS {
        let (let_go, _) = watch::channel(false);
        let hosts = [http2_host(None, &let_go)?, http2_host(None, &let_go)?];
        let web = free_port()?;
        let limited = "circuit_breakers: {thresholds: [{track_remaining: true, max_connection_pools: 1}]}";
        let retried = "- {name: all, domains: ['*'], routes: [{match: {prefix: /limited}, route: {cluster: limited, timeout: 0s}}], \
                       retry_policy: {retry_on: '5xx,connect-failure'}}";
        let http1 = "common_lb_config: {healthy_panic_threshold: {}}";
        let bootstrap =
            Bootstrap::new().http(web, retried, &[]).cluster("limited", &hosts, &[&http2_of(""), limited, http1]);
        let daemon = Daemon::start_with(kind, &bootstrap.yaml(), &["--concurrency", "1"])?;
        let mut answers = Vec::new();
        for _ in 0..6 {
            let response = fetch(web, Request::get("/limited"))?;
            answers.push(format!("{} {}", response.status, response.text()));
        }
        // In which order the hosts have their turns is chance.
        answers.sort();
        let counted = [
            "upstream_cx_pool_overflow",
            "upstream_cx_total",
            "upstream_cx_none_healthy",
            "upstream_rq_total",
            "upstream_rq_retry",
            "upstream_rq_503",
            "upstream_rq_pending_overflow",
            "circuit_breakers.default.cx_pool_open",
            "circuit_breakers.default.remaining_cx_pools",
            "circuit_breakers.high.cx_pool_open",
        ];
        let stats = daemon.stats()?;
        let counted = counted.map(|name| format!("{name} {}", stats.get(&format!("cluster.limited.{name}"))));
        seen.push((answers, counted));
    }
    ensure!(seen[1] == seen[0], "Envoy: {:?}\nculvertd: {:?}", seen[0], seen[1]);
    ensure!(seen[1].0.iter().any(|answer| answer == "503 no healthy upstream"), "{:?}", seen[1]);
    Ok(())
}

/// What a retry budget leaves is not shown as such: `rq_retry_open` and `remaining_retries` go by `max_retries`.
#[test]
fn retry_budgets_are_shown_as_by_envoy() -> Result<()> {
    let budgets = [
        ("zero", "track_remaining: true, retry_budget: {budget_percent: {value: 0}, min_retry_concurrency: 0}"),
        ("usual", "track_remaining: true, retry_budget: {}"),
        ("none", "track_remaining: true"),
        ("never", "track_remaining: true, max_retries: 0"),
    ];
    let mut seen = Vec::new();
    for kind in KINDS {
        let (web, nobody) = (free_port()?, free_port()?);
        let routes = budgets.map(|(name, _)| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}}}}}"));
        let hosts = format!(
            "- {{name: all, domains: ['*'], routes: [{}], retry_policy: {{retry_on: connect-failure, num_retries: 2, \
             retry_back_off: {{base_interval: 0.01s}}}}}}",
            routes.join(", ")
        );
        let bootstrap =
            budgets.iter().fold(Bootstrap::new().http(web, &hosts, &[]), |bootstrap, (name, thresholds)| {
                bootstrap.cluster(name, &[nobody], &[&format!("circuit_breakers: {{thresholds: [{{{thresholds}}}]}}")])
            });
        let daemon = start(kind, &bootstrap)?;
        let gauges = || -> Result<Vec<String>> {
            let stats = daemon.stats()?;
            let shown = |name: &str| {
                let gauge = |gauge: &str| stats.get(&format!("cluster.{name}.circuit_breakers.default.{gauge}"));
                format!("{name}: {} {}", gauge("rq_retry_open"), gauge("remaining_retries"))
            };
            Ok(budgets.iter().map(|(name, _)| shown(name)).collect())
        };
        let before = gauges()?;
        for (name, _) in budgets {
            assert_eq!(status(web, &format!("/{name}"))?, 503);
        }
        seen.push((before, gauges()?));
    }
    assert_eq!(seen[1], seen[0], "Envoy's are on the right");
    Ok(())
}

/// Whoever takes less than the other side sends holds it up, which is counted, by each proxy in its own measure.
#[test]
fn what_waits_for_others_is_counted() -> Result<()> {
    for kind in KINDS {
        // `GET` has an answer without an end, `QUICK` a short one, and whoever says anything else is not listened to.
        let host = server::start(|mut stream| {
            let mut first = [0; 5];
            std::io::Read::read_exact(&mut stream, &mut first)?;
            if &first == b"GET /" {
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
                while stream.write_all(&[b'x'; 64 * 1024]).is_ok() {}
            } else if &first == b"QUICK" {
                return Ok(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?);
            }
            thread::sleep(2 * DEADLINE);
            Ok(())
        })?;
        let (web, tcp) = (free_port()?, free_port()?);
        let bootstrap = Bootstrap::new()
            .http(web, &routes(&["http", "sized"]), &[])
            .tcp(tcp, "bytes")
            .cluster("http", &[host], &[])
            .cluster("sized", &[host], &["track_cluster_stats: {request_response_sizes: true}"])
            .cluster("bytes", &[host], &[]);
        let daemon = start(kind, &bootstrap)?;
        let comes = |name: &str| {
            wait_until(DEADLINE, name, || {
                let counted = daemon.stats()?.get(name);
                ensure!(counted > 0, "{kind:?}: {name} is 0");
                Ok(())
            })
        };
        let mut quick = TcpStream::connect(("127.0.0.1", tcp))?;
        quick.write_all(b"QUICK")?;
        std::io::Read::read_to_end(&mut quick, &mut Vec::new())?;
        let stats = daemon.stats()?;
        let counted =
            stats.names().filter(|name| name.contains("flow_control")).map(|name| stats.get(name)).sum::<u64>();
        ensure!(counted == 0, "{kind:?}: nothing has waited");
        let talks = |port: u16, text: &'static str| -> Result<TcpStream> {
            let client = TcpStream::connect(("127.0.0.1", port))?;
            let mut writer = client.try_clone()?;
            thread::spawn(move || {
                // Until the proxy is gone.
                let _ = writer.write_all(text.as_bytes());
                while !text.starts_with("GET") && writer.write_all(&[b'x'; 64 * 1024]).is_ok() {}
            });
            Ok(client)
        };
        let of_cluster = |name: &str, what: &str| format!("cluster.{name}.upstream_flow_control_{what}");
        for (port, text, names) in [
            (web, "GET /http HTTP/1.1\r\nhost: a\r\n\r\n", vec![of_cluster("http", "paused_reading_total")]),
            (
                web,
                "POST /http HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000000\r\n\r\n",
                vec![
                    of_cluster("http", "backed_up_total"),
                    "http.ingress.downstream_flow_control_paused_reading_total".to_owned(),
                ],
            ),
            // What counts how long they are hides nothing.
            (
                web,
                "POST /sized HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000000\r\n\r\n",
                vec![of_cluster("sized", "backed_up_total")],
            ),
            (tcp, "GET /", vec![of_cluster("bytes", "paused_reading_total")]),
            (tcp, "deaf!", vec!["tcp.tcp.downstream_flow_control_paused_reading_total".to_owned()]),
        ] {
            let mut client = talks(port, text)?;
            for name in &names {
                comes(name)?;
            }
            if text.starts_with("GET") {
                // It goes on when somebody reads.
                client.set_read_timeout(Some(DEADLINE))?;
                std::io::Read::read_exact(&mut client, &mut vec![0; 16 << 20])?;
                comes(&names[0].replace("paused", "resumed"))?;
            }
        }
    }
    Ok(())
}
