//! What goes with overrides: `culvert override list`, shares, the local proxy and tunnels, with the built programs: discovery,
//! a culvertd that is told by it what can be named, and the command line.

mod contexts;
mod harness;
mod proxies;
mod shares;
mod tunnels;

use anyhow::{Result, ensure};
use culvert_tests::wait_until;
use serde_json::{Value, json};

use harness::{DEADLINE, Mesh, culvert};

#[test]
fn what_can_be_named_is_listed() -> Result<()> {
    let mesh = Mesh::start()?;
    let list = || -> Result<Value> {
        let said = culvert(&["override", "list", "--discovery", &mesh.discovery.url, "--output", "json"])?;
        Ok(serde_json::from_str(&said)?)
    };
    let found = list()?;
    let expected = json!([{
        "service": "users.default", "envoy_cluster": "users.default:80", "revision": "feature-x", "cluster": "east",
        "pods": ["default/users-x"], "addresses": [format!("127.0.0.1:{}", mesh.feature)], "since": "2026-11-20T08:00:00Z",
    }]);
    assert_eq!(found, expected);
    let text = culvert(&["override", "list", "users", "--discovery", &mesh.discovery.url])?;
    assert!(text.contains("feature-x") && text.contains("2026-11-20T08:00:00Z"), "{text}");

    std::fs::remove_file(mesh.discovery.manifests.join("users-x.yaml"))?;
    wait_until(DEADLINE, "the pod to go", || {
        ensure!(list()? == json!([]));
        Ok(())
    })?;
    let text = culvert(&["override", "list", "--discovery", &mesh.discovery.url])?;
    assert!(text.starts_with("nothing is offloaded; a pod with the labels culvert.dev/offloaded"), "{text}");
    Ok(())
}
