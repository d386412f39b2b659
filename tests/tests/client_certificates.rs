//! What routes and hosts are told of clients' certificates, by culvertd and by the real Envoy.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, free_port};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};
use testing::{Authority, Issued, yaml};

/// Takes all certificates, and tells by the route what they are, and by a header what a host would get.
fn config(port: u16, authority: &Authority, own: &Issued) -> String {
    let route = |matched: &str, says: &str| {
        format!(
            "{{match: {{prefix: /, tls_context: {{{matched}}}}}, direct_response: {{status: 200, body: {{inline_string: {says}}}}}}}"
        )
    };
    let routes = [
        route("presented: true, validated: true", "good"),
        route("presented: true, validated: false", "bad"),
        route("presented: false, validated: true", "impossible"),
        route("validated: false", "none"),
    ]
    .join(", ");
    let action = |details: &str, fields: &str| {
        format!(
            "{{action: {{name: a, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.ForwardClientCertConfig, \
             forward_client_cert_details: {details}, set_current_client_cert_details: {{{fields}}}}}}}}}"
        )
    };
    let found = [
        ("subject", action("SANITIZE_SET", "subject: true")),
        ("uri", action("APPEND_FORWARD", "uri: true, dns: true")),
        ("json", action("SANITIZE_SET", "uri: true, format: JSON")),
        ("forward", action("FORWARD_ONLY", "")),
        ("sanitize", action("SANITIZE", "")),
    ];
    let found: Vec<String> = found.iter().map(|(value, action)| format!("{value}: {action}")).collect();
    format!(
        r#"
static_resources:
  listeners:
  - name: l
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_certificates: [{{certificate_chain: {{inline_string: {}}}, private_key: {{inline_string: {}}}}}]
            validation_context: {{trusted_ca: {{inline_string: {}}}, trust_chain_verification: ACCEPT_UNTRUSTED}}
      filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: s
          forward_client_cert_details: SANITIZE_SET
          forward_client_cert_matcher:
            matcher_tree:
              input: {{name: i, typed_config: {{"@type": type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: x-a}}}}
              exact_match_map: {{map: {{{}}}}}
          route_config:
            name: r
            response_headers_to_add: [{{header: {{key: x-told, value: "%REQ(x-forwarded-client-cert)%"}}}}]
            virtual_hosts: [{{name: v, domains: ["*"], routes: [{routes}]}}]
          http_filters: [{{name: router, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
"#,
        yaml(&own.chain),
        yaml(&own.key),
        yaml(&authority.pem),
        found.join(", ")
    )
}

fn client(
    trusted: &Authority,
    own: Option<&Issued>,
    version: &'static SupportedProtocolVersion,
) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(trusted.pem.as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version])?;
    let builder = builder.with_root_certificates(roots);
    Ok(Arc::new(match own {
        Some(own) => {
            let chain = vec![CertificateDer::from_pem_slice(own.chain.as_bytes())?];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes())?)?
        }
        None => builder.with_no_client_auth(),
    }))
}

/// What is said to requests of one connection.
fn told(port: u16, config: &Arc<ClientConfig>) -> Result<Vec<String>> {
    let connection = ClientConnection::new(Arc::clone(config), "a.test".try_into()?)?;
    let socket = TcpStream::connect(("127.0.0.1", port))?;
    socket.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut stream = StreamOwned::new(connection, socket);
    let mut told = Vec::new();
    for more in ["", "x-a: subject", "x-a: uri", "x-a: json", "x-a: forward", "x-a: sanitize", "x-a: other"] {
        let more = if more.is_empty() { String::new() } else { format!("{more}\r\n") };
        write!(stream, "GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-client-cert: Hash=mine\r\n{more}\r\n")?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?;
        let value = |name: &str| {
            let line = head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
            line.unwrap_or_default().to_owned()
        };
        let mut body = vec![0; value("content-length").parse()?];
        stream.read_exact(&mut body)?;
        told.push(format!("{} {}", String::from_utf8(body)?, value("x-told")));
    }
    Ok(told)
}

#[test]
fn certificates_are_told_as_by_envoy() -> Result<()> {
    let (authority, stranger) = (Authority::new("ca"), Authority::new("stranger"));
    let own = authority.issue(&["a.test"], &["spiffe://td/server"]);
    let good = authority.issue(&["client.test"], &["spiffe://td/client"]);
    let bad = stranger.issue(&[], &["spiffe://td/bad"]);
    let mut seen: Vec<Vec<(String, Vec<String>)>> = Vec::new();
    for kind in [Kind::Envoy, Kind::Culvert] {
        let port = free_port()?;
        let _daemon = Daemon::start(kind, &config(port, &authority, &own))?;
        let mut all = Vec::new();
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            for (name, shown) in [("good", Some(&good)), ("bad", Some(&bad)), ("none", None)] {
                let config = client(&authority, shown, version)?;
                // The second time, the session is resumed.
                for time in ["first", "second"] {
                    all.push((format!("{name}, {:?}, {time}", version.version), told(port, &config)?));
                }
            }
        }
        seen.push(all);
    }
    for (theirs, ours) in seen[0].iter().zip(&seen[1]) {
        ensure!(theirs == ours, "{}:\nEnvoy: {:#?}\nculvertd: {:#?}", theirs.0, theirs.1, ours.1);
    }
    let first = |index: usize| seen[0][index].1[0].split(' ').next().unwrap_or_default();
    ensure!([first(0), first(2), first(4)] == ["good", "bad", "none"], "{:#?}", seen[0]);
    Ok(())
}
