//! `upgrade_configs`, of connection managers and of routes.

use std::ops::Range;

use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::proxy_protocol_config::Version,
            route::v3::route_action::{UpgradeConfig as OfRoute, upgrade_config::ConnectConfig as ProtoConnect},
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpFilter, http_connection_manager::UpgradeConfig as OfManager,
        },
    },
    google::protobuf::BoolValue,
};

use super::{common::Result, support::join};
use crate::config::{
    FieldError,
    model::{ConnectConfig, ProxyProtocol, UpgradeRule},
};

/// A connection manager's.
///
/// `chain` keeps the filters of a list at a path, and says where.
pub(super) fn of_manager(
    configs: &[OfManager],
    path: &str,
    mut chain: impl FnMut(&[HttpFilter], &str) -> Result<Range<usize>>,
) -> Result<Box<[UpgradeRule]>> {
    let all = configs.iter().map(|config| (config.upgrade_type.as_str(), config.enabled, None));
    let mut rules = rules(all, path, |name| format!("Error: multiple upgrade configs with the same name: '{name}'"))?;
    for (index, (config, rule)) in configs.iter().zip(&mut rules).enumerate() {
        if !config.filters.is_empty() {
            let path = format!("{}[{index}].filters", join(path, "upgrade_configs"));
            rule.filters = Some(chain(&config.filters, &path)?);
        }
    }
    Ok(rules)
}

/// A route's.
pub(super) fn of_route(configs: &[OfRoute], path: &str) -> Result<Box<[UpgradeRule]>> {
    let configs =
        configs.iter().map(|config| (config.upgrade_type.as_str(), config.enabled, config.connect_config.as_ref()));
    rules(configs, path, |name| format!("Duplicate upgrade {name}"))
}

fn rules<'a>(
    configs: impl Iterator<Item = (&'a str, Option<BoolValue>, Option<&'a ProtoConnect>)>,
    path: &str,
    duplicate: impl Fn(&str) -> String,
) -> Result<Box<[UpgradeRule]>> {
    let mut rules: Vec<UpgradeRule> = Vec::new();
    for (index, (protocol, enabled, connect)) in configs.enumerate() {
        let path = format!("{}[{index}]", join(path, "upgrade_configs"));
        let type_path = join(&path, "upgrade_type");
        let is_connect = protocol.eq_ignore_ascii_case("CONNECT");
        if protocol.is_empty() || !is_connect && protocol.to_ascii_uppercase().starts_with("CONNECT") {
            let named = if protocol.is_empty() { "an empty one" } else { protocol };
            let known = "CONNECT and those of HTTP/1.1, such as websocket";
            return Err(FieldError::unsupported_value(type_path, named, known));
        }
        if rules.iter().any(|rule| rule.protocol.eq_ignore_ascii_case(protocol)) {
            return Err(FieldError::new(type_path, duplicate(protocol)));
        }
        if connect.is_some() && !is_connect {
            // Envoy's words.
            let text = format!("Non-CONNECT upgrade type {protocol} has ConnectConfig");
            return Err(FieldError::new(join(&path, "connect_config"), text));
        }
        rules.push(UpgradeRule {
            protocol: protocol.into(),
            enabled: enabled.is_none_or(|enabled| enabled.value),
            filters: None,
            connect: connect.map(|connect| connect_config(connect, &join(&path, "connect_config"))).transpose()?,
        });
    }
    Ok(rules.into())
}

fn connect_config(config: &ProtoConnect, path: &str) -> Result<ConnectConfig> {
    let proxy_protocol = match &config.proxy_protocol_config {
        None => None,
        Some(proxy_protocol) => Some(match Version::try_from(proxy_protocol.version) {
            Ok(Version::V1) => ProxyProtocol::V1,
            Ok(Version::V2) => ProxyProtocol::V2,
            Err(_) => return Err(FieldError::unsupported(join(path, "proxy_protocol_config.version"))),
        }),
    };
    Ok(ConnectConfig { proxy_protocol, allow_post: config.allow_post })
}
