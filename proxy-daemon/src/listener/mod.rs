//! Listeners: sockets, the connection's own destination, and the choice of a filter chain.

mod chain_match;
mod prints;
mod sockets;
mod stream;
mod tls_inspector;

use std::{
    cell::{OnceCell, RefCell},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::server::TlsStream;

pub use prints::Prints;
pub use sockets::{BoundAddress, Intercepted, bind};
pub use stream::DownstreamStream;
pub(crate) use stream::{eof, reset_on_close};
pub use tls_inspector::fuzz as fuzz_client_hello;

use self::{
    chain_match::{ChainIndex, Facts},
    tls_inspector::Hello,
};
use crate::{
    access_log::{AccessLog, Record},
    config::{
        FieldError,
        model::{DownstreamTlsContext, FilterChain, Listener, NetworkFilterConfig, RouteSource},
    },
    http::{ConnectionManager, Routes},
    network::TcpProxy,
    runtime::{Worker, clock},
    stats::{Counter, Gauge, Histogram, Lease, Scope},
    tls::{Secrets, ServerTls, SslStats, TlsInfo, TlsInspectorStats},
    upstream::{OwnPools, Source},
};

/// What is known of a downstream connection when it is accepted.
#[derive(Debug)]
pub struct ConnectionInfo {
    /// Unique in the process.
    pub id: u64,
    /// The client's end.
    pub remote: SocketAddr,
    /// Our end: with `original_dst`, where the client wanted to go.
    pub local: SocketAddr,
    /// Where the client wanted to go, where the listener restores that.
    pub original_dst: Option<SocketAddr>,
    /// The source address that upstream connections keep.
    pub source: Option<Source>,
    /// This node's own address, for `x-forwarded-for` of loopback clients.
    pub node_ip: Option<IpAddr>,
    /// How much of a request may be kept, in bytes: the listener's `per_connection_buffer_limit_bytes`.
    pub buffer_limit: u32,
    /// The listener's `traffic_direction` is `INBOUND`.
    pub inbound: bool,
    /// The listener's name.
    listener: Arc<str>,
    /// What is known of it once its first bytes have come.
    learnt: Learnt,
    /// What it has to itself of upstream connections. Empty, it costs nothing.
    pub pools: OwnPools,
    /// What filters keep of it from one stream to the next. Empty, it costs nothing.
    pub kept: RefCell<http::Extensions>,
}

/// Most connections are plain ones, and say nothing of this.
#[derive(Debug, Default)]
struct Learnt {
    requested_server_name: OnceCell<Box<str>>,
    tls: OnceCell<Box<TlsInfo>>,
    transport_failure: OnceCell<Box<str>>,
    chain: OnceCell<Arc<str>>,
}

impl ConnectionInfo {
    /// The server that a TLS client asked for, where `tls_inspector` looks at that.
    pub fn requested_server_name(&self) -> Option<&str> {
        self.learnt.requested_server_name.get().map(AsRef::as_ref)
    }

    /// What the TLS handshake came to; `None`: the connection is plain.
    pub fn tls(&self) -> Option<&TlsInfo> {
        self.learnt.tls.get().map(AsRef::as_ref)
    }

    /// Why there was no TLS handshake, where it failed.
    pub fn transport_failure(&self) -> Option<&str> {
        self.learnt.transport_failure.get().map(AsRef::as_ref)
    }

    /// What access logs and formats can tell of it.
    pub fn record(&self) -> Record<'_> {
        Record {
            downstream_remote_address: Some(self.remote),
            downstream_direct_remote_address: Some(self.remote),
            downstream_local_address: Some(self.local),
            connection_id: self.id,
            requested_server_name: self.requested_server_name(),
            tls: self.tls(),
            downstream_transport_failure_reason: self.transport_failure(),
            listener_name: Some(&self.listener),
            filter_chain_name: self.learnt.chain.get().map(AsRef::as_ref),
            ..Record::default()
        }
    }
}

/// Tells connections that their filter chain, or the whole daemon, is going away.
#[derive(Debug, Clone)]
pub struct DrainSignal {
    chain: watch::Receiver<bool>,
    daemon: watch::Receiver<bool>,
}

impl DrainSignal {
    /// For a connection of a filter chain: each of the two is set when its side drains.
    pub fn new(chain: watch::Receiver<bool>, daemon: watch::Receiver<bool>) -> DrainSignal {
        DrainSignal { chain, daemon }
    }

    /// Ends when draining begins: what is in flight finishes, and idle clients are told when they come back.
    pub async fn triggered(&mut self) {
        // An error means that the sender is gone: that is a drain as well.
        tokio::select! {
            _ = self.chain.wait_for(|draining| *draining) => {}
            _ = self.daemon.wait_for(|draining| *draining) => {}
        }
    }

    /// Ends when the daemon itself drains: nobody waits for idle clients then.
    pub async fn daemon_leaves(&mut self) {
        let _ = self.daemon.wait_for(|draining| *draining).await;
    }
}

/// A filter chain, ready to serve.
#[derive(Debug)]
pub struct ActiveFilterChain {
    /// How its connections are decrypted.
    pub tls: Option<Arc<ServerTls>>,
    handshake_limit: Option<Duration>,
    filter: ActiveChain,
    name: Arc<str>,
}

/// The terminal filter of a chain.
#[derive(Debug)]
pub enum ActiveChain {
    /// `envoy.filters.network.tcp_proxy`
    Tcp(Arc<TcpProxy>),
    /// `envoy.filters.network.http_connection_manager`
    Http(Arc<ConnectionManager>),
}

/// A filter chain with what its own connections are told.
#[derive(Debug)]
struct Chain {
    active: ActiveFilterChain,
    drain: watch::Sender<bool>,
}

/// `listener.<address>.` statistics.
#[derive(Debug)]
pub struct ListenerStats {
    downstream_cx_total: Counter,
    downstream_cx_destroy: Counter,
    downstream_cx_active: Gauge,
    downstream_cx_length_ms: Histogram,
    no_filter_chain_match: Counter,
    _lease: Lease,
    downstream_pre_cx_timeout: Counter,
    downstream_pre_cx_active: Gauge,
    downstream_cx_transport_socket_connect_timeout: Counter,
}

/// One version of a listener's configuration, shared by all workers.
#[derive(Debug)]
pub struct ActiveListener {
    /// As configured.
    pub config: Arc<Listener>,
    chains: ChainIndex<Chain>,
    /// The chains in the order of the configuration, the default one last, with what they are made of.
    built: Vec<(Option<u64>, Arc<Chain>)>,
    prints: Option<Prints>,
    stats: ListenerStats,
    inspector_stats: Option<TlsInspectorStats>,
    access_logs: Vec<AccessLog>,
}

impl ActiveListener {
    /// Builds the chains; `routes` gives what RDS and SRDS deliver.
    ///
    /// Where nothing but filter chains changed since `before`, those that stay are taken over with their connections.
    ///
    /// # Errors
    /// What cannot be had, for example a log file.
    pub fn new(
        config: Arc<Listener>,
        prints: Option<Prints>,
        before: Option<&ActiveListener>,
        mut routes: impl FnMut(&RouteSource) -> Routes,
        secrets: &Arc<Secrets>,
    ) -> Result<ActiveListener, FieldError> {
        let before = before.filter(|before| match (&before.prints, &prints) {
            (Some(old), Some(new)) => old.rest == new.rest,
            _ => false,
        });
        let prefix = if config.stat_prefix.is_empty() {
            config.addresses.first().map(|first| first.address.to_string()).unwrap_or_default()
        } else {
            config.stat_prefix.clone()
        };
        let scope = Scope::listener(&prefix);
        let lease = scope.lease();
        let ssl_stats = OnceCell::new();
        let mut build = |chain: &FilterChain| {
            let socket = |context: &Arc<DownstreamTlsContext>| {
                let stats = ssl_stats.get_or_init(|| Arc::new(SslStats::new(&scope, "server_ssl_socket_factory")));
                ServerTls::new(Arc::clone(context), Arc::clone(stats), secrets)
                    .map_err(|error| FieldError::new("transport_socket", error))
            };
            Ok::<_, FieldError>(ActiveFilterChain {
                tls: chain.tls.as_ref().map(socket).transpose()?,
                handshake_limit: chain.transport_socket_connect_timeout,
                filter: activate(chain, &mut routes, &prefix)?,
                name: Arc::clone(&chain.name),
            })
        };
        let mut built: Vec<(Option<u64>, Arc<Chain>)> = Vec::new();
        for (index, chain) in config.filter_chains.iter().chain(&config.default_filter_chain).enumerate() {
            let print = prints.as_ref().and_then(|prints| prints.chain(index, config.filter_chains.len()));
            let same = |(known, _): &&(Option<u64>, Arc<Chain>)| print.is_some() && *known == print;
            let kept = before.and_then(|before| before.built.iter().find(same)).map(|(_, chain)| Arc::clone(chain));
            let chain = match kept {
                Some(chain) => chain,
                None => Arc::new(Chain { active: build(chain)?, drain: watch::channel(false).0 }),
            };
            built.push((print, chain));
        }
        let matches = config.filter_chains.iter().map(|chain| chain.chain_match.clone());
        let chains = matches.zip(built.iter().map(|(_, chain)| Arc::clone(chain))).collect();
        let default = config.default_filter_chain.as_ref().and(built.last()).map(|(_, chain)| Arc::clone(chain));
        let access_logs = config.access_logs.iter().map(AccessLog::new).collect::<Result<_, _>>()?;
        let stats = ListenerStats {
            downstream_cx_total: scope.counter("downstream_cx_total"),
            downstream_cx_destroy: scope.counter("downstream_cx_destroy"),
            downstream_cx_active: scope.gauge("downstream_cx_active"),
            downstream_cx_length_ms: scope.histogram("downstream_cx_length_ms"),
            no_filter_chain_match: scope.counter("no_filter_chain_match"),
            _lease: lease,
            downstream_pre_cx_timeout: scope.counter("downstream_pre_cx_timeout"),
            downstream_pre_cx_active: scope.gauge("downstream_pre_cx_active"),
            downstream_cx_transport_socket_connect_timeout: scope
                .counter("downstream_cx_transport_socket_connect_timeout"),
        };
        let inspector_stats = config.tls_inspector.map(|_| TlsInspectorStats::new());
        let chains = ChainIndex::new(chains, default);
        Ok(ActiveListener { chains, built, prints, config, stats, inspector_stats, access_logs })
    }

    /// The transport sockets of its chains.
    pub fn transport_sockets(&self) -> impl Iterator<Item = &Arc<ServerTls>> {
        self.built.iter().filter_map(|(_, chain)| chain.active.tls.as_ref())
    }

    /// Tells this version's connections to finish, but for those of chains that `next` has taken over.
    pub fn start_drain(&self, next: Option<&ActiveListener>) {
        for (_, chain) in &self.built {
            let kept = |next: &ActiveListener| next.built.iter().any(|(_, other)| Arc::ptr_eq(chain, other));
            if !next.is_some_and(kept) {
                chain.drain.send_replace(true);
            }
        }
    }

    /// How many of its chains `next` has not taken over.
    pub fn dropped_chains(&self, next: &ActiveListener) -> usize {
        let gone = |chain: &Arc<Chain>| !next.built.iter().any(|(_, other)| Arc::ptr_eq(chain, other));
        self.built.iter().filter(|(_, chain)| gone(chain)).count()
    }
}

fn activate(
    chain: &FilterChain,
    routes: &mut impl FnMut(&RouteSource) -> Routes,
    prefix: &str,
) -> Result<ActiveChain, FieldError> {
    let terminal = chain.filters.last().ok_or_else(|| FieldError::new("filters", "a filter chain needs a filter"))?;
    match terminal {
        NetworkFilterConfig::TcpProxy(config) => {
            let forward = chain.filters.iter().find_map(|filter| match filter {
                NetworkFilterConfig::SniForwardProxy(config) => Some(Arc::clone(config)),
                NetworkFilterConfig::TcpProxy(_) | NetworkFilterConfig::HttpConnectionManager(_) => None,
            });
            Ok(ActiveChain::Tcp(Arc::new(TcpProxy::new(Arc::clone(config), forward)?)))
        }
        // The configuration has been checked.
        NetworkFilterConfig::SniForwardProxy(_) => Err(FieldError::new("filters", "the last filter must be terminal")),
        NetworkFilterConfig::HttpConnectionManager(config) => {
            let routes = routes(&config.routes);
            Ok(ActiveChain::Http(Arc::new(ConnectionManager::new(Arc::clone(config), routes, prefix)?)))
        }
    }
}

/// A listener as the workers know it: its configuration can be replaced without touching its sockets.
#[derive(Debug)]
pub struct SharedListener {
    /// Its name.
    pub name: Arc<str>,
    /// The configuration that new connections get.
    pub active: ArcSwap<ActiveListener>,
}

/// Accepts connections on one socket of one worker until the task is aborted.
pub async fn accept_forever(socket: tokio::net::TcpListener, listener: Arc<SharedListener>, worker: Rc<Worker>) {
    let bound = socket.local_addr().ok();
    loop {
        match socket.accept().await {
            Ok((stream, remote)) => {
                let active = listener.active.load_full();
                let worker = Rc::clone(&worker);
                tokio::task::spawn_local(serve(stream, remote, bound, active, worker));
            }
            Err(error) => {
                // Out of descriptors or memory: accepting again at once would only burn the processor.
                tracing::warn!(listener = %listener.name, %error, "cannot accept connections; trying again in 100 ms");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(
    stream: TcpStream,
    remote: SocketAddr,
    bound: Option<SocketAddr>,
    active: Arc<ActiveListener>,
    worker: Rc<Worker>,
) {
    let started = std::time::Instant::now();
    let stats = &active.stats;
    stats.downstream_cx_total.inc();
    let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_active);
    let _total = crate::upstream::Decrement::after_inc(worker.total_connections);
    let remote = canonical(remote);
    let local = stream.local_addr().map(canonical).unwrap_or(remote);
    // Asked whether or not the listener wants to know: the kernel keeps it until then.
    let host_dst = worker.host_destination(remote, local);
    let original_dst = active
        .config
        .use_original_dst
        .then(|| host_dst.or_else(|| original_destination(&stream, local, bound)))
        .flatten();
    let info = Rc::new(ConnectionInfo {
        id: worker.next_connection_id(),
        remote,
        local: original_dst.unwrap_or(local),
        original_dst,
        // A host process has the addresses of its host, as the daemon has.
        source: active
            .config
            .original_src
            .filter(|_| host_dst.is_none())
            .map(|original_src| Source::new(original_src, remote.ip())),
        node_ip: worker.node_ip,
        buffer_limit: active.config.per_connection_buffer_limit_bytes,
        inbound: active.config.inbound,
        listener: Arc::clone(&active.config.name),
        learnt: Learnt::default(),
        pools: OwnPools::default(),
        kept: RefCell::default(),
    });
    if let Some(chain) = find_chain(&stream, &active, &info).await {
        serve_chain(stream, &chain, &info, &active, worker).await;
    }
    stats.downstream_cx_destroy.inc();
    stats.downstream_cx_length_ms.record(started.elapsed().as_millis() as u64);
    if !active.access_logs.is_empty() {
        let duration = started.elapsed();
        let record = Record { start: SystemTime::now() - duration, duration, ..info.record() };
        active.access_logs.iter().for_each(|log| log.write(&record));
    }
}

/// The listener filters, and the choice of a chain; `None`: the connection is to be closed.
async fn find_chain(stream: &TcpStream, active: &ActiveListener, info: &ConnectionInfo) -> Option<Arc<Chain>> {
    let mut hello = Hello::default();
    let inspects = !active.config.not_inspected.as_ref().is_some_and(|rule| rule.holds(info.local.port()));
    if let (Some(max), Some(stats), true) = (active.config.tls_inspector, &active.inspector_stats, inspects) {
        let _inspected = crate::upstream::Decrement::after_inc(active.stats.downstream_pre_cx_active);
        let inspected = tls_inspector::inspect(stream, max, active.config.listener_filters_timeout, stats);
        match Box::pin(inspected).await {
            Ok(seen) => hello = seen,
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {
                active.stats.downstream_pre_cx_timeout.inc();
                if !active.config.continue_on_listener_filters_timeout {
                    return None;
                }
            }
            Err(error) => {
                tracing::debug!(listener = %active.config.name, remote = %info.remote, %error, "closed unseen");
                return None;
            }
        }
    }
    let chain = active.chains.find(Facts { local: info.local, remote: info.remote, hello: &hello });
    if chain.is_none() {
        active.stats.no_filter_chain_match.inc();
        let (listener, local, remote) = (&active.config.name, info.local, info.remote);
        tracing::debug!(%listener, %local, %remote, "no filter chain matches; closed");
    }
    if let Some(name) = hello.server_name {
        // Nothing of what is learnt is set before, here and below.
        let _ = info.learnt.requested_server_name.set(name.into());
    }
    chain
}

/// The handshake where there is one, then the chain's filter to the end.
async fn serve_chain(
    stream: TcpStream,
    chain: &Chain,
    info: &Rc<ConnectionInfo>,
    active: &ActiveListener,
    worker: Rc<Worker>,
) {
    let mut drain = DrainSignal::new(chain.drain.subscribe(), worker.draining.clone());
    let chain = &chain.active;
    let _ = info.learnt.chain.set(Arc::clone(&chain.name));
    let stream = match &chain.tls {
        None => DownstreamStream::Plain(stream),
        // What only the handshake needs does not stay with the connection.
        Some(tls) => match Box::pin(shake_hands(tls, stream, chain, active, &mut drain, worker.drain_time)).await {
            Ok((stream, tls)) => {
                let _ = info.learnt.tls.set(Box::new(tls));
                DownstreamStream::Tls(Box::new(stream))
            }
            Err(failure) => {
                let by_client = matches!(&failure, Some(failure) if failure.starts_with("TLS_error"));
                if let Some(failure) = failure {
                    let _ = info.learnt.transport_failure.set(failure.into());
                }
                chain.filter.count_failed_handshake(by_client);
                return;
            }
        },
    };
    match &chain.filter {
        ActiveChain::Tcp(proxy) => {
            // Each filter has what it needs, and not what another one would.
            Box::pin(crate::network::tcp_proxy::serve(stream, Arc::clone(proxy), Rc::clone(info), worker, drain)).await;
        }
        ActiveChain::Http(manager) => {
            clock::in_turns(crate::http::serve(stream, Arc::clone(manager), Rc::clone(info), worker, drain)).await;
        }
    }
}

/// The error: what the handshake failed of, as logs show it.
async fn shake_hands(
    tls: &ServerTls,
    stream: TcpStream,
    chain: &ActiveFilterChain,
    active: &ActiveListener,
    drain: &mut DrainSignal,
    drain_time: Duration,
) -> Result<(TlsStream<DownstreamStream>, TlsInfo), Option<String>> {
    let expired = async {
        match chain.handshake_limit {
            Some(limit) => tokio::time::sleep(limit).await,
            None => std::future::pending().await,
        }
    };
    let drained = async {
        drain.triggered().await;
        tokio::time::sleep(drain_time).await;
    };
    tokio::select! {
        result = tls.accept(DownstreamStream::Plain(stream)) => match result {
            Ok(secured) => Ok(secured),
            Err(error) => {
                let error = culvert_xds_client::tls_error::describe(&error);
                tracing::debug!(listener = %active.config.name, %error, "TLS handshake failed");
                Err(Some(format!("TLS_error:{error}:TLS_error_end")))
            }
        },
        () = expired => {
            active.stats.downstream_cx_transport_socket_connect_timeout.inc();
            Err(Some("transport socket connect timeout".to_owned()))
        }
        () = drained => Err(None),
    }
}

impl ActiveChain {
    /// Envoy's filters count a connection before its handshake.
    fn count_failed_handshake(&self, by_client: bool) {
        match self {
            ActiveChain::Tcp(proxy) => proxy.count_failed_handshake(),
            ActiveChain::Http(manager) => manager.count_failed_handshake(by_client),
        }
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Where the client wanted to go: what NAT remembers (SO_ORIGINAL_DST), else the socket's own address, which a
/// redirected transparent socket takes over. `None` for a client that connected to the listener itself, which would
/// otherwise be sent in a circle.
fn original_destination(stream: &TcpStream, local: SocketAddr, bound: Option<SocketAddr>) -> Option<SocketAddr> {
    let socket = socket2::SockRef::from(stream);
    let translated = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    let destination = match translated.ok().and_then(|address| address.as_socket()) {
        Some(address) => canonical(address),
        None => local,
    };
    (Some(destination.port()) != bound.map(|bound| bound.port())).then_some(destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Most connections are idle most of the time: what only a handshake or a request needs is boxed for as long as that lasts.
    #[test]
    fn a_connections_task_is_small() {
        fn size_of_task<A, B, C, D, E, F: Future>(_: fn(A, B, C, D, E) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = size_of_task(serve);
        assert!(bytes <= 3072, "{bytes} bytes");
    }
}
