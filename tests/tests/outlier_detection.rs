//! Outlier detection, of culvertd and of the real Envoy on the same bootstrap: hosts that fail in the same way are ejected for the same
//! reasons, come back, and leave the same statistics, flags and log lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::telling_hosts;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use serde_json::Value;

#[path = "outlier_detection/connections.rs"]
mod connections;

const DEADLINE: Duration = Duration::from_secs(60);
/// The hosts are `127.0.2.<number>`; nobody listens at this one.
const DEAD: u8 = 9;
/// Keys by which requests are sent to hosts: enough that each host has some.
const KEYS: usize = 60;

/// How requests to a host go: what it does is said in the request.
struct Step {
    host: u8,
    /// A status, `grpc14`, `degraded` (and a status), `reset` or `hang`; empty: it answers 200.
    fails: &'static str,
    times: usize,
    /// Which hosts are used after it; none: that is not waited for.
    then: &'static [u8],
}

fn step(host: u8, fails: &'static str, times: usize) -> Step {
    Step { host, fails, times, then: &[] }
}

/// A cluster, what is asked of it, and which hosts it uses after that.
struct Case {
    name: &'static str,
    /// Of `outlier_detection`.
    detection: &'static str,
    hosts: &'static [u8],
    steps: Vec<Step>,
    left: &'static [u8],
    /// Later, again.
    back: &'static [u8],
}

fn cases() -> Vec<Case> {
    const THREE: &[u8] = &[1, 2, 3];
    const FIVE: &[u8] = &[1, 2, 3, 4, 5];
    let case = |name, detection, steps, left| Case { name, detection, hosts: THREE, steps, left, back: left };
    vec![
        case(
            "row",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3}",
            vec![step(1, "500", 2), step(1, "", 1), step(1, "501", 3)],
            &[2, 3],
        ),
        case(
            "gateway",
            "{interval: 60s, max_ejection_percent: 50, consecutive_gateway_failure: 3, consecutive_5xx: 9, \
             enforcing_consecutive_gateway_failure: 100}",
            vec![step(2, "503", 2), step(2, "500", 1), step(2, "502", 3)],
            &[1, 3],
        ),
        case(
            "not_enforced",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3, enforcing_consecutive_5xx: 0}",
            vec![step(1, "500", 5)],
            THREE,
        ),
        case(
            "reset",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3}",
            vec![step(3, "reset", 3)],
            &[1, 2],
        ),
        case(
            "hang",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3}",
            vec![step(3, "hang", 3)],
            &[1, 2],
        ),
        case(
            "grpc",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3}",
            vec![step(2, "grpc5", 4), step(2, "grpc14", 3)],
            &[1, 3],
        ),
        Case {
            hosts: &[1, 2, DEAD],
            ..case(
                "refused",
                "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 3}",
                vec![step(DEAD, "", 3)],
                &[1, 2],
            )
        },
        Case {
            hosts: &[1, 2, DEAD],
            ..case(
                "split_refused",
                "{interval: 60s, max_ejection_percent: 50, split_external_local_origin_errors: true, \
                 consecutive_5xx: 2, consecutive_local_origin_failure: 3}",
                vec![step(DEAD, "", 3)],
                &[1, 2],
            )
        },
        case(
            "split_hang",
            "{interval: 60s, max_ejection_percent: 50, split_external_local_origin_errors: true, consecutive_5xx: 9, \
             consecutive_local_origin_failure: 1}",
            vec![step(1, "503", 5), step(2, "hang", 1)],
            &[1, 3],
        ),
        case(
            "overflow",
            "{interval: 60s, max_ejection_percent: 40, consecutive_5xx: 2}",
            vec![Step { then: &[2, 3], ..step(1, "500", 2) }, step(2, "500", 2), step(3, "500", 2)],
            &[2, 3],
        ),
        case(
            "always_one",
            "{interval: 60s, max_ejection_percent: 0, always_eject_one_host: true, consecutive_5xx: 2}",
            vec![Step { then: &[2, 3], ..step(1, "500", 2) }, step(2, "500", 2)],
            &[2, 3],
        ),
        Case {
            back: THREE,
            ..case(
                "back",
                "{interval: 0.5s, base_ejection_time: 2s, max_ejection_percent: 50, consecutive_5xx: 2}",
                vec![step(1, "500", 2)],
                &[2, 3],
            )
        },
        Case {
            back: THREE,
            ..case(
                "degraded",
                "{interval: 0.5s, base_ejection_time: 2s, max_ejection_percent: 50, consecutive_5xx: 3, \
                 detect_degraded_hosts: true}",
                // Another request might already go to another host.
                vec![step(1, "degraded", 1)],
                &[2, 3],
            )
        },
        case(
            "degraded_and_failed",
            "{interval: 60s, max_ejection_percent: 50, consecutive_5xx: 5, detect_degraded_hosts: true}",
            vec![step(1, "degraded500", 2), step(2, "degraded404", 1)],
            &[1, 3],
        ),
        case("degraded_is_nothing", "{interval: 60s, max_ejection_percent: 50}", vec![step(1, "degraded", 2)], THREE),
        Case {
            hosts: FIVE,
            left: &[1, 2, 3, 4],
            back: &[1, 2, 3, 4],
            ..case(
                "rate",
                "{interval: 1s, base_ejection_time: 60s, max_ejection_percent: 50, consecutive_5xx: 10000, \
                 success_rate_request_volume: 1, failure_percentage_minimum_hosts: 100}",
                vec![step(5, "500", 0)],
                &[],
            )
        },
        Case {
            hosts: FIVE,
            left: &[1, 2, 4, 5],
            back: &[1, 2, 4, 5],
            ..case(
                "percentage",
                "{interval: 1s, base_ejection_time: 60s, max_ejection_percent: 20, consecutive_5xx: 10000, \
                 success_rate_minimum_hosts: 100, failure_percentage_request_volume: 1, failure_percentage_threshold: 100, \
                 enforcing_failure_percentage: 100}",
                vec![step(3, "500", 0)],
                &[],
            )
        },
    ]
}

fn bootstrap(cases: &[Case], listen: u16, upstream: u16, log: &str) -> String {
    let (mut routes, mut clusters) = (String::new(), String::new());
    for Case { name, detection, hosts, steps, .. } in cases {
        let timeout = if steps.iter().any(|step| step.fails == "hang") { "0.3s" } else { "15s" };
        let _ = writeln!(
            routes,
            "              - {{match: {{path: /{name}}}, route: {{cluster: {name}, timeout: {timeout}, hash_policy: [{{header: \
             {{header_name: x-key}}}}]}}}}"
        );
        let _ = writeln!(
            clusters,
            "  - name: {name}\n    lb_policy: RING_HASH\n    outlier_detection: {detection}\n    common_lb_config: \
             {{healthy_panic_threshold: {{value: 0}}}}\n    load_assignment:\n      cluster_name: {name}\n      endpoints: \
             [{{lb_endpoints: ["
        );
        for host in *hosts {
            let _ = writeln!(
                clusters,
                "        {{endpoint: {{address: {{socket_address: {{address: 127.0.2.{host}, port_value: {upstream}}}}}}}}},"
            );
        }
        clusters.push_str("        ]}]\n");
    }
    telling_hosts(
        &format!("cluster_manager: {{outlier_detection: {{event_log_path: {log}}}}}"),
        listen,
        &routes,
        &clusters,
    )
}

/// The hosts, all on the same port: each does with a request what that says.
fn upstream() -> Result<u16> {
    let port = free_port()?;
    for number in 1..=5 {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 2, number), port))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || serve(stream, number));
            }
        });
    }
    Ok(port)
}

fn serve(stream: TcpStream, number: u8) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let (mut stream, mut line, mut fails) = (stream, String::new(), String::new());
    while lines.read_line(&mut line)? > 0 {
        if let Some(("x-fails", value)) = line.trim_end().split_once(": ")
            && let Some((host, how)) = value.split_once('=')
            && host.parse() == Ok(number)
        {
            how.clone_into(&mut fails);
        }
        if line == "\r\n" {
            let (status, further) = match fails.as_str() {
                "" => ("200", String::new()),
                "reset" => return Ok(()),
                // Until the proxy gives up.
                "hang" => {
                    let _ = lines.read(&mut [0])?;
                    return Ok(());
                }
                status => match (status.strip_prefix("grpc"), status.strip_prefix("degraded")) {
                    (Some(code), _) => ("200", format!("content-type: application/grpc\r\ngrpc-status: {code}\r\n")),
                    (_, Some(status)) => {
                        let status = if status.is_empty() { "200" } else { status };
                        (status, "x-envoy-degraded: 1\r\n".to_owned())
                    }
                    (None, None) => (status, String::new()),
                },
            };
            stream.write_all(format!("HTTP/1.1 {status} x\r\n{further}content-length: 0\r\n\r\n").as_bytes())?;
            fails.clear();
        }
        line.clear();
    }
    Ok(())
}

struct Proxy {
    kind: Kind,
    daemon: Daemon,
    port: u16,
    log: std::path::PathBuf,
}

impl Proxy {
    fn start(kind: Kind, cases: &[Case], upstream: u16) -> Result<Proxy> {
        Proxy::start_with(kind, cases, upstream, &[])
    }

    fn start_with(kind: Kind, cases: &[Case], upstream: u16, more: &[&str]) -> Result<Proxy> {
        let (port, log) = (free_port()?, scratch_dir()?.join("events"));
        let yaml = bootstrap(cases, port, upstream, &log.display().to_string());
        // Envoy writes its log every 10 s if not told otherwise.
        let flags: &[&str] = if kind == Kind::Envoy { &["--file-flush-interval-msec", "50"] } else { &[] };
        let daemon = Daemon::start_with(kind, &yaml, &[flags, more].concat())?;
        Ok(Proxy { kind, daemon, port, log })
    }

    /// The status of the answer, and the host that it came from; 0: nobody has answered.
    fn ask(&self, case: &Case, key: usize, fails: &str) -> Result<(u16, u8)> {
        let mut request = Request::get(&format!("/{}", case.name)).header("x-key", &key.to_string());
        if !fails.is_empty() {
            request = request.header("x-fails", fails);
        }
        if fails.contains("grpc") {
            request = request.header("content-type", "application/grpc");
        }
        let response = fetch(self.port, request)?;
        let address = response.headers.get("x-host").unwrap_or_default().split(':').next().unwrap_or_default();
        Ok((response.status, address.rsplit('.').next().and_then(|number| number.parse().ok()).unwrap_or(0)))
    }

    /// A key of each host.
    fn keys(&self, case: &Case) -> Result<BTreeMap<u8, usize>> {
        (0..KEYS).map(|key| Ok((self.ask(case, key, "")?.1, key))).collect()
    }

    /// Waits until requests go to these hosts and no others.
    fn settles(&self, case: &Case, hosts: &[u8], fails: &str) -> Result<()> {
        let expected: BTreeSet<u8> = hosts.iter().copied().collect();
        wait_until(DEADLINE, &format!("{:?} to use {hosts:?} of {}", self.kind, case.name), || {
            let seen: BTreeSet<u8> = (0..KEYS).map(|key| Ok(self.ask(case, key, fails)?.1)).collect::<Result<_>>()?;
            ensure!(seen == expected, "it uses {seen:?}");
            Ok(())
        })
    }

    /// The answers, in their order.
    fn run(&self, case: &Case) -> Result<Vec<(u16, u8)>> {
        // A host that cannot be reached has the keys that no other one has.
        // Where success rates are judged, requests that succeed would count.
        let wants_keys = !case.hosts.contains(&DEAD) && case.steps.iter().all(|step| step.times > 0);
        let mut keys = if wants_keys { self.keys(case)? } else { BTreeMap::new() };
        let mut seen = Vec::new();
        for Step { host, fails, times, then } in &case.steps {
            let fails = if fails.is_empty() { String::new() } else { format!("{host}={fails}") };
            if *times == 0 {
                // As long as it takes.
                self.settles(case, case.left, &fails)?;
                continue;
            }
            if *host == DEAD {
                let dead = (0..KEYS).filter(|key| matches!(self.ask(case, *key, ""), Ok((503, _)))).take(*times);
                seen.extend(dead.map(|_| (503, DEAD)));
                continue;
            }
            let key = *keys.get(host).context("no key of the host")?;
            for _ in 0..*times {
                seen.push(self.ask(case, key, &fails)?);
            }
            if !then.is_empty() {
                self.settles(case, then, "")?;
                keys = self.keys(case)?;
            }
        }
        let failed = Instant::now();
        self.settles(case, case.left, "")?;
        self.settles(case, case.back, "")?;
        // Of two seconds, of which little has passed since the last failure.
        let back_after = failed.elapsed();
        ensure!(case.back == case.left || back_after > Duration::from_secs(1), "{}: after {back_after:?}", case.name);
        Ok(seen)
    }

    fn flags(&self) -> Result<Vec<String>> {
        let text = self.daemon.admin("/clusters")?;
        let shown = ["health_flags::", "success_rate::", "::outlier::"];
        let mut lines: Vec<_> =
            text.lines().filter(|line| shown.iter().any(|part| line.contains(part))).map(str::to_owned).collect();
        lines.retain(|line| !line.starts_with("rate::") && !line.starts_with("percentage::") || line.contains("flags"));
        lines.sort();
        Ok(lines)
    }

    /// Lines of a cluster without their times.
    fn events(&self, cluster: &str) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for line in fs::read_to_string(&self.log)?.lines() {
            let mut event: Value = serde_json::from_str(line)?;
            let fields = event.as_object_mut().context("an object")?;
            // How long ago is a matter of the clock; whether anything was, and that nobody is back too soon, is not.
            let back = fields.get("action").is_some_and(|action| action == "UNEJECT");
            if let Some(seconds) = fields.get_mut("secs_since_last_action") {
                let text = seconds.to_string();
                let number: f64 = text.trim_matches('"').parse()?;
                ensure!(number <= 600.0 && (!back || number >= 2.0), "{line}");
                *seconds = text.replace(|c: char| c.is_ascii_digit(), "").into();
            }
            let time = fields.insert("timestamp".to_owned(), Value::Null).context("a time")?;
            ensure!(time.as_str().is_some_and(|time| time.len() == 24 && time.ends_with('Z')), "{time}");
            if event["cluster_name"] == cluster {
                lines.push(event.to_string());
            }
        }
        Ok(lines)
    }
}

#[test]
fn hosts_are_ejected_as_by_envoy() -> Result<()> {
    let (upstream, cases) = (upstream()?, cases());
    let culvert = Proxy::start(Kind::Culvert, &cases, upstream)?;
    let envoy = Proxy::start(Kind::Envoy, &cases, upstream)?;
    let run = |proxy: &Proxy| cases.iter().map(|case| proxy.run(case)).collect::<Result<Vec<_>>>();
    let (seen, expected) = thread::scope(|scope| {
        let other = scope.spawn(|| run(&envoy));
        (run(&culvert), other.join())
    });
    let (seen, expected) = (seen?, expected.map_err(|_| anyhow::anyhow!("panicked"))??);
    for (case, (seen, expected)) in cases.iter().zip(seen.iter().zip(&expected)) {
        assert_eq!(seen, expected, "{}", case.name);
    }
    assert_eq!(culvert.flags()?, envoy.flags()?);
    let (seen, expected) = (culvert.daemon.stats()?, envoy.daemon.stats()?);
    let names = |stats: &culvert_tests::stats::Stats| -> BTreeMap<String, u64> {
        let own = |name: &&str| name.contains(".outlier_detection.") || name.contains(".membership_");
        // The time that rates take is a matter of the clock: how often they overflow too.
        let timed =
            |name: &&str| name.contains("percentage.") && (name.contains("detected") || name.contains("overflow"));
        stats.names().filter(own).filter(|name| !timed(name)).map(|name| (name.to_owned(), stats.get(name))).collect()
    };
    let (seen, expected) = (names(&seen), names(&expected));
    let differ: Vec<_> = expected
        .iter()
        .filter(|(name, value)| seen.get(*name) != Some(value))
        .map(|(name, value)| (name, value, seen.get(name)))
        .collect();
    assert!(differ.is_empty(), "Envoy's, and culvertd's: {differ:?}");
    for case in &cases {
        let expected = wait_until(DEADLINE, "Envoy's lines", || {
            let lines = envoy.events(case.name)?;
            ensure!(!lines.is_empty() || case.name == "degraded_is_nothing", "there are none");
            Ok(lines)
        })?;
        assert_eq!(culvert.events(case.name)?, expected, "{}", case.name);
    }
    Ok(())
}
