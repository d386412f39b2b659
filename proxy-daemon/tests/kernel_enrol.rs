//! Which pods are enrolled, on the running kernel: by manifests, by command; what happens to pods that go, to addresses
//! that are used again, and to those that cannot be enrolled. And daemons that follow one another.

mod kernel_lab;

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use culvert_proxy_daemon::intercept::{Interception, InterceptionConfig, clean};
use culvert_proxy_ebpf::LAYOUT;
use kernel_lab::manifests::{Manifests, pod};
use kernel_lab::*;

fn is_enrolled(interception: &Interception, name: &str) -> bool {
    pod(interception, name).is_some_and(|pod| pod.enrolled)
}

/// Whether what the client pod opens is redirected now.
fn is_redirected(lab: &Lab, interception: &Interception) -> bool {
    let before = counter(interception, "redirected");
    // Nothing else listens there.
    let _ = lab.client.connect_within("10.201.2.2:80", REFUSAL);
    counter(interception, "redirected") > before
}

/// How many programs see what comes in on an interface of the node.
fn attached(lab: &Lab, interface: &str) -> usize {
    lab.node.run(|| SchedClassifier::query_tcx(interface, TcAttachType::Ingress)).map_or(0, |found| found.1.len())
}

#[test]
fn pods_are_enrolled_by_their_labels_as_they_come_and_go() {
    let lab = Lab::new();
    let manifests = Manifests::new(&lab);
    let (interception, _worker) = start(&lab, manifests.config(&lab));
    assert!(!is_redirected(&lab, &interception));
    manifests.write("client", "on", CLIENT, "");
    eventually("the pod is enrolled", || is_enrolled(&interception, "default/client"));
    let found = pod(&interception, "default/client").unwrap();
    assert!(found.since.is_some() && found.reason.is_none(), "{found:?}");
    assert!(is_redirected(&lab, &interception));
    assert_eq!(pod(&interception, "default/client").unwrap().outbound_connections, 1);

    // Another label, no restart.
    manifests.write("client", "off", CLIENT, "");
    eventually("the pod is not enrolled any more", || !is_enrolled(&interception, "default/client"));
    let reason = pod(&interception, "default/client").unwrap().reason;
    assert_eq!(reason.as_deref(), Some("no selector matches it"));
    assert!(!is_redirected(&lab, &interception));
    assert_eq!(interception.faults(), Vec::<String>::new());

    manifests.write("client", "on", CLIENT, "");
    eventually("enrolled again", || is_enrolled(&interception, "default/client"));
    manifests.remove("client");
    eventually("forgotten", || pod(&interception, "default/client").is_none());
    assert!(!is_redirected(&lab, &interception));
    stop(&lab, interception);
}

/// istio#61182: nobody hears of the pods of a directory that is not there.
#[test]
fn without_its_directory_of_manifests_the_node_is_not_ready() {
    let lab = Lab::new();
    let manifests = Manifests::new(&lab);
    fs::remove_dir(&manifests.directory).expect("remove");
    let (interception, _worker) = start(&lab, manifests.config(&lab));
    let fault = |reason: &str| format!("enrolment.pod_manifests {}: {reason}", manifests.directory.display());
    let missing = vec![fault("cannot read the directory: No such file or directory (os error 2)")];
    assert_eq!(interception.faults(), missing);
    fs::create_dir(&manifests.directory).expect("a directory");
    manifests.write("client", "on", CLIENT, "");
    eventually("enrolled and ready", || {
        is_enrolled(&interception, "default/client") && interception.faults().is_empty()
    });
    // Away again: what is known stays, but more may have come.
    let aside = manifests.directory.with_file_name("aside");
    fs::rename(&manifests.directory, &aside).expect("rename");
    eventually("not ready", || interception.faults() == missing);
    assert!(is_enrolled(&interception, "default/client"));
    // A file in its place cannot be read as one.
    fs::write(&manifests.directory, "").expect("write");
    eventually("not ready", || {
        interception.faults() == [fault("cannot read the directory: Not a directory (os error 20)")]
    });
    fs::remove_file(&manifests.directory).expect("remove");
    fs::rename(&aside, &manifests.directory).expect("rename");
    eventually("ready", || interception.faults().is_empty());
    assert!(is_enrolled(&interception, "default/client"));
    stop(&lab, interception);
}

/// istio#46628.
#[test]
fn an_address_that_is_used_again_does_not_inherit_the_policy() {
    let lab = Lab::new();
    let manifests = Manifests::new(&lab);
    let (interception, _worker) = start(&lab, manifests.config(&lab));
    manifests.write("old", "on", CLIENT, "");
    eventually("enrolled", || is_enrolled(&interception, "default/old"));
    assert!(is_redirected(&lab, &interception));

    // The pod goes and another one gets its address, before anybody says so.
    lab.node.ip("link delete pod1");
    lab.rewire_client();
    assert!(!is_redirected(&lab, &interception), "the new pod has the old one's policy");
    eventually("the node is not ready: nobody knows whose the address is", || {
        interception.faults().iter().any(|fault| fault.contains("default/old") && fault.contains(CLIENT))
    });
    assert!(!is_redirected(&lab, &interception));

    // Kubernetes says it: another pod, which is not to be enrolled. Then one that is.
    manifests.remove("old");
    manifests.write("new", "off", CLIENT, "");
    eventually("ready again", || interception.faults().is_empty() && pod(&interception, "default/new").is_some());
    assert!(!is_redirected(&lab, &interception));
    manifests.remove("new");
    manifests.write("newer", "on", CLIENT, "");
    eventually("enrolled on its own", || is_enrolled(&interception, "default/newer"));
    assert_eq!(pod(&interception, "default/newer").unwrap().outbound_connections, 0, "the counters are its own");
    assert!(is_redirected(&lab, &interception));
    stop(&lab, interception);
}

/// istio#61182, istio#55794, linkerd2#11325.
#[test]
fn a_pod_that_should_be_enrolled_and_is_not_is_told() {
    let lab = Lab::new();
    let manifests = Manifests::new(&lab);
    manifests.write("late", "on", "10.201.77.2", "");
    let (interception, _worker) = start(&lab, manifests.config(&lab));
    eventually("not ready", || interception.faults().iter().any(|fault| fault.contains("default/late")));
    let late = pod(&interception, "default/late").unwrap();
    assert!(!late.enrolled && late.reason.as_deref().is_some_and(|reason| reason.contains("no interface")), "{late:?}");
    assert_eq!(counter(&interception, "enrolment_missing"), 1);

    // One that is being deleted, and one that has ended, hold nobody up.
    manifests.write("dead", "on", "10.201.78.2", ", deletionTimestamp: '2026-01-01T00:00:00Z'");
    eventually("the dead one is known", || pod(&interception, "default/dead").is_some());
    assert_eq!(interception.faults().len(), 1, "{:?}", interception.faults());

    // Its interface appears after all.
    lab.node.ip("link add pod77 type veth peer name other77");
    lab.node.ip("link set pod77 up");
    lab.node.ip("link set other77 up");
    lab.node.ip("route add 10.201.77.2/32 dev pod77");
    eventually("ready", || interception.faults().is_empty() && is_enrolled(&interception, "default/late"));
    stop(&lab, interception);
}

#[test]
fn a_full_map_is_told_and_never_a_silent_bypass() {
    let lab = Lab::new();
    let manifests = Manifests::new(&lab);
    let config = InterceptionConfig { max_addresses: 1, ..manifests.config(&lab) };
    manifests.write("client", "on", CLIENT, "");
    let (interception, _worker) = start(&lab, config);
    assert!(is_enrolled(&interception, "default/client"));
    manifests.write("server", "on", SERVER, "");
    eventually("not ready", || interception.faults().iter().any(|fault| fault.contains("default/server")));
    assert_eq!(counter(&interception, "enrolment_failed"), 1);
    assert!(is_enrolled(&interception, "default/client"), "who was first stays");
    // Room is made.
    manifests.remove("client");
    eventually("the other one is enrolled", || is_enrolled(&interception, "default/server"));
    assert!(interception.faults().is_empty());
    stop(&lab, interception);

    let mut config = lab.config();
    config.max_addresses = 2;
    let (interception, _worker) = start(&lab, config);
    assert_eq!(interception.faults().len(), 2, "the bootstrap's pods are told as well");
    stop(&lab, interception);
}

#[test]
fn pods_are_enrolled_by_command_and_a_restart_keeps_it() {
    let lab = Lab::new();
    let config = || InterceptionConfig { pods: Vec::new(), ..lab.config() };
    let (interception, worker) = start(&lab, config());
    let address = |text: &str| vec![text.parse().unwrap()];
    for (addresses, direction, words) in [
        (Vec::new(), None, "an address is needed"),
        (address("10.201.9.2"), None, "`interfaces` does not name"),
        (address(CLIENT), Some("up"), "outbound, inbound or both"),
        (vec![CLIENT.parse().unwrap(), SERVER.parse().unwrap()], None, "another interface"),
    ] {
        let error = interception.enrol(None, addresses, direction, None, None).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(interception.faults().is_empty(), "what was refused leaves nothing: {:?}", interception.faults());
    let both = vec![CLIENT.parse().unwrap(), CLIENT_V6.parse().unwrap()];
    interception.enrol(Some("web".to_owned()), both, Some("both"), Some("closed"), Some("joined")).expect("enrols");
    assert!(is_redirected(&lab, &interception));

    // A crash and a restart.
    drop((interception, worker));
    let (interception, worker) = start(&lab, config());
    assert!(is_enrolled(&interception, "web"));
    assert!(is_redirected(&lab, &interception));
    interception.unenrol(CLIENT_V6).expect("by an address");
    assert!(!is_redirected(&lab, &interception));
    assert!(interception.unenrol("web").unwrap_err().to_string().contains("was not enrolled by command"));

    // One more address of the same pod; and what is another's.
    let enrol = |name: &str, text: &str| interception.enrol(Some(name.to_owned()), address(text), None, None, None);
    enrol("web", CLIENT).expect("enrols");
    enrol("web", CLIENT_V6).expect("adds");
    let both: Vec<std::net::IpAddr> = vec![CLIENT.parse().unwrap(), CLIENT_V6.parse().unwrap()];
    assert_eq!(pod(&interception, "web").unwrap().addresses, both);
    assert!(is_enrolled(&interception, "web") && is_redirected(&lab, &interception));
    for (name, text, words) in [
        (
            "other",
            CLIENT_V6,
            "web is enrolled by command with 10.201.1.2 and fd00:201:1::2: name it, or unenroll it first",
        ),
        (
            "web",
            SERVER,
            "web is enrolled by command with 10.201.1.2 and fd00:201:1::2, on another interface than 10.201.2.2",
        ),
    ] {
        let error = enrol(name, text).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert_eq!(pod(&interception, "web").unwrap().addresses, both);
    interception.unenrol("web").expect("unenrols");

    // What is on another interface when the daemon comes back is another pod.
    interception.enrol(Some("web".to_owned()), address(CLIENT), None, None, None).expect("enrols");
    drop((interception, worker));
    lab.node.ip("link delete pod1");
    lab.rewire_client();
    let (interception, _worker) = start(&lab, config());
    assert!(pod(&interception, "web").is_none());
    assert!(!is_redirected(&lab, &interception));
    let written = fs::read_to_string(lab.state_path()).expect("the state file");
    assert!(!written.contains("web"), "it would be missed at each start: {written}");
    stop(&lab, interception);
}

/// A pod that fails closed must not be let go of because one family comes later than the other.
#[test]
fn what_was_enrolled_by_command_waits_for_its_routes() {
    let lab = Lab::new();
    let config = || InterceptionConfig { pods: Vec::new(), ..lab.config() };
    let (interception, worker) = start(&lab, config());
    let enrol = |address: &str, direction: Option<&str>, policy: Option<&str>| {
        let addresses = vec![address.parse().unwrap()];
        interception.enrol(Some("web".to_owned()), addresses, direction, policy, None).expect("enrols");
        let status = serde_json::to_value(pod(&interception, "web").expect("enrolled")).expect("JSON");
        ["direction", "failure_policy"].map(|key| status[key].as_str().unwrap().to_owned())
    };
    assert_eq!(enrol(CLIENT, Some("both"), Some("closed")), ["both", "closed"]);
    assert_eq!(enrol(CLIENT_V6, None, None), ["both", "closed"], "what is not said stays");
    assert_eq!(enrol(CLIENT, Some("outbound"), None), ["outbound", "closed"]);
    drop((interception, worker));

    let missing = |interception: &Interception| interception.faults().iter().filter(|it| it.contains("web")).count();
    for (away, back, late) in [
        (&["-6 addr del fd00:201:1::1/64 dev pod1"][..], &["addr add fd00:201:1::1/64 dev pod1 nodad"][..], 1),
        (
            &["-6 addr del fd00:201:1::1/64 dev pod1", "addr del 10.201.1.1/24 dev pod1"][..],
            &["addr add fd00:201:1::1/64 dev pod1 nodad", "addr add 10.201.1.1/24 dev pod1"][..],
            2,
        ),
    ] {
        away.iter().for_each(|command| _ = lab.node.ip(command));
        let (interception, worker) = start(&lab, config());
        assert_eq!(missing(&interception), late, "{:?}", interception.faults());
        assert_eq!(is_redirected(&lab, &interception), late == 1);
        back.iter().for_each(|command| _ = lab.node.ip(command));
        eventually("enrolled", || is_enrolled(&interception, "web"));
        assert_eq!(interception.faults(), Vec::<String>::new());
        drop((interception, worker));
    }
    let (interception, _worker) = start(&lab, config());
    assert!(is_enrolled(&interception, "web") && is_redirected(&lab, &interception));
    stop(&lab, interception);
}

/// istio#61182.
#[test]
fn pods_of_which_nobody_can_know_keep_the_node_from_being_ready() {
    let lab = Lab::new();
    let manifests = Manifests::new(&lab);
    let mut config = manifests.config(&lab);
    config.enrolment.as_mut().expect("set above").node_name = "node-a".to_owned();
    // No node's.
    manifests.write("client", "on", CLIENT, "");
    let (interception, _worker) = start(&lab, config);
    let faults = || interception.faults().join("; ");
    assert!(faults().starts_with("enrolment.node_name node-a: none of the 1 pods of "), "{}", faults());
    let own = "kind: Pod\nmetadata: {name: own}\nspec: {nodeName: node-a, hostNetwork: true}\n";
    fs::write(manifests.directory.join("own.yaml"), own).expect("write");
    eventually("ready", || interception.faults().is_empty());
    fs::write(manifests.directory.join("bad.yaml"), own.replace("own", "[")).expect("write");
    eventually("not ready", || faults().contains("bad.yaml: ") && faults().contains("nothing of it is in force"));
    manifests.remove("bad");
    eventually("ready", || interception.faults().is_empty());
    stop(&lab, interception);
}

#[test]
fn a_removed_interface_takes_its_pod_out_and_a_renamed_one_does_not() {
    let lab = Lab::new();
    let config = InterceptionConfig { pods: Vec::new(), ..lab.config() };
    let (interception, _worker) = start(&lab, config);
    interception.enrol(None, vec![CLIENT.parse().unwrap()], None, None, None).expect("enrols");
    lab.node.ip("link set pod1 down");
    lab.node.ip("link set pod1 name podx");
    lab.node.ip("link set podx up");
    lab.node.ip(&format!("route replace {CLIENT}/32 dev podx"));
    eventually("the renamed interface serves", || attached(&lab, "podx") == 1 && is_redirected(&lab, &interception));
    assert!(is_enrolled(&interception, CLIENT));
    lab.node.ip("link delete podx");
    eventually("its pod is forgotten", || pod(&interception, CLIENT).is_none());
    assert!(interception.faults().is_empty());
    stop(&lab, interception);
}

#[test]
fn a_state_file_that_cannot_be_written_keeps_nothing_in_force_that_must_go() {
    let lab = Lab::new();
    let config = InterceptionConfig { pods: Vec::new(), ..lab.config() };
    let (interception, _worker) = start(&lab, config);
    let enrol = |name: &str, address: &str| {
        interception.enrol(Some(name.to_owned()), vec![address.parse().unwrap()], None, None, None)
    };
    enrol("web", CLIENT).expect("enrols");
    // It is written there first.
    let beside = lab.state_path().with_extension("new");
    fs::create_dir(&beside).expect("a directory");
    assert!(enrol("users", SERVER).unwrap_err().to_string().contains("enrolled.json"));
    assert!(interception.unenrol("web").unwrap_err().to_string().contains("enrolled.json"));
    assert!(is_enrolled(&interception, "web") && pod(&interception, "users").is_none());

    // It takes the program along.
    lab.node.ip(&format!("link set pod1 netns {}", lab.client.name));
    eventually("the pod is forgotten", || pod(&interception, "web").is_none());
    let in_pod = || lab.client.run(|| SchedClassifier::query_tcx("pod1", TcAttachType::Ingress)).unwrap().1.len();
    eventually("detached", || in_pod() == 0);
    assert_eq!(interception.faults(), Vec::<String>::new());

    // What was refused does not come with the next command.
    fs::remove_dir(&beside).unwrap();
    enrol("other", SERVER_V6).expect("enrols");
    assert!(pod(&interception, "users").is_none());
    let written = fs::read_to_string(lab.state_path()).expect("the state file");
    assert!(written.contains("other") && !written.contains("users") && !written.contains("web"), "{written}");
    stop(&lab, interception);
}

/// What one daemon has in force stays until its successor's listeners are there; then it is the successor's, and the end of
/// the first takes nothing away. istio#51126, kmesh#1346, cilium#36063.
#[test]
fn a_successor_takes_over_without_a_gap() {
    let lab = Lab::new();
    let (first, old) = start(&lab, lab.config());
    let programs = |interface: &str| {
        let (_, programs) = lab.node.run(|| SchedClassifier::query_tcx(interface, TcAttachType::Ingress)).unwrap();
        programs.iter().map(|program| program.id()).collect::<Vec<_>>()
    };
    let before = programs("pod1");
    // The lease is of the process: this one has it twice over, as two daemons would not.
    let second = lab.start(lab.config(), 1);
    assert!(second.has_predecessor());
    assert_eq!(programs("pod1"), before, "the old program serves");
    let _client = lab.client.connect("10.96.0.10:80").expect("the old daemon serves");
    accept(&old);

    let new = lab.node.listen_transparent("[::]:0");
    second.set_listener(0, new.as_fd()).expect("listener");
    let after = programs("pod1");
    assert!(after.len() == 1 && after != before, "one program, and the new one: {before:?}, {after:?}");
    let _client = lab.client.connect("10.96.0.10:80").expect("the new daemon serves");
    accept(&new);

    stop(&lab, first);
    drop(old);
    assert_eq!(programs("pod1"), after);
    let _client = lab.client.connect("10.96.0.10:80").expect("the new daemon serves on");
    accept(&new);
    eventually("the lease is the new daemon's", || !second.has_predecessor());
    stop(&lab, second);
    assert_eq!(attached(&lab, "pod1"), 0);
    assert!(!lab.pin_path.exists());
}

#[test]
fn listeners_that_never_come_do_not_keep_old_programs() {
    let lab = Lab::new();
    let (first, old) = start(&lab, lab.config());
    let second = lab.start(lab.config(), 1);
    // An orderly end before the listeners came: the first daemon still has everything.
    stop(&lab, second);
    let _client = lab.client.connect("10.96.0.10:80").expect("the first daemon serves");
    accept(&old);
    stop(&lab, first);
    assert!(!lab.pin_path.exists());
}

/// kmesh#951: what an older version pinned is replaced, whatever its maps looked like.
#[test]
fn an_older_layout_is_replaced() {
    let lab = Lab::new();
    let (first, old) = start(&lab, lab.config());
    // The first version's place, and a map that this version does not know.
    let (current, older) = (lab.pin_path.join(format!("maps-{LAYOUT}")), lab.pin_path.join("maps"));
    fs::create_dir(&older).unwrap();
    for entry in fs::read_dir(&current).unwrap() {
        let path = entry.unwrap().path();
        fs::rename(&path, older.join(path.file_name().unwrap())).unwrap();
    }
    fs::rename(older.join("PODS"), older.join("ENROLLED")).unwrap();
    fs::remove_dir(&current).unwrap();
    drop((first, old));

    let (second, worker) = start(&lab, lab.config());
    assert!(!older.exists() && current.join("PODS").exists());
    assert_eq!(attached(&lab, "pod1"), 1);
    let _client = lab.client.connect("10.96.0.10:80").expect("the new daemon serves");
    accept(&worker);
    stop(&lab, second);
    assert!(!lab.pin_path.exists());
}

/// A crash between the pins of the maps and the last interface.
#[test]
fn a_crash_in_the_middle_of_attaching_is_mended() {
    let lab = Lab::new();
    let (first, worker) = start(&lab, lab.config());
    drop((first, worker));
    // Some interfaces have the program, others not; one pin is of an interface that is gone; some maps are missing.
    let links = lab.pin_path.join("links");
    let mut pins: Vec<PathBuf> = fs::read_dir(&links).unwrap().map(|entry| entry.unwrap().path()).collect();
    pins.sort();
    fs::remove_file(&pins[0]).unwrap();
    fs::rename(&pins[1], links.join("9999")).unwrap();
    fs::remove_file(lab.pin_path.join(format!("maps-{LAYOUT}/PODS"))).unwrap();
    let (second, worker) = start(&lab, lab.config());
    for interface in ["pod1", "pod2", "up0"] {
        // The kernel detaches a program some time after its pin is gone.
        eventually(&format!("{interface} has one program"), || attached(&lab, interface) == 1);
    }
    let _client = lab.client.connect("10.96.0.10:80").expect("serves");
    accept(&worker);
    stop(&lab, second);
    for interface in ["pod1", "pod2", "up0"] {
        assert_eq!(attached(&lab, interface), 0, "{interface}");
    }
}

fn clean_up(lab: &Lab, pin_path: &Path) -> Result<Vec<String>, String> {
    lab.node.run(|| clean(pin_path, 0xC17, 3095)).map_err(|error| error.to_string())
}

#[test]
fn clean_removes_every_trace_and_tells_it() {
    let lab = Lab::new();
    for force_clsact in [false, true] {
        let (interception, worker) = start(&lab, InterceptionConfig { force_clsact, ..lab.config() });
        let error = clean_up(&lab, &lab.pin_path).unwrap_err();
        assert!(error.contains("a culvertd works with"), "{error}");
        // A crash.
        drop((interception, worker));
        let removed = clean_up(&lab, &lab.pin_path).expect("cleans").join("\n");
        let on_pod1 = if force_clsact { "filter redirect_outbound on pod1" } else { "program on pod1" };
        for words in [on_pod1, "pin ", "IPv4 rule", "IPv6 rule", "IPv4 route", "IPv6 route"] {
            assert!(removed.contains(words), "{words}: {removed}");
        }
        assert_eq!(removed.contains("clsact queueing discipline of pod1"), force_clsact, "{removed}");
        // The kernel detaches a little later than it removes the pin.
        for interface in ["pod1", "pod2", "up0"] {
            eventually(interface, || attached(&lab, interface) == 0);
        }
        assert!(!lab.pin_path.exists());
        let left = lab.node.ip("rule list") + &lab.node.ip("-6 rule list") + &lab.node.ip("route show table all");
        assert!(!left.contains("3095") && !left.contains("0xc17"), "{left}");
        assert!(!command("tc", &format!("-n {} qdisc show", lab.node.name)).contains("clsact"));
        assert_eq!(clean_up(&lab, &lab.pin_path), Ok(Vec::new()), "nothing is left");
    }
    // Another's filter keeps its queueing discipline.
    let (interception, worker) = start(&lab, InterceptionConfig { force_clsact: true, ..lab.config() });
    drop((interception, worker));
    let filter = ["-n", &lab.node.name, "filter", "add", "dev", "pod1", "egress", "bpf", "bytecode", "1,6 0 0 0"];
    assert!(Command::new("tc").args(filter).status().expect("tc").success());
    let removed = clean_up(&lab, &lab.pin_path).expect("cleans").join("\n");
    assert!(!removed.contains("discipline of pod1") && removed.contains("discipline of pod2"), "{removed}");
    assert!(command("tc", &format!("-n {} filter show dev pod1 egress", lab.node.name)).contains("bytecode"));
}

/// Everything is in force again within a second of a restart, of some restarts at least: the machine may be busy.
#[test]
fn a_restart_takes_less_than_a_second() {
    let lab = Lab::new();
    let (mut daemon, mut worker) = start(&lab, lab.config());
    let mut times = Vec::new();
    for _ in 0..10 {
        // As in a crash.
        drop((daemon, worker));
        let begun = std::time::Instant::now();
        (daemon, worker) = start(&lab, lab.config());
        let _client = lab.client.connect("10.96.0.10:80").expect("serves");
        accept(&worker);
        times.push(begun.elapsed());
    }
    assert!(times.iter().min().is_some_and(|time| *time < Duration::from_secs(1)), "{times:?}");
    stop(&lab, daemon);
}
