use super::*;

#[test]
fn globs_match_as_in_a_shell() {
    for (pattern, name, expected) in [
        ("veth*", "veth12ab", true),
        ("veth*", "eth0", false),
        ("*", "", true),
        ("eth?", "eth0", true),
        ("eth?", "eth10", false),
        ("*a*b", "xxaxxab", true),
        ("*a*b", "xxaxxabc", false),
        ("eth0", "eth0", true),
        ("eth0", "eth01", false),
        ("", "", true),
        ("", "x", false),
        ("a**b", "ab", true),
    ] {
        assert_eq!(glob_matches(pattern, name), expected, "{pattern} against {name}");
    }
}

#[test]
fn ranges_of_both_families_are_read() {
    assert_eq!(Range::parse("10.0.0.0/8"), Ok(Range { address: "10.0.0.0".parse().unwrap(), length: 8 }));
    assert_eq!(Range::parse("fd00::/8"), Ok(Range { address: "fd00::".parse().unwrap(), length: 8 }));
    assert_eq!(Range::parse("192.0.2.1"), Ok(Range { address: "192.0.2.1".parse().unwrap(), length: 32 }));
    assert_eq!(Range::parse("::/0"), Ok(Range { address: "::".parse().unwrap(), length: 0 }));
}

#[test]
fn bad_ranges_are_refused_in_words() {
    for (text, words) in [
        ("10.0.0.0/33", "from 0 to 32"),
        ("::/129", "from 0 to 128"),
        ("10.0.0/8", "not an address range"),
        ("10.0.0.0/", "from 0 to 32"),
        ("10.0.0.0/-1", "from 0 to 32"),
        ("", "not an address range"),
        ("service.example", "not an address range"),
    ] {
        let error = Range::parse(text).unwrap_err();
        assert!(error.contains(words), "{text}: {error}");
    }
}

fn pod_with(address: &str, failure_policy: FailurePolicy, acceleration: Acceleration) -> Pod {
    Pod {
        address: address.parse().unwrap(),
        policy: Policy { failure_policy, traffic: Traffic::Inbound, acceleration },
    }
}

/// A message that is right, for tests to spoil.
fn good() -> Message {
    Message {
        interfaces: vec!["veth*".to_owned()],
        pods: vec![message::Pod { address: "10.0.0.1".to_owned(), ..message::Pod::default() }],
        ..Message::default()
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let config = InterceptionConfig::from_proto(&good()).expect("a good message");
    assert_eq!(
        config,
        InterceptionConfig {
            interfaces: vec!["veth*".to_owned()],
            pods: vec![Pod { address: "10.0.0.1".parse().unwrap(), policy: Policy::default() }],
            ..InterceptionConfig::default()
        }
    );
    assert_eq!((config.mark, config.route_table), (0xC17, 3095));
    assert_eq!(config.pin_path, Path::new("/sys/fs/bpf/culvert"));
}

#[test]
fn every_field_is_taken() {
    let config = InterceptionConfig::from_proto(&Message {
        interfaces: vec!["veth*".to_owned(), "cali?".to_owned()],
        uplinks: vec!["eth0".to_owned()],
        pods: vec![
            message::Pod {
                address: "::ffff:10.0.0.1".to_owned(),
                failure_policy: Some(0),
                direction: Some(1),
                acceleration: Some(2),
            },
            message::Pod { address: "fd00::1".to_owned(), ..message::Pod::default() },
        ],
        excluded_ports: vec![22, 65_535],
        excluded_ranges: vec!["169.254.0.0/16".to_owned()],
        failure_policy: 1,
        outbound_listener: "egress".to_owned(),
        shortcut_cgroup: "/sys/fs/cgroup".to_owned(),
        mark: 7,
        route_table: 8,
        pin_path: "/sys/fs/bpf/node-a".to_owned(),
        host: None,
        balancing: None,
        direction: 1,
        inbound_listener: "ingress".to_owned(),
        inbound_excluded_ports: vec![9090],
        inbound_excluded_ranges: vec!["fd00::/8".to_owned()],
        node_source_ranges: vec!["10.96.0.0/12".to_owned()],
        excluded_uids: vec![0, 1337],
        enrolment: Some(message::Enrolment {
            pod_manifests: "/pods".to_owned(),
            kubernetes: None,
            node_name: "node-a".to_owned(),
            selectors: vec![message::enrolment::Selector { direction: Some(2), ..Default::default() }],
        }),
        state_path: "/var/lib/culvert/enrolled.json".to_owned(),
        acceleration: 1,
        outbound_acceleration: Some(0),
        inbound_acceleration: None,
    });
    let expected = InterceptionConfig {
        interfaces: vec!["veth*".to_owned(), "cali?".to_owned()],
        uplinks: vec!["eth0".to_owned()],
        pods: vec![
            pod_with("10.0.0.1", FailurePolicy::Open, Acceleration::Joined),
            pod_with("fd00::1", FailurePolicy::Closed, Acceleration::Off),
        ],
        policy: Policy {
            failure_policy: FailurePolicy::Closed,
            traffic: Traffic::Inbound,
            acceleration: Acceleration::Off,
        },
        enrolment: Some(Enrolment {
            pod_manifests: PathBuf::from("/pods"),
            kubernetes: None,
            node_name: "node-a".to_owned(),
            selectors: vec![super::super::selectors::Selector {
                policy: Policy {
                    failure_policy: FailurePolicy::Closed,
                    traffic: Traffic::Both,
                    acceleration: Acceleration::Off,
                },
                ..Default::default()
            }],
        }),
        state_path: PathBuf::from("/var/lib/culvert/enrolled.json"),
        excluded_ports: vec![22, 65_535],
        excluded_ranges: vec![Range { address: "169.254.0.0".parse().unwrap(), length: 16 }],
        inbound_excluded_ports: vec![9090],
        inbound_excluded_ranges: vec![Range { address: "fd00::".parse().unwrap(), length: 8 }],
        node_source_ranges: vec![Range { address: "10.96.0.0".parse().unwrap(), length: 12 }],
        excluded_uids: vec![0, 1337],
        inbound_listener: "ingress".to_owned(),
        outbound_listener: "egress".to_owned(),
        shortcut_cgroup: Some(PathBuf::from("/sys/fs/cgroup")),
        mark: 7,
        route_table: 8,
        pin_path: PathBuf::from("/sys/fs/bpf/node-a"),
        host: None,
        balancing: None,
        force_clsact: false,
        max_addresses: MAX_PODS,
        listener_acceleration: [Acceleration::Automatic, Acceleration::Joined],
        kernel_release: None,
    };
    assert_eq!(config, Ok(expected));
}

#[test]
fn what_is_wrong_is_named_with_its_path() {
    let pod = |address: &str| message::Pod { address: address.to_owned(), ..message::Pod::default() };
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    for (spoiled, path, words) in [
        (Message { interfaces: Vec::new(), ..good() }, "interfaces", "at least one"),
        (Message { interfaces: texts(&["eth0", ""]), ..good() }, "interfaces[1]", "cannot match"),
        (Message { uplinks: texts(&["a-name-longer-than-any"]), ..good() }, "uplinks[0]", "15 characters"),
        (Message { pods: vec![pod("10.0.0")], ..good() }, "pods[0].address", "`10.0.0` is not"),
        (Message { pods: vec![pod("127.0.0.1")], ..good() }, "pods[0].address", "address of a pod"),
        (Message { pods: vec![pod("10.0.0.1"), pod("10.0.0.1")], ..good() }, "pods[1].address", "twice"),
        (
            Message { pods: vec![message::Pod { failure_policy: Some(9), ..pod("10.0.0.1") }], ..good() },
            "pods[0].failure_policy",
            "FAIL_CLOSED",
        ),
        (Message { excluded_ports: vec![80, 65_536], ..good() }, "excluded_ports[1]", "1 to 65535"),
        (Message { excluded_ports: vec![0], ..good() }, "excluded_ports[0]", "1 to 65535"),
        (Message { excluded_ranges: texts(&["10.0.0.0/40"]), ..good() }, "excluded_ranges[0]", "0 to 32"),
        (Message { failure_policy: 2, ..good() }, "failure_policy", "FAIL_OPEN"),
        (Message { direction: 3, ..good() }, "direction", "OUTBOUND"),
        (Message { inbound_excluded_ranges: texts(&["x"]), ..good() }, "inbound_excluded_ranges[0]", "address range"),
        (Message { shortcut_cgroup: "pods".to_owned(), ..good() }, "shortcut_cgroup", "absolute"),
        (Message { acceleration: 9, ..good() }, "acceleration", "JOINED"),
        (Message { acceleration: 2, ..good() }, "acceleration", "shortcut_cgroup"),
        (Message { inbound_acceleration: Some(1), ..good() }, "inbound_acceleration", "shortcut_cgroup"),
        (Message { route_table: 254, ..good() }, "route_table", "kernel's own"),
        (Message { pin_path: "bpf".to_owned(), ..good() }, "pin_path", "absolute"),
        (Message { pin_path: "/sys/fs/bpf/v1.0".to_owned(), ..good() }, "pin_path", "no dots"),
        (Message { pin_path: "/".to_owned(), ..good() }, "pin_path", "directory of its own"),
    ] {
        let (found_path, found_words) = InterceptionConfig::from_proto(&spoiled).expect_err(path);
        assert_eq!(found_path, path);
        assert!(found_words.contains(words), "{path}: {found_words}");
    }
}

#[test]
fn cgroups_that_are_one_below_the_other_are_noticed() {
    for (one, other, expected) in [
        ("/cg/a", "/cg/a", true),
        ("/cg/a", "/cg/a/b", true),
        ("/cg/a/b", "/cg", true),
        ("/cg/a", "/cg/b", false),
        ("/cg/a", "/cg/ab", false),
        ("/cg/shop-*.service", "/cg/shop-web.service/inner", true),
        ("/cg/shop-?", "/cg/shop-10", false),
        ("/cg/a/c", "/cg/*/b", false),
    ] {
        assert_eq!(nests(one, other), expected, "{one} and {other}");
        assert_eq!(nests(other, one), expected, "{other} and {one}");
    }
}

#[test]
fn pods_of_an_api_server_are_those_of_one_node() {
    let enrolment = Enrolment { kubernetes: Some(Default::default()), ..Enrolment::default() };
    let config = InterceptionConfig { enrolment: Some(enrolment), ..InterceptionConfig::default() };
    assert_eq!(config.clone().on_node("").unwrap_err().0, "enrolment.node_name");
    let name = |config: InterceptionConfig| config.enrolment.unwrap().node_name;
    let told = config.on_node("node-a").unwrap();
    assert_eq!(name(told.clone()), "node-a");
    assert_eq!(name(told.on_node("node-b").unwrap()), "node-a");
}
