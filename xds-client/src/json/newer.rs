//! Fields of Envoy's API that are newer than the messages of `envoy-types`.
//!
//! The build script adds those of `proto/newer` to the descriptors: they are read, checked and printed as all others. A typed message
//! has no place for them. There they travel in another field, in a form that no configuration that passes its checks has, and that is
//! changed where somebody writes it: [`hide`] puts them there, [`show`] takes them out again, and the code that reads typed messages asks the functions here.

use std::borrow::Cow;

use envoy_types::pb::envoy::{
    config::core::v3::{HealthCheck, TypedExtensionConfig},
    service::health::v3::HealthCheckSpecifier,
};
use prost::{DecodeError, Message, Name};
use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::pool;

const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";
const STATIC_RESOURCES: &str = "envoy.config.bootstrap.v3.Bootstrap.StaticResources";
const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const SPECIFIER: &str = "envoy.service.health.v3.HealthCheckSpecifier";
const CLUSTER_HEALTH_CHECK: &str = "envoy.service.health.v3.ClusterHealthCheck";
const HEALTH_CHECK: &str = "envoy.config.core.v3.HealthCheck";

/// Begins the name of the extension, among the `event_logger` of a health check, that carries the check's own name. It has no
/// `typed_config`, which those that are configured must have.
const CARRIED_NAME: &str = "culvert.newer.HealthCheck.name=";

/// The name that an extension carries.
fn carried(logger: &TypedExtensionConfig) -> Option<&str> {
    logger.name.strip_prefix(CARRIED_NAME).filter(|_| logger.typed_config.is_none())
}

/// The same of a message.
fn carried_in(logger: &Value) -> Option<String> {
    let logger = logger.as_message().filter(|logger| !logger.has_field_by_name("typed_config"))?;
    logger.get_field_by_name("name")?.as_str()?.strip_prefix(CARRIED_NAME).map(str::to_owned)
}

/// What `HealthCheck.name` says; empty where nothing.
pub fn health_check_name(check: &HealthCheck) -> &str {
    check.event_logger.iter().find_map(carried).unwrap_or_default()
}

/// `HealthCheck.event_logger`, each with its number.
pub fn event_loggers(check: &HealthCheck) -> impl Iterator<Item = (usize, &TypedExtensionConfig)> {
    check.event_logger.iter().enumerate().filter(|(_, logger)| carried(logger).is_none())
}

/// Of a cluster, only what [`decode`] looks for.
#[derive(Clone, PartialEq, Message)]
struct ClusterPart {
    #[prost(message, repeated, tag = "8")]
    health_checks: Vec<HealthCheckPart>,
}

#[derive(Clone, PartialEq, Message)]
struct HealthCheckPart {
    #[prost(string, tag = "27")]
    name: String,
}

/// A typed message from bytes in which newer fields stand where Envoy has them.
pub(super) fn decode<T: Message + Name + Default>(bytes: &[u8]) -> Result<T, DecodeError> {
    let is_written = || memchr::memmem::find(bytes, CARRIED_NAME.as_bytes()).is_some();
    let is_named = |cluster: ClusterPart| cluster.health_checks.iter().any(|check| !check.name.is_empty());
    if T::full_name() == CLUSTER
        && (is_named(ClusterPart::decode(bytes)?) || is_written())
        && let Some(descriptor) = pool().get_message_by_name(CLUSTER)
    {
        let mut message = DynamicMessage::decode(descriptor, bytes)?;
        hide(&mut message);
        return T::decode(message.encode_to_vec().as_slice());
    }
    T::decode(bytes)
}

/// What a management server wants checked, from bytes as it sends them: the same as in clusters.
///
/// # Errors
/// They are no such message.
pub fn decode_specifier(bytes: &[u8]) -> Result<HealthCheckSpecifier, DecodeError> {
    let Some(descriptor) = pool().get_message_by_name(SPECIFIER) else { return HealthCheckSpecifier::decode(bytes) };
    let mut message = DynamicMessage::decode(descriptor, bytes)?;
    hide(&mut message);
    HealthCheckSpecifier::decode(message.encode_to_vec().as_slice())
}

/// The other way round.
pub(super) fn encode<T: Message + Name>(message: &T) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    if memchr::memmem::find(&bytes, CARRIED_NAME.as_bytes()).is_none() {
        return bytes;
    }
    super::dynamic(message).map_or(bytes, |message| message.encode_to_vec())
}

/// Puts newer fields where a typed message has a place for them.
pub(super) fn hide(message: &mut DynamicMessage) {
    each_health_check(message, &|check| {
        // Who writes what is ours alone has an extension without a configuration, which is refused by its place.
        if check.has_field_by_name("event_logger")
            && let Some(Value::List(loggers)) = check.get_field_by_name_mut("event_logger")
        {
            for logger in loggers.iter_mut().filter(|logger| carried_in(logger).is_some()) {
                logger.as_message_mut().into_iter().for_each(|logger| logger.clear_field_by_name("name"));
            }
        }
        let name = check.get_field_by_name("name").map(Cow::into_owned);
        let (Some(Value::String(name)), Some(descriptor)) =
            (name, pool().get_message_by_name(&TypedExtensionConfig::full_name()))
        else {
            return;
        };
        if name.is_empty() {
            return;
        }
        check.clear_field_by_name("name");
        let mut carrier = DynamicMessage::new(descriptor);
        carrier.set_field_by_name("name", Value::String(format!("{CARRIED_NAME}{name}")));
        if let Some(Value::List(loggers)) = check.get_field_by_name_mut("event_logger") {
            loggers.push(Value::Message(carrier));
        }
    });
}

/// Puts newer fields where Envoy has them.
pub(super) fn show(message: &mut DynamicMessage) {
    each_health_check(message, &|check| {
        if !check.has_field_by_name("event_logger") {
            return;
        }
        let Some(Value::List(loggers)) = check.get_field_by_name_mut("event_logger") else { return };
        let named = loggers.iter().enumerate().find_map(|(at, logger)| Some((at, carried_in(logger)?)));
        let Some((at, name)) = named else { return };
        loggers.remove(at);
        check.set_field_by_name("name", Value::String(name));
    });
}

fn each_health_check(message: &mut DynamicMessage, change: &impl Fn(&mut DynamicMessage)) {
    let next = match message.descriptor().full_name() {
        BOOTSTRAP => "static_resources",
        STATIC_RESOURCES => "clusters",
        SPECIFIER => "cluster_health_checks",
        CLUSTER | CLUSTER_HEALTH_CHECK => "health_checks",
        HEALTH_CHECK => return change(message),
        _ => return,
    };
    for (field, value) in message.fields_mut() {
        if field.name() != next {
            continue;
        }
        match value {
            Value::Message(inner) => each_health_check(inner, change),
            Value::List(items) => {
                let inner = items.iter_mut().filter_map(Value::as_message_mut);
                inner.for_each(|inner| each_health_check(inner, change));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::{bootstrap::v3::Bootstrap, cluster::v3::Cluster};
    use serde_json::json;

    use super::super::{from_yaml, merge_yaml, pack, pool, resolve_typed_structs, to_json, unpack, validate};
    use super::*;
    use crate::json::UnknownFields;

    const CLUSTER_OF_THREE: &str = "{ name: c, health_checks: [
        { name: one, timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {},
          event_logger: [{ name: l, typed_config: { '@type': type.googleapis.com/google.protobuf.Empty } }] },
        { timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {} },
        { timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}, name: three }] }";

    fn names(cluster: &Cluster) -> Vec<&str> {
        cluster.health_checks.iter().map(health_check_name).collect()
    }

    #[test]
    fn names_of_health_checks_are_read_and_shown() {
        let cluster: Cluster = from_yaml(CLUSTER_OF_THREE).unwrap();
        assert_eq!(names(&cluster), ["one", "", "three"]);
        let loggers = cluster.health_checks.iter().map(|it| event_loggers(it).count());
        assert_eq!(loggers.collect::<Vec<_>>(), [1, 0, 0]);
        validate(&cluster).unwrap();
        let shown = to_json(&cluster);
        assert_eq!(shown["health_checks"][0]["name"], "one");
        assert_eq!(shown["health_checks"][0]["event_logger"].as_array().unwrap().len(), 1);
        assert_eq!(shown["health_checks"][2].get("event_logger"), None);
        // As it was written, it is read again.
        let again: Cluster = super::super::from_json(shown).unwrap();
        assert_eq!(again, cluster);
    }

    #[test]
    fn names_of_health_checks_are_in_bytes_where_envoy_has_them() {
        let cluster: Cluster = from_yaml(CLUSTER_OF_THREE).unwrap();
        let any = pack(&cluster);
        let descriptor = pool().get_message_by_name(CLUSTER).unwrap();
        let message = DynamicMessage::decode(descriptor, any.value.as_slice()).unwrap();
        let checks = message.get_field_by_name("health_checks").unwrap();
        let name = |check: &Value| check.as_message().unwrap().get_field_by_name("name").unwrap().into_owned();
        let found: Vec<_> = checks.as_list().unwrap().iter().map(name).collect();
        assert_eq!(found, ["one", "", "three"].map(|name| Value::String(name.to_owned())));
        assert_eq!(unpack::<Cluster>(&any, "").unwrap(), cluster);
        assert_eq!(super::super::any_to_json(&any)["health_checks"][2]["name"], json!("three"));
    }

    #[test]
    fn management_servers_name_health_checks_as_well() {
        let written =
            format!("{{ cluster_health_checks: [{}] }}", CLUSTER_OF_THREE.replace("name: c", "cluster_name: c"));
        let specifier: HealthCheckSpecifier = from_yaml(&written).unwrap();
        validate(&specifier).unwrap();
        let sent = super::super::dynamic(&specifier).unwrap().encode_to_vec();
        assert!(memchr::memmem::find(&sent, CARRIED_NAME.as_bytes()).is_none(), "it is sent as Envoy has it");
        let received = decode_specifier(&sent).unwrap();
        assert_eq!(received, specifier);
        let names: Vec<_> = received.cluster_health_checks[0].health_checks.iter().map(health_check_name).collect();
        assert_eq!(names, ["one", "", "three"]);
        assert!(decode_specifier(b"\xff\xff").is_err());
    }

    #[test]
    fn what_carries_names_cannot_be_written() {
        let written = |logger: &str| {
            let cluster = CLUSTER_OF_THREE.replace("name: l,", logger);
            validate(&from_yaml::<Cluster>(&cluster).unwrap()).map_err(|error| error.to_string())
        };
        assert_eq!(written("name: l,"), Ok(()));
        // One with a configuration is an extension like all others: it carries nothing.
        let cluster = CLUSTER_OF_THREE.replace("name: l,", &format!("name: {CARRIED_NAME}other,"));
        let cluster: Cluster = from_yaml(&cluster).unwrap();
        assert_eq!((names(&cluster)[0], event_loggers(&cluster.health_checks[0]).count()), ("one", 1));
        // One without is refused, also in bytes.
        let empty = format!("name: '{CARRIED_NAME}other' }}, {{ name: l,");
        assert!(written(&empty).unwrap_err().contains("event_logger[0]"), "{:?}", written(&empty));
        let mut cluster: Cluster = from_yaml("{ name: c }").unwrap();
        let carrier = TypedExtensionConfig { name: format!("{CARRIED_NAME}other"), typed_config: None };
        cluster.health_checks.push(HealthCheck { event_logger: vec![carrier], ..HealthCheck::default() });
        let read: Cluster = decode(cluster.encode_to_vec().as_slice()).unwrap();
        assert_eq!((names(&read), event_loggers(&read.health_checks[0]).count()), (vec![""], 1));
    }

    #[test]
    fn a_bootstrap_keeps_names_whatever_becomes_of_it() {
        let text = format!("{{ static_resources: {{ clusters: [{CLUSTER_OF_THREE}] }} }}");
        let bootstrap: Bootstrap = from_yaml(&text).unwrap();
        let overlay = "{ node: { id: a, metadata: { x: type.googleapis.com/xds.type.v3.TypedStruct } } }";
        let merged = merge_yaml(bootstrap, overlay, UnknownFields::Reject).unwrap();
        let resolved = resolve_typed_structs(&merged, UnknownFields::Reject).unwrap();
        assert!(matches!(resolved, Cow::Owned(_)), "it was gone through");
        let clusters = &resolved.static_resources.as_ref().unwrap().clusters;
        assert_eq!(names(&clusters[0]), ["one", "", "three"]);
    }
}
