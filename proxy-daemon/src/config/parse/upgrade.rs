//! `upgrade_configs`, of connection managers and of routes.

use envoy_types::pb::{
    envoy::{
        config::route::v3::route_action::UpgradeConfig as OfRoute,
        extensions::filters::network::http_connection_manager::v3::http_connection_manager::UpgradeConfig as OfManager,
    },
    google::protobuf::BoolValue,
};

use super::{common::Result, support::join};
use crate::config::{FieldError, model::UpgradeRule};

/// A connection manager's.
pub(super) fn of_manager(configs: &[OfManager], path: &str) -> Result<Box<[UpgradeRule]>> {
    rules(configs.iter().map(|config| (config.upgrade_type.as_str(), config.enabled)), path, |name| {
        format!("Error: multiple upgrade configs with the same name: '{name}'")
    })
}

/// A route's.
pub(super) fn of_route(configs: &[OfRoute], path: &str) -> Result<Box<[UpgradeRule]>> {
    rules(configs.iter().map(|config| (config.upgrade_type.as_str(), config.enabled)), path, |name| {
        format!("Duplicate upgrade {name}")
    })
}

fn rules<'a>(
    configs: impl Iterator<Item = (&'a str, Option<BoolValue>)>,
    path: &str,
    duplicate: impl Fn(&str) -> String,
) -> Result<Box<[UpgradeRule]>> {
    let mut rules: Vec<UpgradeRule> = Vec::new();
    for (index, (protocol, enabled)) in configs.enumerate() {
        let path = format!("{}[{index}].upgrade_type", join(path, "upgrade_configs"));
        if protocol.is_empty() || protocol.to_ascii_uppercase().starts_with("CONNECT") {
            let named = if protocol.is_empty() { "an empty one" } else { protocol };
            return Err(FieldError::unsupported_value(path, named, "those of HTTP/1.1, such as websocket"));
        }
        if rules.iter().any(|rule| rule.protocol.eq_ignore_ascii_case(protocol)) {
            return Err(FieldError::new(path, duplicate(protocol)));
        }
        rules.push(UpgradeRule { protocol: protocol.into(), enabled: enabled.is_none_or(|enabled| enabled.value) });
    }
    Ok(rules.into())
}
