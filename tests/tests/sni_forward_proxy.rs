//! `envoy.filters.network.sni_dynamic_forward_proxy`, of culvertd and of the real Envoy: both ask the same name server for the hosts that TLS
//! clients name, and what clients meet, what logs say and what is counted is the same.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, free_port, scratch_dir};
use culvert_tests::name_server::{NameServer, Says};
use culvert_tests::wait_until;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

const DEADLINE: Duration = Duration::from_secs(30);
const EXTENSIONS: &str = "type.googleapis.com/envoy.extensions";

/// Hosts at all addresses of the loopback: they say where they are, and what they were sent first.
fn hosts() -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || -> Result<()> {
                let mut bytes = [0; 4096];
                let read = stream.read(&mut bytes)?;
                // The first record of a handshake.
                let kind = if bytes[..read].starts_with(&[22, 3]) { "a handshake" } else { "something" };
                stream.write_all(format!("{} got {kind}", stream.local_addr()?.ip()).as_bytes())?;
                Ok(())
            });
        }
    });
    Ok(port)
}

/// What a client for this host says first.
fn hello(name: &str) -> Result<Vec<u8>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let config = config.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into()?)?;
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes)?;
    Ok(bytes)
}

struct Proxy {
    daemon: Daemon,
    port: u16,
    log: std::path::PathBuf,
}

impl Proxy {
    fn start(kind: Kind, names: &NameServer, up: u16, cache: &str) -> Result<Proxy> {
        let (port, log) = (free_port()?, scratch_dir()?.join("log"));
        let (dns, path) = (names.port, log.display());
        let cache = format!(
            "{{name: names, dns_lookup_family: V4_ONLY, typed_dns_resolver_config: {{name: cares, typed_config: {{\"@type\": \
             {EXTENSIONS}.network.dns_resolver.cares.v3.CaresDnsResolverConfig, resolvers: [{{socket_address: {{address: 127.0.0.1, \
             port_value: {dns}}}}}], dns_resolver_options: {{no_default_search_domain: true}}}}}}, {cache}}}"
        );
        let yaml = format!(
            r#"
static_resources:
  listeners:
  - name: tls
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    listener_filters:
    - {{name: tls, typed_config: {{"@type": {EXTENSIONS}.filters.listener.tls_inspector.v3.TlsInspector}}}}
    filter_chains:
    - filters:
      - name: sni
        typed_config:
          "@type": {EXTENSIONS}.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig
          port_value: {up}
          dns_cache_config: {cache}
      - name: tcp
        typed_config:
          "@type": {EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: tcp
          cluster: dynamic
          access_log:
          - name: file
            typed_config:
              "@type": {EXTENSIONS}.access_loggers.file.v3.FileAccessLog
              path: {path}
              log_format: {{text_format_source: {{inline_string: "%REQUESTED_SERVER_NAME% %RESPONSE_FLAGS% %UPSTREAM_HOST% %UPSTREAM_CLUSTER%\n"}}}}
  clusters:
  - name: dynamic
    lb_policy: CLUSTER_PROVIDED
    connect_timeout: 1s
    cluster_type:
      name: envoy.clusters.dynamic_forward_proxy
      typed_config: {{"@type": {EXTENSIONS}.clusters.dynamic_forward_proxy.v3.ClusterConfig, dns_cache_config: {cache}}}
"#
        );
        let flags: &[&str] = if kind == Kind::Envoy { &["--file-flush-interval-msec", "50"] } else { &[] };
        Ok(Proxy { daemon: Daemon::start_with(kind, &yaml, flags)?, port, log })
    }

    /// What a client is told that says this first, and the line of the log, of which there are so many then.
    fn ask(&self, first: &[u8], line: usize, up: u16) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(first)?;
        let mut said = Vec::new();
        // A connection that ends before anybody has read what the client said is reset.
        let _ = stream.read_to_end(&mut said);
        drop(stream);
        let logged = wait_until(DEADLINE, "the log", || {
            let text = fs::read_to_string(&self.log)?;
            ensure!(text.lines().count() == line, "{text}");
            Ok(text.lines().last().unwrap_or_default().replace(&up.to_string(), "PORT"))
        })?;
        Ok(format!("{:?}, logged {logged:?}", String::from_utf8_lossy(&said)))
    }
}

const COUNTED: [&str; 12] = [
    "dns_cache.names.dns_query_attempt",
    "dns_cache.names.dns_query_success",
    "dns_cache.names.dns_query_failure",
    "dns_cache.names.dns_rq_pending_overflow",
    "dns_cache.names.host_added",
    "dns_cache.names.host_overflow",
    "dns_cache.names.num_hosts",
    "cluster.dynamic.membership_total",
    "cluster.dynamic.upstream_cx_total",
    "cluster.dynamic.upstream_cx_none_healthy",
    "cluster.dynamic.upstream_rq_total",
    "tcp.tcp.downstream_cx_total",
];

fn meets(kind: Kind, up: u16) -> Result<Vec<String>> {
    let names = NameServer::start()?;
    names.say("one.example", Says::Addresses(vec![IpAddr::V4(Ipv4Addr::new(127, 0, 3, 1))], 3600));
    names.say("two.example", Says::Addresses(vec![IpAddr::V4(Ipv4Addr::new(127, 0, 3, 2))], 3600));
    names.say("fails.example", Says::Failure);
    let proxy = Proxy::start(kind, &names, up, "max_hosts: 4")?;
    let mut met = Vec::new();
    let clients = ["one.example", "two.example", "one.example", "unknown.example", "fails.example", "fifth.example"];
    for (number, name) in clients.into_iter().enumerate() {
        met.push(proxy.ask(&hello(name)?, number + 1, up)?);
    }
    // One that does not speak TLS names nobody.
    met.push(proxy.ask(b"GET / HTTP/1.1\r\nhost: one.example\r\n\r\n", clients.len() + 1, up)?);
    let shown = |proxy: &Proxy| -> Result<Vec<String>> {
        let stats = proxy.daemon.stats()?;
        Ok(COUNTED.iter().map(|name| format!("{name} {}", stats.get(name))).collect())
    };
    met.extend(shown(&proxy)?);
    let full = Proxy::start(kind, &names, up, "dns_cache_circuit_breaker: {max_pending_requests: 0}")?;
    met.push(full.ask(&hello("one.example")?, 1, up)?);
    met.extend(shown(&full)?);
    Ok(met)
}

#[test]
fn clients_meet_the_hosts_that_they_name_as_in_envoy() -> Result<()> {
    let up = hosts()?;
    let (theirs, ours) = (meets(Kind::Envoy, up)?, meets(Kind::Culvert, up)?);
    assert_eq!(ours, theirs);
    assert!(theirs[0].starts_with("\"127.0.3.1 got a handshake\""), "{}", theirs[0]);
    assert!(theirs[1].starts_with("\"127.0.3.2 got a handshake\""), "{}", theirs[1]);
    Ok(())
}
