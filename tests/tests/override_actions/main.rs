//! Overrides, by the built culvertd: what requests may ask for, what is refused of it and why. The listener and the clusters are those
//! of a bootstrap, what discovery tells of services comes over ADS.

mod obeyed;
mod refusals;
mod signing;
mod watched;

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
