use std::{
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::{
    envoy::config::core::v3::{
        Address, CidrRange, DataSource, HeaderValueOption, Http2ProtocolOptions, KeepaliveSettings, RuntimeFeatureFlag,
        RuntimeFractionalPercent, SocketAddress, address,
        data_source::Specifier,
        header_value_option::HeaderAppendAction as ProtoAction,
        socket_address::{PortSpecifier, Protocol},
    },
    envoy::r#type::v3::{FractionalPercent, fractional_percent::DenominatorType},
    google::protobuf::{Any, Duration as ProtoDuration, UInt32Value},
};
use http::{HeaderName, HeaderValue, StatusCode};

use super::support::join;
use crate::{
    access_log::HeaderFormat,
    config::{
        FieldError,
        model::{AddedValue, Cidr, EndpointAddress, HeaderAdd, HeaderAppendAction, Http2Keepalive, Http2Options},
    },
    layered_runtime::{Denominator, Fraction, Key, RuntimeFlag, RuntimeFraction},
};

pub(super) type Result<T> = std::result::Result<T, FieldError>;

/// An error for a field that must be set.
pub(super) fn required(path: &str, field: &str) -> FieldError {
    FieldError::new(join(path, field), "value is required")
}

/// The first number of seconds that Envoy does not take: its nanoseconds hardly fit 63 bits.
const DURATION_LIMIT: u64 = 9_223_372_036;

/// A duration that is not negative, and at most some 292 years; `None` where it is not set.
pub(crate) fn duration(value: Option<ProtoDuration>, path: &str, field: &str) -> Result<Option<Duration>> {
    let Some(value) = value else { return Ok(None) };
    let negative = || FieldError::new(join(path, field), "must not be negative");
    let seconds = u64::try_from(value.seconds).map_err(|_| negative())?;
    let nanos = u32::try_from(value.nanos).map_err(|_| negative())?;
    if seconds >= DURATION_LIMIT || nanos > 999_999_999 {
        return Err(FieldError::new(join(path, field), "the duration is out of range"));
    }
    Ok(Some(Duration::new(seconds, nanos)))
}

/// A time limit: unset takes the default, and 0 switches it off.
pub(super) fn limit(
    value: Option<ProtoDuration>,
    default: Option<Duration>,
    path: &str,
    field: &str,
) -> Result<Option<Duration>> {
    match duration(value, path, field)? {
        None => Ok(default),
        Some(limit) => Ok(Some(limit).filter(|limit| !limit.is_zero())),
    }
}

/// A wrapped number, or its default.
pub(super) fn number(value: Option<UInt32Value>, default: u32) -> u32 {
    value.map_or(default, |value| value.value)
}

/// A TCP port.
pub(super) fn port(value: u32, path: &str, field: &str) -> Result<u16> {
    u16::try_from(value).map_err(|_| FieldError::new(join(path, field), format!("{value} is not a TCP port")))
}

/// A socket address, with its host as text.
pub(super) fn socket_address<'a>(address: &'a Address, path: &str) -> Result<(&'a SocketAddress, u16)> {
    let socket = match &address.address {
        Some(address::Address::SocketAddress(socket)) => socket,
        Some(address::Address::Pipe(_)) => return Err(FieldError::unsupported(join(path, "pipe"))),
        _ => return Err(required(path, "socket_address")),
    };
    let path = join(path, "socket_address");
    if socket.protocol != 0 {
        let name = Protocol::try_from(socket.protocol).map_or("a protocol that is not known", |it| it.as_str_name());
        return Err(FieldError::unsupported_value(join(&path, "protocol"), name, "TCP"));
    }
    let number = match &socket.port_specifier {
        Some(PortSpecifier::PortValue(number)) => port(*number, &path, "port_value")?,
        _ => return Err(required(&path, "port_value")),
    };
    Ok((socket, number))
}

/// A literal address.
pub(super) fn ip(socket: &SocketAddress, path: &str) -> Result<IpAddr> {
    let field = || join(path, "socket_address.address");
    if let Some((address, _)) = socket.address.split_once('%')
        && address.parse::<Ipv6Addr>().is_ok()
    {
        return Err(FieldError::new(field(), "an address with a scope is not supported by culvert yet"));
    }
    socket.address.parse().map_err(|_| {
        let text = format!(
            "malformed IP address: {}. Consider setting resolver_name or setting cluster type to 'STRICT_DNS' or \
             'LOGICAL_DNS'",
            socket.address
        );
        FieldError::new(field(), text)
    })
}

/// An endpoint's address; a name is only taken where `names` says so.
pub(super) fn endpoint_address(address: &Address, names: bool, path: &str) -> Result<EndpointAddress> {
    if let Some(address::Address::Pipe(pipe)) = &address.address {
        return Ok(EndpointAddress::Pipe(pipe.path.clone().into()));
    }
    let (socket, port) = socket_address(address, path)?;
    match ip(socket, path) {
        Ok(ip) => Ok(EndpointAddress::Ip((ip, port).into())),
        Err(_) if names => Ok(EndpointAddress::Dns { host: socket.address.as_str().into(), port }),
        Err(error) => Err(error),
    }
}

/// Address ranges.
pub(super) fn cidrs(ranges: &[CidrRange], path: &str, field: &str) -> Result<Vec<Cidr>> {
    let parse = |(index, range): (usize, &CidrRange)| cidr(range, &format!("{}[{index}]", join(path, field)));
    ranges.iter().enumerate().map(parse).collect()
}

/// An address range.
pub(crate) fn cidr(range: &CidrRange, path: &str) -> Result<Cidr> {
    let bad = || {
        let length = number(range.prefix_len, 0);
        FieldError::new(path, format!("{}/{length} is not an address range", range.address_prefix))
    };
    let address = range.address_prefix.parse().map_err(|_| bad())?;
    let address: IpAddr = address;
    let length = u8::try_from(number(range.prefix_len, 0)).map_err(|_| bad())?;
    // As in Envoy: more bits than an address has are all of its bits.
    let bits = if address.to_canonical().is_ipv4() { 32 } else { 128 };
    Cidr::new(address, length.min(bits)).ok_or_else(bad)
}

/// Headers to remove.
pub(super) fn headers_to_remove(names: &[String], path: &str, field: &str) -> Result<Vec<HeaderName>> {
    let parse = |(index, name): (usize, &String)| {
        let path = format!("{}[{index}]", join(path, field));
        if is_fixed(name) {
            return Err(FieldError::new(path, ":-prefixed or host headers may not be removed"));
        }
        header_name(name, &path)
    };
    names.iter().enumerate().map(parse).collect()
}

/// Whether a header is part of what routing and framing rest on, so that no mutation may touch it.
fn is_fixed(name: &str) -> bool {
    name.starts_with(':') || name.eq_ignore_ascii_case("host")
}

/// One header name.
pub(super) fn header_name(name: &str, path: &str) -> Result<HeaderName> {
    HeaderName::try_from(name).map_err(|_| FieldError::new(path, format!("{name:?} is not a header name")))
}

/// A header value.
pub(super) fn header_value(value: &str, path: &str) -> Result<HeaderValue> {
    HeaderValue::try_from(value).map_err(|_| FieldError::new(path, format!("{value:?} is not a header value")))
}

/// A value that is a format.
pub(crate) fn added_value(text: &str, path: &str) -> Result<AddedValue> {
    Ok(match HeaderFormat::parse(text).map_err(|text| FieldError::new(path, text))? {
        Ok(format) => AddedValue::Format(Arc::new(format)),
        Err(literal) => AddedValue::Literal(header_value(&literal, path)?),
    })
}

/// Headers to add; their values are format strings.
pub(crate) fn headers_to_add(options: &[HeaderValueOption], path: &str, field: &str) -> Result<Vec<HeaderAdd>> {
    let parse = |(index, option): (usize, &HeaderValueOption)| {
        let path = format!("{}[{index}]", join(path, field));
        let header = option.header.as_ref().ok_or_else(|| required(&path, "header"))?;
        if is_fixed(&header.key) {
            let text = ":-prefixed or host headers may not be modified";
            return Err(FieldError::new(join(&path, "header.key"), text));
        }
        let name = header_name(&header.key, &join(&path, "header.key"))?;
        if !header.raw_value.is_empty() {
            return Err(FieldError::unsupported(join(&path, "header.raw_value")));
        }
        let value = added_value(&header.value, &join(&path, "header.value"))?;
        #[expect(deprecated, reason = "the field that append_action replaced, which Envoy still takes")]
        let append = option.append;
        if append.is_some() && option.append_action != 0 {
            return Err(FieldError::new(path, "Both append and append_action are set and it's not allowed"));
        }
        let action = match (append, ProtoAction::try_from(option.append_action)) {
            (Some(append), _) if !append.value => HeaderAppendAction::OverwriteIfExistsOrAdd,
            (Some(_), _) | (None, Ok(ProtoAction::AppendIfExistsOrAdd)) => HeaderAppendAction::AppendIfExistsOrAdd,
            (None, Ok(ProtoAction::AddIfAbsent)) => HeaderAppendAction::AddIfAbsent,
            (None, Ok(ProtoAction::OverwriteIfExistsOrAdd)) => HeaderAppendAction::OverwriteIfExistsOrAdd,
            (None, Ok(ProtoAction::OverwriteIfExists)) => HeaderAppendAction::OverwriteIfExists,
            (None, Err(_)) => return Err(FieldError::unsupported(join(&path, "append_action"))),
        };
        Ok(HeaderAdd { name, value, keep_empty_value: option.keep_empty_value, action })
    };
    options.iter().enumerate().map(parse).collect()
}

/// Text that is written into the configuration.
pub(crate) fn inline_text(source: &DataSource, path: &str) -> Result<Vec<u8>> {
    match &source.specifier {
        Some(Specifier::InlineString(text)) => Ok(text.clone().into_bytes()),
        Some(Specifier::InlineBytes(bytes)) => Ok(bytes.clone()),
        // Honoured for certificates and keys, which have the same message.
        Some(Specifier::Filename(_)) => Err(FieldError::unsupported(join(path, "filename"))),
        Some(Specifier::EnvironmentVariable(_)) => Err(FieldError::unsupported(join(path, "environment_variable"))),
        None => Err(required(path, "inline_string")),
    }
}

/// Text that is written into the configuration, or stands elsewhere: in a file of at most `limit` bytes, which is read now, or
/// in a variable of the environment.
pub(super) fn text_of(source: &DataSource, limit: u32, path: &str) -> Result<Vec<u8>> {
    use std::io::Read as _;
    match &source.specifier {
        Some(Specifier::Filename(name)) => {
            let path = join(path, "filename");
            let failed = |error: std::io::Error| FieldError::new(&path, format!("unable to read file {name}: {error}"));
            let file = std::fs::File::open(name).map_err(failed)?;
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(FieldError::new(&path, format!("{name} is not a file")));
            }
            let mut text = Vec::new();
            // One byte more than may be: what is too long is seen to be.
            file.take(u64::from(limit) + 1).read_to_end(&mut text).map_err(failed)?;
            if text.len() as u64 > u64::from(limit) {
                return Err(FieldError::new(&path, format!("file {name} is larger than {limit} bytes")));
            }
            Ok(text)
        }
        Some(Specifier::EnvironmentVariable(name)) => match std::env::var_os(name) {
            Some(text) => Ok(std::os::unix::ffi::OsStringExt::into_vec(text)),
            None => {
                let text = format!("environment variable {name} does not exist");
                Err(FieldError::new(join(path, "environment_variable"), text))
            }
        },
        _ => inline_text(source, path),
    }
}

/// Pings at intervals; `None` where none are asked for. How long the times are has been looked at before.
fn keepalive(settings: &KeepaliveSettings) -> Option<Http2Keepalive> {
    let time = |time: Option<ProtoDuration>| duration(time, "", "").ok().flatten();
    let (interval, timeout) = (time(settings.interval)?, time(settings.timeout)?);
    let percent = settings.interval_jitter.map_or(15.0, |jitter| jitter.value);
    Some(Http2Keepalive { interval, timeout, jitter: interval.mul_f64(percent.clamp(0.0, 100.0) / 100.0) })
}

/// HTTP/2 limits.
pub(super) fn http2(options: Option<&Http2ProtocolOptions>) -> Http2Options {
    let default = Http2Options::default();
    let Some(options) = options else { return default };
    Http2Options {
        max_concurrent_streams: number(options.max_concurrent_streams, default.max_concurrent_streams),
        initial_stream_window_size: number(options.initial_stream_window_size, default.initial_stream_window_size),
        initial_connection_window_size: number(
            options.initial_connection_window_size,
            default.initial_connection_window_size,
        ),
        allow_connect: options.allow_connect,
        max_consecutive_inbound_frames_with_empty_payload: number(
            options.max_consecutive_inbound_frames_with_empty_payload,
            default.max_consecutive_inbound_frames_with_empty_payload,
        ),
        max_inbound_priority_frames_per_stream: number(
            options.max_inbound_priority_frames_per_stream,
            default.max_inbound_priority_frames_per_stream,
        ),
        max_inbound_window_update_frames_per_data_frame_sent: number(
            options.max_inbound_window_update_frames_per_data_frame_sent,
            default.max_inbound_window_update_frames_per_data_frame_sent,
        ),
        hpack_table_size: options.hpack_table_size.map(|size| size.value),
        keepalive: options.connection_keepalive.as_ref().and_then(keepalive),
        counts_streams: options.override_stream_error_on_invalid_http_message.is_some_and(|value| value.value),
    }
}

/// A share of the requests, which a runtime value may replace. Without a default: none.
pub(crate) fn runtime_fraction(share: &RuntimeFractionalPercent) -> RuntimeFraction {
    let default = fraction(share.default_value.unwrap_or_default());
    RuntimeFraction { default, key: Key::optional(&share.runtime_key) }
}

/// A truth value, which a runtime value may replace.
pub(crate) fn runtime_flag(flag: &RuntimeFeatureFlag) -> RuntimeFlag {
    let default = flag.default_value.is_some_and(|value| value.value);
    RuntimeFlag { default, key: Key::optional(&flag.runtime_key) }
}

/// A truth value, which a runtime value may replace; true where nothing is said.
pub(crate) fn runtime_switch(flag: Option<&RuntimeFeatureFlag>) -> RuntimeFlag {
    flag.map_or(RuntimeFlag { default: true, key: None }, runtime_flag)
}

/// The status of answers: `default` where none is configured, one that is less than `least`, or one that HTTP does not have.
pub(crate) fn status(code: Option<i32>, least: u16, default: StatusCode) -> StatusCode {
    let code = code.and_then(|code| u16::try_from(code).ok()).filter(|code| *code >= least);
    code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(default)
}

/// A share.
pub(crate) fn fraction(share: FractionalPercent) -> Fraction {
    let denominator = match DenominatorType::try_from(share.denominator) {
        Ok(DenominatorType::TenThousand) => Denominator::TenThousand,
        Ok(DenominatorType::Million) => Denominator::Million,
        Ok(DenominatorType::Hundred) | Err(_) => Denominator::Hundred,
    };
    Fraction { numerator: share.numerator, denominator }
}

/// The full name of the message that a `typed_config` holds.
pub(crate) fn type_name(typed_config: &Any) -> &str {
    typed_config.type_url.rsplit('/').next().unwrap_or_default()
}
