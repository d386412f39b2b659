//! The packet programs, attached, on the running kernel.

mod kernel_lab;

use std::os::fd::AsFd as _;

use kernel_lab::*;

#[test]
fn new_connections_reach_a_worker_with_their_destination() {
    let lab = Lab::new();
    let interception = lab.start(lab.config(), 2);
    let workers = [lab.node.listen_transparent("0.0.0.0:15001"), lab.node.listen_transparent("[::]:15002")];
    interception.set_listener(0, workers[0].as_fd()).expect("IPv4 listener");
    interception.set_listener(1, workers[1].as_fd()).expect("dual-stack listener");

    // Worker 1 is the only one that takes IPv6; IPv4 goes to both.
    for destination in ["[fd00:96::10]:80", "[fd00:201:9::2]:443"] {
        let client = lab.client.connect(destination).expect("IPv6 connects");
        let (accepted, peer) = accept(&workers[1]);
        assert_eq!(accepted.local_addr().unwrap().to_string(), destination);
        assert_eq!(peer, client.local_addr().unwrap());
    }
    let mut taken = [0, 0];
    while taken.contains(&0) {
        assert!(taken[0] + taken[1] < 100, "one worker gets everything: {taken:?}");
        let client = lab.client.connect("10.96.0.10:80").expect("IPv4 connects");
        let (worker, (accepted, peer)) = (0..2)
            .cycle()
            .find_map(|worker| {
                accept_within(&workers[worker], std::time::Duration::from_millis(5)).map(|found| (worker, found))
            })
            .expect("a worker accepts");
        taken[worker] += 1;
        assert_eq!(
            accepted.local_addr().unwrap().to_string().trim_start_matches("[::ffff:").replace(']', ""),
            "10.96.0.10:80"
        );
        assert_eq!(peer.ip().to_canonical(), client.local_addr().unwrap().ip());
    }
    assert_eq!(counter(&interception, "redirected"), 2 + taken[0] + taken[1]);
    lab.node.run(|| interception.shutdown()).expect("shuts down");
}
