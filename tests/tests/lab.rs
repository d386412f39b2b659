//! The lab itself, without Culvert: pods reach each other, see each other's own addresses, and all goes away.

use std::fs;

use anyhow::Result;
use culvert_tests::binaries::binary_arg;
use culvert_tests::lab::Lab;
use culvert_tests::load::Report;
use culvert_tests::wait_until;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn pods_reach_each_other_across_nodes_and_see_each_others_addresses() -> Result<()> {
    let lab = Lab::new("reach")?;
    let (node_a, node_b) = (lab.node("node-a")?, lab.node("node-b")?);
    let (client, near, far) = (node_a.pod("client")?, node_a.pod("near")?, node_b.pod("far")?);
    lab.add_host(&far.ipv4().to_string(), &["far"])?;
    let lab_http = binary_arg("lab-http")?;
    let _near = near.spawn("lab-http", &[&lab_http, "--pod", "near", "--upstream", "http://far"])?;
    let _far = far.spawn("lab-http", &[&lab_http, "--pod", "far"])?;

    for url in [format!("http://{}/", near.ipv4()), format!("http://[{}]/", near.ipv6())] {
        let answer = wait_until(DEADLINE, &url, || client.run(&["curl", "-sS", "-m", "2", &url])?.success())?;
        let answer: serde_json::Value = serde_json::from_str(&answer)?;
        let own = if url.contains('[') { client.ipv6().to_string() } else { client.ipv4().to_string() };
        assert_eq!(answer["peer"], own.as_str(), "{answer}");
        assert_eq!(answer["upstream"]["pod"], "far", "{answer}");
        assert_eq!(answer["upstream"]["peer"], near.ipv4().to_string().as_str(), "{answer}");
    }
    let url = format!("http://[{}]/", far.ipv6());
    let load = client.run(&[&binary_arg("lab-load")?, &url, "-n", "200", "-c", "4"])?.success()?;
    let report: Report = serde_json::from_str(&load)?;
    assert_eq!((report.requests, report.ok, report.answers("far")), (200, 200, 200));
    Ok(())
}

#[test]
fn the_load_generator_reports_what_fails() -> Result<()> {
    let lab = Lab::new("failures")?;
    let node = lab.node("node-a")?;
    let pod = node.pod("pod")?;
    let load = |url: &str| -> Result<Report> {
        let output = pod.run(&[&binary_arg("lab-load")?, url, "-n", "3", "-c", "1", "--timeout", "1"])?.success()?;
        Ok(serde_json::from_str(&output)?)
    };
    assert_eq!(load("http://127.0.0.1:1/")?.failures["connect"], 3);

    let _server = pod.spawn("lab-http", &[&binary_arg("lab-http")?, "--pod", "pod"])?;
    wait_until(DEADLINE, "the server", || pod.run(&["curl", "-sS", "http://127.0.0.1/"])?.success())?;
    assert_eq!(load("http://127.0.0.1/?status=503")?.failures["status_503"], 3);
    assert_eq!(load("http://127.0.0.1/?delay_ms=1500")?.failures["timeout"], 3);
    Ok(())
}

#[test]
fn a_lab_leaves_nothing_behind_even_after_a_panic() -> Result<()> {
    let namespaces = || -> Vec<String> {
        let entries = fs::read_dir("/run/netns").expect("a lab existed, so the directory does");
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with("culvert.doomed.")).collect()
    };
    let panicked = std::thread::spawn(|| {
        let lab = Lab::new("doomed").expect("this test runs as root");
        let node = lab.node("node-a").expect("a node");
        let pod = node.pod("pod").expect("a pod");
        let process = pod.spawn("sleep", &["sleep", "1000"]).expect("sleep starts");
        assert!(node.cgroup().join("pod").exists());
        let pid = process.id();
        // As if the test had been killed: nobody but the lab can end it now.
        std::mem::forget(process);
        let cgroup = node.cgroup().to_owned();
        let bpf = node.bpf_dir().to_owned();
        std::panic::panic_any((pid, cgroup, bpf));
    });
    let payload = panicked.join().expect_err("the thread panics");
    let (pid, cgroup, bpf) = *payload.downcast::<(u32, std::path::PathBuf, std::path::PathBuf)>().expect("its payload");
    assert_eq!(namespaces(), Vec::<String>::new());
    assert!(!cgroup.exists() && !bpf.exists());
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // It stays a zombie until this process, its parent, ends.
    assert!(state.is_empty() || state.contains(") Z "), "sleep still runs: {state}");
    Ok(())
}

#[test]
fn names_that_could_clash_are_refused() {
    for name in ["", "UPPER", "a.b", "../x"] {
        assert!(Lab::new(name).is_err(), "{name}");
    }
}
