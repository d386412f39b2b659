//! Counters of gRPC calls below a cluster's name: `cluster.<name>.grpc.<service>.<method>.<what>`.

use std::{cell::RefCell, rc::Rc};

use http::HeaderValue;

use crate::{
    http::stream::{Progress, RequestHead, StreamCx},
    runtime::clock,
    stats::Counter,
    upstream::WorkerCluster,
};

/// The most counters that clients' paths make for a cluster: what comes later is counted without its method.
const MAX_COUNTERS: usize = 10_000;

/// The same of histograms, which are larger.
const MAX_HISTOGRAMS: usize = 1_000;

/// The longest name of a service or method that has counters of its own, in bytes.
const MAX_NAME: usize = 256;

/// The longest of what a call's counters are called: `request_message_count`, `response_message_count`.
const MAX_WHAT: usize = 32;

/// Where one call is counted.
pub(super) struct Call {
    cluster: Rc<WorkerCluster>,
    protocol: &'static str,
    /// `<protocol>.<service>.<method>.`, to which names are put; empty: the counters of all calls.
    own: RefCell<String>,
}

/// The service and the method that a path names.
pub(super) fn service_and_method(head: &RequestHead) -> Option<(&str, &str)> {
    let mut parts = head.uri.path().split('/').filter(|part| !part.is_empty());
    let (service, method) = (parts.next()?, parts.next()?);
    parts.next().is_none().then_some((service, method))
}

impl Call {
    /// A call of the stream's cluster, if it has one.
    pub(super) fn new(cx: &StreamCx, protocol: &'static str, method: Option<(&str, &str)>) -> Option<Call> {
        let short = |(service, method): &(&str, &str)| service.len() <= MAX_NAME && method.len() <= MAX_NAME;
        let cluster = Rc::clone(cx.cluster.as_ref()?);
        let mut own = String::new();
        if let Some((service, method)) = method.filter(short) {
            own.reserve(protocol.len() + service.len() + method.len() + 3 + MAX_WHAT);
            own.extend([protocol, ".", service, ".", method, "."]);
        }
        Some(Call { cluster, protocol, own: RefCell::new(own) })
    }

    /// The call's counter of this name.
    pub(super) fn counter(&self, what: &str) -> Counter {
        let Call { cluster, protocol, .. } = self;
        let counter = self.own(what, |name| cluster.counter_within(name, MAX_COUNTERS));
        counter.unwrap_or_else(|| cluster.counter(&format!("{protocol}.{what}")))
    }

    /// What `find` finds for the call's own name of this; `None`: it has none.
    fn own<T>(&self, what: &str, find: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let mut own = self.own.borrow_mut();
        let shared = own.len();
        if shared == 0 {
            return None;
        }
        own.push_str(what);
        let found = find(&own);
        own.truncate(shared);
        found
    }

    /// The host's answer to a request that had gone whole has come whole: records how long that took, as `upstream_rq_time`.
    pub(super) fn record_time(&self, progress: &Progress) {
        let sent = progress.times(clock::now()).upstream_sent();
        let Some(sent) = sent.filter(|_| progress.answered.get().is_some()) else { return };
        let (Call { cluster, protocol, .. }, what) = (self, "upstream_rq_time");
        let own = self.own(what, |name| cluster.histogram_within(name, MAX_HISTOGRAMS));
        // There is always room for the one of all calls.
        let histogram = own.or_else(|| cluster.histogram_within(&format!("{protocol}.{what}"), usize::MAX));
        histogram.inspect(|histogram| histogram.record(clock::since(sent).as_millis() as u64));
    }

    /// Counts how the call ended, by what its response or trailers say.
    pub(super) fn charge(&self, status: Option<&HeaderValue>) {
        let Some(status) = status.and_then(|status| status.to_str().ok()) else { return };
        // What is no code of gRPC's is counted as one that is unknown to it.
        let known = status.len() <= 2 && status.bytes().all(|byte| byte.is_ascii_digit());
        self.counter(if known { status } else { "unknown" }).inc();
        self.counter(if status == "0" { "success" } else { "failure" }).inc();
        self.counter("total").inc();
    }
}

/// Counts the messages of a body as its bytes pass.
#[derive(Debug, Default)]
pub(super) struct Messages {
    /// Bytes of the header that have come.
    header: u8,
    length: u32,
    /// Bytes of the message that are to come.
    left: u32,
    /// It is no gRPC: nothing more is counted.
    broken: bool,
}

impl Messages {
    /// How many messages begin in these bytes.
    pub(super) fn begun(&mut self, mut data: &[u8]) -> u64 {
        let mut begun = 0;
        while let Some((first, rest)) = data.split_first().filter(|_| !self.broken) {
            if self.left > 0 {
                let taken = data.len().min(self.left as usize);
                // At most `left`.
                self.left -= taken as u32;
                data = &data[taken..];
                continue;
            }
            if self.header == 0 {
                // Compressed or not: a message of gRPC begins with nothing else.
                self.broken |= *first > 1;
                if self.broken {
                    break;
                }
                begun += 1;
                self.length = 0;
            } else {
                self.length = self.length << 8 | u32::from(*first);
            }
            self.header += 1;
            if self.header == 5 {
                (self.header, self.left) = (0, self.length);
            }
            data = rest;
        }
        begun
    }
}

/// What the fuzzer `grpc_messages` feeds: a body, whose first byte says how it is parted. It makes no difference where.
pub(in crate::http) fn fuzz(bytes: &[u8]) {
    let Some((parts, body)) = bytes.split_first() else { return };
    let whole = Messages::default().begun(body);
    let mut messages = Messages::default();
    let parted: u64 = body.chunks(usize::from(*parts).max(1)).map(|piece| messages.begun(piece)).sum();
    assert_eq!(whole, parted);
}

#[cfg(test)]
#[path = "grpc_counts_tests.rs"]
mod tests;
