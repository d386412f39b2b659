//! Files of resources (`path_config_source`): whether the daemon would take what is in them.

use culvert_xds_client::{
    Any,
    json::{self, ConfigError, Format, UnknownFields},
};
use envoy_types::pb::{
    envoy::service::discovery::v3::{DiscoveryResponse, Resource},
    google::protobuf::{Struct, value::Kind},
};
use prost::{Message, Name};

use crate::config::{
    FieldError,
    parse::{self, type_name},
};

/// Whether a text is a `DiscoveryResponse`, be it a good one or not.
pub(super) fn is_response(text: &str, format: Format) -> bool {
    let Ok(whole) = json::read::<Struct>(text, format, UnknownFields::Ignore) else { return false };
    let resources = whole.fields.get("resources").and_then(|value| value.kind.as_ref());
    matches!(resources, Some(Kind::ListValue(_)))
}

/// The verdict on a `DiscoveryResponse`.
///
/// # Errors
/// The number of the resource and the field in it that is wrong or not honoured.
pub(super) fn validate(text: &str, format: Format) -> Result<(), ConfigError> {
    let response: DiscoveryResponse = json::read(text, format, UnknownFields::Reject)?;
    for (index, resource) in response.resources.iter().enumerate() {
        let path = format!("resources[{index}]");
        judge(resource, &path).map_err(|error| ConfigError::new(error.path, error.message).locate(text))?;
    }
    Ok(())
}

fn judge(resource: &Any, path: &str) -> Result<(), FieldError> {
    if type_name(resource) == Resource::full_name() {
        let wrapper: Resource = json::unpack(resource, path)?;
        let path = format!("{path}.resource");
        return match &wrapper.resource {
            Some(resource) => judge_plain(resource, &path),
            None => Err(FieldError::new(path, "value is required")),
        };
    }
    judge_plain(resource, path)
}

fn judge_plain(resource: &Any, path: &str) -> Result<(), FieldError> {
    match type_name(resource) {
        "envoy.config.listener.v3.Listener" => read(resource, path, parse::listener),
        "envoy.config.cluster.v3.Cluster" => read(resource, path, parse::cluster),
        "envoy.config.endpoint.v3.ClusterLoadAssignment" => read(resource, path, parse::endpoints),
        "envoy.config.route.v3.RouteConfiguration" => read(resource, path, parse::route_config),
        "envoy.config.route.v3.ScopedRouteConfiguration" => read(resource, path, parse::scoped_route),
        "envoy.config.route.v3.VirtualHost" => read(resource, path, parse::virtual_host),
        "envoy.config.core.v3.TypedExtensionConfig" => read(resource, path, parse::extension_config),
        "envoy.service.runtime.v3.Runtime" => read(resource, path, parse::runtime_values),
        "envoy.extensions.transport_sockets.tls.v3.Secret" => read(resource, path, parse::discovered_secret),
        other => {
            Err(FieldError::new(path, format!("a resource of type {other} is none that culvertd reads from files")))
        }
    }
}

/// Reads one as the daemon does.
fn read<M, T>(resource: &Any, path: &str, parse: fn(&M, &str) -> Result<T, FieldError>) -> Result<(), FieldError>
where
    M: Message + Name + Default + Clone,
{
    let below = |error: ConfigError| ConfigError { path: join(path, &error.path), ..error };
    let message: M = json::unpack(resource, path)?;
    let message = json::resolve_typed_structs(&message, UnknownFields::Reject).map_err(below)?;
    json::validate(&*message).map_err(below)?;
    parse(&message, path).map(drop)
}

fn join(path: &str, field: &str) -> String {
    if field.is_empty() { path.to_owned() } else { format!("{path}.{field}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(resources: &str) -> String {
        let text = format!("version_info: '1'\nresources:\n{resources}");
        assert!(is_response(&text, Format::Yaml));
        validate(&text, Format::Yaml).map_or_else(|error| error.to_string(), |()| "good".to_owned())
    }

    #[test]
    fn errors_name_the_resource_and_its_field() {
        let cluster = "- {\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: a";
        let good = format!("{cluster}}}\n");
        assert_eq!(verdict(&good), "good");
        let refused = |more: &str| verdict(&format!("{good}{cluster}, {more}}}\n"));
        let refusal = refused("lrs_server: { self: {} }");
        assert!(refusal.starts_with("resources[1].lrs_server: not supported by culvert yet (line 4, "), "{refusal}");
        let unknown = refused("colour: red");
        assert!(unknown.starts_with("resources[1].colour: "), "{unknown}");
        let rule = refused("circuit_breakers: {thresholds: [{priority: 7}]}");
        assert!(rule.starts_with("resources[1].circuit_breakers.thresholds[0].priority: "), "{rule}");
        let wrapped = verdict(
            "- {\"@type\": type.googleapis.com/envoy.service.discovery.v3.Resource, name: a, resource: {\"@type\": \
             type.googleapis.com/envoy.config.route.v3.RouteConfiguration, name: a, virtual_hosts: [{name: v, domains: []}]}}",
        );
        assert!(wrapped.starts_with("resources[0].resource.virtual_hosts[0].domains: "), "{wrapped}");
        let strange = verdict("- {\"@type\": type.googleapis.com/google.protobuf.Struct, value: {}}");
        assert!(strange.starts_with("resources[0]: a resource of type google.protobuf.Struct is none"), "{strange}");
    }

    #[test]
    fn a_bootstrap_is_none() {
        for text in ["{}", "static_resources: {clusters: []}", "resources: 1", "[]", "a: ["] {
            assert!(!is_response(text, Format::Yaml), "{text}");
        }
    }
}
