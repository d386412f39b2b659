//! TLS with secrets of SDS, in culvertd and in the real Envoy by the same pushes: chains by server name, ALPN, certificates of
//! clients, TLS to hosts, rotation, and what is shown of all that.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::control_plane::{ControlPlane, Push, Resource, Stream};
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret::Type,
};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use testing::{Authority, Issued};

const DEADLINE: Duration = Duration::from_secs(20);
const TLS: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3";

fn source(text: &str) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..Default::default() })
}

fn secret(name: &str, version: &str, content: Type) -> Resource {
    let message = Secret { name: name.to_owned(), r#type: Some(content) };
    let body = Any { type_url: Secret::type_url(), value: message.encode_to_vec() };
    Resource { name: name.to_owned(), version: version.to_owned(), body }
}

fn certificate(chain: &Issued, key: &Issued) -> Type {
    Type::TlsCertificate(TlsCertificate {
        certificate_chain: source(&chain.chain),
        private_key: source(&key.key),
        ..Default::default()
    })
}

fn issuers(authority: &Authority) -> Type {
    Type::ValidationContext(CertificateValidationContext { trusted_ca: source(&authority.pem), ..Default::default() })
}

/// A TLS connection of a client that shows `own`.
struct Client {
    stream: StreamOwned<ClientConnection, TcpStream>,
}

impl Client {
    fn connect(port: u16, name: &str, alpn: &[&str], trusted: &Authority, own: Option<&Issued>) -> Result<Client> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(trusted.pem.as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let builder = builder.with_root_certificates(roots);
        let mut config = match own {
            Some(own) => {
                let chain = vec![CertificateDer::from_pem_slice(own.chain.as_bytes())?];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(own.key.as_bytes())?)?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let connection = ClientConnection::new(Arc::new(config), name.to_owned().try_into()?)?;
        let socket = TcpStream::connect(("127.0.0.1", port))?;
        socket.set_read_timeout(Some(DEADLINE))?;
        let mut stream = StreamOwned::new(connection, socket);
        stream.conn.complete_io(&mut stream.sock)?;
        Ok(Client { stream })
    }

    /// The body of the answer to one request; a client that is refused learns it here.
    fn get(&mut self) -> Result<String> {
        self.stream.write_all(b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n")?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("no length")?;
        let mut body = vec![0; length.parse()?];
        self.stream.read_exact(&mut body)?;
        Ok(String::from_utf8(body)?)
    }

    fn alpn(&self) -> String {
        self.stream.conn.alpn_protocol().map_or_else(|| "-".to_owned(), |it| String::from_utf8_lossy(it).into_owned())
    }

    /// Whether the server has shown this certificate.
    fn saw(&self, issued: &Issued) -> bool {
        let known = CertificateDer::from_pem_slice(issued.chain.as_bytes());
        let shown = self.stream.conn.peer_certificates().and_then(|chain| chain.first());
        known.is_ok_and(|known| shown == Some(&known))
    }
}

fn manager(stat_prefix: &str, action: &str) -> String {
    format!(
        "filters: [{{name: hcm, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.\
         HttpConnectionManager, stat_prefix: {stat_prefix}, route_config: {{name: r, validate_clusters: false, virtual_hosts: [{{name: v, domains: [\"*\"], routes: \
         [{{match: {{prefix: /}}, {action}}}]}}]}}, http_filters: [{{name: router, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]}}}}]"
    )
}

fn sds(name: &str) -> String {
    format!("{{name: {name}, sds_config: {{ads: {{}}, resource_api_version: V3, initial_fetch_timeout: 0s}}}}")
}

/// `tls`: chains for a.test and b.test with certificates and issuers of SDS, for clients of one name. `front`: plain, and by way
/// of the cluster `loop` a client of `tls`.
fn listeners(tls: u16, front: u16) -> String {
    let says =
        |text: &str| manager(text, &format!("direct_response: {{status: 200, body: {{inline_string: {text}}}}}"));
    let chain = |name: &str, secret: &str| {
        let validation = format!(
            "combined_validation_context: {{default_validation_context: {{match_typed_subject_alt_names: [{{san_type: URI, matcher: \
             {{exact: \"spiffe://td/client\"}}}}]}}, validation_context_sds_secret_config: {}}}",
            sds("trusted")
        );
        format!(
            "{{filter_chain_match: {{server_names: [{name}.test]}}, transport_socket: {{name: tls, typed_config: {{\"@type\": \
             {TLS}.DownstreamTlsContext, require_client_certificate: true, common_tls_context: {{alpn_protocols: [h2, http/1.1], \
             tls_certificate_sds_secret_configs: [{}], {validation}}}}}}}, {}}}",
            sds(secret),
            says(name)
        )
    };
    format!(
        r#"
- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: tls
  stat_prefix: tls
  address: {{socket_address: {{address: 127.0.0.1, port_value: {tls}}}}}
  listener_filters: [{{name: i, typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}}}]
  filter_chains: [{}, {}]
- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: front
  address: {{socket_address: {{address: 127.0.0.1, port_value: {front}}}}}
  filter_chains: [{{{}}}]
"#,
        chain("a", "own"),
        chain("b", "other"),
        manager("front", "route: {cluster: loop}")
    )
}

/// A client of `tls` with everything by SDS.
fn cluster(tls: u16) -> String {
    format!(
        r#"
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: loop
  connect_timeout: 5s
  load_assignment: {{cluster_name: loop, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {tls}}}}}}}}}]}}]}}
  transport_socket:
    name: tls
    typed_config:
      "@type": {TLS}.UpstreamTlsContext
      sni: a.test
      common_tls_context:
        tls_params: {{tls_maximum_protocol_version: TLSv1_3}}
        tls_certificate_sds_secret_configs: [{}]
        combined_validation_context:
          default_validation_context: {{match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: a.test}}}}]}}
          validation_context_sds_secret_config: {}
"#,
        sds("client"),
        sds("trusted")
    )
}

/// Pushes, and waits for the answer: the reason of a NACK, or nothing.
fn push(stream: &Stream, version: &str, resources: Vec<Resource>, removed: &[&str]) -> Result<Option<String>> {
    stream.push(Push {
        type_url: Secret::type_url(),
        version: version.to_owned(),
        nonce: version.to_owned(),
        resources,
        removed: removed.iter().map(|&name| name.to_owned()).collect(),
    });
    loop {
        let request = stream.next(DEADLINE)?.with_context(|| format!("no answer to {version}"))?;
        if request.nonce == version && request.type_url == Secret::type_url() {
            return Ok(request.error);
        }
    }
}

/// Waits until these secrets have been asked for.
fn asked(stream: &Stream, names: &[&str]) -> Result<()> {
    let mut asked = BTreeSet::new();
    while !names.iter().all(|name| asked.contains(*name)) {
        let request = stream.next(DEADLINE)?.with_context(|| format!("only {asked:?} were asked for"))?;
        asked.extend(request.names);
    }
    Ok(())
}

fn status(port: u16) -> Result<u16> {
    Ok(fetch(port, Request::get("/"))?.status)
}

fn wait_for(what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    wait_until(DEADLINE, what, || {
        ensure!(holds()?, "not yet");
        Ok(())
    })
}

/// The statistics of secrets and handshakes.
fn counted(daemon: &Daemon, seen: &mut Vec<String>) -> Result<()> {
    let leaves = ["update_success", "update_rejected", "init_fetch_timeout", "key_rotation_failed"];
    let stats = daemon.admin("/stats")?;
    let known = |line: &&str| {
        let name = line.split_once(": ").map_or("", |(name, _)| name);
        let leaf = name.rsplit('.').next().unwrap_or_default();
        // Envoy counts what was refused of one in all that are asked for.
        let sds =
            name.starts_with("sds.") && leaves.contains(&leaf) && (leaf != "update_rejected" || name.contains(".own."));
        let ssl = name.contains(".ssl.") || name.contains("ssl_socket_factory.");
        // How often a session is taken up again, and with which group, is the libraries' own.
        let same = !["session_reused", "handshake", "no_certificate", "connection_error"].contains(&leaf)
            && !["ocsp", "was_key_usage", "curves", "sigalgs", "ciphers", "versions", "expiration_unix"]
                .iter()
                .any(|it| name.contains(it))
            && leaf != "ssl_context_update_by_sds";
        sds || ssl && same
    };
    let mut stats: Vec<String> = stats.lines().filter(known).map(str::to_owned).collect();
    stats.sort();
    seen.extend(stats);
    Ok(())
}

/// What is shown of certificates: statistics, the secrets' dump, `/certs`.
fn look(daemon: &Daemon, seen: &mut Vec<String>) -> Result<()> {
    counted(daemon, seen)?;
    let dump: Value = serde_json::from_str(&daemon.admin("/config_dump")?)?;
    let sections = dump["configs"].as_array().context("configs")?;
    let section = sections.iter().find(|it| it["@type"].as_str().is_some_and(|it| it.ends_with("SecretsConfigDump")));
    let mut secrets: Vec<String> = Vec::new();
    for (list, items) in section.context("no secrets")?.as_object().context("an object")? {
        for item in items.as_array().into_iter().flatten() {
            let mut item = item.clone();
            if let Some(item) = item.as_object_mut() {
                item.remove("last_updated");
            }
            secrets.push(format!("{list} {item}"));
        }
    }
    secrets.sort();
    seen.extend(secrets);
    let certs: Value = serde_json::from_str(&daemon.admin("/certs")?)?;
    let mut certs: Vec<String> =
        certs["certificates"].as_array().context("certificates")?.iter().map(Value::to_string).collect();
    certs.sort();
    // Envoy shows one that several use once for each.
    certs.dedup();
    seen.extend(certs);
    Ok(())
}

fn run(kind: Kind, delta: bool, root: &Path, authority: &Authority, issued: &[Issued; 6]) -> Result<Vec<String>> {
    let [own, next, other, client, stranger, mismatched] = issued;
    let control = ControlPlane::start()?;
    let deliver = |type_: &str, resources: &str| -> Result<String> {
        let path = root.join(format!("{kind:?}_{delta}_{type_}.yaml"));
        let beside = path.with_extension("next");
        fs::write(&beside, format!("version_info: \"1\"\nresources:{resources}\n"))?;
        fs::rename(beside, &path)?;
        Ok(path.display().to_string())
    };
    let (lds, cds) = (deliver("lds", " []")?, deliver("cds", " []")?);
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
    let resources = Bootstrap::new().cluster("xds", &[control.address.port()], &[http2]).yaml();
    let api = if delta { "DELTA_GRPC" } else { "GRPC" };
    let daemon = Daemon::start(
        kind,
        &format!(
            "node: {{id: node1, cluster: c1}}
dynamic_resources:
  lds_config: {{path_config_source: {{path: {lds}}}, resource_api_version: V3}}
  cds_config: {{path_config_source: {{path: {cds}}}, resource_api_version: V3}}
  ads_config: {{api_type: {api}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}
{resources}"
        ),
    )?;
    let (tls, front) = (free_port()?, free_port()?);
    deliver("lds", &listeners(tls, front))?;
    let stream = control.stream(DEADLINE)?;
    asked(&stream, &["own", "other", "trusted"])?;
    ensure!(TcpStream::connect(("127.0.0.1", tls)).is_err(), "no secret has arrived");
    let dump: Value = serde_json::from_str(&daemon.admin("/init_dump")?)?;
    let targets = dump["unready_targets_dumps"].as_array().context("nothing is waited for")?;
    let targets = targets.iter().flat_map(|it| it["target_names"].as_array()).flatten();
    let mut seen: Vec<String> = targets.map(Value::to_string).collect();
    ensure!(
        push(
            &stream,
            "1",
            vec![secret("own", "1", certificate(own, own)), secret("other", "1", certificate(other, other))],
            &[]
        )?
        .is_none()
    );
    ensure!(TcpStream::connect(("127.0.0.1", tls)).is_err(), "not all secrets have arrived");
    ensure!(push(&stream, "2", vec![secret("trusted", "2", issuers(authority))], &[])?.is_none());
    wait_for("the port to open", || Ok(TcpStream::connect(("127.0.0.1", tls)).is_ok()))?;

    // Chains by name, protocols, and clients.
    let connect = |name: &str, alpn: &[&str], own: Option<&Issued>| Client::connect(tls, name, alpn, authority, own);
    let mut before = connect("a.test", &["http/1.1"], Some(client))?;
    ensure!(before.saw(own) && before.get()? == "a");
    let mut second = connect("b.test", &[], Some(client))?;
    ensure!(second.saw(other) && second.get()? == "b");
    ensure!(connect("c.test", &[], Some(client)).is_err(), "there is no chain for it");
    for (offered, chosen) in [(&["h2", "http/1.1"][..], "h2"), (&["http/1.1"], "http/1.1"), (&[], "-")] {
        ensure!(connect("a.test", offered, Some(client))?.alpn() == chosen, "{offered:?}");
    }
    for refused in [Some(stranger), None] {
        let answer = connect("a.test", &[], refused).and_then(|mut client| client.get());
        ensure!(answer.is_err(), "{answer:?}");
    }

    // A cluster with everything by SDS: what `tls` sees of it is its certificate.
    deliver("cds", &cluster(tls))?;
    asked(&stream, &["client"])?;
    ensure!(push(&stream, "3", vec![secret("client", "3", certificate(client, client))], &[])?.is_none());
    wait_for("the cluster to answer", || Ok(status(front)? == 200))?;

    // Rotation under an open connection; a bad one; a removal.
    ensure!(push(&stream, "4", vec![secret("own", "4", certificate(next, next))], &[])?.is_none());
    wait_for("the new certificate", || Ok(connect("a.test", &[], Some(client))?.saw(next)))?;
    ensure!(before.get()? == "a" && before.saw(own), "the open connection goes on");
    look(&daemon, &mut seen)?;
    let nack = push(&stream, "5", vec![secret("own", "5", certificate(own, mismatched))], &[])?.context("no NACK")?;
    ensure!(nack.contains("Failed to load private key from <inline>, Cause: "), "{nack}");
    // Envoy's dump shows what it has refused.
    counted(&daemon, &mut seen)?;
    // Envoy takes what is of another type, shows it, and goes on with the one before.
    let trusted = push(&stream, "6", vec![secret("own", "6", issuers(authority))], &[])?;
    ensure!(kind == Kind::Envoy || trusted.is_some_and(|it| it.contains("a tls_certificate is wanted of this secret")));
    if delta {
        ensure!(push(&stream, "7", Vec::new(), &["own"])?.is_none());
    }
    ensure!(connect("a.test", &[], Some(client))?.saw(next), "the last good one stays");
    Ok(seen)
}

fn certificates(authority: &Authority) -> [Issued; 6] {
    [
        authority.issue(&["a.test"], &[]),
        authority.issue(&["a.test"], &["spiffe://td/next"]),
        authority.issue(&["b.test"], &[]),
        authority.issue(&[], &["spiffe://td/client"]),
        authority.issue(&[], &["spiffe://td/stranger"]),
        authority.issue(&["a.test"], &[]),
    ]
}

fn side_by_side(delta: bool) -> Result<()> {
    let root = scratch_dir()?;
    let authority = Authority::new("ca");
    let issued = certificates(&authority);
    let ours = run(Kind::Culvert, delta, &root, &authority, &issued).context("culvertd")?;
    let theirs = run(Kind::Envoy, delta, &root, &authority, &issued).context("envoy")?;
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line)).cloned().collect()
    };
    let (ours, theirs) = (only(&ours, &theirs), only(&theirs, &ours));
    ensure!(ours.is_empty() && theirs.is_empty(), "culvertd: {ours:#?}\nenvoy: {theirs:#?}");
    fs::remove_dir_all(root)?;
    Ok(())
}

#[test]
fn secrets_by_state_of_the_world() -> Result<()> {
    side_by_side(false)
}

#[test]
fn secrets_by_incremental_xds() -> Result<()> {
    side_by_side(true)
}

/// A mounted secret as Kubernetes has it: `tls.crt -> ..data/tls.crt`, and `..data` is a link that is replaced.
fn mount(directory: &Path, version: &str, chain: &Issued, key: Option<&Issued>) -> Result<()> {
    let content = directory.join(format!("..{version}"));
    fs::create_dir_all(&content)?;
    fs::write(content.join("tls.crt"), &chain.chain)?;
    if let Some(key) = key {
        fs::write(content.join("tls.key"), &key.key)?;
    }
    for file in ["tls.crt", "tls.key"].into_iter().filter(|file| !directory.join(file).is_symlink()) {
        symlink(Path::new("..data").join(file), directory.join(file))?;
    }
    symlink(format!("..{version}"), directory.join("..data_tmp"))?;
    Ok(fs::rename(directory.join("..data_tmp"), directory.join("..data"))?)
}

/// A secret in a file that names files, which are rotated; a bad rotation leaves what is there.
#[test]
fn mounted_secrets_are_rotated() -> Result<()> {
    let authority = Authority::new("ca");
    let [one, two, three] = [(); 3].map(|()| authority.issue(&["a.test"], &[]));
    for kind in [Kind::Culvert, Kind::Envoy] {
        for watched in [false, true] {
            let (root, port) = (scratch_dir()?, free_port()?);
            let directory = root.join("mounted");
            mount(&directory, "1", &one, Some(&one))?;
            // Into the link itself: no file ever moves there.
            let (at, more) = match watched {
                true => (directory.join("..data"), format!("watched_directory: {{path: {}}}", directory.display())),
                false => (directory.clone(), String::new()),
            };
            let (chain, key) = (at.join("tls.crt"), at.join("tls.key"));
            fs::write(
                root.join("sds.yaml"),
                format!(
                    "resources: [{{\"@type\": {TLS}.Secret, name: mounted, tls_certificate: {{certificate_chain: {{filename: {}}}, private_key: \
                     {{filename: {}}}, {more}}}}}]",
                    chain.display(),
                    key.display()
                ),
            )?;
            let source = root.join("sds.yaml");
            let daemon = Daemon::start(
                kind,
                &format!(
                    "node: {{id: node1, cluster: c1}}\nstatic_resources: {{listeners: [{{name: tls, address: {{socket_address: {{address: \
                     127.0.0.1, port_value: {port}}}}}, filter_chains: [{{transport_socket: {{name: tls, typed_config: {{\"@type\": \
                     {TLS}.DownstreamTlsContext, common_tls_context: {{tls_certificate_sds_secret_configs: [{{name: mounted, sds_config: \
                     {{path_config_source: {{path: {}}}}}}}]}}}}}}, {}}}]}}]}}",
                    source.display(),
                    manager("m", "direct_response: {status: 204}")
                ),
            )?;
            let saw = |issued: &Issued| Ok(Client::connect(port, "a.test", &[], &authority, None)?.saw(issued));
            let failures = || Ok::<_, anyhow::Error>(daemon.stats()?.get("sds.mounted.key_rotation_failed"));
            ensure!(saw(&one)? && failures()? == 0, "{kind:?}");
            mount(&directory, "2", &two, Some(&two))?;
            wait_for("the new certificate", || saw(&two))?;
            mount(&directory, "3", &three, Some(&two))?;
            wait_for("the failure to be counted", || Ok(failures()? > 0))?;
            ensure!(saw(&two)?, "{kind:?}: the last good one stays");
            let counted = failures()?;
            mount(&directory, "4", &three, None)?;
            wait_for("the failure to be counted", || Ok(failures()? > counted))?;
            ensure!(saw(&two)?, "{kind:?}: the last good one stays");
            mount(&directory, "5", &three, Some(&three))?;
            wait_for("the recovery", || saw(&three))?;
            fs::remove_dir_all(root)?;
        }
    }
    Ok(())
}
