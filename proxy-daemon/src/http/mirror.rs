//! Requests that further clusters get a copy of: `request_mirror_policies`. Nobody waits for what comes of a copy.
//!
//! A copy is sent while its request passes. What the copy's host has not taken yet is kept, up to the limit of the request's body and a
//! piece more; a copy that is further behind breaks off (Envoy has the request wait).

mod pipe;

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, header::HOST};
use http_body::{Frame, SizeHint};

use self::pipe::{Writer, pipe};
use super::{
    body::{Body, BodyError, WrappedBody},
    call,
    headers::names::X_ENVOY_ATTEMPT_COUNT,
    illegal,
    route_match::authority,
    stream::{RequestHead, StreamCx},
    upstream_head,
};
use crate::{
    config::model::{MirrorCluster, MirrorPolicy},
    stats::Counter,
    upstream::{Source, WorkerCluster},
};

/// So much may always wait for a copy's host, in bytes: what passes at once of a body that comes quickly.
const LEAST_KEPT: u64 = 256 * 1024;

/// A copy of a request's head, and where it goes.
struct Copy {
    cluster: Rc<WorkerCluster>,
    source: Option<Source>,
    head: RequestHead,
    /// How long its answer may take, from the request's end.
    limit: Duration,
}

/// Copies a request as `policies` say. About `kept` bytes of its body may wait for each copy's host; `abandoned` is told of copies that
/// fall further behind.
pub(super) fn mirror(
    policies: &[MirrorPolicy],
    cx: &StreamCx,
    head: &RequestHead,
    body: &mut Body,
    limit: Option<Duration>,
    (kept, abandoned): (u64, Counter),
) {
    let wanted = policies.iter().filter(|policy| policy.share.as_ref().is_none_or(|share| share.includes(cx.random)));
    let copies = wanted.filter_map(|policy| copy(policy, cx, head, limit));
    if matches!(body, Body::Empty) {
        copies.for_each(|copy| copy.send(Body::Empty, std::future::ready(())));
        return;
    }
    let (kept, length) = (kept.max(LEAST_KEPT), http_body::Body::size_hint(body));
    let begin = |copy: Copy| {
        let (writer, reader) = pipe(kept, length);
        let ended = reader.original_ended();
        copy.send(Body::Wrapped(Box::new(reader)), ended);
        writer
    };
    let copies: Vec<_> = copies.map(begin).collect();
    if !copies.is_empty() {
        body.wrap(|body| Tee { body, copies, abandoned, gave_way: false });
    }
}

fn copy(policy: &MirrorPolicy, cx: &StreamCx, head: &RequestHead, limit: Option<Duration>) -> Option<Copy> {
    let name = match &policy.cluster {
        MirrorCluster::Name(name) => name,
        MirrorCluster::Header(name) => head.headers.get(name)?.to_str().ok()?,
    };
    let cluster = cx.worker.clusters.get(name)?;
    let mut head = head.clone();
    // What is not sent has no copies either.
    if illegal::refusal(&head).is_some() {
        return None;
    }
    if cx.route.as_ref().is_some_and(|route| route.virtual_host().include_request_attempt_count) {
        head.headers.insert(X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(1));
    }
    if !policy.mutations.is_empty() {
        cx.format_request(&mut head, |headers, record| policy.mutations.apply(headers, record));
    }
    let host = match &policy.host {
        None if policy.suffix => Some(HeaderValue::from_str(&shadow_host(authority(&head))).ok()?),
        host => host.clone(),
    };
    if let Some(host) = host {
        upstream_head::to_http1(&mut head);
        head.headers.insert(HOST, host);
    }
    call::mark(&mut head, cx);
    let limit = limit.unwrap_or(Duration::from_secs(300));
    Some(Copy { cluster, source: cx.connection.source, head, limit })
}

/// `-shadow` after the name, before the port.
fn shadow_host(host: &str) -> String {
    let after_address = host.rfind(']').unwrap_or(0);
    match host[after_address..].rfind(':').map(|colon| after_address + colon) {
        Some(colon) => format!("{}-shadow{}", &host[..colon], &host[colon..]),
        None => format!("{host}-shadow"),
    }
}

impl Copy {
    /// Sends it; its answer is waited for from when the request has `ended`.
    fn send(self, body: Body, ended: impl Future<Output = ()> + 'static) {
        tokio::task::spawn_local(async move {
            let Copy { cluster, source, head, limit } = self;
            let answered = async {
                call::send(&cluster, source, head, body).await?.discard().await;
                Ok(())
            };
            let expired = async {
                ended.await;
                tokio::time::sleep(limit).await;
            };
            // The cluster has counted what came of it.
            let _ = call::until(&cluster, expired, answered).await;
        });
    }
}

/// A body that is copied while it passes.
struct Tee {
    body: Body,
    copies: Vec<Writer>,
    abandoned: Counter,
    /// The copies have had their turn since the last piece.
    gave_way: bool,
}

impl Tee {
    /// Gives the copies what has passed.
    fn passed(&mut self, frame: &Frame<Bytes>) {
        let ended = frame.is_trailers() || http_body::Body::is_end_stream(&self.body);
        let abandoned = self.abandoned;
        self.copies.retain(|copy| {
            if copy.is_left() {
                return false;
            }
            if !copy.push(frame) {
                abandoned.inc();
                return false;
            }
            if ended {
                copy.end();
            }
            true
        });
    }
}

impl WrappedBody for Tee {
    fn passes(&mut self) -> Option<&mut Body> {
        Some(&mut self.body)
    }
}

impl http_body::Body for Tee {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        // Copies run on the same thread: without a turn between two pieces they could not but fall behind.
        if !self.gave_way && self.copies.iter().any(Writer::is_pressed) {
            self.gave_way = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.gave_way = false;
                self.passed(frame);
            }
            Poll::Ready(None) => self.copies.drain(..).for_each(|copy| copy.end()),
            // What breaks off has no whole copies.
            Poll::Ready(Some(Err(_))) => self.copies.clear(),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shadow_has_a_name_of_its_own() {
        assert_eq!(shadow_host("a.test"), "a.test-shadow");
        assert_eq!(shadow_host("a.test:80"), "a.test-shadow:80");
        assert_eq!(shadow_host("[::1]"), "[::1]-shadow");
        assert_eq!(shadow_host("[::1]:80"), "[::1]-shadow:80");
    }
}
