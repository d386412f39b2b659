//! What a processor is told.

use envoy_types::pb::envoy::{
    config::core::v3::{HeaderMap as ProtoHeaders, HeaderValue as ProtoHeader, Metadata},
    service::ext_proc::v3::{HttpBody, HttpHeaders, HttpTrailers, processing_request::Request},
};
use http::{HeaderMap, header::HOST};

use super::{config::ForwardRules, mode::Side};
use crate::http::{
    redirect::scheme,
    route_match::authority,
    stream::{Progress, RequestHead, ResponseHead},
};

struct Headers<'a> {
    rules: &'a ForwardRules,
    list: Vec<ProtoHeader>,
}

impl Headers<'_> {
    fn push(&mut self, name: &str, value: &[u8]) {
        if self.rules.forwards(name) {
            self.list.push(ProtoHeader { key: name.to_owned(), raw_value: value.to_vec(), ..ProtoHeader::default() });
        }
    }

    fn extend(&mut self, headers: &HeaderMap) {
        for (name, value) in headers.iter().filter(|(name, _)| **name != HOST) {
            self.push(name.as_str(), value.as_bytes());
        }
    }
}

/// A request's headers.
pub(super) fn request(head: &RequestHead, ended: bool, rules: &ForwardRules) -> Request {
    let mut headers = Headers { rules, list: Vec::with_capacity(head.headers.len() + 4) };
    headers.push(":authority", authority(head).as_bytes());
    headers.push(":path", head.uri.path_and_query().map_or("", |path| path.as_str()).as_bytes());
    headers.push(":method", head.method.as_str().as_bytes());
    headers.push(":scheme", scheme(head).as_bytes());
    headers.extend(&head.headers);
    Request::RequestHeaders(http_headers(headers, ended))
}

/// A response's headers.
pub(super) fn response(head: &ResponseHead, ended: bool, rules: &ForwardRules) -> Request {
    let mut headers = Headers { rules, list: Vec::with_capacity(head.headers.len() + 1) };
    headers.push(":status", head.status.as_str().as_bytes());
    headers.extend(&head.headers);
    Request::ResponseHeaders(http_headers(headers, ended))
}

fn http_headers(headers: Headers<'_>, ended: bool) -> HttpHeaders {
    HttpHeaders {
        headers: Some(ProtoHeaders { headers: headers.list }),
        end_of_stream: ended,
        ..HttpHeaders::default()
    }
}

/// A piece of a body, or all of it.
pub(super) fn body(side: Side, piece: &[u8], ended: bool) -> Request {
    let body = HttpBody { body: piece.to_vec(), end_of_stream: ended, ..HttpBody::default() };
    match side {
        Side::Request => Request::RequestBody(body),
        Side::Response => Request::ResponseBody(body),
    }
}

/// Trailers.
pub(super) fn trailers(side: Side, trailers: &HeaderMap, rules: &ForwardRules) -> Request {
    let mut headers = Headers { rules, list: Vec::with_capacity(trailers.len()) };
    headers.extend(trailers);
    let trailers = HttpTrailers { trailers: Some(ProtoHeaders { headers: headers.list }) };
    match side {
        Side::Request => Request::RequestTrailers(trailers),
        Side::Response => Request::ResponseTrailers(trailers),
    }
}

/// What other filters have told under these names.
pub(super) fn metadata(namespaces: &[Box<str>], progress: &Progress) -> Metadata {
    let told = progress.metadata.borrow();
    let namespace = |name: &str| Some((name.to_owned(), told.as_ref()?.namespace(name)?.clone()));
    let namespaces = namespaces.iter().map(|name| &**name);
    Metadata { filter_metadata: namespaces.filter_map(namespace).collect(), ..Metadata::default() }
}
