//! What an authorisation service is told of a request.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{
            Address, HeaderMap, HeaderValue, Metadata, SocketAddress, address, socket_address::PortSpecifier,
        },
        service::auth::v3::{
            AttributeContext, CheckRequest,
            attribute_context::{HttpRequest, Peer, Request, TlsSession},
        },
    },
    google::protobuf::Timestamp,
};
use http::header::HOST;

use super::config::{Buffer, Settings};
use crate::{
    config::model::StringMatcher,
    http::{
        protocol_name,
        redirect::scheme,
        route_match::authority,
        stream::{RequestHead, StreamCx},
    },
    tls::PeerText,
};

const PARTIAL_BODY: &str = "x-envoy-auth-partial-body";

/// What has been read of a request's body.
pub(super) struct Read {
    pub(super) data: Bytes,
    /// It is all of it.
    pub(super) whole: bool,
    /// How much the service sees.
    pub(super) buffer: Buffer,
}

/// All of it.
pub(super) fn request(
    settings: &Settings,
    head: &RequestHead,
    cx: &StreamCx,
    body: Option<&Read>,
    context_extensions: HashMap<String, String>,
) -> CheckRequest {
    let connection = &cx.connection;
    let tls = connection.tls();
    let service = head.headers.get("x-envoy-downstream-service-cluster");
    let mut source = peer(connection.remote, tls.and_then(|tls| tls.peer()));
    source.service = service.map(|name| text(name.as_bytes())).unwrap_or_default();
    if settings.include_peer_certificate {
        source.certificate = tls.and_then(|tls| tls.peer()).map(|peer| peer.pem.clone()).unwrap_or_default();
    }
    let started = SystemTime::now().checked_sub(cx.started.elapsed()).unwrap_or(UNIX_EPOCH);
    let since = started.duration_since(UNIX_EPOCH).unwrap_or_default();
    let told = cx.progress.metadata.borrow();
    let select = |told: Option<&crate::http::metadata::Metadata>, fields: &[Box<str>], typed: &[Box<str>]| {
        let (fields, typed) = (fields.iter().map(|name| &**name), typed.iter().map(|name| &**name));
        told.map_or_else(Metadata::default, |told| told.select(fields, typed))
    };
    let metadata = select(told.as_deref(), &settings.metadata_namespaces, &settings.typed_namespaces);
    let of_route = cx.route.as_ref().and_then(|route| route.metadata.as_deref());
    let of_route = select(of_route, &settings.route_namespaces, &settings.route_typed_namespaces);
    let sni = || connection.requested_server_name().unwrap_or_default().to_owned();
    let tls_session = settings.include_tls_session.then(|| TlsSession { sni: sni() });
    CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(source),
            destination: Some(peer(connection.local, tls.and_then(|tls| tls.local()))),
            request: Some(Request {
                time: Some(Timestamp {
                    seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                    nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
                }),
                http: Some(http_request(settings, head, cx, body)),
            }),
            context_extensions,
            metadata_context: Some(metadata),
            route_metadata_context: Some(of_route),
            tls_session,
        }),
    }
}

fn peer(address: SocketAddr, certificate: Option<&PeerText>) -> Peer {
    let socket = SocketAddress {
        address: address.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(u32::from(address.port()))),
        ..SocketAddress::default()
    };
    let principal = certificate.map(|text| text.uri_and_dns_names().next().unwrap_or(&text.subject).to_owned());
    Peer {
        address: Some(Address { address: Some(address::Address::SocketAddress(socket)) }),
        principal: principal.unwrap_or_default(),
        ..Peer::default()
    }
}

fn http_request(settings: &Settings, head: &RequestHead, cx: &StreamCx, body: Option<&Read>) -> HttpRequest {
    let mut headers: HashMap<String, String> = HashMap::with_capacity(head.headers.len() + 4);
    let is_told = |name: &str| {
        let matches = |matchers: &[StringMatcher]| matchers.iter().any(|matcher| matcher.matches(name));
        name != PARTIAL_BODY
            && !matches(&settings.disallowed_headers)
            && settings.allowed_headers.as_deref().is_none_or(matches)
    };
    let path = head.uri.path_and_query().map_or("", |path| path.as_str());
    let host = authority(head);
    let pseudo = [(":authority", host), (":method", head.method.as_str()), (":path", path), (":scheme", scheme(head))];
    for (name, value) in pseudo.into_iter().filter(|(name, _)| is_told(name)) {
        headers.insert(name.to_owned(), value.to_owned());
    }
    let mut raw: Vec<HeaderValue> = Vec::new();
    let bytes =
        |key: &str, value: &[u8]| HeaderValue { key: key.to_owned(), raw_value: value.to_vec(), ..Default::default() };
    if settings.raw_headers {
        raw.extend(headers.drain().map(|(name, value)| bytes(&name, value.as_bytes())));
    }
    for (name, value) in head.headers.iter().filter(|(name, _)| **name != HOST && is_told(name.as_str())) {
        if settings.raw_headers {
            raw.push(bytes(name.as_str(), value.as_bytes()));
            continue;
        }
        let value = text(value.as_bytes());
        headers.entry(name.as_str().to_owned()).and_modify(|all| *all += &format!(",{value}")).or_insert(value);
    }
    // What has come by now.
    let received = i64::try_from(cx.progress.received.get()).unwrap_or(i64::MAX);
    let mut request = HttpRequest {
        id: cx.random.to_string(),
        method: head.method.as_str().to_owned(),
        path: path.to_owned(),
        host: host.to_owned(),
        scheme: scheme(head).to_owned(),
        protocol: protocol_name(head.version).to_owned(),
        size: received,
        ..HttpRequest::default()
    };
    if let Some(Read { data, whole, buffer }) = body {
        let part = &data[..data.len().min(buffer.max_bytes)];
        let partial = part.len() < data.len() || !whole;
        match settings.raw_headers {
            true => raw.push(bytes(PARTIAL_BODY, partial.to_string().as_bytes())),
            false => drop(headers.insert(PARTIAL_BODY.to_owned(), partial.to_string())),
        }
        if buffer.as_bytes {
            request.raw_body = part.to_vec();
        } else {
            request.body = text(part);
        }
    }
    request.headers = headers;
    request.header_map = settings.raw_headers.then_some(HeaderMap { headers: raw });
    request
}

/// Bytes as a message's text: what is not UTF-8 is `!`, as in Envoy.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => String::from_utf8_lossy(bytes).replace('\u{fffd}', "!"),
    }
}
