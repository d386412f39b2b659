//! Listeners that change under traffic: which connections and sockets stay.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod support;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use culvert_proxy_daemon::{
    config::model::{Cidr, FilterChain, FilterChainMatch, LbPolicy, ListenAddress, Listener},
    listener::Prints,
    runtime::{DataPlane, Options},
};
use envoy_types::pb::envoy::config::listener::v3 as proto;
use prost::Message;
use support::{KeepAlive, Upstream, cluster, runtime, wait_until};

/// Connections that are told to finish are closed at once.
fn start() -> DataPlane {
    DataPlane::start(Options { workers: 2, drain_time: Duration::ZERO, interception: None }).unwrap()
}

/// A chain for connections to this address, as it is now and as it is told from others.
fn chain(name: &str, to: &str, cluster: &str) -> Arc<FilterChain> {
    let chain_match = FilterChainMatch {
        prefix_ranges: vec![Cidr::new(to.parse().unwrap(), 32).unwrap()],
        ..FilterChainMatch::default()
    };
    let base = support::listener("x", "127.0.0.1:0".parse().unwrap(), support::tcp_chain(cluster));
    let filters = base.filter_chains[0].filters.clone();
    Arc::new(FilterChain { name: name.into(), chain_match, filters, tls: None, transport_socket_connect_timeout: None })
}

fn listener(name: &str, address: SocketAddr, chains: Vec<Arc<FilterChain>>, stat_prefix: &str) -> (Listener, Prints) {
    let message = proto::Listener {
        stat_prefix: stat_prefix.to_owned(),
        filter_chains: chains
            .iter()
            .map(|chain| proto::FilterChain { name: chain.name.to_string(), ..Default::default() })
            .collect(),
        ..Default::default()
    };
    let base = support::listener(name, address, support::tcp_chain("none"));
    (Listener { filter_chains: chains, ..base }, Prints::of(&message.encode_to_vec()).unwrap())
}

async fn apply(plane: &DataPlane, (listener, prints): (Listener, Prints)) -> SocketAddr {
    let name = Arc::clone(&listener.name);
    let prepared = plane.prepare_listener(Arc::new(listener), Some(prints)).unwrap();
    plane.start_listener(prepared).await.unwrap();
    plane.listeners().into_iter().find(|running| running.name == name).unwrap().addresses[0]
}

fn at(ip: &str, address: SocketAddr) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), address.port())
}

#[test]
fn a_change_of_one_filter_chain_keeps_the_connections_of_the_others() {
    runtime().block_on(async {
        let (one, two, three) = (Upstream::http("one"), Upstream::http("two"), Upstream::http("three"));
        let plane = start();
        for (name, upstream) in [("a", &one), ("b", &two), ("c", &three)] {
            plane.upsert_cluster(cluster(name, [upstream.address], LbPolicy::RoundRobin));
        }
        let any: SocketAddr = "0.0.0.0:0".parse().unwrap();
        let kept = || chain("kept", "127.0.0.1", "a");
        let before = listener("l", any, vec![kept(), chain("old", "127.0.0.2", "b")], "s");
        let address = apply(&plane, before).await;
        let mut stays = KeepAlive::connect(at("127.0.0.1", address));
        let mut goes = KeepAlive::connect(at("127.0.0.2", address));
        assert_eq!((stays.get("/").body.as_str(), goes.get("/").body.as_str()), ("one", "two"));

        let after = listener("l", any, vec![kept(), chain("new", "127.0.0.2", "c")], "s");
        assert_eq!(apply(&plane, after).await, address, "the sockets stay");
        assert!(goes.is_closed(), "its chain is gone");
        assert_eq!(stays.get("/").body, "one", "its chain has not changed");
        assert_eq!(support::get(at("127.0.0.2", address), "/", &[]).body, "three");

        // Anything else that changes is a change of all chains.
        let other = listener("l", any, vec![kept(), chain("new", "127.0.0.2", "c")], "other");
        assert_eq!(apply(&plane, other).await, address);
        assert!(stays.is_closed());
        assert_eq!(support::get(at("127.0.0.1", address), "/", &[]).body, "one");
        plane.stop();
    });
}

#[test]
fn a_prepared_listener_refuses_connections_until_it_is_started() {
    runtime().block_on(async {
        let upstream = Upstream::http("one");
        let plane = start();
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let address = support::closed_port();
        let (config, prints) = listener("l", address, vec![chain("c", "127.0.0.1", "a")], "s");
        let prepared = plane.prepare_listener(Arc::new(config), Some(prints)).unwrap();
        assert!(std::net::TcpStream::connect(address).is_err());
        assert!(plane.listeners().is_empty());
        plane.start_listener(prepared).await.unwrap();
        assert_eq!(support::get(address, "/", &[]).body, "one");
        plane.stop();
    });
}

#[test]
fn addresses_that_stay_are_never_closed_and_others_come_and_go() {
    runtime().block_on(async {
        let upstream = Upstream::http("one");
        let plane = start();
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let [first, second, third] = [(); 3].map(|()| support::closed_port());
        let with = |addresses: &[SocketAddr]| {
            let (config, prints) = listener("l", addresses[0], vec![chain("c", "127.0.0.1", "a")], "s");
            let wanted = |address: &SocketAddr| ListenAddress { address: *address, ipv4_compat: false };
            (Listener { addresses: addresses.iter().map(wanted).collect(), ..config }, prints)
        };
        apply(&plane, with(&[first, second])).await;
        let mut connection = KeepAlive::connect(second);
        assert_eq!(connection.get("/").body, "one");
        apply(&plane, with(&[second, third])).await;
        assert_eq!(plane.listeners()[0].addresses, [second, third]);
        assert!(std::net::TcpStream::connect(first).is_err());
        assert_eq!(support::get(third, "/", &[]).body, "one");
        assert_eq!(support::get(second, "/", &[]).body, "one");
        assert_eq!(connection.get("/").body, "one", "its chain has not changed");
        plane.remove_listener("l").await;
        for address in [second, third] {
            assert!(std::net::TcpStream::connect(address).is_err());
        }
        wait_until("no connection is left", || plane.connections() == 0);
        plane.stop();
    });
}

#[test]
fn a_listener_that_cannot_be_bound_leaves_the_version_before_alone() {
    runtime().block_on(async {
        let upstream = Upstream::http("one");
        let plane = start();
        plane.upsert_cluster(cluster("a", [upstream.address], LbPolicy::RoundRobin));
        let first = support::closed_port();
        apply(&plane, listener("l", first, vec![chain("c", "127.0.0.1", "a")], "s")).await;
        let mut connection = KeepAlive::connect(first);
        assert_eq!(connection.get("/").body, "one");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (config, prints) = listener("l", taken.local_addr().unwrap(), vec![chain("c", "127.0.0.1", "a")], "s");
        let error = plane.prepare_listener(Arc::new(config), Some(prints)).unwrap_err();
        assert!(error.contains("in use"), "{error}");
        assert_eq!(connection.get("/").body, "one");
        assert_eq!(support::get(first, "/", &[]).body, "one");
        plane.stop();
    });
}
