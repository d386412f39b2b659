//! How large an attempt's request and its response are, where its cluster tells (`track_cluster_stats.request_response_sizes`).

use std::{
    cell::Cell,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header::HOST};
use http_body::{Body as _, Frame, SizeHint};

use super::{
    body::{Body, BodyError, WrappedBody},
    logged::{request_bytes, response_bytes},
    look::Look as _,
    stream::RequestHead,
};
use crate::upstream::{MessageSizes, WorkerCluster};

/// Of one attempt, which is told when it is over.
pub(super) struct Sizes {
    stats: [MessageSizes; 2],
    /// How many headers there are, and of how many bytes.
    request: Cell<Option<(u64, u64)>>,
    response: Cell<Option<(u64, u64)>>,
    /// Of the bodies, in bytes.
    sent: Cell<u64>,
    received: Cell<u64>,
}

impl Sizes {
    /// Of an attempt at a host of the cluster that its route has chosen; `None`: nobody wants to know.
    pub(super) fn of(cluster: &WorkerCluster) -> Option<Rc<Sizes>> {
        let stats = cluster.cluster.stats.sizes?;
        let (request, response) = Default::default();
        Some(Rc::new(Sizes { stats, request, response, sent: Cell::new(0), received: Cell::new(0) }))
    }

    /// The request is this one.
    pub(super) fn request(&self, head: &RequestHead) {
        // The method, the path, the host and the scheme are headers.
        let count = head.headers.len() + 4 - usize::from(head.headers.has(&HOST));
        self.request.set(Some((count as u64, request_bytes(head))));
    }

    /// The response is this one.
    pub(super) fn response(&self, status: StatusCode, headers: &HeaderMap) {
        self.response.set(Some((headers.len() as u64 + 1, response_bytes(status, headers))));
    }

    /// So many bytes of the response's body have come.
    pub(super) fn received(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
    }

    /// The request's body, which is counted as it goes.
    pub(super) fn counting(self: &Rc<Self>, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        Body::Wrapped(Box::new(Counting { body, sizes: Rc::downgrade(self) }))
    }
}

impl Drop for Sizes {
    fn drop(&mut self) {
        let [of_requests, of_responses] = &self.stats;
        if let Some((headers, bytes)) = self.request.get() {
            of_requests.record(headers, bytes, self.sent.get());
        }
        if let Some((headers, bytes)) = self.response.get() {
            of_responses.record(headers, bytes, self.received.get());
        }
    }
}

/// A request's body on its way to a host. What is sent again is another attempt's.
struct Counting {
    body: Body,
    sizes: Weak<Sizes>,
}

impl WrappedBody for Counting {
    fn passes(&mut self) -> Option<&mut Body> {
        Some(&mut self.body)
    }
}

impl http_body::Body for Counting {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(Ok(frame)), Some(sizes)) = (&polled, self.sizes.upgrade()) {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            sizes.sent.set(sizes.sent.get() + bytes as u64);
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
