//! The operators of formats that take no arguments.

use std::{io::Write as _, net::SocketAddr, time::Instant};

use super::{HeaderBytes, Record, Times};
use crate::tls::PeerText;

/// What an operator without arguments writes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    Protocol,
    ResponseCode,
    ResponseFlags,
    ResponseCodeDetails,
    BytesReceived,
    BytesSent,
    Duration,
    UpstreamHost,
    UpstreamCluster,
    RouteName,
    ConnectionId,
    RequestedServerName,
    DownstreamTransportFailureReason,
    UpstreamTransportFailureReason,
    TlsVersion(Side),
    TlsCipher(Side),
    /// Something of a certificate.
    Certificate(Shown, fn(&PeerText) -> &String),
    Address(Which),
    AddressWithoutPort(Which),
    Port(Which),
    LocalReplyBody,
    AccessLogType,
    /// The flags' long names.
    ResponseFlagsLong,
    /// Of the connection to the host, where there is one.
    UpstreamRemoteIp,
    UpstreamRemotePort,
    /// The host's name, or its address; without a port.
    UpstreamHostName {
        with_port: bool,
    },
    /// From the request's beginning.
    Until(fn(&Times) -> Option<Instant>),
    /// From the first byte of the host's answer to the last one that was sent to the client.
    ResponseTxDuration,
    Attempts,
    UpstreamProtocol,
    UpstreamConnectionId,
    VirtualClusterName,
    /// Of the connection's listener.
    ListenerName,
    /// Of the connection's filter chain.
    FilterChainName,
    /// How long names and values of headers are.
    HeaderBytes(fn(&HeaderBytes) -> u64),
    /// Of attempts.
    Attempted(OfAttempt),
    /// What nothing here has: traces, fingerprints of TLS clients, what filters of connections say of their end.
    Never,
    /// Something of which there is none here, written as no text.
    Nothing,
    /// What is counted of QUIC alone.
    Zero,
}

/// What is shown of attempts.
#[derive(Debug, Clone, Copy)]
pub(super) enum OfAttempt {
    Address { with_port: bool },
    Name { with_port: bool },
    Connection,
}

/// The connection with the client, or that with the host.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    Downstream,
    Upstream,
}

/// Whose certificate.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shown {
    /// What the client has shown.
    Client,
    /// What the client was shown.
    Own,
    /// What the host has shown.
    Host,
}

/// One of the addresses of a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Which {
    DownstreamRemote,
    DownstreamDirectRemote,
    DownstreamLocal,
    UpstreamLocal,
}

/// All of them, by name.
pub(super) const FIELDS: &[(&str, Field)] = &[
    ("PROTOCOL", Field::Protocol),
    ("RESPONSE_CODE", Field::ResponseCode),
    ("RESPONSE_FLAGS", Field::ResponseFlags),
    ("RESPONSE_CODE_DETAILS", Field::ResponseCodeDetails),
    ("BYTES_RECEIVED", Field::BytesReceived),
    ("BYTES_SENT", Field::BytesSent),
    ("DURATION", Field::Duration),
    ("ROUTE_NAME", Field::RouteName),
    ("CONNECTION_ID", Field::ConnectionId),
    ("REQUESTED_SERVER_NAME", Field::RequestedServerName),
    ("UPSTREAM_HOST", Field::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS", Field::UpstreamHost),
    ("UPSTREAM_CLUSTER", Field::UpstreamCluster),
    ("UPSTREAM_LOCAL_ADDRESS", Field::Address(Which::UpstreamLocal)),
    ("UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", Field::AddressWithoutPort(Which::UpstreamLocal)),
    ("UPSTREAM_LOCAL_PORT", Field::Port(Which::UpstreamLocal)),
    ("UPSTREAM_TLS_VERSION", Field::TlsVersion(Side::Upstream)),
    ("UPSTREAM_TLS_CIPHER", Field::TlsCipher(Side::Upstream)),
    ("UPSTREAM_PEER_SUBJECT", Field::Certificate(Shown::Host, |text| &text.subject)),
    ("UPSTREAM_PEER_ISSUER", Field::Certificate(Shown::Host, |text| &text.issuer)),
    ("UPSTREAM_PEER_URI_SAN", Field::Certificate(Shown::Host, |text| &text.uri_sans)),
    ("UPSTREAM_PEER_DNS_SAN", Field::Certificate(Shown::Host, |text| &text.dns_sans)),
    ("UPSTREAM_PEER_IP_SAN", Field::Certificate(Shown::Host, |text| &text.ip_sans)),
    ("UPSTREAM_PEER_CERT", Field::Certificate(Shown::Host, |text| &text.pem)),
    ("UPSTREAM_PEER_CERT_V_START", Field::Certificate(Shown::Host, |text| &text.valid_from)),
    ("UPSTREAM_PEER_CERT_V_END", Field::Certificate(Shown::Host, |text| &text.valid_until)),
    ("UPSTREAM_TRANSPORT_FAILURE_REASON", Field::UpstreamTransportFailureReason),
    ("DOWNSTREAM_REMOTE_ADDRESS", Field::Address(Which::DownstreamRemote)),
    ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Field::AddressWithoutPort(Which::DownstreamRemote)),
    ("DOWNSTREAM_REMOTE_PORT", Field::Port(Which::DownstreamRemote)),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", Field::Address(Which::DownstreamDirectRemote)),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", Field::AddressWithoutPort(Which::DownstreamDirectRemote)),
    ("DOWNSTREAM_LOCAL_ADDRESS", Field::Address(Which::DownstreamLocal)),
    ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", Field::AddressWithoutPort(Which::DownstreamLocal)),
    ("DOWNSTREAM_LOCAL_PORT", Field::Port(Which::DownstreamLocal)),
    ("DOWNSTREAM_TLS_VERSION", Field::TlsVersion(Side::Downstream)),
    ("DOWNSTREAM_TLS_CIPHER", Field::TlsCipher(Side::Downstream)),
    ("DOWNSTREAM_PEER_SUBJECT", Field::Certificate(Shown::Client, |text| &text.subject)),
    ("DOWNSTREAM_PEER_ISSUER", Field::Certificate(Shown::Client, |text| &text.issuer)),
    ("DOWNSTREAM_PEER_SERIAL", Field::Certificate(Shown::Client, |text| &text.serial)),
    ("DOWNSTREAM_PEER_URI_SAN", Field::Certificate(Shown::Client, |text| &text.uri_sans)),
    ("DOWNSTREAM_PEER_DNS_SAN", Field::Certificate(Shown::Client, |text| &text.dns_sans)),
    ("DOWNSTREAM_PEER_IP_SAN", Field::Certificate(Shown::Client, |text| &text.ip_sans)),
    ("DOWNSTREAM_PEER_EMAIL_SAN", Field::Certificate(Shown::Client, |text| &text.email_sans)),
    ("DOWNSTREAM_PEER_FINGERPRINT_256", Field::Certificate(Shown::Client, |text| &text.fingerprint_256)),
    ("DOWNSTREAM_PEER_FINGERPRINT_1", Field::Certificate(Shown::Client, |text| &text.fingerprint_1)),
    ("DOWNSTREAM_PEER_CERT", Field::Certificate(Shown::Client, |text| &text.pem)),
    ("DOWNSTREAM_PEER_CERT_V_START", Field::Certificate(Shown::Client, |text| &text.valid_from)),
    ("DOWNSTREAM_PEER_CERT_V_END", Field::Certificate(Shown::Client, |text| &text.valid_until)),
    ("DOWNSTREAM_LOCAL_SUBJECT", Field::Certificate(Shown::Own, |text| &text.subject)),
    ("DOWNSTREAM_LOCAL_URI_SAN", Field::Certificate(Shown::Own, |text| &text.uri_sans)),
    ("DOWNSTREAM_LOCAL_DNS_SAN", Field::Certificate(Shown::Own, |text| &text.dns_sans)),
    ("DOWNSTREAM_LOCAL_IP_SAN", Field::Certificate(Shown::Own, |text| &text.ip_sans)),
    ("DOWNSTREAM_LOCAL_EMAIL_SAN", Field::Certificate(Shown::Own, |text| &text.email_sans)),
    ("DOWNSTREAM_TRANSPORT_FAILURE_REASON", Field::DownstreamTransportFailureReason),
    ("RESPONSE_FLAGS_LONG", Field::ResponseFlagsLong),
    ("REQUEST_DURATION", Field::Until(|times| times.request_end)),
    ("REQUEST_TX_DURATION", Field::Until(Times::upstream_sent)),
    ("RESPONSE_DURATION", Field::Until(|times| times.upstream_answered)),
    ("RESPONSE_TX_DURATION", Field::ResponseTxDuration),
    ("UPSTREAM_REQUEST_ATTEMPT_COUNT", Field::Attempts),
    ("UPSTREAM_PROTOCOL", Field::UpstreamProtocol),
    ("UPSTREAM_CONNECTION_ID", Field::UpstreamConnectionId),
    ("UPSTREAM_HOSTS_ATTEMPTED", Field::Attempted(OfAttempt::Address { with_port: true })),
    ("UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT", Field::Attempted(OfAttempt::Address { with_port: false })),
    ("UPSTREAM_HOST_NAMES_ATTEMPTED", Field::Attempted(OfAttempt::Name { with_port: true })),
    ("UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT", Field::Attempted(OfAttempt::Name { with_port: false })),
    ("UPSTREAM_CONNECTION_IDS_ATTEMPTED", Field::Attempted(OfAttempt::Connection)),
    ("VIRTUAL_CLUSTER_NAME", Field::VirtualClusterName),
    ("LISTENER_NAME", Field::ListenerName),
    ("FILTER_CHAIN_NAME", Field::FilterChainName),
    ("REQUEST_HEADERS_BYTES", Field::HeaderBytes(|bytes| bytes.request)),
    ("RESPONSE_HEADERS_BYTES", Field::HeaderBytes(|bytes| bytes.response)),
    ("RESPONSE_TRAILERS_BYTES", Field::HeaderBytes(|bytes| bytes.trailers)),
    ("CUSTOM_FLAGS", Field::Nothing),
    ("BYTES_RETRANSMITTED", Field::Zero),
    ("UPSTREAM_CLUSTER_RAW", Field::UpstreamCluster),
    ("UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Field::UpstreamRemoteIp),
    ("UPSTREAM_REMOTE_PORT", Field::UpstreamRemotePort),
    ("UPSTREAM_HOST_NAME", Field::UpstreamHostName { with_port: true }),
    ("UPSTREAM_HOST_NAME_WITHOUT_PORT", Field::UpstreamHostName { with_port: false }),
    ("DOWNSTREAM_DIRECT_REMOTE_PORT", Field::Port(Which::DownstreamDirectRemote)),
    ("DOWNSTREAM_DIRECT_LOCAL_ADDRESS", Field::Address(Which::DownstreamLocal)),
    ("DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT", Field::AddressWithoutPort(Which::DownstreamLocal)),
    ("DOWNSTREAM_DIRECT_LOCAL_PORT", Field::Port(Which::DownstreamLocal)),
    ("CONNECTION_TERMINATION_DETAILS", Field::Never),
    ("TRACE_ID", Field::Never),
    ("SPAN_ID", Field::Never),
    ("TLS_JA3_FINGERPRINT", Field::Never),
    ("TLS_JA4_FINGERPRINT", Field::Never),
    ("LOCAL_REPLY_BODY", Field::LocalReplyBody),
    ("ACCESS_LOG_TYPE", Field::AccessLogType),
];

impl Which {
    fn of(self, record: &Record<'_>) -> Option<SocketAddr> {
        match self {
            Which::DownstreamRemote => record.downstream_remote_address,
            Which::DownstreamDirectRemote => record.downstream_direct_remote_address,
            Which::DownstreamLocal => record.downstream_local_address,
            Which::UpstreamLocal => record.upstream_local_address,
        }
    }
}

impl Shown {
    fn of<'a>(self, record: &Record<'a>) -> Option<&'a PeerText> {
        match self {
            Shown::Client => record.tls?.peer(),
            Shown::Own => record.tls?.local(),
            Shown::Host => record.upstream_tls?.peer(),
        }
    }
}

impl Field {
    /// Whether it is a number: JSON writes it without quotes.
    pub(super) fn is_number(self) -> bool {
        use Field::{
            Attempts, BytesReceived, BytesSent, ConnectionId, Duration, HeaderBytes, Port, ResponseCode,
            ResponseTxDuration, Until, UpstreamConnectionId, UpstreamRemotePort, Zero,
        };
        let counts = matches!(self, Attempts | BytesReceived | BytesSent | ConnectionId | ResponseCode | Zero);
        let times = matches!(self, Duration | Until(_) | ResponseTxDuration);
        counts
            || times
            || matches!(self, HeaderBytes(_))
            || matches!(self, Port(_) | UpstreamRemotePort | UpstreamConnectionId)
    }

    /// Appends what `record` says.
    pub(super) fn write(self, out: &mut Vec<u8>, record: &Record<'_>) {
        let tls = |side| match side {
            Side::Downstream => record.tls,
            Side::Upstream => record.upstream_tls,
        };
        match self {
            Field::Protocol => text(out, record, record.protocol),
            Field::ResponseCode => number(out, record.response_code.into()),
            Field::ResponseFlags => flags(out, record.response_flags.names()),
            Field::ResponseFlagsLong => flags(out, record.response_flags.long_names()),
            Field::UpstreamRemoteIp => text(out, record, upstream_remote(record).map(|(ip, _)| ip)),
            Field::UpstreamRemotePort => text(out, record, upstream_remote(record).map(|(_, port)| port)),
            Field::UpstreamHostName { with_port } => {
                let name = record.upstream_host_name;
                let without_port = || name.map(|name| split_port(name).map_or(name, |(name, _)| name));
                text(out, record, if with_port { name } else { without_port() });
            }
            Field::Until(when) => milliseconds(out, record, Times::between(record.times.began, when(&record.times))),
            Field::ResponseTxDuration => {
                milliseconds(out, record, Times::between(record.times.upstream_answered, record.times.end));
            }
            Field::Attempts => number(out, record.attempts.into()),
            Field::UpstreamProtocol => text(out, record, record.upstream_protocol),
            Field::UpstreamConnectionId => number(out, record.upstream_connection_id.unwrap_or(0)),
            Field::VirtualClusterName => text(out, record, record.virtual_cluster),
            Field::Attempted(what) => attempted(out, record, what),
            Field::Never => missing(out, record),
            Field::Nothing => {}
            Field::Zero => out.push(b'0'),
            Field::ResponseCodeDetails => {
                one_word(out, record, record.response_code_details);
            }
            Field::BytesReceived => number(out, record.bytes_received),
            Field::BytesSent => number(out, record.bytes_sent),
            Field::Duration => number(out, u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX)),
            Field::UpstreamHost => text(out, record, record.upstream_host),
            Field::UpstreamCluster => text(out, record, record.upstream_cluster),
            Field::RouteName => text(out, record, record.route_name),
            Field::ListenerName => text(out, record, record.listener_name.filter(|name| !name.is_empty())),
            Field::FilterChainName => text(out, record, record.filter_chain_name.filter(|name| !name.is_empty())),
            Field::HeaderBytes(of) => number(out, of(&record.header_bytes)),
            Field::ConnectionId => number(out, record.connection_id),
            Field::RequestedServerName => text(out, record, record.requested_server_name),
            Field::DownstreamTransportFailureReason => {
                one_word(out, record, record.downstream_transport_failure_reason.filter(|reason| !reason.is_empty()));
            }
            Field::UpstreamTransportFailureReason => one_word(out, record, record.upstream_transport_failure_reason),
            Field::AccessLogType => text(out, record, Some(record.log_type)),
            Field::LocalReplyBody => out.extend_from_slice(record.local_reply_body),
            Field::TlsVersion(side) => text(out, record, tls(side).map(|tls| tls.version)),
            Field::TlsCipher(side) => text(out, record, tls(side).map(|tls| tls.cipher)),
            Field::Certificate(shown, part) => {
                let part = shown.of(record).map(|certificate| part(certificate).as_str());
                text(out, record, part.filter(|text| !text.is_empty()));
            }
            Field::Address(which) => address(out, record, which.of(record)),
            Field::AddressWithoutPort(which) => ip(out, record, which.of(record)),
            Field::Port(which) => port(out, record, which.of(record)),
        }
    }
}

/// The address at the other end of the connection to the host, and its port.
fn upstream_remote<'a>(record: &Record<'a>) -> Option<(&'a str, &'a str)> {
    record.upstream_local_address?;
    let (ip, port) = split_port(record.upstream_host?)?;
    Some((ip.trim_matches(['[', ']']), port))
}

/// The last attempt's alone, as in Envoy, where it had a connection.
fn attempted(out: &mut Vec<u8>, record: &Record<'_>, what: OfAttempt) {
    let without_port = |text| split_port(text).map_or(text, |(host, _): (&str, _)| host);
    let (address, name) = (record.upstream_host, record.upstream_host_name);
    match (record.upstream_connection_id, what) {
        (None, _) => missing(out, record),
        (Some(_), OfAttempt::Address { with_port: true }) => text(out, record, address),
        (Some(_), OfAttempt::Address { .. }) => {
            text(out, record, address.map(|address| without_port(address).trim_matches(['[', ']'])));
        }
        (Some(_), OfAttempt::Name { with_port: true }) => text(out, record, name),
        (Some(_), OfAttempt::Name { .. }) => text(out, record, name.map(without_port)),
        (Some(id), OfAttempt::Connection) => number(out, id),
    }
}

/// A time, in whole milliseconds.
fn milliseconds(out: &mut Vec<u8>, record: &Record<'_>, time: Option<std::time::Duration>) {
    match time {
        Some(time) => number(out, u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
        None => missing(out, record),
    }
}

fn split_port(text: &str) -> Option<(&str, &str)> {
    text.rsplit_once(':').filter(|(_, port)| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

fn flags(out: &mut Vec<u8>, names: impl Iterator<Item = &'static str>) {
    let before = out.len();
    for name in names {
        if out.len() > before {
            out.push(b',');
        }
        out.extend_from_slice(name.as_bytes());
    }
    // Also where what is missing is not written otherwise.
    if out.len() == before {
        out.push(b'-');
    }
}

/// One word, so that a line can be split at its spaces.
fn one_word(out: &mut Vec<u8>, record: &Record<'_>, words: Option<&str>) {
    let before = out.len();
    text(out, record, words);
    out[before..].iter_mut().filter(|b| b.is_ascii_whitespace()).for_each(|b| *b = b'_');
}

/// What stands for what is not there.
pub(super) fn missing(out: &mut Vec<u8>, record: &Record<'_>) {
    out.extend_from_slice(record.missing.as_bytes());
}

fn text(out: &mut Vec<u8>, record: &Record<'_>, text: Option<&str>) {
    out.extend_from_slice(text.unwrap_or(record.missing).as_bytes());
}

/// `write!` goes through the formatting machinery; most fields of a line are short numbers.
pub(super) fn number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

fn address(out: &mut Vec<u8>, record: &Record<'_>, address: Option<SocketAddr>) {
    // Writing to a Vec cannot fail.
    let _ = match address {
        Some(address) => write!(out, "{}", SocketAddr::new(address.ip().to_canonical(), address.port())),
        None => write!(out, "{}", record.missing),
    };
}

fn ip(out: &mut Vec<u8>, record: &Record<'_>, address: Option<SocketAddr>) {
    // Writing to a Vec cannot fail.
    let _ = match address {
        Some(address) => write!(out, "{}", address.ip().to_canonical()),
        None => write!(out, "{}", record.missing),
    };
}

fn port(out: &mut Vec<u8>, record: &Record<'_>, address: Option<SocketAddr>) {
    match address {
        Some(address) => number(out, address.port().into()),
        None => missing(out, record),
    }
}
