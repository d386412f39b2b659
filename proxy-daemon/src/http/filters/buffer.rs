//! `envoy.filters.http.buffer`: requests go on when they are there as a whole, with their length.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::buffer::v3::{Buffer, BufferPerRoute, buffer_per_route::Override},
    google::protobuf::Any,
};
use http::{HeaderValue, header::CONTENT_LENGTH};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig, Waiting};
use crate::{
    config::FieldError,
    http::{
        body::Body,
        buffered::gather,
        stream::{RequestHead, StreamCx},
    },
};

#[derive(Debug)]
struct BufferFactory {
    max_request_bytes: usize,
}

/// What a route says: another limit, or none, and then nothing waits.
#[derive(Debug)]
struct Told(Option<usize>);

/// A request with a body.
#[derive(Debug)]
struct BufferFilter {
    max_request_bytes: usize,
}

impl HttpFilterFactory for BufferFactory {
    fn request(
        &self,
        _head: &mut RequestHead,
        body: &mut Body,
        _cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let told = route.most_specific::<Told>().map_or(Some(self.max_request_bytes), |told| told.0);
        let Some(max_request_bytes) = told.filter(|_| !http_body::Body::is_end_stream(body)) else {
            return Flow::Continue;
        };
        instances.push(Box::new(BufferFilter { max_request_bytes }));
        Flow::Wait
    }
}

impl HttpFilter for BufferFilter {
    fn wait_request<'a>(
        &'a mut self,
        head: &'a mut RequestHead,
        body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async {
            match gather(body, self.max_request_bytes).await {
                Ok(bytes) => {
                    head.headers.entry(CONTENT_LENGTH).or_insert(HeaderValue::from(bytes));
                    Flow::Continue
                }
                Err(reply) => Flow::Respond(reply),
            }
        })
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: Buffer = unpack(typed_config, cx.path)?;
    Ok(Arc::new(BufferFactory { max_request_bytes: limit(&config) }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let BufferPerRoute { r#override } = unpack(config, path)?;
    match r#override {
        Some(Override::Buffer(buffer)) => Ok(Arc::new(Told(Some(limit(&buffer))))),
        Some(Override::Disabled(_)) => Ok(Arc::new(Told(None))),
        None => Err(FieldError::new(format!("{path}.override"), "value is required")),
    }
}

fn limit(config: &Buffer) -> usize {
    config.max_request_bytes.map_or(0, |most| usize::try_from(most.value).unwrap_or(usize::MAX))
}
