//! `/config_dump`: the whole, or what is asked for.

use std::{sync::Arc, time::SystemTime};

use envoy_types::pb::{
    envoy::{
        admin::v3::{
            BootstrapConfigDump,
            endpoints_config_dump::{DynamicEndpointConfig, StaticEndpointConfig},
        },
        config::{
            core::v3::{Address, Locality, Pipe, SocketAddress, address, socket_address::PortSpecifier},
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, cluster_load_assignment::Policy,
                endpoint::HealthCheckConfig, lb_endpoint::HostIdentifier,
            },
        },
    },
    google::protobuf::UInt32Value,
};
use http::StatusCode;
use prost_reflect::{DynamicMessage, MessageDescriptor, ReflectMessage as _, Value};
use regex::Regex;

use culvert_xds_client::json;

use super::{
    AdminState,
    mask::{self, Mask},
    pretty,
    request::{Parameters, Reply},
};
use crate::{
    config::{
        dump::{self, Element, Head, List, Section},
        model::{Discovery, EndpointAddress},
    },
    upstream::{Cluster, Host, Standing},
};

const ANY_PREFIX: &str = "type.googleapis.com/";

/// Answers a request. Takes as long as it takes to print all that is asked for: not for a thread that must not wait.
pub(super) fn reply(state: &AdminState, parameters: &Parameters) -> Reply {
    let text = |name| parameters.get(name).filter(|text| !text.is_empty());
    let name_regex = match text("name_regex").map(|text| (text, Regex::new(&format!("^(?:{text})$")))) {
        None => None,
        Some((_, Ok(regex))) => Some(regex),
        Some((text, Err(error))) => {
            let why = error.to_string();
            let why = why.lines().last().unwrap_or_default().trim_start_matches("error: ");
            let body = format!("INVALID_ARGUMENT: Error while parsing name_regex from {text}: {why}");
            return Reply::plain_error(StatusCode::BAD_REQUEST, body);
        }
    };
    let endpoints = parameters.get("include_eds").and_then(|_| endpoints(state));
    let mut sections = state.config.sections(endpoints);
    if let Some(regex) = name_regex {
        for list in sections.iter_mut().flat_map(|section| &mut section.lists) {
            list.elements.retain(|element| regex.is_match(&element.name));
        }
    }
    let paths = text("mask").map(|mask| (mask, mask::paths(mask)));
    let outcome = match text("resource") {
        Some(resource) => one_list(sections, resource, paths.map(|(_, paths)| paths).as_deref()),
        None => everything(sections, paths),
    };
    match outcome {
        Ok(body) => Reply::json_bytes(body),
        Err((status, text)) => Reply::plain_error(status, text),
    }
}

type Outcome = Result<Vec<u8>, (StatusCode, String)>;

fn everything(sections: Vec<Section>, asked: Option<(&str, Vec<&str>)>) -> Outcome {
    let mut body = Configs::default();
    for section in sections {
        let Some(descriptor) = json::pool().get_message_by_name(&section.message) else { continue };
        let paths = asked.as_ref().map(|(_, paths)| &paths[..]).unwrap_or_default();
        if !paths.iter().all(|path| mask::is_valid(&descriptor, path)) {
            continue;
        }
        let mask = Mask::new(paths.iter().copied());
        body.section(section, &descriptor, &mask);
    }
    match asked {
        Some((text, _)) if body.is_empty() => Err((
            StatusCode::BAD_REQUEST,
            format!("FieldMask {text} could not be successfully applied to any configs."),
        )),
        _ => Ok(body.finish()),
    }
}

/// The elements of the list that is called `resource`, each trimmed.
fn one_list(sections: Vec<Section>, resource: &str, paths: Option<&[&str]>) -> Outcome {
    for section in sections {
        let descriptor = json::pool().get_message_by_name(&section.message);
        let Some(field) = descriptor.and_then(|descriptor| descriptor.get_field_by_name(resource)) else { continue };
        if !field.is_list() {
            let text = format!("{resource} is not a repeated field. Use ?mask={resource} to get only this field");
            return Err((StatusCode::BAD_REQUEST, text));
        }
        let mut body = Configs::default();
        for element in section.lists.into_iter().filter(|list| list.field == resource).flat_map(|list| list.elements) {
            let mut message = (element.make)();
            if let Some(paths) = paths
                && !mask::trim_element(&mut message, paths)
            {
                let paths: String = paths.iter().map(|path| format!("paths: {path:?}\n")).collect();
                return Err((StatusCode::BAD_REQUEST, format!("FieldMask {paths} could not be successfully used.")));
            }
            body.message(&message);
        }
        return Ok(body.finish());
    }
    Err((StatusCode::NOT_FOUND, format!("{resource} not found in config dump")))
}

/// The JSON of a `ConfigDump` while it is written.
#[derive(Default)]
struct Configs(Vec<u8>);

impl Configs {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn open(&mut self, message: &str) {
        self.0.extend_from_slice(if self.0.is_empty() { b"{\n \"configs\": [" } else { b"," });
        pretty::line(&mut self.0, 2);
        self.0.push(b'{');
        pretty::line(&mut self.0, 3);
        pretty::key(&mut self.0, "@type");
        pretty::write(&mut self.0, &format!("{ANY_PREFIX}{message}").into(), 3);
    }

    fn fields(&mut self, message: &DynamicMessage) {
        for (name, value) in json::dynamic_to_json(message).as_object().into_iter().flatten() {
            self.field(name);
            pretty::write(&mut self.0, value, 3);
        }
    }

    fn field(&mut self, name: &str) {
        self.0.push(b',');
        pretty::line(&mut self.0, 3);
        pretty::key(&mut self.0, name);
    }

    fn close(&mut self) {
        pretty::line(&mut self.0, 2);
        self.0.push(b'}');
    }

    fn message(&mut self, message: &DynamicMessage) {
        self.open(message.descriptor().full_name());
        self.fields(message);
        self.close();
    }

    fn section(&mut self, section: Section, descriptor: &MessageDescriptor, mask: &Mask) {
        self.open(&section.message);
        let mut message = head(descriptor, section.head);
        mask.trim(&mut message);
        self.fields(&message);
        for List { field, elements } in section.lists {
            if elements.is_empty() || !mask.keeps(field) {
                continue;
            }
            self.field(field);
            self.0.push(b'[');
            for (index, element) in elements.into_iter().enumerate() {
                if index > 0 {
                    self.0.push(b',');
                }
                pretty::line(&mut self.0, 4);
                pretty::write(&mut self.0, &json::dynamic_to_json(&(element.make)()), 4);
            }
            pretty::line(&mut self.0, 3);
            self.0.push(b']');
        }
        self.close();
    }

    fn finish(mut self) -> Vec<u8> {
        self.0.extend_from_slice(if self.0.is_empty() { b"{}\n" } else { b"\n ]\n}\n" });
        self.0
    }
}

/// What a section has besides its lists.
fn head(descriptor: &MessageDescriptor, fields: Vec<(&'static str, Head)>) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for (name, value) in fields {
        let value = match value {
            Head::Text(text) => Value::String(text),
            Head::Time(at) => last_updated(at),
            Head::Bootstrap(bootstrap) => Value::Message(json::to_dynamic(&*bootstrap)),
        };
        message.set_field_by_name(name, value);
    }
    message
}

/// A time as the value of a field.
fn last_updated(at: SystemTime) -> Value {
    let dump = BootstrapConfigDump { last_updated: Some(dump::timestamp(at)), ..Default::default() };
    let dump = json::to_dynamic(&dump);
    dump.get_field_by_name("last_updated").map(std::borrow::Cow::into_owned).unwrap_or(Value::Bool(false))
}

/// The endpoints of all clusters, as the data plane has them; `None` without clusters, as in Envoy.
fn endpoints(state: &AdminState) -> Option<Section> {
    let clusters = super::clusters::choose(&state.data_plane.clusters(), None);
    if clusters.is_empty() {
        return None;
    }
    let (fixed, dynamic): (Vec<_>, Vec<_>) =
        clusters.into_iter().partition(|it| state.config.is_static_cluster(&it.config.name));
    let fixed = fixed.into_iter().map(|cluster| {
        let name = assigned_name(&cluster);
        Element::new(name, move || StaticEndpointConfig {
            endpoint_config: Some(assignment(&cluster)),
            ..Default::default()
        })
    });
    let dynamic = dynamic.into_iter().map(|cluster| {
        let name = assigned_name(&cluster);
        Element::new(name, move || DynamicEndpointConfig {
            endpoint_config: Some(assignment(&cluster)),
            ..Default::default()
        })
    });
    Some(dump::endpoints_section(fixed.collect(), dynamic.collect()))
}

/// The name by which EDS knows a cluster's endpoints.
fn assigned_name(cluster: &Cluster) -> String {
    match &cluster.config.discovery {
        Discovery::Eds { endpoints } => endpoints.name.to_string(),
        _ => cluster.config.name.to_string(),
    }
}

/// The hosts of a cluster as an assignment, grouped by priority and locality.
fn assignment(cluster: &Cluster) -> culvert_xds_client::Any {
    let hosts = cluster.hosts();
    let mut groups: Vec<(u32, Locality, Vec<&Arc<Host>>)> = Vec::new();
    for host in &hosts.hosts {
        let locality = locality(host);
        match groups.iter_mut().find(|(priority, known, _)| *priority == host.priority && *known == locality) {
            Some((_, _, members)) => members.push(host),
            None => groups.push((host.priority, locality, vec![host])),
        }
    }
    groups.sort_by_key(|(priority, ..)| *priority);
    let endpoints = groups.into_iter().map(|(priority, locality, members)| LocalityLbEndpoints {
        locality: Some(locality),
        priority,
        // Envoy shows a 0 where none is said.
        load_balancing_weight: Some(UInt32Value { value: hosts.locality_weight(priority, &members[0].locality) }),
        lb_endpoints: members.into_iter().map(|host| lb_endpoint(host)).collect(),
        ..Default::default()
    });
    let factor = UInt32Value { value: hosts.overprovisioning_factor() };
    let policy = Policy { overprovisioning_factor: Some(factor), ..Default::default() };
    dump::pack(&ClusterLoadAssignment {
        cluster_name: assigned_name(cluster),
        endpoints: endpoints.collect(),
        policy: Some(policy),
        ..Default::default()
    })
}

fn locality(host: &Host) -> Locality {
    let known = &host.locality;
    Locality { region: known.region.clone(), zone: known.zone.clone(), sub_zone: known.sub_zone.clone() }
}

fn lb_endpoint(host: &Host) -> LbEndpoint {
    use envoy_types::pb::envoy::config::core::v3::HealthStatus as Shown;

    let socket = |address: String, port: u16| {
        let port_specifier = Some(PortSpecifier::PortValue(port.into()));
        address::Address::SocketAddress(SocketAddress { address, port_specifier, ..Default::default() })
    };
    let address = match &host.address {
        EndpointAddress::Ip(ip) => socket(ip.ip().to_string(), ip.port()),
        EndpointAddress::Dns { host, port } => socket(host.to_string(), *port),
        EndpointAddress::Pipe(path) => {
            address::Address::Pipe(Pipe { path: path.display().to_string(), ..Default::default() })
        }
    };
    let health = match host.standing() {
        Standing::Healthy => Shown::Healthy,
        Standing::Degraded => Shown::Degraded,
        Standing::Unhealthy | Standing::Excluded => Shown::Unhealthy,
    };
    LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(Address { address: Some(address) }),
            health_check_config: Some(HealthCheckConfig::default()),
            hostname: host.hostname().to_owned(),
            ..Default::default()
        })),
        health_status: health.into(),
        load_balancing_weight: Some(UInt32Value { value: host.weight }),
        ..Default::default()
    }
}
