//! Names that flap and lie: they lead to other hosts all the time, to some where nobody is, and often the server fails.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::name_server::{NameServer, Says};
use culvert_tests::wait_until;

use super::clients::{Clients, Count};

const DEADLINE: Duration = Duration::from_secs(30);
const NAME: &str = "flaps.example";
/// Somebody is at `127.0.4.1` and `127.0.4.2`, at the others nobody.
const PEOPLED: [u8; 2] = [1, 2];

fn hosts() -> Result<u16> {
    let port = free_port()?;
    for number in PEOPLED {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 4, number), port))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || -> Result<()> {
                    let mut reader = std::io::BufReader::new(stream);
                    while Request::read(&mut reader)?.is_some() {
                        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
                    }
                    Ok(())
                });
            }
        });
    }
    Ok(port)
}

fn addresses(numbers: &[u8]) -> Says {
    let address = |number: &u8| IpAddr::from(Ipv4Addr::new(127, 0, 4, *number));
    Says::Addresses(numbers.iter().map(address).collect(), 60)
}

fn weather(kind: Kind) -> Result<Count> {
    let (names, port, listen) = (NameServer::start()?, hosts()?, free_port()?);
    names.say(NAME, addresses(&[1]));
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 5s, retry_policy: {retry_on: \
                  'connect-failure,reset', num_retries: 8}}}]}";
    let resolver = format!(
        "typed_dns_resolver_config: {{name: envoy.network.dns_resolver.cares, typed_config: {{'@type': \
         type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig, resolvers: [{{socket_address: \
         {{address: 127.0.0.1, port_value: {}}}}}], dns_resolver_options: {{no_default_search_domain: true}}, query_tries: 1}}}}",
        names.port
    );
    let endpoint = format!("{{endpoint: {{address: {{socket_address: {{address: {NAME}, port_value: {port}}}}}}}}}");
    let assignment = format!("load_assignment: {{cluster_name: app, endpoints: [{{lb_endpoints: [{endpoint}]}}]}}");
    let fields = [
        "type: STRICT_DNS",
        "dns_lookup_family: V4_ONLY",
        "dns_refresh_rate: 0.02s",
        "dns_failure_refresh_rate: {base_interval: 0.02s, max_interval: 0.02s}",
        "circuit_breakers: {thresholds: [{max_retries: 1000}]}",
        &resolver,
        &assignment,
    ];
    let proxy = Daemon::start(kind, &Bootstrap::new().http(listen, routes, &[]).cluster_of("app", &fields).yaml())?;
    wait_until(DEADLINE, "the first answer", || {
        ensure!(fetch(listen, Request::get("/"))?.status == 200, "no host yet");
        Ok(())
    })?;
    let clients = Clients::start(listen, &["/"]);
    for round in 0..15 {
        let says = match round % 5 {
            0 => addresses(&[2, 3]),
            1 => Says::Failure,
            2 => addresses(&[1, 3, 4]),
            3 => addresses(&[2]),
            _ => addresses(&[1, 2]),
        };
        names.say(NAME, says);
        names.wait_asked(NAME, DEADLINE)?;
    }
    let [count] = <[Count; 1]>::try_from(clients.stop()?).ok().context("one count")?;
    ensure!(proxy.stats()?.get("cluster.app.membership_change") > 5, "the hosts have not changed");
    Ok(count)
}

#[test]
fn names_flap_and_lie() -> Result<()> {
    let envoy = weather(Kind::Envoy).context("Envoy")?;
    let culvert = weather(Kind::Culvert).context("culvertd")?;
    println!("Envoy {envoy:?}, culvertd {culvert:?}");
    ensure!(culvert.requests > 20, "{culvert:?}");
    ensure!(
        culvert.failed() <= envoy.failed() + culvert.requests / 200,
        "culvertd failed {culvert:?}, Envoy {envoy:?}"
    );
    Ok(())
}
