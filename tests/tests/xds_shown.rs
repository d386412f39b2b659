//! What is shown of secrets and filters that came over xDS: by `/config_dump` beside the real Envoy, by the client status
//! discovery service, and by `culvert xds status`. Keys are shown nowhere.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::collections::BTreeMap;
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use culvert_tests::binaries::binary;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::control_plane::{ControlPlane, Push, Resource, Stream};
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::wait_until;
use envoy_types::pb::envoy::admin::v3::ClientResourceStatus;
use envoy_types::pb::envoy::config::cluster::v3::{
    Cluster,
    cluster::{ClusterDiscoveryType, DiscoveryType},
};
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, DataSource, ExtensionConfigSource, SocketAddress,
    TransportSocket, TypedExtensionConfig, address, config_source::ConfigSourceSpecifier, data_source::Specifier,
    socket_address::PortSpecifier, transport_socket,
};
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener, filter};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, Secret, TlsCertificate, TlsSessionTicketKeys,
    UpstreamTlsContext, downstream_tls_context::SessionTicketKeysType, secret::Type,
};
use envoy_types::pb::envoy::service::status::v3::{
    ClientStatusRequest, ClientStatusResponse, client_config::GenericXdsConfig,
    client_status_discovery_service_client::ClientStatusDiscoveryServiceClient,
};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use serde_json::Value;
use testing::{Authority, Issued};

const DEADLINE: Duration = Duration::from_secs(20);
const REDACTED: &str = "[redacted]";
/// `[redacted]` in a field of bytes.
const REDACTED_BYTES: &str = "W3JlZGFjdGVkXQ==";
/// 80 bytes are a key of session tickets.
const TICKETS: [&[u8; 80]; 2] = [&[b'T'; 80], &[b'U'; 80]];

fn pack<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn resource<M: Message + Name>(name: &str, message: &M) -> Resource {
    Resource { name: name.to_owned(), version: "1".to_owned(), body: pack(message) }
}

fn text(text: &str) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineString(text.to_owned())), ..Default::default() })
}

fn bytes(bytes: &[u8]) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineBytes(bytes.to_vec())), ..Default::default() }
}

fn certificate(chain: &Issued, key: &Issued) -> TlsCertificate {
    TlsCertificate {
        certificate_chain: text(&chain.chain),
        private_key: Some(bytes(key.key.as_bytes())),
        ..Default::default()
    }
}

fn ads() -> Option<ConfigSource> {
    Some(ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default())),
        ..Default::default()
    })
}

fn sds(name: &str) -> SdsSecretConfig {
    SdsSecretConfig { name: name.to_owned(), sds_config: ads() }
}

fn socket<M: Message + Name>(context: &M) -> Option<TransportSocket> {
    let config = transport_socket::ConfigType::TypedConfig(pack(context));
    Some(TransportSocket { name: "tls".to_owned(), config_type: Some(config) })
}

/// A listener with TLS whose one HTTP filter comes by ECDS.
fn listener(name: &str, tls: &DownstreamTlsContext) -> Result<Listener> {
    let discovered =
        ExtensionConfigSource { config_source: ads(), type_urls: vec![Router::type_url()], ..Default::default() };
    let manager = HttpConnectionManager {
        stat_prefix: name.to_owned(),
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration::default())),
        http_filters: vec![HttpFilter {
            name: "late".to_owned(),
            config_type: Some(http_filter::ConfigType::ConfigDiscovery(discovered)),
            ..Default::default()
        }],
        ..Default::default()
    };
    let manager = filter::ConfigType::TypedConfig(pack(&manager));
    let address = SocketAddress {
        address: "127.0.0.1".to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(free_port()?.into())),
        ..Default::default()
    };
    Ok(Listener {
        name: name.to_owned(),
        address: Some(Address { address: Some(address::Address::SocketAddress(address)) }),
        filter_chains: vec![FilterChain {
            filters: vec![Filter { name: "hcm".to_owned(), config_type: Some(manager) }],
            transport_socket: socket(tls),
            ..Default::default()
        }],
        ..Default::default()
    })
}

/// Everything that the control plane has, by type: keys in secrets, and in a cluster and a listener themselves.
fn resources(own: &Issued) -> Result<BTreeMap<String, Vec<Resource>>> {
    let by_sds = DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext {
            tls_certificate_sds_secret_configs: vec![sds("own")],
            ..Default::default()
        }),
        session_ticket_keys_type: Some(SessionTicketKeysType::SessionTicketKeysSdsSecretConfig(sds("tickets"))),
        ..Default::default()
    };
    let common = CommonTlsContext { tls_certificates: vec![certificate(own, own)], ..Default::default() };
    let tickets = |key: &[u8]| TlsSessionTicketKeys { keys: vec![bytes(key)] };
    let inline = DownstreamTlsContext {
        common_tls_context: Some(common.clone()),
        session_ticket_keys_type: Some(SessionTicketKeysType::SessionTicketKeys(tickets(TICKETS[0]))),
        ..Default::default()
    };
    let upstream = UpstreamTlsContext { common_tls_context: Some(common), ..Default::default() };
    let cluster = Cluster {
        name: "up".to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        transport_socket: socket(&upstream),
        ..Default::default()
    };
    let late = TypedExtensionConfig {
        name: "late".to_owned(),
        typed_config: Some(pack(&Router { suppress_envoy_headers: true, ..Default::default() })),
    };
    let tickets = Secret { name: "tickets".to_owned(), r#type: Some(Type::SessionTicketKeys(tickets(TICKETS[1]))) };
    let secrets = vec![secret(certificate(own, own)), resource("tickets", &tickets)];
    Ok(BTreeMap::from([
        (Cluster::type_url(), vec![resource("up", &cluster)]),
        (
            Listener::type_url(),
            vec![resource("by-sds", &listener("by-sds", &by_sds)?), resource("inline", &listener("inline", &inline)?)],
        ),
        (Secret::type_url(), secrets),
        (TypedExtensionConfig::type_url(), vec![resource("late", &late)]),
    ]))
}

fn secret(certificate: TlsCertificate) -> Resource {
    resource("own", &Secret { name: "own".to_owned(), r#type: Some(Type::TlsCertificate(certificate)) })
}

/// Answers everything that is asked for, until every type is acknowledged with its last answer.
fn serve(stream: &Stream, all: &BTreeMap<String, Vec<Resource>>) -> Result<()> {
    let (mut asked, mut open, mut nonce) = (BTreeMap::new(), BTreeMap::new(), 0);
    let deadline = Instant::now() + DEADLINE;
    while !(asked.len() == all.len() && open.is_empty()) {
        ensure!(Instant::now() < deadline, "asked: {asked:?}; not acknowledged: {open:?}");
        let Some(request) = stream.next(Duration::from_millis(100))? else { continue };
        ensure!(request.error.is_none(), "{request:?}");
        if open.get(&request.type_url) == Some(&request.nonce) {
            open.remove(&request.type_url);
        }
        let Some(known) = all.get(&request.type_url) else { continue };
        let is_new = match stream.delta {
            true => request.nonce.is_empty(),
            false => asked.get(&request.type_url) != Some(&request.names),
        };
        if !is_new {
            continue;
        }
        let wanted = |it: &&Resource| request.names.is_empty() || request.names.contains(&it.name);
        nonce += 1;
        stream.push(Push {
            type_url: request.type_url.clone(),
            version: "1".to_owned(),
            nonce: nonce.to_string(),
            resources: known.iter().filter(wanted).cloned().collect(),
            removed: Vec::new(),
        });
        open.insert(request.type_url.clone(), nonce.to_string());
        asked.insert(request.type_url, request.names);
    }
    Ok(())
}

/// The secrets and filters of `/config_dump`, without times.
fn dumped(daemon: &Daemon) -> Result<Vec<String>> {
    let dump: Value = serde_json::from_str(&daemon.admin("/config_dump")?)?;
    let mut seen = Vec::new();
    for section in dump["configs"].as_array().context("configs")? {
        let of = |name: &str| section["@type"].as_str().is_some_and(|it| it.ends_with(name));
        for (list, items) in section.as_object().context("an object")? {
            for item in
                items.as_array().into_iter().flatten().filter(|_| of("SecretsConfigDump") || of("EcdsConfigDump"))
            {
                let mut item = item.clone();
                if let Some(item) = item.as_object_mut() {
                    item.remove("last_updated");
                }
                seen.push(format!("{list} {item}"));
            }
        }
    }
    seen.sort();
    Ok(seen)
}

/// Asks the client status discovery service.
fn status(daemon: &Daemon) -> Result<ClientStatusResponse> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let url = format!("http://{}", daemon.admin_address());
    runtime.block_on(async {
        let mut client = ClientStatusDiscoveryServiceClient::connect(url).await?;
        Ok(client.fetch_client_status(ClientStatusRequest::default()).await?.into_inner())
    })
}

fn entry<M: Name>(status: &ClientStatusResponse, name: &str) -> Result<GenericXdsConfig> {
    let mut all = status.config.iter().flat_map(|it| &it.generic_xds_configs);
    let found = all.find(|it| it.type_url == M::type_url() && it.name == name);
    found.cloned().with_context(|| format!("no {} {name} in {status:?}", M::NAME))
}

fn decode<M: Message + Name + Default>(any: Option<&Any>) -> Result<M> {
    let any = any.context("nothing is shown")?;
    ensure!(any.type_url == M::type_url(), "{any:?}");
    Ok(M::decode(any.value.as_slice())?)
}

fn culvert(daemon: &Daemon, more: &[&str]) -> Result<Output> {
    let admin = format!("http://{}", daemon.admin_address());
    Ok(Command::new(binary("culvert")?).args(["xds", "status", "--admin", &admin]).args(more).output()?)
}

/// None of the keys is in there, as they are or as a dump has bytes.
fn is_clean(shown: &[u8], keys: &[&Issued]) -> Result<()> {
    let lines = keys.iter().flat_map(|issued| issued.key.lines().filter(|line| !line.starts_with('-')));
    // In base64, TTT is VFRU and UUU is VVVV.
    let needles = lines.map(str::as_bytes).chain([&b"TTTTTT"[..], b"UUUUUU", b"VFRUVFRU", b"VVVVVVVV", b"PRIVATE KEY"]);
    for needle in needles {
        let found = shown.windows(needle.len()).any(|it| it == needle);
        ensure!(!found, "{:?} in {:?}", String::from_utf8_lossy(needle), String::from_utf8_lossy(shown));
    }
    Ok(())
}

fn shown_alike(delta: bool) -> Result<()> {
    let authority = Authority::new("ca");
    let [own, other] = [(); 2].map(|()| authority.issue(&["a.test"], &[]));
    let keys = [&own, &other];
    let api = if delta { "DELTA_GRPC" } else { "GRPC" };
    let start = |kind: Kind| -> Result<(ControlPlane, Stream, Daemon, Vec<String>)> {
        let control = ControlPlane::start()?;
        let (port, all) = (control.address.port(), resources(&own)?);
        // It is ready only when it has been answered.
        let served = thread::spawn(move || {
            let stream = control.stream(DEADLINE)?;
            serve(&stream, &all)?;
            Ok::<_, anyhow::Error>((control, stream))
        });
        let daemon = Daemon::start(kind, &ads_bootstrap(port, api))?;
        let (control, stream) = served.join().map_err(|_| anyhow!("the server panicked"))??;
        let seen = wait_until(DEADLINE, "the secrets to be active", || {
            let seen = dumped(&daemon)?;
            ensure!(!seen.iter().any(|line| line.contains("warming")), "{seen:#?}");
            Ok(seen)
        })?;
        is_clean(daemon.admin("/config_dump")?.as_bytes(), &keys)?;
        Ok((control, stream, daemon, seen))
    };
    let (_control, stream, daemon, ours) = start(Kind::Culvert)?;
    assert_eq!(ours, start(Kind::Envoy)?.3);
    ensure!(ours.len() == 3 && ours.iter().filter(|line| line.contains(REDACTED_BYTES)).count() == 2, "{ours:#?}");

    let told = status(&daemon)?;
    is_clean(&told.encode_to_vec(), &keys)?;
    for acked in [
        entry::<Cluster>(&told, "up")?,
        entry::<Listener>(&told, "inline")?,
        entry::<Listener>(&told, "by-sds")?,
        entry::<Secret>(&told, "own")?,
        entry::<Secret>(&told, "tickets")?,
        entry::<TypedExtensionConfig>(&told, "late")?,
    ] {
        ensure!(acked.client_status() == ClientResourceStatus::Acked && acked.version_info == "1", "{acked:?}");
    }
    let mut redacted = certificate(&own, &own);
    redacted.private_key = Some(bytes(REDACTED.as_bytes()));
    let shown: Secret = decode(entry::<Secret>(&told, "own")?.xds_config.as_ref())?;
    assert_eq!(shown.r#type, Some(Type::TlsCertificate(redacted.clone())));
    let shown: Secret = decode(entry::<Secret>(&told, "tickets")?.xds_config.as_ref())?;
    let tickets = TlsSessionTicketKeys { keys: vec![bytes(REDACTED.as_bytes())] };
    assert_eq!(shown.r#type, Some(Type::SessionTicketKeys(tickets)));
    let shown: TypedExtensionConfig = decode(entry::<TypedExtensionConfig>(&told, "late")?.xds_config.as_ref())?;
    ensure!(decode::<Router>(shown.typed_config.as_ref())?.suppress_envoy_headers, "{shown:?}");

    let all = culvert(&daemon, &["--check"])?;
    let table = String::from_utf8(all.stdout)?;
    for line in [
        "CDS up 1 serving",
        "LDS by-sds 1 serving",
        "SDS own 1 serving",
        "SDS tickets 1 serving",
        "ECDS late 1 serving",
    ] {
        let is = |shown: &str| shown.split_whitespace().take(4).eq(line.split(' '));
        ensure!(table.lines().any(is), "no {line} in\n{table}");
    }
    ensure!(all.status.success(), "nothing is rejected:\n{table}");

    // A refused version is shown beside the one in force, with no more of its key.
    let mismatched = secret(certificate(&own, &other));
    stream.push(Push {
        type_url: Secret::type_url(),
        version: "2".to_owned(),
        nonce: "bad".to_owned(),
        resources: vec![Resource { version: "2".to_owned(), ..mismatched }],
        removed: Vec::new(),
    });
    wait_until(DEADLINE, "the NACK", || {
        let request = stream.next(Duration::from_millis(100))?.context("no answer yet")?;
        ensure!(request.nonce == "bad" && request.error.is_some(), "{request:?}");
        Ok(())
    })?;
    let told = status(&daemon)?;
    is_clean(&told.encode_to_vec(), &keys)?;
    is_clean(daemon.admin("/config_dump")?.as_bytes(), &keys)?;
    let refused = entry::<Secret>(&told, "own")?;
    ensure!(refused.client_status() == ClientResourceStatus::Nacked && refused.version_info == "1", "{refused:?}");
    let error = refused.error_state.context("why it was refused")?;
    assert_eq!(error.version_info, "2");
    let failed: Secret = decode(error.failed_configuration.as_ref())?;
    assert_eq!(failed.r#type, Some(Type::TlsCertificate(redacted)));
    let one = culvert(&daemon, &["--type", "sds", "--name", "own", "--check", "--output", "json"])?;
    ensure!(one.status.code() == Some(3), "{one:?}");
    let rows: Value = serde_json::from_slice(&one.stdout)?;
    assert_eq!((&rows[0]["state"], &rows[0]["version"]), (&"rejected".into(), &"1".into()));
    ensure!(rows[0]["rejected"]["reason"].as_str().is_some_and(|it| it.contains("private key")), "{rows}");
    Ok(())
}

#[test]
fn secrets_and_filters_by_state_of_the_world() -> Result<()> {
    shown_alike(false)
}

#[test]
fn secrets_and_filters_by_incremental_xds() -> Result<()> {
    shown_alike(true)
}
