//! Where connections to hosts come from and what their sockets are like, with culvertd and with the real Envoy on the same bootstrap.

use std::io::BufReader;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::wait_until;
use socket2::SockRef;

const DEADLINE: Duration = Duration::from_secs(20);

/// A host at all addresses of the loopback, which says who has connected and with which segments.
fn host() -> Result<u16> {
    let v4 = TcpListener::bind("0.0.0.0:0")?;
    let port = v4.local_addr()?.port();
    let v6 = TcpListener::bind(SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)))?;
    for listener in [v4, v6] {
        thread::spawn(move || -> Result<()> {
            for stream in listener.incoming() {
                let mut stream = stream?;
                if !matches!(Request::read(&mut BufReader::new(stream.try_clone()?)), Ok(Some(_))) {
                    continue;
                }
                let small = SockRef::from(&stream).tcp_mss()? <= 600;
                let seen = format!("{} {}", stream.peer_addr()?.ip(), if small { "small" } else { "usual" });
                let mut response = Response::new(200, "text/plain", seen.into_bytes());
                response.headers.push("connection", "close");
                let _ = response.write(&mut stream, false);
            }
            Ok(())
        });
    }
    Ok(port)
}

#[test]
fn connections_come_from_where_they_are_told_to() -> Result<()> {
    let host = host()?;
    let at = |address: &str| {
        format!(
            "load_assignment: {{cluster_name: x, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
             {{address: '{address}', port_value: {host}}}}}}}}}]}}]}}"
        )
    };
    // TCP_MAXSEG
    let segments = "{description: small segments, level: 6, name: 2, int_value: 600, state: STATE_PREBIND}";
    let both = format!(
        "upstream_bind_config: {{source_address: {{address: 127.0.0.5, port_value: 0}}, socket_options: [{segments}], \
         extra_source_addresses: [{{address: {{address: '::1', port_value: 0}}, socket_options: {{socket_options: []}}}}]}}"
    );
    let cases = [
        ("plain", String::new(), "127.0.0.1", "127.0.0.1 usual"),
        (
            "from",
            "upstream_bind_config: {source_address: {address: 127.0.0.5, port_value: 0}, freebind: true}".to_owned(),
            "127.0.0.1",
            "127.0.0.5 usual",
        ),
        ("options", format!("upstream_bind_config: {{socket_options: [{segments}]}}"), "127.0.0.1", "127.0.0.1 small"),
        ("both_v4", both.clone(), "127.0.0.1", "127.0.0.5 small"),
        ("both_v6", both, "::1", "::1 usual"),
    ];
    for kind in [Kind::Envoy, Kind::Culvert] {
        let port = free_port()?;
        let routes: Vec<_> = cases
            .iter()
            .map(|(name, ..)| format!("{{match: {{path: /{name}}}, route: {{cluster: {name}}}}}"))
            .collect();
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let mut bootstrap = Bootstrap::new().http(port, &hosts, &[]);
        for (name, fields, address, _) in &cases {
            let assignment = at(address);
            let fields: Vec<&str> = [fields.as_str(), &assignment].into_iter().filter(|it| !it.is_empty()).collect();
            bootstrap = bootstrap.cluster_of(name, &fields);
        }
        let _daemon = Daemon::start(kind, &bootstrap.yaml())?;
        for (name, .., expected) in &cases {
            let seen =
                wait_until(DEADLINE, "an answer", || Ok(fetch(port, Request::get(&format!("/{name}")))?.text()))?;
            assert_eq!(seen, *expected, "{kind:?}: {name}");
        }
        // An address that is not this node's.
        let port = free_port()?;
        let route = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: far}}]}";
        let far = "upstream_bind_config: {source_address: {address: 192.0.2.7, port_value: 0}}";
        let bootstrap = Bootstrap::new().http(port, route, &[]).cluster_of("far", &[far, &at("127.0.0.1")]);
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let answer = fetch(port, Request::get("/")).with_context(|| format!("{kind:?}"))?;
        assert_eq!(answer.status, 503, "{kind:?}");
        assert!(daemon.stats()?.get("cluster.far.upstream_cx_connect_fail") > 0, "{kind:?}");
    }
    Ok(())
}

#[test]
fn what_holds_for_all_clusters_holds_where_they_say_nothing() -> Result<()> {
    let host = host()?;
    // TCP_MAXSEG
    let segments = "socket_options: [{level: 6, name: 2, int_value: 500, state: STATE_PREBIND}]";
    let usual = "socket_options: [{level: 6, name: 2, int_value: 1400, state: STATE_PREBIND}]";
    let from = |address: &str| format!("source_address: {{address: {address}, port_value: 0}}");
    let cases = [
        ("silent", String::new(), "127.0.0.5 small"),
        ("from", format!("upstream_bind_config: {{{}}}", from("127.0.0.6")), "127.0.0.6 small"),
        ("options", format!("upstream_bind_config: {{{usual}}}"), "127.0.0.1 usual"),
        ("all", format!("upstream_bind_config: {{{}, {usual}}}", from("127.0.0.7")), "127.0.0.7 usual"),
    ];
    for kind in [Kind::Envoy, Kind::Culvert] {
        let port = free_port()?;
        let route =
            |(name, ..): &(&str, String, &str)| format!("{{match: {{path: /{name}}}, route: {{cluster: {name}}}}}");
        let routes: Vec<_> = cases.iter().map(route).collect();
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let mut bootstrap = Bootstrap::new().http(port, &hosts, &[]);
        for (name, fields, _) in &cases {
            let fields: &[&str] = if fields.is_empty() { &[] } else { &[fields] };
            bootstrap = bootstrap.cluster(name, &[host], fields);
        }
        let manager = format!(
            "cluster_manager: {{upstream_bind_config: {{{}, {segments}, local_address_selector: {{name: \
             envoy.upstream.local_address_selector.default_local_address_selector, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.config.upstream.local_address_selector.v3.DefaultLocalAddressSelector}}}}}}}}\n",
            from("127.0.0.5")
        );
        let _daemon = Daemon::start(kind, &format!("{manager}{}", bootstrap.yaml()))?;
        for (name, _, expected) in &cases {
            let seen = fetch(port, Request::get(&format!("/{name}")))?.text();
            assert_eq!(seen, *expected, "{kind:?}: {name}");
        }
    }
    Ok(())
}

/// Needs root, as such sockets do.
#[test]
fn connections_come_from_the_client_where_that_is_wanted() -> Result<()> {
    let host = host()?;
    let filter = "          http_filters:
          - name: envoy.filters.http.original_src
            typed_config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.original_src.v3.OriginalSrc}
";
    for kind in [Kind::Envoy, Kind::Culvert] {
        let port = free_port()?;
        let route = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let bootstrap = Bootstrap::new().http(port, route, &["use_remote_address: true", "xff_num_trusted_hops: 1"]);
        let yaml = bootstrap.cluster("app", &[host], &[]).yaml().replacen("          http_filters:\n", filter, 1);
        let _daemon = Daemon::start(kind, &yaml)?;
        for (client, forwarded, expected) in [
            ("127.0.0.9", None, "127.0.0.9 usual"),
            ("127.0.0.10", None, "127.0.0.10 usual"),
            // What a proxy before this one says of its client.
            ("127.0.0.9", Some("127.0.0.11"), "127.0.0.11 usual"),
        ] {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
            socket.bind(&SocketAddr::new(client.parse()?, 0).into())?;
            socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into())?;
            let mut stream = BufReader::new(std::net::TcpStream::from(socket));
            let mut request = Request::get("/").header("host", "a");
            if let Some(forwarded) = forwarded {
                request = request.header("x-forwarded-for", forwarded);
            }
            request.write(stream.get_mut())?;
            let seen = Response::read(&mut stream, "GET")?;
            assert_eq!(seen.text(), expected, "{kind:?}: {client} {forwarded:?}");
        }
    }
    Ok(())
}
