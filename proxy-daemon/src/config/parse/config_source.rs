//! `ConfigSource` and the messages in it. Which clusters exist is checked by whoever knows: for the bootstrap's own
//! resources [`bootstrap`](super::bootstrap()), for those of xDS the store.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::Duration,
};

use culvert_xds_client::{
    ads::Variant,
    source::{BackoffLimits, FileSource, GrpcService, GrpcSource, RateLimit, RestSource, Source, Target},
};
use envoy_types::pb::envoy::config::core::v3::{
    ApiConfigSource, ApiVersion, ConfigSource as ProtoSource, GrpcService as ProtoService, HeaderValue,
    RateLimitSettings, RetryPolicy,
    api_config_source::ApiType,
    config_source::ConfigSourceSpecifier,
    grpc_service::{EnvoyGrpc, GoogleGrpc, TargetSpecifier},
};
use http::HeaderName;

use super::{
    common::{Result, duration, limit, number, required},
    support::join,
};
use crate::config::{
    FieldError,
    model::{ConfigSource, INITIAL_FETCH_TIMEOUT},
};

/// Where resources come from.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn config_source(source: Option<&ProtoSource>, path: &str) -> Result<ConfigSource> {
    /// One for all: thousands of clusters name it.
    static ADS: LazyLock<Arc<Source>> = LazyLock::new(|| Arc::new(Source::Ads));
    let Some(source) = source else { return Err(FieldError::new(path, "value is required")) };
    let initial_fetch_timeout =
        limit(source.initial_fetch_timeout, Some(INITIAL_FETCH_TIMEOUT), path, "initial_fetch_timeout")?;
    let from = match &source.config_source_specifier {
        Some(ConfigSourceSpecifier::Ads(_)) => Source::Ads,
        Some(ConfigSourceSpecifier::ApiConfigSource(api)) => api_source(api, &join(path, "api_config_source"))?,
        #[expect(deprecated, reason = "the field that path_config_source replaced, which Envoy still takes")]
        Some(ConfigSourceSpecifier::Path(file)) => {
            Source::File(FileSource { path: existing(file, &join(path, "path"))?, watched_directory: None })
        }
        Some(ConfigSourceSpecifier::PathConfigSource(files)) => {
            let path = join(path, "path_config_source");
            let directory = files.watched_directory.as_ref();
            let directory =
                directory.map(|it| existing(&it.path, &join(&path, "watched_directory.path"))).transpose()?;
            Source::File(FileSource {
                path: existing(&files.path, &join(&path, "path"))?,
                watched_directory: directory,
            })
        }
        // Envoy's answer as well.
        Some(ConfigSourceSpecifier::Self_(_)) | None => {
            let text = "Missing config source specifier in envoy::config::core::v3::ConfigSource";
            return Err(FieldError::new(path, text));
        }
    };
    let source = if from == Source::Ads { Arc::clone(&ADS) } else { from.into() };
    Ok(ConfigSource { source, initial_fetch_timeout })
}

/// The source of the aggregated stream, `dynamic_resources.ads_config`.
///
/// # Errors
/// The field that is wrong or not honoured.
pub(super) fn ads_source(config: &ApiConfigSource, path: &str) -> Result<GrpcSource> {
    match ApiType::try_from(config.api_type) {
        Ok(ApiType::Grpc) => grpc_source(config, Variant::Sotw, path),
        Ok(ApiType::DeltaGrpc) => grpc_source(config, Variant::Delta, path),
        _ => {
            let text = "envoy.config.core.v3.ApiConfigSource type must be of non-aggregated gRPC";
            Err(FieldError::new(join(path, "api_type"), text))
        }
    }
}

fn api_source(config: &ApiConfigSource, path: &str) -> Result<Source> {
    match ApiType::try_from(config.api_type) {
        Ok(ApiType::Grpc) => Ok(Source::Grpc(grpc_source(config, Variant::Sotw, path)?)),
        Ok(ApiType::DeltaGrpc) => Ok(Source::Grpc(grpc_source(config, Variant::Delta, path)?)),
        // Envoy has these for xdstp:// names alone, whose sources are not taken from here.
        Ok(ApiType::AggregatedGrpc) => {
            Err(FieldError::new(join(path, "api_type"), "Unsupported config source AGGREGATED_GRPC"))
        }
        Ok(ApiType::AggregatedDeltaGrpc) => {
            Err(FieldError::new(join(path, "api_type"), "Unsupported config source AGGREGATED_DELTA_GRPC"))
        }
        Ok(ApiType::Rest) => Ok(Source::Rest(rest_source(config, path)?)),
        _ => Err(FieldError::unsupported(join(path, "api_type"))),
    }
}

fn rest_source(config: &ApiConfigSource, path: &str) -> Result<RestSource> {
    transport_version(config, path)?;
    if !config.grpc_services.is_empty() {
        let text = "envoy.config.core.v3.ApiConfigSource, if not a gRPC type, must not have a gRPC service specified";
        return Err(FieldError::new(join(path, "grpc_services"), text));
    }
    let cluster = match config.cluster_names.as_slice() {
        [cluster] => cluster.clone(),
        [] => {
            let text = "API configs must have either a gRPC service or a cluster name defined";
            return Err(FieldError::new(join(path, "cluster_names"), text));
        }
        _ => {
            let text = "envoy.config.core.v3.ApiConfigSource must have a singleton cluster name specified";
            return Err(FieldError::new(join(path, "cluster_names"), text));
        }
    };
    if config.rate_limit_settings.is_some() {
        tracing::warn!(field = %join(path, "rate_limit_settings"), "has no effect with REST: refresh_delay is the rate");
    }
    let Some(refresh_delay) = duration(config.refresh_delay, path, "refresh_delay")? else {
        let text = "refresh_delay is required for REST API configuration sources";
        return Err(FieldError::new(join(path, "refresh_delay"), text));
    };
    let request_timeout = duration(config.request_timeout, path, "request_timeout")?;
    Ok(RestSource { cluster, refresh_delay, request_timeout: request_timeout.unwrap_or(Duration::from_secs(1)) })
}

/// A path that is there now, as Envoy wants it. Text protobuf cannot be read yet.
fn existing(file: &str, path: &str) -> Result<PathBuf> {
    if !Path::new(file).exists() {
        let text = format!("paths must refer to an existing path in the system: '{file}' does not exist");
        return Err(FieldError::new(path, text));
    }
    if !file.contains('/') {
        return Err(FieldError::new(path, format!("invalid file path {file}")));
    }
    if [".pb_text", ".pb_length_delimited"].iter().any(|extension| file.ends_with(extension)) {
        return Err(FieldError::new(
            path,
            "files in protobuf's text or length-delimited form are not supported by culvert yet",
        ));
    }
    Ok(PathBuf::from(file))
}

fn grpc_source(config: &ApiConfigSource, variant: Variant, path: &str) -> Result<GrpcSource> {
    transport_version(config, path)?;
    if !config.cluster_names.is_empty() {
        let text =
            "envoy.config.core.v3.ApiConfigSource::(AGGREGATED_)(DELTA_)GRPC must not have a cluster name specified";
        return Err(FieldError::new(join(path, "cluster_names"), text));
    }
    let service = match config.grpc_services.as_slice() {
        [service] => grpc_service(service, &join(path, "grpc_services[0]"))?,
        [] => {
            let text = "API configs must have either a gRPC service or a cluster name defined";
            return Err(FieldError::new(join(path, "grpc_services"), text));
        }
        _ => {
            let text = "envoy.config.core.v3.ApiConfigSource::(AGGREGATED_)(DELTA_)GRPC must have no more than 1 gRPC \
                        services specified";
            return Err(FieldError::new(join(path, "grpc_services"), text));
        }
    };
    Ok(GrpcSource {
        service,
        variant,
        set_node_on_first_message_only: config.set_node_on_first_message_only,
        rate_limit: config.rate_limit_settings.as_ref().map(rate_limit),
    })
}

/// A gRPC service. Whether its cluster exists is not checked here.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn grpc_service(service: &ProtoService, path: &str) -> Result<GrpcService> {
    if service.retry_policy.is_some() {
        return Err(FieldError::unsupported(join(path, "retry_policy")));
    }
    called_grpc_service(service, path)
}

/// One that calls are made to, whose `retry_policy` is another's matter.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn called_grpc_service(service: &ProtoService, path: &str) -> Result<GrpcService> {
    duration(service.timeout, path, "timeout")?;
    let initial_metadata = metadata(&service.initial_metadata, path)?;
    match &service.target_specifier {
        Some(TargetSpecifier::EnvoyGrpc(envoy)) => envoy_grpc(envoy, initial_metadata, &join(path, "envoy_grpc")),
        Some(TargetSpecifier::GoogleGrpc(google)) => google_grpc(google, initial_metadata, &join(path, "google_grpc")),
        None => Err(required(path, "envoy_grpc")),
    }
}

fn envoy_grpc(envoy: &EnvoyGrpc, initial_metadata: Vec<(String, String)>, path: &str) -> Result<GrpcService> {
    let name = &envoy.cluster_name;
    let authority = if envoy.authority.is_empty() { name } else { &envoy.authority };
    let length = envoy.max_receive_message_length.map(|it| it.value).filter(|length| *length > 0);
    Ok(GrpcService {
        target: Target::Cluster(name.clone()),
        authority: authority.clone(),
        initial_metadata,
        max_receive_message_length: length.map(|length| length as usize),
        backoff: backoff(envoy.retry_policy.as_ref(), &join(path, "retry_policy"))?,
    })
}

fn google_grpc(google: &GoogleGrpc, initial_metadata: Vec<(String, String)>, path: &str) -> Result<GrpcService> {
    let uri = google.target_uri.as_str();
    // gRPC's own spellings of an address that needs no other resolver than DNS.
    let plain = ["dns:///", "dns:", "ipv4:", "ipv6:"].iter().find_map(|scheme| uri.strip_prefix(scheme)).unwrap_or(uri);
    let target = match plain.strip_prefix("unix://").or_else(|| plain.strip_prefix("unix:")) {
        Some(path) => format!("unix:{path}"),
        None => {
            let port = plain.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
            if !matches!(port, Some(Ok(_))) {
                let text =
                    format!("{uri:?}: targets other than host:port and unix:path are not supported by culvert yet");
                return Err(FieldError::new(join(path, "target_uri"), text));
            }
            plain.to_owned()
        }
    };
    Ok(GrpcService {
        target: Target::Address(target),
        authority: plain.to_owned(),
        initial_metadata,
        max_receive_message_length: None,
        backoff: None,
    })
}

fn backoff(policy: Option<&RetryPolicy>, path: &str) -> Result<Option<BackoffLimits>> {
    if policy.is_some_and(|policy| policy.num_retries.is_some()) {
        return Err(FieldError::unsupported(join(path, "num_retries")));
    }
    if policy.is_some_and(|policy| !policy.retry_on.is_empty()) {
        return Err(FieldError::unsupported(join(path, "retry_on")));
    }
    let Some(back_off) = policy.and_then(|policy| policy.retry_back_off.as_ref()) else { return Ok(None) };
    let path = join(path, "retry_back_off");
    let base = duration(back_off.base_interval, &path, "base_interval")?.unwrap_or(Duration::from_millis(500));
    let max = duration(back_off.max_interval, &path, "max_interval")?.unwrap_or(base.saturating_mul(10));
    if max < base {
        let text = "must be greater than or equal to the base_interval";
        return Err(FieldError::new(join(&path, "max_interval"), text));
    }
    Ok(Some(BackoffLimits { base, max }))
}

fn metadata(headers: &[HeaderValue], path: &str) -> Result<Vec<(String, String)>> {
    let parse = |(index, header): (usize, &HeaderValue)| {
        let path = format!("{}[{index}]", join(path, "initial_metadata"));
        let name = HeaderName::try_from(&header.key);
        // gRPC keeps the first three for itself, and wants values of the last as bytes.
        let fixed = |name: &HeaderName| {
            name.as_str().starts_with("grpc-")
                || ["te", "content-type"].contains(&name.as_str())
                || name.as_str().ends_with("-bin")
        };
        let Some(name) = name.ok().filter(|name| !fixed(name)) else {
            let text = format!("{:?} cannot be sent with a gRPC call", header.key);
            return Err(FieldError::new(join(&path, "key"), text));
        };
        if header.value.replace("%%", "").contains('%') {
            let text = "format strings (%...%) in header values are not supported by culvert yet";
            return Err(FieldError::new(join(&path, "value"), text));
        }
        let value = header.value.replace("%%", "%");
        if !value.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            return Err(FieldError::new(join(&path, "value"), format!("{value:?} is not a header value")));
        }
        Ok((name.as_str().to_owned(), value))
    };
    headers.iter().enumerate().map(parse).collect()
}

fn rate_limit(settings: &RateLimitSettings) -> RateLimit {
    const DEFAULT_TOKENS: u32 = 100;
    const DEFAULT_RATE: f64 = 10.0;
    // At least one a year, as Envoy.
    const SLOWEST: f64 = 1.0 / (365.0 * 86_400.0);
    let rate = settings.fill_rate.map_or(DEFAULT_RATE, |rate| rate.value).max(SLOWEST);
    RateLimit {
        max_tokens: number(settings.max_tokens, DEFAULT_TOKENS),
        fill_interval: Duration::try_from_secs_f64(1.0 / rate).unwrap_or(Duration::MAX),
    }
}

/// Envoy speaks version 3 whatever stands here, but refuses 2.
fn transport_version(config: &ApiConfigSource, path: &str) -> Result<()> {
    #[expect(deprecated, reason = "this is where it is refused")]
    const V2: i32 = ApiVersion::V2 as i32;
    if config.transport_api_version == V2 {
        let text = "V2 xDS transport protocol version is deprecated in envoy.config.core.v3.ApiConfigSource";
        return Err(FieldError::new(join(path, "transport_api_version"), text));
    }
    Ok(())
}
