//! `envoy.filters.http.grpc_http1_bridge`: gRPC for clients of HTTP/1.1, which see no trailers: unary answers are held until their
//! status is known, which goes into the headers. Where it is asked for, messages of protobuf are put into gRPC's frames, and taken out of them.

use std::{
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use culvert_xds_client::json::unpack;
use envoy_types::pb::{envoy::extensions::filters::http::grpc_http1_bridge::v3::Config, google::protobuf::Any};
use http::{
    HeaderMap, HeaderValue, StatusCode, Uri, Version,
    header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use http_body::{Body as _, Frame, SizeHint};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting};
use crate::{
    access_log::ResponseFlags,
    config::FieldError,
    http::{
        body::{Body, BodyError, WrappedBody},
        buffered::{Unread, read},
        headers::{
            is_grpc,
            names::{GRPC_MESSAGE, GRPC_STATUS},
        },
        stream::{LocalReply, Progress, RequestHead, ResponseHead, StreamCx},
        stream_end::broken_response,
    },
};

/// The longest answer that is held: what Envoy's buffers take by default.
const MAX_RESPONSE: usize = 1 << 20;

/// What stands before a message: a flag, and its length.
const FRAME_HEAD: usize = 5;

#[derive(Debug)]
struct GrpcHttp1BridgeFactory {
    /// `upgrade_protobuf_to_grpc`
    upgrades: bool,
    /// `ignore_query_parameters`
    drops_query: bool,
}

/// A gRPC request of a client of HTTP/1.
#[derive(Debug)]
struct Bridge {
    /// The client knows nothing of frames.
    framed: bool,
}

impl HttpFilterFactory for GrpcHttp1BridgeFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if head.version >= Version::HTTP_2 {
            return Flow::Continue;
        }
        let is_protobuf = |value: &HeaderValue| value == "application/x-protobuf";
        let framed = self.upgrades && head.headers.get(CONTENT_TYPE).is_some_and(is_protobuf);
        if framed {
            head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            head.headers.remove(CONTENT_LENGTH);
            // Others may be for gRPC.
            cx.reroute = true;
        }
        if !is_grpc(&head.headers) {
            return Flow::Continue;
        }
        if self.drops_query {
            drop_query(&mut head.uri);
        }
        instances.push(Box::new(Bridge { framed }));
        if framed && !body.is_end_stream() {
            // Too long, it is answered when it has come.
            cx.progress.held.set(true);
            body.wrap(|body| InFrame::new(body, cx.connection.buffer_limit as usize, &cx.progress));
        }
        Flow::Continue
    }
}

fn drop_query(uri: &mut Uri) {
    let Some((path, _)) = uri.path_and_query().and_then(|path| path.as_str().split_once('?')) else { return };
    let Ok(path) = path.try_into() else { return };
    let mut parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(path);
    // They were parts of one before.
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

/// A request's body as one message in its frame, whose length nobody tells: the frame does.
struct InFrame {
    body: Body,
    /// What has come, behind room for the frame's head.
    held: BytesMut,
    /// How much may come.
    limit: usize,
    progress: Rc<Progress>,
    ended: bool,
}

impl InFrame {
    fn new(body: Body, limit: usize, progress: &Rc<Progress>) -> InFrame {
        InFrame { body, held: BytesMut::zeroed(FRAME_HEAD), limit, progress: Rc::clone(progress), ended: false }
    }
}

impl WrappedBody for InFrame {}

impl http_body::Body for InFrame {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        while !self.ended {
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()? else {
                self.ended = true;
                let length = self.held.len() - FRAME_HEAD;
                // Limits are numbers of as many bits.
                self.held[1..FRAME_HEAD].copy_from_slice(&(length as u32).to_be_bytes());
                return Poll::Ready(Some(Ok(Frame::data(self.held.split().freeze()))));
            };
            // Trailers are none of gRPC's.
            let Ok(data) = frame.into_data() else { continue };
            if self.held.len() - FRAME_HEAD + data.len() > self.limit {
                self.progress.answer(Unread::TooLong.into_reply());
                return Poll::Pending;
            }
            self.held.extend_from_slice(&data);
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// Without the head of its first frame.
fn out_of_frame(mut data: Bytes) -> Bytes {
    data.split_off(FRAME_HEAD.min(data.len()))
}

/// Says in an answer's head what its trailers say.
fn bridge(head: &mut ResponseHead, trailers: &HeaderMap, length: usize) {
    if let Some(status) = trailers.get(GRPC_STATUS) {
        let code: Option<u64> = status.to_str().ok().and_then(|status| status.parse().ok());
        if code != Some(0) {
            head.status = StatusCode::SERVICE_UNAVAILABLE;
        }
        head.headers.insert(GRPC_STATUS, status.clone());
    }
    if let Some(message) = trailers.get(GRPC_MESSAGE) {
        head.headers.insert(GRPC_MESSAGE, message.clone());
    }
    head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
}

impl HttpFilter for Bridge {
    fn response(&mut self, _head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        match body {
            // Made here, or ended with its head.
            Body::Empty | Body::Full(_) => Flow::Continue,
            _ => Flow::Wait,
        }
    }

    fn wait_response<'a>(
        &'a mut self,
        head: &'a mut ResponseHead,
        body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let flags = ResponseFlags::default();
            match read(body, MAX_RESPONSE).await {
                Ok((mut data, trailers)) => {
                    if self.framed {
                        data = out_of_frame(data);
                        cx.progress.sent_otherwise.set(true);
                        cx.progress.sent.set(data.len() as u64);
                        head.headers.remove(CONTENT_LENGTH);
                    }
                    if let Some(trailers) = trailers {
                        bridge(head, &trailers, data.len());
                    }
                    // Clients of HTTP/1.1 would not look at trailers.
                    *body = Body::Full(data);
                    Flow::Continue
                }
                Err(Unread::TooLong) => {
                    let (status, details) = (StatusCode::INTERNAL_SERVER_ERROR, "response_payload_too_large");
                    Flow::Respond(LocalReply::new(status, "Internal Server Error", flags, details))
                }
                Err(Unread::Broken(error)) => Flow::Respond(broken_response(&error)),
            }
        })
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Config { upgrade_protobuf_to_grpc, ignore_query_parameters } = unpack(typed_config, cx.path)?;
    Ok(Arc::new(GrpcHttp1BridgeFactory { upgrades: upgrade_protobuf_to_grpc, drops_query: ignore_query_parameters }))
}

#[cfg(test)]
#[path = "grpc_http1_bridge_tests.rs"]
mod tests;
