//! grpc_stats, grpc_web.

use std::time::Duration;

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port};
use culvert_tests::wait_until;

use super::harness::{Case, case};
use super::{services, upstream};

const STATS: &str = "grpc_stats.v3.FilterConfig";
const WEB: &str = "grpc_web.v3.GrpcWeb";

pub fn cases() -> Vec<Case> {
    [stats(), web()].concat()
}

pub const ANSWER: &str = "{\"rawBody\": \"YWJj\"}";

/// A message that has the gRPC server answer in this way.
pub fn message(answer: &str) -> String {
    // All these lengths are of one byte, and are letters.
    let field =
        |number: u8, text: &str| format!("{}{}{text}", char::from(number << 3 | 2), char::from(text.len() as u8));
    let entry = field(1, &(field(1, "answer") + &field(2, answer)));
    field(2, &entry)
}

/// The same as a frame.
fn asks(answer: &str) -> String {
    let message = message(answer);
    format!("\0\0\0\0{}{message}", char::from(message.len() as u8))
}

/// A call of the gRPC server, whose trailers are none of the head's.
pub fn called(kind: &str, accept: &str, answer: &str) -> String {
    let body = if kind.contains("text") { STANDARD.encode(asks(answer)) } else { asks(answer) };
    format!(
        "POST /envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit\ncontent-type: {kind}\n\
         accept: {accept}\n\n{body}"
    )
}

/// The service speaks HTTP/1: what its trailers would say stands in the head.
fn stats() -> Vec<Case> {
    let call = |path: &str, service: &str| {
        format!("POST {path}\ncontent-type: application/grpc\nx-do: 200+content-type=application/grpc{service}\n\n")
            + "\0\0\0\0\u{3}abc\0\0\0\0\0"
    };
    let requests = [
        call("/a.Service/Method", "+grpc-status=0"),
        call("/a.Service/Other", "+grpc-status=5+grpc-message=gone"),
        call("/b.Service/Method?x=1", "+grpc-status=16+bytes=0"),
        call("/d.Service/Method", "+grpc-status=0+frames=3"),
        call("/a.Service/Method", ""),
        call("/one", "+grpc-status=0"),
        call("/one/two/three", "+grpc-status=0"),
        call("/direct/method", ""),
        "POST /a.Service/Method\nx-do: 200+grpc-status=0\n\nbody".to_owned(),
        "POST /a.Service/Method\ncontent-type: application/grpc\nx-do: reset\n\n".to_owned(),
        called("application/grpc", "", ANSWER),
        called("application/grpc", "", "status 5"),
        called("application/grpc", "", "http 404"),
    ];
    // Other names than in the other cases: Envoy has counters of the same name for each way of finding them.
    let listed =
        requests.clone().map(|request| request.replace("b.Service", "c.Service").replace("d.Service", "e.Service"));
    let listed: Vec<&str> = listed.iter().map(String::as_str).collect();
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    vec![
        case("nothing of methods", STATS, "", &requests),
        case("stats_for_all_methods", STATS, "stats_for_all_methods: true", &requests),
        case(
            "replace_dots_in_grpc_service_name",
            STATS,
            "stats_for_all_methods: true, replace_dots_in_grpc_service_name: true",
            &requests,
        ),
        case("emit_filter_state", STATS, "emit_filter_state: true", &listed).of_log(
            "%FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN)% %FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN):2%",
        ),
        case(
            "individual_method_stats_allowlist",
            STATS,
            "individual_method_stats_allowlist: {services: [{name: c.Service, method_names: [Method]}, \
             {name: e.Service, method_names: [None, Method]}]}",
            &listed,
        ),
    ]
}

fn web() -> Vec<Case> {
    let kinds = ["", "+proto", "-text", "-text+proto", "-json", "+thrift"];
    let mut requests = Vec::new();
    for kind in kinds {
        // Envoy never ends an answer in base64 that comes without trailers, as HTTP/1 has none.
        for accept in ["", "accept: application/grpc-web-text+json\n", "accept: application/grpc-web+proto\n"] {
            requests.push(format!(
                "POST /web.Service/Method\ncontent-type: application/grpc-web{kind}\n{accept}\
                 x-do: 200+content-type=application/grpc+grpc-status=0+x-a=1+frames=2\n\nAAAAAANhYmM="
            ));
        }
    }
    let binary = "POST /web.Service/Method\ncontent-type: application/grpc-web\n";
    let text = "POST /web.Service/Method\ncontent-type: application/grpc-web-text\naccept: application/grpc-web-text\n";
    for kind in [binary, text] {
        for answer in [
            "200+content-type=application/grpc+grpc-status=5+bytes=0",
            "200",
            "200+bytes=0",
            "404",
            "503+bytes=20000",
            "403+grpc-status=7",
            "reset",
        ] {
            requests.push(format!("{kind}x-do: {answer}\n\nAAAAAANhYmM="));
        }
    }
    for answer in
        ["200+content-type=application/grpc-web+frames=1", "200+content-type=application/grpc-web+grpc-status=0"]
    {
        requests.push(format!("{binary}x-do: {answer}\n\nAAAAAANhYmM="));
    }
    requests.push("POST /direct\ncontent-type: application/grpc-web\n\nAAAAAANhYmM=".to_owned());
    requests
        .push("POST /direct\ncontent-type: application/grpc-web-text\naccept: application/grpc-web-text".to_owned());
    requests.push(format!("{binary}grpc-accept-encoding: gzip\n\nabc"));
    for bad in ["AAAA!AANhYmM=", "AAAAAANhYm", "A", "====", ""] {
        requests.push(format!("{text}\n{bad}"));
    }
    for kind in kinds.map(|kind| format!("application/grpc-web{kind}")) {
        for accept in ["application/grpc-web", "application/grpc-web-text", "application/grpc-web-text+proto"] {
            for answer in [ANSWER, "{}", "status 5", "http 404", "garbage"] {
                requests.push(called(&kind, accept, answer));
            }
        }
    }
    requests.push("GET /".to_owned());
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    vec![case("web", WEB, "", &requests)]
}

/// `enable_upstream_stats`: which calls it is recorded of how long their hosts took, by the names of what they are recorded under.
pub fn times() -> Result<()> {
    let service = "envoy.service.ratelimit.v3.RateLimitService";
    let listed = format!(
        "individual_method_stats_allowlist: {{services: [{{name: {service}, method_names: [ShouldRateLimit]}}]}}"
    );
    let of_http1 = |answer: &str| {
        format!("POST /http1.Service/Method\ncontent-type: application/grpc\nx-do: {answer}\n\n\0\0\0\0\0")
    };
    let requests = [
        called("application/grpc", "", ANSWER),
        called("application/grpc", "", "status 5"),
        called("application/grpc", "", "http 404"),
        called("application/grpc", "", ANSWER).replace("ShouldRateLimit", "None"),
        called("text/plain", "", ANSWER),
        of_http1("200+content-type=application/grpc+grpc-status=0+frames=1"),
        of_http1("200+content-type=application/grpc+grpc-status=3+bytes=0"),
        of_http1("reset"),
        "POST /direct/Method\ncontent-type: application/grpc\n\n".to_owned(),
        "POST /one\ncontent-type: application/grpc\n\n".to_owned(),
    ];
    let raw = |request: &String| {
        let (head, body) = request.split_once("\n\n").unwrap_or((request, ""));
        let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
        let headers: String = headers.lines().map(|header| format!("{header}\r\n")).collect();
        let length = body.len();
        format!("{line} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
    };
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /direct}, direct_response: {status: 200}}, {match: {prefix: \
                  /envoy.}, route: {cluster: grpc}}, {match: {prefix: /}, route: {cluster: http1}}]}";
    let http2 = "http2_protocol_options: {}";
    let told = |kind: Kind, methods: &str| -> Result<Vec<String>> {
        let (grpc, http1) = (services::start(Default::default())?, upstream::start("a", Default::default())?);
        let port = free_port()?;
        let bootstrap =
            Bootstrap::new().http(port, routes, &[]).cluster("grpc", &[grpc], &[http2]).cluster("http1", &[http1], &[]);
        let filter = format!(
            "          http_filters:\n          - name: stats\n            typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.filters.http.{STATS}, enable_upstream_stats: true, {methods}}}\n"
        );
        let proxy = Daemon::start(kind, &bootstrap.yaml().replace("          http_filters:\n", &filter))?;
        for request in &requests {
            // One is not answered by its host.
            drop(fetch_raw(port, raw(request).as_bytes(), "POST"));
        }
        // Envoy shows histograms after its next flush, all of them together.
        wait_until(Duration::from_secs(30), "the statistics", || {
            let text = proxy.admin("/stats/prometheus")?;
            for cluster in ["grpc", "http1"] {
                let of = format!("envoy_cluster_upstream_rq_time_count{{envoy_cluster_name=\"{cluster}\"}} ");
                let count = text.lines().find_map(|line| line.strip_prefix(&of)?.parse().ok());
                // Envoy has none of those that were reset.
                ensure!(count.is_some_and(|count: u64| count >= 3), "{cluster}: {count:?}");
            }
            // How many there are of each, whatever Prometheus calls them, and what they are called.
            let recorded = |line: &&str| line.contains("grpc") && line.contains("upstream_rq_time_count");
            let is_other = |line: &&str| {
                ["envoy_cluster_upstream", "internal", "external"].iter().any(|other| line.contains(other))
            };
            let counts = text.lines().filter(recorded).filter(|line| !is_other(line));
            let mut all: Vec<_> = counts.filter_map(|line| Some(line.rsplit_once(' ')?.1.to_owned())).collect();
            let stats = proxy.admin("/stats")?;
            let names = stats.lines().filter_map(|line| Some(line.split_once(": ")?.0));
            all.extend(names.filter(|name| name.contains(".grpc.") && name.ends_with("_rq_time")).map(str::to_owned));
            all.sort();
            Ok(all)
        })
    };
    for methods in ["", "stats_for_all_methods: true", &listed] {
        let (theirs, ours) = (told(Kind::Envoy, methods)?, told(Kind::Culvert, methods)?);
        ensure!(theirs == ours && !ours.is_empty(), "{methods}\nEnvoy:    {theirs:#?}\nculvertd: {ours:#?}");
    }
    Ok(())
}
