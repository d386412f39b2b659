//! `envoy.filters.http.grpc_stats`: counts gRPC calls and their messages, by cluster and method.

use std::{
    collections::HashSet,
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
        body::{Body, BodyError},
        headers::{is_grpc, names::GRPC_STATUS},
        stream::{RequestHead, ResponseHead, StreamCx},
    },
    stats::Counter,
};

/// Which methods have counters of their own.
#[derive(Debug)]
enum Methods {
    Listed(HashSet<(String, String)>),
    All { replace_dots: bool },
}

#[derive(Debug)]
struct GrpcStatsFactory(Methods);

/// A gRPC call.
struct GrpcStatsFilter(Rc<Call>);

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
        let Some((service, method)) = service_and_method(head) else { return Flow::Continue };
        let call = match &self.0 {
            Methods::All { replace_dots: true } => Call::new(cx, "grpc", Some((&service.replace('.', "_"), method))),
            Methods::All { replace_dots: false } => Call::new(cx, "grpc", Some((service, method))),
            Methods::Listed(listed) => {
                let is_listed = listed.contains(&(service.to_owned(), method.to_owned()));
                Call::new(cx, "grpc", is_listed.then_some((service, method)))
            }
        };
        if let Some(call) = call.map(Rc::new) {
            count(body, &call, "request_message_count", false);
            instances.push(Box::new(GrpcStatsFilter(call)));
        }
        Flow::Continue
    }
}

impl HttpFilter for GrpcStatsFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        self.0.charge(head.headers.get(GRPC_STATUS));
        if head.status == StatusCode::OK && is_grpc(&head.headers) {
            count(body, &self.0, "response_message_count", true);
        }
        Flow::Continue
    }
}

/// Counts the messages of this body.
fn count(body: &mut Body, call: &Rc<Call>, what: &'static str, ends_call: bool) {
    if !body.is_end_stream() {
        let call = Rc::clone(call);
        body.wrap(|body| Counting { body, messages: Messages::default(), call, what, counter: None, ends_call });
    }
}

/// A body whose messages are counted.
struct Counting {
    body: Body,
    messages: Messages,
    call: Rc<Call>,
    what: &'static str,
    /// Found with the first message: without any there is none.
    counter: Option<Counter>,
    /// Its trailers tell how the call ended.
    ends_call: bool,
}

impl http_body::Body for Counting {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()?;
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            let begun = self.messages.begun(data);
            if begun > 0 {
                let counter = self.counter.unwrap_or_else(|| self.call.counter(self.what));
                counter.add(begun);
                self.counter = Some(counter);
            }
        } else if let Some(trailers) = frame.as_ref().and_then(Frame::trailers_ref)
            && self.ends_call
        {
            self.call.charge(trailers.get(GRPC_STATUS));
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
    // emit_filter_state and enable_upstream_stats are refused by the table of honoured fields.
    let FilterConfig { per_method_stat_specifier, replace_dots_in_grpc_service_name, .. } =
        unpack(typed_config, cx.path)?;
    let methods = match per_method_stat_specifier {
        Some(PerMethodStatSpecifier::StatsForAllMethods(all)) if all.value => {
            Methods::All { replace_dots: replace_dots_in_grpc_service_name }
        }
        Some(PerMethodStatSpecifier::IndividualMethodStatsAllowlist(list)) => {
            let of_service = list.services.into_iter().flat_map(|service| {
                let name = service.name;
                service.method_names.into_iter().map(move |method| (name.clone(), method))
            });
            Methods::Listed(of_service.collect())
        }
        Some(PerMethodStatSpecifier::StatsForAllMethods(_)) | None => Methods::Listed(HashSet::new()),
    };
    Ok(Arc::new(GrpcStatsFactory(methods)))
}
