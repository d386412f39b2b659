//! The data plane driven by its own handle: real sockets, no protobuf, no control plane.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod support;

use std::{sync::Arc, time::Duration};

use support::{Upstream, cluster, get, http_listener, runtime, tcp_listener, wait_until};

use culvert_proxy_daemon::{
    config::model::{EndpointAddress, HealthStatus, LbPolicy, LeastRequest, RetryOn},
    runtime::{DataPlane, Options},
};

fn start(workers: usize) -> DataPlane {
    DataPlane::start(Options { workers, drain_time: Duration::from_secs(5), interception: None }).unwrap()
}

#[test]
fn a_request_reaches_the_upstream_and_comes_back() {
    runtime().block_on(async {
        let upstream = Upstream::http("hello");
        let plane = start(2);
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        for _ in 0..20 {
            let response = get(address, "/x?y=1", &[("x-test", "1")]);
            assert_eq!(response.status, 200, "{response:?}");
            assert_eq!(response.body, "hello");
            assert_eq!(response.header("server"), Some("envoy"));
            assert!(response.header("x-envoy-upstream-service-time").is_some());
        }
        let seen = upstream.last_request();
        assert!(seen.starts_with("GET /x?y=1 HTTP/1.1\r\n"), "{seen}");
        assert!(seen.contains("x-test: 1") && seen.contains("x-request-id: "), "{seen}");
        assert!(seen.contains("x-envoy-expected-rq-timeout-ms: 15000"), "{seen}");
        assert!(upstream.connections() <= 2, "one pooled connection a worker, not {}", upstream.connections());
        plane.stop();
    });
}

#[test]
fn hosts_that_leave_get_nothing_new_and_lose_nothing() {
    runtime().block_on(async {
        let (one, two) = (Upstream::http("one"), Upstream::http("two"));
        let plane = start(1);
        plane.upsert_cluster(cluster("a", [one.address, two.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let bodies: Vec<_> = (0..10).map(|_| get(address, "/", &[]).body).collect();
        assert_eq!(bodies.iter().filter(|body| *body == "one").count(), 5, "{bodies:?}");

        let mut endpoints = cluster("a", [one.address, two.address], LbPolicy::RoundRobin).endpoints;
        endpoints[0].endpoints[1].health = HealthStatus::Draining;
        plane.set_endpoints("a", &endpoints);
        for _ in 0..10 {
            assert_eq!(get(address, "/", &[]).body, "one", "a draining host gets nothing new");
        }
        plane.set_endpoints("a", &[]);
        let response = get(address, "/", &[]);
        assert_eq!((response.status, response.body.as_str()), (503, "no healthy upstream"));
        plane.stop();
    });
}

#[test]
fn failures_have_envoys_words() {
    runtime().block_on(async {
        let refused = support::closed_port();
        let silent = Upstream::silent();
        let plane = start(1);
        plane.upsert_cluster(cluster("refused", [refused], LbPolicy::RoundRobin));
        plane.upsert_cluster(cluster("silent", [silent.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "one", "refused", |_| {}).await;
        let response = get(address, "/", &[]);
        assert_eq!(response.status, 503);
        assert_eq!(
            response.body,
            "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure"
        );
        let address =
            http_listener(&plane, "two", "silent", |action| action.timeout = Some(Duration::from_millis(50))).await;
        let response = get(address, "/", &[]);
        assert_eq!((response.status, response.body.as_str()), (504, "upstream request timeout"));
        let address = http_listener(&plane, "three", "missing", |_| {}).await;
        assert_eq!(get(address, "/", &[]).status, 503);
        plane.stop();
    });
}

#[test]
fn a_connect_failure_is_retried_on_another_host() {
    runtime().block_on(async {
        let (refused, upstream) = (support::closed_port(), Upstream::http("ok"));
        let plane = start(1);
        plane.upsert_cluster(cluster("a", [refused, upstream.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "l", "a", |action| {
            let retry_on = RetryOn { connect_failure: true, ..RetryOn::default() };
            action.retry_policy = Some(Arc::new(support::retry(retry_on, 1)));
        })
        .await;
        for _ in 0..10 {
            assert_eq!(get(address, "/", &[]).status, 200);
        }
        plane.stop();
    });
}

#[test]
fn a_dead_pooled_connection_costs_no_request() {
    runtime().block_on(async {
        let upstream = Upstream::http_closing_after(1);
        let plane = start(1);
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let open = plane.clusters()["a"].stats.upstream_cx_active;
        for _ in 0..50 {
            assert_eq!(get(address, "/", &[]).status, 200);
            wait_until("the close has been noticed", || open.value() == 0);
        }
        assert_eq!(upstream.connections(), 50);
        plane.stop();
    });
}

#[test]
fn tcp_is_carried_and_half_close_kept() {
    runtime().block_on(async {
        let upstream = Upstream::echo_after_eof();
        let plane = start(2);
        plane.upsert_cluster(cluster(
            "a",
            [upstream.address],
            LbPolicy::LeastRequest(LeastRequest { choice_count: 2, ..LeastRequest::default() }),
        ));
        let address = tcp_listener(&plane, "l", "a").await;
        let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        assert_eq!(support::send_and_finish(address, &sent), sent);
        plane.stop();
    });
}

#[test]
fn a_removed_listener_refuses_and_its_connections_finish() {
    runtime().block_on(async {
        let upstream = Upstream::http("x");
        let plane = start(2);
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let address = http_listener(&plane, "l", "a", |_| {}).await;
        let mut kept = support::KeepAlive::connect(address);
        assert_eq!(kept.get("/").status, 200);
        assert_eq!(plane.connections(), 1);
        plane.remove_listener("l").await;
        assert!(std::net::TcpStream::connect(address).is_err(), "the sockets are closed");
        let last = kept.get("/");
        assert_eq!(last.status, 200, "a client that comes back at this moment loses nothing");
        assert_eq!(last.header("connection"), Some("close"));
        assert!(kept.is_closed());
        wait_until("no connection is left", || plane.connections() == 0);
        plane.stop();
    });
}

#[test]
fn a_port_in_use_is_named() {
    runtime().block_on(async {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let plane = start(2);
        let listener = support::listener("l", taken.local_addr().unwrap(), support::tcp_chain("a"));
        let error = plane.upsert_listener(Arc::new(listener)).await.unwrap_err();
        let expected = format!("cannot bind {}: the address is in use by another process", taken.local_addr().unwrap());
        assert_eq!(error, expected);
        assert!(plane.listeners().is_empty());
        plane.stop();
    });
}

#[test]
fn endpoints_without_an_address_are_not_hosts() {
    runtime().block_on(async {
        let plane = start(1);
        let mut config = cluster("a", [support::closed_port()], LbPolicy::Random);
        config.endpoints[0].endpoints[0].address = EndpointAddress::Dns { host: "x".into(), port: 1 };
        plane.upsert_cluster(config);
        assert!(plane.clusters()["a"].hosts().hosts.is_empty());
        plane.stop();
    });
}
