//! `envoy.filters.http.grpc_stats`: counts gRPC calls and their messages, by cluster and method.

use std::{
    collections::{HashMap, HashSet},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::grpc_stats::v3::{FilterConfig, filter_config::PerMethodStatSpecifier},
    google::protobuf::Any,
};
use http::StatusCode;
use http_body::{Body as _, Frame, SizeHint};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute,
    grpc_counts::{Call, Messages, service_and_method},
};
use crate::{
    config::FieldError,
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::{is_grpc, names::GRPC_STATUS},
        stream::{Progress, RequestHead, ResponseHead, StreamCx},
    },
    stats::Counter,
};

/// Which methods have counters of their own.
#[derive(Debug)]
enum Methods {
    /// By service.
    Listed(HashMap<Box<str>, HashSet<Box<str>>>),
    All {
        replace_dots: bool,
    },
}

#[derive(Debug)]
struct GrpcStatsFactory {
    methods: Methods,
    /// `emit_filter_state`: access logs are told how many messages there were.
    emits: bool,
    /// `enable_upstream_stats`: it is recorded how long hosts take.
    times: bool,
}

/// A gRPC call.
struct GrpcStatsFilter {
    /// Where it is counted; `None`: it is only told.
    call: Option<Rc<Call>>,
    told: Option<Rc<Progress>>,
    /// Where it is recorded how long the host takes.
    timed: Option<Rc<Progress>>,
}

impl HttpFilterFactory for GrpcStatsFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if !is_grpc(&head.headers) {
            return Flow::Continue;
        }
        let own = |name: &str, method: &str| Call::new(cx, "grpc", Some((name, method)));
        let call = service_and_method(head).and_then(|(service, method)| match &self.methods {
            Methods::All { replace_dots: true } => own(&service.replace('.', "_"), method),
            Methods::All { replace_dots: false } => own(service, method),
            Methods::Listed(listed) => {
                let is_listed = listed.get(service).is_some_and(|methods| methods.contains(method));
                Call::new(cx, "grpc", is_listed.then_some((service, method)))
            }
        });
        let told = self.emits.then(|| Rc::clone(&cx.progress));
        let timed = self.times.then(|| Rc::clone(&cx.progress));
        let filter = GrpcStatsFilter { call: call.map(Rc::new), told, timed };
        if filter.call.is_some() || filter.told.is_some() {
            filter.count(body, Direction::Request);
            instances.push(Box::new(filter));
        }
        Flow::Continue
    }
}

impl HttpFilter for GrpcStatsFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        if let Some(call) = &self.call {
            call.charge(head.headers.get(GRPC_STATUS));
            if let Some(progress) = self.timed.as_ref().filter(|_| body.is_end_stream()) {
                call.record_time(progress);
            }
        }
        if head.status == StatusCode::OK && is_grpc(&head.headers) {
            self.count(body, Direction::Response);
        }
        Flow::Continue
    }
}

impl GrpcStatsFilter {
    /// Counts the messages of this body.
    fn count(&self, body: &mut Body, direction: Direction) {
        if !body.is_end_stream() {
            let (call, told, timed) = (self.call.clone(), self.told.clone(), self.timed.clone());
            body.wrap(|body| Counting {
                body,
                messages: Messages::default(),
                call,
                told,
                timed,
                direction,
                counter: None,
            });
        }
    }
}

/// Which way a body goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Request,
    Response,
}

/// A body whose messages are counted.
struct Counting {
    body: Body,
    messages: Messages,
    call: Option<Rc<Call>>,
    told: Option<Rc<Progress>>,
    timed: Option<Rc<Progress>>,
    direction: Direction,
    /// Found with the first message: without any there is none.
    counter: Option<Counter>,
}

impl Counting {
    /// So many messages have begun.
    fn begun(&mut self, begun: u64) {
        if let Some(call) = &self.call {
            let what = match self.direction {
                Direction::Request => "request_message_count",
                Direction::Response => "response_message_count",
            };
            self.counter.get_or_insert_with(|| call.counter(what)).add(begun);
        }
        if let Some(told) = &self.told {
            let (requests, responses) = told.grpc_messages.get().unwrap_or_default();
            told.grpc_messages.set(Some(match self.direction {
                Direction::Request => (requests + begun, responses),
                Direction::Response => (requests, responses + begun),
            }));
        }
    }
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
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            let begun = self.messages.begun(data);
            if begun > 0 {
                self.begun(begun);
            }
        } else if let Some(trailers) = frame.as_ref().and_then(Frame::trailers_ref)
            && self.direction == Direction::Response
            && let Some(call) = &self.call
        {
            // They tell how the call ended.
            call.charge(trailers.get(GRPC_STATUS));
            self.timed.as_ref().inspect(|progress| call.record_time(progress));
        }
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let FilterConfig {
        per_method_stat_specifier,
        replace_dots_in_grpc_service_name,
        emit_filter_state,
        enable_upstream_stats,
    } = unpack(typed_config, cx.path)?;
    let methods = match per_method_stat_specifier {
        Some(PerMethodStatSpecifier::StatsForAllMethods(all)) if all.value => {
            Methods::All { replace_dots: replace_dots_in_grpc_service_name }
        }
        Some(PerMethodStatSpecifier::IndividualMethodStatsAllowlist(list)) => {
            let mut listed: HashMap<_, HashSet<_>> = HashMap::new();
            for service in list.services {
                let methods = service.method_names.into_iter().map(Box::from);
                listed.entry(service.name.into()).or_default().extend(methods);
            }
            Methods::Listed(listed)
        }
        Some(PerMethodStatSpecifier::StatsForAllMethods(_)) | None => Methods::Listed(HashMap::new()),
    };
    Ok(Arc::new(GrpcStatsFactory { methods, emits: emit_filter_state, times: enable_upstream_stats }))
}
