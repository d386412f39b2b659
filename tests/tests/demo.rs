//! The demo's scenario, step by step, as a test; and what an operator does to its manifests.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::scenario::{FailurePolicy, STEPS, Scenario};
use culvert_tests::wait_until;

#[test]
fn the_main_job() -> Result<()> {
    let mut scenario = Scenario::start("test-demo", FailurePolicy::Open, |_| ())?;
    let mut failures = Vec::new();
    for step in STEPS {
        if let Err(error) = step.run(&mut scenario).check() {
            failures.push(format!("{}:\n{error:#}", step.title));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));

    // A bad manifest leaves its last good version in force, and discovery says so.
    let bad = scenario.cluster_dir("b").join("users-endpoints.yaml");
    let good = fs::read_to_string(&bad)?;
    let address = scenario.users_b.ipv4().to_string();
    fs::write(&bad, good.replace(&address, "10.244.2.300"))?;
    let status = wait_until(Duration::from_secs(5), "discovery to report the bad manifest", || {
        let status = scenario.discovery_status()?;
        ensure!(status.contains("10.244.2.300") && status.contains("users-endpoints.yaml"), "{status}");
        Ok(status)
    })?;
    assert!(status.contains("users-1"), "the object is named: {status}");
    let users = |pod: &str| -> Result<bool> {
        let lab_load = culvert_tests::binaries::binary_arg("lab-load")?;
        let output = scenario.client.run(&[&lab_load, "http://users/", "-n", "20", "-c", "1"])?.success()?;
        let report: culvert_tests::load::Report = serde_json::from_str(&output)?;
        ensure!(report.failed() == 0, "{report:?}");
        Ok(report.answers(pod) > 0)
    };
    assert!(users("users-b")?, "the last good version stays in force");

    // And the mended one counts.
    fs::write(&bad, &good)?;
    wait_until(Duration::from_secs(5), "the report to go", || {
        let status = scenario.discovery_status()?;
        ensure!(!status.contains("10.244.2.300"), "{status}");
        Ok(())
    })
}
