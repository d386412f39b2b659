//! ECDS: HTTP filters that the control plane configures, in culvertd and in the real Envoy, by the same pushes.

use std::collections::BTreeSet;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context as _, Result, bail, ensure};
use culvert_tests::app::App;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::control_plane::{ControlPlane, Push, Resource, Stream};
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::extensions::filters::http::{buffer::v3::Buffer, router::v3::Router};
use envoy_types::pb::google::protobuf::{Any, UInt32Value};
use prost::{Message, Name};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(20);
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// A listener whose one filter is a router that ECDS delivers as `filter`; `more` is added to its `ExtensionConfigSource`.
fn listener(port: u16, filter: &str, timeout: &str, more: &str) -> String {
    format!(
        r#"
- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: {filter}
  address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
  filter_chains:
  - filters:
    - name: hcm
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
        stat_prefix: {filter}
        route_config: {{name: r, virtual_hosts: [{{name: v, domains: ["*"], routes: [{{match: {{prefix: /}}, route:
          {{cluster: app}}}}]}}]}}
        http_filters:
        - name: {filter}
          config_discovery:
            config_source: {{ads: {{}}, resource_api_version: V3, initial_fetch_timeout: {timeout}}}
            type_urls: [{ROUTER}]{more}
"#
    )
}

fn router(suppress_envoy_headers: bool) -> Any {
    let message = Router { suppress_envoy_headers, ..Default::default() };
    Any { type_url: Router::type_url(), value: message.encode_to_vec() }
}

fn buffer() -> Any {
    let message = Buffer { max_request_bytes: Some(UInt32Value { value: 1 }) };
    Any { type_url: Buffer::type_url(), value: message.encode_to_vec() }
}

/// A configuration to be delivered.
fn named(name: &str, version: &str, config: Any) -> Resource {
    let message = TypedExtensionConfig { name: name.to_owned(), typed_config: Some(config) };
    let body = Any { type_url: TypedExtensionConfig::type_url(), value: message.encode_to_vec() };
    Resource { name: name.to_owned(), version: version.to_owned(), body }
}

/// Pushes, and waits for the answer: the reason of a NACK, or nothing.
fn push(stream: &Stream, version: &str, resources: Vec<Resource>, removed: &[&str]) -> Result<Option<String>> {
    stream.push(Push {
        type_url: TypedExtensionConfig::type_url(),
        version: version.to_owned(),
        nonce: version.to_owned(),
        resources,
        removed: removed.iter().map(|&name| name.to_owned()).collect(),
    });
    loop {
        let request = stream.next(DEADLINE)?.with_context(|| format!("no answer to {version}"))?;
        if request.nonce == version && request.type_url == TypedExtensionConfig::type_url() {
            return Ok(request.error);
        }
    }
}

/// What a request is answered: its status, how long the body is, and whether Envoy's own header is there.
fn answer(port: u16) -> Result<String> {
    let answer = fetch(port, Request::get("/"))?;
    let own = answer.headers.get("x-envoy-upstream-service-time").is_some();
    let body = if answer.body.is_empty() { "nothing" } else { "a body" };
    Ok(format!("{} with {body}{}", answer.status, if own { " and headers" } else { "" }))
}

fn answers(port: u16, expected: &str) -> Result<()> {
    wait_until(DEADLINE, expected, || {
        let got = answer(port)?;
        ensure!(got == expected, "{got}");
        Ok(())
    })
}

/// The statistics of ECDS, and what its dump holds.
fn look(daemon: &Daemon) -> Result<Vec<String>> {
    let stats = daemon.admin("/stats?filter=^extension_config_discovery\\.")?;
    let known = |line: &&str| {
        let leaf = line.split_once(": ").and_then(|(name, _)| name.rsplit_once('.')).map_or("", |(_, leaf)| leaf);
        // Times, and a number made of the version. Envoy counts an attempt more in incremental xDS, and in the state of the
        // world what was refused of one in all that are asked for.
        !["update_time", "update_duration", "update_attempt", "version"].contains(&leaf)
            && (line.contains(".waits.") || !["update_rejected", "config_fail"].contains(&leaf))
    };
    let mut seen: Vec<String> = stats.lines().filter(known).map(str::to_owned).collect();
    seen.sort();
    let dump: Value = serde_json::from_str(&daemon.admin("/config_dump")?)?;
    let sections = dump["configs"].as_array().context("configs")?;
    let mut filters: Vec<String> = Vec::new();
    for section in sections.iter().filter(|it| it["@type"].as_str().is_some_and(|it| it.ends_with("EcdsConfigDump"))) {
        for filter in section["ecds_filters"].as_array().context("ecds_filters")? {
            filters.push(format!("{} {}", filter["version_info"], filter["ecds_filter"]));
        }
    }
    filters.sort();
    seen.extend(filters);
    Ok(seen)
}

fn run(kind: Kind, delta: bool, app: u16, root: &Path) -> Result<Vec<String>> {
    let control = ControlPlane::start()?;
    let lds = root.join(format!("{kind:?}_{delta}.yaml"));
    let deliver = |resources: &str| -> Result<()> {
        let next = lds.with_extension("next");
        fs::write(&next, format!("version_info: \"1\"\nresources:{resources}\n"))?;
        Ok(fs::rename(next, &lds)?)
    };
    deliver(" []")?;
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
    let resources =
        Bootstrap::new().cluster("app", &[app], &[]).cluster("xds", &[control.address.port()], &[http2]).yaml();
    let api = if delta { "DELTA_GRPC" } else { "GRPC" };
    let daemon = Daemon::start(
        kind,
        &format!(
            "node: {{id: node1, cluster: c1}}
dynamic_resources:
  lds_config: {{path_config_source: {{path: {}}}, resource_api_version: V3}}
  ads_config: {{api_type: {api}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}
{resources}",
            lds.display()
        ),
    )?;
    let (waits, early, late) = (free_port()?, free_port()?, free_port()?);
    let default = format!("\n            default_config: {{\"@type\": {ROUTER}}}");
    let at_once = format!("{default}\n            apply_default_config_without_warming: true");
    deliver(
        &[
            listener(waits, "waits", "0s", ""),
            listener(early, "early", "0s", &at_once),
            listener(late, "late", "1s", ""),
        ]
        .concat(),
    )?;
    let stream = control.stream(DEADLINE)?;
    ensure!(stream.delta == delta);
    let mut asked = BTreeSet::new();
    while asked.len() < 3 {
        let request = stream.next(DEADLINE)?.with_context(|| format!("only {asked:?} were asked for"))?;
        ensure!(request.type_url == TypedExtensionConfig::type_url(), "{request:?}");
        asked.extend(request.names);
    }
    ensure!(asked.iter().eq(["early", "late", "waits"]), "{asked:?}");

    answers(early, "200 with a body and headers")?;
    answers(late, "500 with nothing")?;
    ensure!(TcpStream::connect(("127.0.0.1", waits)).is_err(), "nothing has arrived for it");
    let dump: Value = serde_json::from_str(&daemon.admin("/init_dump")?)?;
    let unready = dump["unready_targets_dumps"].as_array().context("nothing is waited for")?;
    let mut seen: Vec<String> =
        unready.iter().flat_map(|it| it["target_names"].as_array()).flatten().map(Value::to_string).collect();
    ensure!(push(&stream, "1", vec![named("waits", "1", router(true))], &[])?.is_none());
    answers(waits, "200 with a body")?;
    let Some(reason) = push(&stream, "2", vec![named("waits", "2", buffer())], &[])? else { bail!("no NACK") };
    let text = "Error: filter config has type URL envoy.extensions.filters.http.buffer.v3.Buffer but expect \
                envoy.extensions.filters.http.router.v3.Router.";
    ensure!(reason.contains(text), "{reason}");
    ensure!(answer(waits)? == "200 with a body");
    ensure!(
        push(&stream, "3", vec![named("late", "3", router(false)), named("early", "3", router(true))], &[])?.is_none()
    );
    answers(late, "200 with a body and headers")?;
    answers(early, "200 with a body")?;
    ensure!(
        push(&stream, "4", vec![named("early", "4", router(true))], &[])?.is_none(),
        "the same under another version"
    );
    seen.extend(look(&daemon)?);
    if delta {
        ensure!(push(&stream, "5", Vec::new(), &["early", "late"])?.is_none());
        answers(early, "200 with a body and headers")?;
        answers(late, "500 with nothing")?;
        seen.extend(look(&daemon)?);
    }
    Ok(seen)
}

#[test]
fn culvertd_and_envoy_take_filters_from_ecds() -> Result<()> {
    let app = App { pod: "app".to_owned(), revision: "main".to_owned(), upstream: None }.start()?;
    let root = scratch_dir()?;
    for delta in [false, true] {
        let (culvertd, envoy) = thread::scope(|scope| {
            let envoy = scope.spawn(|| run(Kind::Envoy, delta, app, &root));
            (run(Kind::Culvert, delta, app, &root), envoy.join().expect("a panic is the test's own"))
        });
        let (culvertd, envoy) = (culvertd.context("culvertd")?, envoy.context("Envoy")?);
        assert_eq!(culvertd, envoy, "delta: {delta}");
    }
    Ok(())
}
