//! Gives the same filters and requests to Envoy and culvertd, and compares.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port, scratch_dir};
use culvert_tests::http1;
use nix::sys::signal::Signal;

use super::services::{self, Asked};
use super::upstream::{self, Seen};

/// Headers whose values are a proxy's own: only that they are there is compared.
const OWN_VALUES: [&str; 4] =
    ["date", "x-envoy-upstream-service-time", "x-request-id", "x-envoy-expected-rq-timeout-ms"];

/// Filters, and the requests that meet them, one after the other on connections of their own.
#[derive(Debug, Clone)]
pub struct Case {
    name: &'static str,
    /// Each with its name and its `typed_config`, in YAML's flow style.
    filters: Vec<(&'static str, String)>,
    requests: Vec<String>,
    /// All of them come on one connection.
    on_one_connection: bool,
    /// Lines of the connection manager.
    of_manager: String,
    /// Fields of its router, in flow style.
    of_router: String,
    /// How long its messages are is a proxy's own.
    of_own_lengths: bool,
    /// How many messages services are shown of each request, some of them perhaps after its answer.
    shown: Vec<usize>,
    /// Fields of the virtual host's, and of the action of its last route.
    of_routes: [String; 2],
    /// Routes before all others, in flow style.
    first: String,
    /// What the route configuration, the virtual host and the routes tell the filters: entries in flow style.
    told: [String; 4],
    /// The virtual host's.
    domains: &'static str,
    /// What its access log says further, of each request.
    of_log: String,
    /// The format of its access log in the place of that: fields of the log in flow style.
    log_format: String,
    /// The filter of its access log: a line.
    log_filter: String,
    /// Further access logs, in flow style.
    further_logs: String,
}

/// `filter` is the message's name below `envoy.extensions.filters.http.`, or the whole name, `config` its fields in flow style, without the braces.
/// In it, `$case` is the connection manager's `stat_prefix`, and `$taps` how the paths of its taps begin. A request is `GET /path` and a line for each header; after an empty
/// line comes its body. Paths below `/direct` are answered by the proxy; `/envoy.` begins a method of the gRPC server's;
/// those below `/many` go to a cluster of several hosts, as those below `/other`, of which the routes tell the filters nothing.
pub fn case(name: &'static str, filter: &'static str, config: &str, requests: &[&str]) -> Case {
    let requests = requests.iter().map(|request| (*request).to_owned()).collect();
    Case {
        name,
        filters: vec![(filter, config.to_owned())],
        requests,
        on_one_connection: false,
        of_manager: String::new(),
        of_router: String::new(),
        of_own_lengths: false,
        shown: Vec::new(),
        of_routes: Default::default(),
        first: String::new(),
        told: Default::default(),
        domains: "domains: [\"*\"]",
        of_log: String::new(),
        log_format: String::new(),
        log_filter: String::new(),
        further_logs: String::new(),
    }
}

/// A level that tells filters something.
#[derive(Debug, Clone, Copy)]
pub enum By {
    Config,
    Host,
    /// All routes but those of `/plain`.
    Route,
    /// The weighted cluster of the route of `/weighted`.
    Cluster,
}

impl Case {
    /// With a further filter behind.
    pub fn then(mut self, filter: &'static str, config: &str) -> Case {
        self.filters.push((filter, config.to_owned()));
        self
    }

    /// With a further filter in front.
    pub fn before(mut self, filter: &'static str, config: &str) -> Case {
        self.filters.insert(0, (filter, config.to_owned()));
        self
    }

    /// The first filter is told this by a level. `message` and `config` as the filter's own.
    pub fn told(mut self, by: By, message: &str, config: &str) -> Case {
        let filter = self.filters.first().map_or("", |(filter, _)| filter);
        self.told[by as usize] +=
            &format!("{filter}: {{\"@type\": type.googleapis.com/{}, {config}}}, ", full_name(message));
        self
    }

    /// Services are shown so many messages of each request, which is waited for.
    pub fn shown(mut self, messages: &[usize]) -> Case {
        self.shown = messages.to_vec();
        self
    }

    /// How long its messages are is not compared.
    pub fn of_own_lengths(mut self) -> Case {
        self.of_own_lengths = true;
        self
    }

    /// With fields of the virtual host and of its last route's action, in flow style.
    pub fn of_routes(mut self, host: &str, route: &str) -> Case {
        self.of_routes =
            [host, route].map(|fields| if fields.is_empty() { String::new() } else { format!(", {fields}") });
        self
    }

    /// With these requests.
    pub fn with_requests(mut self, requests: &[&str]) -> Case {
        self.requests = requests.iter().map(|request| (*request).to_owned()).collect();
        self
    }

    /// With this at the end of the lines of its access log.
    pub fn of_log(mut self, format: &str) -> Case {
        self.of_log = format!(" {format}");
        self
    }

    /// With this format of its access log, which is fields of the log in flow style.
    pub fn of_log_format(mut self, fields: &str) -> Case {
        self.log_format = fields.to_owned();
        self
    }

    /// With this filter of its access log, in flow style.
    pub fn of_log_filter(mut self, filter: &str) -> Case {
        self.log_filter = format!("            filter: {filter}\n");
        self
    }

    /// With a log whose entries go to the gRPC server, of the fields `config`. It is shown each as soon as it is made.
    pub fn of_log_service(mut self, config: &str) -> Case {
        self.further_logs += &format!(
            "          - {{name: grpc, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig, \
             common_config: {{log_name: $case, buffer_size_bytes: 0, transport_api_version: V3, grpc_service: {{envoy_grpc: {{cluster_name: grpc}}}}}}, \
             {config}}}}}\n"
        );
        self
    }

    /// With tags in the entries of its log service, in flow style.
    pub fn of_tags(mut self, tags: &str) -> Case {
        self.further_logs =
            self.further_logs.replace("log_name: $case", &format!("log_name: $case, custom_tags: [{tags}]"));
        self
    }

    /// With objects of the filter state in the entries of its log service.
    pub fn of_state(mut self, names: &str) -> Case {
        let fields = format!("log_name: $case, filter_state_objects_to_log: [{names}]");
        self.further_logs = self.further_logs.replace("log_name: $case", &fields);
        self
    }

    /// A log of the requests that this filter admits, in flow style.
    pub fn of_filtered_log(mut self, filter: &str) -> Case {
        self.further_logs += &format!(
            "          - {{name: grpc, filter: {filter}, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig, \
             common_config: {{log_name: $case, buffer_size_bytes: 0, transport_api_version: V3, grpc_service: {{envoy_grpc: {{cluster_name: grpc}}}}}}, \
             additional_request_headers_to_log: [x-id], additional_response_headers_to_log: [x-envoy-upstream-service-time]}}}}\n"
        );
        self
    }

    /// Of these domains alone.
    pub fn only_domains(mut self, domains: &'static str) -> Case {
        self.domains = domains;
        self
    }

    /// With a route before all others, in flow style.
    pub fn first(mut self, route: &str) -> Case {
        self.first += &format!("{route}, ");
        self
    }

    /// With fields of its router, in flow style.
    pub fn of_router(mut self, fields: &str) -> Case {
        self.of_router = format!(", {fields}");
        self
    }

    /// With all its requests on one connection, which must outlast them.
    pub fn on_one_connection(mut self) -> Case {
        self.on_one_connection = true;
        self
    }

    /// With a line `field: value` of the connection manager.
    pub fn of_manager(mut self, line: &str) -> Case {
        self.of_manager += &format!("          {line}\n");
        self
    }
}

/// What one proxy made of all cases, by case.
fn outcomes(kind: Kind, cases: &[Case], ports: &[u16], dir: &Path) -> Result<Vec<Vec<String>>> {
    let seen = Arc::new(Seen::default());
    let service = upstream::start("a", Arc::clone(&seen))?;
    let authz = upstream::start("authz", Arc::clone(&seen))?;
    let asked = Arc::new(Asked::default());
    let grpc = services::start(Arc::clone(&asked))?;
    let others = ["first", "backup", "degraded", "unhealthy", "draining"]
        .map(|name| Ok((name, upstream::start(name, Arc::clone(&seen))?)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let keys = services::start_keys(super::tokens::keys())?;
    let mut yaml = "static_resources:\n  listeners:\n".to_owned();
    let log = |index: usize| dir.join(format!("{kind:?}-{index}.log"));
    for (index, case) in cases.iter().enumerate() {
        yaml += &listener(ports[index], index, case, &log(index)).replace("$taps", &taps(dir, kind, index));
    }
    yaml += &clusters(&[
        ("a", service, false),
        ("authz", authz, false),
        ("grpc", grpc, true),
        ("keys", keys, false),
        ("dead", 1, true),
    ]);
    yaml += &hosts(&others);
    let mut proxy = Daemon::start(kind, &yaml)?;
    let hide = |index: usize, text: String| {
        let services = [(ports[index], "PORT"), (service, "SERVICE"), (authz, "AUTHZ"), (grpc, "GRPC")];
        let text = services.into_iter().fold(text, |text, (port, name)| text.replace(&port.to_string(), name));
        let all: Vec<_> = others.iter().copied().chain([("a", service)]).collect();
        sessions(&all).into_iter().fold(text, |text, (name, session)| text.replace(&session, &name))
    };
    let mut texts: Vec<Vec<String>> = thread::scope(|scope| {
        let (seen, asked, others, hide) = (&seen, &asked, &others, &hide);
        let run = |(index, case)| {
            scope.spawn(move || {
                let texts = requests(index, case, ports[index], (seen, asked, others));
                texts.into_iter().map(|text| hide(index, text)).collect::<Vec<_>>()
            })
        };
        let running: Vec<_> = cases.iter().enumerate().map(run).collect();
        running.into_iter().map(|case| case.join().unwrap_or_default()).collect()
    });
    let stats = proxy.admin("/stats")?;
    // Access logs are flushed then.
    proxy.signal(Signal::SIGTERM)?;
    proxy.wait(Duration::from_secs(10))?;
    for (index, texts) in texts.iter_mut().enumerate() {
        let lines = others.iter().fold(fs::read_to_string(log(index)).unwrap_or_default(), |lines, (name, port)| {
            lines.replace(&format!(":{port}"), &format!(":{name}")).replace(&format!(" {port} "), &format!(" {name} "))
        });
        texts.push(format!("log:\n{}", own_values(&hide(index, lines))));
        let mut stats = filter_stats(&stats, index);
        if cases[index].of_own_lengths {
            stats = stats.lines().map(|line| own_lengths(line) + "\n").collect();
        }
        texts.push(format!("stats:\n{stats}"));
        texts.push(super::taps::written(&taps(dir, kind, index))?);
    }
    Ok(texts)
}

/// How the paths of a case's taps begin.
fn taps(dir: &Path, kind: Kind, index: usize) -> String {
    format!("{}", dir.join(format!("{kind:?}-{index}-tap")).display())
}

/// What sessions with the hosts of the cluster `many` are called in cases, and what they are in cookies and headers.
fn sessions(others: &[(&'static str, u16)]) -> Vec<(String, String)> {
    use base64::Engine as _;
    let encoded = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let of = |(name, port): &(&str, u16)| {
        let address = format!("127.0.0.1:{port}");
        let cookie = [&[10, address.len() as u8], address.as_bytes()].concat();
        // Seconds since 1970: in 2020, and in 2096.
        let (past, future) = (b"\x10\x80\xa0\xf8\xfa\x05", b"\x10\x80\xd0\xac\xf3\x0e");
        [
            (format!("$cookie_of_{name}"), encoded(&cookie)),
            (format!("$expired_cookie_of_{name}"), encoded(&[&cookie[..], past].concat())),
            (format!("$valid_cookie_of_{name}"), encoded(&[&cookie[..], future].concat())),
            (format!("$address_of_{name}"), encoded(address.as_bytes())),
        ]
    };
    others.iter().flat_map(of).collect()
}

fn requests(
    index: usize,
    case: &Case,
    port: u16,
    (seen, asked, others): (&Seen, &Asked, &[(&'static str, u16)]),
) -> Vec<String> {
    let mut connection = None;
    let one = |(number, request): (usize, &String)| {
        let id = format!("{index}-{number}");
        let told = sessions(others);
        let request = told.iter().fold(request.clone(), |request, (name, session)| request.replace(name, session));
        let bytes = bytes(&request, &id, case.on_one_connection);
        let method = bytes.split(' ').next().unwrap_or_default();
        let mut text = if request.contains("\nupgrade:") {
            tunnel(port, &bytes).unwrap_or_else(|error| format!("{error:#}\n"))
        } else {
            let fetched = match case.on_one_connection {
                true => fetch_on(&mut connection, port, bytes.as_bytes(), method),
                false => fetch_raw(port, bytes.as_bytes(), method),
            };
            match fetched {
                Ok(response) => {
                    let mut headers: Vec<_> =
                        response.headers.0.iter().map(|(name, value)| shown(name, value)).collect();
                    headers.sort_by(|a, b| a.split(':').next().cmp(&b.split(':').next()));
                    let coding = response.headers.get("content-encoding").unwrap_or_default();
                    let body = decoded(coding, &response.body).unwrap_or_else(|| response.text());
                    format!("status {}\n{}\nbody {body:?}\n", response.status, headers.join("\n"))
                }
                Err(_) => "no response\n".to_owned(),
            }
        };
        if let Some(messages) = case.shown.get(number) {
            let all = || Some(()).filter(|()| asked.of(&id).len() >= *messages).context("too few messages");
            if let Err(error) = culvert_tests::wait_until(Duration::from_secs(5), "the services to be shown all", all) {
                text += &format!("{error:#}\n");
            }
        }
        text += &seen.of(&id).join("\n");
        text + &asked.of(&id).iter().map(|asked| format!("\n{asked}")).collect::<String>()
    };
    case.requests.iter().enumerate().map(one).collect()
}

/// Sends a request on a connection that stays, which is made for the first one.
fn fetch_on(
    connection: &mut Option<BufReader<TcpStream>>,
    port: u16,
    bytes: &[u8],
    method: &str,
) -> Result<http1::Response> {
    let stream = match connection {
        Some(stream) => stream,
        none => {
            let stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(Duration::from_secs(15)))?;
            none.insert(BufReader::new(stream))
        }
    };
    stream.get_mut().write_all(bytes)?;
    http1::Response::read(stream, method)
}

/// What a client sees that asks for another protocol, says something in it, and goes. The headers are not looked at.
fn tunnel(port: u16, request: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(request.as_bytes())?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut status = String::new();
    reader.read_line(&mut status)?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
    }
    stream.write_all(b"hi")?;
    let mut answer = [0; 2];
    reader.read_exact(&mut answer)?;
    Ok(format!("{}\n{}\n", status.trim(), String::from_utf8_lossy(&answer)))
}

/// Without the numbers that stand between tildes: how many there are is left, with commas between them.
fn own_values(log: &str) -> String {
    let hide = |(index, part): (usize, &str)| {
        let own = index % 2 == 1 && part.bytes().all(|byte| byte.is_ascii_hexdigit() || b",-".contains(&byte));
        if own && part != "-" { "N,".repeat(part.split(',').count()) } else { part.to_owned() }
    };
    log.split('~').enumerate().map(hide).collect::<Vec<_>>().join("~")
}

/// Without the number of a counter of compressed bytes.
fn own_lengths(line: &str) -> String {
    match line.split_once("total_compressed_bytes:") {
        Some((name, _)) => format!("{name}total_compressed_bytes"),
        None => line.to_owned(),
    }
}

/// What a body says whose coding is not to the byte the same everywhere.
fn decoded(coding: &str, body: &[u8]) -> Option<String> {
    let mut text = Vec::new();
    match coding.split(',').next_back()?.trim() {
        "gzip" => flate2::read::GzDecoder::new(body).read_to_end(&mut text).ok()?,
        "br" => brotli::Decompressor::new(body, 4096).read_to_end(&mut text).ok()?,
        "zstd" => text.write(&zstd::decode_all(body).ok()?).ok()?,
        _ => return None,
    };
    Some(format!("{coding} of {} bytes: {:.100}", text.len(), String::from_utf8_lossy(&text)))
}

/// What has been counted below the names of the filters: those of the connection manager itself have no further dot.
fn filter_stats(stats: &str, index: usize) -> String {
    let mut lines: Vec<_> = stats
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            // Envoy shows histograms after its next flush only.
            if value.contains("P50(") || value == "No recorded values" {
                return None;
            }
            // What is counted of gRPC, or for routes, is the work of all cases together.
            let of_grpc = ["cluster.a.grpc", "cluster.grpc.grpc", "stateful_session."]
                .iter()
                .any(|prefix| name.starts_with(prefix));
            if index == 0 && of_grpc && value != "0" {
                return Some(line.to_owned());
            }
            // What filters count below a cluster's name has the case's name as their prefix.
            let of_cluster = name.strip_prefix("cluster.a.").filter(|own| own.contains(&format!(".case{index}.")));
            let own = of_cluster
                .or_else(|| name.strip_prefix("http_filter_name.")?.strip_prefix(&format!("case{index}.")))
                .or_else(|| name.strip_prefix("http.").unwrap_or(name).strip_prefix(&format!("case{index}.")))?;
            let counted = own.contains('.') || name.starts_with("http_filter_name.");
            let counted = counted && value != "0" && !own.starts_with("tracing.");
            counted.then(|| format!("{own}: {value}"))
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

/// What culvertd alone makes of cases: of what Envoy does otherwise.
pub fn of_culvert(cases: &[Case]) -> Result<Vec<Vec<String>>> {
    let dir = scratch_dir()?;
    let ports: Vec<u16> = cases.iter().map(|_| free_port()).collect::<Result<_>>()?;
    let texts = outcomes(Kind::Culvert, cases, &ports, &dir)?;
    fs::remove_dir_all(&dir)?;
    Ok(texts)
}

/// Fails with all cases in which the two differ.
pub fn compare(cases: Vec<Case>) -> Result<()> {
    // For work on one case.
    let only = std::env::var("ONLY").unwrap_or_default();
    let cases: Vec<_> = cases.into_iter().filter(|case| case.name.contains(&only)).collect();
    let dir = scratch_dir()?;
    let ports: Vec<u16> = (0..2 * cases.len()).map(|_| free_port()).collect::<Result<_>>()?;
    let (envoy, culvert) = thread::scope(|scope| {
        let (cases, dir) = (&cases, &dir);
        let run = |kind, ports| scope.spawn(move || outcomes(kind, cases, ports, dir));
        let (first, second) = ports.split_at(cases.len());
        let (envoy, culvert) = (run(Kind::Envoy, first), run(Kind::Culvert, second));
        (envoy.join(), culvert.join())
    });
    let ended = |_| anyhow::anyhow!("a thread panicked");
    let (expected, seen) = (envoy.map_err(ended)??, culvert.map_err(ended)??);
    fs::remove_dir_all(&dir)?;
    let mut problems = Vec::new();
    for (case, (expected, seen)) in cases.iter().zip(expected.iter().zip(&seen)) {
        let what = case.requests.iter().map(String::as_str).chain(["access log", "stats", "taps"]);
        for (what, (expected, seen)) in what.zip(expected.iter().zip(seen)) {
            if expected != seen {
                problems.push(format!("--- {}: {what}\nEnvoy:\n{expected}\nculvertd:\n{seen}\n", case.name));
            }
        }
    }
    ensure!(problems.is_empty(), "{} differences:\n{}", problems.len(), problems.join("\n"));
    Ok(())
}

/// A header as it is compared.
pub fn shown(name: &str, value: &str) -> String {
    let name = name.to_lowercase();
    // That was so many seconds before, on a busy machine.
    if let ("x-ratelimit-reset", Ok(seconds @ 100..)) = (name.as_str(), value.parse::<u64>()) {
        return format!("{name}: about {}", seconds.next_multiple_of(100));
    }
    if is_own_value(&name) { name } else { format!("{name}: {value}") }
}

/// Whether a header's value is a proxy's own.
pub fn is_own_value(name: &str) -> bool {
    OWN_VALUES.contains(&name)
}

fn bytes(request: &str, id: &str, stays: bool) -> String {
    let (head, body) = request.split_once("\n\n").unwrap_or((request, ""));
    let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
    let mut bytes = format!("{line} HTTP/1.1\r\n");
    if !headers.lines().any(|header| header.starts_with("host:")) {
        bytes += "host: case.test\r\n";
    }
    for header in headers.lines() {
        bytes += &format!("{header}\r\n");
    }
    if !body.is_empty() && !headers.contains("transfer-encoding") {
        bytes += &format!("content-length: {}\r\n", body.len());
    }
    let connection = if stays || headers.contains("connection:") { "" } else { "connection: close\r\n" };
    bytes + &format!("x-id: {id}\r\n{connection}\r\n{body}")
}

fn full_name(message: &str) -> String {
    if message.starts_with("envoy.") { message.to_owned() } else { format!("envoy.extensions.filters.http.{message}") }
}

fn listener(port: u16, index: usize, case: &Case, log: &Path) -> String {
    let filter = |(name, config): &(&str, String)| {
        let config = config.replace("$case", &format!("case{index}"));
        format!(
            "          - name: {name}\n            typed_config: {{\"@type\": \
             type.googleapis.com/{}, {config}}}\n",
            full_name(name)
        )
    };
    let filters: String = case.filters.iter().map(filter).collect();
    let told = case.told.clone().map(|told| told.replace("$case", &format!("case{index}")));
    let [by_config, by_host, by_route, by_cluster] = &told;
    let [of_host, of_action] = &case.of_routes;
    let lengths = if case.of_own_lengths { "" } else { "%BYTES_RECEIVED% %BYTES_SENT%" };
    let format = "%REQ(x-id)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% LENGTHS \
                  %ACCESS_LOG_TYPE% %DYNAMIC_METADATA(ns)% %DYNAMIC_METADATA(ns:k)% %DYNAMIC_METADATA(ns:s:k)% %DYNAMIC_METADATA(envoy.filters.http.header_to_metadata)% \
                  %DYNAMIC_METADATA(ns:k):3% %DYNAMIC_METADATA(envoy.filters.http.ext_authz:k)% %DYNAMIC_METADATA(envoy.filters.http.ratelimit:k)% %DYNAMIC_METADATA(envoy.filters.http.jwt_authn:k)% %DYNAMIC_METADATA(envoy.filters.http.jwt_authn:h)%";
    let format = format.replace("LENGTHS", lengths) + &case.of_log;
    let format = match case.log_format.as_str() {
        "" => format!("log_format: {{text_format_source: {{inline_string: \"{format}\n\"}}}}"),
        fields => fields.to_owned(),
    };
    format!(
        r#"  - name: http_{port}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: case{index}
{of_manager}          access_log:
          - name: envoy.access_loggers.file
{log_filter}            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {log}
              {format}
{further_logs}          route_config:
            name: local
            typed_per_filter_config: {{{by_config}}}
            virtual_hosts:
            - {{name: all, {domains}, typed_per_filter_config: {{{by_host}}}{of_host}, routes: [{first}
                {{match: {{prefix: /direct}}, direct_response: {{status: 200, body: {{inline_string: "direct\n"}}}}, typed_per_filter_config: {{{by_route}}}}},
                {{match: {{prefix: /created}}, direct_response: {{status: 201}}}},
                {{match: {{prefix: /plain}}, route: {{cluster: a}}}},
                {{match: {{prefix: /weighted}}, route: {{weighted_clusters: {{clusters: [{{name: dead, weight: 0}}, {{name: a, weight: 1, typed_per_filter_config: {{{by_cluster}}}}}]}}}}, typed_per_filter_config: {{{by_route}}}}},
                {{match: {{prefix: /envoy.}}, route: {{cluster: grpc}}}},
                {{match: {{prefix: /many}}, route: {{cluster: many{of_action}}}, typed_per_filter_config: {{{by_route}}}}},
                {{match: {{prefix: /other}}, route: {{cluster: many}}}},
                {{match: {{prefix: /}}, route: {{cluster: a{of_action}}}, typed_per_filter_config: {{{by_route}}}}}]}}
          http_filters:
{filters}          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router{of_router}}}
"#,
        of_manager = case.of_manager,
        of_router = case.of_router,
        log_filter = case.log_filter,
        further_logs = case.further_logs.replace("$case", &format!("case{index}")),
        domains = case.domains,
        first = case.first,
        log = log.display(),
    )
}

/// The cluster `many`, of which only the first host is chosen without a session.
fn hosts(others: &[(&'static str, u16)]) -> String {
    let host = |(name, port): &(&str, u16)| {
        let health = match *name {
            "first" | "backup" => "HEALTHY".to_owned(),
            other => other.to_uppercase(),
        };
        format!(
            "      - {{priority: {}, lb_endpoints: [{{health_status: {health}, endpoint: {{address: {{socket_address: \
             {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}\n",
            u8::from(*name != "first")
        )
    };
    let hosts: String = others.iter().map(host).collect();
    format!(
        "  - name: many\n    type: STATIC\n    connect_timeout: 1s\n    load_assignment:\n      cluster_name: many\n      \
         endpoints:\n{hosts}"
    )
}

/// Clusters, each with its name, its port, and whether it is spoken to in HTTP/2. All cases together may retry as they like.
fn clusters(clusters: &[(&str, u16, bool)]) -> String {
    let cluster = |(name, port, http2): &(&str, u16, bool)| {
        let options = if *http2 { "\n    http2_protocol_options: {}" } else { "" };
        format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 10s{options}\n    circuit_breakers: \
             {{thresholds: [{{max_retries: 100}}]}}\n    load_assignment:\n      cluster_name: \
             {name}\n      endpoints: [{{lb_endpoints: [{{endpoint: {{hostname: {name}.service, address: {{socket_address: {{address: 127.0.0.1, \
             port_value: {port}}}}}}}}}]}}]\n"
        )
    };
    format!("  clusters:\n{}", clusters.iter().map(cluster).collect::<String>())
}
