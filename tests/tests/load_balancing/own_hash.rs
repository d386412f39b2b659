//! Load balancers with hash policies of their own, where nothing is known of routes, or where they make cookies.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::server;

use super::typed;

/// A cluster that hashes by the client's address, and then by a cookie.
fn fields(policy: &str) -> String {
    typed("Maglev", &format!("consistent_hashing_lb_config: {{hash_policy: [{policy}]}}"))
}

#[test]
fn connections_without_requests_are_hashed_by_their_clients() -> Result<()> {
    let named = |name: u8| {
        server::start(move |mut stream| {
            stream.write_all(&[name])?;
            Ok(())
        })
    };
    let hosts = [named(1)?, named(2)?, named(3)?, named(4)?, named(5)?];
    let chosen = |kind: Kind| -> Result<Vec<u8>> {
        let port = free_port()?;
        let policy = fields("{header: {header_name: x-key}}, {connection_properties: {source_ip: true}}");
        let yaml = Bootstrap::new().tcp(port, "app").cluster("app", &hosts, &[&policy]).yaml();
        let _daemon = Daemon::start(kind, &yaml)?;
        let mut chosen = Vec::new();
        for _ in 0..8 {
            let mut name = [0];
            TcpStream::connect(("127.0.0.1", port))?.read_exact(&mut name)?;
            chosen.extend(name);
        }
        Ok(chosen)
    };
    let (ours, theirs) = (chosen(Kind::Culvert)?, chosen(Kind::Envoy)?);
    ensure!(ours == theirs, "{ours:?}, Envoy {theirs:?}");
    ensure!(ours.iter().all(|host| *host == ours[0]), "{ours:?}");
    Ok(())
}

/// The same where the TCP proxy says what by, also through a tunnel.
#[test]
fn tcp_proxies_hash_by_their_clients() -> Result<()> {
    let named = |name: u8| {
        server::start(move |mut stream| {
            // A tunnel is agreed to; whoever asks for none says nothing.
            let (mut first, tunnel) = ([0; 7], name > 5);
            if tunnel {
                stream.read_exact(&mut first)?;
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            }
            stream.write_all(&[name])?;
            // The client closes.
            while stream.read(&mut [0; 512])? > 0 {}
            Ok(())
        })
    };
    let hosts = [named(1)?, named(2)?, named(3)?, named(4)?, named(5)?];
    let others = [named(6)?, named(7)?, named(8)?, named(9)?, named(10)?];
    let chosen = |kind: Kind| -> Result<Vec<u8>> {
        let (ports, mut chosen) = ([free_port()?, free_port()?, free_port()?], Vec::new());
        let by_client = "hash_policy: [{source_ip: {}}]";
        let yaml = Bootstrap::new()
            .tcp_of(ports[0], &format!("cluster: maglev, {by_client}"))
            .tcp_of(ports[1], &format!("cluster: ring, {by_client}"))
            .tcp_of(ports[2], &format!("cluster: tunnel, {by_client}, tunneling_config: {{hostname: 'a.test:80'}}"))
            .cluster("maglev", &hosts, &["lb_policy: MAGLEV"])
            .cluster("ring", &hosts, &["lb_policy: RING_HASH"])
            .cluster("tunnel", &others, &["lb_policy: MAGLEV"])
            .yaml();
        let _daemon = Daemon::start(kind, &yaml)?;
        for port in ports {
            for _ in 0..6 {
                let mut name = [0];
                TcpStream::connect(("127.0.0.1", port))?.read_exact(&mut name)?;
                chosen.extend(name);
            }
        }
        Ok(chosen)
    };
    let (ours, theirs) = (chosen(Kind::Culvert)?, chosen(Kind::Envoy)?);
    ensure!(ours == theirs, "{ours:?}, Envoy {theirs:?}");
    ensure!(ours.chunks(6).all(|hosts| hosts.iter().all(|host| *host == hosts[0])), "{ours:?}");
    Ok(())
}

#[test]
fn clients_get_the_cookies_that_balancers_hash_by() -> Result<()> {
    let named = |name: &'static str| {
        server::start(move |mut stream| {
            let mut requests = BufReader::new(stream.try_clone()?);
            while Request::read(&mut requests)?.is_some() {
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{name}")?;
            }
            Ok(())
        })
    };
    let hosts = [named("a")?, named("b")?, named("c")?, named("d")?];
    let told = |kind: Kind| -> Result<Vec<String>> {
        let web = free_port()?;
        // The route's cookie is not asked for.
        let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, hash_policy: \
                      [{cookie: {name: of-route, ttl: 9s}}]}}]}";
        let policy = fields("{cookie: {name: of-lb, ttl: 60s, path: /x}}");
        let yaml = Bootstrap::new().http(web, routes, &[]).cluster("app", &hosts, &[&policy]).yaml();
        let _daemon = Daemon::start(kind, &yaml)?;
        let first = fetch(web, Request::get("/"))?;
        let cookie = first.headers.get("set-cookie").unwrap_or_default().to_owned();
        let (pair, rest) = cookie.split_once(';').unwrap_or_default();
        let (name, _) = pair.split_once('=').unwrap_or_default();
        let mut told = vec![name.to_owned(), rest.to_owned()];
        // What it was given leads back.
        for _ in 0..8 {
            let again = fetch(web, Request::get("/").header("cookie", &pair.replace('"', "")))?;
            ensure!(again.text() == first.text(), "{kind:?}: another host with {cookie}");
            told.push(again.headers.get("set-cookie").unwrap_or_default().to_owned());
        }
        for key in ["k1", "k2", "k3"] {
            told.push(fetch(web, Request::get("/").header("cookie", &format!("of-lb={key}")))?.text());
        }
        Ok(told)
    };
    let (ours, theirs) = (told(Kind::Culvert)?, told(Kind::Envoy)?);
    ensure!(ours == theirs, "{ours:?}, Envoy {theirs:?}");
    ensure!(ours[0] == "of-lb", "{ours:?}");
    Ok(())
}
