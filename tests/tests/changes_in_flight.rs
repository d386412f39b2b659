//! Requests in flight while what they go by is changed: routes, clusters, endpoints, filters; in culvertd and in the real Envoy, by
//! the same files. None may break, and who comes later meets what is new.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};
use tokio::runtime::Runtime;

const DEADLINE: Duration = Duration::from_secs(20);
const TYPES: &str = "type.googleapis.com/envoy";

/// What is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Routes,
    ClusterReplaced,
    ClusterRemoved,
    Endpoints,
    Filters,
}

const CHANGES: [Change; 5] =
    [Change::Routes, Change::ClusterReplaced, Change::ClusterRemoved, Change::Endpoints, Change::Filters];

/// The ports of services: of HTTP/1, of gRPC.
#[derive(Clone, Copy)]
struct Services {
    web: u16,
    grpc: u16,
}

impl Services {
    fn start(name: &'static str) -> Result<Services> {
        Ok(Services { web: server::start(move |stream| serve(name, stream))?, grpc: start_grpc()? })
    }
}

/// Reads until the end of a head, or what `text` says.
fn read_until(stream: &mut TcpStream, text: &str) -> Result<String> {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(text) {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "it ended before {text:?}: {:?}", String::from_utf8_lossy(&read));
        read.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&read).into_owned())
}

/// `/who` says who it is; `/retry` fails at first, and wants two seconds; all else comes back as it is: chunks, or another protocol.
fn serve(name: &str, mut stream: TcpStream) -> Result<()> {
    loop {
        let head = read_until(&mut stream, "\r\n\r\n")?.to_lowercase();
        let path = head.split(' ').nth(1).context("a path")?;
        let status = match path {
            "/retry" if head.contains("x-envoy-attempt-count: 1\r\n") => "503 No\r\nx-wait: 2",
            "/retry" | "/who" => "200 OK",
            _ => {
                let answer = if head.contains("upgrade: websocket") {
                    "101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket"
                } else {
                    "200 OK\r\ntransfer-encoding: chunked"
                };
                write!(stream, "HTTP/1.1 {answer}\r\n\r\n")?;
                let mut buffer = [0; 1024];
                loop {
                    let count = stream.read(&mut buffer)?;
                    stream.write_all(&buffer[..count])?;
                    if count == 0 {
                        return Ok(());
                    }
                    if buffer[..count].ends_with(b"0\r\n\r\n") {
                        break;
                    }
                }
                continue;
            }
        };
        write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{name}", name.len())?;
    }
}

/// A gRPC service that sends messages back as they come.
fn start_grpc() -> Result<u16> {
    server::start_async(|stream| async {
        let mut connection = h2::server::handshake(stream).await?;
        while let Some(request) = connection.accept().await {
            let (request, respond) = request?;
            tokio::spawn(echo(request.into_body(), respond));
        }
        Ok(())
    })
}

async fn echo(mut body: h2::RecvStream, mut respond: h2::server::SendResponse<Bytes>) -> Result<()> {
    let head = http::Response::builder().header("content-type", "application/grpc").body(())?;
    let mut sender = respond.send_response(head, false)?;
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        sender.send_data(data, false)?;
    }
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    Ok(sender.send_trailers(trailers)?)
}

fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// A response in the middle, or a connection in another protocol: what is sent comes back.
struct Echo(TcpStream);

impl Echo {
    fn start(port: u16, head: &str) -> Result<Echo> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(stream, "{}\r\n\r\n", head.replace('\n', "\r\n"))?;
        Ok(Echo(stream))
    }

    /// Sends what is to come back, after all that comes before it.
    fn say(&mut self, text: &str) -> Result<()> {
        self.0.write_all(text.as_bytes())?;
        read_until(&mut self.0, text)?;
        Ok(())
    }
}

/// A gRPC call with streams in both directions.
struct Call {
    runtime: Runtime,
    sender: h2::SendStream<Bytes>,
    body: h2::RecvStream,
}

impl Call {
    fn start(port: u16) -> Result<Call> {
        let runtime = runtime()?;
        let (sender, body) = runtime.block_on(async {
            let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
            let (client, connection) = h2::client::handshake(stream).await?;
            tokio::spawn(connection);
            let request = http::Request::post(format!("http://a.test:{port}/echo.Echo/Both"));
            let request = request.header("content-type", "application/grpc").header("te", "trailers").body(())?;
            let (response, mut sender) = client.ready().await?.send_request(request, false)?;
            sender.send_data(Bytes::from_static(b"one"), false)?;
            let response = response.await?;
            ensure!(response.status() == 200, "{response:?}");
            Ok((sender, response.into_body()))
        })?;
        let mut call = Call { runtime, sender, body };
        call.reads(b"one")?;
        Ok(call)
    }

    fn reads(&mut self, wanted: &[u8]) -> Result<()> {
        let mut read = Vec::new();
        while read.len() < wanted.len() {
            let data = self.runtime.block_on(async { tokio::time::timeout(DEADLINE, self.body.data()).await })?;
            let data = data.context("the call ended")??;
            self.body.flow_control().release_capacity(data.len())?;
            read.extend_from_slice(&data);
        }
        ensure!(read == wanted, "{:?}", String::from_utf8_lossy(&read));
        Ok(())
    }

    fn goes_on(mut self) -> Result<()> {
        self.sender.send_data(Bytes::from_static(b"two"), false)?;
        self.reads(b"two")?;
        self.sender.send_data(Bytes::new(), true)?;
        let trailers = self.runtime.block_on(async {
            ensure!(self.body.data().await.is_none(), "more data");
            self.body.trailers().await?.context("no trailers")
        })?;
        ensure!(trailers.get("grpc-status").is_some_and(|status| status == "0"), "{trailers:?}");
        Ok(())
    }
}

/// The files of a proxy's configuration.
struct Files {
    dir: PathBuf,
    port: u16,
    old: Services,
    new: Services,
}

impl Files {
    fn source(&self, file: &str) -> String {
        format!("{{path_config_source: {{path: {}}}, resource_api_version: V3}}", self.dir.join(file).display())
    }

    /// Moves a response to its place.
    fn publish(&self, file: &str, version: u32, resources: &[String]) -> Result<()> {
        let list: String = resources.iter().map(|resource| format!("- {{{resource}}}\n")).collect();
        let list = if list.is_empty() { "resources: []\n".to_owned() } else { format!("resources:\n{list}") };
        let aside = self.dir.join("aside");
        fs::write(&aside, format!("version_info: \"{version}\"\n{list}"))?;
        Ok(fs::rename(aside, self.dir.join(file))?)
    }

    fn routes(&self, suffix: &str) -> String {
        format!(
            "\"@type\": {TYPES}.config.route.v3.RouteConfiguration, name: r, virtual_hosts: [{{name: v, domains: ['*'], \
             include_request_attempt_count: true, routes: [{{match: {{prefix: /echo.}}, route: {{cluster: grpc{suffix}}}}}, \
             {{match: {{prefix: /}}, route: {{cluster: web{suffix}, upgrade_configs: [{{upgrade_type: websocket}}], retry_policy: \
             {{retry_on: 5xx, rate_limited_retry_back_off: {{reset_headers: [{{name: x-wait}}]}}}}}}}}]}}]"
        )
    }

    fn assignment(&self, name: &str, port: u16) -> String {
        format!(
            "cluster_name: {name}, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, \
             port_value: {port}}}}}}}}}]}}]"
        )
    }

    /// Envoy takes one assignment from a file.
    fn endpoints(&self, version: u32, services: Services) -> Result<()> {
        for (name, port) in [("web", services.web), ("grpc", services.grpc)] {
            let assignment = self.assignment(name, port);
            let text = format!("\"@type\": {TYPES}.config.endpoint.v3.ClusterLoadAssignment, {assignment}");
            self.publish(&format!("{name}.yaml"), version, &[text])?;
        }
        Ok(())
    }

    /// The clusters `web` and `grpc`, of EDS or `fixed`, and those that are called new.
    fn clusters(&self, fixed: Option<Services>, with_old: bool) -> Vec<String> {
        let cluster = |name: &str, hosts: String| {
            let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
            let http2 = if name.starts_with("grpc") { format!(", {http2}") } else { String::new() };
            format!("\"@type\": {TYPES}.config.cluster.v3.Cluster, name: {name}, {hosts}{http2}")
        };
        let eds = |name: &str| {
            let source = self.source(&format!("{name}.yaml"));
            cluster(name, format!("type: EDS, eds_cluster_config: {{eds_config: {source}}}"))
        };
        let at = |name: &str, port: u16| {
            cluster(name, format!("type: STATIC, load_assignment: {{{}}}", self.assignment(name, port)))
        };
        let mut all = vec![at("web-new", self.new.web), at("grpc-new", self.new.grpc)];
        if with_old {
            all.extend(match fixed {
                Some(services) => [at("web", services.web), at("grpc", services.grpc)],
                None => [eds("web"), eds("grpc")],
            });
        }
        all
    }

    fn listener(&self, filters: &str) -> String {
        format!(
            "\"@type\": {TYPES}.config.listener.v3.Listener, name: l, address: {{socket_address: {{address: 127.0.0.1, port_value: \
             {}}}}}, filter_chains: [{{filters: [{{name: hcm, typed_config: {{\"@type\": \
             {TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, stat_prefix: s, rds: \
             {{route_config_name: r, config_source: {}}}, http_filters: [{filters}{{name: router, typed_config: {{\"@type\": \
             {TYPES}.extensions.filters.http.router.v3.Router}}}}]}}}}]}}]",
            self.port,
            self.source("rds.yaml")
        )
    }

    fn begin(&self) -> Result<()> {
        self.publish("rds.yaml", 1, &[self.routes("")])?;
        self.endpoints(1, self.old)?;
        self.publish("cds.yaml", 1, &self.clusters(None, true))?;
        self.publish("lds.yaml", 1, &[self.listener("")])
    }

    fn change(&self, change: Change) -> Result<()> {
        match change {
            Change::Routes => self.publish("rds.yaml", 2, &[self.routes("-new")]),
            Change::ClusterReplaced => self.publish("cds.yaml", 2, &self.clusters(Some(self.new), true)),
            Change::ClusterRemoved => self.publish("cds.yaml", 2, &self.clusters(None, false)),
            Change::Endpoints => self.endpoints(2, self.new),
            Change::Filters => {
                let filter = format!(
                    "{{name: mutation, typed_config: {{\"@type\": {TYPES}.extensions.filters.http.header_mutation.v3.HeaderMutation, \
                     mutations: {{response_mutations: [{{append: {{header: {{key: x-filter, value: new}}}}}}]}}}}}}, "
                );
                self.publish("lds.yaml", 2, &[self.listener(&filter)])
            }
        }
    }
}

/// Who answers a new request, and whether the new filter was there.
fn who(port: u16) -> Result<String> {
    let answer = fetch(port, Request::get("/who"))?;
    let filter = if answer.headers.get("x-filter").is_some() { " filtered" } else { "" };
    Ok(format!("{} {}{filter}", answer.status, answer.text()))
}

/// What became of what was in flight: a line for each.
fn run(kind: Kind, change: Change, old: Services, new: Services) -> Result<Vec<String>> {
    let dir = scratch_dir()?;
    let files = Files { dir: dir.clone(), port: free_port()?, old, new };
    files.begin()?;
    let daemon = Daemon::start(
        kind,
        &format!(
            "node: {{id: node1, cluster: c1}}\ndynamic_resources:\n  cds_config: {}\n  lds_config: {}\n",
            files.source("cds.yaml"),
            files.source("lds.yaml")
        ),
    )?;
    let port = files.port;
    let becomes = |wanted: &str| {
        wait_until(DEADLINE, wanted, || {
            let now = who(port)?;
            ensure!(now == wanted, "{now}");
            Ok(())
        })
    };
    becomes("200 old")?;

    let mut long = Echo::start(port, "POST /long HTTP/1.1\nhost: a.test\ntransfer-encoding: chunked")?;
    long.say("3\r\none\r\n")?;
    let websocket = "GET /ws HTTP/1.1\nhost: a.test\nconnection: upgrade\nupgrade: websocket\nsec-websocket-version: 13\n\
                     sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==";
    let mut websocket = Echo::start(port, websocket)?;
    websocket.say("one")?;
    let call = Call::start(port)?;
    let retry = thread::spawn(move || -> Result<String> {
        let answer = fetch(port, Request::get("/retry"))?;
        Ok(format!("{} {}", answer.status, answer.text()))
    });
    wait_until(DEADLINE, "the retry to be waited for", || {
        let waiting = daemon.stats()?.get("cluster.web.upstream_rq_retry");
        let ratelimited = daemon.stats()?.get("cluster.web.upstream_rq_retry_backoff_ratelimited");
        ensure!(waiting + ratelimited > 0, "{waiting} {ratelimited}");
        Ok(())
    })?;

    files.change(change)?;
    becomes(match change {
        Change::ClusterRemoved => "503 ",
        Change::Filters => "200 old filtered",
        _ => "200 new",
    })?;

    let told = |what: &str, result: Result<()>| match result {
        Ok(()) => format!("{what}: goes on"),
        Err(error) => format!("{what}: {error:#}"),
    };
    let long = long.say("3\r\ntwo\r\n").and_then(|()| long.say("0\r\n\r\n"));
    let seen = vec![
        told("response", long),
        told("websocket", websocket.say("two").and_then(|()| websocket.say("three"))),
        told("call", call.goes_on()),
        match retry.join() {
            Ok(result) => {
                format!("retry: {}", result.unwrap_or_else(|error| format!("{error:#}; {}", daemon.stderr())))
            }
            Err(_) => bail!("a thread panicked"),
        },
    ];
    drop(daemon);
    remove(&dir)?;
    Ok(seen)
}

fn remove(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))
}

#[test]
fn nothing_in_flight_breaks_when_configuration_changes() -> Result<()> {
    let (old, new) = (Services::start("old")?, Services::start("new")?);
    let mut problems = Vec::new();
    for change in CHANGES {
        // The retry itself may meet hosts of before or of after.
        let (culvertd, envoy) = thread::scope(|scope| {
            let envoy = scope.spawn(|| run(Kind::Envoy, change, old, new));
            (run(Kind::Culvert, change, old, new), envoy.join().expect("a panic is the test's own"))
        });
        let culvertd = culvertd.with_context(|| format!("culvertd, {change:?}"))?;
        let envoy = envoy.with_context(|| format!("Envoy, {change:?}"))?;
        let go_on = culvertd.iter().filter(|line| line.ends_with(": goes on")).count();
        if go_on != 3 || culvertd[..3] != envoy[..3] || !culvertd[3].starts_with("retry: 200 ") {
            problems.push(format!("{change:?}: culvertd {culvertd:#?}, Envoy {envoy:#?}"));
        }
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}
