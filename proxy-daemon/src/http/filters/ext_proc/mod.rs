//! `envoy.filters.http.ext_proc`: shows requests and responses to a service, by a stream of gRPC for each request, and lets it change
//! or answer them.
//!
//! **Cost.** A task and a stream of the cluster's for each request that is shown, and a wait for each part of it. What is shown is
//! copied. Of a body one piece at a time is with the service.
//!
//! **Limits.** A message of the service has at most 4 MiB (or `max_receive_message_length`). Of a body as much as
//! `per_connection_buffer_limit_bytes`, and a piece more, is in memory. Headers are changed up to `max_headers_count` and
//! `max_request_headers_kb`. A service that only watches (`observability_mode`) and falls behind by more than the buffer holds the
//! body up.

mod attributes;
mod body;
mod config;
mod duplex;
mod messages;
mod mode;
mod process;
pub(super) mod rules;
mod session;
mod told;

use std::{cell::RefCell, collections::VecDeque, rc::Rc};

use envoy_types::pb::envoy::{
    extensions::filters::http::ext_proc::v3::external_processor::RouteCacheAction,
    service::ext_proc::v3::CommonResponse,
};
use http::{Version, header::CONTENT_LENGTH};

pub(super) use config::parse;
pub(super) use told::parse_per_route;

use self::{
    body::{Processed, Watched},
    config::Settings,
    duplex::Duplex,
    mode::{BodyMode, Side},
    process::Passage,
    rules::{Limits, Target},
    session::{Await, Session},
    told::Merged,
};
use super::{
    Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting,
    shared::{Kept, Shared},
};
use crate::http::{
    body::Body,
    codec::h1::Upgrade,
    stream::{RequestHead, ResponseHead, StreamCx},
};

#[derive(Debug)]
struct ExtProcFactory(Shared<Settings>);

impl Settings {
    /// Whether a reply asks for another route, and may.
    fn clears_route_cache(&self, common: &CommonResponse) -> bool {
        let asks = common.clear_route_cache;
        if common.header_mutation.is_none() {
            if asks {
                self.stats.clear_route_cache_ignored.inc();
            }
            return false;
        }
        match self.route_cache {
            RouteCacheAction::Default => asks,
            RouteCacheAction::Clear => true,
            RouteCacheAction::Retain => {
                if asks {
                    self.stats.clear_route_cache_disabled.inc();
                }
                false
            }
        }
    }
}

/// A stream that is shown.
struct ExtProcFilter {
    settings: Kept<Settings>,
    /// Until the session begins.
    merged: RefCell<Option<Merged>>,
    session: Option<Rc<Session>>,
    /// What follows an upgrade is no body.
    upgrade: bool,
}

impl HttpFilterFactory for ExtProcFactory {
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        let merged = Merged::new(&self.0, route)?;
        let settings = self.0.keep();
        Some(Box::new(ExtProcFilter { settings, merged: RefCell::new(Some(merged)), session: None, upgrade: false }))
    }
}

impl ExtProcFilter {
    /// The session, which begins with the first look at it.
    fn session(&mut self, cx: &StreamCx) -> Option<Rc<Session>> {
        if let Some(merged) = self.merged.take() {
            let mut prepared = merged.service.prepare("/envoy.service.ext_proc.v3.ExternalProcessor/Process", cx);
            for (name, value) in &merged.metadata {
                prepared.headers().insert(name, value.clone());
            }
            let limits =
                Limits { count: cx.max_headers.count as usize, bytes: cx.max_headers.kilobytes as usize * 1024 };
            let buffer_limit = cx.connection.buffer_limit as usize;
            let progress = Rc::clone(&cx.progress);
            let settings = self.settings.clone();
            self.session = Some(Session::new(settings, merged, Some(prepared), progress, limits, buffer_limit));
        }
        self.session.clone()
    }

    /// Has the rest of a message pass the processor, whose headers it does not wait for.
    fn wrap(&self, session: &Rc<Session>, side: Side, body: &mut Body, separate_end: bool) {
        let shown = session.mode.get().of(side);
        if self.upgrade || matches!(body, Body::Empty) || shown.body == BodyMode::None && !shown.trailers {
            return;
        }
        if side == Side::Request {
            session.progress.held.set(true);
        }
        let source = std::mem::take(body);
        *body = Body::Wrapped(if self.settings.observability {
            Box::new(Watched::new(session, side, source, separate_end))
        } else if shown.body == BodyMode::Duplex {
            Box::new(Duplex::new(session, side, source, separate_end))
        } else {
            Box::new(Processed::new(session, side, source, VecDeque::new(), None, separate_end))
        });
    }
}

impl HttpFilter for ExtProcFilter {
    fn request(&mut self, head: &mut RequestHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        let Some(session) = self.session(cx) else { return Flow::Continue };
        self.upgrade = head.extensions.get::<Upgrade>().is_some();
        let shown = session.mode.get().of(Side::Request);
        let ended = http_body::Body::is_end_stream(body);
        if ended {
            session.has_no_body(Side::Request);
        }
        let of_request = &self.settings.request_attributes;
        if !of_request.is_empty() {
            session.tell_attributes(Side::Request, of_request.of_request(head, cx));
        }
        // What the request has to do with them is known now.
        if !self.settings.response_attributes.is_empty() {
            session.tell_attributes(Side::Response, self.settings.response_attributes.of_request(head, cx));
        }
        let observability = self.settings.observability;
        if shown.headers {
            let request = messages::request(head, ended, &self.settings.forward);
            session.send(Side::Request, Some(Await::Headers).filter(|_| !observability), request);
        }
        if !observability && shown.hides_length() && !self.settings.allow_content_length && !self.upgrade {
            head.headers.remove(CONTENT_LENGTH);
        }
        if shown.headers && !observability {
            return Flow::Wait;
        }
        self.wrap(&session, Side::Request, body, head.version != Version::HTTP_2);
        Flow::Continue
    }

    fn wait_request<'a>(
        &'a mut self,
        head: &'a mut RequestHead,
        body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let Some(session) = self.session.clone() else { return Flow::Continue };
            let separate_end = head.version != Version::HTTP_2;
            let passage = Passage { session: &session, side: Side::Request, separate_end };
            match passage.pass(Target::Request(head), body).await {
                Ok(passed) => {
                    cx.reroute |= passed.clear_route_cache;
                    Flow::Continue
                }
                Err(reply) => Flow::Respond(reply),
            }
        })
    }

    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        let Some(session) = self.session(cx) else { return Flow::Continue };
        let shown = session.mode.get().of(Side::Response);
        let ended = http_body::Body::is_end_stream(body);
        if ended {
            session.has_no_body(Side::Response);
        }
        if session.is_over() {
            return Flow::Continue;
        }
        let attributes = &self.settings.response_attributes;
        if !attributes.is_empty() {
            let known = session.take_attributes(Side::Response).unwrap_or_default();
            session.tell_attributes(Side::Response, attributes.with_response(known, head));
        }
        let observability = self.settings.observability;
        if shown.headers {
            let request = messages::response(head, ended, &self.settings.forward);
            session.send(Side::Response, Some(Await::Headers).filter(|_| !observability), request);
        }
        if !observability && shown.hides_length() && !self.settings.allow_content_length && !self.upgrade {
            head.headers.remove(CONTENT_LENGTH);
        }
        if shown.headers && !observability {
            return Flow::Wait;
        }
        if shown.is_nothing() && !observability {
            session.close();
        }
        self.wrap(&session, Side::Response, body, has_separate_end(body));
        Flow::Continue
    }

    fn wait_response<'a>(
        &'a mut self,
        head: &'a mut ResponseHead,
        body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let Some(session) = self.session.clone() else { return Flow::Continue };
            let passage = Passage { session: &session, side: Side::Response, separate_end: has_separate_end(body) };
            match passage.pass(Target::Response(head), body).await {
                Ok(_) => Flow::Continue,
                Err(reply) => Flow::Respond(reply),
            }
        })
    }
}

/// Whether the end of a response's body comes for itself: not on HTTP/2, and not where the answer was made here.
fn has_separate_end(body: &Body) -> bool {
    use crate::http::codec::Incoming;
    matches!(body, Body::Observed(Incoming::Upstream(_), _) | Body::Wrapped(_))
}
