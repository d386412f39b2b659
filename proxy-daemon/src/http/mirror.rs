//! Requests that further clusters get a copy of: `request_mirror_policies`. Nobody waits for what comes of a copy.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, header::HOST};
use http_body::{Frame, SizeHint};

use super::{
    body::{Body, BodyError},
    buffered::Buffered,
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

/// A copy that waits for its request's body.
struct Copy {
    cluster: Rc<WorkerCluster>,
    source: Option<Source>,
    head: RequestHead,
    /// How long its answer may take.
    limit: Duration,
}

/// Copies a request as `policies` say: now where it has no body, otherwise once that has passed whole. Of a body over `kept` bytes
/// there are no copies, which `abandoned` is told.
pub(super) fn mirror(
    policies: &[MirrorPolicy],
    cx: &StreamCx,
    head: &RequestHead,
    body: &mut Body,
    limit: Option<Duration>,
    (kept, abandoned): (u64, Counter),
) {
    let wanted = policies.iter().filter(|policy| policy.share.as_ref().is_none_or(|share| share.includes(cx.random)));
    let copies: Vec<_> = wanted.filter_map(|policy| copy(policy, cx, head, limit)).collect();
    if copies.is_empty() {
        return;
    }
    if matches!(body, Body::Empty) {
        send_all(copies, &Bytes::new(), None);
        return;
    }
    body.wrap(|body| Tee { body, copies, data: BytesMut::new(), limit: kept, abandoned });
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

fn send_all(copies: Vec<Copy>, data: &Bytes, trailers: Option<&HeaderMap>) {
    for copy in copies {
        let body = match trailers {
            None if data.is_empty() => Body::Empty,
            None => Body::Full(data.clone()),
            Some(trailers) => Body::Wrapped(Box::new(Buffered::new(data.clone(), Some(trailers.clone())))),
        };
        tokio::task::spawn_local(async move {
            let Copy { cluster, source, head, limit } = copy;
            let answered = async {
                call::send(&cluster, source, head, body).await?.discard().await;
                Ok(())
            };
            // The cluster has counted what came of it.
            let _ = call::within(&cluster, Some(limit), answered).await;
        });
    }
}

/// A body that is copied while it passes.
struct Tee {
    body: Body,
    copies: Vec<Copy>,
    data: BytesMut,
    limit: u64,
    abandoned: Counter,
}

impl http_body::Body for Tee {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if self.copies.is_empty() {
            return polled;
        }
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    if (self.data.len() + data.len()) as u64 > self.limit {
                        self.copies.clear();
                        self.data = BytesMut::new();
                        self.abandoned.inc();
                        return polled;
                    }
                    self.data.extend_from_slice(data);
                }
                if frame.is_trailers() || self.body.is_end_stream() {
                    let data = std::mem::take(&mut self.data).freeze();
                    send_all(std::mem::take(&mut self.copies), &data, frame.trailers_ref());
                }
            }
            Poll::Ready(None) => {
                let data = std::mem::take(&mut self.data).freeze();
                send_all(std::mem::take(&mut self.copies), &data, None);
            }
            // What is not whole is not copied.
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
