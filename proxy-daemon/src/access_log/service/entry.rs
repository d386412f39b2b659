//! What an access log service is told of a request or a connection.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use envoy_types::pb::{
    envoy::{
        config::core::v3::{
            Address, Metadata as ProtoMetadata, Pipe, RequestMethod, SocketAddress, address::Address as AddressKind,
            socket_address::PortSpecifier,
        },
        data::accesslog::v3::{
            AccessLogCommon, AccessLogType, ConnectionProperties, HttpAccessLogEntry, HttpRequestProperties,
            HttpResponseProperties, ResponseFlags as ProtoFlags, TcpAccessLogEntry, TlsProperties,
            http_access_log_entry::HttpVersion,
            response_flags::{Unauthorized, unauthorized::Reason},
            tls_properties::{
                CertificateProperties, TlsVersion,
                certificate_properties::{SubjectAltName, subject_alt_name::San},
            },
        },
        extensions::filters::http::grpc_stats::v3::FilterObject,
        r#type::tracing::v3::CustomTag,
    },
    google::protobuf::{Any, Duration as ProtoDuration, Timestamp, UInt32Value},
};
use http::{HeaderName, HeaderValue};
use prost::Name as _;

use super::tags::Tag;
use crate::{
    access_log::{
        Headers, Record, ResponseFlags, Times,
        format::{Header, Part},
    },
    config::FieldError,
    http::{
        headers::names::{X_ENVOY_ORIGINAL_PATH, X_FORWARDED_FOR, X_REQUEST_ID},
        metadata::Metadata,
        request_id::random_uuid,
    },
    tls::{PeerText, TlsInfo},
};

static USER_AGENT: HeaderName = http::header::USER_AGENT;
static REFERER: HeaderName = http::header::REFERER;
static FORWARDED_FOR: HeaderName = X_FORWARDED_FOR;
static REQUEST_ID: HeaderName = X_REQUEST_ID;
static ORIGINAL_PATH: HeaderName = X_ENVOY_ORIGINAL_PATH;

/// The filter state that there is.
const GRPC_STATS: &str = "envoy.filters.http.grpc_stats";

/// What a text of the filter state is in an entry.
const STRING_VALUE: &str = "type.googleapis.com/google.protobuf.StringValue";

/// Headers that entries show besides those that all show, each with the name that it is shown under.
#[derive(Debug, Default)]
struct ShownHeaders(Box<[(Box<str>, Header)]>);

impl ShownHeaders {
    /// `operator`: that of format strings, whose pseudo-headers can be named.
    fn parse(operator: &'static str, names: &[String], path: &str) -> Result<ShownHeaders, FieldError> {
        let parse = |(index, name): (usize, &String)| {
            let parsed = Header::parse(operator, name);
            let parsed = parsed.map_err(|error| FieldError::new(format!("{path}[{index}]"), error.to_string()))?;
            Ok((name.to_ascii_lowercase().into(), parsed))
        };
        names.iter().enumerate().map(parse).collect::<Result<_, _>>().map(ShownHeaders)
    }

    fn names(&self) -> impl Iterator<Item = &HeaderName> {
        self.0.iter().filter_map(|(_, header)| if let Header::Name(name) = header { Some(name) } else { None })
    }

    /// The values, those of one name joined.
    fn of(&self, record: &Record<'_>, headers: Option<Headers<'_>>) -> HashMap<String, String> {
        let value = |header: &Header| match (header, headers) {
            (Header::Status, _) => (record.response_code != 0).then(|| record.response_code.to_string()),
            (Header::Name(name), Some(headers)) => {
                let values: Vec<_> = headers.all(name).map(HeaderValue::as_bytes).collect();
                (!values.is_empty()).then(|| text(&values.join(&b","[..])))
            }
            (header, _) => header.value(record, headers).map(text),
        };
        self.0.iter().filter_map(|(name, header)| Some((name.to_string(), value(header)?))).collect()
    }
}

/// What entries of a log tell besides what all do.
#[derive(Debug, Default)]
pub struct EntryParts {
    /// `additional_request_headers_to_log`
    request: ShownHeaders,
    /// `additional_response_headers_to_log`
    response: ShownHeaders,
    /// `additional_response_trailers_to_log`
    trailers: ShownHeaders,
    /// `filter_state_objects_to_log` has what `grpc_stats` counts.
    grpc_stats: bool,
    /// Other names in it: texts of `set_filter_state`.
    state: Box<[Box<str>]>,
    /// `custom_tags`
    tags: Box<[Tag]>,
}

impl EntryParts {
    /// Of the fields of a log's configuration, which is at `path`.
    ///
    /// # Errors
    /// A name that no header has, or filter state that there is not.
    pub fn parse(
        [request, response, trailers]: [&[String]; 3],
        filter_state: &[String],
        path: &str,
    ) -> Result<EntryParts, FieldError> {
        // What Envoy's own parts put there is not there.
        if let Some(index) = filter_state.iter().position(|name| name.starts_with("envoy.") && name != GRPC_STATS) {
            return Err(FieldError::unsupported(format!("{path}.common_config.filter_state_objects_to_log[{index}]")));
        }
        let field = |name: &str| format!("{path}.{name}");
        Ok(EntryParts {
            request: ShownHeaders::parse("REQ", request, &field("additional_request_headers_to_log"))?,
            response: ShownHeaders::parse("RESP", response, &field("additional_response_headers_to_log"))?,
            trailers: ShownHeaders::parse("TRAILER", trailers, &field("additional_response_trailers_to_log"))?,
            grpc_stats: filter_state.iter().any(|name| name == GRPC_STATS),
            state: filter_state.iter().filter(|name| *name != GRPC_STATS).map(|name| name.as_str().into()).collect(),
            tags: Box::default(),
        })
    }

    /// With these tags, which are at `path`.
    ///
    /// # Errors
    /// One that is none.
    pub fn with_tags(mut self, tags: &[CustomTag], path: &str) -> Result<EntryParts, FieldError> {
        let parse = |(index, tag): (usize, &CustomTag)| Tag::parse(tag, &format!("{path}[{index}]"));
        self.tags = tags.iter().enumerate().map(parse).collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// The headers of a part of the messages that entries show.
    pub(in crate::access_log) fn headers(&self, part: Part) -> Box<dyn Iterator<Item = &HeaderName> + '_> {
        let of_tags = self.tags.iter().flat_map(move |tag| tag.headers(part));
        match part {
            Part::Request => {
                let always = [&USER_AGENT, &REFERER, &FORWARDED_FOR, &REQUEST_ID, &ORIGINAL_PATH];
                Box::new(always.into_iter().chain(self.request.names()).chain(of_tags))
            }
            Part::Response => Box::new(self.response.names().chain(of_tags)),
            Part::Trailers => Box::new(self.trailers.names().chain(of_tags)),
        }
    }

    /// The entry of a request.
    pub(super) fn of_request(&self, record: &Record<'_>) -> HttpAccessLogEntry {
        let header = |name: &HeaderName| {
            let value = record.request_headers.and_then(|headers| headers.get(name));
            value.map(|value| text(value.as_bytes())).unwrap_or_default()
        };
        let owned = |text: Option<&str>| text.unwrap_or_default().to_owned();
        let method = record.method.and_then(RequestMethod::from_str_name).unwrap_or(RequestMethod::MethodUnspecified);
        let version = match record.protocol {
            Some("HTTP/1.0") => HttpVersion::Http10,
            Some("HTTP/1.1") => HttpVersion::Http11,
            Some("HTTP/2") => HttpVersion::Http2,
            Some("HTTP/3") => HttpVersion::Http3,
            _ => HttpVersion::ProtocolUnspecified,
        };
        HttpAccessLogEntry {
            common_properties: Some(self.common(record)),
            protocol_version: version.into(),
            request: Some(HttpRequestProperties {
                request_method: method.into(),
                scheme: owned(record.scheme),
                authority: owned(record.authority),
                path: owned(record.path),
                user_agent: header(&USER_AGENT),
                referer: header(&REFERER),
                forwarded_for: header(&FORWARDED_FOR),
                request_id: header(&REQUEST_ID),
                original_path: header(&ORIGINAL_PATH),
                request_headers_bytes: record.header_bytes.request,
                request_body_bytes: record.bytes_received,
                request_headers: self.request.of(record, record.request_headers),
                ..HttpRequestProperties::default()
            }),
            response: Some(HttpResponseProperties {
                response_code: (record.response_code != 0).then(|| UInt32Value { value: record.response_code.into() }),
                response_headers_bytes: record.header_bytes.response,
                response_body_bytes: record.bytes_sent,
                response_headers: self.response.of(record, record.response_headers),
                response_trailers: self.trailers.of(record, record.response_trailers),
                response_code_details: owned(record.response_code_details),
                ..HttpResponseProperties::default()
            }),
        }
    }

    /// The entry of a connection.
    pub(super) fn of_connection(&self, record: &Record<'_>) -> TcpAccessLogEntry {
        let mut common = self.common(&Record { times: Times::default(), ..*record });
        common.stream_id = String::from_utf8_lossy(&random_uuid()).into_owned();
        common.upstream_request_attempt_count = record.upstream_host.is_some().into();
        TcpAccessLogEntry {
            common_properties: Some(common),
            connection_properties: Some(ConnectionProperties {
                received_bytes: record.bytes_received,
                sent_bytes: record.bytes_sent,
            }),
        }
    }

    #[expect(deprecated, reason = "Envoy still tells what access_log_type has replaced")]
    fn common(&self, record: &Record<'_>) -> AccessLogCommon {
        let times = &record.times;
        let since = |when: Option<Instant>| Times::between(times.began, when).map(duration);
        let log_type = AccessLogType::from_str_name(record.log_type).unwrap_or(AccessLogType::NotSet);
        let is_over = !matches!(
            log_type,
            AccessLogType::DownstreamStart
                | AccessLogType::DownstreamPeriodic
                | AccessLogType::DownstreamTunnelSuccessfullyEstablished
        );
        let request_id = record.request_headers.and_then(|headers| headers.get(&REQUEST_ID));
        let counted = record.grpc_messages.filter(|_| self.grpc_stats);
        let state = counted.map(|(request_message_count, response_message_count)| {
            let counted = FilterObject { request_message_count, response_message_count };
            let value = prost::Message::encode_to_vec(&counted);
            (GRPC_STATS.to_owned(), Any { type_url: FilterObject::type_url(), value })
        });
        let texts = self.state.iter().filter_map(|key| {
            let text = record.metadata?.state(key)?.as_text().into_owned();
            let value = prost::Message::encode_to_vec(&text);
            Some((key.to_string(), Any { type_url: STRING_VALUE.to_owned(), value }))
        });
        let state = state.into_iter().chain(texts);
        AccessLogCommon {
            downstream_remote_address: record.downstream_remote_address.map(address),
            downstream_local_address: record.downstream_local_address.map(address),
            downstream_direct_remote_address: record.downstream_direct_remote_address.map(address),
            tls_properties: tls_properties(record),
            start_time: Some(timestamp(record.start)),
            duration: is_over.then(|| duration(record.duration)),
            time_to_last_rx_byte: since(times.request_end),
            time_to_first_upstream_tx_byte: since(times.upstream_sent_first),
            time_to_last_upstream_tx_byte: since(times.upstream_sent()),
            time_to_first_upstream_rx_byte: since(times.upstream_answered),
            time_to_last_upstream_rx_byte: since(times.upstream_end),
            time_to_first_downstream_tx_byte: since(times.sent_first),
            time_to_last_downstream_tx_byte: since(times.end).filter(|_| is_over),
            upstream_remote_address: record.upstream_host.map(shown_address),
            upstream_local_address: record.upstream_local_address.map(address),
            // Of the host, as in Envoy: without one there is none.
            upstream_cluster: record.upstream_host.and(record.upstream_cluster).unwrap_or_default().to_owned(),
            response_flags: flags(record.response_flags),
            metadata: record.metadata.and_then(metadata),
            upstream_transport_failure_reason: record.upstream_transport_failure_reason.unwrap_or_default().to_owned(),
            downstream_transport_failure_reason: record
                .downstream_transport_failure_reason
                .unwrap_or_default()
                .to_owned(),
            route_name: record.route_name.unwrap_or_default().to_owned(),
            upstream_request_attempt_count: record.attempts,
            stream_id: request_id.map(|id| text(id.as_bytes())).unwrap_or_default(),
            filter_state_objects: state.into_iter().collect(),
            custom_tags: self.tags.iter().filter_map(|tag| tag.of(record)).collect(),
            intermediate_log_entry: !is_over,
            access_log_type: log_type.into(),
            ..AccessLogCommon::default()
        }
    }
}

/// A header's value; each byte that is no UTF-8 becomes an exclamation mark, as in Envoy.
pub(super) fn text(value: &[u8]) -> String {
    value.utf8_chunks().fold(String::with_capacity(value.len()), |mut text, chunk| {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| '!'));
        text
    })
}

fn duration(time: Duration) -> ProtoDuration {
    ProtoDuration {
        seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        // Less than 10^9.
        nanos: time.subsec_nanos() as i32,
    }
}

fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let ProtoDuration { seconds, nanos } = duration(since);
    Timestamp { seconds, nanos }
}

fn address(address: SocketAddr) -> Address {
    let socket = SocketAddress {
        address: address.ip().to_canonical().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
        ..SocketAddress::default()
    };
    Address { address: Some(AddressKind::SocketAddress(socket)) }
}

/// As hosts are shown.
fn shown_address(shown: &str) -> Address {
    match shown.parse() {
        Ok(parsed) => address(parsed),
        Err(_) => Address { address: Some(AddressKind::Pipe(Pipe { path: shown.to_owned(), mode: 0 })) },
    }
}

fn metadata(told: &Metadata) -> Option<ProtoMetadata> {
    let filter_metadata: HashMap<_, _> =
        told.namespaces().map(|(name, fields)| (name.to_owned(), fields.clone())).collect();
    (!filter_metadata.is_empty()).then(|| ProtoMetadata { filter_metadata, ..ProtoMetadata::default() })
}

fn tls_properties(record: &Record<'_>) -> Option<TlsProperties> {
    let tls_sni_hostname = record.requested_server_name.unwrap_or_default().to_owned();
    let Some(tls) = record.tls else {
        return (!tls_sni_hostname.is_empty()).then(|| TlsProperties { tls_sni_hostname, ..TlsProperties::default() });
    };
    Some(TlsProperties {
        tls_version: tls_version(tls).into(),
        tls_cipher_suite: Some(UInt32Value { value: tls.cipher_id.into() }),
        tls_sni_hostname,
        local_certificate_properties: Some(certificate(tls.local(), false)),
        peer_certificate_properties: Some(certificate(tls.peer(), true)),
        ..TlsProperties::default()
    })
}

fn tls_version(tls: &TlsInfo) -> TlsVersion {
    match tls.version {
        "TLSv1.2" => TlsVersion::TlSv12,
        "TLSv1.3" => TlsVersion::TlSv13,
        _ => TlsVersion::VersionUnspecified,
    }
}

fn certificate(shown: Option<&PeerText>, of_peer: bool) -> CertificateProperties {
    let Some(shown) = shown else { return CertificateProperties::default() };
    // Of its names only these, as in Envoy.
    let uris = shown.uris().iter().map(|uri| San::Uri(uri.clone()));
    CertificateProperties {
        subject_alt_name: uris.map(|san| SubjectAltName { san: Some(san) }).collect(),
        subject: shown.subject.clone(),
        issuer: if of_peer { shown.issuer.clone() } else { String::new() },
    }
}

fn flags(set: ResponseFlags) -> Option<ProtoFlags> {
    if set.is_empty() {
        return None;
    }
    let has = |flag| set.contains(flag);
    Some(ProtoFlags {
        failed_local_healthcheck: has(ResponseFlags::LH),
        no_healthy_upstream: has(ResponseFlags::UH),
        upstream_request_timeout: has(ResponseFlags::UT),
        local_reset: has(ResponseFlags::LR),
        upstream_remote_reset: has(ResponseFlags::UR),
        upstream_connection_failure: has(ResponseFlags::UF),
        upstream_connection_termination: has(ResponseFlags::UC),
        upstream_overflow: has(ResponseFlags::UO),
        no_route_found: has(ResponseFlags::NR),
        delay_injected: has(ResponseFlags::DI),
        fault_injected: has(ResponseFlags::FI),
        rate_limited: has(ResponseFlags::RL),
        unauthorized_details: has(ResponseFlags::UAEX).then(|| Unauthorized { reason: Reason::ExternalService.into() }),
        rate_limit_service_error: has(ResponseFlags::RLSE),
        downstream_connection_termination: has(ResponseFlags::DC),
        upstream_retry_limit_exceeded: has(ResponseFlags::URX),
        stream_idle_timeout: has(ResponseFlags::SI),
        invalid_envoy_request_headers: has(ResponseFlags::IH),
        downstream_protocol_error: has(ResponseFlags::DPE),
        upstream_max_stream_duration_reached: has(ResponseFlags::UMSDR),
        response_from_cache_filter: has(ResponseFlags::RFCF),
        no_filter_config_found: has(ResponseFlags::NFCF),
        duration_timeout: has(ResponseFlags::DT),
        upstream_protocol_error: has(ResponseFlags::UPE),
        no_cluster_found: has(ResponseFlags::NC),
        overload_manager: has(ResponseFlags::OM),
        dns_resolution_failure: has(ResponseFlags::DF),
        downstream_remote_reset: has(ResponseFlags::DR),
    })
}
