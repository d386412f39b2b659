use std::{
    collections::HashSet,
    fs::{self, OpenOptions},
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use culvert_xds_client::json;
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3::{
                HealthCheck, RequestMethod,
                health_check::{
                    GrpcHealthCheck, HealthChecker, HttpHealthCheck, Payload, TcpHealthCheck, payload::Payload as Bytes,
                },
            },
        },
        extensions::health_check::event_sinks::file::v3::HealthCheckEventFileSink,
        service::health::v3::{ClusterHealthCheck, HealthCheckSpecifier},
        r#type::v3::{CodecClientType, Int64Range},
    },
    google::protobuf::UInt32Value,
};
use http::{Method, uri::Authority};

use super::{
    bind::upstream_bind,
    common::{Result, duration, endpoint_address, header_value, headers_to_add, headers_to_remove, required},
    endpoint::endpoint_check,
    matcher, redis,
    support::{self, join},
};
use crate::{
    config::{
        FieldError,
        model::{
            Check, EndpointAddress, EndpointCheck, GrpcCheck, HeaderMutations, HealthCheckConfig, HttpCheck, Locality,
            TcpCheck, UpstreamBind,
        },
    },
    http::metadata::object,
};

/// How many checks a cluster may have, as Envoy.
const MAX_HEALTH_CHECKS: usize = 8;

/// One cluster's part of a checked `HealthCheckSpecifier`.
#[derive(Debug)]
pub struct HealthChecks {
    /// The cluster's name; may be empty.
    pub cluster: String,
    /// Its checks, each with the message that it was made from: equal messages are equal checks.
    pub checks: Vec<(HealthCheck, Arc<HealthCheckConfig>)>,
    /// Where connections come from.
    pub bind: Option<Arc<UpstreamBind>>,
    /// Its endpoints by locality, in the order of the message.
    pub localities: Vec<(Locality, Vec<HealthCheckTarget>)>,
}

/// An endpoint to check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheckTarget {
    /// Where it listens.
    pub address: EndpointAddress,
    /// Its name; may be empty.
    pub hostname: Box<str>,
    /// Where it is checked, and how, if otherwise.
    pub check: Option<EndpointCheck>,
}

/// What a management server wants checked. Of clusters of the same name only the first counts, as in Envoy.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn health_check_specifier(specifier: &HealthCheckSpecifier) -> Result<(Duration, Vec<HealthChecks>)> {
    json::validate(specifier)?;
    support::check(specifier, "")?;
    let interval = duration(specifier.interval, "", "interval")?.unwrap_or(Duration::from_secs(1));
    let mut seen = HashSet::new();
    let mut clusters = Vec::new();
    for (index, cluster) in specifier.cluster_health_checks.iter().enumerate() {
        let name = cluster.cluster_name.as_str();
        if !name.is_empty() && !seen.insert(name) {
            tracing::warn!(cluster = name, "named twice in a health check specifier: the first one counts");
            continue;
        }
        clusters.push(health_checks(cluster, &format!("cluster_health_checks[{index}]"))?);
    }
    Ok((interval, clusters))
}

fn health_checks(cluster: &ClusterHealthCheck, path: &str) -> Result<HealthChecks> {
    let check = |(index, check): (usize, &HealthCheck)| {
        let path = format!("{path}.health_checks[{index}]");
        #[expect(deprecated, reason = "it is refused as well")]
        let logs = [
            (check.always_log_health_check_failures, "always_log_health_check_failures"),
            (check.always_log_health_check_success, "always_log_health_check_success"),
            (!check.event_log_path.is_empty(), "event_log_path"),
            (json::newer::event_loggers(check).next().is_some(), "event_logger"),
            // Those checks are not encrypted.
            (check.tls_options.is_some(), "tls_options"),
            (check.transport_socket_match_criteria.is_some(), "transport_socket_match_criteria"),
        ];
        // What is only checked for somebody else is not logged here.
        if let Some((_, field)) = logs.into_iter().find(|(set, _)| *set) {
            return Err(FieldError::unsupported(join(&path, field)));
        }
        Ok((check.clone(), Arc::new(health_check(check, &cluster.cluster_name, &path)?)))
    };
    let mut localities = Vec::new();
    for (index, group) in cluster.locality_endpoints.iter().enumerate() {
        let path = format!("{path}.locality_endpoints[{index}]");
        let mut targets = Vec::new();
        for (index, endpoint) in group.endpoints.iter().enumerate() {
            let path = format!("{path}.endpoints[{index}]");
            let address = endpoint.address.as_ref().ok_or_else(|| required(&path, "address"))?;
            let check = endpoint.health_check_config.as_ref();
            let check = check.map(|check| endpoint_check(check, &join(&path, "health_check_config"))).transpose()?;
            targets.push(HealthCheckTarget {
                address: endpoint_address(address, false, &join(&path, "address"))?,
                hostname: endpoint.hostname.as_str().into(),
                check: check.flatten(),
            });
        }
        let locality = group.locality.clone().unwrap_or_default();
        let locality = Locality { region: locality.region, zone: locality.zone, sub_zone: locality.sub_zone };
        localities.push((locality, targets));
    }
    let bind = cluster.upstream_bind_config.as_ref();
    let bind = bind.map(|bind| upstream_bind(bind, &join(path, "upstream_bind_config"))).transpose()?;
    Ok(HealthChecks {
        cluster: cluster.cluster_name.clone(),
        bind: bind.map(Arc::new),
        checks: cluster.health_checks.iter().enumerate().map(check).collect::<Result<_>>()?,
        localities,
    })
}

/// The health checks of a cluster.
pub(super) fn health_checks_of(cluster: &Cluster, path: &str) -> Result<Vec<Arc<HealthCheckConfig>>> {
    let several = cluster.health_checks.len() > 1;
    if cluster.health_checks.len() > MAX_HEALTH_CHECKS {
        let text = format!("value must contain no more than {MAX_HEALTH_CHECKS} item(s)");
        return Err(FieldError::new(join(path, "health_checks"), text));
    }
    let mut names = HashSet::new();
    let mut checks = Vec::new();
    for (index, check) in cluster.health_checks.iter().enumerate() {
        let path_of = join(path, &format!("health_checks[{index}]"));
        let name = json::newer::health_check_name(check);
        let wrong = |text| Err(FieldError::new(join(&path_of, "name"), text));
        if several && name.is_empty() {
            return wrong(format!(
                "health check at index {index} is missing a name; all health checks must have a name when multiple health \
                 checks are configured"
            ));
        }
        if !names.insert(name) {
            return wrong(format!(
                "duplicate health check name '{name}' at index {index}; all health check names must be unique within a cluster"
            ));
        }
        let mut config = health_check(check, &cluster.name, &path_of)?;
        if let Check::Redis(redis) = &mut config.check {
            redis.auth = redis::auth(cluster, path)?;
        }
        checks.push(Arc::new(config));
    }
    Ok(checks)
}

/// An event log that can be opened, as far as that is to be seen: whoever only looks at a configuration makes no file.
fn event_log(file: &str, path: &str) -> Result<PathBuf> {
    let log = PathBuf::from(file);
    let directory = log.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let there = match OpenOptions::new().append(true).open(&log) {
        Err(error) if error.kind() == ErrorKind::NotFound => fs::metadata(directory).map(drop),
        opened => opened.map(drop),
    };
    match there {
        Ok(()) => Ok(log),
        Err(error) => Err(FieldError::new(path, format!("unable to open file '{file}': {error}"))),
    }
}

/// A health check of the cluster with this name. Its fields have been checked against what is honoured.
pub(super) fn health_check(check: &HealthCheck, cluster: &str, path: &str) -> Result<HealthCheckConfig> {
    let time = |value, field| duration(value, path, field);
    let or = |value, field, default: Duration| Ok::<_, FieldError>(time(value, field)?.unwrap_or(default));
    let threshold = |value: Option<UInt32Value>, field| match value {
        Some(value) => Ok(value.value),
        None => Err(required(path, field)),
    };
    let interval = time(check.interval, "interval")?.ok_or_else(|| required(path, "interval"))?;
    let unhealthy_interval = or(check.unhealthy_interval, "unhealthy_interval", interval)?;
    let no_traffic = or(check.no_traffic_interval, "no_traffic_interval", Duration::from_secs(60))?;
    #[expect(deprecated, reason = "the field that event_logger replaced, which Envoy still takes")]
    let path_of_old = &check.event_log_path;
    let mut event_logs = Vec::new();
    if !path_of_old.is_empty() {
        event_logs.push(event_log(path_of_old, &join(path, "event_log_path"))?);
    }
    for (index, logger) in json::newer::event_loggers(check) {
        let path = format!("{}[{index}].typed_config", join(path, "event_logger"));
        let any = logger.typed_config.as_ref().ok_or_else(|| FieldError::new(&path, "a value is required"))?;
        let sink: HealthCheckEventFileSink = json::unpack(any, &path)?;
        event_logs.push(event_log(&sink.event_log_path, &join(&path, "event_log_path"))?);
    }
    Ok(HealthCheckConfig {
        name: json::newer::health_check_name(check).to_owned(),
        always_log_failures: check.always_log_health_check_failures,
        always_log_success: check.always_log_health_check_success,
        event_logs,
        timeout: time(check.timeout, "timeout")?.ok_or_else(|| required(path, "timeout"))?,
        interval,
        initial_jitter: or(check.initial_jitter, "initial_jitter", Duration::ZERO)?,
        interval_jitter: or(check.interval_jitter, "interval_jitter", Duration::ZERO)?,
        interval_jitter_percent: check.interval_jitter_percent,
        unhealthy_threshold: threshold(check.unhealthy_threshold, "unhealthy_threshold")?,
        healthy_threshold: threshold(check.healthy_threshold, "healthy_threshold")?,
        reuse_connection: check.reuse_connection.is_none_or(|reuse| reuse.value),
        no_traffic_interval: no_traffic,
        no_traffic_healthy_interval: or(check.no_traffic_healthy_interval, "no_traffic_healthy_interval", no_traffic)?,
        unhealthy_interval,
        unhealthy_edge_interval: or(check.unhealthy_edge_interval, "unhealthy_edge_interval", unhealthy_interval)?,
        healthy_edge_interval: or(check.healthy_edge_interval, "healthy_edge_interval", interval)?,
        alpn_protocols: alpn_protocols(check, path)?,
        socket_labels: check.transport_socket_match_criteria.as_ref().map(object),
        check: match &check.health_checker {
            Some(HealthChecker::HttpHealthCheck(http)) => {
                Check::Http(Box::new(http_check(http, cluster, &join(path, "http_health_check"))?))
            }
            Some(HealthChecker::TcpHealthCheck(tcp)) => Check::Tcp(tcp_check(tcp, &join(path, "tcp_health_check"))?),
            Some(HealthChecker::GrpcHealthCheck(grpc)) => {
                Check::Grpc(grpc_check(grpc, cluster, &join(path, "grpc_health_check"))?)
            }
            Some(HealthChecker::CustomHealthCheck(custom)) => {
                Check::Redis(redis::check(custom, &join(path, "custom_health_check"))?)
            }
            None => return Err(required(path, "http_health_check")),
        },
    })
}

fn alpn_protocols(check: &HealthCheck, path: &str) -> Result<Vec<Vec<u8>>> {
    let names = check.tls_options.as_ref().map(|options| options.alpn_protocols.as_slice()).unwrap_or_default();
    let parse = |(index, name): (usize, &String)| match name.len() {
        1..=255 => Ok(name.clone().into_bytes()),
        _ => {
            let path = format!("{}[{index}]", join(path, "tls_options.alpn_protocols"));
            Err(FieldError::new(path, "a protocol's name has 1 to 255 bytes"))
        }
    };
    names.iter().enumerate().map(parse).collect()
}

fn http_check(check: &HttpHealthCheck, cluster: &str, path: &str) -> Result<HttpCheck> {
    let method = method(check.method, path)?;
    let send = check.send.as_ref().map(|send| payload(send, &join(path, "send"))).transpose()?.unwrap_or_default();
    if !send.is_empty() && !matches!(method, Method::POST | Method::PUT | Method::PATCH | Method::OPTIONS) {
        let text = format!("a {method} request has no body");
        return Err(FieldError::new(join(path, "send"), text));
    }
    let http2 = match CodecClientType::try_from(check.codec_client_type) {
        Ok(CodecClientType::Http1) => false,
        Ok(CodecClientType::Http2) => true,
        codec => {
            let name = codec.map_or("a codec that is not known", |codec| codec.as_str_name());
            return Err(FieldError::unsupported_value(join(path, "codec_client_type"), name, "HTTP1 and HTTP2"));
        }
    };
    let host = if check.host.is_empty() { cluster } else { &check.host };
    if http2 {
        authority(host, &join(path, "host"))?;
    }
    let expected = ranges(&check.expected_statuses, path, "expected_statuses")?;
    let matcher = check.service_name_matcher.as_ref();
    Ok(HttpCheck {
        host: header_value(host, &join(path, "host"))?,
        host_is_default: check.host.is_empty(),
        path: check.path.parse().map_err(|_| {
            FieldError::new(join(path, "path"), format!("{:?} is not the path of a request", check.path))
        })?,
        method,
        send,
        receive: payloads(&check.receive, path)?,
        response_buffer_size: check.response_buffer_size.map_or(1024, |size| size.value),
        headers: HeaderMutations {
            request_add: headers_to_add(&check.request_headers_to_add, path, "request_headers_to_add")?,
            request_remove: headers_to_remove(&check.request_headers_to_remove, path, "request_headers_to_remove")?,
            ..HeaderMutations::default()
        },
        expected_statuses: if expected.is_empty() { vec![(200, 201)] } else { expected },
        retriable_statuses: ranges(&check.retriable_statuses, path, "retriable_statuses")?,
        http2,
        service_name_matcher: matcher
            .map(|matcher| matcher::string(matcher, &join(path, "service_name_matcher")))
            .transpose()?,
    })
}

fn method(method: i32, path: &str) -> Result<Method> {
    Ok(match RequestMethod::try_from(method) {
        Ok(RequestMethod::MethodUnspecified | RequestMethod::Get) => Method::GET,
        Ok(RequestMethod::Head) => Method::HEAD,
        Ok(RequestMethod::Post) => Method::POST,
        Ok(RequestMethod::Put) => Method::PUT,
        Ok(RequestMethod::Delete) => Method::DELETE,
        Ok(RequestMethod::Options) => Method::OPTIONS,
        Ok(RequestMethod::Trace) => Method::TRACE,
        Ok(RequestMethod::Patch) => Method::PATCH,
        Ok(RequestMethod::Connect) | Err(_) => {
            return Err(FieldError::new(join(path, "method"), "not a method of health checks"));
        }
    })
}

/// Half-open ranges of statuses.
fn ranges(ranges: &[Int64Range], path: &str, field: &str) -> Result<Vec<(u16, u16)>> {
    let parse = |(index, range): (usize, &Int64Range)| {
        let status = |number| u16::try_from(number).ok().filter(|number| (100..=600).contains(number));
        match (status(range.start), status(range.end)) {
            (Some(start), Some(end)) if start < end => Ok((start, end)),
            _ => {
                let text = format!(
                    "Invalid http status range: expecting start < end and 100 <= status < 600, but found start={} and \
                     end={}",
                    range.start, range.end
                );
                Err(FieldError::new(format!("{}[{index}]", join(path, field)), text))
            }
        }
    };
    ranges.iter().enumerate().map(parse).collect()
}

fn tcp_check(check: &TcpHealthCheck, path: &str) -> Result<TcpCheck> {
    Ok(TcpCheck {
        send: check.send.as_ref().map(|send| payload(send, &join(path, "send"))).transpose()?.unwrap_or_default(),
        receive: payloads(&check.receive, path)?,
    })
}

fn grpc_check(check: &GrpcHealthCheck, cluster: &str, path: &str) -> Result<GrpcCheck> {
    let name = if check.authority.is_empty() { cluster } else { &check.authority };
    Ok(GrpcCheck {
        service_name: check.service_name.clone(),
        authority: authority(name, &join(path, "authority"))?,
        authority_is_default: check.authority.is_empty(),
        headers: HeaderMutations {
            request_add: headers_to_add(&check.initial_metadata, path, "initial_metadata")?,
            ..HeaderMutations::default()
        },
    })
}

/// What HTTP/2 needs for a host; the cluster's name stands for one that is not set.
fn authority(name: &str, path: &str) -> Result<Authority> {
    let text = || format!("{name:?} is not an authority (the cluster's name stands for one that is not set)");
    name.parse().map_err(|_| FieldError::new(path, text()))
}

fn payloads(payloads: &[Payload], path: &str) -> Result<Vec<Vec<u8>>> {
    let parse = |(index, item): (usize, &Payload)| payload(item, &format!("{path}.receive[{index}]"));
    payloads.iter().enumerate().map(parse).collect()
}

fn payload(payload: &Payload, path: &str) -> Result<Vec<u8>> {
    match &payload.payload {
        Some(Bytes::Text(text)) => hex(text).ok_or_else(|| {
            FieldError::new(join(path, "text"), format!("invalid hex string '{text}': pairs of hexadecimal digits"))
        }),
        Some(Bytes::Binary(bytes)) => Ok(bytes.clone()),
        None => Err(required(path, "text")),
    }
}

/// The bytes that pairs of hexadecimal digits stand for.
fn hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let digit = |digit: u8| char::from(digit).to_digit(16);
    pairs.iter().map(|[high, low]| u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()).collect()
}
