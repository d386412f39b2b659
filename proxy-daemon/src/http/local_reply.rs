//! Answers that are made here: what the connection manager's configuration makes of them, and how a gRPC client gets them.

use std::{borrow::Cow, fmt::Write as _, rc::Rc};

use bytes::Bytes;
use http::{
    HeaderValue, Response, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE},
};

use super::{
    body::Body,
    filters::{Flow, HttpFilter, Redirect},
    headers::{self, names::*},
    redirect,
    route_match::authority,
    stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    stream_end::StreamEnd,
    waiting::Counted,
};
use crate::{
    access_log::{Headers, Record, ResponseFlags},
    config::model::LocalReplies,
    grpc_status,
};

/// What is known of the request that is answered.
pub(super) enum Asked<'a> {
    /// Nothing: there was no head.
    Nothing,
    /// Its head, which is refused.
    Head(&'a RequestHead),
    /// All of it.
    Stream(&'a StreamCx),
}

/// Turns a local reply into the response to a request that no filter has seen, and settles the stream.
pub(super) fn answer(
    mut end: StreamEnd,
    reply: LocalReply,
    grpc: bool,
    is_head: bool,
    asked: Asked<'_>,
) -> Response<Body> {
    let refused = reply.flags == ResponseFlags::DPE;
    let (head, body, closes) = make(&mut end, reply, grpc, is_head, &asked);
    settle(end, head, body, closes, refused)
}

/// Turns a local reply into a response that `filters` see, and settles the stream. Where one of them leads the request on instead,
/// and `lead` makes something of that: the stream that begins then, and what it begins with.
pub(super) async fn answer_stream<T>(
    mut end: StreamEnd,
    reply: LocalReply,
    grpc: bool,
    is_head: bool,
    cx: &mut StreamCx,
    filters: &mut Vec<Box<dyn HttpFilter>>,
    lead: impl Fn(Redirect, &StreamCx) -> Option<T>,
) -> Result<Response<Body>, (StreamEnd, T)> {
    let (mut head, mut body, mut closes) = make(&mut end, reply, grpc, is_head, &Asked::Stream(cx));
    if !filters.is_empty() {
        let length = http_body::Body::size_hint(&body).lower();
        if length > 0 {
            head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
    }
    cx.flags |= end.flags;
    cx.upstream_host = end.host.as_ref().map(|(_, host)| Rc::clone(host));
    cx.local_reply = Some(end.details.clone());
    for filter in filters.iter_mut().rev() {
        let flow = match filter.response(&mut head, &mut body, cx) {
            Flow::Wait => filter.wait_response(&mut head, &mut body, cx).await,
            replaced @ (Flow::Replace(_) | Flow::Redirect(_)) => replaced,
            // Other filters that need not wait do not replace an answer that was made here.
            _ => Flow::Continue,
        };
        end.clears_details = matches!(flow, Flow::Replace(_));
        let flow = match flow {
            Flow::Redirect(redirect) => {
                if let Some(led) = lead(redirect, cx) {
                    end.flags |= cx.flags;
                    end.filters.append(filters);
                    return Err((end.led_on(&head), led));
                }
                Flow::Continue
            }
            flow => flow,
        };
        if let Flow::Respond(instead) | Flow::Replace(instead) = flow {
            end.details = Cow::Borrowed("");
            (head, body, closes) = make(&mut end, instead, grpc, is_head, &Asked::Stream(cx));
            break;
        }
    }
    end.flags |= cx.flags;
    end.filters.append(filters);
    Ok(settle(end, head, body, closes, false))
}

/// The response that a local reply is. Whether it ends its connection.
fn make(
    end: &mut StreamEnd,
    reply: LocalReply,
    grpc: bool,
    is_head: bool,
    asked: &Asked<'_>,
) -> (ResponseHead, Body, bool) {
    // What follows may be no HTTP either, whatever becomes of the answer. Of a body that is too long nobody takes the rest.
    let closes = end.http1
        && (reply.status == StatusCode::BAD_REQUEST && !end.state.config().http1_stays_open
            || reply.details == "request_payload_too_large");
    end.flags |= reply.flags;
    // What a service says by these statuses is its own matter.
    match &*reply.details {
        "request_payload_too_large" => end.state.manager.stats.downstream_rq_too_large.inc(),
        "response_payload_too_large" => end.state.manager.stats.rs_too_large.inc(),
        _ => {}
    }
    if end.details.is_empty() {
        end.details = reply.details;
    }
    let (mut head, ()) = Response::new(()).into_parts();
    head.status = reply.status;
    head.headers.extend(reply.headers);
    let mut body = reply.body;
    if let Asked::Stream(cx) = asked {
        cx.mutate_response(&mut head, end);
    }
    let mut content_type = None;
    if let Some(replies) = end.state.config().local_replies.clone() {
        content_type = rewrite(&replies, end, asked, &mut head, &mut body);
    }
    if grpc {
        let status = reply.grpc_status.unwrap_or_else(|| grpc_status::of_http(head.status.as_u16()));
        head.status = StatusCode::OK;
        head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        head.headers.entry(GRPC_STATUS).or_insert(HeaderValue::from(status));
        let is_json = content_type.is_some_and(|value| value == "application/json");
        let text = if is_json { body.strip_suffix(b"\n").unwrap_or(&body) } else { &body };
        if let (false, false, Ok(message)) = (text.is_empty(), is_head, HeaderValue::from_str(&grpc_message(text))) {
            head.headers.insert(GRPC_MESSAGE, message);
        }
        head.headers.remove(CONTENT_LENGTH);
        body = Bytes::new();
    } else if body.is_empty() {
        head.headers.remove(CONTENT_TYPE);
    } else if let Some(content_type) = content_type {
        head.headers.insert(CONTENT_TYPE, content_type);
    } else {
        head.headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("text/plain"));
    }
    if is_head && !body.is_empty() {
        // Tells the length that a GET would have had.
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        body = Bytes::new();
    }
    (head, Body::Full(body), closes)
}

/// What all responses that are made here have, and the end of the stream's accounts. `refused`: the client does not speak HTTP. Envoy
/// notes that only after its answer is made.
fn settle(mut end: StreamEnd, mut head: ResponseHead, mut body: Body, closes: bool, refused: bool) -> Response<Body> {
    if closes {
        head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    headers::sign_response(&mut head, end.state.config(), end.request_id.as_ref());
    if !refused {
        end.tell_proxy_status(&mut head);
    }
    end.keep_response(head.status, &head.headers);
    end.keep_length(http_body::Body::size_hint(&body).exact().unwrap_or(0));
    match &body {
        Body::Wrapped(_) => body.wrap(|body| Counted::new(body, Rc::clone(&end.progress), Some(end))),
        body => {
            end.progress.sent.set(http_body::Body::size_hint(body).lower());
            end.complete = true;
        }
    }
    Response::from_parts(head, body)
}

/// Whether it is no HTTP that is answered. Envoy notes a protocol error only after its answer is made.
fn is_refused(end: &StreamEnd, asked: &Asked<'_>) -> bool {
    !matches!(asked, Asked::Stream(_)) && end.flags == ResponseFlags::DPE
}

/// Does what `local_reply_config` says. Returns what the body is then, where the headers shall say so.
fn rewrite(
    replies: &LocalReplies,
    end: &StreamEnd,
    asked: &Asked<'_>,
    head: &mut ResponseHead,
    body: &mut Bytes,
) -> Option<HeaderValue> {
    let own_type = head.headers.get(CONTENT_TYPE).cloned();
    let before = body.clone();
    let mut chosen = None;
    let host = end.host.as_ref().map(|(_, host)| host.host.display());
    let record = |head: &ResponseHead, see: &mut dyn FnMut(&Record<'_>)| {
        let flags = if is_refused(end, asked) { ResponseFlags::default() } else { end.flags };
        let details = end.told_details();
        let mut see = |record: &Record<'_>| {
            let record = Record { response_flags: flags, response_code_details: details, missing: "-", ..*record };
            end.tell_upstream(&record, |record| see(record));
        };
        match asked {
            Asked::Stream(cx) => cx.tell_response(head.status, host, |record| see(record)),
            Asked::Head(request) => see(&Record {
                response_code: head.status.as_u16(),
                method: Some(request.method.as_str()),
                path: request.uri.path_and_query().map(|path| path.as_str()),
                authority: Some(authority(request)),
                scheme: Some(redirect::scheme(request)),
                protocol: Some(super::protocol_name(request.version)),
                request_headers: Some(Headers::All(&request.headers)),
                ..end.connection_record()
            }),
            Asked::Nothing => see(&Record {
                response_code: head.status.as_u16(),
                // Of HTTP/2 there would be no answer.
                protocol: Some("HTTP/1.1"),
                ..end.connection_record()
            }),
        }
    };
    for mapper in &replies.mappers {
        let mut admitted = false;
        record(head, &mut |record| {
            admitted = mapper.filter.admits(&Record { response_headers: Some(Headers::All(&head.headers)), ..*record });
        });
        if !admitted {
            continue;
        }
        if let Some(text) = &mapper.body {
            *body = text.clone();
        }
        let mut changed = std::mem::take(&mut head.headers);
        record(head, &mut |record| {
            let record = Record { local_reply_body: body, missing: "", ..*record };
            headers::mutate_response(&mut changed, &mapper.headers, &record);
        });
        head.headers = changed;
        head.status = mapper.status.unwrap_or(head.status);
        chosen = mapper.format.as_ref();
        break;
    }
    let format = chosen.or(replies.format.as_ref());
    if let Some(format) = format {
        let mut made = Vec::new();
        record(head, &mut |record| {
            let headers = Some(Headers::All(&head.headers));
            made = format.format.write(&Record { response_headers: headers, local_reply_body: body, ..*record });
        });
        *body = made.into();
    }
    // What a mapper says of the body's type counts for more.
    let types_itself = head.headers.get(CONTENT_TYPE) != own_type.as_ref();
    if *body == before && own_type.is_some() || types_itself {
        return None;
    }
    Some(format.map_or(HeaderValue::from_static("text/plain"), |format| format.content_type.clone()))
}

/// A message as gRPC writes it into a header: what is not printable, and `%`, as `%` and two digits.
pub(super) fn grpc_message(text: &[u8]) -> String {
    text.iter().fold(String::with_capacity(text.len()), |mut message, byte| {
        match byte {
            b' '..=b'~' if *byte != b'%' => message.push(char::from(*byte)),
            // Writing to a String cannot fail.
            other => drop(write!(message, "%{other:02X}")),
        }
        message
    })
}
