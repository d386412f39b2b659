//! What one request carries on its way through filters and router.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};

use super::{
    MatchCx, RouteRef, at_end::AtEnd, codec::h1::CodecError, headers, metadata::Metadata, route_match::authority,
    stream_end::StreamEnd, strict_check::StrictCheck,
};
use crate::{
    access_log::{Headers, Record, ResponseFlags, Times},
    config::model::{AddedValue, HeaderAdd, HeaderMutations, ReplyFormat, WeightedOptions},
    listener::ConnectionInfo,
    runtime::{Worker, clock},
    stats::Counter,
    tls::TlsInfo,
    upstream::{Source, WorkerCluster, WorkerHost},
};

/// `%RESPONSE_CODE_DETAILS%` of a response that a host has sent.
pub(super) const VIA_UPSTREAM: &str = "via_upstream";

/// A response that comes before the response.
pub(super) type Interim = (StatusCode, HeaderMap);
/// So many of them wait for the client; an upstream that sends more at once has them passed over.
const MAX_INTERIM: usize = 16;

/// A request without its body.
pub type RequestHead = http::request::Parts;
/// A response without its body.
pub type ResponseHead = http::response::Parts;

/// An answer that does not come from an upstream.
#[derive(Debug)]
pub struct LocalReply {
    /// The status; a gRPC request gets 200 and the `grpc-status` that corresponds.
    pub status: StatusCode,
    /// Plain text; may be empty.
    pub body: Bytes,
    /// Why, for the access log.
    pub flags: ResponseFlags,
    /// `%RESPONSE_CODE_DETAILS%`
    pub details: Cow<'static, str>,
    /// Further headers.
    pub headers: Vec<(http::HeaderName, HeaderValue)>,
    /// What a gRPC client gets for the status; `None`: what corresponds to it.
    pub grpc_status: Option<u16>,
}

impl LocalReply {
    /// An answer with a body of plain text.
    pub fn new(
        status: StatusCode,
        body: impl Into<Bytes>,
        flags: ResponseFlags,
        details: impl Into<Cow<'static, str>>,
    ) -> LocalReply {
        LocalReply { status, body: body.into(), flags, details: details.into(), headers: Vec::new(), grpc_status: None }
    }
}

/// The host that a filter wants a request to go to, of its cluster's.
#[derive(Debug)]
pub struct OverrideHost {
    /// Its address, as Envoy writes it.
    pub address: Box<str>,
    /// The answer where there is no such host; `None`: another one is chosen, as it is where the host may not be used.
    pub strict: Option<StatusCode>,
}

/// What filters and router know and decide about a stream.
pub struct StreamCx {
    /// The worker that serves the stream.
    pub worker: Rc<Worker>,
    /// The downstream connection.
    pub connection: Rc<ConnectionInfo>,
    /// Client address after `x-forwarded-for` was looked at.
    pub remote: SocketAddr,
    /// The request is internal: its `x-envoy-*` headers are obeyed.
    pub internal: bool,
    /// The chosen route; `None` only where none matched.
    pub route: Option<RouteRef>,
    /// The cluster that the route chose, where it exists.
    pub cluster: Option<Rc<WorkerCluster>>,
    /// Set by a filter: the request goes here, through an ORIGINAL_DST cluster.
    pub override_dst: Option<SocketAddr>,
    /// Set with it: the cluster that the request goes to if nobody can be connected to there.
    pub unless_connected: Option<Rc<WorkerCluster>>,
    /// Where connections to hosts come from: of the connection, or set by a filter.
    pub source: Option<Source>,
    /// Set by a filter: the first attempt goes to this host.
    pub override_host: Option<OverrideHost>,
    /// The host of the last attempt: known when there is a response.
    pub upstream_host: Option<Rc<WorkerHost>>,
    /// The response was made here: `%RESPONSE_CODE_DETAILS%` says why.
    pub local_reply: Option<Cow<'static, str>>,
    /// Set by filters for the access log, whether the request is answered here or not.
    pub flags: ResponseFlags,
    /// `suppress_envoy_headers` of the stream's router.
    pub suppress_envoy_headers: bool,
    /// `respect_expected_rq_timeout` of the stream's router.
    pub(super) respects_expected_timeout: bool,
    /// `strict_check_headers` of the stream's router.
    pub(super) strict_checks: Option<Arc<[StrictCheck]>>,
    /// The stream's random number: routes and weighted clusters are chosen by it.
    pub random: u64,
    /// When the first byte of the request's head was seen, at the latest.
    pub started: Instant,
    /// What can be told about the request's body while it passes.
    pub progress: Rc<Progress>,
    /// How many headers a message may have.
    pub max_headers: MaxHeaders,
    /// What filters leave for each other. Empty, it costs nothing.
    pub shared: http::Extensions,
    /// The request was led here by `custom_response`, for its response to be in the place of another one.
    pub(super) custom_response: Option<super::filters::Led>,
    /// Set by a filter: the request is kept for the response's headers.
    pub keeps_request: bool,
    /// Set by a filter: it has changed what routes are chosen by, and one is to be chosen anew.
    pub reroute: bool,
    /// The request, kept where the response's headers are made of it.
    pub(super) request: RefCell<Option<Box<RequestHead>>>,
}

/// `max_headers_count` and `max_request_headers_kb`.
#[derive(Debug, Clone, Copy)]
pub struct MaxHeaders {
    /// How many.
    pub count: u32,
    /// Their size, in KiB.
    pub kilobytes: u32,
}

impl StreamCx {
    /// What the chosen weighted cluster asks for.
    pub(super) fn weighted_options(&self) -> Option<&WeightedOptions> {
        self.route.as_ref()?.weighted_options()
    }

    /// The header mutations that apply, in their order: the weighted cluster's, the route's, the virtual host's, the
    /// configuration's, or the other way round.
    pub(super) fn header_mutations(&self) -> impl Iterator<Item = &HeaderMutations> {
        let route = self.route.as_ref();
        let [own, host, config] = route.map(RouteRef::header_mutations).unwrap_or_default();
        let of_cluster = self.weighted_options().map(|options| &options.headers);
        let mut levels = [of_cluster, own, host, config];
        if route.is_some_and(RouteRef::most_specific_header_mutations_wins) {
            levels.reverse();
        }
        levels.into_iter().flatten()
    }

    /// The request, where a filter has set [`keeps_request`](Self::keeps_request).
    pub(super) fn kept_request(&self) -> std::cell::Ref<'_, Option<Box<RequestHead>>> {
        self.request.borrow()
    }

    /// Keeps the request where response headers are formatted.
    pub(super) fn keep_request(&self, head: &RequestHead) {
        let is_format = |add: &HeaderAdd| matches!(add.value, AddedValue::Format(_));
        if self.keeps_request || self.header_mutations().any(|mutations| mutations.response_add.iter().any(is_format)) {
            self.request.replace(Some(Box::new(head.clone())));
        }
    }

    /// Applies the response mutations of all levels; `end` knows where the response came from.
    pub(super) fn mutate_response(&self, response: &mut ResponseHead, end: &StreamEnd) {
        if self.header_mutations().all(HeaderMutations::is_empty) {
            return;
        }
        let status = response.status;
        let host = end.host.as_ref().map(|(_, host)| host.host.display());
        let response_flags = self.flags | end.flags;
        self.format_response(status, &mut response.headers, host, |headers, record| {
            let details = end.told_details().or(record.response_code_details);
            let record = Record { response_code_details: details, response_flags, ..*record };
            end.tell_upstream(&record, |record| {
                for mutations in self.header_mutations() {
                    headers::mutate_response(headers, mutations, record);
                }
            });
        });
    }

    /// Changes a request's headers by what formats can tell of the request as it is now.
    pub(super) fn format_request(&self, head: &mut RequestHead, change: impl FnOnce(&mut HeaderMap, &Record<'_>)) {
        self.format_counted(head, None, change);
    }

    /// As [`format_request`](Self::format_request), of a request that is counted under this virtual cluster.
    pub(super) fn format_counted(
        &self,
        head: &mut RequestHead,
        virtual_cluster: Option<&str>,
        change: impl FnOnce(&mut HeaderMap, &Record<'_>),
    ) {
        let (uri, host) = (head.uri.clone(), authority(head).to_owned());
        let route = self.route.as_ref().map(|route| route.name.as_str());
        let metadata = self.progress.metadata.borrow();
        let record = Record {
            virtual_cluster,
            metadata: metadata.as_deref(),
            method: Some(head.method.as_str()),
            path: uri.path_and_query().map(|path| path.as_str()),
            authority: Some(&host),
            scheme: Some(super::redirect::scheme(head)),
            protocol: Some(super::protocol_name(head.version)),
            route_name: route.filter(|name| !name.is_empty()),
            upstream_cluster: self.cluster.as_ref().map(|cluster| &*cluster.cluster.config.name),
            ..self.record()
        };
        change(&mut head.headers, &record);
    }

    /// What a format makes of the request as it is now; `None` where that cannot stand in a header. What is missing is `missing`.
    pub(super) fn format_value(
        &self,
        head: &mut RequestHead,
        format: &AddedValue,
        missing: &'static str,
    ) -> Option<HeaderValue> {
        let format = match format {
            AddedValue::Literal(value) => return Some(value.clone()),
            AddedValue::Format(format) => format,
        };
        let mut value = None;
        self.format_request(head, |headers, record| {
            value = format.value(&Record { missing, request_headers: Some(Headers::All(headers)), ..*record });
        });
        value
    }

    /// Changes a response's headers by what formats can tell of it, and of the request where that was kept.
    pub(super) fn format_response(
        &self,
        status: StatusCode,
        headers: &mut HeaderMap,
        host: Option<&str>,
        change: impl FnOnce(&mut HeaderMap, &Record<'_>),
    ) {
        self.tell_response(status, host, |record| change(headers, record));
    }

    /// What formats can tell of a response, and of the request where that was kept.
    pub(super) fn tell_response(&self, status: StatusCode, host: Option<&str>, tell: impl FnOnce(&Record<'_>)) {
        let request = self.request.borrow();
        let request = request.as_deref();
        let route = self.route.as_ref().map(|route| route.name.as_str());
        let metadata = self.progress.metadata.borrow();
        let record = Record {
            metadata: metadata.as_deref(),
            method: request.map(|request| request.method.as_str()),
            path: request.and_then(|request| request.uri.path_and_query()).map(|path| path.as_str()),
            authority: request.map(authority),
            scheme: request.map(super::redirect::scheme),
            protocol: request.map(|request| super::protocol_name(request.version)),
            request_headers: request.map(|request| Headers::All(&request.headers)),
            response_code: status.as_u16(),
            response_code_details: Some(self.local_reply.as_deref().unwrap_or(VIA_UPSTREAM)),
            route_name: route.filter(|name| !name.is_empty()),
            upstream_cluster: self.cluster.as_ref().map(|cluster| &*cluster.cluster.config.name),
            upstream_host: host.or(self.upstream_host.as_ref().map(|host| host.host.display())),
            upstream_host_name: self.upstream_host.as_ref().map(|host| host.host.name()),
            ..self.record()
        };
        tell(&record);
    }

    /// Makes the body of a direct response.
    pub(super) fn direct_response(
        &self,
        head: &RequestHead,
        status: StatusCode,
        reply: &mut LocalReply,
        format: &ReplyFormat,
    ) {
        let kept = self.request.replace(Some(Box::new(head.clone())));
        let mut body = Vec::new();
        self.tell_response(status, None, |record| {
            // There is no response yet, as in Envoy.
            let (response_code, response_code_details) = (0, None);
            let (missing, local_reply_body) = ("-", &*reply.body);
            let record = Record { missing, local_reply_body, response_code, response_code_details, ..*record };
            body = format.format.write(&record);
        });
        self.request.replace(kept);
        reply.body = body.into();
        reply.headers.push((CONTENT_TYPE, format.content_type.clone()));
    }

    /// What formats of headers can tell of the stream's connection.
    pub(super) fn record(&self) -> Record<'_> {
        Record {
            missing: "",
            start: clock::wall(self.started),
            duration: clock::since(self.started),
            attempts: self.progress.attempts.get(),
            grpc_messages: self.progress.grpc_messages.get(),
            upstream_protocol: self.progress.upstream_protocol.get(),
            times: self.progress.times(self.started),
            route_metadata: self.route.as_ref().and_then(|route| route.metadata.as_deref()),
            bytes_received: self.progress.received.get(),
            downstream_remote_address: Some(self.remote),
            ..self.connection.record()
        }
    }

    /// What its route is chosen by.
    pub(super) fn match_cx(&self) -> MatchCx<'_> {
        let tls = self.connection.tls();
        MatchCx {
            random: self.random,
            certificate_presented: tls.is_some_and(TlsInfo::has_certificate),
            certificate_validated: tls.is_some_and(TlsInfo::is_validated),
            metadata: Some(&self.progress.metadata),
        }
    }
}

/// What the last attempt's host was told of the host that the request was for.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostRewritten {
    /// In `x-forwarded-host`.
    pub(super) forwarded: bool,
    /// Not in `x-envoy-original-host`.
    pub(super) suppress: bool,
}

/// What a cluster counts of requests' bodies that wait for hosts.
#[derive(Debug, Clone, Copy)]
pub(super) struct UploadFlow {
    pub(super) backed_up: Counter,
    pub(super) drained: Counter,
}

/// How far the two bodies have come.
#[derive(Debug)]
pub struct Progress {
    /// Body bytes from the client.
    pub received: Cell<u64>,
    /// Body bytes to the client.
    pub sent: Cell<u64>,
    /// Filters change the response's body: what an upstream sends is not what the client gets.
    pub sent_otherwise: Cell<bool>,
    /// What filters have told; `None`: nothing yet.
    pub metadata: RefCell<Option<Box<Metadata>>>,
    /// The response's trailers, where filters have changed them.
    pub trailers: RefCell<Option<Box<HeaderMap>>>,
    /// Filters that record the stream.
    pub(super) taps: RefCell<Vec<Rc<super::filters::tap::Trace>>>,
    /// What is done when it is over.
    pub at_end: AtEnd,
    /// How long a client may take for what is left of the answer, where the route says; `Some(None)`: for ever.
    pub flush: Cell<Option<Option<Duration>>>,
    /// The client has reset the stream; its connection goes on.
    pub reset_by_client: Cell<bool>,
    /// It is a health check: nobody's request.
    pub health_check: Cell<bool>,
    /// When the request was complete.
    pub request_complete: Cell<Option<Instant>>,
    /// From when on the answer is waited for of a request that has no end before.
    pub(super) awaited: Cell<Option<Instant>>,
    /// How many messages of gRPC there were in each direction, where `grpc_stats` tells.
    pub grpc_messages: Cell<Option<(u64, u64)>>,
    /// Nobody could be connected to in a tunnel, and the request went where it would have gone.
    pub left_tunnel: Cell<bool>,
    /// How many attempts were made.
    pub attempts: Cell<u32>,
    /// The last attempt's host was asked by its own name.
    pub(super) host_rewritten: Cell<Option<HostRewritten>>,
    /// The route's cluster, where the last one's host is of another: an aggregate.
    pub aggregate: RefCell<Option<Rc<WorkerCluster>>>,
    /// The protocol on the last one's connection.
    pub upstream_protocol: Cell<Option<&'static str>>,
    /// Where it is counted that its host takes no more of the request's body.
    pub(super) upload: Cell<Option<UploadFlow>>,
    /// When the last attempt had its connection.
    pub sent_first: Cell<Option<Instant>>,
    /// When the upstream's answer began.
    pub answered: Cell<Option<Instant>>,
    /// When anything last passed in either direction.
    pub last_activity: Cell<Instant>,
    /// When the upstream last sent something, from its first answer on.
    pub last_response: Cell<Instant>,
    /// The request turned out not to be HTTP in the middle of its body.
    pub malformed: Cell<Option<CodecError>>,
    /// A filter refuses the request in the middle of its body, which breaks off: what the client is told.
    pub instead: RefCell<Option<Box<LocalReply>>>,
    /// A filter answers the request in the middle of its body.
    answer: RefCell<Option<Box<LocalReply>>>,
    /// A filter may do so, also when the request is complete.
    pub held: Cell<bool>,
    /// `proxy_100_continue`: the upstream's interim responses are the client's; `None`: they are not.
    interim: RefCell<Option<Vec<Interim>>>,
    /// Woken when the request is complete, malformed, or answered.
    pub waker: RefCell<Option<std::task::Waker>>,
}

impl Progress {
    /// For a request that began at `started`.
    pub fn new(started: Instant, complete: bool) -> Rc<Progress> {
        Rc::new(Progress {
            received: Cell::new(0),
            sent: Cell::new(0),
            sent_otherwise: Cell::new(false),
            metadata: RefCell::new(None),
            trailers: RefCell::new(None),
            taps: RefCell::new(Vec::new()),
            at_end: AtEnd::default(),
            flush: Cell::new(None),
            reset_by_client: Cell::new(false),
            health_check: Cell::new(false),
            request_complete: Cell::new(complete.then_some(started)),
            awaited: Cell::default(),
            grpc_messages: Cell::new(None),
            left_tunnel: Cell::new(false),
            attempts: Cell::new(0),
            host_rewritten: Cell::new(None),
            aggregate: RefCell::new(None),
            upstream_protocol: Cell::new(None),
            upload: Cell::new(None),
            sent_first: Cell::new(None),
            answered: Cell::new(None),
            last_activity: Cell::new(started),
            last_response: Cell::new(started),
            malformed: Cell::new(None),
            instead: RefCell::new(None),
            answer: RefCell::new(None),
            held: Cell::new(false),
            interim: RefCell::new(None),
            waker: RefCell::new(None),
        })
    }

    /// What is known of the times of a stream that began at `started`.
    pub fn times(&self, started: Instant) -> Times {
        Times {
            began: Some(started),
            request_end: self.request_complete.get(),
            upstream_sent_first: self.sent_first.get(),
            upstream_answered: self.answered.get(),
            ..Times::default()
        }
    }

    /// The client is to have the interim responses of the upstream.
    pub(super) fn want_interim(&self) {
        self.interim.replace(Some(Vec::new()));
    }

    /// The upstream has sent an interim response.
    pub(super) fn interim(&self, status: StatusCode, mut headers: HeaderMap) {
        // As in Envoy: what is not known might be meant for us.
        if !matches!(status.as_u16(), 100 | 102..=104) {
            return;
        }
        if let Some(interim) = self.interim.borrow_mut().as_mut().filter(|interim| interim.len() < MAX_INTERIM) {
            headers::strip_hop_by_hop(&mut headers);
            interim.push((status, headers));
        }
    }

    /// The interim responses that the client has not had yet.
    pub(super) fn take_interim(&self) -> Vec<Interim> {
        self.interim.borrow_mut().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Lets a filter tell something.
    pub fn with_metadata(&self, tell: impl FnOnce(&mut Metadata)) {
        tell(self.metadata.borrow_mut().get_or_insert_default());
    }

    /// The request will never be whole.
    pub fn refuse(&self, error: CodecError) {
        self.malformed.set(Some(error));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Answers the request, whose body a filter holds: what waits for the upstream waits no longer.
    pub fn answer(&self, reply: LocalReply) {
        self.answer.replace(Some(Box::new(reply)));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Whether a filter has answered.
    pub(super) fn is_answered(&self) -> bool {
        self.answer.borrow().is_some()
    }

    /// The answer of a filter.
    pub(super) fn take_answer(&self) -> Option<LocalReply> {
        self.answer.take().map(|reply| *reply)
    }

    /// From when on the answer is waited for.
    pub(super) fn awaited_since(&self) -> Option<Instant> {
        self.request_complete.get().or(self.awaited.get())
    }

    /// The request has passed whole.
    pub fn complete(&self) {
        let now = clock::now();
        self.last_activity.set(now);
        if self.request_complete.replace(Some(now)).is_none()
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }
}
