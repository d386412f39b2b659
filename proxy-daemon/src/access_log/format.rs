//! Envoy's format strings: compiled once, then written without looking at the text again.

use std::{io::Write as _, net::SocketAddr, str::FromStr as _};

use http::HeaderName;

use super::{
    Headers, Record,
    time::{self, TimeFormat},
};
use crate::tls::PeerText;

/// What a log without a format of its own writes.
const ENVOY_DEFAULT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
    \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// A compiled format.
#[derive(Debug)]
pub(super) struct Format(Vec<Op>);

/// Why a format string is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("{text:?}: no valid operator begins at position {position}; a percent sign is written %%")]
    Syntax { text: String, position: usize },
    #[error("%{name}% is not an operator that culvert knows; docs/stats.md lists them")]
    UnknownOperator { name: String },
    #[error("%{name}% needs a header's name in brackets, as in %{name}(USER-AGENT)%")]
    NeedsHeader { name: &'static str },
    #[error("%{name}%: {header:?} is not a header's name")]
    BadHeader { name: &'static str, header: String },
    #[error("%{name}% takes at most one alternative: %{name}(FIRST?SECOND)%")]
    Alternatives { name: &'static str },
    #[error("%{name}% takes neither brackets nor a length")]
    TakesNothing { name: String },
    #[error("%START_TIME%: {0}")]
    Time(String),
}

#[derive(Debug)]
enum Op {
    Text(Box<str>),
    StartTime,
    StartTimeAs(TimeFormat),
    Request(HeaderChoice),
    Response(HeaderChoice),
    Field(Field),
    Metadata(MetadataPath),
}

/// `NAMESPACE:key:key`
#[derive(Debug)]
struct MetadataPath {
    namespace: Box<str>,
    path: Box<[Box<str>]>,
    max_len: usize,
}

/// `X?Y` and `:N`.
#[derive(Debug)]
struct HeaderChoice {
    first: Header,
    second: Option<Header>,
    max_len: usize,
}

#[derive(Debug)]
enum Header {
    Name(HeaderName),
    Method,
    Path,
    Authority,
    Scheme,
    Status,
}

/// An operator without arguments.
#[derive(Debug, Clone, Copy)]
enum Field {
    Protocol,
    ResponseCode,
    ResponseFlags,
    ResponseCodeDetails,
    BytesReceived,
    BytesSent,
    Duration,
    UpstreamHost,
    UpstreamCluster,
    UpstreamLocalAddress,
    RouteName,
    DownstreamRemoteAddress,
    DownstreamRemoteAddressWithoutPort,
    DownstreamRemotePort,
    DownstreamDirectRemoteAddress,
    DownstreamDirectRemoteAddressWithoutPort,
    DownstreamLocalAddress,
    DownstreamLocalAddressWithoutPort,
    DownstreamLocalPort,
    ConnectionId,
    RequestedServerName,
    DownstreamTlsVersion,
    DownstreamTlsCipher,
    DownstreamPeerSubject,
    DownstreamPeerIssuer,
    DownstreamPeerSerial,
    DownstreamPeerUriSan,
    DownstreamPeerDnsSan,
    DownstreamPeerFingerprint256,
    DownstreamPeerCertVStart,
    DownstreamPeerCertVEnd,
    DownstreamPeerIpSan,
    DownstreamPeerEmailSan,
    DownstreamPeerFingerprint1,
    DownstreamPeerCert,
    DownstreamLocalSubject,
    DownstreamLocalUriSan,
    DownstreamLocalDnsSan,
    DownstreamLocalIpSan,
    DownstreamLocalEmailSan,
    DownstreamTransportFailureReason,
    LocalReplyBody,
}

const FIELDS: &[(&str, Field)] = &[
    ("PROTOCOL", Field::Protocol),
    ("RESPONSE_CODE", Field::ResponseCode),
    ("RESPONSE_FLAGS", Field::ResponseFlags),
    ("RESPONSE_CODE_DETAILS", Field::ResponseCodeDetails),
    ("BYTES_RECEIVED", Field::BytesReceived),
    ("BYTES_SENT", Field::BytesSent),
    ("DURATION", Field::Duration),
    ("UPSTREAM_HOST", Field::UpstreamHost),
    ("UPSTREAM_REMOTE_ADDRESS", Field::UpstreamHost),
    ("UPSTREAM_CLUSTER", Field::UpstreamCluster),
    ("UPSTREAM_LOCAL_ADDRESS", Field::UpstreamLocalAddress),
    ("ROUTE_NAME", Field::RouteName),
    ("DOWNSTREAM_REMOTE_ADDRESS", Field::DownstreamRemoteAddress),
    ("DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT", Field::DownstreamRemoteAddressWithoutPort),
    ("DOWNSTREAM_REMOTE_PORT", Field::DownstreamRemotePort),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", Field::DownstreamDirectRemoteAddress),
    ("DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT", Field::DownstreamDirectRemoteAddressWithoutPort),
    ("DOWNSTREAM_LOCAL_ADDRESS", Field::DownstreamLocalAddress),
    ("DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT", Field::DownstreamLocalAddressWithoutPort),
    ("DOWNSTREAM_LOCAL_PORT", Field::DownstreamLocalPort),
    ("CONNECTION_ID", Field::ConnectionId),
    ("REQUESTED_SERVER_NAME", Field::RequestedServerName),
    ("DOWNSTREAM_TLS_VERSION", Field::DownstreamTlsVersion),
    ("DOWNSTREAM_TLS_CIPHER", Field::DownstreamTlsCipher),
    ("DOWNSTREAM_PEER_SUBJECT", Field::DownstreamPeerSubject),
    ("DOWNSTREAM_PEER_ISSUER", Field::DownstreamPeerIssuer),
    ("DOWNSTREAM_PEER_SERIAL", Field::DownstreamPeerSerial),
    ("DOWNSTREAM_PEER_URI_SAN", Field::DownstreamPeerUriSan),
    ("DOWNSTREAM_PEER_DNS_SAN", Field::DownstreamPeerDnsSan),
    ("DOWNSTREAM_PEER_FINGERPRINT_256", Field::DownstreamPeerFingerprint256),
    ("DOWNSTREAM_PEER_CERT_V_START", Field::DownstreamPeerCertVStart),
    ("DOWNSTREAM_PEER_CERT_V_END", Field::DownstreamPeerCertVEnd),
    ("DOWNSTREAM_PEER_IP_SAN", Field::DownstreamPeerIpSan),
    ("DOWNSTREAM_PEER_EMAIL_SAN", Field::DownstreamPeerEmailSan),
    ("DOWNSTREAM_PEER_FINGERPRINT_1", Field::DownstreamPeerFingerprint1),
    ("DOWNSTREAM_PEER_CERT", Field::DownstreamPeerCert),
    ("DOWNSTREAM_LOCAL_SUBJECT", Field::DownstreamLocalSubject),
    ("DOWNSTREAM_LOCAL_URI_SAN", Field::DownstreamLocalUriSan),
    ("DOWNSTREAM_LOCAL_DNS_SAN", Field::DownstreamLocalDnsSan),
    ("DOWNSTREAM_LOCAL_IP_SAN", Field::DownstreamLocalIpSan),
    ("DOWNSTREAM_LOCAL_EMAIL_SAN", Field::DownstreamLocalEmailSan),
    ("DOWNSTREAM_TRANSPORT_FAILURE_REASON", Field::DownstreamTransportFailureReason),
    ("LOCAL_REPLY_BODY", Field::LocalReplyBody),
];

impl Format {
    /// Envoy's default format.
    pub(super) fn envoy_default() -> Format {
        // Its own test parses it: only then could it be refused.
        Format::parse(ENVOY_DEFAULT).unwrap_or(Format(Vec::new()))
    }

    /// Compiles `text`.
    pub(super) fn parse(text: &str) -> Result<Format, FormatError> {
        let mut ops = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            plain.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("%%") {
                plain.push('%');
                rest = after;
                continue;
            }
            let position = text.len() - rest.len();
            let syntax = || FormatError::Syntax { text: text.to_owned(), position };
            let (operator, after) = Operator::split(rest).ok_or_else(syntax)?;
            if !plain.is_empty() {
                ops.push(Op::Text(std::mem::take(&mut plain).into()));
            }
            ops.push(operator.compile()?);
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            ops.push(Op::Text(plain.into()));
        }
        Ok(Format(ops))
    }

    /// The request headers (or those of the response) that the format looks at.
    pub(super) fn headers(&self, of_response: bool) -> impl Iterator<Item = &HeaderName> {
        let choices = self.0.iter().filter_map(move |op| match op {
            Op::Request(choice) if !of_response => Some(choice),
            Op::Response(choice) if of_response => Some(choice),
            _ => None,
        });
        let headers = choices.flat_map(|choice| [Some(&choice.first), choice.second.as_ref()]).flatten();
        headers.filter_map(|header| if let Header::Name(name) = header { Some(name) } else { None })
    }

    /// The text, where it is always the same.
    pub(super) fn literal(&self) -> Option<&str> {
        match self.0.as_slice() {
            [] => Some(""),
            [Op::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Whether it is one operator, and nothing around it; and whether that one makes numbers.
    pub(super) fn single(&self) -> (bool, bool) {
        use Field::{BytesReceived, BytesSent, ConnectionId, DownstreamLocalPort, DownstreamRemotePort, Duration};
        match self.0.as_slice() {
            [Op::Text(_)] => (false, false),
            [
                Op::Field(
                    BytesReceived
                    | BytesSent
                    | ConnectionId
                    | DownstreamLocalPort
                    | DownstreamRemotePort
                    | Duration
                    | Field::ResponseCode,
                ),
            ] => (true, true),
            [_] => (true, false),
            _ => (false, false),
        }
    }

    /// Appends the line.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>) {
        for op in &self.0 {
            match op {
                Op::Text(text) => out.extend_from_slice(text.as_bytes()),
                Op::StartTime => time::write_default(out, record.start),
                Op::StartTimeAs(format) => format.write(out, record.start),
                Op::Request(choice) => choice.write(out, record, record.request_headers),
                Op::Response(choice) => choice.write(out, record, record.response_headers),
                Op::Field(field) => field.write(out, record),
                Op::Metadata(path) => {
                    let told = record.metadata.and_then(|metadata| metadata.show(&path.namespace, &path.path));
                    match told {
                        Some(told) => out.extend_from_slice(&told.as_bytes()[..told.len().min(path.max_len)]),
                        None => missing(out, record),
                    }
                }
            }
        }
    }
}

/// `%NAME(arguments):length%`, taken apart.
struct Operator<'a> {
    name: &'a str,
    arguments: Option<&'a str>,
    length: Option<usize>,
}

impl<'a> Operator<'a> {
    /// The operator that `text` begins with, and what follows it.
    fn split(text: &'a str) -> Option<(Operator<'a>, &'a str)> {
        let text = text.strip_prefix('%')?;
        let end = text.find(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_')?;
        let (name, mut rest) = text.split_at(end);
        if name.is_empty() {
            return None;
        }
        let mut arguments = None;
        if let Some(inner) = rest.strip_prefix('(') {
            // Up to the first bracket that ends the operator: a time format may hold percent signs.
            let close = inner.match_indices(')').map(|(at, _)| at).find(|at| {
                let after = inner[at + 1..].trim_start_matches(|c: char| c == ':' || c.is_ascii_digit());
                after.starts_with('%')
            })?;
            arguments = Some(&inner[..close]);
            rest = &inner[close + 1..];
        }
        let mut length = None;
        if let Some(digits) = rest.strip_prefix(':') {
            let end = digits.find('%')?;
            length = Some(digits[..end].parse().ok()?);
            rest = &digits[end..];
        }
        Some((Operator { name, arguments, length }, rest.strip_prefix('%')?))
    }

    fn compile(self) -> Result<Op, FormatError> {
        match self.name {
            "REQ" => HeaderChoice::parse("REQ", self).map(Op::Request),
            "RESP" => HeaderChoice::parse("RESP", self).map(Op::Response),
            "DYNAMIC_METADATA" => {
                let mut parts = self.arguments.unwrap_or_default().split(':').map(Box::from);
                let namespace = parts.next().unwrap_or_default();
                let max_len = self.length.unwrap_or(usize::MAX);
                Ok(Op::Metadata(MetadataPath { namespace, path: parts.collect(), max_len }))
            }
            "START_TIME" => match (self.arguments, self.length) {
                (None | Some(""), None) => Ok(Op::StartTime),
                (Some(format), None) => TimeFormat::parse(format).map(Op::StartTimeAs).map_err(FormatError::Time),
                (_, Some(_)) => Err(FormatError::Time("takes no length".into())),
            },
            name => match FIELDS.iter().find(|(known, _)| *known == name) {
                Some((_, field)) if self.arguments.is_none() && self.length.is_none() => Ok(Op::Field(*field)),
                Some(_) => Err(FormatError::TakesNothing { name: name.to_owned() }),
                None => Err(FormatError::UnknownOperator { name: name.to_owned() }),
            },
        }
    }
}

impl HeaderChoice {
    fn parse(name: &'static str, operator: Operator<'_>) -> Result<HeaderChoice, FormatError> {
        let mut names = operator.arguments.unwrap_or("").split('?');
        let first = match names.next() {
            None | Some("") => return Err(FormatError::NeedsHeader { name }),
            Some(first) => Header::parse(name, first)?,
        };
        let second = names.next().map(|second| Header::parse(name, second)).transpose()?;
        if names.next().is_some() {
            return Err(FormatError::Alternatives { name });
        }
        Ok(HeaderChoice { first, second, max_len: operator.length.unwrap_or(usize::MAX) })
    }

    fn write(&self, out: &mut Vec<u8>, record: &Record<'_>, headers: Option<Headers<'_>>) {
        if let Header::Status = self.first {
            return Field::ResponseCode.write(out, record);
        }
        let value = self.first.value(record, headers);
        let value = value.or_else(|| self.second.as_ref().and_then(|second| second.value(record, headers)));
        match value {
            Some(value) => out.extend_from_slice(&value[..value.len().min(self.max_len)]),
            None => missing(out, record),
        }
    }
}

impl Header {
    fn parse(operator: &'static str, name: &str) -> Result<Header, FormatError> {
        Ok(match (operator, name.to_ascii_lowercase().as_str()) {
            ("REQ", ":method") => Header::Method,
            ("REQ", ":path") => Header::Path,
            ("REQ", ":authority" | "host") => Header::Authority,
            ("REQ", ":scheme") => Header::Scheme,
            ("RESP", ":status") => Header::Status,
            (_, lower) => Header::Name(
                HeaderName::from_str(lower)
                    .map_err(|_| FormatError::BadHeader { name: operator, header: name.to_owned() })?,
            ),
        })
    }

    fn value<'a>(&self, record: &Record<'a>, headers: Option<Headers<'a>>) -> Option<&'a [u8]> {
        match self {
            // Of several values the first, as in Envoy.
            Header::Name(name) => headers?.get(name).map(|value| value.as_bytes()),
            Header::Method => record.method.map(str::as_bytes),
            Header::Path => record.path.map(str::as_bytes),
            Header::Authority => record.authority.map(str::as_bytes),
            Header::Scheme => record.scheme.map(str::as_bytes),
            Header::Status => None,
        }
    }
}

impl Field {
    fn write(self, out: &mut Vec<u8>, record: &Record<'_>) {
        match self {
            Field::Protocol => text(out, record, record.protocol),
            Field::ResponseCode => number(out, record.response_code.into()),
            Field::ResponseFlags => {
                let before = out.len();
                for name in record.response_flags.names() {
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
            Field::ResponseCodeDetails => {
                one_word(out, record, Some(record.response_code_details).filter(|details| !details.is_empty()));
            }
            Field::BytesReceived => number(out, record.bytes_received),
            Field::BytesSent => number(out, record.bytes_sent),
            Field::Duration => number(out, u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX)),
            Field::UpstreamHost => text(out, record, record.upstream_host),
            Field::UpstreamCluster => text(out, record, record.upstream_cluster),
            Field::UpstreamLocalAddress => address(out, record, record.upstream_local_address),
            Field::RouteName => text(out, record, record.route_name),
            Field::DownstreamRemoteAddress => address(out, record, record.downstream_remote_address),
            Field::DownstreamRemoteAddressWithoutPort => ip(out, record, record.downstream_remote_address),
            Field::DownstreamRemotePort => port(out, record, record.downstream_remote_address),
            Field::DownstreamDirectRemoteAddress => address(out, record, record.downstream_direct_remote_address),
            Field::DownstreamDirectRemoteAddressWithoutPort => ip(out, record, record.downstream_direct_remote_address),
            Field::DownstreamLocalAddress => address(out, record, record.downstream_local_address),
            Field::DownstreamLocalAddressWithoutPort => ip(out, record, record.downstream_local_address),
            Field::DownstreamLocalPort => port(out, record, record.downstream_local_address),
            Field::ConnectionId => number(out, record.connection_id),
            Field::RequestedServerName => text(out, record, record.requested_server_name),
            Field::DownstreamTlsVersion => text(out, record, record.tls.map(|tls| tls.version)),
            Field::DownstreamTlsCipher => text(out, record, record.tls.map(|tls| tls.cipher)),
            Field::DownstreamPeerSubject => peer(out, record, |peer| &peer.subject),
            Field::DownstreamPeerIssuer => peer(out, record, |peer| &peer.issuer),
            Field::DownstreamPeerSerial => peer(out, record, |peer| &peer.serial),
            Field::DownstreamPeerUriSan => peer(out, record, |peer| &peer.uri_sans),
            Field::DownstreamPeerDnsSan => peer(out, record, |peer| &peer.dns_sans),
            Field::DownstreamPeerFingerprint256 => peer(out, record, |peer| &peer.fingerprint_256),
            Field::DownstreamPeerCertVStart => peer(out, record, |peer| &peer.valid_from),
            Field::DownstreamPeerCertVEnd => peer(out, record, |peer| &peer.valid_until),
            Field::DownstreamPeerIpSan => peer(out, record, |peer| &peer.ip_sans),
            Field::DownstreamPeerEmailSan => peer(out, record, |peer| &peer.email_sans),
            Field::DownstreamPeerFingerprint1 => peer(out, record, |peer| &peer.fingerprint_1),
            Field::DownstreamPeerCert => peer(out, record, |peer| &peer.pem),
            Field::DownstreamLocalSubject => local(out, record, |local| &local.subject),
            Field::DownstreamLocalUriSan => local(out, record, |local| &local.uri_sans),
            Field::DownstreamLocalDnsSan => local(out, record, |local| &local.dns_sans),
            Field::DownstreamLocalIpSan => local(out, record, |local| &local.ip_sans),
            Field::DownstreamLocalEmailSan => local(out, record, |local| &local.email_sans),
            Field::LocalReplyBody => out.extend_from_slice(record.local_reply_body),
            Field::DownstreamTransportFailureReason => {
                one_word(out, record, record.downstream_transport_failure_reason.filter(|reason| !reason.is_empty()));
            }
        }
    }
}

/// Something of the client's certificate.
fn peer(out: &mut Vec<u8>, record: &Record<'_>, part: fn(&PeerText) -> &String) {
    text(
        out,
        record,
        record.tls.and_then(|tls| tls.peer()).map(|peer| part(peer).as_str()).filter(|text| !text.is_empty()),
    );
}

/// Something of our own certificate.
fn local(out: &mut Vec<u8>, record: &Record<'_>, part: fn(&PeerText) -> &String) {
    let own = record.tls.and_then(|tls| tls.local()).map(|own| part(own).as_str());
    text(out, record, own.filter(|text| !text.is_empty()));
}

/// One word, so that a line can be split at its spaces.
fn one_word(out: &mut Vec<u8>, record: &Record<'_>, words: Option<&str>) {
    let before = out.len();
    text(out, record, words);
    out[before..].iter_mut().filter(|b| b.is_ascii_whitespace()).for_each(|b| *b = b'_');
}

fn missing(out: &mut Vec<u8>, record: &Record<'_>) {
    out.extend_from_slice(record.missing.as_bytes());
}

fn text(out: &mut Vec<u8>, record: &Record<'_>, text: Option<&str>) {
    out.extend_from_slice(text.unwrap_or(record.missing).as_bytes());
}

/// `write!` goes through the formatting machinery; most fields of a line are short numbers.
fn number(out: &mut Vec<u8>, mut number: u64) {
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

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
