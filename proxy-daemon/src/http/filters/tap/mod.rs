//! `envoy.filters.http.tap`: records streams, into files or for the client of the admin interface's `/tap`.

mod admin;
mod matcher;
mod output;
mod sink;
mod trace;

use std::{rc::Rc, sync::Arc};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::{
            common::matcher::v3::MatchPredicate,
            tap::v3::{
                OutputSink, TapConfig as ProtoConfig,
                output_sink::{Format, OutputSinkType},
            },
        },
        extensions::{common::tap::v3::common_extension_config::ConfigType, filters::http::tap::v3::Tap},
        r#type::v3::FractionalPercent,
    },
    google::protobuf::Any,
};
use prost::Message as _;

pub(crate) use admin::{attach, is_registered};
pub(crate) use sink::finish;
pub(in crate::http) use trace::Trace;

use self::{
    admin::Slot,
    matcher::Matcher,
    sink::{Sink, Target},
    trace::Tapped,
};
use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute,
    shared::{Kept, Shared},
};
use crate::{
    config::{FieldError, parse},
    http::{
        body::Body,
        stream::{RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::RuntimeFraction,
    stats::{Counter, Lease, Scope},
};

/// Bytes of a body that are kept where nothing else is said.
const DEFAULT_MAX_BUFFERED: usize = 1024;

/// `TapConfig`
#[derive(Debug)]
struct TapConfig {
    matcher: Matcher,
    sink: Sink,
    /// Bytes of a request's body that are kept; of each of its pieces, where they are streamed.
    max_buffered_rx: usize,
    /// Of a response's.
    max_buffered_tx: usize,
    streaming: bool,
    /// The share of the streams that is looked at; `None`: all are.
    enabled: Option<RuntimeFraction>,
    /// What traces tell of that.
    sample_rate: Option<FractionalPercent>,
}

/// What traces tell besides the messages.
#[derive(Debug, Clone, Copy)]
struct Recorded {
    headers_received_time: bool,
    downstream_connection: bool,
    upstream_connection: bool,
}

/// What is to be tapped.
#[derive(Debug)]
enum Source {
    Static(Shared<TapConfig>),
    /// What a client of the admin interface asks for, as long as there is one.
    Admin(Arc<Slot>),
}

#[derive(Debug)]
struct TapFactory {
    source: Source,
    recorded: Recorded,
    rq_tapped: Counter,
    rq_sampled_out: Counter,
    _lease: Lease,
}

struct TapFilter {
    config: Kept<TapConfig>,
    recorded: Recorded,
    rq_tapped: Counter,
    /// `None`: nothing has come yet.
    trace: Option<Rc<Trace>>,
}

impl HttpFilterFactory for TapFactory {
    fn stream(&self, _route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        let config = match &self.source {
            Source::Static(config) => config.keep(),
            Source::Admin(slot) => slot.current()?,
        };
        if config.enabled.as_ref().is_some_and(|share| !share.includes(fastrand::u64(..))) {
            self.rq_sampled_out.inc();
            return None;
        }
        Some(Box::new(TapFilter { config, recorded: self.recorded, rq_tapped: self.rq_tapped, trace: None }))
    }
}

impl TapFilter {
    /// The stream's trace, which is made with the first that comes of it.
    fn trace(&mut self, cx: &StreamCx) -> Rc<Trace> {
        let make = || {
            let downstream = (cx.connection.local, cx.connection.remote);
            let trace = Trace::new(self.config.clone(), self.recorded, self.rq_tapped, cx.random, downstream);
            cx.progress.taps.borrow_mut().push(Rc::clone(&trace));
            trace
        };
        Rc::clone(self.trace.get_or_insert_with(make))
    }
}

impl HttpFilter for TapFilter {
    fn request(&mut self, head: &mut RequestHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        let trace = self.trace(cx);
        trace.request(head);
        Tapped::wrap(body, &trace, false);
        Flow::Continue
    }

    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        let trace = self.trace(cx);
        trace.response(head);
        Tapped::wrap(body, &trace, true);
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: Tap = unpack(typed_config, cx.path)?;
    let path = format!("{}.common_config", cx.path);
    let source = match config.common_config.and_then(|config| config.config_type) {
        Some(ConfigType::StaticConfig(config)) => {
            let path = format!("{path}.static_config");
            let target = |sink: &OutputSinkType, path: &str| match sink {
                OutputSinkType::FilePerTap(sink) => files(&sink.path_prefix, path),
                _ => Err(FieldError::new(path, "admin output must be configured via admin")),
            };
            Source::Static(Shared::new(tap_config(&config, &path, target)?))
        }
        Some(ConfigType::AdminConfig(config)) => Source::Admin(Slot::register(&config.config_id)),
        None => return Err(FieldError::new(path, "needs admin_config or static_config")),
    };
    let scope = Scope::http(cx.stat_prefix).child("tap");
    Ok(Arc::new(TapFactory {
        source,
        recorded: Recorded {
            headers_received_time: config.record_headers_received_time,
            downstream_connection: config.record_downstream_connection,
            upstream_connection: config.record_upstream_connection,
        },
        rq_tapped: scope.counter("rq_tapped"),
        rq_sampled_out: scope.counter("rq_sampled_out"),
        _lease: scope.lease(),
    }))
}

fn files(prefix: &str, path: &str) -> Result<Target, FieldError> {
    Target::files(prefix).map_err(|error| FieldError::new(path, format!("there can be no thread for it: {error}")))
}

/// Reads a configuration, whose sink `target` knows.
fn tap_config(
    config: &ProtoConfig,
    path: &str,
    target: impl FnOnce(&OutputSinkType, &str) -> Result<Target, FieldError>,
) -> Result<TapConfig, FieldError> {
    let matcher = match (&config.r#match, old_match(config)) {
        (Some(predicate), _) => matcher::parse(predicate, &format!("{path}.match"))?,
        (None, Some(predicate)) => matcher::parse(&predicate, &format!("{path}.match_config"))?,
        (None, None) => return Err(FieldError::new(format!("{path}.match"), "neither match nor match_config is set")),
    };
    let path = format!("{path}.output_config");
    let output = config.output_config.as_ref().ok_or_else(|| FieldError::new(path.as_str(), "is needed"))?;
    let bytes = |limit: Option<u32>| limit.map_or(DEFAULT_MAX_BUFFERED, |limit| limit as usize);
    let path = format!("{path}.sinks[0]");
    let [OutputSink { format, output_sink_type: Some(kind) }] = &output.sinks[..] else {
        return Err(FieldError::new(path, "there must be one sink"));
    };
    let format = Format::try_from(*format).map_err(|_| FieldError::new(format!("{path}.format"), "is not known"))?;
    Ok(TapConfig {
        matcher,
        sink: Sink { format, target: target(kind, &path)? },
        max_buffered_rx: bytes(output.max_buffered_rx_bytes.map(|bytes| bytes.value)),
        max_buffered_tx: bytes(output.max_buffered_tx_bytes.map(|bytes| bytes.value)),
        streaming: output.streaming,
        enabled: config.tap_enabled.as_ref().map(parse::runtime_fraction),
        sample_rate: config.tap_enabled.as_ref().map(|share| share.default_value.unwrap_or_default()),
    })
}

/// `match_config`, which has the same fields under the same numbers.
#[expect(deprecated, reason = "Envoy still takes it")]
fn old_match(config: &ProtoConfig) -> Option<MatchPredicate> {
    MatchPredicate::decode(config.match_config.as_ref()?.encode_to_vec().as_slice()).ok()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
