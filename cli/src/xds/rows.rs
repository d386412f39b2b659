//! A client's status as rows: one for each resource.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use clap::ValueEnum;
use culvert_xds_client::json::{pool, unpack};
use envoy_types::pb::{
    envoy::{
        admin::v3::{ClientResourceStatus, UpdateFailureState},
        config::{cluster::v3::Cluster, listener::v3::Listener, route::v3::RouteConfiguration},
        service::status::v3::{
            ClientConfig, ClientStatusResponse, client_config::GenericXdsConfig, per_xds_config::PerXdsConfig,
        },
    },
    google::protobuf::Timestamp,
};
use serde_json::{Value, json};

/// What a server is shown as that resources are had from.
const SOURCE: &str = "SOURCE";

/// The discovery services in the order in which they are shown, with the messages that they deliver.
const SERVICES: [(&str, &str); 10] = [
    (SOURCE, "ConfigSource"),
    ("CDS", "Cluster"),
    ("EDS", "ClusterLoadAssignment"),
    ("LDS", "Listener"),
    ("RDS", "RouteConfiguration"),
    ("SRDS", "ScopedRouteConfiguration"),
    ("VHDS", "VirtualHost"),
    ("SDS", "Secret"),
    ("RTDS", "Runtime"),
    ("ECDS", "TypedExtensionConfig"),
];

/// What `culvert-discovery` delivers besides.
const OFFLOADED: &str = "OffloadedService";

/// What became of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum State {
    /// Traffic obeys it
    Serving,
    /// A version serves, and its successor is warming
    Updating,
    /// Accepted, and waiting for what it needs
    Warming,
    /// It serves, without a secret, routes or endpoints that were refused or did not come
    Incomplete,
    /// The newest version was refused
    Rejected,
    /// Asked for, and not sent yet
    Requested,
    /// Asked for, and the control plane does not have it
    Missing,
    /// From the bootstrap
    Static,
    /// The proxy does not say
    Unknown,
    /// The control plane is there
    Connected,
    /// The control plane is not there, or was never reached
    Disconnected,
}

impl State {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            State::Serving => "serving",
            State::Updating => "updating",
            State::Warming => "warming",
            State::Incomplete => "incomplete",
            State::Rejected => "rejected",
            State::Requested => "requested",
            State::Missing => "missing",
            State::Static => "static",
            State::Unknown => "unknown",
            State::Connected => "connected",
            State::Disconnected => "disconnected",
        }
    }
}

/// One resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub type_url: String,
    pub name: String,
    /// The version in force; may be empty. Of a source its transport.
    pub version: String,
    pub state: State,
    /// When `version` was taken, or where there is none, when the rejected one was refused.
    pub since: Option<SystemTime>,
    /// Why the newest version was rejected, and which one that is.
    pub rejected: Option<(String, String)>,
    /// Of what is warming: "waits for" and what; of what is incomplete: "serves without" and what; of what is missing: why.
    pub waits: Option<String>,
}

impl Row {
    /// It is a server that resources are had from.
    pub fn is_source(&self) -> bool {
        service(&self.type_url) == SOURCE
    }
}

/// The rows of all resources, by service and name.
pub fn of(response: &ClientStatusResponse) -> Vec<Row> {
    let mut rows = Vec::new();
    for config in &response.config {
        let (warming, incomplete) = (warming(config), incomplete(config));
        rows.extend(config.generic_xds_configs.iter().map(|it| row(it, &warming, &incomplete)));
    }
    rows.sort_by(|a, b| (rank(&a.type_url), &a.name).cmp(&(rank(&b.type_url), &b.name)));
    rows
}

/// A version that is warming.
struct Next {
    version: String,
    /// When it came.
    at: Option<Timestamp>,
    /// What it waits for.
    why: Option<String>,
}

impl Next {
    fn new(version: &str, at: Option<Timestamp>, why: Option<&UpdateFailureState>) -> Next {
        Next { version: version.to_owned(), at, why: why.map(|state| state.details.clone()) }
    }
}

/// What is warming, by type and name.
type Warming = HashMap<(String, String), Next>;

fn warming(config: &ClientConfig) -> Warming {
    let mut warming = Warming::new();
    #[expect(deprecated, reason = "the only place in the API where a resource is shown to be warming")]
    let dumps = config.xds_config.iter().filter_map(|dump| dump.per_xds_config.as_ref());
    for dump in dumps {
        match dump {
            PerXdsConfig::ClusterConfig(dump) => {
                for cluster in &dump.dynamic_warming_clusters {
                    let message = cluster.cluster.as_ref().and_then(|any| unpack::<Cluster>(any, "").ok());
                    let name = message.unwrap_or_default().name;
                    let next = Next::new(&cluster.version_info, cluster.last_updated, cluster.error_state.as_ref());
                    warming.insert((<Cluster as prost::Name>::type_url(), name), next);
                }
            }
            PerXdsConfig::ListenerConfig(dump) => {
                for listener in &dump.dynamic_listeners {
                    if let Some(state) = &listener.warming_state {
                        let next = Next::new(&state.version_info, state.last_updated, listener.error_state.as_ref());
                        warming.insert((<Listener as prost::Name>::type_url(), listener.name.clone()), next);
                    }
                }
            }
            PerXdsConfig::RouteConfig(dump) => {
                for routes in &dump.dynamic_route_configs {
                    let message = routes.route_config.as_ref();
                    let message = message.and_then(|any| unpack::<RouteConfiguration>(any, "").ok());
                    let next = Next::new(&routes.version_info, routes.last_updated, routes.error_state.as_ref());
                    let name = message.unwrap_or_default().name;
                    warming.insert((<RouteConfiguration as prost::Name>::type_url(), name), next);
                }
            }
            _ => {}
        }
    }
    warming
}

/// What serves without something that it needs, by type and name, and what that is.
type Incomplete = HashMap<(String, String), String>;

fn incomplete(config: &ClientConfig) -> Incomplete {
    let mut incomplete = Incomplete::new();
    #[expect(deprecated, reason = "the only place in the API for it")]
    let dumps = config.xds_config.iter().filter_map(|dump| dump.per_xds_config.as_ref());
    for dump in dumps {
        match dump {
            PerXdsConfig::ClusterConfig(dump) => {
                for cluster in &dump.dynamic_active_clusters {
                    let message = cluster.cluster.as_ref().and_then(|any| unpack::<Cluster>(any, "").ok());
                    if let Some((message, lacks)) = message.zip(cluster.error_state.as_ref()) {
                        let key = (<Cluster as prost::Name>::type_url(), message.name);
                        incomplete.insert(key, lacks.details.clone());
                    }
                }
            }
            PerXdsConfig::ListenerConfig(dump) => {
                for listener in dump.dynamic_listeners.iter().filter(|it| it.active_state.is_some()) {
                    if let Some(lacks) = &listener.error_state {
                        let key = (<Listener as prost::Name>::type_url(), listener.name.clone());
                        incomplete.insert(key, lacks.details.clone());
                    }
                }
            }
            _ => {}
        }
    }
    incomplete
}

fn row(config: &GenericXdsConfig, warming: &Warming, incomplete: &Incomplete) -> Row {
    let key = (config.type_url.clone(), config.name.clone());
    let next = warming.get(&key);
    let lacks = incomplete.get(&key).filter(|_| next.is_none());
    let state = match (config.client_status(), next) {
        (ClientResourceStatus::Nacked, _) if service(&config.type_url) == SOURCE => State::Disconnected,
        _ if service(&config.type_url) == SOURCE => State::Connected,
        (ClientResourceStatus::Nacked, _) => State::Rejected,
        (ClientResourceStatus::Requested, _) => State::Requested,
        (ClientResourceStatus::DoesNotExist | ClientResourceStatus::Timeout, _) => State::Missing,
        (_, Some(_)) if config.is_static_resource => State::Warming,
        (_, Some(next)) if (&next.version, &next.at) == (&config.version_info, &config.last_updated) => State::Warming,
        (_, Some(_)) => State::Updating,
        _ if lacks.is_some() => State::Incomplete,
        _ if config.is_static_resource => State::Static,
        (ClientResourceStatus::Acked | ClientResourceStatus::ReceivedError, _) => State::Serving,
        (ClientResourceStatus::Unknown, _) => State::Unknown,
    };
    let error = config.error_state.as_ref();
    // What is missing was not rejected.
    let (rejected, missing) = if state == State::Missing { (None, error) } else { (error, None) };
    let attempted = config.error_state.as_ref().and_then(|state| state.last_update_attempt.as_ref());
    Row {
        type_url: config.type_url.clone(),
        name: config.name.clone(),
        version: config.version_info.clone(),
        state,
        since: config.last_updated.as_ref().or(attempted).and_then(time),
        waits: match (next, missing) {
            (Some(next), _) => next.why.clone(),
            (None, Some(missing)) => Some(missing.details.clone()),
            (None, None) => lacks.cloned(),
        },
        rejected: rejected.map(|state| (state.version_info.clone(), state.details.clone())),
    }
}

fn time(at: &Timestamp) -> Option<SystemTime> {
    let since = Duration::new(u64::try_from(at.seconds).ok()?, u32::try_from(at.nanos).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// The last part of a type URL.
fn message(type_url: &str) -> &str {
    type_url.rsplit(['.', '/']).next().unwrap_or(type_url)
}

/// The service that delivers a type; the name of the message where it is none of Envoy's.
pub fn service(type_url: &str) -> &str {
    let known = SERVICES.iter().find(|(_, name)| *name == message(type_url));
    known.map_or(message(type_url), |(service, _)| service)
}

fn rank(type_url: &str) -> (usize, &str) {
    let known = SERVICES.iter().position(|(_, name)| *name == message(type_url));
    (known.unwrap_or(SERVICES.len()), type_url)
}

/// What `--type` was given, where there is such a type.
///
/// # Errors
/// What there is.
pub fn known_type(text: &str) -> Result<String, String> {
    let is = |name: &str| name.eq_ignore_ascii_case(text);
    let is_known = match text.rsplit_once('/') {
        Some((_, full_name)) => pool().get_message_by_name(full_name).is_some(),
        None => SERVICES.iter().any(|(service, message)| is(service) || is(message)) || is(OFFLOADED),
    };
    if is_known {
        return Ok(text.to_owned());
    }
    let services: Vec<_> = SERVICES.iter().map(|(service, _)| service.to_lowercase()).collect();
    Err(format!("there are {}, {OFFLOADED}, the names of their messages, and type URLs", services.join(", ")))
}

/// Whether a type is what `--type` asks for: a service, a message's name or a whole type URL, in any case.
pub fn is_of_type(type_url: &str, wanted: &str) -> bool {
    [service(type_url), message(type_url), type_url].iter().any(|name| name.eq_ignore_ascii_case(wanted))
}

/// Whether `text` is what `pattern` asks for: `*` stands for any text.
pub fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// The rows for programs.
pub fn json(rows: &[Row]) -> String {
    let row = |row: &Row| {
        let mut json = json!({
            "type": service(&row.type_url),
            "type_url": row.type_url,
            "name": row.name,
            "version": row.version,
            "state": row.state.name(),
            "since": row.since.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()).map(|at| at.as_secs()),
        });
        if row.is_source() {
            json["transport"] = json["version"].take();
            json["version"] = "".into();
            if let Some((_, reason)) = &row.rejected {
                json["error"] = reason.as_str().into();
            }
        } else if let Some((version, reason)) = &row.rejected {
            json["rejected"] = json!({ "version": version, "reason": reason });
        }
        if let Some(waits) = &row.waits {
            json["waits"] = waits.as_str().into();
        }
        json
    };
    format!("{:#}\n", Value::Array(rows.iter().map(row).collect()))
}
