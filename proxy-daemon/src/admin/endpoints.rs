//! Which endpoints there are, and what each does.

use std::{fmt::Write as _, time::Instant};

use http::{Method, StatusCode};
use regex::Regex;
use serde_json::{Value as Json, json};
use tracing::level_filters::LevelFilter;

use super::{
    AdminState, ServerState, certs, clusters, config_dump, init_dump, interception,
    request::{Parameters, Reply},
    stats, version,
};
use crate::access_log;

/// One path.
struct Endpoint {
    path: &'static str,
    help: &'static str,
    /// Names of its parameters, and what each means.
    parameters: &'static [(&'static str, &'static str)],
    /// Whether it changes something, and so wants a POST.
    mutates: bool,
    run: fn(&AdminState, &Parameters) -> Reply,
}

const USED_ONLY: (&str, &str) = ("usedonly", "Only include stats that have been written by system since restart");
const FILTER: (&str, &str) = ("filter", "Regular expression for filtering stats");
const INVERT_FILTER: (&str, &str) = ("invert_filter", "Invert the filter regex");
const FORMAT: (&str, &str) = ("format", "File format to use; One of (text, json)");

const ENDPOINTS: &[Endpoint] = &[
    Endpoint { path: "/", help: "Admin home page", parameters: &[], mutates: false, run: |_, _| home() },
    Endpoint {
        path: "/certs",
        help: "print certs on machine",
        parameters: &[],
        mutates: false,
        run: |state, _| Reply::json(&certs::json(&state.data_plane.certificates())),
    },
    Endpoint {
        path: "/clusters",
        help: "upstream cluster status",
        parameters: &[("filter", "Regular expression for filtering clusters by name"), FORMAT],
        mutates: false,
        run: show_clusters,
    },
    Endpoint {
        path: "/config_dump",
        help: "dump current Envoy configs",
        parameters: &[
            ("resource", "The resource to dump"),
            (
                "mask",
                "The mask to apply. When both resource and mask are specified, the mask is applied to every element in the \
                 desired repeated field so that only a subset of fields are returned. The mask is parsed as a \
                 Protobuf::FieldMask",
            ),
            (
                "name_regex",
                "Dump only the currently loaded configurations whose names match the specified regex. Can be used with \
                 both resource and mask query parameters.",
            ),
            (
                "include_eds",
                "Dump currently loaded configuration including EDS. See the response definition for more information",
            ),
        ],
        mutates: false,
        run: config_dump::reply,
    },
    Endpoint {
        path: DRAIN_LISTENERS,
        help: "drain listeners",
        parameters: &[
            ("graceful", "Tell clients to leave with their answers for the drain time, then drain the listeners"),
            ("skip_exit", "As graceful, and leave the listeners open after that too"),
            ("inboundonly", "Only listeners whose traffic_direction is INBOUND"),
        ],
        mutates: true,
        // The server does it: it has to wait.
        run: |_, parameters| {
            let known = ["graceful", "skip_exit", "inboundonly"];
            if let Some((name, _)) = parameters.iter().find(|(name, _)| !known.contains(name)) {
                return Reply::bad_request(format!("unknown parameter {name}: {} are known\n", known.join(", ")));
            }
            Reply::ok()
        },
    },
    Endpoint {
        path: "/healthcheck/fail",
        help: "cause the server to fail health checks",
        parameters: &[],
        mutates: true,
        run: |state, _| {
            state.state.set(ServerState::Draining);
            crate::http::leaving::fail_health_checks(true);
            Reply::ok()
        },
    },
    Endpoint {
        path: "/healthcheck/ok",
        help: "cause the server to pass health checks",
        parameters: &[],
        mutates: true,
        run: |state, _| {
            crate::http::leaving::fail_health_checks(false);
            // Only what `/healthcheck/fail` did is undone: a server that is still starting is not ready.
            if state.state.get() == ServerState::Draining {
                state.state.set(ServerState::Live);
            }
            Reply::ok()
        },
    },
    Endpoint {
        path: "/help",
        help: "print out list of admin commands",
        parameters: &[],
        mutates: false,
        run: |_, _| Reply::text(help()),
    },
    Endpoint {
        path: "/hot_restart_version",
        help: "print the hot restart compatibility version",
        parameters: &[],
        mutates: false,
        // What Envoy says where it cannot be restarted while it serves.
        run: |_, _| Reply::text("disabled"),
    },
    Endpoint {
        path: "/init_dump",
        help: "dump current Envoy init manager information (experimental)",
        parameters: &[(
            "mask",
            "The desired component to dump unready targets. The mask is parsed as a Protobuf::FieldMask. For example, get \
             the unready targets of all listeners with /init_dump?mask=listener`",
        )],
        mutates: false,
        run: init_dump::reply,
    },
    Endpoint {
        path: "/interception/acceleration",
        help: "say how far payload of pods may go past TCP until the daemon ends",
        parameters: &[
            ("level", "off, automatic, shortcut, both-ways or joined"),
            ("listener", "Of this listener's connections only"),
        ],
        mutates: true,
        run: interception::accelerate,
    },
    Endpoint {
        path: "/interception/enroll",
        help: "redirect a pod's connections",
        parameters: &[
            ("address", "An address of the pod; may be given several times"),
            ("name", "What the pod is called"),
            ("direction", "outbound, inbound or both"),
            ("failure_policy", "open or closed"),
            ("acceleration", "off, automatic, shortcut, both-ways or joined"),
        ],
        mutates: true,
        run: interception::enroll,
    },
    Endpoint {
        path: "/interception/pods",
        help: "print the node's pods and what is intercepted of them",
        parameters: &[],
        mutates: false,
        run: interception::pods,
    },
    Endpoint {
        path: "/interception/unenroll",
        help: "leave alone again what /interception/enroll redirected",
        parameters: &[("pod", "The name or an address of the pod")],
        mutates: true,
        run: interception::unenroll,
    },
    Endpoint {
        path: "/listeners",
        help: "print listener info",
        parameters: &[FORMAT],
        mutates: false,
        run: show_listeners,
    },
    Endpoint {
        path: "/logging",
        help: "query/change logging levels",
        parameters: &[(
            "level",
            "desired logging level, this will change all loggers's level; One of (, trace, debug, info, warning, error, \
             critical, off)",
        )],
        mutates: true,
        run: logging,
    },
    Endpoint {
        path: "/memory",
        help: "print current allocation/heap usage",
        parameters: &[],
        mutates: false,
        run: |_, _| stats::memory(),
    },
    Endpoint {
        path: "/overrides",
        help: "print what discovery has told of overrides: offloaded endpoints and policies, by cluster",
        parameters: &[],
        mutates: false,
        run: overrides,
    },
    Endpoint {
        path: "/quitquitquit",
        help: "exit the server",
        parameters: &[],
        mutates: true,
        run: |state, _| {
            state.shutdown.notify_one();
            Reply::ok()
        },
    },
    Endpoint {
        path: "/ready",
        help: "print server state, return 200 if LIVE, otherwise return 503",
        parameters: &[],
        mutates: false,
        run: |state, _| match state.state.get() {
            ServerState::Live => match state.data_plane.interception_faults() {
                faults if faults.is_empty() => Reply::text("LIVE\n"),
                faults => Reply::error(StatusCode::SERVICE_UNAVAILABLE, format!("LIVE\n{}\n", faults.join("\n"))),
            },
            other => Reply::error(StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", other.name())),
        },
    },
    Endpoint {
        path: "/reopen_logs",
        help: "reopen access logs",
        parameters: &[],
        mutates: true,
        run: |_, _| {
            let errors = access_log::reopen_all();
            if errors.is_empty() {
                return Reply::ok();
            }
            Reply::error(StatusCode::INTERNAL_SERVER_ERROR, errors.join("\n") + "\n")
        },
    },
    Endpoint {
        path: "/reset_counters",
        help: "reset all counters to zero",
        parameters: &[],
        mutates: true,
        run: |_, _| {
            crate::stats::reset_counters();
            Reply::ok()
        },
    },
    Endpoint {
        path: "/runtime",
        help: "print runtime values",
        parameters: &[],
        mutates: false,
        run: |state, _| Reply::json(&state.runtime.to_json()),
    },
    Endpoint {
        path: RUNTIME_MODIFY,
        help: "Adds or modifies runtime values as passed in query parameters. To delete a previously added key, use an \
               empty string as the value. Note that deletion only applies to overrides added via this endpoint; values \
               loaded from disk can be modified via override but not deleted. E.g. ?key1=value1&key2=value2...",
        parameters: &[],
        mutates: true,
        run: runtime_modify,
    },
    Endpoint {
        path: "/server_info",
        help: "print server version/status information",
        parameters: &[],
        mutates: false,
        run: server_info,
    },
    Endpoint {
        path: "/stats",
        help: "print server stats",
        parameters: &[
            USED_ONLY,
            FILTER,
            INVERT_FILTER,
            ("format", "Format to use; One of (text, json, prometheus)"),
            ("type", "Stat types to include.; One of (All, Counters, Histograms, Gauges, TextReadouts)"),
            ("histogram_buckets", "Histogram bucket display mode; One of (cumulative, disjoint, summary)"),
        ],
        mutates: false,
        run: stats::stats,
    },
    Endpoint {
        path: "/stats/prometheus",
        help: "print server stats in prometheus format",
        parameters: &[
            USED_ONLY,
            ("text_readouts", "Render text_readouts as new gaugues with value 0 (increases Prometheus data size)"),
            FILTER,
            INVERT_FILTER,
        ],
        mutates: false,
        run: stats::prometheus,
    },
    Endpoint {
        path: TAP,
        help: "tap filter control",
        parameters: &[],
        mutates: true,
        // The server does it: it goes on for as long as the client likes.
        run: |_, _| Reply::ok(),
    },
];

/// Those that there are: `/tap` only with a filter that it configures.
fn endpoints() -> impl Iterator<Item = &'static Endpoint> {
    let taps = crate::http::filters::tap::is_registered();
    ENDPOINTS.iter().filter(move |endpoint| taps || endpoint.path != TAP)
}

/// The one endpoint whose parameters may come as a form.
pub(super) const RUNTIME_MODIFY: &str = "/runtime_modify";

/// The one endpoint whose answer goes on.
pub(super) const TAP: &str = "/tap";

/// The one endpoint that waits for the workers: the server does it.
pub(super) const DRAIN_LISTENERS: &str = "/drain_listeners";

/// What discovery has told of overrides. Not one of Envoy's endpoints.
fn overrides(state: &AdminState, _: &Parameters) -> Reply {
    let table = state.data_plane.offloaded();
    let services: Vec<Json> = table.resources().iter().map(culvert_xds_client::json::to_json).collect();
    Reply::json(&json!({ "services": services }))
}

/// Answers a request, but for what `/drain_listeners` does. Looks many numbers up: not for a thread that must not wait.
pub(super) fn handle(state: &AdminState, method: &Method, path: &str, parameters: &Parameters) -> Reply {
    let Some(endpoint) = endpoints().find(|endpoint| endpoint.path == path) else {
        return Reply::error(StatusCode::NOT_FOUND, format!("invalid path. {}", help()));
    };
    if endpoint.mutates && *method != Method::POST {
        let text = format!("Method {method} not allowed, POST required.");
        return Reply::error(StatusCode::METHOD_NOT_ALLOWED, text);
    }
    (endpoint.run)(state, parameters)
}

/// As Envoy's `/help`.
fn help() -> String {
    let mut text = String::from("admin commands are:\n");
    for endpoint in endpoints() {
        let post = if endpoint.mutates { " (POST)" } else { "" };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {}{post}: {}", endpoint.path, endpoint.help);
        for (name, meaning) in endpoint.parameters {
            let _ = writeln!(text, "      {name}: {meaning}");
        }
    }
    text
}

fn home() -> Reply {
    let mut page = String::from(
        "<!DOCTYPE html>\n<html lang='en'>\n<head><title>Culvert Admin</title></head>\n<body>\n<table>\n\
         <tr><th align='left'>Command</th><th align='left'>Description</th></tr>\n",
    );
    for Endpoint { path, help, mutates, .. } in endpoints() {
        // Links are relative, so that they work behind a proxy that adds a prefix.
        let link = path.trim_start_matches('/');
        // Writing to a String cannot fail.
        let _ = match mutates {
            true => writeln!(
                page,
                "<tr><td><form action='{link}' method='post'><button>{link}</button></form></td><td>{help}</td></tr>"
            ),
            false if link.is_empty() => Ok(()),
            false => writeln!(page, "<tr><td><a href='{link}'>{link}</a></td><td>{help}</td></tr>"),
        };
    }
    page.push_str("</table>\n</body>\n</html>\n");
    Reply::html(page)
}

fn show_clusters(state: &AdminState, parameters: &Parameters) -> Reply {
    let filter = match parameters.get("filter").map(Regex::new) {
        Some(Err(_)) => return Reply::bad_request("Invalid re2 regex"),
        Some(Ok(filter)) => Some(filter),
        None => None,
    };
    let clusters = clusters::choose(&state.data_plane.clusters(), filter.as_ref());
    match parameters.get("format") {
        Some("json") => Reply::json(&clusters::json(&clusters, &state.config)),
        _ => Reply::text(clusters::text(&clusters, &state.config)),
    }
}

fn show_listeners(state: &AdminState, parameters: &Parameters) -> Reply {
    let listeners = state.data_plane.listeners();
    if parameters.get("format") == Some("json") {
        let statuses = listeners.iter().map(|listener| {
            let mut addresses =
                listener.addresses.iter().map(|address| socket_address(&address.ip().to_string(), address.port()));
            let mut status = json!({ "name": &*listener.name, "local_address": addresses.next() });
            let additional: Vec<_> = addresses.collect();
            if !additional.is_empty() {
                status["additional_local_addresses"] = additional.into();
            }
            status
        });
        return Reply::json(&json!({ "listener_statuses": statuses.collect::<Vec<_>>() }));
    }
    let mut text = String::new();
    for listener in &listeners {
        for address in &listener.addresses {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}::{address}", listener.name);
        }
    }
    Reply::text(text)
}

/// An Envoy `Address` message.
pub(super) fn socket_address(address: &str, port: u16) -> Json {
    json!({ "socket_address": { "address": address, "port_value": port } })
}

fn server_info(state: &AdminState, _: &Parameters) -> Reply {
    let uptime = format!("{}s", Instant::now().duration_since(state.started).as_secs());
    Reply::json(&json!({
        "version": version(),
        "state": state.state.get().name(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": state.options,
        "node": state.node,
    }))
}

fn logging(state: &AdminState, parameters: &Parameters) -> Reply {
    if parameters.iter().count() > 1 {
        return Reply::bad_request(logging_usage("error: invalid number of parameters"));
    }
    let wanted = match parameters.iter().next() {
        None | Some(("level", "")) => None,
        Some(("level", level)) => match level_filter(level) {
            Some(level) => Some(level),
            None => return Reply::bad_request(logging_usage("error: unknown logger level")),
        },
        Some(_) => return Reply::bad_request(logging_usage("error: there is one logger only")),
    };
    let level = match (state.log_level)(wanted) {
        LevelFilter::WARN => "warning".to_owned(),
        other => other.to_string(),
    };
    Reply::text(format!("active loggers:\n  culvert: {level}\n"))
}

fn runtime_modify(state: &AdminState, parameters: &Parameters) -> Reply {
    if parameters.iter().next().is_none() {
        return Reply::bad_request(
            "usage: /runtime_modify?key1=value1&key2=value2&keyN=valueN\n       or send the parameters as form values\nuse \
             an empty value to remove a previously added override",
        );
    }
    match state.runtime.modify(parameters.iter()) {
        Ok(()) => Reply::ok(),
        Err(error) => Reply::error(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    }
}

fn logging_usage(error: &str) -> String {
    format!(
        "{error}\n\nusage: /logging?level=<level> (change all levels)\nlevels: trace debug info warning error critical off\n"
    )
}

/// A level under Envoy's name. `critical` is what Envoy logs before it dies: nothing below our errors.
fn level_filter(name: &str) -> Option<LevelFilter> {
    Some(match name {
        "trace" => LevelFilter::TRACE,
        "debug" => LevelFilter::DEBUG,
        "info" => LevelFilter::INFO,
        "warning" | "warn" => LevelFilter::WARN,
        "error" | "critical" => LevelFilter::ERROR,
        "off" => LevelFilter::OFF,
        _ => return None,
    })
}
