//! Requests that further clusters get a copy of: `request_mirror_policies`. Nobody waits for what comes of a copy.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, StatusCode, header::HOST};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;

use super::{
    body::{Body, BodyError},
    buffered::Buffered,
    forward,
    headers::{self, names::*},
    route_match::authority,
    stream::{RequestHead, StreamCx},
};
use crate::{
    config::model::{MirrorCluster, MirrorPolicy},
    stats::Counter,
    upstream::{PickCx, Source, WorkerCluster, WorkerHost},
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
    if policy.suffix {
        let host = HeaderValue::from_str(&shadow_host(authority(&head))).ok()?;
        forward::to_http1(&mut head);
        head.headers.insert(HOST, host);
    }
    head.headers.insert(X_ENVOY_INTERNAL, HeaderValue::from_static("true"));
    let own = cx.connection.node_ip.unwrap_or_else(|| cx.connection.local.ip());
    headers::append(&mut head.headers, X_FORWARDED_FOR, &HeaderValue::from_str(&own.to_string()).ok()?, ",");
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
            let (limit, cluster) = (copy.limit, Rc::clone(&copy.cluster));
            if tokio::time::timeout(limit, send(copy, body)).await.is_err() {
                cluster.cluster.stats.upstream_rq_timeout.inc();
                cluster.cluster.stats.upstream_rq.inc(StatusCode::GATEWAY_TIMEOUT.as_u16());
            }
        });
    }
}

/// A copy under way, at the circuit breaker and at its host.
struct UnderWay {
    cluster: Rc<WorkerCluster>,
    host: Rc<WorkerHost>,
    started: Instant,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let stats = &self.cluster.cluster.stats;
        stats.upstream_rq_active.dec();
        stats.upstream_rq_time.record(self.started.elapsed().as_millis() as u64);
        self.host.end_request();
    }
}

async fn send(copy: Copy, body: Body) {
    let Copy { cluster, source, mut head, .. } = copy;
    let stats = &cluster.cluster.stats;
    if stats.upstream_rq_active.value() >= u64::from(cluster.cluster.limits(false).max_requests()) {
        stats.upstream_rq_pending_overflow.inc();
        cluster.cluster.dropped.inc();
        return;
    }
    let Some(host) = cluster.pick(&PickCx { headers: Some(&head.headers), ..PickCx::default() }) else {
        stats.upstream_cx_none_healthy.inc();
        return;
    };
    stats.upstream_rq_total.inc();
    stats.upstream_rq_active.inc();
    host.begin_request();
    let under_way = UnderWay { cluster: Rc::clone(&cluster), host: Rc::clone(&host), started: Instant::now() };
    let failed = || stats.upstream_rq.inc(StatusCode::SERVICE_UNAVAILABLE.as_u16());
    let Ok(connection) = host.acquire(&cluster, forward::protocol(&cluster, &head), source, false).await else {
        return failed();
    };
    if connection.is_http2() {
        forward::to_http2(&mut head);
    } else {
        forward::to_http1(&mut head);
    }
    let sent = connection.send(Request::from_parts(head, body), |status| stats.upstream_rq.inc(status.as_u16())).await;
    let Ok(response) = sent else { return failed() };
    stats.upstream_rq.inc(response.status().as_u16());
    let mut incoming = response.into_body();
    while let Some(frame) = incoming.frame().await {
        if frame.is_err() {
            return;
        }
    }
    connection.release();
    drop(under_way);
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
