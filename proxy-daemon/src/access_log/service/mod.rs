//! Access logs that go to a service: `envoy.access_loggers.http_grpc` and `tcp_grpc`.
//!
//! A worker collects entries and sends them on a stream of its own, when they have come to `buffer_size_bytes` and every
//! `buffer_flush_interval`. While the service takes nothing, a worker holds so many bytes, and [`MAX_QUEUED_BYTES`] on the
//! stream; further entries are dropped, and counted.

mod entry;
mod tags;

use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
    sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

use envoy_types::pb::envoy::{
    config::core::v3::Node,
    data::accesslog::v3::{HttpAccessLogEntry, TcpAccessLogEntry},
    service::accesslog::v3::{
        StreamAccessLogsMessage, StreamAccessLogsResponse,
        stream_access_logs_message::{HttpAccessLogEntries, Identifier, LogEntries, TcpAccessLogEntries},
    },
};
use prost::Message as _;
use tokio::time::{MissedTickBehavior, interval};

pub use entry::EntryParts;

use super::Record;
use crate::{
    http::call::{grpc::Service, grpc_stream::Stream},
    stats::{self, Counter},
    upstream::WorkerClusters,
};

const METHOD: &str = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs";
/// A stream holds so many bytes that the service has not taken; then entries stay where they are.
const MAX_QUEUED_BYTES: usize = 1 << 20;
/// How long a stream goes on whose log is no longer configured.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// What entries are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// Requests.
    Http,
    /// Connections.
    Tcp,
}

/// Where entries go, and how soon. Logs that say the same of it share streams.
#[derive(Debug, PartialEq, Eq)]
pub struct LogService {
    /// What the entries are of.
    pub kind: EntryKind,
    /// `log_name`
    pub log_name: Box<str>,
    /// `grpc_service`
    pub(crate) service: Service,
    /// `buffer_flush_interval`
    pub flush_interval: Duration,
    /// `buffer_size_bytes`
    pub buffer_bytes: usize,
}

/// `access_logs.grpc_access_log.*`
struct ServiceStats {
    logs_written: Counter,
    logs_dropped: Counter,
    flushed: Counter,
    flush_failed: Counter,
}

static STATS: LazyLock<ServiceStats> = LazyLock::new(|| ServiceStats {
    logs_written: stats::counter("access_logs.grpc_access_log.logs_written"),
    logs_dropped: stats::counter("access_logs.grpc_access_log.logs_dropped"),
    flushed: stats::counter("access_logs.grpc_access_log.grpc_entries_flushed"),
    flush_failed: stats::counter("access_logs.grpc_access_log.grpc_entries_flush_failed"),
});

/// Every service that a log goes to.
static SERVICES: Mutex<Vec<Weak<LogService>>> = Mutex::new(Vec::new());

/// Who services are told that the entries are from.
static NODE: OnceLock<Node> = OnceLock::new();

/// Names this node; the first word counts.
pub fn set_log_node(node: Node) {
    // A later word changes nothing.
    let _ = NODE.set(node);
}

/// The service that equals `wanted`.
pub(super) fn share(wanted: &Arc<LogService>) -> Arc<LogService> {
    // Before any worker counts, so that no statistic is created on the request path.
    LazyLock::force(&STATS);
    let mut services = SERVICES.lock().unwrap_or_else(PoisonError::into_inner);
    services.retain(|service| service.strong_count() > 0);
    if let Some(known) = services.iter().filter_map(Weak::upgrade).find(|known| known == wanted) {
        return known;
    }
    services.push(Arc::downgrade(wanted));
    Arc::clone(wanted)
}

/// Lets this thread send entries, until it is dropped. Made where tasks can be spawned.
#[must_use]
pub struct ServiceLogs(());

impl ServiceLogs {
    /// `own`: this node's address.
    pub fn new(clusters: Rc<WorkerClusters>, own: Option<IpAddr>) -> ServiceLogs {
        let own = own.unwrap_or(Ipv4Addr::LOCALHOST.into());
        THREAD.set(Some(Thread { clusters, own, loggers: Vec::new() }));
        ServiceLogs(())
    }
}

impl Drop for ServiceLogs {
    fn drop(&mut self) {
        THREAD.take();
    }
}

/// What a worker has for all of its logs.
struct Thread {
    clusters: Rc<WorkerClusters>,
    own: IpAddr,
    /// Few: one for each service.
    loggers: Vec<(Weak<LogService>, Rc<Logger>)>,
}

thread_local! {
    static THREAD: RefCell<Option<Thread>> = const { RefCell::new(None) };
}

/// Sends an entry of `record`, sooner or later.
pub(super) fn append(service: &Arc<LogService>, parts: &EntryParts, record: &Record<'_>) {
    let logger = THREAD.with_borrow_mut(|thread| thread.as_mut().map(|thread| thread.logger(service)));
    match logger {
        Some(logger) => logger.append(service, parts, record),
        // The thread ends.
        None => STATS.logs_dropped.inc(),
    }
}

impl Thread {
    fn logger(&mut self, service: &Arc<LogService>) -> Rc<Logger> {
        let known = self.loggers.iter().find(|(known, _)| std::ptr::eq(known.as_ptr(), Arc::as_ptr(service)));
        if let Some((_, logger)) = known {
            return Rc::clone(logger);
        }
        let logger =
            Rc::new(Logger { clusters: Rc::clone(&self.clusters), own: self.own, held: RefCell::new(Held::default()) });
        tokio::task::spawn_local(flush_forever(Arc::downgrade(service), service.flush_interval, Rc::clone(&logger)));
        self.loggers.push((Arc::downgrade(service), Rc::clone(&logger)));
        logger
    }
}

/// Sends what is held every `every`, for as long as a log goes there.
async fn flush_forever(service: Weak<LogService>, every: Duration, logger: Rc<Logger>) {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first one is at once.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        match service.upgrade() {
            Some(service) => logger.flush(&service),
            None => break,
        }
    }
    THREAD.with_borrow_mut(|thread| {
        if let Some(thread) = thread {
            thread.loggers.retain(|(known, _)| !Weak::ptr_eq(known, &service));
        }
    });
    logger.end();
}

/// What a worker holds for a service.
struct Logger {
    clusters: Rc<WorkerClusters>,
    own: IpAddr,
    held: RefCell<Held>,
}

#[derive(Default)]
struct Held {
    requests: Vec<HttpAccessLogEntry>,
    connections: Vec<TcpAccessLogEntry>,
    bytes: usize,
    /// Entries were last sent on it; and whether it has ended since.
    stream: Option<(Stream, Rc<Cell<bool>>)>,
}

impl Logger {
    fn append(&self, service: &LogService, parts: &EntryParts, record: &Record<'_>) {
        let is_full = || service.buffer_bytes > 0 && self.held.borrow().bytes >= service.buffer_bytes;
        if is_full() {
            self.flush(service);
        }
        if is_full() || (service.buffer_bytes == 0 && self.held.borrow().bytes > MAX_QUEUED_BYTES) {
            return STATS.logs_dropped.inc();
        }
        let mut held = self.held.borrow_mut();
        match service.kind {
            EntryKind::Http => {
                // Of connections Envoy counts only what is dropped, and never does that.
                STATS.logs_written.inc();
                let entry = parts.of_request(record);
                held.bytes += entry.encoded_len();
                held.requests.push(entry);
            }
            EntryKind::Tcp => {
                let entry = parts.of_connection(record);
                held.bytes += entry.encoded_len();
                held.connections.push(entry);
            }
        }
        let flushes = held.bytes >= service.buffer_bytes;
        drop(held);
        if flushes {
            self.flush(service);
        }
    }

    /// Sends what is held, where the service takes it.
    fn flush(&self, service: &LogService) {
        let held = &mut *self.held.borrow_mut();
        if held.bytes == 0 {
            return;
        }
        let entries = (held.requests.len() + held.connections.len()) as u64;
        held.stream.take_if(|(_, ended)| ended.get());
        let begins = held.stream.is_none();
        let stream = match &held.stream {
            Some((stream, _)) => stream,
            None => {
                let prepared = service.service.prepare_from(METHOD, &self.clusters, self.own);
                if !prepared.has_cluster() {
                    return STATS.flush_failed.add(entries);
                }
                let ended = Rc::new(Cell::new(false));
                let ends = Rc::clone(&ended);
                let stream = prepared.open::<StreamAccessLogsResponse>(move |told| {
                    if told.is_err() {
                        ends.set(true);
                    }
                });
                &held.stream.insert((stream, ended)).0
            }
        };
        if stream.queued() > MAX_QUEUED_BYTES {
            return STATS.flush_failed.add(entries);
        }
        let identifier = || Identifier { node: NODE.get().cloned(), log_name: service.log_name.clone().into() };
        stream.send(&StreamAccessLogsMessage {
            identifier: begins.then(identifier),
            log_entries: Some(match service.kind {
                EntryKind::Http => {
                    LogEntries::HttpLogs(HttpAccessLogEntries { log_entry: std::mem::take(&mut held.requests) })
                }
                EntryKind::Tcp => {
                    LogEntries::TcpLogs(TcpAccessLogEntries { log_entry: std::mem::take(&mut held.connections) })
                }
            }),
        });
        held.bytes = 0;
        STATS.flushed.add(entries);
    }

    /// No log goes there any more.
    fn end(&self) {
        let Held { requests, connections, stream, .. } = self.held.take();
        STATS.logs_dropped.add((requests.len() + connections.len()) as u64);
        if let Some((stream, _)) = stream {
            stream.finish(LAST_BYTES);
        }
    }
}

#[cfg(test)]
mod tests;
