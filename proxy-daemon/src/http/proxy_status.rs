//! `proxy-status` (RFC 9209): what a response says of why it is not the upstream's.

use http::{HeaderName, HeaderValue, StatusCode};

use super::{headers::append, node, stream::ResponseHead};
use crate::{
    access_log::ResponseFlags,
    config::model::{HttpConnectionManagerConfig, ProxyName, ProxyStatus},
};

const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");

/// What the flags of a stream are in RFC 9209's words, in Envoy's order: the first that is set counts. Where an error has one, the
/// status that the RFC recommends.
const ERRORS: &[(ResponseFlags, &str, Option<StatusCode>)] = {
    use ResponseFlags as F;
    const UNAVAILABLE: Option<StatusCode> = Some(StatusCode::SERVICE_UNAVAILABLE);
    const TIMEOUT: Option<StatusCode> = Some(StatusCode::GATEWAY_TIMEOUT);
    const GATEWAY: Option<StatusCode> = Some(StatusCode::BAD_GATEWAY);
    const INTERNAL: Option<StatusCode> = Some(StatusCode::INTERNAL_SERVER_ERROR);
    &[
        (F::LH, "destination_unavailable", UNAVAILABLE),
        (F::UH, "destination_unavailable", UNAVAILABLE),
        (F::UT, "http_response_timeout", TIMEOUT),
        (F::DT, "connection_timeout", TIMEOUT),
        (F::LR, "connection_timeout", TIMEOUT),
        (F::UR, "connection_terminated", GATEWAY),
        (F::UF, "connection_refused", GATEWAY),
        (F::UAEX, "connection_refused", GATEWAY),
        (F::UC, "connection_terminated", GATEWAY),
        (F::OM, "connection_limit_reached", UNAVAILABLE),
        (F::DO, "connection_limit_reached", UNAVAILABLE),
        (F::FI, "http_request_error", None),
        (F::DC, "connection_terminated", GATEWAY),
        (F::DR, "connection_terminated", GATEWAY),
        (F::UO, "connection_limit_reached", UNAVAILABLE),
        (F::NR, "destination_not_found", INTERNAL),
        (F::RL, "connection_limit_reached", UNAVAILABLE),
        (F::RLSE, "connection_limit_reached", UNAVAILABLE),
        (F::URX, "destination_unavailable", UNAVAILABLE),
        (F::SI, "http_response_timeout", TIMEOUT),
        (F::IH, "http_request_error", None),
        (F::DPE, "http_request_error", None),
        (F::UMSDR, "http_response_timeout", TIMEOUT),
        (F::NFCF, "proxy_configuration_error", INTERNAL),
        (F::UPE, "http_protocol_error", GATEWAY),
        (F::NC, "destination_unavailable", UNAVAILABLE),
        (F::DF, "dns_error", GATEWAY),
    ]
};

/// Tells what the flags mean, where they mean anything. `details` is `%RESPONSE_CODE_DETAILS%`.
pub(super) fn tell(
    config: &HttpConnectionManagerConfig,
    told: &ProxyStatus,
    flags: ResponseFlags,
    details: &str,
    head: &mut ResponseHead,
) {
    let Some((_, error, recommended)) = ERRORS.iter().find(|(flag, ..)| flags.intersects(*flag)) else { return };
    let name = match &told.name {
        ProxyName::Server => config.server_name.to_str().unwrap_or_default(),
        ProxyName::Node => node::this().and_then(|node| node.id.to_str().ok()).unwrap_or_default(),
        ProxyName::Literal(name) => name,
    };
    let mut text = format!("{name}; error={error}");
    if told.details && !details.is_empty() {
        let flags: Vec<_> = flags.names().collect();
        let flags = if told.flags { format!("; {}", flags.join(",")) } else { String::new() };
        // As a quoted string has them.
        let details = format!("{details}{flags}").replace('\\', "\\\\").replace('"', "\\\"");
        text = format!("{text}; details=\"{details}\"");
    }
    if let Ok(value) = HeaderValue::try_from(text) {
        append(&mut head.headers, PROXY_STATUS, &value, ", ");
    }
    if let Some(recommended) = recommended.filter(|_| told.recommended_status) {
        head.status = recommended;
    }
}
