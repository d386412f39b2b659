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

use harness::{DEADLINE, Mesh, culvert, refused, warned};

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

    let error = refused(&["override", "list", "nope", "--discovery", &mesh.discovery.url])?;
    assert!(error.contains("there is no service `nope`"), "{error}");
    // Who makes a header is told of what nobody offers.
    for (set, expected) in [
        ("users=feature-x", ""),
        ("users=feature-y", "warning: nobody offers revision feature-y of users.default at present"),
        ("nope=x", "warning: there is no service nope.default"),
    ] {
        let warning = warned(&["override", "header", "--set", set, "--discovery", &mesh.discovery.url])?;
        assert!(warning.starts_with(expected) && (warning.is_empty() == expected.is_empty()), "{set}: {warning}");
    }
    let share = ["override", "header", "--share", "abcd2345", "--discovery", &mesh.discovery.url];
    let warning = warned(&[&share[..], &["--token-file", &mesh.discovery.token_file]].concat())?;
    assert!(warning.starts_with("warning: there is no share with this token"), "{warning}");
    assert!(warned(&share)?.starts_with("warning: whether there is such a share is not told: "));

    std::fs::remove_file(mesh.discovery.manifests.join("users-x.yaml"))?;
    wait_until(DEADLINE, "the pod to go", || {
        ensure!(list()? == json!([]));
        Ok(())
    })?;
    let text = culvert(&["override", "list", "--discovery", &mesh.discovery.url])?;
    assert!(text.starts_with("nothing is offloaded; a pod with the labels culvert.dev/offloaded"), "{text}");
    Ok(())
}
