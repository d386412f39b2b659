//! Daemons that follow one another, and the end of a daemon.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::binaries::binary_arg;
use culvert_tests::lab::Process;
use culvert_tests::load::Report;
use culvert_tests::wait_until;
use nix::sys::signal::Signal;

use super::{ADMIN, DEADLINE, Stage, VIP, both_directions, call, urls};

/// Requests of the pod, each on a connection of its own, for so many seconds.
fn begin_load(stage: &Stage, url: &str, seconds: &str) -> Result<Process> {
    let lab_load = binary_arg("lab-load")?;
    stage.pod.spawn("lab-load", &[&lab_load, url, "--new-connections", "-c", "4", "--seconds", seconds])
}

fn nothing_failed(load: Process) -> Result<Report> {
    let report: Report = serde_json::from_str(&load.wait(Duration::from_secs(60))?.success()?)?;
    assert!(report.requests > 100 && report.failed() == 0, "{report:?}");
    Ok(report)
}

/// A connection of the pod that stays open as long as this does.
fn hold(stage: &Stage) -> Result<Process> {
    let hold = format!("exec 3<>/dev/tcp/{}/8080; exec sleep 600", stage.far.ipv4());
    let held = stage.pod.spawn("hold", &["bash", "-c", &hold])?;
    wait_until(DEADLINE, "a connection to be open", || {
        ensure!(stage.stat("interception.redirected")? > 0, "not yet");
        Ok(())
    })?;
    Ok(held)
}

/// A daemon beside the one that runs, when it has taken over.
fn successor(stage: &Stage, bootstrap: &str) -> Result<Process> {
    let mut new = stage.daemon(bootstrap, &[])?;
    wait_until(DEADLINE, "the new daemon to have taken over", || {
        new.check_running()?;
        ensure!(new.stderr().contains("stay attached until"), "it has not met the old one: {}", new.stderr());
        ensure!(
            new.stderr().contains("program=\"redirect_outbound\"") && !stage.pins().join("next").exists(),
            "not yet"
        );
        Ok(())
    })?;
    Ok(new)
}

/// istio#43991, istio#51126, cilium#35425: a new daemon is started beside the old one, and then the old one is ended.
#[test]
fn an_upgrade_under_load_loses_no_new_connection() -> Result<()> {
    let stage = Stage::new("upgrade")?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.far.ipv4())?;
    let mut old = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut old)?;
    let url = format!("http://{VIP}/");
    call(&stage.pod, &url)?;
    // A port that is used again soon is counted apart.
    let redirected =
        || -> Result<u64> { Ok(stage.stat("interception.redirected")? + stage.stat("interception.reopened")?) };
    let before = (stage.account()?, redirected()?);
    // Without a daemon nobody answers at that address: a gap would be seen.
    let load = begin_load(&stage, &url, "12")?;

    let mut new = successor(&stage, &bootstrap)?;
    old.signal(Signal::SIGTERM)?;
    let ended = old.wait(DEADLINE)?;
    assert!(ended.status.success() && ended.stderr.contains("another daemon has taken over"), "{}", ended.stderr);
    // Its admin interface is the new one's.
    stage.wait_until_ready(&mut new)?;
    let report = nothing_failed(load)?;
    // Whichever daemon had them, each is counted once; a SYN that is sent again is one more.
    let after = (stage.account()?, redirected()?);
    assert_eq!(after.0.0, before.0.0, "since when the pod is enrolled");
    let (opened, redirected) = (after.0.1 - before.0.1, after.1 - before.1);
    assert!(opened >= report.requests && redirected >= report.requests, "{opened}, {redirected}: {report:?}");
    assert!(opened < 2 * report.requests && redirected < 2 * report.requests, "{opened}, {redirected}: {report:?}");
    both_directions(&stage)?;
    new.signal(Signal::SIGTERM)?;
    new.wait(DEADLINE)?;
    assert!(!stage.pins().exists(), "the last one removes everything");
    Ok(())
}

/// A new daemon takes over, and is ended: the old one, which still runs, serves again.
#[test]
fn an_upgrade_that_is_taken_back_loses_no_new_connection() -> Result<()> {
    let stage = Stage::new("rollback")?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.far.ipv4())?;
    let mut old = stage.daemon(&bootstrap, &[])?;
    stage.wait_until_ready(&mut old)?;
    let url = format!("http://{VIP}/");
    call(&stage.pod, &url)?;
    // Without a daemon nobody answers at that address: a gap would be seen.
    let load = begin_load(&stage, &url, "12")?;
    let new = successor(&stage, &bootstrap)?;
    new.signal(Signal::SIGTERM)?;
    let ended = new.wait(DEADLINE)?;
    assert!(ended.status.success() && ended.stderr.contains("another daemon has taken over"), "{}", ended.stderr);
    assert!(old.stderr().contains("takes over again"), "{}", old.stderr());
    nothing_failed(load)?;
    old.check_running()?;
    both_directions(&stage)?;
    old.signal(Signal::SIGTERM)?;
    old.wait(DEADLINE)?;
    assert!(!stage.pins().exists(), "the last one removes everything");
    Ok(())
}

/// What is open may take its time; new connections of a pod that fails closed are not refused meanwhile.
#[test]
fn a_daemon_that_drains_refuses_nothing() -> Result<()> {
    let stage = Stage::new("drains")?;
    let enrolled = format!("{}    failure_policy: FAIL_CLOSED\n", stage.by_address());
    let bootstrap = stage.bootstrap(&enrolled, stage.far.ipv4())?;
    let mut daemon = stage.daemon_that_drains(&bootstrap, &[], "300")?;
    stage.wait_until_ready(&mut daemon)?;
    let held = hold(&stage)?;
    let [url, _] = urls(&stage.far);
    let load = begin_load(&stage, &url, "6")?;
    let before = stage.stat("interception.redirected")?;
    wait_until(DEADLINE, "load", || {
        ensure!(stage.stat("interception.redirected")? > before + 50, "not yet");
        Ok(())
    })?;
    daemon.signal(Signal::SIGTERM)?;
    wait_until(DEADLINE, "new connections to pass", || {
        daemon.check_running()?;
        ensure!(daemon.stderr().contains("draining; a second signal ends it"), "{}", daemon.stderr());
        Ok(())
    })?;
    for url in urls(&stage.far) {
        call(&stage.pod, &url)?;
    }
    nothing_failed(load)?;
    daemon.check_running().context("all this was while it drained")?;
    drop(held);
    daemon.wait(DEADLINE)?;
    assert!(!stage.pins().exists());
    Ok(())
}

/// The one before drains as long as it takes; who asks whether the node is ready, means the one that serves.
#[test]
fn the_admin_interface_is_not_a_draining_daemons() -> Result<()> {
    let stage = Stage::new("admin")?;
    let bootstrap = stage.bootstrap(&stage.by_address(), stage.far.ipv4())?;
    let mut old = stage.daemon_that_drains(&bootstrap, &[], "300")?;
    stage.wait_until_ready(&mut old)?;
    let held = hold(&stage)?;
    let mut new = successor(&stage, &bootstrap)?;
    // A client that stays connected has no claim to the address.
    let kept = stage.node.inside(|| Ok(std::net::TcpStream::connect(ADMIN)?))?;
    old.signal(Signal::SIGTERM)?;
    wait_until(DEADLINE, "the old daemon to leave the admin interface", || {
        old.check_running()?;
        ensure!(old.stderr().contains("the admin interface is left to it"), "{}", old.stderr());
        Ok(())
    })?;
    stage.wait_until_ready(&mut new)?;
    assert!(new.stderr().contains("admin interface listens"), "{}", new.stderr());
    // Commands are for it, too.
    let own = stage.pod.ipv4().to_string();
    stage.culvert(&["enroll", &own, "--name", "web"])?;
    let status = stage.culvert(&["status", "--node"])?;
    assert!(status.contains("web") && status.contains("command"), "{status}");
    stage.culvert(&["unenroll", "web"])?;
    both_directions(&stage)?;
    old.check_running().context("all this was while it drained")?;
    drop((kept, held));
    let ended = old.wait(DEADLINE)?;
    assert!(ended.status.success(), "{}", ended.stderr);
    new.signal(Signal::SIGTERM)?;
    new.wait(DEADLINE)?;
    assert!(!stage.pins().exists());
    Ok(())
}
