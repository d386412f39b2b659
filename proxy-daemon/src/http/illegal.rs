//! What has been made for a request's head and is no header: a value with a line break in it, say, that a token or a service had.
//!
//! As in Envoy such a request goes nowhere: it is answered where it would be sent, unless something else has taken the header's place
//! by then. What a client sent under that name is gone: nobody may take it for what this proxy says.

use http::{HeaderMap, HeaderValue, StatusCode, header::HOST};

use super::stream::{LocalReply, RequestHead};
use crate::access_log::ResponseFlags;

/// Stands for such a value. It is known by where it is in memory, so that no client can send it.
static VALUE: &str = "(no header value)";

/// What stands in a request for a value that is none.
pub(crate) fn value() -> HeaderValue {
    HeaderValue::from_static(VALUE)
}

/// Whether this is what [`value`] makes.
pub(crate) fn is_value(value: &HeaderValue) -> bool {
    std::ptr::eq(value.as_bytes().as_ptr(), VALUE.as_ptr())
}

/// Takes them out of a response: what is no header is passed over there.
pub(super) fn strip(headers: &mut HeaderMap) {
    let names: Vec<_> = headers.iter().filter(|(_, value)| is_value(value)).map(|(name, _)| name.clone()).collect();
    names.iter().for_each(|name| drop(headers.remove(name)));
}

/// What has no place in a head: why the request is refused.
#[derive(Debug, Clone)]
struct Reason(String);

/// The request was to have a header of this name.
pub(super) fn name(head: &mut RequestHead, name: &str) {
    head.extensions.insert(Reason(format!("invalid header name: {name}")));
}

/// The request was to have a value that is none in the place of this pseudo-header.
pub(super) fn pseudo(head: &mut RequestHead, name: &str) {
    head.extensions.insert(Reason(format!("invalid header value for: {name}")));
}

/// The answer to a request that cannot be sent.
pub(super) fn refusal(head: &RequestHead) -> Option<LocalReply> {
    let reason = head.extensions.get::<Reason>().map(|Reason(text)| text.clone());
    let text = reason.or_else(|| {
        let (name, _) = head.headers.iter().find(|(_, value)| is_value(value))?;
        let name = if *name == HOST { ":authority" } else { name.as_str() };
        Some(format!("invalid header value for: {name}"))
    })?;
    let details = format!("filter_removed_required_request_headers{{{}}}", text.replace(' ', "_"));
    Some(LocalReply::new(StatusCode::SERVICE_UNAVAILABLE, text, ResponseFlags::DPE, details))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_made_here_is_refused() {
        let (mut head, ()) = http::Request::new(()).into_parts();
        head.headers.insert("x-a", HeaderValue::from_bytes(VALUE.as_bytes()).unwrap());
        strip(&mut head.headers);
        assert!(refusal(&head).is_none() && head.headers.len() == 1);
        head.headers.insert("x-a", value());
        let mut copy = head.headers.clone();
        strip(&mut copy);
        assert!(copy.is_empty());
        assert_eq!(refusal(&head).unwrap().body, "invalid header value for: x-a");
        head.headers.insert("x-a", HeaderValue::from_static("b"));
        head.headers.insert(HOST, value());
        assert_eq!(refusal(&head).unwrap().body, "invalid header value for: :authority");
        head.headers.remove(HOST);
        name(&mut head, "x b");
        let reply = refusal(&head).unwrap();
        assert_eq!(reply.body, "invalid header name: x b");
        assert_eq!(reply.details, "filter_removed_required_request_headers{invalid_header_name:_x_b}");
    }
}
