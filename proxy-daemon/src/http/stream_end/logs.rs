//! What a stream keeps for its lines in access logs, and for taps.

use std::{rc::Rc, time::Instant};

use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CONTENT_LENGTH, DATE},
};

use super::StreamEnd;
use crate::{
    access_log::{Headers, Record, Times},
    http::{
        codec::date,
        live_log::{LiveLog, Told},
        logged::LogParts,
        stream::{RequestHead, StreamCx},
    },
    runtime::clock,
    upstream::WorkerHost,
};

impl StreamEnd {
    /// Whether an access log wants to know more.
    pub(in crate::http) fn is_logged(&self) -> bool {
        !self.state.manager.access_logs.is_empty()
    }

    /// Keeps the request's head for the access log: the last one that is kept is what a line shows.
    pub(in crate::http) fn keep_request(&mut self, head: &RequestHead) {
        self.progress.taps.borrow().iter().for_each(|tap| tap.request_now(head));
        self.keep_sent(head);
    }

    /// As [`keep_request`](Self::keep_request), of what taps have been told already.
    pub(in crate::http) fn keep_sent(&mut self, head: &RequestHead) {
        if self.is_logged() {
            let log = self.log.get_or_insert_with(|| Box::new(LogParts::new(self.started, None)));
            log.keep_request(head, &self.state.manager.logged);
            self.progress.host_rewritten.set(None);
            self.update_live();
        }
    }

    /// The request is told to hosts as attempt `number`.
    pub(in crate::http) fn keep_attempt(&mut self, number: u32) {
        if let Some(log) = &mut self.log {
            log.keep_attempt(number, &self.state.manager.logged.request);
        }
    }

    /// The request would have gone to this host, or to none that is known, where it has none now.
    pub(in crate::http) fn keep_refused(&mut self, host: Option<Rc<WorkerHost>>) {
        if let Some(log) = &mut self.log {
            log.refused_by = Some(host);
        }
    }

    /// There is no head to keep.
    pub(in crate::http) fn keep_no_request(&mut self) {
        if self.is_logged() {
            let live = self.log.take().and_then(|log| log.live);
            self.log = Some(Box::new(LogParts::new(self.started, live)));
        }
    }

    /// Keeps what routing found out.
    pub(in crate::http) fn keep_route(&mut self, cx: &StreamCx) {
        self.flags |= cx.flags;
        if let Some(log) = &mut self.log {
            log.route.clone_from(&cx.route);
            log.cluster.clone_from(&cx.cluster);
            log.remote = Some(cx.remote);
        }
        self.update_live();
    }

    /// Writes a line of a request that is under way.
    pub(in crate::http) fn log_now(&mut self, head: Option<&RequestHead>, cx: &StreamCx, log_type: &'static str) {
        if let Some(head) = head {
            self.keep_request(head);
            self.keep_route(cx);
        }
        if let Some(log) = &self.log {
            self.write_logs(log, log_type);
        }
    }

    /// Keeps the response's headers.
    pub(in crate::http) fn keep_response(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.status = Some(status);
        self.progress.taps.borrow().iter().for_each(|tap| tap.response_now(status, headers));
        if let Some(log) = &mut self.log {
            let names = &self.state.manager.logged.response;
            log.keep_response(status, headers, &self.state.manager.logged);
            if !self.redirected {
                log.complete_response(DATE, names, date);
            }
            log.answered.get_or_insert_with(clock::now);
        }
        self.update_live();
    }

    /// A response that was made here has so long a body.
    pub(in crate::http) fn keep_length(&mut self, length: u64) {
        if let Some(log) = self.log.as_mut().filter(|_| length > 0) {
            let names = &self.state.manager.logged.response;
            log.complete_response(CONTENT_LENGTH, names, || HeaderValue::from(length));
        }
    }

    /// Keeps the response's trailers.
    pub(in crate::http) fn keep_trailers(&mut self, trailers: &HeaderMap) {
        if let Some(log) = &mut self.log {
            log.keep_trailers(trailers, &self.state.manager.logged);
        }
    }

    /// What can be told of a stream of which nothing is known but its connection.
    pub(in crate::http) fn connection_record(&self) -> Record<'_> {
        let connection = &self.state.connection;
        Record { start: clock::wall(self.started), duration: clock::since(self.started), ..connection.record() }
    }

    /// Tells what there is to be told of the stream, but for its messages' heads.
    pub(super) fn tell_end(&self, tell: impl FnOnce(&Record<'_>)) {
        let (metadata, progress) = (self.progress.metadata.borrow(), &self.progress);
        let record = Record {
            metadata: metadata.as_deref(),
            response_code: self.status.map_or(0, |status| status.as_u16()),
            response_flags: self.flags,
            response_code_details: self.told_details(),
            bytes_received: progress.received.get(),
            bytes_sent: progress.sent.get(),
            attempts: progress.attempts.get(),
            grpc_messages: progress.grpc_messages.get(),
            times: Times { end: Some(Instant::now()), ..progress.times(self.started) },
            upstream_host: self.attempted().map(|host| host.host.display()),
            upstream_host_name: self.attempted().map(|host| host.host.name()),
            ..self.connection_record()
        };
        self.tell_upstream(&record, tell);
    }

    pub(super) fn write_logs(&self, log: &LogParts, log_type: &'static str) {
        let metadata = self.progress.metadata.borrow();
        let trailers = self.progress.trailers.borrow();
        let trailers = trailers.as_deref().map_or(Headers::Kept(&log.trailers), Headers::All);
        let host = match &log.refused_by {
            Some(refused) => refused.as_ref(),
            None => self.host.as_ref().map(|(_, host)| host),
        };
        let record = Record {
            log_type,
            metadata: metadata.as_deref(),
            response_trailers: Some(trailers),
            response_code: self.status.map_or(0, |status| status.as_u16()),
            response_flags: self.flags,
            response_code_details: self.told_details(),
            upstream_host: host.map(|host| host.host.display()),
            upstream_host_name: host.map(|host| host.host.name()),
            ..log.record(&self.state, &self.progress, self.started)
        };
        self.tell_upstream(&record, |record| {
            for access_log in &self.state.manager.access_logs {
                access_log.write(record);
            }
        });
    }

    /// Adds to a record what is known of the connection to the host.
    pub(in crate::http) fn tell_upstream(&self, record: &Record<'_>, tell: impl FnOnce(&Record<'_>)) {
        let (upstream, transport_failure) = (self.notes.upstream.take(), self.notes.transport_failure.take());
        let connect = upstream.as_ref().map(|upstream| upstream.times).unwrap_or_default();
        let answered = record.times.upstream_answered.filter(|_| self.complete);
        let upstream_end = answered.map(|_| self.progress.last_response.get());
        tell(&Record {
            times: Times { connect, upstream_end, ..record.times },
            upstream_connection_id: upstream.as_ref().map(|upstream| upstream.id),
            virtual_cluster: self.notes.counted.as_ref().and_then(|counted| counted.virtual_cluster()),
            upstream_local_address: upstream.as_ref().and_then(|upstream| upstream.local),
            upstream_tls: upstream.as_ref().and_then(|upstream| upstream.tls.as_ref()),
            upstream_transport_failure_reason: transport_failure.as_deref(),
            ..*record
        });
        // It may be told again.
        self.notes.upstream.set(upstream);
        self.notes.transport_failure.set(transport_failure);
    }

    /// What there is to be told has changed: lines that are written at intervals shall tell it.
    pub(super) fn update_live(&mut self) {
        let Some(interval) = self.state.config().log_interval else { return };
        let Some(log) = &mut self.log else { return };
        let live = log.live.take();
        let upstream = self.notes.upstream.take();
        self.notes.upstream.set(upstream.clone());
        let told = Told {
            log: (**log).clone(),
            status: self.status,
            flags: self.flags,
            details: Some(self.details.to_string()).filter(|details| !details.is_empty()),
            host: self.host.as_ref().map(|(_, host)| Rc::clone(host)),
            counted: self.notes.counted.clone(),
            upstream,
        };
        log.live = Some(match live {
            Some(live) => {
                live.tell(told);
                live
            }
            None => {
                let (state, progress) = (Rc::clone(&self.state), Rc::clone(&self.progress));
                Rc::new(LiveLog::start(state, progress, self.started, interval, told))
            }
        });
    }
}
