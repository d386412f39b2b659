//! `transport_socket_matches`: the same hosts, with the same metadata, of culvertd and of the real Envoy. Hosts answer with how they were
//! asked: plainly, or the name that the TLS handshake asked for.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use testing::Authority;

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const RAW: &str = "type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer";

/// A host that takes both kinds of connections.
fn host(config: &Arc<ServerConfig>) -> Result<u16> {
    let config = Arc::clone(config);
    server::start(move |stream| {
        let mut first = [0];
        ensure!(stream.peek(&mut first)? == 1, "closed at once");
        // A handshake begins with this byte, and no request does.
        if first[0] != 22 {
            return serve(stream, "plain");
        }
        let mut stream = StreamOwned::new(ServerConnection::new(Arc::clone(&config))?, stream);
        stream.conn.complete_io(&mut stream.sock)?;
        let name = format!("tls {}", stream.conn.server_name().unwrap_or("-"));
        serve(stream, &name)
    })
}

fn serve(stream: impl Read + Write, says: &str) -> Result<()> {
    let mut stream = BufReader::new(stream);
    while Request::read(&mut stream)?.is_some() {
        write!(stream.get_mut(), "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{says}", says.len())?;
        stream.get_mut().flush()?;
    }
    Ok(())
}

fn server_config() -> Result<Arc<ServerConfig>> {
    let issued = Authority::new("ca").issue(&["host.test"], &[]);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let chain = vec![CertificateDer::from_pem_slice(issued.chain.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes())?;
    Ok(Arc::new(builder.with_no_client_auth().with_single_cert(chain, key)?))
}

fn tls(sni: &str) -> String {
    format!("{{name: tls, typed_config: {{\"@type\": {TLS}, sni: {sni}}}}}")
}

fn raw() -> String {
    format!("{{name: raw, typed_config: {{\"@type\": {RAW}}}}}")
}

fn matches(all: &[(&str, &str, String)]) -> String {
    let one = |(name, labels, socket): &(&str, &str, String)| {
        format!("{{name: {name}, match: {labels}, transport_socket: {socket}}}")
    };
    format!("transport_socket_matches: [{}]", all.iter().map(one).collect::<Vec<_>>().join(", "))
}

fn metadata(labels: &str) -> String {
    format!("metadata: {{filter_metadata: {{envoy.transport_socket_match: {labels}}}}}")
}

fn endpoint(port: u16, labels: Option<&str>) -> String {
    let metadata = labels.map(|labels| format!(", {}", metadata(labels))).unwrap_or_default();
    format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}{metadata}}}")
}

fn locality(endpoints: &str, more: &str) -> String {
    format!("{{lb_endpoints: [{endpoints}]{more}}}")
}

fn assignment(localities: &str) -> String {
    format!("load_assignment: {{cluster_name: x, endpoints: [{localities}]}}")
}

/// Clusters of one host, with what goes for it.
fn clusters(port: u16) -> Vec<(&'static str, Vec<String>)> {
    let mesh = || {
        matches(&[
            ("mtls", "{tlsMode: istio}", tls("outbound_.80_._.a.default.svc.cluster.local")),
            ("both", "{a: 1, b: [x, {z: true}]}", tls("both.test")),
            ("zone", "{zone: z}", tls("zone.test")),
        ])
    };
    let of = |labels: Option<&str>| assignment(&locality(&endpoint(port, labels), ""));
    let zoned = |labels: Option<&str>| {
        assignment(&locality(&endpoint(port, labels), &format!(", {}", metadata("{zone: z, tlsMode: istio}"))))
    };
    let own = format!("transport_socket: {}", tls("own.test"));
    let any = |first: String, second: String| matches(&[("any", "{}", first), ("later", "{tlsMode: istio}", second)]);
    vec![
        ("mtls", vec![mesh(), of(Some("{tlsMode: istio, more: x}"))]),
        ("other_value", vec![mesh(), of(Some("{tlsMode: disabled}"))]),
        ("nothing_said", vec![mesh(), of(None)]),
        ("all_of_it", vec![mesh(), of(Some("{b: [x, {z: true}], a: 1}"))]),
        ("part_of_it", vec![mesh(), of(Some("{a: 1}"))]),
        ("list_is_not_any", vec![mesh(), of(Some("{tlsMode: [istio]}"))]),
        ("own_socket", vec![own.clone(), mesh(), of(Some("{}"))]),
        ("plain_among_tls", vec![own, matches(&[("raw", "{tls: false}", raw())]), of(Some("{tls: false}"))]),
        ("locality", vec![mesh(), zoned(None)]),
        ("locality_after_endpoint", vec![mesh(), zoned(Some("{zone: z}"))]),
        ("first_counts", vec![any(tls("any.test"), raw()), of(Some("{tlsMode: istio}"))]),
        ("any_without_metadata", vec![any(tls("any.test"), raw()), of(None)]),
        ("same_name", vec![matches(&[("x", "{p: 1}", raw()), ("x", "{p: 2}", tls("x.test"))]), of(Some("{p: 2}"))]),
        ("default", vec![matches(&[("default", "{p: 1}", tls("x.test"))]), of(Some("{p: 1}"))]),
    ]
}

#[test]
fn hosts_are_reached_as_their_metadata_says() -> Result<()> {
    let port = host(&server_config()?)?;
    let mut seen = Vec::new();
    for kind in KINDS {
        let web = free_port()?;
        let route = |name: &str| format!("{{match: {{prefix: /{name}/}}, route: {{cluster: {name}}}}}");
        let clusters = clusters(port);
        let routes: Vec<_> = clusters.iter().map(|(name, _)| route(name)).collect();
        let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
        let mut bootstrap = Bootstrap::new().http(web, &hosts, &[]);
        let mut tcp = BTreeMap::new();
        for (name, fields) in &clusters {
            let fields: Vec<_> = fields.iter().map(String::as_str).collect();
            let listen = free_port()?;
            bootstrap = bootstrap.cluster_of(name, &fields).tcp(listen, name);
            tcp.insert(*name, listen);
        }
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let mut found = BTreeMap::new();
        for (name, _) in &clusters {
            let answer = fetch(web, Request::get(&format!("/{name}/")))?;
            let through_tcp = fetch(tcp[name], Request::get("/"))?;
            found.insert(name.to_string(), format!("{} {}, {}", answer.status, answer.text(), through_tcp.text()));
        }
        let stats = daemon.stats()?;
        let counted =
            stats.names().filter(|name| name.ends_with(".total_match_count") || name.contains(".ssl.handshake"));
        found.extend(counted.map(|name| (name.to_owned(), stats.get(name).to_string())));
        seen.push(found);
    }
    assert_eq!(seen[1], seen[0]);
    assert_eq!(
        seen[0]["mtls"],
        "200 tls outbound_.80_._.a.default.svc.cluster.local, tls outbound_.80_._.a.default.svc.cluster.local"
    );
    assert_eq!(seen[0]["plain_among_tls"], "200 plain, plain");
    assert_eq!(seen[0]["cluster.locality.zone.total_match_count"], "0", "the first match of the locality's");
    Ok(())
}

#[test]
fn metadata_that_changes_is_followed() -> Result<()> {
    let config = server_config()?;
    for kind in KINDS {
        let (port, dir, web) = (host(&config)?, scratch_dir()?, free_port()?);
        let write = |labels: &str| -> Result<()> {
            let text = format!(
                "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: app, endpoints: [{}]}}\n",
                locality(&endpoint(port, Some(labels)), "")
            );
            fs::write(dir.join("new"), text)?;
            Ok(fs::rename(dir.join("new"), dir.join("eds.yaml"))?)
        };
        write("{tlsMode: istio}")?;
        let eds = format!(
            "eds_cluster_config: {{eds_config: {{path_config_source: {{path: {}}}}}}}",
            dir.join("eds.yaml").display()
        );
        let sockets = matches(&[("mtls", "{tlsMode: istio}", tls("a.test")), ("raw", "{tlsMode: disabled}", raw())]);
        let checks = "health_checks: [{timeout: 5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 1, healthy_threshold: 1, \
                      reuse_connection: false, http_health_check: {path: /, receive: [{text: 746c7320612e74657374}]}}]";
        // A connection for each request: those that there are stay as they are, in Envoy too.
        let once = "max_requests_per_connection: 1";
        let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /checked}, route: {cluster: checked}}, {match: {prefix: /}, \
                      route: {cluster: app}}]}";
        let eds_checked = eds.replace("eds_cluster_config: {", "eds_cluster_config: {service_name: app, ");
        let bootstrap =
            Bootstrap::new().http(web, routes, &[]).cluster_of("app", &["type: EDS", &eds, &sockets, once]).cluster_of(
                "checked",
                &[
                    "type: EDS",
                    &eds_checked,
                    &sockets,
                    once,
                    checks,
                    "common_lb_config: {healthy_panic_threshold: {value: 0}}",
                ],
            );
        let daemon = Daemon::start(kind, &format!("node: {{id: a, cluster: b}}\n{}", bootstrap.yaml()))?;
        let says = |path: &str, expected: &str| {
            wait_until(DEADLINE, "the answer", || {
                let answer = fetch(web, Request::get(path))?;
                let text = format!("{} {}", answer.status, answer.text());
                ensure!(text.starts_with(expected), "{kind:?}: {text}");
                Ok(())
            })
        };
        says("/", "200 tls a.test")?;
        says("/checked", "200 tls a.test")?;
        write("{tlsMode: disabled}")?;
        says("/", "200 plain")?;
        // The check goes the new way too, and is not answered with what it wants.
        says("/checked", "503 no healthy upstream")?;
        write("{tlsMode: istio}")?;
        says("/", "200 tls a.test")?;
        says("/checked", "200 tls a.test")?;
        ensure!(daemon.stats()?.get("cluster.app.raw.total_match_count") > 0, "{kind:?}");
    }
    Ok(())
}

#[test]
fn checks_may_choose_another_socket() -> Result<()> {
    let port = host(&server_config()?)?;
    let mut seen = Vec::new();
    for kind in KINDS {
        let web = free_port()?;
        let check = |criteria: &str, wanted: &str| {
            let wanted: String = wanted.bytes().map(|byte| format!("{byte:02x}")).collect();
            format!(
                "health_checks: [{{timeout: 5s, interval: 600s, unhealthy_threshold: 1, healthy_threshold: 1, {criteria}http_health_check: \
                 {{path: /, receive: [{{text: {wanted}}}]}}}}]"
            )
        };
        let sockets = matches(&[("mtls", "{tlsMode: istio}", tls("a.test")), ("zone", "{zone: z}", tls("zone.test"))]);
        let labels = |labels: &str| format!("transport_socket_match_criteria: {labels}, ");
        let hosts = assignment(&locality(&endpoint(port, Some("{tlsMode: istio}")), ""));
        let zoned = assignment(&locality(&endpoint(port, None), &format!(", {}", metadata("{zone: z}"))));
        let clusters = [
            ("as_used", check("", "tls a.test"), &hosts),
            ("plainly", check(&labels("{tlsMode: none}"), "plain"), &hosts),
            ("by_nothing", check(&labels("{}"), "plain"), &hosts),
            ("otherwise", check(&labels("{zone: z}"), "tls zone.test"), &hosts),
            ("localitys", check(&labels("{tlsMode: none}"), "tls zone.test"), &zoned),
            ("other_answer", check(&labels("{zone: z}"), "tls a.test"), &hosts),
        ];
        let mut bootstrap = Bootstrap::new();
        for (name, check, assignment) in &clusters {
            bootstrap = bootstrap.cluster_of(name, &[&sockets, check, assignment]);
        }
        let bootstrap = bootstrap.http(web, "- {name: all, domains: ['*'], routes: []}", &[]);
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let stats = daemon.stats()?;
        let wanted = [".total_match_count", "health_check.success", "health_check.failure", "membership_healthy"];
        let names = stats.names().filter(|name| wanted.iter().any(|end| name.ends_with(end)));
        seen.push(names.map(|name| (name.to_owned(), stats.get(name))).collect::<BTreeMap<_, _>>());
    }
    assert_eq!(seen[1], seen[0]);
    let passed: Vec<_> = seen[0]
        .iter()
        .filter(|(name, count)| name.ends_with("success") && **count == 1)
        .map(|it| it.0.clone())
        .collect();
    assert_eq!(passed.len(), 5, "{passed:?}");
    Ok(())
}
