//! Tunnels and other protocols: CONNECT, by HTTP/1.1 and HTTP/2, that ends at the proxy or goes on; WebSocket over HTTP/2 (RFC 8441)
//! in all directions; TCP in tunnels. Both proxies get the same YAML and the same clients; what clients and hosts see must be the same.

mod clients;
mod hosts;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, free_port};

use clients::Ask;
use hosts::Seen;

/// Headers whose values are a proxy's own: only that they are there is compared.
const OWN_VALUES: [&str; 4] =
    ["date", "x-envoy-upstream-service-time", "x-request-id", "x-envoy-expected-rq-timeout-ms"];

/// A header as it is compared; none of those that say how one connection is framed.
pub fn shown(name: &str, value: &str) -> String {
    let name = name.to_lowercase();
    if OWN_VALUES.contains(&name.as_str()) { name } else { format!("{name}: {value}") }
}

/// How long tunnels may be idle where that is limited.
const IDLE: Duration = Duration::from_secs(4);

const ROUTES: &str = r#"
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: end}}]}
  route: {cluster: tcp, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: told1}}]}
  route: {cluster: tcp, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {proxy_protocol_config: {version: V1}}}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: told2}}]}
  route: {cluster: tcp, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {proxy_protocol_config: {version: V2}}}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: dead}}]}
  route: {cluster: dead, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: one}}]}
  route: {cluster: http1, upgrade_configs: [{upgrade_type: CONNECT}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: two}}]}
  route: {cluster: http2, upgrade_configs: [{upgrade_type: CONNECT}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: renamed}}]}
  route: {cluster: http1, host_rewrite_literal: "other:99", upgrade_configs: [{upgrade_type: CONNECT}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: barred}}]}
  route: {cluster: tcp, upgrade_configs: [{upgrade_type: CONNECT, enabled: false}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: unsaid}}]}
  route: {cluster: tcp}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: direct}}]}
  direct_response: {status: 418}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: hedged-end}}]}
  route: {cluster: tcp, $hedged, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: hedged-dead}}]}
  route: {cluster: dead, $hedged, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: hedged-one}}]}
  route: {cluster: http1, $hedged, upgrade_configs: [{upgrade_type: CONNECT}]}
- match: {connect_matcher: {}, headers: [{name: ":authority", string_match: {prefix: hedged-two}}]}
  route: {cluster: http2, $hedged, upgrade_configs: [{upgrade_type: CONNECT}]}
- match: {prefix: /hedged-post}
  route: {cluster: tcp, $hedged, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {allow_post: true}}]}
- match: {prefix: /hedged-one}
  route: {cluster: http1, $hedged, upgrade_configs: [{upgrade_type: websocket}]}
- match: {prefix: /hedged-two}
  route: {cluster: http2, $hedged, upgrade_configs: [{upgrade_type: websocket}]}
- match: {prefix: /post}
  route: {cluster: tcp, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {allow_post: true}}]}
- match: {prefix: /one}
  route: {cluster: http1, upgrade_configs: [{upgrade_type: websocket}]}
- match: {prefix: /two}
  route: {cluster: http2, upgrade_configs: [{upgrade_type: websocket}]}
- match: {prefix: /}
  route: {cluster: http1}
"#;

/// A further attempt beside each that takes longer than that, and after each that fails.
const HEDGED: &str = "hedge_policy: {hedge_on_per_try_timeout: true}, retry_policy: {retry_on: 5xx, num_retries: 2, \
                      per_try_timeout: 0.3s, retry_back_off: {base_interval: 0.001s}}";

struct Stage {
    seen: Arc<Seen>,
    /// By listener.
    ports: BTreeMap<&'static str, u16>,
    _proxy: Daemon,
}

impl Stage {
    fn start(kind: Kind) -> Result<Stage> {
        let seen = Arc::new(Seen::default());
        let mut clusters = String::new();
        for (name, port) in [
            ("tcp", hosts::tcp()?),
            ("http1", hosts::http1(&seen)?),
            ("http2", hosts::http2(&seen)?),
            ("dead", free_port()?),
        ] {
            clusters += &cluster(name, port);
        }
        let mut ports = BTreeMap::new();
        let mut listeners = String::new();
        for (name, filter) in listeners_of() {
            let port = free_port()?;
            ports.insert(name, port);
            listeners += &format!(
                "  - name: {name}\n    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}\n    \
                 filter_chains:\n    - filters:\n{filter}"
            );
        }
        let yaml = format!("static_resources:\n  listeners:\n{listeners}  clusters:\n{clusters}");
        Ok(Stage { seen, ports, _proxy: Daemon::start(kind, &yaml)? })
    }

    fn outcome(&self, listener: &str, ask: &Ask) -> Result<String> {
        self.seen.take();
        let port = *self.ports.get(listener).context("a listener")?;
        let text = clients::run(port, ask).unwrap_or_else(|error| format!("{error:#}"));
        Ok(format!("{text}\nseen:\n{}", self.seen.take().join("\n")))
    }
}

fn cluster(name: &str, port: u16) -> String {
    let options = if name == "http2" {
        "    typed_extension_protocol_options:\n      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
         \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
         explicit_http_config: {http2_protocol_options: {allow_connect: true}}\n"
    } else {
        ""
    };
    format!(
        "  - name: {name}\n    type: STATIC\n    connect_timeout: 1s\n{options}    load_assignment:\n      cluster_name: {name}\n      \
         endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]\n"
    )
}

/// Connection managers, and TCP proxies that put what they get into tunnels.
fn listeners_of() -> Vec<(&'static str, String)> {
    let routes: String =
        ROUTES.replace("$hedged", HEDGED).trim().lines().map(|line| format!("              {line}\n")).collect();
    let manager = format!(
        r#"      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          http2_protocol_options: {{allow_connect: true}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
{routes}          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#
    );
    let proxy = |cluster: &str, tunneling: &str, more: &str| {
        format!(
            "      - name: envoy.filters.network.tcp_proxy\n        typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, cluster: {cluster}, \
             tunneling_config: {{{tunneling}}}{more}}}\n"
        )
    };
    let tunnel = |cluster: &str, tunneling: &str| proxy(cluster, tunneling, "");
    let idle = |cluster: &str| proxy(cluster, "hostname: \"host:80\"", &format!(", idle_timeout: {}s", IDLE.as_secs()));
    let added = "headers_to_add: [{header: {key: x-from, value: \"%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%\"}}]";
    vec![
        ("http", manager),
        ("by http1", tunnel("http1", "hostname: \"host:80\"")),
        ("by http2", tunnel("http2", "hostname: \"host:80\"")),
        ("post by http1", tunnel("http1", "hostname: \"host:80\", use_post: true")),
        ("post by http2", tunnel("http2", &format!("hostname: \"host:80\", use_post: true, post_path: /p, {added}"))),
        ("formatted", tunnel("http1", &format!("hostname: \"%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%:7\", {added}"))),
        ("refused by http1", tunnel("http1", "hostname: \"refused:80\"")),
        ("refused by http2", tunnel("http2", "hostname: \"refused:80\"")),
        ("idle by http1", idle("http1")),
        ("idle by http2", idle("http2")),
    ]
}

/// Without the line that says how it ended.
fn without_end(text: &str) -> String {
    let (client, hosts) = text.split_once("\nseen:").unwrap_or((text, ""));
    let lines: Vec<_> = client.trim_end().lines().collect();
    format!("{}{hosts}", lines[..lines.len().saturating_sub(1)].join("\n"))
}

fn compare(listeners: &[&str], asks: &[Ask]) -> Result<()> {
    let only = std::env::var("ONLY").unwrap_or_default();
    let (envoy, culvert) = (Stage::start(Kind::Envoy)?, Stage::start(Kind::Culvert)?);
    let mut wrong = Vec::new();
    for listener in listeners {
        for ask in asks.iter().filter(|ask| format!("{ask:?}").contains(&only)) {
            let (expected, seen) = (envoy.outcome(listener, ask)?, culvert.outcome(listener, ask)?);
            let masked = |stage: &Stage, text: String| {
                stage.ports.values().fold(text, |text, port| text.replace(&port.to_string(), "PORT"))
            };
            let (expected, seen) = (masked(&envoy, expected), masked(&culvert, seen));
            let (expected, seen) = if ask.broken_off {
                ensure!(!expected.contains("bye") && seen.contains("\nbye "), "{ask:?}: {expected}\nculvertd:\n{seen}");
                (without_end(&expected), without_end(&seen))
            } else {
                (expected, seen)
            };
            if expected != seen {
                wrong.push(format!("--- {listener}: {ask:?}\nEnvoy:\n{expected}\nculvertd:\n{seen}\n"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

#[test]
fn connect_is_envoys() -> Result<()> {
    let authorities = [
        "end:80",
        "told1:80",
        "told2:80",
        "dead:80",
        "one:80",
        "two:80",
        "renamed:80",
        "barred:80",
        "unsaid:80",
        "direct:80",
    ];
    let mut asks = Vec::new();
    for authority in authorities {
        asks.push(Ask::http1("CONNECT", authority, &[], &["hello", "again"]));
        let ask = Ask::http2("CONNECT", authority, "", &[], &["hello", "again"]);
        asks.push(if ["one:80", "renamed:80"].contains(&authority) { ask.broken_off() } else { ask });
    }
    for authority in ["one:80", "two:80"] {
        asks.push(Ask::http1("CONNECT", authority, &[("x-do", "403")], &[]));
        asks.push(Ask::http2("CONNECT", authority, "", &[("x-do", "403")], &[]));
        asks.push(Ask::http1("CONNECT", authority, &[("x-do", "201")], &["hello"]));
        let ask = Ask::http2("CONNECT", authority, "", &[("x-do", "201")], &["hello"]);
        asks.push(if authority == "one:80" { ask.broken_off() } else { ask });
    }
    asks.push(Ask::http1("CONNECT", "end:80", &[("content-length", "3")], &[]));
    asks.push(Ask::http1("CONNECT", "end:80", &[("content-length", "0")], &["hello"]));
    asks.push(Ask::http1("CONNECT", "end:80", &[("host", "other")], &["hello"]));
    asks.push(Ask::http1("CONNECT", "end", &[], &[]));
    asks.push(Ask::http1("CONNECT", "/end", &[], &[]));
    compare(&["http"], &asks)
}

#[test]
fn posts_are_tunnels_where_they_may() -> Result<()> {
    let asks = [Ask::http2("POST", "a", "/post", &[], &["hello", "again"]), Ask::http2("GET", "a", "/post", &[], &[])];
    compare(&["http"], &asks)
}

#[test]
fn websockets_pass_between_all_versions() -> Result<()> {
    let mut asks = Vec::new();
    for path in ["/one", "/two", "/other"] {
        asks.push(Ask::http1("websocket", "a", &[], &["hello", "again"]).at(path));
        asks.push(Ask::http2("websocket", "a", path, &[], &["hello", "again"]));
        for status in ["403", "200"] {
            asks.push(Ask::http1("websocket", "a", &[("x-do", status)], &[]).at(path));
            asks.push(Ask::http2("websocket", "a", path, &[("x-do", status)], &[]));
        }
    }
    compare(&["http"], &asks)
}

/// No attempt at CONNECT is late, since the request goes on: only one of WebSocket is. Those that fail are followed by others.
#[test]
fn tunnels_over_hedged_routes_are_envoys() -> Result<()> {
    let mut asks = Vec::new();
    for authority in ["hedged-end:80", "hedged-dead:80", "hedged-one:80", "hedged-two:80"] {
        // Where a tunnel ends at the proxy its host knows of no requests.
        let does: &[&str] = if authority.contains("-end") || authority.contains("-dead") { &[""] } else { &DOES };
        for does in does {
            let headers: &[_] = if does.is_empty() { &[] } else { &[("x-do", *does)] };
            asks.push(Ask::http1("CONNECT", authority, headers, &["hello", "again"]));
            let ask = Ask::http2("CONNECT", authority, "", headers, &["hello", "again"]);
            asks.push(if authority == "hedged-one:80" && !does.contains("503") { ask.broken_off() } else { ask });
        }
    }
    asks.push(Ask::http2("POST", "a", "/hedged-post", &[], &["hello", "again"]));
    for path in ["/hedged-one", "/hedged-two"] {
        for does in DOES {
            let headers: &[_] = if does.is_empty() { &[] } else { &[("x-do", does)] };
            asks.push(Ask::http1("websocket", "a", headers, &["hello", "again"]).at(path));
            asks.push(Ask::http2("websocket", "a", path, headers, &["hello", "again"]));
        }
    }
    compare(&["http"], &asks)
}

/// What hosts are told to do.
const DOES: [&str; 3] = ["", "late", "503"];

#[test]
fn tcp_passes_in_tunnels() -> Result<()> {
    let ask = Ask::tcp(&["hello", "again"]);
    compare(&["by http1", "post by http1", "formatted"], &[ask.clone().broken_off()])?;
    compare(&["by http2", "post by http2", "refused by http1", "refused by http2"], &[ask])
}

#[test]
fn idle_tunnels_end() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind)?;
        let mut clients = Vec::new();
        for listener in ["idle by http1", "idle by http2"].repeat(4) {
            let mut client = TcpStream::connect(("127.0.0.1", *stage.ports.get(listener).context("a listener")?))?;
            client.write_all(b"hello")?;
            client.read_exact(&mut [0; 5])?;
            clients.push((listener, client));
        }
        // Nobody says anything more: the proxy ends them, in one way or another, and not only when their time has come again.
        let began = Instant::now();
        for (listener, mut client) in clients {
            let left = (IDLE * 5 / 2).saturating_sub(began.elapsed()).max(Duration::from_millis(1));
            client.set_read_timeout(Some(left))?;
            let ended = client.read(&mut [0; 5]);
            let open = matches!(&ended, Err(error) if error.kind() == ErrorKind::WouldBlock);
            ensure!(!open, "{kind:?}, {listener}: open after its time");
        }
    }
    Ok(())
}
