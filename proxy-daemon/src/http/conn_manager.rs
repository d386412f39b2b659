//! One downstream connection: its codec, its streams, its end.

use std::{
    cell::Cell,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::StatusCode;
use tokio::sync::Notify;

use super::{
    Routes,
    aside::aside,
    codec::{h1, h2},
    io::DownstreamIo,
    leaving,
    logged::LoggedHeaders,
    scopes::RouteFinder,
    stats::{CodecStats, ConnectionEnd, HcmStats},
};
use crate::{
    access_log::AccessLog,
    config::model::{CodecType, HttpConnectionManagerConfig, jittered},
    listener::{ConnectionInfo, DownstreamStream, DrainSignal},
    runtime::{Worker, clock},
    stats::{Counter, Lease, Metered, ResponseCodes, Scope},
};

/// A configured connection manager, shared by all workers.
#[derive(Debug)]
pub struct ConnectionManager {
    /// As configured.
    pub config: Arc<HttpConnectionManagerConfig>,
    pub(super) routes: Routes,
    /// The names of its filters.
    filters: Arc<[Arc<str>]>,
    pub(super) stats: HcmStats,
    /// `listener.<address>.http.<stat_prefix>.downstream_rq_*`
    pub(super) by_listener: ResponseCodes,
    _by_listener_lease: Lease,
    pub(super) codecs: CodecStats,
    pub(super) access_logs: Vec<AccessLog>,
    pub(super) logged: LoggedHeaders,
}

impl ConnectionManager {
    /// Takes its slots in the statistics and opens its access logs. `listener`: what the listener's own are called by.
    pub fn new(
        config: Arc<HttpConnectionManagerConfig>,
        routes: Routes,
        listener: &str,
    ) -> Result<ConnectionManager, crate::config::FieldError> {
        let access_logs: Vec<_> = config.access_logs.iter().map(AccessLog::new).collect::<Result<_, _>>()?;
        let logged = LoggedHeaders::new(&access_logs);
        let stats = HcmStats::new(&config.stat_prefix);
        let scope = Scope::listener_http(listener, &config.stat_prefix);
        // Before the handles, so that they are of this life of the scope.
        let lease = scope.lease();
        let by_listener = ResponseCodes::classes_only(&scope, "downstream_rq");
        let filters = config.http_filters.iter().map(|entry| Arc::clone(&entry.name)).collect();
        Ok(ConnectionManager {
            config,
            routes,
            filters,
            stats,
            by_listener,
            _by_listener_lease: lease,
            codecs: CodecStats::new(),
            access_logs,
            logged,
        })
    }

    /// Counts a response to a client.
    pub(super) fn count_response(&self, status: StatusCode) {
        self.stats.downstream_rq.inc(status.as_u16());
        self.by_listener.inc(status.as_u16());
    }

    /// A connection that got no further than its TLS handshake; `by_client`: that failed, and was not ended here.
    pub(crate) fn count_failed_handshake(&self, by_client: bool) {
        self.stats.downstream_cx_total.inc();
        self.stats.downstream_cx_ssl_total.inc();
        self.stats.count_end(ConnectionEnd { by_client, in_use: false });
    }
}

/// What the streams of one connection share.
pub(super) struct ConnState {
    pub(super) manager: Arc<ConnectionManager>,
    pub(super) connection: Rc<ConnectionInfo>,
    pub(super) worker: Rc<Worker>,
    pub(super) routes: RouteFinder,
    active: Cell<u32>,
    requests: Cell<u32>,
    idle_since: Cell<Instant>,
    /// The client has closed its side, or has broken off.
    pub(super) client_closed: Cell<bool>,
    /// When anything last passed to the client.
    pub(super) last_progress: Cell<Instant>,
    /// HTTP/1 only: the connection is closed behind the present response.
    pub closes: Cell<bool>,
    /// How long nothing may pass to the client while a stream is open: the longest idle timeout of its streams.
    stall_limit: Cell<Option<Duration>>,
    /// Told when the connection has served its last request, or its client is to leave.
    worn_out: Notify,
    /// `http1_safe_max_connection_duration`, where it applies.
    ends_softly: bool,
    /// `max_connection_duration`, as it is for this connection.
    lasts: Option<Duration>,
}

impl ConnState {
    pub(super) fn stream_begins(&self) {
        self.active.set(self.active.get() + 1);
        self.last_progress.set(clock::now());
        self.requests.set(self.requests.get().saturating_add(1));
        let limit = self.manager.config.max_requests_per_connection;
        if limit != 0 && self.requests.get() == limit {
            self.manager.stats.downstream_cx_max_requests_reached.inc();
            self.leave();
        }
    }

    /// Whether the client is told with this answer to leave.
    pub(super) fn is_to_leave(&self) -> bool {
        leaving::is_told(self.connection.inbound)
    }

    /// The connection ends with the streams that it has, and its client is told so.
    pub(super) fn leave(&self) {
        self.worn_out.notify_one();
    }

    /// A stream may be idle for so long; `None`: for ever.
    pub(super) fn allow_stall(&self, idle: Option<Duration>) {
        self.stall_limit.set(self.stall_limit.get().zip(idle).map(|(known, new)| known.max(new)));
    }

    /// Ends when a client has not taken anything for too long. A body's own timer cannot tell: nobody polls a body while
    /// its client does not read.
    async fn stalled(&self) {
        loop {
            let Some(limit) = self.stall_limit.get().filter(|limit| !limit.is_zero()) else {
                return std::future::pending().await;
            };
            // The body's timer comes first where it can.
            let limit = limit + Duration::from_secs(1);
            let left = limit.saturating_sub(clock::since(self.last_progress.get()));
            if left.is_zero() && self.active.get() > 0 {
                return;
            }
            self.worker.sleeps.sleep(if left.is_zero() { limit } else { left }).await;
        }
    }

    /// How the connection ends that ends now.
    pub(super) fn end(&self) -> ConnectionEnd {
        ConnectionEnd { by_client: self.client_closed.get(), in_use: self.active.get() > 0 }
    }

    pub(super) fn stream_ends(&self) {
        self.active.set(self.active.get() - 1);
        self.idle_since.set(clock::now());
    }
}

/// Serves a downstream connection to its end.
pub async fn serve(
    stream: DownstreamStream,
    manager: Arc<ConnectionManager>,
    connection: Rc<ConnectionInfo>,
    worker: Rc<Worker>,
    mut drain: DrainSignal,
) {
    let stats = &manager.stats;
    stats.downstream_cx_total.inc();
    let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_active);
    let _encrypted = connection.tls().is_some().then(|| {
        stats.downstream_cx_ssl_total.inc();
        crate::upstream::Decrement::after_inc(stats.downstream_cx_ssl_active)
    });
    let started = clock::now();
    let chosen = stream.alpn().map(|protocol| protocol == b"h2");
    let lasts = manager.config.max_connection_duration.map(|limit| jittered(limit, manager.config.duration_jitter));
    let (read, written) = (stats.downstream_cx_rx_bytes_total, stats.downstream_cx_tx_bytes_total);
    let mut io = DownstreamIo::new(Metered::new(stream, read, written));
    let http2 = match (manager.config.codec_type, chosen) {
        (CodecType::Http1, _) => false,
        (CodecType::Http2, _) => true,
        (CodecType::Auto, Some(http2)) => http2,
        (CodecType::Auto, None) => {
            let limit = manager.config.idle_timeout.unwrap_or(Duration::MAX / 4);
            // A connection that has said nothing yet loses nothing when it is closed. Most have said something.
            let sniffed = tokio::select! {
                biased;
                sniffed = io.sniff_http2() => Some(sniffed),
                () = async { worker.sleeps.sleep(limit).await } => None,
                () = over(lasts) => {
                    stats.downstream_cx_max_duration_reached.inc();
                    None
                }
                () = drain.triggered() => None,
            };
            match sniffed {
                Some(Ok(http2)) => http2,
                ended => {
                    let by_client = ended.is_some();
                    return stats.count_end(ConnectionEnd { by_client, in_use: false });
                }
            }
        }
    };
    let state = Rc::new(ConnState {
        routes: RouteFinder::new(&manager.routes, &manager.filters),
        manager: Arc::clone(&manager),
        connection,
        worker,
        active: Cell::new(0),
        requests: Cell::new(0),
        idle_since: Cell::new(clock::now()),
        client_closed: Cell::new(false),
        last_progress: Cell::new(clock::now()),
        closes: Cell::new(false),
        stall_limit: Cell::new(stall_limit(&manager.config, http2)),
        worn_out: Notify::new(),
        ends_softly: !http2 && manager.config.http1_safe_max_connection_duration,
        lasts,
    });
    let end = if http2 {
        stats.downstream_cx_http2_total.inc();
        let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_http2_active);
        // Its state is much larger than what an idle connection of HTTP/1 needs.
        Box::pin(drive_http2(io, state, drain)).await
    } else {
        stats.downstream_cx_http1_total.inc();
        let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_http1_active);
        drive_http1(io, state, drain).await
    };
    stats.count_end(end);
    stats.downstream_cx_length_ms.record(clock::since(started).as_millis() as u64);
}

/// How long nothing may pass to a client that does not read, before its route says otherwise.
fn stall_limit(config: &HttpConnectionManagerConfig, http2: bool) -> Option<Duration> {
    if !http2 {
        return config.stream_idle_timeout;
    }
    // Streams whose end is here have a limit of their own.
    config.stream_idle_timeout.zip(config.stream_flush_timeout).map(|(idle, flush)| idle.max(flush))
}

/// How far a connection's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It serves.
    Open,
    /// Its client is told with the next answer.
    Draining,
    /// The same, but only so long.
    Grace,
    /// It ends with what is in flight.
    Closing,
}

/// While streams are under way, so often it is looked whether a connection that is to end has nothing to do any more, or less often.
const UNHEARD_AT_LEAST: Duration = Duration::from_secs(1);

/// How a connection has come to another stage of its end.
struct End {
    next: Stage,
    /// The counter that says why.
    reason: Counter,
    /// The daemon or the listener drains, which takes only so long.
    is_drain: bool,
}

/// Ends when so much time has passed, if it ever does.
async fn over(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

/// Ends when a connection that is to end has had nothing under way for long enough: who is told by GOAWAY, and acknowledges nothing, is not
/// waited for.
async fn unheard(state: &ConnState) {
    let limit = state.manager.config.delayed_close_timeout.unwrap_or_default();
    let since = clock::now();
    loop {
        let left = limit.saturating_sub(clock::since(since.max(state.idle_since.get())));
        let busy = state.active.get() > 0;
        if left.is_zero() && !busy {
            return;
        }
        // A stream that is under way has this long again when it has ended.
        tokio::time::sleep(if busy { limit.max(UNHEARD_AT_LEAST) } else { left }).await;
    }
}

/// Ends when the timer does, where there is one.
async fn elapsed(timer: std::pin::Pin<&mut Option<tokio::time::Sleep>>) {
    match timer.as_pin_mut() {
        Some(timer) => timer.await,
        None => std::future::pending().await,
    }
}

macro_rules! drive {
    ($connection:expr, $state:expr, $drain:expr, $unheard:expr, $end:expr) => {{
        let (state, mut drain) = ($state, $drain);
        let mut connection = std::pin::pin!($connection);
        let mut stage = Stage::Open;
        // Counts from the first word of the daemon's or the listener's end. Of others streams may take their time.
        let mut drained = std::pin::pin!(None);
        let opened = clock::now();
        loop {
            tokio::select! {
                biased;
                result = connection.as_mut() => {
                    break result.unwrap_or_else(|error| {
                        protocol_error(&state, &error);
                        state.end()
                    });
                }
                end = aside(end_of_life(&state, &mut drain, stage, opened)), if stage != Stage::Closing => {
                    if stage == Stage::Open {
                        end.reason.inc();
                    }
                    if end.is_drain && drained.is_none() {
                        drained.set(Some(tokio::time::sleep(state.worker.drain_time)));
                    }
                    stage = end.next;
                    $end(connection.as_mut(), stage);
                }
                () = elapsed(drained.as_mut()) => break state.end(),
                () = aside($unheard(&state)), if stage == Stage::Closing => break state.end(),
                () = aside(state.stalled()) => {
                    state.manager.stats.downstream_rq_idle_timeout.inc();
                    break ConnectionEnd::HERE;
                }
            }
        }
    }};
}

async fn drive_http1(io: DownstreamIo, state: Rc<ConnState>, drain: DrainSignal) -> ConnectionEnd {
    let (stream, read_ahead) = io.into_parts();
    let connection = h1::ServerConnection::new(stream, read_ahead, &state.manager.config);
    let of_streams = Rc::clone(&state);
    // Made where it stays: the future is large, and would be copied.
    let serving = async { Ok::<_, ::h2::Error>(Rc::clone(&connection).serve(of_streams).await) };
    // It waits for nobody.
    let unheard = |_: &ConnState| std::future::pending();
    drive!(serving, state, drain, unheard, |_, stage| match stage {
        Stage::Draining | Stage::Grace => connection.drain(),
        _ => connection.graceful_shutdown(),
    })
}

async fn drive_http2(io: DownstreamIo, state: Rc<ConnState>, drain: DrainSignal) -> ConnectionEnd {
    let connection = h2::ServerConnection::new(io, &state);
    // GOAWAY tells an idle client as well, and costs it nothing.
    drive!(connection, state, drain, unheard, |connection: std::pin::Pin<&mut h2::ServerConnection>, _| {
        connection.graceful_shutdown();
    })
}

/// Ends when the connection has come to another stage.
async fn end_of_life(state: &ConnState, drain: &mut DrainSignal, stage: Stage, opened: Instant) -> End {
    let end = |next, reason, is_drain| End { next, reason, is_drain };
    let (config, stats) = (&state.manager.config, &state.manager.stats);
    if stage == Stage::Grace {
        let extra = config.drain_timeout.mul_f64(fastrand::f64() * config.drain_jitter);
        let is_drain = tokio::select! {
            () = tokio::time::sleep(config.drain_timeout + extra) => false,
            () = drain.daemon_leaves() => true,
        };
        return end(Stage::Closing, stats.downstream_cx_drain_close, is_drain);
    }
    let too_old = async {
        match state.lasts.filter(|_| stage == Stage::Open || !state.ends_softly) {
            Some(limit) => tokio::time::sleep(limit.saturating_sub(clock::since(opened))).await,
            None => std::future::pending().await,
        }
    };
    let idle = async {
        let Some(limit) = config.idle_timeout else { return std::future::pending().await };
        loop {
            let busy = state.active.get() > 0;
            let left = if busy { limit } else { limit.saturating_sub(clock::since(state.idle_since.get())) };
            if left.is_zero() {
                return;
            }
            state.worker.sleeps.sleep(left).await;
        }
    };
    let drained = async {
        if stage == Stage::Open {
            drain.triggered().await;
        } else {
            drain.daemon_leaves().await;
        }
    };
    let aged = if state.ends_softly { Stage::Draining } else { Stage::Grace };
    let leaving = if stage == Stage::Open { Stage::Draining } else { Stage::Closing };
    tokio::select! {
        () = drained => end(leaving, stats.downstream_cx_drain_close, true),
        () = too_old => end(aged, stats.downstream_cx_max_duration_reached, false),
        () = idle => end(Stage::Grace, stats.downstream_cx_idle_timeout, false),
        () = state.worn_out.notified() => end(Stage::Closing, stats.downstream_cx_drain_close, false),
    }
}

fn protocol_error(state: &ConnState, error: &::h2::Error) {
    // What the client has noticed is not its own mistake.
    if error.is_library() && error.reason().is_some() {
        state.count_protocol_error();
    }
    tracing::debug!(connection = state.connection.id, peer = %state.connection.remote, %error, "connection ended");
}
