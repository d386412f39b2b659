//! `upstream_http_protocol_options`: hosts are asked for what requests call them, and have to have certificates for it, in culvertd and in the
//! real Envoy by the same configuration. Hosts answer with the connection's number and the name that its TLS handshake asked for.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::server;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use testing::{Authority, yaml};

const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const HTTP: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// A host whose certificate is for a.test, *.wild.test, 10.9.9.9 and ::9.
fn host(authority: &Authority) -> Result<u16> {
    let issued = authority.issue_with(&["a.test", "*.wild.test"], &["spiffe://td/x"], |params| {
        let addresses = ["10.9.9.9", "::9"].map(|text| text.parse().expect("an address"));
        params.subject_alt_names.extend(addresses.map(rcgen::SanType::IpAddress));
    });
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let chain = vec![CertificateDer::from_pem_slice(issued.chain.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes())?;
    let config = Arc::new(builder.with_no_client_auth().with_single_cert(chain, key)?);
    let numbers = AtomicU32::new(0);
    server::start(move |stream| {
        let number = numbers.fetch_add(1, Ordering::Relaxed);
        let mut first = [0];
        ensure!(stream.peek(&mut first)? == 1, "closed at once");
        // A handshake begins with this byte, and no request does.
        if first[0] != 22 {
            let mut stream = BufReader::new(stream);
            return serve(&mut stream, &format!("{number} plain"), |stream| stream.get_mut());
        }
        let mut stream = StreamOwned::new(ServerConnection::new(Arc::clone(&config))?, stream);
        stream.conn.complete_io(&mut stream.sock)?;
        let says = format!("{number} {}", stream.conn.server_name().unwrap_or("-"));
        serve(&mut BufReader::new(stream), &says, |stream| stream.get_mut())
    })
}

fn serve<S: std::io::BufRead, W: Write>(stream: &mut S, says: &str, to: impl Fn(&mut S) -> &mut W) -> Result<()> {
    while let Some(request) = Request::read(stream)? {
        // What the host is called when the request arrives is another matter.
        let body = format!("{says} {}", request.headers.get("host").unwrap_or_default());
        write!(to(stream), "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
        to(stream).flush()?;
    }
    Ok(())
}

/// A cluster, what its route does besides, and the requests for it: the host, and the header `x-name`.
struct Case {
    name: &'static str,
    options: &'static str,
    /// `None`: no TLS.
    tls: Option<String>,
    route: &'static str,
    requests: &'static [(&'static str, &'static str)],
}

fn cases(ca: &str) -> Vec<Case> {
    let trusted = |more: &str| {
        format!(", common_tls_context: {{validation_context: {{trusted_ca: {{inline_string: {ca}}}{more}}}}}")
    };
    let uri = |last: &str| {
        trusted(&format!(
            ", match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: \"spiffe://td/{last}\"}}}}]"
        ))
    };
    let case = |name, options, tls: &str, requests| {
        let tls = Some(tls.to_owned());
        Case { name, options, tls, route: "", requests }
    };
    let (sni, both) = ("auto_sni: true", "auto_sni: true, auto_san_validation: true");
    let over = "auto_sni: true, override_auto_sni_header: x-name";
    let some: &[_] = &[("a.test", ""), ("b.test", ""), ("a.test", "")];
    vec![
        case(
            "sni",
            sni,
            "",
            &[
                ("a.test", ""),
                ("b.test", ""),
                ("A.test", ""),
                ("a.test:8443", ""),
                ("10.9.9.9", ""),
                ("[::1]:4", ""),
                ("x_y.test", ""),
                ("a.test", ""),
            ],
        ),
        case("own", sni, ", sni: own.test", &[("10.9.9.9", ""), ("b.test", ""), ("[::1]", "")]),
        case("of_host", sni, ", auto_host_sni: true", &[("10.9.9.9", ""), ("b.test", "")]),
        case(
            "both",
            both,
            &trusted(""),
            &[
                ("a.test", ""),
                ("b.test", ""),
                ("x.wild.test", ""),
                ("wild.test", ""),
                ("X.wild.test", ""),
                ("10.9.9.9", ""),
                ("10.9.9.8", ""),
                ("[::9]:443", ""),
                ("[::8]", ""),
                ("a.test", ""),
            ],
        ),
        case("checked", "auto_san_validation: true", &trusted(""), some),
        case("checked_own", "auto_san_validation: true", &format!(", sni: own.test{}", trusted("")), some),
        case("not_trusted", both, "", some),
        case("by_name_too", both, &format!(", auto_sni_san_validation: true{}", trusted("")), some),
        case("uri_too", both, &uri("x"), some),
        case("other_uri", both, &uri("y"), some),
        case("not_wanted", "override_auto_sni_header: x-name", ", sni: own.test", &[("a.test", "b.test")]),
        case(
            "header",
            over,
            "",
            &[("a.test", "o.test"), ("b.test", "o.test:44"), ("a.test", "10.0.0.1"), ("a.test", ""), ("o.test", "")],
        ),
        Case {
            route: ", request_headers_to_add: [{header: {key: x-name, value: added.test}}]",
            ..case("added", over, "", some)
        },
        Case { route: "host_rewrite_literal: lit.test", ..case("literal", sni, "", some) },
        Case { route: "auto_host_rewrite: true", ..case("rewritten", sni, "", some) },
        Case { tls: None, ..case("plain", both, "", some) },
    ]
}

impl Case {
    fn action(&self) -> String {
        let Case { name, route, .. } = self;
        match route.strip_prefix(',') {
            Some(more) => format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}}},{more}}}"),
            None if route.is_empty() => format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}}}}}"),
            None => format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}, {route}}}}}"),
        }
    }

    fn cluster(&self, port: u16) -> Vec<String> {
        let options = format!(
            "typed_extension_protocol_options: {{{HTTP}: {{\"@type\": type.googleapis.com/{HTTP}, explicit_http_config: \
             {{http_protocol_options: {{}}}}, upstream_http_protocol_options: {{{}}}}}}}",
            self.options
        );
        let address = format!("address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}");
        let hosts = format!(
            "load_assignment: {{cluster_name: x, endpoints: [{{lb_endpoints: [{{endpoint: {{hostname: ep.test, {address}}}}}]}}]}}"
        );
        let tls = self
            .tls
            .as_ref()
            .map(|tls| format!("transport_socket: {{name: tls, typed_config: {{\"@type\": {TLS}{tls}}}}}"));
        [options, hosts].into_iter().chain(tls).collect()
    }
}

#[test]
fn hosts_are_asked_for_what_requests_call_them() -> Result<()> {
    let authority = Authority::new("ca");
    let cases = cases(&yaml(&authority.pem));
    let mut seen = Vec::new();
    for kind in KINDS {
        let port = host(&authority)?;
        let web = free_port()?;
        let routes: Vec<_> = cases.iter().map(Case::action).collect();
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let mut bootstrap = Bootstrap::new().http(web, &hosts, &[]);
        for case in &cases {
            let fields = case.cluster(port);
            bootstrap = bootstrap.cluster_of(case.name, &fields.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let mut found = BTreeMap::new();
        for case in &cases {
            // Connections are told apart by the order in which a case uses them.
            let mut connections = HashMap::new();
            let mut answers = Vec::new();
            for (host, name) in case.requests {
                let request = Request::get(&format!("/{}/", case.name)).header("host", host);
                let request = if name.is_empty() { request } else { request.header("x-name", name) };
                let answer = fetch(web, request)?;
                if answer.status != 200 {
                    answers.push(format!("{host}: {}", answer.status));
                    continue;
                }
                let text = answer.text();
                let (number, rest) = text.split_once(' ').context("the connection's number")?;
                let new = connections.len();
                let number = *connections.entry(number.to_owned()).or_insert(new);
                answers.push(match case.tls {
                    Some(_) => format!("{host}: {number} {}", rest.to_ascii_lowercase()),
                    // Envoy keeps connections apart by names that nobody is told.
                    None => format!("{host}: {rest}"),
                });
            }
            found.insert(case.name.to_owned(), answers.join(", "));
        }
        let stats = daemon.stats()?;
        let counted =
            stats.names().filter(|name| name.contains(".ssl.fail_") || name.ends_with("upstream_cx_connect_fail"));
        found.extend(counted.map(|name| (name.to_owned(), stats.get(name).to_string())));
        seen.push(found);
    }
    assert_eq!(seen[1], seen[0]);
    assert_eq!(
        seen[0]["sni"],
        "a.test: 0 a.test a.test, b.test: 1 b.test b.test, A.test: 0 a.test a.test, a.test:8443: 0 a.test a.test:8443, \
         10.9.9.9: 2 - 10.9.9.9, [::1]:4: 2 - [::1]:4, x_y.test: 3 x_y.test x_y.test, a.test: 0 a.test a.test"
    );
    assert_eq!(seen[0]["cluster.both.ssl.fail_verify_san"], "4");
    Ok(())
}
