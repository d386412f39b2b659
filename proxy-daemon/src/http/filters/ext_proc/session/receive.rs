//! What a processor says, and to which of the messages that it was shown.

use std::time::Duration;

use envoy_types::pb::{
    envoy::service::ext_proc::v3::{
        CommonResponse, ProcessingResponse, StreamedBodyResponse, body_mutation::Mutation,
        common_response::ResponseStatus, processing_response::Response,
    },
    google::protobuf::{Struct, value::Kind},
};
use tokio::time::Instant;

use super::{Await, Reply, Session, SideState, wake};
use crate::{
    config::parse,
    http::filters::ext_proc::mode::{self, BodyMode, Mode, Side},
};

impl Session {
    /// A message has come.
    pub(super) fn receive(&self, response: ProcessingResponse) {
        if self.settings.observability || self.is_over() {
            return;
        }
        if let Some(timeout) = response.override_message_timeout {
            let limit = parse::duration(Some(timeout), "", "").ok().flatten();
            return self.extend(limit.filter(|limit| *limit <= self.settings.max_message_timeout));
        }
        let in_headers = self.sides.iter().any(|side| side.awaits.get() == Some(Await::Headers));
        let may_override = self.settings.allow_mode_override && in_headers && !self.mode.get().is_duplex();
        if let Some(by) = response.mode_override.filter(|_| may_override) {
            let written = mode::overridden(&self.settings.written_mode, &by);
            let allowed = &self.settings.allowed_override_modes;
            if allowed.is_empty() || allowed.iter().any(|other| mode::is_written_as(&written, other)) {
                // What is not honoured cannot be carried out.
                let Ok(mode) = Mode::parse_override(&written, "mode_override") else {
                    return self.spurious("unhandled mode");
                };
                self.mode.set(mode);
            }
        }
        let metadata = response.dynamic_metadata.as_ref();
        let common = |common: Option<CommonResponse>| Reply::Common(Box::new(common.unwrap_or_default()));
        let (side, awaited, reply) = match response.response {
            Some(Response::RequestHeaders(it)) => (Side::Request, Await::Headers, common(it.response)),
            Some(Response::ResponseHeaders(it)) => (Side::Response, Await::Headers, common(it.response)),
            Some(Response::RequestBody(it)) => (Side::Request, Await::Body, common(it.response)),
            Some(Response::ResponseBody(it)) => (Side::Response, Await::Body, common(it.response)),
            Some(Response::RequestTrailers(it)) => {
                (Side::Request, Await::Trailers, Reply::Trailers(it.header_mutation))
            }
            Some(Response::ResponseTrailers(it)) => {
                (Side::Response, Await::Trailers, Reply::Trailers(it.header_mutation))
            }
            Some(Response::ImmediateResponse(_)) if self.settings.disable_immediate_response => {
                return self.spurious("unhandled immediate response due to config disabled it");
            }
            Some(Response::ImmediateResponse(answer)) => {
                self.tell(metadata);
                self.settings.stats.stream_msgs_received.inc();
                self.finish();
                let answer = self.answer_of(answer);
                return self.end(Some(answer));
            }
            Some(Response::StreamedImmediateResponse(_)) | None => return self.spurious("unhandled message"),
        };
        self.tell(metadata);
        let (state, duplex) = (self.side(side), self.is_duplex(side));
        // The last piece of a body need not say that it is that where trailers follow.
        let trailers = duplex && awaited == Await::Trailers && state.trailers_shown.get();
        let fits = state.awaits.get() == Some(awaited) || trailers && state.awaits.get() == Some(Await::Body);
        if !fits {
            return self.spurious("spurious message");
        }
        let reply = match (reply, self.mode.get().of(side).body) {
            (Reply::Common(common), BodyMode::Duplex) if awaited == Await::Body => match streamed(*common) {
                Some(piece) => return self.take_piece(side, piece),
                None => {
                    return self.spurious(
                        "spurious message: Normal body mutation response is received while body_mode_ is \
                         FULL_DUPLEX_STREAMED",
                    );
                }
            },
            (reply, _) => reply,
        };
        self.settings.stats.stream_msgs_received.inc();
        state.awaits.set(self.awaited_after(side, &reply));
        state.deadline.set(None);
        match reply {
            Reply::Trailers(mutation) if duplex => drop(state.trailers.replace(Some(mutation))),
            reply => drop(state.reply.replace(Some(reply))),
        }
        if self.was_last(side, awaited) {
            self.over.set(true);
            self.finish();
        }
        wake(state);
    }

    /// What a side waits for when this has come.
    fn awaited_after(&self, side: Side, reply: &Reply) -> Option<Await> {
        let state = self.side(side);
        match reply {
            // What is replaced as a whole has no further part.
            Reply::Common(common) if common.status == ResponseStatus::ContinueAndReplace as i32 => None,
            Reply::Common(_) if self.is_duplex(side) && state.body_shown.get() => Some(Await::Body),
            Reply::Common(_) if self.is_duplex(side) && state.trailers_shown.get() => Some(Await::Trailers),
            Reply::Common(_) | Reply::Trailers(_) => None,
        }
    }

    /// A piece of the processor's own has come.
    fn take_piece(&self, side: Side, piece: StreamedBodyResponse) {
        let state = self.side(side);
        self.settings.stats.stream_msgs_received.inc();
        if !piece.body.is_empty() && !state.abandoned.get() {
            state.piece_bytes.set(state.piece_bytes.get() + piece.body.len());
            state.pieces.borrow_mut().push_back(piece.body.into());
            self.stream.borrow().as_ref().inspect(|stream| self.hold_up(stream));
        }
        if piece.end_of_stream {
            state.awaits.set(None);
            state.pieces_ended.set(true);
            if self.is_last_side(side) {
                self.over.set(true);
                self.finish();
            }
        }
        wake(state);
    }

    /// Whether nothing more is to be shown after this reply. As in Envoy, that is not looked into where bodies are buffered.
    fn was_last(&self, side: Side, awaited: Await) -> bool {
        let (shown, state) = (self.mode.get().of(side), self.side(side));
        let ends = match awaited {
            Await::Headers => state.no_body.get() || shown.body == BodyMode::None && !shown.trailers,
            Await::Body => shown.body == BodyMode::Streamed && state.last_piece.get() && !state.no_body.get(),
            Await::Trailers => true,
        };
        ends && self.is_last_side(side)
    }

    fn is_last_side(&self, side: Side) -> bool {
        side == Side::Response || self.mode.get().of(Side::Response).is_nothing()
    }

    /// `override_message_timeout`
    fn extend(&self, limit: Option<Duration>) {
        let stats = &self.settings.stats;
        let limit = limit.filter(|limit| *limit >= Duration::from_millis(1));
        let waiting = |state: &&SideState| {
            state.awaits.get().is_some() && state.deadline.get().is_some() && !state.extended.get()
        };
        let waits = self.sides.iter().any(|state| waiting(&state));
        let Some(limit) = limit.filter(|_| waits) else { return stats.override_message_timeout_ignored.inc() };
        stats.override_message_timeout_received.inc();
        for state in self.sides.iter().filter(waiting) {
            state.extended.set(true);
            state.deadline.set(Some(Instant::now() + limit));
            wake(state);
        }
    }

    /// Notes what the processor tells other filters, where it may.
    fn tell(&self, metadata: Option<&Struct>) {
        let Some(metadata) = metadata.filter(|_| !self.merged.received.is_empty()) else { return };
        for (name, value) in &metadata.fields {
            if !self.merged.received.iter().any(|known| **known == **name) {
                continue;
            }
            let none = Struct::default();
            let fields = match &value.kind {
                Some(Kind::StructValue(fields)) => fields,
                _ => &none,
            };
            self.progress.with_metadata(|all| crate::http::metadata::update(all.namespace_mut(name), fields));
        }
    }
}

/// The piece of its own that a processor says a body has.
fn streamed(common: CommonResponse) -> Option<StreamedBodyResponse> {
    match common.body_mutation?.mutation? {
        Mutation::StreamedResponse(piece) => Some(piece),
        Mutation::Body(_) | Mutation::ClearBody(_) => None,
    }
}
