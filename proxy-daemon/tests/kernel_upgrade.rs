//! What a daemon takes over of an earlier one's maps, on the running kernel: counters and pods' accounts go on, whether the
//! earlier one was replaced or had died; other maps are not mistaken for ours; and who was replaced touches nothing.

mod kernel_lab;

use std::collections::HashSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use aya::maps::{Map, MapData, MapInfo, PerCpuHashMap};
use aya::programs::{SchedClassifier, TcAttachType};
use culvert_proxy_daemon::intercept::{
    BalancedService, ConnectBalancing, Enrolment, Interception, InterceptionConfig, PodStatus, Policy, Selector,
    Traffic,
};
use culvert_proxy_ebpf::{Address, LAYOUT, PodCounters};
use kernel_lab::puppet::{self, Group, Puppet};
use kernel_lab::*;

/// Not a test of its own: what the process does whose connections are balanced.
#[test]
fn play_the_puppet() {
    puppet::play();
}

/// The client opens connections, all of which are redirected, and says something by each.
fn connect(lab: &Lab, worker: &TcpListener, times: usize) {
    for _ in 0..times {
        let mut client = lab.client.connect("10.96.0.10:80").expect("connects");
        let (mut accepted, _) = accept(worker);
        client.write_all(b"hello").expect("writes");
        accepted.read_exact(&mut [0; 5]).expect("reads");
    }
}

fn pod(interception: &Interception, name: &str) -> PodStatus {
    interception.pods().into_iter().find(|pod| pod.name == name).expect("the pod is known")
}

/// What operators see of a pod that is not to begin anew.
fn account(pod: &PodStatus) -> (Option<String>, u64) {
    (pod.since.clone(), pod.outbound_connections)
}

/// The addresses that have an account.
fn accounts(lab: &Lab) -> Vec<Address> {
    let path = lab.pin_path.join(format!("maps-{LAYOUT}/POD_COUNTERS"));
    let map = Map::from_map_data(MapData::from_pin(path).expect("pinned")).expect("a map");
    let map = PerCpuHashMap::<_, Address, PodCounters>::try_from(map).expect("of this kind");
    map.keys().collect::<Result<_, _>>().expect("can be listed")
}

/// The numbers of the maps that outlive daemons.
fn inherited(lab: &Lab) -> [u32; 6] {
    let names = ["COUNTERS", "POD_COUNTERS", "DETOURS", "CHOICES", "REPLIES", "CONNECTED"];
    names.map(|name| MapInfo::from_pin(maps(lab).join(name)).unwrap_or_else(|error| panic!("{name}: {error}")).id())
}

fn maps(lab: &Lab) -> PathBuf {
    lab.pin_path.join(format!("maps-{LAYOUT}"))
}

#[test]
fn counters_and_pods_accounts_outlive_a_crash() {
    let lab = Lab::new();
    let (first, worker) = start(&lab, lab.config());
    connect(&lab, &worker, 3);
    let (redirected, before) = (counter(&first, "redirected"), pod(&first, CLIENT));
    assert_eq!((redirected, before.outbound_connections), (3, 3));
    assert!(before.bytes_sent > 0 && before.since.is_some(), "{before:?}");
    let kept = inherited(&lab);
    // As in a crash.
    drop((first, worker));

    let (second, worker) = start(&lab, lab.config());
    assert_eq!(inherited(&lab), kept, "they are the same maps");
    assert_eq!(counter(&second, "redirected"), 3);
    let after = pod(&second, CLIENT);
    assert_eq!(account(&after), account(&before));
    assert!(after.bytes_sent >= before.bytes_sent, "{after:?}");
    connect(&lab, &worker, 2);
    assert_eq!(counter(&second, "redirected"), 5);
    assert_eq!(account(&pod(&second, CLIENT)), (before.since, 5));

    // Who ends in order takes all of it along.
    stop(&lab, second);
    let (third, _worker) = start(&lab, lab.config());
    assert_eq!(counter(&third, "redirected"), 0);
    assert_eq!(pod(&third, CLIENT).outbound_connections, 0);
    stop(&lab, third);
}

#[test]
fn counters_and_pods_accounts_outlive_an_upgrade() {
    let lab = Lab::new();
    let (first, old) = start(&lab, lab.config());
    connect(&lab, &old, 3);
    let since = pod(&first, CLIENT).since;
    let second = lab.start(lab.config(), 1);
    // The first one serves still, and both see what it does.
    connect(&lab, &old, 2);
    assert_eq!([&first, &second].map(|daemon| counter(daemon, "redirected")), [5, 5]);
    let new = lab.node.listen_transparent("[::]:0");
    lab.node.run(|| second.set_listener(0, new.as_fd())).expect("listener");
    connect(&lab, &new, 2);
    stop(&lab, first);
    connect(&lab, &new, 1);
    assert_eq!(counter(&second, "redirected"), 8);
    assert_eq!(account(&pod(&second, CLIENT)), (since, 8));
    stop(&lab, second);
    assert!(!lab.pin_path.exists());
}

/// kmesh#1346, as it comes about when pods start while a replaced daemon drains.
#[test]
fn a_daemon_that_was_replaced_attaches_nothing() {
    let lab = Lab::new();
    let programs = |interface: &str| -> Vec<u32> {
        let found = lab.node.run(|| SchedClassifier::query_tcx(interface, TcAttachType::Ingress));
        found.map_or_else(|_| Vec::new(), |(_, programs)| programs.iter().map(|program| program.id()).collect())
    };
    let (first, _old) = start(&lab, lab.config());
    let (second, _new) = start(&lab, lab.config());
    let own = programs("pod1");
    for number in 20..26 {
        let interface = format!("pod{number}");
        lab.node.ip(&format!("link add {interface} type veth peer name other{number}"));
        eventually("attached", || programs(&interface).len() == 1);
    }
    eventually("both daemons have seen them", || sleeps("intercept-watch"));
    for number in 20..26 {
        assert_eq!(programs(&format!("pod{number}")), own, "the program of the second, pod{number}");
    }
    let refused = first.enrol(None, vec![NEIGHBOUR.parse().unwrap()], None, None, None).expect_err("refused");
    assert!(refused.to_string().contains("another daemon has taken over"), "{refused}");
    // One that goes does not take a successor's program along.
    lab.node.ip("link delete pod20");
    stop(&lab, first);
    for number in 21..26 {
        assert_eq!(programs(&format!("pod{number}")), own, "pod{number}");
    }
    stop(&lab, second);
    assert!(!lab.pin_path.exists());
}

/// One that died while it waited for its listeners has taken over nothing.
#[test]
fn a_successor_that_died_before_its_time_is_none() {
    let lab = Lab::new();
    let (first, worker) = start(&lab, lab.config());
    let second = lab.start(lab.config(), 1);
    assert!(lab.pin_path.join("next").exists());
    drop(second);
    assert!(lab.pin_path.join("next").exists(), "its mark is left");
    connect(&lab, &worker, 1);
    stop(&lab, first);
    assert!(!lab.pin_path.exists(), "the first one removes everything");
}

/// A directory of manifests with one pod that has the client's address.
struct OnePod {
    directory: tempfile::TempDir,
}

impl OnePod {
    fn write(&self, name: &str, uid: &str) {
        let text = format!(
            "kind: Pod\nmetadata: {{name: {name}, uid: {uid}, labels: {{mesh: 'on'}}}}\nstatus: {{podIP: {CLIENT}}}\n"
        );
        fs::write(self.directory.path().join("pod.yaml"), text).expect("write");
    }

    fn config(&self, lab: &Lab) -> InterceptionConfig {
        let match_labels = [("mesh".to_owned(), "on".to_owned())].into();
        let policy = Policy { traffic: Traffic::Outbound, ..Policy::default() };
        let enrolment = Enrolment {
            pod_manifests: self.directory.path().to_owned(),
            selectors: vec![Selector { match_labels, policy, ..Selector::default() }],
            ..Enrolment::default()
        };
        InterceptionConfig { pods: Vec::new(), enrolment: Some(enrolment), ..lab.config() }
    }
}

/// istio#46628, while no daemon looks.
#[test]
fn another_pod_with_the_address_begins_anew() {
    let lab = Lab::new();
    let manifests = OnePod { directory: tempfile::tempdir().expect("a directory") };
    manifests.write("web", "one");
    let (first, worker) = start(&lab, manifests.config(&lab));
    connect(&lab, &worker, 3);
    let before = account(&pod(&first, "default/web"));
    assert_eq!(before.1, 3);
    drop((first, worker));
    // The same pod.
    let (second, worker) = start(&lab, manifests.config(&lab));
    assert_eq!(account(&pod(&second, "default/web")), before);
    drop((second, worker));
    // Its successor of the same name.
    manifests.write("web", "two");
    let (third, worker) = start(&lab, manifests.config(&lab));
    let (since, connections) = account(&pod(&third, "default/web"));
    assert_eq!(connections, 0);
    assert!(since > before.0, "{since:?} is not after {:?}", before.0);
    assert_eq!(accounts(&lab).len(), 1);
    drop((third, worker));
    // Nobody: what was counted for it is forgotten.
    fs::remove_file(manifests.directory.path().join("pod.yaml")).expect("remove");
    let (fourth, _worker) = start(&lab, manifests.config(&lab));
    eventually("forgotten", || accounts(&lab).is_empty());
    stop(&lab, fourth);
}

/// What the old daemon's programs count until the new one's take their places is not lost either.
#[test]
fn counters_of_another_layout_go_on_through_an_upgrade() {
    let lab = Lab::new();
    let (first, old) = start(&lab, lab.config());
    connect(&lab, &old, 3);
    move_pins(&lab, &lab.pin_path.join("maps-1")).expect("moves");
    let second = lab.start(lab.config(), 1);
    assert_eq!(counter(&second, "redirected"), 3);
    // The old daemon's programs count in its own map.
    connect(&lab, &old, 4);
    assert_eq!([&first, &second].map(|daemon| counter(daemon, "redirected")), [7, 3]);
    let new = lab.node.listen_transparent("[::]:0");
    lab.node.run(|| second.set_listener(0, new.as_fd())).expect("listener");
    assert_eq!(counter(&second, "redirected"), 7);
    connect(&lab, &new, 2);
    assert_eq!(counter(&second, "redirected"), 9);
    stop(&lab, first);
    stop(&lab, second);
    assert!(!lab.pin_path.exists());
}

/// The old daemon's programs for services serve on, and count, after the new one's others have taken their places.
#[test]
fn what_balances_services_is_counted_until_it_is_replaced() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let balancing = ConnectBalancing { cgroups: vec![group.path().to_owned()], ..ConnectBalancing::default() };
    // With interfaces, and without: then nothing is waited for.
    for interfaces in [lab.config().interfaces, Vec::new()] {
        let config = || InterceptionConfig {
            balancing: Some(balancing.clone()),
            interfaces: interfaces.clone(),
            ..lab.config()
        };
        let service = BalancedService { address: "10.96.0.10:80".parse().unwrap(), udp: false, cluster: "any".into() };
        let shares = [("10.201.2.2:8001".parse().unwrap(), 1.0)];
        let backend = lab.server.listen("10.201.2.2:8001");
        // On the node: a pod's connections to what the second daemon does not know as a backend yet are redirected.
        let mut app = Puppet::new(&lab.node, &group);
        let mut connect = |times: usize| {
            for _ in 0..times {
                app.connect("10.96.0.10:80").expect("connects");
                accept(&backend);
            }
        };
        let balanced = |daemon: &Interception| counter(daemon, "balanced.connections");
        let attach = |daemon: &Interception| {
            daemon.balance();
            eventually("attached", || daemon.hooked_cgroups().1 == 1);
        };
        let (first, _old) = start(&lab, config());
        first.set_service(&service, &shares).unwrap();
        attach(&first);
        connect(3);
        move_pins(&lab, &lab.pin_path.join("maps-1")).expect("moves");

        let (second, _new) = start(&lab, config());
        assert!(!lab.pin_path.join("maps-1").exists(), "it has taken over");
        assert_eq!(balanced(&second), 3);
        // It knows no hosts yet: the first one's programs choose.
        connect(4);
        second.set_service(&service, &shares).unwrap();
        attach(&second);
        eventually("carried on", || balanced(&second) == 7);
        connect(2);
        assert_eq!(balanced(&second), 9);
        assert_eq!(balanced(&first), 7);
        stop(&lab, first);
        stop(&lab, second);
        assert!(!lab.pin_path.exists());
    }
}

/// What workers count, and not the programs, outlives them too.
#[test]
fn what_workers_count_goes_on_after_a_crash() {
    const REFUSALS: u64 = 3;
    let mut lab = Lab::new();
    let cgroup = lab.cgroup();
    let config = || InterceptionConfig { shortcut_cgroup: Some(cgroup.clone()), ..lab.config() };
    let here = || std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let refused = |daemon: &Interception| counter(daemon, "joined.refused_client");
    let first = lab.start(config(), 2);
    for _ in 0..REFUSALS {
        // From whichever worker and processor: neither is a pod's connection.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let joins = std::rc::Rc::new(first.joins().expect("are loaded").expect("something goes past TCP"));
                assert!(joins.join(&here(), &here()).is_none());
            });
        });
    }
    assert_eq!(refused(&first), REFUSALS);
    drop(first);
    let second = lab.start(config(), 2);
    assert_eq!(refused(&second), REFUSALS);
    stop(&lab, second);
}

/// Where what is pinned for an interface is a link that takes no program of ours, ours is attached beside it, and it goes.
#[test]
fn a_link_that_takes_no_other_program_gives_way() {
    let lab = Lab::new();
    let group = Group::new(None, "pods");
    let balancing = ConnectBalancing { cgroups: vec![group.path().to_owned()], ..ConnectBalancing::default() };
    let (first, _worker) = start(&lab, InterceptionConfig { balancing: Some(balancing), ..lab.config() });
    first.balance();
    let (links, cgroups) = (lab.pin_path.join("links"), lab.pin_path.join("cgroups"));
    let pinned = || fs::read_dir(&cgroups).expect("pins").map(|entry| entry.expect("one").path()).collect::<Vec<_>>();
    eventually("attached", || first.hooked_cgroups().1 == 1);
    drop(first);
    let names = || fs::read_dir(&links).expect("links").map(|entry| entry.expect("one").file_name());
    let before: HashSet<_> = names().collect();
    assert_eq!(before.len(), 3, "two pods' interfaces and an uplink");
    for (name, other) in names().collect::<Vec<_>>().iter().zip(pinned()) {
        fs::rename(other, links.join(name)).expect("rename");
    }
    let (second, worker) = start(&lab, lab.config());
    assert_eq!(names().collect::<HashSet<_>>(), before);
    connect(&lab, &worker, 2);
    eventually("one program an interface", || {
        ["pod1", "pod2", "up0"].into_iter().all(|interface| {
            let found = lab.node.run(|| SchedClassifier::query_tcx(interface, TcAttachType::Ingress));
            found.is_ok_and(|(_, programs)| programs.len() == 1)
        })
    });
    stop(&lab, second);
    assert!(!lab.pin_path.exists());
}

#[test]
fn counters_of_another_layout_go_on() {
    let lab = Lab::new();
    let (first, worker) = start(&lab, lab.config());
    connect(&lab, &worker, 3);
    let before = pod(&first, CLIENT);
    drop((first, worker));
    let older = lab.pin_path.join("maps-1");
    fs::rename(maps(&lab), &older).or_else(|_| move_pins(&lab, &older)).expect("moves");

    let (second, worker) = start(&lab, lab.config());
    assert_eq!(counter(&second, "redirected"), 3);
    let after = pod(&second, CLIENT);
    assert_eq!(after.outbound_connections, 0, "the layout of what was counted for pods is not known");
    assert!(after.since > before.since, "{after:?}");
    assert!(!older.exists());
    connect(&lab, &worker, 1);
    assert_eq!(counter(&second, "redirected"), 4);
    stop(&lab, second);
}

/// Where the BPF file system does not rename directories.
fn move_pins(lab: &Lab, to: &PathBuf) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(maps(lab))? {
        let path = entry?.path();
        fs::rename(&path, to.join(path.file_name().expect("a name")))?;
    }
    fs::remove_dir(maps(lab))
}

/// A map of our layout that is not what its name says: somebody else's, or a build's of which nobody raised the number.
#[test]
fn a_map_of_another_shape_is_not_taken_over() {
    let lab = Lab::new();
    let (first, worker) = start(&lab, lab.config());
    connect(&lab, &worker, 3);
    drop((first, worker));
    for (odd, name) in [("LOCAL_ADDRESSES", "COUNTERS"), ("SWITCHES", "CONNECTED")] {
        fs::remove_file(maps(&lab).join(name)).expect("remove");
        fs::rename(maps(&lab).join(odd), maps(&lab).join(name)).expect("rename");
    }
    let (second, worker) = start(&lab, lab.config());
    assert_eq!(counter(&second, "redirected"), 0, "begins anew");
    // What is as it was goes on.
    assert_eq!(pod(&second, CLIENT).outbound_connections, 3);
    connect(&lab, &worker, 1);
    assert_eq!(counter(&second, "redirected"), 1);
    stop(&lab, second);
    assert!(!lab.pin_path.exists());
}
