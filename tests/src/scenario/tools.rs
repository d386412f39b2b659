//! The steps of the demo in which a developer uses what goes with overrides.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::Scenario;
use super::steps::{Log, get, header_of, summary};
use crate::binaries::binary_arg;
use crate::wait_until;

/// How long a change may take to be known everywhere, and a program to say that it is there.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where the proxy listens.
const PROXY_PORT: u16 = 8888;
/// Where the laptop's program listens: a port that nobody but the laptop can reach.
const LAPTOP: &str = "127.0.0.1:9090";

/// Runs `culvert` on the control node, as somebody would on a laptop that reaches discovery.
fn culvert(scenario: &Scenario, log: &mut Log, arguments: &[&str]) -> Result<String> {
    log.sent(format!("culvert {}", arguments.join(" ")));
    let (program, url, token) = (binary_arg("culvert")?, scenario.discovery_url(), scenario.token_file());
    let mut command = vec![program.as_str()];
    command.extend(arguments);
    command.extend(["--discovery", &url]);
    if arguments.contains(&"share") {
        command.extend(["--token-file", &token]);
    }
    scenario.control.run(&command)?.success()
}

/// Waits until the call of `front` to `users` is answered by a revision.
fn until_revision(scenario: &Scenario, log: &mut Log, headers: &[String], revision: &str) -> Result<()> {
    let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
    let mut seen = Log::default();
    wait_until(PATIENCE, &format!("revision {revision} of users to answer front"), || {
        seen = Log::default();
        let answer = get(&scenario.client, &mut seen, "http://front/", &headers)?;
        ensure!(answer["upstream"]["revision"] == revision, "{}", summary(&answer));
        Ok(())
    })?;
    log.lines.extend(seen.lines);
    Ok(())
}

pub(super) fn share(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let listed = culvert(scenario, log, &["override", "list"])?;
    listed.lines().for_each(|line| log.got(line));
    let (pod, revision) = (format!("default/{}", scenario.users_fx.name()), "feature-x");
    log.expect(listed.contains(&pod) && listed.contains(revision), "the offloaded pod is listed");

    let flags = ["override", "share", "create", "demo", "--set", "users=feature-x", "--expires", "10m"];
    let made = culvert(scenario, log, &[&flags[..], &["--output", "json"]].concat())?;
    let made: Value = serde_json::from_str(&made)?;
    let token = made["token"].as_str().context("no token")?.to_owned();
    log.got(format!("token {token}"));
    let headers = header_of(log, &["--share", &token, "--format", "baggage"])?;
    until_revision(scenario, log, &headers, revision)?;

    culvert(scenario, log, &["override", "share", "delete", "demo"])?;
    until_revision(scenario, log, &headers, "main")?;
    let refused = scenario.counter(".override.refused.share_unknown")?;
    log.got(format!("override.refused.share_unknown {refused}"));
    log.expect(refused > 0, "a token that stands for nothing any more is counted");
    Ok(())
}

/// The proxy runs beside a client in the mesh; the phone is outside of it and knows nothing but the proxy's address.
pub(super) fn phone(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let (program, client) = (binary_arg("culvert")?, &scenario.client);
    let listen = format!("0.0.0.0:{PROXY_PORT}");
    let flags = ["override", "proxy", "--set", "users=feature-x", "--listen", &listen];
    log.sent(format!("{}: culvert {}", client.name(), flags.join(" ")));
    let mut proxy = client.spawn("proxy", &[&[program.as_str()], &flags[..]].concat())?;
    wait_until(PATIENCE, "the proxy to listen", || {
        proxy.check_running()?;
        ensure!(proxy.stderr().contains("listening on"), "{}", proxy.stderr());
        Ok(())
    })?;
    let through = format!("http://{}:{PROXY_PORT}", client.ipv4());
    log.sent(format!("phone: curl -x {through} http://front/"));
    let answer = scenario.control.run(&["curl", "-sS", "-m", "10", "-x", &through, "http://front/"])?.success()?;
    let answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
    log.got(summary(&answer));
    log.expect(answer["upstream"]["revision"] == "feature-x", "front's call reaches the offloaded pod");
    wait_until(PATIENCE, "the proxy's log", || {
        let said = proxy.stderr();
        let line = said.lines().find(|line| line.contains("http://front/") && line.contains(" 200 "));
        log.got(line.with_context(|| said.clone())?);
        Ok(())
    })
}

pub(super) fn laptop(scenario: &mut Scenario, log: &mut Log) -> Result<()> {
    let (lab_http, program) = (binary_arg("lab-http")?, binary_arg("culvert")?);
    let control = &scenario.control;
    let _app = control.spawn("laptop", &[&lab_http, "--listen", LAPTOP, "--pod", "laptop", "--revision", "laptop"])?;
    let (target, url, token) = (format!("users={LAPTOP}"), scenario.discovery_url(), scenario.token_file());
    let flags = ["override", "connect", &target, "--revision", "me"];
    log.sent(format!("laptop: culvert {}", flags.join(" ")));
    let access = ["--discovery", &url, "--token-file", &token];
    let mut tunnel = control.spawn("connect", &[&[program.as_str()], &flags[..], &access].concat())?;
    let line = wait_until(PATIENCE, "the tunnel to be open", || {
        tunnel.check_running()?;
        let said = tunnel.stderr();
        said.lines().find(|line| line.contains("open: ")).map(str::to_owned).context(said.clone())
    })?;
    log.got(line);
    let headers = header_of(log, &["--set", "users=me"])?;
    until_revision(scenario, log, &headers, "laptop")?;
    log.sent("laptop: closed");
    tunnel.signal(Signal::SIGKILL)?;
    until_revision(scenario, log, &headers, "main")?;
    Ok(())
}
