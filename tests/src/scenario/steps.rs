//! The steps of the demo.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{ECHO_PORT, FRONT_VIP, Scenario, USERS_VIP, USERS_VIP_V6, tools};
use crate::binaries::binary_arg;
use crate::lab::{Pod, Process};
use crate::load::{Report, unix_ms};
use crate::wait_until;

/// How long a changed endpoint may take to show everywhere.
const CONVERGENCE: Duration = Duration::from_secs(5);

/// How long the daemons may take to find discovery again: their pauses between attempts grow, as Envoy's do.
const RECONNECT: Duration = Duration::from_secs(30);

/// How long the load of steps 6 and 7 runs.
const LOAD: Duration = Duration::from_secs(6);

/// At least this share of the same-node bytes must take the short cut.
const SHORTCUT_SHARE_MIN: f64 = 0.5;

/// One step.
pub struct Step {
    /// What it shows.
    pub title: &'static str,
    run: fn(&mut Scenario, &mut Log) -> Result<()>,
}

/// What a step did and whether all it expects holds.
#[derive(Debug, Default)]
pub struct Log {
    /// What was sent and what came back, in order.
    pub lines: Vec<String>,
    /// What does not hold.
    pub failures: Vec<String>,
}

/// All steps, in order. Each leaves the mesh as it found it.
pub const STEPS: &[Step] = &[
    Step { title: "calls to a VIP spread over both clusters, and the server sees the client's address", run: spread },
    Step { title: "the offloaded pod gets none of 200 plain requests", run: offloaded_stays_out },
    Step {
        title: "with the header, and only then, the hop front -> users reaches the offloaded pod",
        run: override_hop,
    },
    Step { title: "what can be named is listed, and a share's token stands for a set of overrides", run: tools::share },
    Step { title: "a phone reaches the offloaded pod through a proxy that adds the header", run: tools::phone },
    Step { title: "a program on a laptop answers for a revision, through a tunnel", run: tools::laptop },
    Step { title: "a forged target is refused and counted", run: forged_target },
    Step { title: "TCP passes through untouched", run: plain_tcp },
    Step { title: "an endpoint is removed under load: no failed request", run: endpoint_removed },
    Step { title: "discovery is killed and restarted under load: no failed request", run: discovery_killed },
    Step { title: "bytes between sockets of one node take the kernel short cut", run: shortcut_share },
];

impl Step {
    /// Runs the step. What goes wrong on the way counts as a failure of the step.
    pub fn run(&self, scenario: &mut Scenario) -> Log {
        let mut log = Log::default();
        if let Err(error) = (self.run)(scenario, &mut log) {
            log.failures.push(format!("{error:#}"));
        }
        log
    }
}

impl Log {
    /// Fails with everything that does not hold.
    pub fn check(&self) -> Result<()> {
        ensure!(self.failures.is_empty(), "{}\n{}", self.failures.join("\n"), self.lines.join("\n"));
        Ok(())
    }

    pub(super) fn sent(&mut self, what: impl AsRef<str>) {
        self.lines.push(format!("> {}", what.as_ref()));
    }

    pub(super) fn got(&mut self, what: impl AsRef<str>) {
        self.lines.push(format!("< {}", what.as_ref()));
    }

    pub(super) fn expect(&mut self, holds: bool, what: impl Into<String>) {
        if !holds {
            self.failures.push(format!("does not hold: {}", what.into()));
        }
    }
}

fn spread(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let Scenario { client, users_a, users_b, .. } = &*scenario;
    let report = requests(client, log, "http://users/", 100, &[])?;
    log.expect(report.failed() == 0, "no request fails");
    let (a, b) = (report.answers(users_a.name()), report.answers(users_b.name()));
    log.expect(a >= 20 && b >= 20, format!("each cluster answers a good part (users-a {a}, users-b {b})"));

    for (url, own) in [
        ("http://users/".to_owned(), client.ipv4().to_string()),
        (format!("http://[{USERS_VIP_V6}]/"), client.ipv6().to_string()),
    ] {
        let answer = get(client, log, &url, &[])?;
        log.expect(answer["peer"] == own.as_str(), format!("the server of {url} sees the client pod's own {own}"));
    }
    Ok(())
}

fn offloaded_stays_out(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let Scenario { client, users_fx, .. } = &*scenario;
    let report = requests(client, log, "http://users/", 200, &[])?;
    log.expect(report.ok == 200, "all 200 requests succeed");
    log.expect(report.answers(users_fx.name()) == 0, "users-fx gets none");
    Ok(())
}

fn override_hop(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let Scenario { client, users_fx, .. } = &*scenario;
    let fx = users_fx.name();
    for format in OVERRIDE_FORMATS {
        let headers = override_header(log, "users=feature-x", format)?;
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let answer = get(client, log, "http://front/", &headers)?;
        log.expect(answer["pod"] == "front", "the first hop is the usual front");
        log.expect(answer["upstream"]["pod"] == fx, format!("front's call reaches {fx} ({format})"));
        log.expect(answer["upstream"]["revision"] == "feature-x", "it is of revision feature-x");
        let plain = get(client, log, "http://front/", &[])?;
        log.expect(plain["upstream"]["pod"] != fx, "the next request, without the header, does not");
    }
    let headers = override_header(log, "users=feature-x", OVERRIDE_FORMATS[0])?;
    let report = requests(client, log, "http://front/", 50, &headers)?;
    log.expect(report.answers(fx) == 50, format!("all of 50 requests with the header reach {fx}"));
    Ok(())
}

fn forged_target(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let before = scenario.counter(".override.rejected")?;
    let removed_before = scenario.counter(".override.header_removed")?;
    let Scenario { client, users_fx, echo, .. } = &*scenario;
    let ordinary = ["users-a", "users-b"];

    let headers = override_header(log, "users=no-such-revision", OVERRIDE_FORMATS[0])?;
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    let answer = get(client, log, "http://users/", &headers)?;
    let pod = answer["pod"].as_str().unwrap_or_default();
    log.expect(ordinary.contains(&pod), "a revision that nobody offloaded changes nothing");

    for target in [format!("{}:8080", users_fx.ipv4()), format!("{}:{ECHO_PORT}", echo.ipv4())] {
        let answer = get(client, log, "http://users/", &[&format!("x-envoy-original-dst-host: {target}")])?;
        let pod = answer["pod"].as_str().unwrap_or_default();
        log.expect(ordinary.contains(&pod), format!("x-envoy-original-dst-host: {target} changes nothing"));
        let reached = answer["headers"].get("x-envoy-original-dst-host").is_some();
        log.expect(!reached, "x-envoy-original-dst-host does not reach the service");
    }
    let (after, removed) = (scenario.counter(".override.rejected")?, scenario.counter(".override.header_removed")?);
    log.got(format!("override.rejected {before} -> {after}, override.header_removed {removed_before} -> {removed}"));
    log.expect(after == before + 1, "the refused override is counted once");
    log.expect(removed == removed_before + 2, "each removed header is counted");
    Ok(())
}

fn plain_tcp(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let Scenario { client, echo, .. } = &*scenario;
    let payload = "EHLO \u{1}\u{2}binary\u{7f} \r\n\r\nGET / HTTP/1.1\r\n";
    let input = scenario.lab.dir().join("tcp-payload");
    // Enough to fill every buffer on the way more than once.
    let bytes: Vec<u8> = payload.bytes().cycle().take(4 << 20).collect();
    std::fs::write(&input, &bytes).with_context(|| format!("writing {}", input.display()))?;
    let output = scenario.lab.dir().join("tcp-echoed");
    let shell = format!("socat -t 10 - TCP:echo:{ECHO_PORT} < {} > {}", input.display(), output.display());
    log.sent(format!("{}: {} bytes of anything to echo:{ECHO_PORT}", client.name(), bytes.len()));
    client.run(&["sh", "-c", &shell])?.success()?;
    let echoed = std::fs::read(&output).with_context(|| format!("reading {}", output.display()))?;
    let same = if echoed == bytes { "the same bytes" } else { "different bytes" };
    log.got(format!("{} bytes back: {same}", echoed.len()));
    log.expect(echoed == bytes, "what comes back is what was sent");

    log.sent(format!("{}: the same to the pod's own {}:{ECHO_PORT}", client.name(), echo.ipv4()));
    let shell = format!("printf direct | socat -t 5 - TCP:{}:{ECHO_PORT}", echo.ipv4());
    let direct = client.run(&["sh", "-c", &shell])?.success()?;
    log.got(format!("`{direct}`"));
    log.expect(direct == "direct", "a connection to an address that is no service passes through too");
    Ok(())
}

fn endpoint_removed(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let load = start_load(&scenario.client, log, "http://users/", LOAD)?;
    // Both sides of the change must carry load; these two times are parts of the load's, not waits for anything.
    thread::sleep(LOAD / 3);
    log.sent("cluster b: users-b removed from the EndpointSlice of users");
    scenario.set_users_b(&[])?;
    let removed_ms = unix_ms();
    let report = finish_load(load, log)?;
    log.expect(report.failed() == 0, format!("no request fails ({:?} {:?})", report.failures, report.examples));
    let users_b = report.pods.get("users-b").cloned().unwrap_or_default();
    log.expect(users_b.count > 0, "users-b answered before");
    let late_ms = users_b.last_sent_ms.saturating_sub(removed_ms);
    log.got(format!("users-b's last request was sent {late_ms} ms after the file changed"));
    log.expect(late_ms < 2_000, "users-b gets nothing more than 2 s after the change");
    log.expect(report.answers("users-a") > 0, "users-a answers all along");

    scenario.set_users_b(&[&scenario.users_b])?;
    wait_for_answer(&scenario.client, "users-b", true, CONVERGENCE)?;
    log.sent("cluster b: users-b added again");
    log.got("users-b answers again");
    Ok(())
}

fn discovery_killed(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let load = start_load(&scenario.client, log, "http://front/", LOAD)?;
    // As above: a part of the load's time.
    thread::sleep(LOAD / 6);
    log.sent("kill -9 culvert-discovery");
    scenario.kill_discovery()?;
    thread::sleep(LOAD / 3);
    scenario.restart_discovery()?;
    log.sent("culvert-discovery started again");
    let report = finish_load(load, log)?;
    log.expect(report.failed() == 0, format!("no request fails ({:?} {:?})", report.failures, report.examples));

    let restarted = Instant::now();
    scenario.set_users_b(&[])?;
    wait_for_answer(&scenario.client, "users-b", false, RECONNECT).context("after the restart")?;
    log.got(format!("a change made after the restart shows {:.1} s later", restarted.elapsed().as_secs_f32()));
    scenario.set_users_b(&[&scenario.users_b])?;
    wait_for_answer(&scenario.client, "users-b", true, CONVERGENCE).context("after the restart")?;
    Ok(())
}

fn shortcut_share(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let node = scenario.nodes[0].clone();
    let before = scenario.stats(&node)?;
    let report = requests(&scenario.client, log, "http://front/?bytes=65536", 200, &[])?;
    log.expect(report.failed() == 0, "no request fails");
    let after = scenario.stats(&node)?;
    let grown = |name: &str| after.get(name).saturating_sub(before.get(name));
    let (shortcut, tcp) = (grown("interception.shortcut.bytes"), grown("interception.shortcut.tcp_bytes"));
    #[expect(clippy::cast_precision_loss, reason = "a share in per cent needs no more than 52 bits")]
    let share = shortcut as f64 / (shortcut + tcp).max(1) as f64;
    log.got(format!("{}: {shortcut} bytes by the short cut, {tcp} by TCP: {:.1} %", node.name(), share * 100.0));
    log.expect(share >= SHORTCUT_SHARE_MIN, format!("at least {:.0} % take it", SHORTCUT_SHARE_MIN * 100.0));
    Ok(())
}

/// The headers in which an override can travel, as `culvert override header --format` names them.
const OVERRIDE_FORMATS: [&str; 2] = ["x-ot-span-context", "baggage"];

/// The lines `name: value` that `culvert override header` makes.
fn override_header(log: &mut Log, set: &str, format: &str) -> Result<Vec<String>> {
    header_of(log, &["--set", set, "--format", format])
}

/// The same for any flags.
pub(super) fn header_of(log: &mut Log, flags: &[&str]) -> Result<Vec<String>> {
    let culvert = binary_arg("culvert")?;
    let arguments = [&["override", "header"], flags, &["--output", "text"]].concat();
    log.sent(format!("culvert {}", arguments.join(" ")));
    let output =
        std::process::Command::new(&culvert).args(&arguments).output().with_context(|| format!("running {culvert}"))?;
    ensure!(output.status.success(), "culvert override header: {}", String::from_utf8_lossy(&output.stderr).trim());
    let headers: Vec<String> = String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect();
    headers.iter().for_each(|header| log.got(header));
    Ok(headers)
}

/// One request by curl; the answer of the lab's service.
pub(super) fn get(pod: &Pod, log: &mut Log, url: &str, headers: &[&str]) -> Result<Value> {
    let mut command = vec!["curl", "-sS", "--fail-with-body", "-m", "10", url];
    for header in headers {
        command.extend(["-H", header]);
    }
    log.sent(format!(
        "{}: {}",
        pod.name(),
        command[..1].iter().chain(&command[5..]).copied().collect::<Vec<_>>().join(" ")
    ));
    let finished = pod.run(&command)?;
    let text = finished.stdout.clone();
    finished.success().with_context(|| format!("GET {url}: {text}"))?;
    let answer: Value = serde_json::from_str(&text).with_context(|| format!("GET {url}: not JSON: {text}"))?;
    log.got(summary(&answer));
    Ok(answer)
}

/// `front (from 10.0.0.1) -> users-a (from 10.0.0.2)`.
pub(super) fn summary(answer: &Value) -> String {
    let text = |name: &str| answer[name].as_str().unwrap_or("?").to_owned();
    let own = format!("{} {} (called from {})", text("pod"), text("revision"), text("peer"));
    if answer["upstream"].is_null() { own } else { format!("{own} -> {}", summary(&answer["upstream"])) }
}

/// Sends a number of requests over four connections from a pod.
fn requests(pod: &Pod, log: &mut Log, url: &str, count: u64, headers: &[String]) -> Result<Report> {
    let lab_load = binary_arg("lab-load")?;
    let count = count.to_string();
    let mut command = vec![lab_load.as_str(), url, "-n", &count, "-c", "4"];
    for header in headers {
        command.extend(["-H", header]);
    }
    let with = if headers.is_empty() { "" } else { " with the header" };
    log.sent(format!("{}: {count} requests to {url}{with}", pod.name()));
    let report: Report = serde_json::from_str(&pod.run(&command)?.success()?)?;
    log.got(describe(&report));
    Ok(report)
}

fn start_load(pod: &Pod, log: &mut Log, url: &str, duration: Duration) -> Result<Process> {
    log.sent(format!("{}: load on {url} over 8 connections for {} s", pod.name(), duration.as_secs()));
    let seconds = duration.as_secs_f64().to_string();
    pod.spawn("lab-load", &[&binary_arg("lab-load")?, url, "-c", "8", "-s", &seconds])
}

fn finish_load(load: Process, log: &mut Log) -> Result<Report> {
    let report: Report = serde_json::from_str(&load.wait(LOAD + Duration::from_secs(20))?.success()?)?;
    log.got(describe(&report));
    Ok(report)
}

fn describe(report: &Report) -> String {
    let pods: Vec<String> = report.pods.iter().map(|(pod, answers)| format!("{pod} {}", answers.count)).collect();
    let counts = format!("{} requests, {} failed", report.requests, report.failed());
    if pods.is_empty() { counts } else { format!("{counts}; answers: {}", pods.join(", ")) }
}

/// Waits until `pod` answers, or no longer answers, calls of `users`.
fn wait_for_answer(client: &Pod, pod: &str, answers: bool, deadline: Duration) -> Result<()> {
    let lab_load = binary_arg("lab-load")?;
    wait_until(deadline, &format!("{pod} to {}", if answers { "answer" } else { "be left out" }), || {
        let output = client.run(&[&lab_load, "http://users/", "-n", "40", "-c", "4"])?.success()?;
        let report: Report = serde_json::from_str(&output)?;
        ensure!((report.answers(pod) > 0) == answers, "{}", describe(&report));
        Ok(())
    })
}

/// The virtual addresses, for people.
pub fn addresses() -> String {
    format!("front {FRONT_VIP}, users {USERS_VIP} and [{USERS_VIP_V6}]")
}
