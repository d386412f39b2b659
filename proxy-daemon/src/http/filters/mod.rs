//! HTTP filters, one file each, found by their Envoy name.
//!
//! A filter is added by writing its file and one line in [`REGISTRY`]: docs/extending.md shows how.

mod admission_control;
mod bandwidth_limit;
mod buffer;
mod compression;
mod compressor;
mod cors;
mod csrf;
mod custom_response;
mod decompressor;
mod discovered;
mod dynamic_forward_proxy;
mod ext_authz;
mod ext_proc;
mod fault;
mod grpc_counts;
mod grpc_http1_bridge;
mod grpc_stats;
mod grpc_web;
mod header_mutation;
mod header_to_metadata;
mod health_check;
mod jwt_authn;
mod local_ratelimit;
mod match_delegate;
mod on_demand;
mod original_src;
mod r#override;
mod ratelimit;
mod rbac;
mod recent;
mod registry;
mod router;
mod set_filter_state;
mod set_metadata;
mod shared;
mod stateful_session;
pub(crate) mod tap;
mod trailers;

use std::{fmt::Debug, pin::Pin, sync::Arc};

use envoy_types::pb::google::protobuf::Any;

pub(super) use compression::fuzz as fuzz_compression;
pub(crate) use cors::of_route as cors_of_route;
pub(super) use custom_response::{Led, RedirectPolicy};
pub use discovered::{DiscoveredFilter, Factory, FilterSource};
pub(super) use grpc_counts::fuzz as fuzz_grpc_messages;
pub(super) use grpc_web::fuzz as fuzz_grpc_web;
pub use header_mutation::EarlyMutations;
pub(super) use jwt_authn::fuzz as fuzz_token;
pub use on_demand::ClustersOnDemand;
pub use r#override::{Explained, OffloadedTable, OverrideState, counted_contexts, explain};
pub use registry::{REGISTRY, Registered, is_nobodys, parse, parse_per_route};
pub use router::RouterFilter;
pub(super) use stateful_session::fuzz as fuzz_session;

use super::{
    RouteRef,
    body::Body,
    stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    strict_check::StrictCheck,
};
use crate::config::{
    FieldError,
    model::{ConfigSource, OriginalSrc, PerFilterConfig, SecretRef},
};

/// What a filter says after it has seen a request's or response's head.
pub enum Flow {
    /// The next filter's turn.
    Continue,
    /// Answers the request here; filters that come later never see it, but all of them see the answer.
    Respond(LocalReply),
    /// The same in the place of a response, also of one that was made here: no further filter sees it.
    Replace(LocalReply),
    /// In the place of a response, also of one that was made here: the request is led to another route as one that begins anew. Where
    /// there is no such route the response goes on.
    Redirect(Redirect),
    /// The filter has to wait before it can say: it is asked to by [`HttpFilter::wait_request`] or
    /// [`HttpFilter::wait_response`].
    Wait,
    /// The request waits until the routes that it has none of have been asked for, where that can be; then it meets all
    /// filters anew.
    NeedsRoute,
    /// The same for the cluster that its route names.
    NeedsCluster(Arc<ClustersOnDemand>),
}

/// Where a request is led to, and by what.
pub struct Redirect {
    /// The request, with an absolute URI.
    pub(super) head: Box<RequestHead>,
    /// What wants that.
    pub(super) led: Led,
}

/// What a filter waits for.
pub type Waiting<'a> = Pin<Box<dyn Future<Output = Flow> + 'a>>;

/// One instance a stream, which lives as long as the stream.
///
/// Synchronous, so that a filter that need not wait costs a call and not a future: only what returns [`Flow::Wait`] is asked
/// for one. A filter that looks at a body or changes it puts its own around it ([`Body::wrap`]); others leave it alone.
pub trait HttpFilter {
    /// The request, on its way up. The route is chosen already: `cx.route`.
    fn request(&mut self, _head: &mut RequestHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        Flow::Continue
    }

    /// Called when [`request`](Self::request) said [`Flow::Wait`]. The stream's time limits hold meanwhile; a client that
    /// gives up drops the future.
    fn wait_request<'a>(
        &'a mut self,
        _head: &'a mut RequestHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(std::future::ready(Flow::Continue))
    }

    /// The response, on its way down, in the reverse order of the filters. It may be one that was made here, whose body is in
    /// memory then; it may come without that the request did, where an earlier filter answered it.
    fn response(&mut self, _head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        Flow::Continue
    }

    /// Called when [`response`](Self::response) said [`Flow::Wait`]. [`Flow::Respond`] puts an answer that no filter sees in the
    /// response's place, also where that was made here.
    fn wait_response<'a>(
        &'a mut self,
        _head: &'a mut ResponseHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(std::future::ready(Flow::Continue))
    }
}

/// A configured filter: makes an instance for each stream, which may outlive it: ECDS replaces filters while they serve.
pub trait HttpFilterFactory: Debug + Send + Sync {
    /// `None` where this stream has no need of the filter: so it is for all where nothing else is said. `route` is what the stream's
    /// route tells the filter.
    fn stream(&self, _route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        None
    }

    /// The request, on its way up. A filter that knows all it has to say at once and has no interest in the response
    /// overrides this, and has no instances: nothing is allocated for it, and nothing counted.
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let Some(mut filter) = self.stream(route) else { return Flow::Continue };
        let flow = filter.request(head, body, cx);
        instances.push(filter);
        flow
    }

    /// Whether this is the router, which ends a filter chain.
    fn is_terminal(&self) -> bool {
        false
    }

    /// Whether the filter looks at the offloaded services that discovery lists, which are then subscribed to.
    fn needs_offloaded_services(&self) -> bool {
        false
    }

    /// From where the filter has connections to hosts come, if it does that.
    fn original_src(&self) -> Option<OriginalSrc> {
        None
    }

    /// The generic secret that the filter needs.
    fn secret(&self) -> Option<&SecretRef> {
        None
    }

    /// Where the filter has resources asked for when requests need them, and of which type.
    fn source(&self) -> Option<(&ConfigSource, &'static str)> {
        None
    }

    /// `suppress_envoy_headers` of the router.
    fn suppresses_envoy_headers(&self) -> bool {
        false
    }

    /// `respect_expected_rq_timeout` of the router.
    fn respects_expected_timeout(&self) -> bool {
        false
    }

    /// `strict_check_headers` of the router.
    fn strict_checks(&self) -> Option<&Arc<[StrictCheck]>> {
        None
    }
}

/// What a filter's parser may use.
pub struct FilterCx<'a> {
    /// The path of `typed_config`, for errors.
    pub path: &'a str,
    /// The connection manager's `stat_prefix`, for stats names.
    pub stat_prefix: &'a str,
}

/// Reads a filter's configuration.
pub type Parse = fn(&Any, &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError>;

/// What a route tells a filter: of a type that the filter knows.
pub type PerRouteConfig = Arc<dyn std::any::Any + Send + Sync>;

/// Reads what a route tells a filter; the second argument is the path of the message, for errors.
pub type ParsePerRoute = fn(&Any, &str) -> Result<PerRouteConfig, FieldError>;

/// What the configuration of a stream's route, its virtual host and their route configuration tells one filter.
#[derive(Debug, Clone, Copy, Default)]
pub struct PerRoute<'a>(&'a [Arc<PerFilterConfig>]);

impl<'a> PerRoute<'a> {
    /// For the filter at this place of its connection manager's list.
    pub(super) fn new(route: Option<&'a RouteRef>, position: usize) -> PerRoute<'a> {
        PerRoute(route.map(|route| route.per_filter(position)).unwrap_or_default())
    }

    /// Whether the filter takes part. The most specific word counts; without one `by_default`.
    pub fn is_enabled(&self, by_default: bool) -> bool {
        self.0.last().map_or(by_default, |config| !config.disabled)
    }

    /// What the most specific level says.
    pub fn most_specific<T: 'static>(&self) -> Option<&'a T> {
        self.all().next_back()
    }

    /// What all levels say, the least specific first.
    pub fn all<T: 'static>(&self) -> impl DoubleEndedIterator<Item = &'a T> + use<'a, T> {
        self.0.iter().filter_map(|config| config.config.as_ref()?.downcast_ref())
    }
}
