use std::fs;
use std::path::Path;

use super::super::config::{FailurePolicy, Policy, Traffic};
use super::super::selectors::Selector;
use super::*;

fn enrolment(path: &Path) -> Enrolment {
    let policy = Policy { failure_policy: FailurePolicy::Closed, traffic: Traffic::Both, ..Policy::default() };
    let match_labels = [("mesh".to_owned(), "on".to_owned())].into();
    Enrolment {
        pod_manifests: path.to_owned(),
        kubernetes: None,
        node_name: "node-a".to_owned(),
        selectors: vec![Selector { namespaces: vec!["shop".to_owned()], match_labels, policy }],
    }
}

fn pod(name: &str, labels: &str, address: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: u-{name}, labels: {{{labels}}}}}\n\
         spec: {{nodeName: node-a}}\nstatus: {{podIP: '{address}'{more}}}\n"
    )
}

fn read(text: &str) -> Result<Vec<Known>, String> {
    let pods = pods_of(text, &enrolment(Path::new("/nowhere")))?;
    Ok(pods.here.into_iter().map(|(_, pod)| pod).collect())
}

#[test]
fn pods_are_read_with_both_families() {
    let pods = read(&pod("a", "mesh: 'on'", "10.0.0.1", ", podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]")).unwrap();
    let [pod] = pods.as_slice() else { panic!("{pods:?}") };
    assert_eq!(pod.name, "shop/a");
    let addresses: Vec<IpAddr> = ["10.0.0.1", "fd00::1"].map(|text| text.parse().unwrap()).to_vec();
    assert_eq!(pod.addresses, addresses);
    let policy = pod.wanted.as_ref().unwrap();
    assert_eq!((policy.failure_policy, policy.traffic), (FailurePolicy::Closed, Traffic::Both));
}

#[test]
fn what_is_not_to_be_enrolled_says_why() {
    let host = "{apiVersion: v1, kind: Pod, metadata: {name: h, namespace: shop, labels: {mesh: 'on'}}, \
                spec: {nodeName: node-a, hostNetwork: true}, status: {podIP: 172.31.0.1}}";
    for (text, reason) in [
        (pod("b", "mesh: 'off'", "10.0.0.2", ""), "no selector matches it"),
        (pod("c", "mesh: 'on'", "10.0.0.3", ", phase: Succeeded"), "it has ended"),
        (host.to_owned(), "it uses the node's network"),
    ] {
        assert_eq!(read(&text).unwrap()[0].wanted, Err(reason.to_owned()));
    }
    assert_eq!(read(&pod("d", "mesh: 'on'", "", "")).unwrap()[0].addresses, Vec::<IpAddr>::new());
}

/// istio#55794.
#[test]
fn pods_that_are_not_to_be_enrolled_hold_nobody_up_with_odd_addresses() {
    let ips = ", podIPs: [{ip: 127.0.0.1}, {ip: 10.0.0.2}, {ip: 'no'}]";
    let unmatched = pod("b", "mesh: 'off'", "127.0.0.1", ips);
    let known = read(&unmatched).unwrap();
    assert_eq!(known[0].addresses, ["10.0.0.2".parse::<IpAddr>().unwrap()], "it keeps what is its own from others");
    let on = pod("b", "mesh: 'on'", "127.0.0.1", "");
    assert!(read(&on).is_err());
    for (text, reason) in [
        (on.replace("node-a}", "node-a, hostNetwork: true}"), "it uses the node's network"),
        (pod("b", "mesh: 'on'", "127.0.0.1", ", phase: Failed"), "it has ended"),
    ] {
        let known = read(&text).unwrap();
        assert_eq!((&known[0].wanted, &*known[0].addresses), (&Err(reason.to_owned()), &[][..]));
    }
    let leaving = on.replace("uid:", "deletionTimestamp: '2026-01-01T00:00:00Z', uid:");
    let known = read(&leaving).unwrap();
    assert!(known[0].leaving && known[0].addresses.is_empty());
}

#[test]
fn other_nodes_and_other_kinds_are_passed_over() {
    let other = pod("a", "mesh: 'on'", "10.0.0.1", "").replace("node-a", "node-b");
    assert_eq!(read(&other).unwrap(), []);
    assert_eq!(read("kind: Service\nmetadata: {name: a}\n---\n").unwrap(), []);
    let list = "{kind: PodList, items: [{metadata: {name: a}, spec: {nodeName: node-a}}]}";
    assert_eq!(read(list).unwrap()[0].name, "default/a");
}

#[test]
fn bad_manifests_say_what_is_wrong() {
    assert!(read("a: [").is_err());
    let error = read(&pod("a", "mesh: 'on'", "10.0.0.300", "")).unwrap_err();
    assert!(error.contains("`10.0.0.300` is not a pod's address"), "{error}");
    assert!(read("kind: Pod\nspec: {nodeName: node-a}").unwrap_err().contains("metadata.name"));
    assert!(read("kind: Pod\nmetadata: {name: [a]}").is_err());
}

#[test]
fn a_bad_file_keeps_its_pods_and_a_removed_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut directory = directory_of(enrolment(dir.path())).unwrap();
    let file = dir.path().join("a.yaml");
    fs::write(&file, pod("a", "mesh: 'on'", "10.0.0.1", "")).unwrap();
    fs::write(dir.path().join(".hidden.yaml"), pod("b", "", "10.0.0.2", "")).unwrap();
    assert!(directory.read());
    assert_eq!(pods(&directory).len(), 1);
    fs::write(&file, "a: [").unwrap();
    assert!(directory.read());
    assert_eq!(pods(&directory).len(), 1, "the last good version");
    fs::write(&file, pod("a", "mesh: 'on'", "10.0.0.2", "")).unwrap();
    assert!(directory.read());
    let [changed] = &pods(&directory)[..] else { panic!("one pod") };
    assert_eq!(changed.version, 3, "each version has its number");
    fs::remove_file(&file).unwrap();
    assert!(directory.read());
    assert_eq!(pods(&directory), []);
}

#[test]
fn the_newer_pod_has_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut directory = directory_of(enrolment(dir.path())).unwrap();
    let dated = |name: &str, when: &str| {
        pod(name, "mesh: 'on'", "10.0.0.1", "").replace("uid:", &format!("creationTimestamp: '{when}', uid:"))
    };
    fs::write(dir.path().join("a.yaml"), dated("a", "2026-02-01T00:00:00Z")).unwrap();
    fs::write(dir.path().join("b.yaml"), dated("b", "2026-01-01T00:00:00Z")).unwrap();
    directory.read();
    let names: Vec<String> = pods(&directory).into_iter().map(|pod| pod.name).collect();
    assert_eq!(names, ["shop/b", "shop/a"], "the later counts");
}

/// istio#61182.
#[test]
fn what_may_hide_pods_of_this_node_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut directory = directory_of(enrolment(dir.path())).unwrap();
    let mut told = || {
        directory.read();
        faults(&directory, "node-a").join("; ").replace(&*dir.path().to_string_lossy(), "")
    };
    assert_eq!(told(), "", "no pods at all");
    let good = pod("a", "mesh: 'on'", "10.0.0.1", "");
    let elsewhere = good.replace("node-a", "node-b");
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write("a.yaml", &elsewhere);
    let misnamed = "enrolment.node_name node-a: none of the 1 pods of  is on a node of this name: is it as in their spec.nodeName?";
    assert_eq!(told(), misnamed);
    write("b.yaml", &good);
    assert_eq!(told(), "");
    let bad = format!("{good}---\n{}", pod("c", "mesh: 'on'", "10.66.9.999", ""));
    // It would not be enrolled anyway.
    write("b.yaml", &bad.replace("name: c", "name: c, deletionTimestamp: '2026-01-01T00:00:00Z'"));
    assert_eq!(told(), "");
    write("b.yaml", &bad);
    let broken = "Pod shop/c: `10.66.9.999` is not a pod's address";
    assert_eq!(told(), format!("enrolment.pod_manifests /b.yaml: {broken}; its last good version stays in force"));
    write("c.yaml", &bad);
    assert!(told().ends_with(&format!("/c.yaml: {broken}; nothing of it is in force")));
    write("b.yaml", &good);
    write("c.yaml", "");
    assert_eq!(told(), "");
}
