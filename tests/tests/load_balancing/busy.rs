//! Balancing by what hosts have to do, and by how long they have been there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use culvert_tests::daemon::fetch;
use culvert_tests::http1::Request;
use culvert_tests::wait_until;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);

/// A server on all addresses of the loopback; `serve` is told the last number of the one that was connected to.
fn server(serve: impl Fn(TcpStream, u8) -> Result<()> + Send + Sync + 'static) -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = Arc::clone(&serve);
            thread::spawn(move || {
                stream.set_nodelay(true)?;
                let number = match stream.local_addr()?.ip() {
                    std::net::IpAddr::V4(address) => address.octets()[3],
                    std::net::IpAddr::V6(_) => 0,
                };
                serve(stream, number)
            });
        }
    });
    Ok(port)
}

/// `hash_balance_factor`: requests that stay on their way push those that follow to other hosts, and to the very same as in Envoy.
#[test]
fn busy_hosts_are_passed_over() -> Result<()> {
    let hashed = "hash_policy: [{header: {header_name: x-key}}]";
    let bounded = |name: &str, factor: u32| {
        typed(name, &format!("consistent_hashing_lb_config: {{hash_balance_factor: {factor}}}"))
    };
    let cases = [
        Case { route: hashed, ..case("maglev", bounded("Maglev", 120), weighted(&[1, 1, 1, 1, 1])) },
        Case { route: hashed, ..case("ring", bounded("RingHash", 150), weighted(&[1, 4, 1, 2])) },
        Case { route: hashed, ..case("loose", bounded("RingHash", 100_000), weighted(&[1, 1, 1, 1])) },
    ];
    let (told, hosts) = mpsc::channel();
    // Nobody is answered. The same for both: hosts are hashed with their ports.
    let upstream = server(move |stream, number| {
        let (mut lines, mut line) = (BufReader::new(stream), String::new());
        while lines.read_line(&mut line)? > 0 {
            if line == "\r\n" {
                told.send(number)?;
            }
            line.clear();
        }
        Ok(())
    })?;
    let run = |kind| -> Result<Vec<Vec<u8>>> {
        let proxy = Proxy::start(kind, &cases, upstream, "")?;
        let mut all = Vec::new();
        for case in &cases {
            let (mut open, mut seen) = (Vec::new(), Vec::new());
            for key in ["a", "a", "a", "a", "a", "b", "a", "c", "c", "b", "b", "b", "a", "a", "d", "e", "f", "a", "a"] {
                let mut stream = TcpStream::connect(("127.0.0.1", proxy.port))?;
                write!(stream, "GET /{} HTTP/1.1\r\nhost: a\r\nx-key: {key}\r\n\r\n", case.name)?;
                seen.push(hosts.recv_timeout(DEADLINE)?);
                open.push(stream);
            }
            all.push(seen);
        }
        Ok(all)
    };
    let (ours, theirs) = (run(Kind::Culvert)?, run(Kind::Envoy)?);
    assert_eq!(ours, theirs);
    let [maglev, _, loose] = &ours[..] else { anyhow::bail!("{ours:?}") };
    for (seen, some) in [(maglev, true), (loose, false)] {
        let moved = seen[..5].iter().any(|host| *host != seen[0]);
        ensure!(moved == some, "one key goes to {seen:?}");
    }
    Ok(())
}

/// Slow start goes by when a host has begun to pass its checks, and not by when it came.
#[test]
fn hosts_that_become_well_start_slowly() -> Result<()> {
    const WINDOW: Duration = Duration::from_secs(12);
    let well = Arc::new(AtomicBool::new(false));
    let is_well = Arc::clone(&well);
    let upstream = server(move |stream, number| {
        let mut lines = BufReader::new(stream.try_clone()?);
        let (mut stream, mut line, mut check) = (stream, String::new(), false);
        while lines.read_line(&mut line)? > 0 {
            check |= line.starts_with("GET /check ");
            if line == "\r\n" {
                let fails = check && number == 3 && !is_well.load(Ordering::SeqCst);
                let status = if fails { 503 } else { 200 };
                write!(stream, "HTTP/1.1 {status} x\r\ncontent-length: 0\r\n\r\n")?;
                check = false;
            }
            line.clear();
        }
        Ok(())
    })?;
    let checks = "health_checks: [{timeout: 5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, \
                  healthy_threshold: 1, http_health_check: {path: /check}}]";
    let slow = "slow_start_config: {slow_start_window: 12s, min_weight_percent: {value: 50}}";
    let cases = [
        case("rr", format!("round_robin_lb_config: {{{slow}}}\n    {checks}"), weighted(&[1, 1, 1])),
        case("least", format!("{}\n    {checks}", typed("LeastRequest", slow)), weighted(&[1, 1, 1])),
    ];
    let proxies =
        [Proxy::start(Kind::Culvert, &cases, upstream, "")?, Proxy::start(Kind::Envoy, &cases, upstream, "")?];
    let since = Instant::now();
    for proxy in &proxies {
        for case in &cases {
            ensure!(proxy.distribution(case.name, 20)?.keys().eq(&[1, 2]), "{:?} uses the third host", proxy.kind);
        }
    }
    // It is time that makes the first two as good as any: nothing tells of it.
    thread::sleep((WINDOW + Duration::from_secs(1)).saturating_sub(since.elapsed()));
    well.store(true, Ordering::SeqCst);
    for proxy in &proxies {
        wait_until(DEADLINE, "the third host", || {
            let clusters = proxy.daemon.admin("/clusters")?;
            ensure!(!clusters.contains("failed_active_hc"), "it fails");
            Ok(())
        })?;
    }
    let since = Instant::now();
    compare(&proxies[0], &proxies[1], &cases)?;
    for proxy in &proxies {
        for case in &cases {
            let counts = proxy.distribution(case.name, REQUESTS)?;
            let share = counts.get(&3).copied().unwrap_or(0.0) / REQUESTS as f64;
            // Half of the share of one of the others; later, on a busy machine, more.
            let late = since.elapsed() >= WINDOW / 2;
            ensure!((0.15..0.27).contains(&share) || late, "{:?}: {}: {share}", proxy.kind, case.name);
        }
    }
    Ok(())
}

/// `pick_first`, which is in Envoy's API only: the first host that may be used, and always that one.
#[test]
fn the_first_host_is_picked() -> Result<()> {
    let upstream = upstream()?;
    let cases = [
        case("first", typed("PickFirst", ""), weighted(&[1, 9, 1])),
        case(
            "second",
            typed("PickFirst", ""),
            vec![group("a", 1, 0, &[(1, 1, BAD), (2, 1, OK), (3, 1, OK), (4, 1, OK)])],
        ),
        case("shuffled", typed("PickFirst", "shuffle_address_list: true"), weighted(&[1, 1, 1])),
    ];
    let proxy = Proxy::start(Kind::Culvert, &cases, upstream, "")?;
    for (name, host) in [("first", Some(1)), ("second", Some(2)), ("shuffled", None)] {
        let seen: Vec<_> = proxy.distribution(name, 100)?.into_keys().collect();
        ensure!(seen.len() == 1 && host.is_none_or(|host| seen == [host]), "{name}: {seen:?}");
        ensure!(fetch(proxy.port, Request::get(&format!("/{name}")))?.status == 200, "{name}");
    }
    Ok(())
}

/// With several workers, each of which has few requests: a host that has a long one of another worker's gets no other while there are hosts
/// with nothing to do.
#[test]
fn workers_see_what_the_others_have_under_way() -> Result<()> {
    const WORKERS: usize = 4;
    const REQUESTS: usize = 400;
    // Host 1 answers nobody; the others do at once.
    let (told, asked) = mpsc::channel();
    let upstream = server(move |mut stream, number| {
        let (mut lines, mut line) = (BufReader::new(stream.try_clone()?), String::new());
        while lines.read_line(&mut line)? > 0 {
            if line == "\r\n" {
                told.send(number)?;
                if number != 1 {
                    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
                }
            }
            line.clear();
        }
        Ok(())
    })?;
    for kind in [Kind::Envoy, Kind::Culvert] {
        let port = free_port()?;
        let policy = typed("LeastRequest", "selection_method: FULL_SCAN");
        // Without a limit.
        let case = Case { route: "timeout: 0s", ..case("least", policy, weighted(&[1, 1, 1])) };
        let yaml = bootstrap(&[case], port, upstream, "");
        let daemon = Daemon::start_with(kind, &yaml, &["--concurrency", &WORKERS.to_string()])?;
        let ask = |stream: &mut TcpStream| stream.write_all(b"GET /least HTTP/1.1\r\nhost: a\r\n\r\n");
        // Requests until one has gone to host 1, which keeps it.
        let kept = loop {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            ask(&mut stream)?;
            if asked.recv_timeout(DEADLINE)? == 1 {
                break stream;
            }
            stream.set_read_timeout(Some(DEADLINE))?;
            ensure!(stream.read(&mut [0])? == 1, "{kind:?} closes");
        };
        wait_until(DEADLINE, "one request under way", || {
            let active = daemon.stats()?.get("cluster.least.upstream_rq_active");
            ensure!(active == 1, "{kind:?}: {active}");
            Ok(())
        })?;
        // Each on a connection of its own, so that all workers have some.
        for number in 0..REQUESTS {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(DEADLINE))?;
            ask(&mut stream)?;
            let mut start = [0; 12];
            stream.read_exact(&mut start).map_err(|error| anyhow::anyhow!("{kind:?}: request {number}: {error}"))?;
            assert_eq!(&start, b"HTTP/1.1 200", "{kind:?}");
            assert_ne!(asked.recv_timeout(DEADLINE)?, 1, "{kind:?}: request {number}");
        }
        drop(kept);
    }
    Ok(())
}
