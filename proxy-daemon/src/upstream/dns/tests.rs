use std::{net::IpAddr, slice};

use super::*;
use crate::config::model::Discovery;

fn answer(addresses: &[&str], ttl: Option<u64>) -> Answer {
    let addresses = addresses.iter().map(|address| address.parse::<IpAddr>().unwrap());
    Answer { addresses: addresses.collect(), ttl: ttl.map(Duration::from_secs) }
}

fn name() -> Name {
    Name { host: "up".into(), port: 80, addresses: Vec::new(), failures: 0, failing: false }
}

/// A cluster whose only endpoint is the name `up`.
fn config(discovery: Discovery) -> ClusterConfig {
    use crate::config::parse;
    let cluster = culvert_xds_client::json::from_yaml(
        "{ name: a, type: STRICT_DNS, load_assignment: { cluster_name: a, endpoints: [{ priority: 2, lb_endpoints: [{ \
         endpoint: { address: { socket_address: { address: up, port_value: 80 } } } }] }] } }",
    );
    ClusterConfig { discovery, ..parse::cluster(&cluster.unwrap(), "").unwrap() }
}

#[test]
fn every_address_is_a_host_of_a_strict_cluster() {
    let mut name = name();
    assert!(name.take(&answer(&["10.0.0.2", "10.0.0.1"], None), false));
    assert!(!name.take(&answer(&["10.0.0.1", "10.0.0.2"], None), false), "servers shuffle them");
    let found = endpoints(&config(Discovery::StrictDns(DnsOptions::default())), slice::from_ref(&name));
    let addresses: Vec<_> = found[0].endpoints.iter().map(|endpoint| endpoint.address.dial()).collect();
    assert_eq!(addresses, ["10.0.0.1:80", "10.0.0.2:80"]);
    assert_eq!((&*found[0].endpoints[0].hostname, found[0].priority), ("up", 2));
    assert!(name.take(&answer(&[], None), false), "there are none any more");
    assert!(endpoints(&config(Discovery::StrictDns(DnsOptions::default())), &[name])[0].endpoints.is_empty());
}

#[test]
fn all_addresses_are_one_host_of_a_logical_cluster() {
    let mut name = name();
    assert!(name.take(&answer(&["10.0.0.2", "10.0.0.1"], None), true));
    assert!(name.take(&answer(&["10.0.0.1", "10.0.0.2"], None), true), "new connections go to another");
    let found = endpoints(&config(Discovery::LogicalDns(DnsOptions::default())), &[name]);
    let [host] = &found[0].endpoints[..] else { panic!("{found:?}") };
    assert_eq!((host.address.dial().as_str(), found[0].priority), ("10.0.0.1:80", 0));
    assert_eq!(*host.additional_addresses, ["10.0.0.2:80".parse().unwrap()]);
}

#[test]
fn answers_are_good_for_as_long_as_is_said() {
    let options = DnsOptions { refresh_rate: Duration::from_secs(7), ..DnsOptions::default() };
    let seconds = |answer: &Answer, options: &DnsOptions| good_for(answer, options).as_secs();
    let (short, unknown, zero) = (answer(&[], Some(2)), answer(&[], None), answer(&[], Some(0)));
    assert_eq!(seconds(&short, &options), 7);
    let options = DnsOptions { respect_ttl: true, ..options };
    assert_eq!([&short, &unknown, &zero].map(|answer| seconds(answer, &options)), [2, 7, 7]);
    let options = DnsOptions { min_ttl: Duration::from_secs(4), ..options };
    assert_eq!([&short, &unknown, &zero].map(|answer| seconds(answer, &options)), [4, 7, 7]);
    let options = DnsOptions { jitter: Duration::from_secs(10), ..options };
    let all: Vec<_> = (0..100).map(|_| good_for(&short, &options).as_millis()).collect();
    assert!(all.iter().all(|time| (4_000..14_000).contains(time)) && all.iter().any(|time| *time > 6_000), "{all:?}");
}

#[test]
fn failures_are_repeated_less_and_less_often() {
    let options = DnsOptions::default();
    assert_eq!(after_failure(9, &options), options.refresh_rate);
    let failure_refresh = Some((Duration::from_secs(1), Duration::from_secs(10)));
    let options = DnsOptions { failure_refresh, ..options };
    for (failures, most) in [(0, 1), (1, 2), (3, 8), (4, 10), (u32::MAX, 10)] {
        let longest = (0..200).map(|_| after_failure(failures, &options)).max().unwrap();
        let most = Duration::from_secs(most);
        assert!(longest <= most && longest > most / 2, "{failures}: {longest:?}");
    }
}
