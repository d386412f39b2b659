//! `envoy.filters.http.grpc_http1_bridge`: gRPC for clients of HTTP/1.1, which see no trailers: unary answers are held until their
//! status is known, which goes into the headers.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{envoy::extensions::filters::http::grpc_http1_bridge::v3::Config, google::protobuf::Any};
use http::{HeaderMap, HeaderValue, StatusCode, Version, header::CONTENT_LENGTH};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting};
use crate::{
    access_log::ResponseFlags,
    config::FieldError,
    http::{
        body::Body,
        buffered::{Unread, read},
        headers::{
            is_grpc,
            names::{GRPC_MESSAGE, GRPC_STATUS},
        },
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
        stream_end::broken_response,
    },
};

/// The longest answer that is held: what Envoy's buffers take by default.
const MAX_RESPONSE: usize = 1 << 20;

#[derive(Debug)]
struct GrpcHttp1BridgeFactory;

/// A gRPC request of a client of HTTP/1.
#[derive(Debug)]
struct Bridge;

impl HttpFilterFactory for GrpcHttp1BridgeFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        _cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if head.version < Version::HTTP_2 && is_grpc(&head.headers) {
            instances.push(Box::new(Bridge));
        }
        Flow::Continue
    }
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
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let flags = ResponseFlags::default();
            match read(body, MAX_RESPONSE).await {
                Ok((data, trailers)) => {
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
    // All its fields are refused by the table of honoured fields.
    let Config { upgrade_protobuf_to_grpc: _, ignore_query_parameters: _ } = unpack(typed_config, cx.path)?;
    Ok(Arc::new(GrpcHttp1BridgeFactory))
}

#[cfg(test)]
#[path = "grpc_http1_bridge_tests.rs"]
mod tests;
