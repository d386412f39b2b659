//! What pods can do while their node's daemon is dead, after it ended, and once it is back.

use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::lab::Pod;
use culvert_tests::scenario::{FailurePolicy, Scenario};
use culvert_tests::wait_until;

/// A call from `pod` to `to`'s own address, past every virtual one.
fn direct(pod: &Pod, to: &Pod, ipv6: bool) -> Result<String> {
    let url = if ipv6 { format!("http://[{}]:8080/", to.ipv6()) } else { format!("http://{}:8080/", to.ipv4()) };
    pod.run(&["curl", "-sS", "-m", "1", &url])?.success()
}

fn through_the_mesh(pod: &Pod) -> Result<String> {
    pod.run(&["curl", "-sS", "--fail-with-body", "-m", "2", "http://users/"])?.success()
}

#[test]
fn a_fail_open_pod_connects_as_if_it_were_not_enrolled() -> Result<()> {
    let mut scenario = Scenario::start("fail-open", FailurePolicy::Open, |_| ())?;
    scenario.kill_daemon(0)?;
    for ipv6 in [false, true] {
        let answer = direct(&scenario.client, &scenario.users_b, ipv6)?;
        let own = if ipv6 { scenario.client.ipv6().to_string() } else { scenario.client.ipv4().to_string() };
        assert!(answer.contains(&format!("\"peer\":\"{own}\"")), "{answer}");
    }
    assert!(through_the_mesh(&scenario.client).is_err(), "a virtual address leads nowhere without the daemon");

    scenario.restart_daemon(0, FailurePolicy::Open)?;
    through_the_mesh(&scenario.client)?;
    let redirected = scenario.stats(&scenario.nodes[0])?.get("interception.redirected");
    assert!(redirected > 0, "the new daemon's programs are in force");
    Ok(())
}

#[test]
fn a_fail_closed_pod_connects_nowhere() -> Result<()> {
    let mut scenario = Scenario::start("fail-closed", FailurePolicy::Closed, |_| ())?;
    direct(&scenario.client, &scenario.users_b, false)?;
    scenario.kill_daemon(0)?;
    for ipv6 in [false, true] {
        assert!(direct(&scenario.client, &scenario.users_b, ipv6).is_err(), "ipv6 {ipv6}");
    }
    assert!(through_the_mesh(&scenario.client).is_err());
    // Pods are still reached: the policy is about what they send. Node b's daemon is alive.
    direct(&scenario.users_b, &scenario.users_a, false)?;

    scenario.restart_daemon(0, FailurePolicy::Closed)?;
    direct(&scenario.client, &scenario.users_b, false)?;
    through_the_mesh(&scenario.client)?;
    Ok(())
}

#[test]
fn a_daemon_that_is_told_to_end_removes_what_it_made() -> Result<()> {
    let mut scenario = Scenario::start("clean-end", FailurePolicy::Open, |_| ())?;
    let node = scenario.nodes[0].clone();
    let rules = |node: &culvert_tests::lab::Node| -> Result<String> {
        let v4 = node.run(&["ip", "-4", "rule"])?.success()?;
        let v6 = node.run(&["ip", "-6", "rule"])?.success()?;
        let routes = node.run(&["ip", "route", "show", "table", "3095"])?;
        Ok(format!("{v4}{v6}{}", routes.stdout))
    };
    assert!(rules(&node)?.contains("3095"), "the daemon routes marked packets: {}", rules(&node)?);
    // Keep-alive connections of front's lab-http may be open; drain waits for them only as long as it is told to.
    scenario.stop_daemon(0, Duration::from_secs(20))?;
    wait_until(Duration::from_secs(5), "the rules to be gone", || {
        let left = rules(&node)?;
        ensure!(!left.contains("3095") && !left.contains("local default"), "{left}");
        Ok(())
    })?;
    assert!(!node.bpf_dir().join("culvert").exists(), "pins are left");
    direct(&scenario.client, &scenario.users_b, false)?;
    Ok(())
}
