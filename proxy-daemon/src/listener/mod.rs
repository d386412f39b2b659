//! Listeners: sockets, the connection's own destination, and the choice of a filter chain.

mod chain_match;
mod sockets;

use std::{
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

use arc_swap::ArcSwap;
use tokio::{net::TcpStream, sync::watch};

pub use sockets::{BoundListener, bind};

use self::chain_match::ChainIndex;
use crate::{
    access_log::AccessLog,
    config::{
        FieldError,
        model::{FilterChain, Listener, NetworkFilterConfig, RouteSource},
    },
    http::{ConnectionManager, RouteSlot},
    network::TcpProxy,
    runtime::Worker,
    stats::{Counter, Gauge, Histogram, Lease, Scope},
    upstream::Source,
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
}

/// Tells connections that their listener is going away.
#[derive(Debug, Clone)]
pub struct DrainSignal(watch::Receiver<bool>);

impl DrainSignal {
    /// Ends when draining begins.
    pub async fn triggered(&mut self) {
        // An error means that the listener is gone: that is a drain as well.
        let _ = self.0.wait_for(|draining| *draining).await;
    }
}

/// A filter chain, ready to serve.
#[derive(Debug)]
pub enum ActiveChain {
    /// `envoy.filters.network.tcp_proxy`
    Tcp(Arc<TcpProxy>),
    /// `envoy.filters.network.http_connection_manager`
    Http(Arc<ConnectionManager>),
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
}

/// One version of a listener's configuration, shared by all workers.
#[derive(Debug)]
pub struct ActiveListener {
    /// As configured.
    pub config: Arc<Listener>,
    chains: ChainIndex,
    stats: ListenerStats,
    access_logs: Vec<AccessLog>,
    drain: watch::Sender<bool>,
}

impl ActiveListener {
    /// Builds the chains; `routes` gives the slot of an RDS name.
    pub fn new(
        config: Arc<Listener>,
        mut routes: impl FnMut(&str) -> Arc<RouteSlot>,
    ) -> Result<ActiveListener, FieldError> {
        let mut build = |chain: &FilterChain| activate(chain, &mut routes);
        let chains: Vec<_> = config
            .filter_chains
            .iter()
            .map(|chain| Ok((chain.chain_match.clone(), Arc::new(build(chain)?))))
            .collect::<Result<_, FieldError>>()?;
        let default = config.default_filter_chain.as_ref().map(|chain| build(chain).map(Arc::new)).transpose()?;
        let access_logs = config.access_logs.iter().map(AccessLog::new).collect::<Result<_, _>>()?;
        let prefix = if config.stat_prefix.is_empty() {
            config.addresses.first().map(|first| first.address.to_string()).unwrap_or_default()
        } else {
            config.stat_prefix.clone()
        };
        let scope = Scope::listener(&prefix);
        let lease = scope.lease();
        let stats = ListenerStats {
            downstream_cx_total: scope.counter("downstream_cx_total"),
            downstream_cx_destroy: scope.counter("downstream_cx_destroy"),
            downstream_cx_active: scope.gauge("downstream_cx_active"),
            downstream_cx_length_ms: scope.histogram("downstream_cx_length_ms"),
            no_filter_chain_match: scope.counter("no_filter_chain_match"),
            _lease: lease,
        };
        let (drain, _) = watch::channel(false);
        Ok(ActiveListener { chains: ChainIndex::new(chains, default), config, stats, access_logs, drain })
    }

    /// Tells this version's connections to finish.
    pub fn start_drain(&self) {
        self.drain.send_replace(true);
    }
}

fn activate(chain: &FilterChain, routes: &mut impl FnMut(&str) -> Arc<RouteSlot>) -> Result<ActiveChain, FieldError> {
    let terminal = chain.filters.last().ok_or_else(|| FieldError::new("filters", "a filter chain needs a filter"))?;
    match terminal {
        NetworkFilterConfig::TcpProxy(config) => Ok(ActiveChain::Tcp(Arc::new(TcpProxy::new(Arc::clone(config))?))),
        NetworkFilterConfig::HttpConnectionManager(config) => {
            let slot = match &config.routes {
                RouteSource::Static(table) => {
                    let slot = Arc::<RouteSlot>::default();
                    slot.set(Arc::clone(table));
                    slot
                }
                RouteSource::Rds(name) => routes(name),
            };
            Ok(ActiveChain::Http(Arc::new(ConnectionManager::new(Arc::clone(config), slot)?)))
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
    let _ = stream.set_nodelay(true);
    let remote = canonical(remote);
    let local = stream.local_addr().map(canonical).unwrap_or(remote);
    let original_dst = active.config.use_original_dst.then(|| original_destination(&stream, local, bound)).flatten();
    let local = original_dst.unwrap_or(local);
    let info = Rc::new(ConnectionInfo {
        id: worker.next_connection_id(),
        remote,
        local,
        original_dst,
        source: active.config.original_src.map(|original_src| Source::new(original_src, remote.ip())),
        node_ip: worker.node_ip,
    });
    match active.chains.find(local, remote) {
        None => {
            stats.no_filter_chain_match.inc();
            tracing::debug!(listener = %active.config.name, %local, %remote, "no filter chain matches; closed");
        }
        Some(chain) => {
            let drain = DrainSignal(active.drain.subscribe());
            match &*chain {
                ActiveChain::Tcp(proxy) => {
                    crate::network::tcp_proxy::serve(stream, Arc::clone(proxy), Rc::clone(&info), worker, drain).await;
                }
                ActiveChain::Http(manager) => {
                    crate::http::serve(stream, Arc::clone(manager), Rc::clone(&info), worker, drain).await;
                }
            }
        }
    }
    stats.downstream_cx_destroy.inc();
    stats.downstream_cx_length_ms.record(started.elapsed().as_millis() as u64);
    if !active.access_logs.is_empty() {
        let record = crate::access_log::Record {
            start: std::time::SystemTime::now() - started.elapsed(),
            duration: started.elapsed(),
            downstream_remote_address: Some(remote),
            downstream_direct_remote_address: Some(remote),
            downstream_local_address: Some(local),
            connection_id: info.id,
            ..Default::default()
        };
        active.access_logs.iter().for_each(|log| log.write(&record));
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
