//! Overrides, by the built culvertd: what requests may ask for, what is refused of it and why. The listener and the clusters are those
//! of a bootstrap, what discovery tells of services comes over ADS.

use std::fs;
use std::io::BufReader;
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::binaries::binary;
use culvert_tests::control_plane::{ControlPlane, Push, Resource, Stream};
use culvert_tests::daemon::{Daemon, Kind, culvertd_to_end, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};
use culvert_xds_client::api::culvert::overrides::v1::{OffloadedEndpoint, OffloadedService, Policy, Sources};
use culvert_xds_client::overrides::{
    Action, BAGGAGE_ITEM, ConfigValue, Fault, Override, Overrides, Signed, SpanContext, encode_ot_span_context,
    format_baggage,
};
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source::Specifier};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{GenericSecret, Secret, secret};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message as _, Name as _};

const DEADLINE: Duration = Duration::from_secs(20);
const KEY: &str = "0123456789abcdef0123456789abcdef";
const OTHER_KEY: &str = "ffffffffffffffffffffffffffffffff";
const USERS: &str = "users.default:80";

/// A service that says who it is and which headers it got. It is slow where the path says so.
fn service(name: &'static str) -> Result<u16> {
    server::start(move |stream: TcpStream| {
        let mut stream = BufReader::new(stream);
        while let Some(request) = Request::read(&mut stream)? {
            if request.target == "/slow" {
                // Longer than any limit here: it is the proxy that ends this.
                std::thread::sleep(Duration::from_secs(5));
            }
            let headers = request.headers.0.iter().map(|(key, value)| format!("{}: {value}\n", key.to_lowercase()));
            let body = format!("{name}\n{}", headers.collect::<String>());
            Response::new(200, "text/plain", body.into_bytes()).write(stream.get_mut(), false)?;
        }
        Ok(())
    })
}

/// culvertd with an override filter, a service `users`, and one of its pods that is offloaded.
struct Mesh {
    daemon: Daemon,
    port: u16,
    feature: u16,
    stream: Stream,
    _control: ControlPlane,
    pushes: u32,
}

impl Mesh {
    /// `filter`: fields of the filter's configuration. `secrets`: those of the bootstrap.
    fn start(filter: &str, secrets: &str) -> Result<Mesh> {
        Mesh::start_with(filter, secrets, None)
    }

    /// The same with a secret that is told over ADS.
    fn start_with(filter: &str, secrets: &str, secret: Option<Push>) -> Result<Mesh> {
        let control = ControlPlane::start()?;
        let (users, feature, port) = (service("users")?, service("feature-x")?, free_port()?);
        let yaml = bootstrap(control.address.port(), port, users, filter, secrets);
        let started = std::thread::scope(|scope| {
            // It is ready when the control plane has answered.
            let daemon = scope.spawn(|| Daemon::start(Kind::Culvert, &yaml));
            let asked_for = [OffloadedService::type_url(), Secret::type_url()];
            let asked_for = &asked_for[..1 + usize::from(secret.is_some())];
            let stream = stream_that_asks(&control, asked_for).inspect(|stream| {
                stream.push(offloaded(0, feature, None));
                secret.into_iter().for_each(|secret| stream.push(secret));
            });
            let daemon = daemon.join().map_err(|_| anyhow::anyhow!("the start panicked"))??;
            anyhow::Ok((daemon, stream?))
        });
        let (daemon, stream) = started?;
        let mesh = Mesh { daemon, port, feature, stream, _control: control, pushes: 0 };
        mesh.wait_for_table("\"port\"")?;
        Ok(mesh)
    }

    fn wait_for_table(&self, text: &str) -> Result<()> {
        wait_until(DEADLINE, "what discovery tells to be there", || {
            let table = self.daemon.admin("/overrides")?;
            ensure!(table.contains(text), "{table}");
            Ok(())
        })
    }

    /// Has discovery tell another policy of `users`; `text` is to be seen of it.
    fn set_policy(&mut self, policy: Policy, text: &str) -> Result<()> {
        self.pushes += 1;
        self.stream.push(offloaded(self.pushes, self.feature, Some(policy)));
        self.wait_for_table(text)
    }

    fn send(&self, request: Request) -> Result<Response> {
        fetch(self.port, request.header("host", "users").header("x-culvert-override-debug", "1"))
    }

    /// What a request is answered that asks for this.
    fn ask(&self, message: &Overrides) -> Result<Response> {
        self.send(Request::get("/").header("ot-baggage-overrides", &message.to_baggage_item()))
    }

    /// How it was answered: by whom, and what the proxy says.
    fn outcome(&self, message: &Overrides) -> Result<(String, String)> {
        Ok(told(&self.ask(message)?))
    }

    fn stat(&self, name: &str) -> Result<u64> {
        Ok(self.daemon.stats()?.get(&format!("http.ingress.override.{name}")))
    }
}

/// The stream on which the daemon asks for resources, when it has asked for all these types.
fn stream_that_asks(control: &ControlPlane, types: &[String]) -> Result<Stream> {
    let stream = control.stream(DEADLINE)?;
    let mut missing = types.to_vec();
    while !missing.is_empty() {
        let request = stream.next(DEADLINE)?.context("it asks for nothing")?;
        missing.retain(|type_url| *type_url != request.type_url);
    }
    Ok(stream)
}

/// The signing keys `overrides`, by their ids.
fn keys(number: u32, keys: &[(&str, &str)]) -> Push {
    let inline = |key: &str| DataSource {
        specifier: Some(Specifier::InlineBytes(key.as_bytes().to_vec())),
        ..DataSource::default()
    };
    let secrets = keys.iter().map(|(id, key)| ((*id).to_owned(), inline(key))).collect();
    let secret = Secret {
        name: "overrides".to_owned(),
        r#type: Some(secret::Type::GenericSecret(GenericSecret { secret: None, secrets })),
    };
    let body = Any { type_url: Secret::type_url(), value: secret.encode_to_vec() };
    Push {
        type_url: Secret::type_url(),
        version: number.to_string(),
        nonce: format!("secret-{number}"),
        resources: vec![Resource { name: "overrides".to_owned(), version: number.to_string(), body }],
        removed: Vec::new(),
    }
}

/// By whom a request was answered, and what the proxy says of its overrides.
fn told(response: &Response) -> (String, String) {
    let text = response.text();
    let outcome = response.headers.get("x-culvert-override").unwrap_or("(nothing)");
    (text.lines().next().unwrap_or_default().to_owned(), outcome.to_owned())
}

fn offloaded(number: u32, port: u16, policy: Option<Policy>) -> Push {
    let endpoint = OffloadedEndpoint {
        revision: "feature-x".to_owned(),
        address: "127.0.0.1".to_owned(),
        port: port.into(),
        pod: "default/users-fx".to_owned(),
        tunnel: false,
    };
    let service = OffloadedService {
        cluster_name: USERS.to_owned(),
        service: "users.default".to_owned(),
        endpoints: vec![endpoint],
        policy,
    };
    let body = Any { type_url: OffloadedService::type_url(), value: service.encode_to_vec() };
    Push {
        type_url: OffloadedService::type_url(),
        version: number.to_string(),
        nonce: number.to_string(),
        resources: vec![Resource { name: USERS.to_owned(), version: number.to_string(), body }],
        removed: Vec::new(),
    }
}

fn bootstrap(xds: u16, port: u16, users: u16, filter: &str, secrets: &str) -> String {
    let cluster = |name: &str, port: u16| {
        format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment: {{cluster_name: {name}, endpoints: \
             [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}\n"
        )
    };
    let http2 = "    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}\n";
    format!(
        r#"node: {{id: node-1, cluster: test}}
dynamic_resources:
  ads_config: {{api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}
static_resources:
{secrets}
  listeners:
  - name: web
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          internal_address_config: {{cidr_ranges: [{{address_prefix: 10.0.0.0, prefix_len: 8}}]}}
          route_config:
            name: local
            virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: /}}, route: {{cluster: "{USERS}", timeout: 15s}}}}]}}]
          http_filters:
          - name: culvert.filters.http.override
            typed_config:
              "@type": type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override
              original_dst_cluster: original_dst
              {filter}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - {{name: original_dst, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, connect_timeout: 1s}}
{}{}{http2}"#,
        cluster(USERS, users),
        cluster("xds", xds),
    )
}

fn users(change: impl FnOnce(&mut Override)) -> Overrides {
    let mut entry = Override { service: "users".to_owned(), ..Override::default() };
    change(&mut entry);
    Overrides::of(vec![entry], 0).unwrap()
}

fn feature_x() -> Overrides {
    users(|it| it.revision = "feature-x".to_owned())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn outcome(by: &str, said: &str) -> (String, String) {
    (by.to_owned(), format!("{USERS}: {said}"))
}

#[test]
fn a_request_gets_what_it_asks_for() -> Result<()> {
    let mesh =
        Mesh::start("actions: [FAULT, DELAY, TIMEOUT, DEBUG, SAMPLE, CONFIG]\n              debug_response: true", "")?;
    let (by, said) = mesh.outcome(&feature_x())?;
    assert_eq!((by, said), outcome("feature-x", "applied revision feature-x"));
    let address = users(|it| it.address = format!("127.0.0.1:{}", mesh.feature));
    assert_eq!(mesh.outcome(&address)?.0, "feature-x");
    assert_eq!(mesh.stat("applied")?, 2);

    let fault = mesh.ask(&users(|it| it.fault = Some(Fault { http_status: Some(418), grpc_status: None })))?;
    assert_eq!((fault.status, fault.text().as_str()), (418, "fault of an override"));
    assert_eq!(told(&fault).1, format!("{USERS}: applied answered with status 418"));
    let grpc = users(|it| it.fault = Some(Fault { http_status: None, grpc_status: Some(14) }));
    let grpc = Request::get("/")
        .header("ot-baggage-overrides", &grpc.to_baggage_item())
        .header("content-type", "application/grpc");
    let grpc = mesh.send(grpc)?;
    assert_eq!((grpc.status, grpc.headers.get("grpc-status")), (200, Some("14")));

    let before = Instant::now();
    let delayed =
        users(|it| (it.delay_ms, it.fault) = (300, Some(Fault { http_status: Some(503), grpc_status: None })));
    assert_eq!(mesh.ask(&delayed)?.status, 503);
    ensure!(before.elapsed() >= Duration::from_millis(300), "{:?}", before.elapsed());

    let message = users(|it| it.timeout_ms = 200).to_baggage_item();
    let late = mesh.send(Request::get("/slow").header("ot-baggage-overrides", &message))?;
    assert_eq!((late.status, late.text().as_str()), (504, "upstream request timeout"));

    let message = users(|it| {
        it.config = vec![ConfigValue { name: "new-checkout".to_owned(), value: "on, now".to_owned() }];
        it.sample = Some(true);
    });
    let request = Request::get("/").header("ot-baggage-overrides", &message.to_baggage_item());
    let request = request.header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00");
    let seen = mesh.send(request.header("x-culvert-config", "forged=1"))?.text();
    ensure!(seen.contains("\nx-culvert-config: new-checkout=on%2C%20now\n") && !seen.contains("forged"), "{seen}");
    ensure!(seen.contains("\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n"), "{seen}");
    assert_eq!(mesh.stat("config_removed")?, 1);
    for (action, count) in [("route", 2), ("fault", 3), ("delay", 1), ("timeout", 1), ("config", 1), ("sample", 1)] {
        assert_eq!(mesh.stat(&format!("action.{action}"))?, count, "{action}");
    }
    assert_eq!(mesh.stat("rejected")?, 0);
    // Other services are not concerned, and requests without overrides get nothing.
    let other = Overrides::new([("orders", "feature-x")])?;
    assert_eq!(mesh.outcome(&other)?, outcome("users", "nothing asked"));
    let plain = fetch(mesh.port, Request::get("/"))?;
    assert_eq!((told(&plain).0.as_str(), plain.headers.get("x-culvert-override")), ("users", None));
    Ok(())
}

#[test]
fn one_request_is_logged_and_no_other() -> Result<()> {
    let filter = "actions: [DEBUG]\n              limits: {debug_per_second: 1}\n              debug_response: true";
    let mesh = Mesh::start(filter, "")?;
    let admin = mesh.daemon.admin_address().rsplit_once(':').context("a port")?.1.parse()?;
    let level = Request { method: "POST".to_owned(), ..Request::get("/logging?level=info") };
    assert_eq!(fetch(admin, level)?.status, 200);
    mesh.ask(&users(|it| it.revision = "feature-x".to_owned()))?;
    let debug = users(|it| (it.debug, it.revision) = (true, "feature-y".to_owned()));
    let request = |path: &str| {
        let request = Request::get(path).header("ot-baggage-overrides", &debug.to_baggage_item());
        mesh.send(request.header("x-request-id", "me"))
    };
    let answer = request("/%0aforged?a=1")?;
    assert_eq!(told(&answer), outcome("users", "applied logged; refused route unlisted"));
    let lines = || -> Vec<String> {
        mesh.daemon.stderr().lines().filter(|line| line.contains("override: ")).map(str::to_owned).collect()
    };
    wait_until(DEADLINE, "the log", || {
        let lines = lines();
        ensure!(lines.len() == 2, "{lines:?}");
        Ok(())
    })?;
    let lines = lines();
    ensure!(lines[0].contains("GET users/%0aforged?a=1") && lines[0].contains("refused route unlisted"), "{lines:?}");
    ensure!(lines[1].contains("answered") && lines[1].contains("status=200"), "{lines:?}");
    // More than may be logged in a second.
    wait_until(DEADLINE, "more than one in a second", || {
        request("/")?;
        ensure!(mesh.stat("refused.debug_busy")? > 0, "not yet");
        Ok(())
    })
}

#[test]
fn nothing_is_done_that_is_not_allowed() -> Result<()> {
    let mut mesh = Mesh::start(
        "actions: [DELAY, TIMEOUT, CONFIG]\n              limits: {delay_ms: 100, overrides: 2, header_bytes: 2000, config_bytes: 20}\n              debug_response: true",
        "",
    )?;
    let fault = users(|it| it.fault = Some(Fault { http_status: Some(500), grpc_status: None }));
    assert_eq!(mesh.outcome(&fault)?, outcome("users", "refused fault action_not_allowed"));
    let delay = users(|it| (it.delay_ms, it.revision) = (101, "feature-x".to_owned()));
    assert_eq!(mesh.outcome(&delay)?, outcome("feature-x", "applied revision feature-x; refused delay over_limit"));
    let config =
        |value: &str| users(|it| it.config = vec![ConfigValue { name: "name".to_owned(), value: value.to_owned() }]);
    assert_eq!(mesh.outcome(&config(&"x".repeat(30)))?, outcome("users", "refused config over_limit"));
    let unlisted = users(|it| it.revision = "feature-y".to_owned());
    assert_eq!(mesh.outcome(&unlisted)?, outcome("users", "refused route unlisted"));
    for address in [format!("127.0.0.1:{}", mesh.port), "169.254.169.254".to_owned()] {
        assert_eq!(mesh.outcome(&users(|it| it.address = address))?, outcome("users", "refused route unlisted"));
    }
    let many = Overrides::new([("users", "feature-x"), ("a", "x"), ("b", "x")])?;
    assert_eq!(mesh.outcome(&many)?, outcome("users", "refused too_many"));
    let expired = Overrides::of(feature_x().overrides, now() - 1)?;
    assert_eq!(mesh.outcome(&expired)?, outcome("users", "refused expired"));
    let forged = Request::get("/").header("x-envoy-original-dst-host", &format!("127.0.0.1:{}", mesh.feature));
    assert_eq!(told(&mesh.send(forged)?).0, "users");

    let item = feature_x().to_baggage_item();
    for (header, value, reason) in [
        ("ot-baggage-overrides", "AAAA".repeat(501), "too_large"),
        ("ot-baggage-overrides", "not base64".to_owned(), "undecodable"),
        ("x-ot-span-context", "not base64".to_owned(), "undecodable"),
        ("uberctx-overrides", "%zz".to_owned(), "undecodable"),
        ("baggage", format!("overrides={item},overrides=CAE%3D"), "contradiction"),
        ("baggage", vec!["k=v"; 65].join(","), "too_large"),
    ] {
        let answer = mesh.send(Request::get("/").header(header, &value))?;
        assert_eq!(told(&answer), outcome("users", &format!("refused {reason}")), "{header}: {value}");
    }
    let twice = Request::get("/").header("baggage-overrides", &item).header("baggage-overrides", "CAE=");
    assert_eq!(told(&mesh.send(twice)?), outcome("users", "refused contradiction"));
    // Formats are looked at in their order: a damaged one is not made good by a later one.
    let both = Request::get("/").header("ot-baggage-overrides", "damaged").header("uberctx-overrides", &item);
    assert_eq!(told(&mesh.send(both)?), outcome("users", "refused undecodable"));
    for (reason, count) in [
        ("action_not_allowed", 1),
        ("over_limit", 2),
        ("unlisted", 3),
        ("too_many", 1),
        ("expired", 1),
        ("too_large", 2),
        ("undecodable", 4),
        ("contradiction", 2),
    ] {
        assert_eq!(mesh.stat(&format!("refused.{reason}"))?, count, "{reason}");
    }
    assert_eq!((mesh.stat("undecodable")?, mesh.stat("rejected")?, mesh.stat("header_removed")?), (8, 8, 1));

    // What the service itself says.
    mesh.set_policy(Policy { allowed: false, ..Policy::default() }, "\"policy\"")?;
    assert_eq!(mesh.outcome(&feature_x())?, outcome("users", "refused not_opted_in"));
    let actions = vec![Action::Delay.into()];
    mesh.set_policy(Policy { allowed: true, actions, ..Policy::default() }, "DELAY")?;
    let both = users(|it| (it.delay_ms, it.revision) = (1, "feature-x".to_owned()));
    assert_eq!(mesh.outcome(&both)?, outcome("users", "applied delayed by 1 ms; refused route action_not_opted_in"));
    let ranges = vec!["10.0.0.0/8".to_owned()];
    let sources = Sources { ranges, pods: vec!["*".to_owned()], ..Sources::default() };
    mesh.set_policy(Policy { allowed: true, actions: Vec::new(), sources: Some(sources) }, "10.0.0.0/8")?;
    assert_eq!(mesh.outcome(&feature_x())?, outcome("users", "refused service_source"));
    let ranges = vec!["127.0.0.0/8".to_owned()];
    let sources = Sources { ranges, ..Sources::default() };
    mesh.set_policy(Policy { allowed: true, actions: Vec::new(), sources: Some(sources) }, "127.0.0.0/8")?;
    assert_eq!(mesh.outcome(&feature_x())?.0, "feature-x");
    Ok(())
}

#[test]
fn production_opt_in_and_sources_hold_for_everything() -> Result<()> {
    for (filter, reason) in [
        ("mode: REFUSE_ALL", "production"),
        ("require_opt_in: true", "not_opted_in"),
        ("sources: {ranges: [10.0.0.0/8]}", "source"),
        ("sources: {pods: [\"*\"]}", "source"),
        ("sources: {principals: [\"*\"]}", "source"),
    ] {
        let mesh = Mesh::start(&format!("{filter}\n              debug_response: true"), "")?;
        // Whoever says to be someone else is still the same.
        let forged = Request::get("/").header("x-forwarded-for", "10.0.0.1").header("x-forwarded-client-cert", "URI=a");
        let forged = forged.header("ot-baggage-overrides", &feature_x().to_baggage_item());
        assert_eq!(told(&mesh.send(forged)?), outcome("users", &format!("refused {reason}")), "{filter}");
        assert_eq!(mesh.stat(&format!("refused.{reason}"))?, 1, "{filter}");
    }
    let mesh = Mesh::start("require_opt_in: false", "")?;
    assert_eq!(told(&mesh.ask(&feature_x())?), ("feature-x".to_owned(), "(nothing)".to_owned()), "nobody is told");
    Ok(())
}

#[test]
fn the_edge_strips_every_format() -> Result<()> {
    let mesh = Mesh::start("edge: STRIP\n              debug_response: true", "")?;
    let item = feature_x().to_baggage_item();
    let baggage = std::collections::BTreeMap::from([(BAGGAGE_ITEM.to_owned(), item.clone())]);
    let span = encode_ot_span_context(&SpanContext { trace_id: 1, span_id: 2, sampled: true, baggage });
    let w3c = format_baggage([("a", "b"), (BAGGAGE_ITEM, &item)]);
    let escaped = w3c.rsplit_once("overrides=").context("escaped")?.1;
    for (header, value) in [
        ("x-ot-span-context", &*span),
        ("ot-baggage-overrides", &item),
        ("baggage", &w3c),
        ("uberctx-overrides", escaped),
        ("jaeger-baggage", &w3c),
        ("baggage-overrides", &item),
    ] {
        let answer = mesh.send(Request::get("/").header(header, value).header("ot-baggage-mine", "stays"))?;
        let seen = answer.text();
        assert_eq!(told(&answer), ("users".to_owned(), "(nothing)".to_owned()), "{header}");
        ensure!(!seen.contains("overrides") && seen.contains("ot-baggage-mine: stays"), "{header}: {seen}");
        ensure!(!seen.contains("x-culvert-override-debug"), "{seen}");
        ensure!(!header.ends_with("baggage") || seen.contains(&format!("\n{header}: a=b\n")), "{seen}");
    }
    assert_eq!((mesh.stat("refused.stripped")?, mesh.stat("applied")?), (6, 0));
    Ok(())
}

#[test]
fn the_edge_may_let_internal_requests_keep_theirs() -> Result<()> {
    let mesh = Mesh::start("edge: STRIP_EXTERNAL", "")?;
    let from = |address: &str| -> Result<String> {
        let request = Request::get("/").header("ot-baggage-overrides", &feature_x().to_baggage_item());
        Ok(told(&mesh.send(request.header("x-forwarded-for", address))?).0)
    };
    assert_eq!((from("10.0.0.1")?.as_str(), from("192.0.2.1")?.as_str()), ("feature-x", "users"));
    assert_eq!(mesh.stat("refused.stripped")?, 1);
    Ok(())
}

#[test]
fn signatures_are_verified_and_keys_rotate() -> Result<()> {
    let dir = scratch_dir()?;
    let put = |name: &str, key: &str| -> Result<()> {
        // As tools do it: the directory sees a move.
        fs::write(dir.join("next"), format!("{key}\n"))?;
        Ok(fs::rename(dir.join("next"), dir.join(name))?)
    };
    put("k1", KEY)?;
    put("k2", OTHER_KEY)?;
    let file = |name: &str| format!("{name}: {{filename: {}}}", dir.join(name).display());
    let secrets =
        format!("  secrets: [{{name: overrides, generic_secret: {{secrets: {{{}, {}}}}}}}]", file("k1"), file("k2"));
    let filter =
        "signing: {secret: overrides, required: true, max_lifetime_s: 3600}\n              debug_response: true";
    let mesh = Mesh::start(filter, &secrets)?;
    let ends = |after: u64| Overrides::of(feature_x().overrides, now() + after).unwrap();
    let (key, other) = (KEY.as_bytes(), OTHER_KEY.as_bytes());
    let good = ends(600).sign("k1", key)?;
    assert_eq!(mesh.outcome(&good)?, outcome("feature-x", "applied revision feature-x"));
    assert_eq!(mesh.outcome(&ends(600).sign("k2", other)?)?.0, "feature-x");
    let refused = |message: &Overrides, reason: &str| -> Result<()> {
        assert_eq!(mesh.outcome(message)?, outcome("users", &format!("refused {reason}")));
        Ok(())
    };
    refused(&feature_x(), "not_signed")?;
    refused(&ends(600).sign("k1", other)?, "bad_signature")?;
    refused(&ends(600).sign("k3", key)?, "unknown_key")?;
    refused(&ends(7200).sign("k1", key)?, "lasts_too_long")?;
    refused(&Overrides::of(feature_x().overrides, now() - 1)?.sign("k1", key)?, "expired")?;
    // Another set under a signature that is good.
    let signature = good.signed.clone().context("signed")?;
    let other_set = Overrides::of(users(|it| it.address = "127.0.0.1".to_owned()).overrides, now() + 600)?;
    let with = |signed: Signed| Overrides { signed: Some(signed), ..good.clone() };
    refused(&with(Signed { payload: other_set.encode_to_vec(), ..signature.clone() }), "bad_signature")?;
    // The same set with a later end.
    refused(&with(Signed { payload: ends(1200).encode_to_vec(), ..signature.clone() }), "bad_signature")?;
    refused(&with(Signed { key_id: "k2".to_owned(), ..signature.clone() }), "bad_signature")?;
    // Something beside what is signed.
    refused(&Overrides { overrides: feature_x().overrides, ..good.clone() }, "undecodable")?;
    // One that is not signed in a header that is looked at first.
    let request = Request::get("/").header("uberctx-overrides", &good.to_baggage_item());
    let request = request.header("ot-baggage-overrides", &feature_x().to_baggage_item());
    assert_eq!(told(&mesh.send(request)?), outcome("users", "refused not_signed"));

    // What was good ends with its time.
    let short = ends(2).sign("k1", key)?;
    wait_until(DEADLINE, "the message to end", || {
        let (_, said) = mesh.outcome(&short)?;
        ensure!(said.ends_with("refused expired"), "{said}");
        Ok(())
    })?;
    // The key is replaced: what it has signed means nothing any more.
    put("k1", OTHER_KEY)?;
    wait_until(DEADLINE, "the new key to be known", || {
        let (_, said) = mesh.outcome(&good)?;
        ensure!(said.ends_with("refused bad_signature"), "{said}");
        Ok(())
    })?;
    assert_eq!(mesh.outcome(&ends(600).sign("k1", other)?)?.0, "feature-x");
    fs::remove_dir_all(dir)?;
    Ok(())
}

#[test]
fn keys_are_told_and_rotated_over_ads() -> Result<()> {
    let filter = "signing: {secret: overrides, ads: true, required: true}\n              debug_response: true";
    let mesh = Mesh::start_with(filter, "", Some(keys(1, &[("k1", KEY)])))?;
    let set = || Overrides::of(feature_x().overrides, now() + 600);
    let (by_first, by_second) = (set()?.sign("k1", KEY.as_bytes())?, set()?.sign("k2", OTHER_KEY.as_bytes())?);
    assert_eq!(mesh.outcome(&by_first)?, outcome("feature-x", "applied revision feature-x"));
    assert_eq!(mesh.outcome(&by_second)?, outcome("users", "refused unknown_key"));
    let until = |message: &Overrides, expected: (String, String)| {
        wait_until(DEADLINE, &format!("{expected:?}"), || {
            let found = mesh.outcome(message)?;
            ensure!(found == expected, "{found:?}");
            Ok(())
        })
    };
    // The new key beside the old one, then alone.
    mesh.stream.push(keys(2, &[("k1", KEY), ("k2", OTHER_KEY)]));
    until(&by_second, outcome("feature-x", "applied revision feature-x"))?;
    assert_eq!(mesh.outcome(&by_first)?.0, "feature-x");
    mesh.stream.push(keys(3, &[("k2", OTHER_KEY)]));
    until(&by_first, outcome("users", "refused unknown_key"))?;
    assert_eq!(mesh.outcome(&by_second)?.0, "feature-x");
    // A key that is too short to sign anything leaves the last good ones in force.
    mesh.stream.push(keys(4, &[("k2", "short")]));
    wait_until(DEADLINE, "the short key to be refused", || {
        let request = mesh.stream.next(DEADLINE)?.context("the stream ended")?;
        let refused = request.error.is_some() && request.nonce == "secret-4";
        ensure!(refused, "{request:?}");
        Ok(())
    })?;
    assert_eq!(mesh.outcome(&by_second)?.0, "feature-x");
    Ok(())
}

#[test]
fn who_carries_contexts_is_counted() -> Result<()> {
    let mesh = Mesh::start("watch_context: true", "")?;
    mesh.ask(&feature_x())?;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    mesh.send(Request::get("/").header("traceparent", trace))?;
    mesh.send(Request::get("/").header("b3", "0"))?;
    fetch(mesh.port, Request::get("/"))?;
    let stats = mesh.daemon.stats()?;
    for who in ["to.users.default_80", "from.127.0.0.1"] {
        let of = |leaf: &str| stats.get(&format!("override_context.{who}.{leaf}"));
        assert_eq!((of("overrides"), of("trace_only"), of("nothing")), (1, 2, 1), "{who}");
    }
    Ok(())
}

/// What `culvert override` prints.
fn culvert_override(arguments: &[&str]) -> Result<String> {
    let output = Command::new(binary("culvert")?).arg("override").args(arguments).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "culvert override {arguments:?}: {out}{err}");
    Ok(out.into_owned())
}

#[test]
fn the_command_says_beforehand_what_daemons_do() -> Result<()> {
    let mut mesh = Mesh::start("actions: [DELAY]\n              debug_response: true", "")?;
    let sources = Sources { ranges: vec!["127.0.0.0/8".to_owned()], ..Sources::default() };
    mesh.set_policy(Policy { allowed: true, actions: Vec::new(), sources: Some(sources) }, "127.0.0.0/8")?;
    let flags = ["header", "--set", "users=feature-x", "--delay", "users=20s", "--format", "baggage"];
    let header = culvert_override(&flags)?;
    let admin = format!("http://{}", mesh.daemon.admin_address());
    let explained = culvert_override(&["explain", header.trim(), "--admin", &admin])?;
    for expected in [
        "listener web:\n  users.default:80\n",
        &format!("would be done: revision feature-x (127.0.0.1:{})\n", mesh.feature),
        "would be refused: delay over_limit\n",
        "if the service allows the client\n",
    ] {
        ensure!(explained.contains(expected), "{expected:?} is not in {explained}");
    }
    // And so it is.
    let (name, value) = header.trim().split_once(": ").context("a header")?;
    let answer = mesh.send(Request::get("/").header(name, value))?;
    assert_eq!(told(&answer), outcome("feature-x", "applied revision feature-x; refused delay over_limit"));
    Ok(())
}

#[test]
fn the_doctor_names_who_drops_contexts() -> Result<()> {
    let mesh = Mesh::start("watch_context: true", "")?;
    mesh.ask(&feature_x())?;
    // Discovery, which has it that `users` has the address that requests come from.
    let users = r#"{"service": "users.default", "envoy_cluster": "users.default:80",
                    "endpoints": [{"address": "127.0.0.1:80"}], "offloaded": []}"#;
    let status = format!(r#"{{"services": [{users}]}}"#);
    let discovery = server::start(move |stream| {
        let mut stream = BufReader::new(stream);
        Request::read(&mut stream)?;
        // The command reads until the connection ends.
        Response::new(200, "application/json", status.clone().into_bytes()).write(stream.get_mut(), false)
    })?;
    let (admin, discovery) =
        (format!("http://{}", mesh.daemon.admin_address()), format!("http://127.0.0.1:{discovery}"));
    let doctor = || culvert_override(&["doctor", "--admin", &admin, "--discovery", &discovery]);
    let said = doctor()?;
    ensure!(said.contains("users.default") && said.contains("passes on what came so far"), "{said}");
    // Another daemon, which has seen no overrides.
    let other = Mesh::start("watch_context: true", "")?;
    fetch(other.port, Request::get("/"))?;
    let other_admin = format!("http://{}", other.daemon.admin_address());
    let said = culvert_override(&["doctor", "--admin", &other_admin, "--discovery", &discovery])?;
    ensure!(said.contains("no request with overrides has been seen"), "{said}");
    Ok(())
}

#[test]
fn a_listener_whose_keys_are_missing_is_refused() -> Result<()> {
    let yaml = bootstrap(free_port()?, free_port()?, free_port()?, "signing: {secret: overrides}", "");
    let ended = culvertd_to_end(Some(&yaml), &["--mode", "validate"], DEADLINE)?;
    ensure!(ended.code != Some(0) && ended.stderr.contains("Unknown static secret: overrides"), "{ended:?}");
    Ok(())
}
