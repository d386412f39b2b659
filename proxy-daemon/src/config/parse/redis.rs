//! Checks of Redis servers, and what such servers are told of who asks.

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        cluster::v3::Cluster,
        core::v3::{
            DataSource,
            health_check::{CustomHealthCheck, HealthChecker, custom_health_check::ConfigType},
        },
    },
    extensions::{filters::network::redis_proxy::v3::RedisProtocolOptions, health_checkers::redis::v3::Redis},
};
use prost::Name as _;

use super::{
    common::{Result, required, type_name},
    support::join,
    tls::data_source,
};
use crate::config::{FieldError, model::RedisCheck};

/// The name that the options of a cluster of Redis servers have.
pub(super) const OPTIONS: &str = "envoy.filters.network.redis_proxy";

/// A check by `envoy.health_checkers.redis`, which is the only one of its kind.
pub(super) fn check(custom: &CustomHealthCheck, path: &str) -> Result<RedisCheck> {
    let Some(ConfigType::TypedConfig(config)) = &custom.config_type else {
        return Err(required(path, "typed_config"));
    };
    let path = join(path, "typed_config");
    if type_name(config) != Redis::full_name() {
        return Err(FieldError::unsupported_value(path, type_name(config), &Redis::full_name()));
    }
    let config: Redis = unpack(config, &path)?;
    Ok(RedisCheck { key: config.key.into_bytes(), auth: None })
}

/// Whether the cluster's servers are checked so.
pub(super) fn is_checked(cluster: &Cluster) -> bool {
    let custom = |check: &Option<HealthChecker>| matches!(check, Some(HealthChecker::CustomHealthCheck(_)));
    cluster.health_checks.iter().any(|check| custom(&check.health_checker))
}

/// What the cluster's servers are told first: a user, which may be empty, and a password.
pub(super) fn auth(cluster: &Cluster, path: &str) -> Result<Option<(Vec<u8>, Vec<u8>)>> {
    let Some(options) = cluster.typed_extension_protocol_options.get(OPTIONS) else { return Ok(None) };
    let path = format!("{}[\"{OPTIONS}\"]", join(path, "typed_extension_protocol_options"));
    let options: RedisProtocolOptions = unpack(options, &path)?;
    let read = |source: &Option<DataSource>, field: &str| {
        let read = source.as_ref().map(|source| data_source(source, &join(&path, field)));
        Ok::<_, FieldError>(read.transpose()?.unwrap_or_default())
    };
    let (user, password) =
        (read(&options.auth_username, "auth_username")?, read(&options.auth_password, "auth_password")?);
    Ok((!password.is_empty()).then_some((user, password)))
}
