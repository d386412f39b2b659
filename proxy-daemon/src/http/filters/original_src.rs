//! `envoy.filters.http.original_src`: connections to hosts come from the client's address.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::original_src::v3::OriginalSrc as ProtoSrc, google::protobuf::Any,
};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute};
use crate::{
    config::{FieldError, model::OriginalSrc},
    http::{
        body::Body,
        stream::{RequestHead, StreamCx},
    },
    upstream::Source,
};

#[derive(Debug)]
struct OriginalSrcFactory(OriginalSrc);

impl HttpFilterFactory for OriginalSrcFactory {
    fn request(
        &self,
        _head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        _instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        // What `x-forwarded-for` says of it counts, where that is trusted.
        cx.source = Some(Source::new(self.0, cx.remote.ip()));
        Flow::Continue
    }

    fn original_src(&self) -> Option<OriginalSrc> {
        Some(self.0)
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let ProtoSrc { mark } = unpack(typed_config, cx.path)?;
    Ok(Arc::new(OriginalSrcFactory(OriginalSrc { mark })))
}
