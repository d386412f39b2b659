//! `envoy.filters.http.set_metadata`: tells dynamic metadata that is written in the configuration.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::set_metadata::v3::Config,
    google::protobuf::{Any, Struct},
};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute};
use crate::{
    config::FieldError,
    http::{
        body::Body,
        metadata::{self, read_from},
        stream::{RequestHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

#[derive(Debug)]
struct SetMetadataFactory {
    entries: Box<[Entry]>,
    overwrite_denied: Counter,
    _lease: Lease,
}

#[derive(Debug)]
struct Entry {
    namespace: Box<str>,
    allow_overwrite: bool,
    value: Struct,
}

impl HttpFilterFactory for SetMetadataFactory {
    fn request(
        &self,
        _head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        _instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if self.entries.is_empty() {
            return Flow::Continue;
        }
        cx.progress.with_metadata(|told| {
            for entry in &self.entries {
                if told.namespace(&entry.namespace).is_none() {
                    *told.namespace_mut(&entry.namespace) = entry.value.clone();
                } else if entry.allow_overwrite {
                    metadata::update(told.namespace_mut(&entry.namespace), &entry.value);
                } else {
                    self.overwrite_denied.inc();
                }
            }
        });
        Flow::Continue
    }
}

#[expect(deprecated, reason = "the fields that metadata replaced, which Envoy still takes")]
pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Config { metadata_namespace, value, metadata } = unpack(typed_config, cx.path)?;
    let old = value.map(|value| Entry { namespace: read_from(&metadata_namespace), allow_overwrite: true, value });
    let entries = metadata.into_iter().map(|entry| Entry {
        namespace: read_from(&entry.metadata_namespace),
        allow_overwrite: entry.allow_overwrite,
        value: entry.value.unwrap_or_default(),
    });
    let scope = Scope::http(cx.stat_prefix).child("set_metadata");
    Ok(Arc::new(SetMetadataFactory {
        entries: old.into_iter().chain(entries).collect(),
        overwrite_denied: scope.counter("overwrite_denied"),
        _lease: scope.lease(),
    }))
}
