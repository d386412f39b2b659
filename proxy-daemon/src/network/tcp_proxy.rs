//! `envoy.filters.network.tcp_proxy`: carries bytes between a client and a host of a cluster.

use std::{
    cell::Cell,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::{Instant, SystemTime},
};

pub(super) use super::relay::Ended;
use super::{
    relay::{Flow, Relay},
    sni_dynamic_forward_proxy, tunnel,
};
use crate::{
    access_log::{AccessLog, Record, ResponseFlags, Times},
    config::{
        FieldError,
        model::{ClusterChoice, HashPolicy, MetadataMatch, SniForwardProxyConfig, TcpProxyConfig, jittered},
    },
    http::hash_policy::hash_of,
    listener::{ConnectionInfo, DownstreamStream, DrainSignal},
    runtime::Worker,
    stats::{Counter, Gauge, Lease, Scope},
    tls::AlpnFallback,
    upstream::{
        Chosen, ClusterStats, ConnectError, Decrement, Dial, HostCounter, Issued, PickCx, Resource, Seen,
        SocketSettings, Tunnelled, UpstreamInfo, UpstreamStream, WorkerCluster, WorkerHost, connect,
    },
};

/// A configured TCP proxy, shared by all workers.
#[derive(Debug)]
pub struct TcpProxy {
    pub(super) config: Arc<TcpProxyConfig>,
    /// Has names looked up before.
    forward: Option<Arc<SniForwardProxyConfig>>,
    access_logs: Vec<AccessLog>,
    stats: TcpStats,
}

#[derive(Debug)]
struct TcpStats {
    downstream_cx_total: Counter,
    downstream_cx_no_route: Counter,
    downstream_cx_rx_bytes_total: Counter,
    downstream_cx_tx_bytes_total: Counter,
    idle_timeout: Counter,
    max_downstream_connection_duration: Counter,
    /// `downstream_flow_control_paused_reading_total`, and `resumed`: not of tunnels.
    flow: Flow,
    downstream_cx_active: Gauge,
    _lease: Lease,
}

impl TcpProxy {
    /// Takes its slots in the statistics and opens its access logs. `forward`: of the filter before it, where there is one.
    pub fn new(
        config: Arc<TcpProxyConfig>,
        forward: Option<Arc<SniForwardProxyConfig>>,
    ) -> Result<TcpProxy, FieldError> {
        let access_logs = config.access_logs.iter().map(AccessLog::new).collect::<Result<_, _>>()?;
        let scope = Scope::tcp(&config.stat_prefix);
        let lease = scope.lease();
        let stats = TcpStats {
            downstream_cx_total: scope.counter("downstream_cx_total"),
            downstream_cx_no_route: scope.counter("downstream_cx_no_route"),
            downstream_cx_rx_bytes_total: scope.counter("downstream_cx_rx_bytes_total"),
            downstream_cx_tx_bytes_total: scope.counter("downstream_cx_tx_bytes_total"),
            idle_timeout: scope.counter("idle_timeout"),
            max_downstream_connection_duration: scope.counter("max_downstream_connection_duration"),
            flow: Flow {
                paused: scope.counter("downstream_flow_control_paused_reading_total"),
                resumed: scope.counter("downstream_flow_control_resumed_reading_total"),
            },
            downstream_cx_active: scope.gauge("downstream_cx_active"),
            _lease: lease,
        };
        Ok(TcpProxy { config, forward, access_logs, stats })
    }

    /// A connection that got no further than its TLS handshake.
    pub(crate) fn count_failed_handshake(&self) {
        self.stats.downstream_cx_total.inc();
    }

    /// Waits before a further attempt to connect: the more there were, the longer it may be, by chance.
    pub(super) async fn pause(&self, attempts: u32) {
        let Some((base, max)) = self.config.backoff.filter(|_| attempts > 0) else { return };
        let longest = base.saturating_mul(1 << (attempts - 1).min(20)).min(max);
        tokio::time::sleep(longest.mul_f64(fastrand::f64())).await;
    }

    /// The cluster, and what the host's metadata has to say.
    fn choose(&self) -> Option<(&Arc<str>, Option<&MetadataMatch>)> {
        let asked = self.config.metadata_match.as_ref();
        match &self.config.cluster {
            ClusterChoice::Cluster(name) => Some((name, asked)),
            ClusterChoice::Weighted(weighted) => {
                let index = weighted.choose_index(fastrand::u64(..))?;
                let own = weighted.options.get(index).and_then(|options| options.metadata_match.as_ref());
                Some((weighted.name(index), own.or(asked)))
            }
            ClusterChoice::Header(_) => None,
        }
    }
}

/// What a connection came to.
#[derive(Default)]
pub(super) struct Outcome {
    pub(super) flags: ResponseFlags,
    pub(super) host: Option<String>,
    cluster: Option<Arc<str>>,
    /// The cluster of the host, where there is one.
    carried_by: Option<Rc<WorkerCluster>>,
    pub(super) upstream: Option<Rc<UpstreamInfo>>,
    /// Of the last connect that failed, also where another one did not.
    transport_failure: Option<String>,
    /// So many hosts were connected to.
    pub(super) attempts: u32,
    pub(super) received: u64,
    pub(super) sent: u64,
}

/// Serves a downstream connection to its end.
pub async fn serve(
    downstream: DownstreamStream,
    proxy: Arc<TcpProxy>,
    info: Rc<ConnectionInfo>,
    worker: Rc<Worker>,
    drain: DrainSignal,
) {
    let (started, start) = (Instant::now(), SystemTime::now());
    proxy.stats.downstream_cx_total.inc();
    let _active = Decrement::after_inc(proxy.stats.downstream_cx_active);
    let outcome = carry(downstream, &proxy, &info, &worker, drain).await;
    proxy.stats.downstream_cx_rx_bytes_total.add(outcome.received);
    proxy.stats.downstream_cx_tx_bytes_total.add(outcome.sent);
    if proxy.access_logs.is_empty() {
        return;
    }
    let record = Record {
        log_type: "TcpConnectionEnd",
        start,
        duration: started.elapsed(),
        response_flags: outcome.flags,
        bytes_received: outcome.received,
        bytes_sent: outcome.sent,
        upstream_host: outcome.host.as_deref(),
        attempts: outcome.attempts,
        upstream_cluster: outcome.cluster.as_deref(),
        upstream_local_address: outcome.upstream.as_ref().and_then(|upstream| upstream.local),
        upstream_tls: outcome.upstream.as_ref().and_then(|upstream| upstream.tls.as_ref()),
        upstream_connection_id: outcome.upstream.as_ref().map(|upstream| upstream.id),
        times: Times {
            began: Some(started),
            connect: outcome.upstream.as_ref().map(|upstream| upstream.times).unwrap_or_default(),
            end: Some(Instant::now()),
            ..Times::default()
        },
        upstream_transport_failure_reason: outcome.transport_failure.as_deref(),
        ..info.record()
    };
    proxy.access_logs.iter().for_each(|log| log.write(&record));
}

async fn carry(
    mut downstream: DownstreamStream,
    proxy: &TcpProxy,
    info: &ConnectionInfo,
    worker: &Worker,
    mut drain: DrainSignal,
) -> Outcome {
    let (mut outcome, began) = (Outcome::default(), Instant::now());
    if let Some(forward) = &proxy.forward
        && !sni_dynamic_forward_proxy::look_up(forward, info).await
    {
        return outcome;
    }
    let (name, asked) = proxy.choose().unzip();
    let asked = asked.flatten();
    outcome.cluster = name.map(Arc::clone);
    let Some(cluster) = name.and_then(|name| worker.clusters.get(name)) else {
        proxy.stats.downstream_cx_no_route.inc();
        outcome.flags |= ResponseFlags::NC;
        return outcome;
    };
    let limit = proxy.config.max_downstream_connection_duration;
    let limit = limit.map(|limit| jittered(limit, proxy.config.duration_jitter));
    let ends = async {
        let expired = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit.saturating_sub(began.elapsed())).await,
                None => std::future::pending().await,
            }
        };
        let drained = async {
            drain.triggered().await;
            tokio::time::sleep(worker.drain_time).await;
        };
        tokio::select! {
            () = expired => Ended::TooOld,
            () = drained => Ended::Drained,
        }
    };
    let mut ends = pin!(ends);
    let mut was_reset = false;
    let ended = if let Some(tunneling) = &proxy.config.tunneling {
        Box::pin(tunnel::carry(downstream, proxy, (tunneling, asked), &cluster, info, ends, &mut outcome)).await
    } else {
        let dialled = tokio::select! {
            biased;
            upstream = dial(proxy, (&cluster, asked), info, &mut outcome) => upstream.ok_or(None),
            ended = &mut ends => Err(Some(ended)),
            () = downstream.broke() => {
                was_reset = true;
                Err(Some(Ended::Downstream))
            }
        };
        match dialled {
            Ok(mut upstream) => {
                let joined = match (&downstream, &upstream.stream) {
                    (DownstreamStream::Plain(client), UpstreamStream::Tcp(host)) => worker.join(client, host),
                    _ => None,
                };
                let stats = &upstream.cluster.cluster.stats;
                let of_host = Flow {
                    paused: stats.upstream_flow_control_paused_reading_total,
                    resumed: stats.upstream_flow_control_resumed_reading_total,
                };
                let mut relay = Relay::new(proxy.config.idle_timeout, joined, [proxy.stats.flow, of_host]);
                let carrying = Rc::clone(&upstream.cluster);
                let old = carrying.cluster.config.pool.lifetime();
                let mut old = pin!(async {
                    // It is not used again, and a TCP proxy's never is: what is under way goes on, as in Envoy.
                    if let Some(limit) = old {
                        tokio::time::sleep(limit).await;
                        carrying.cluster.stats.upstream_cx_max_duration_reached.inc();
                    }
                    std::future::pending().await
                });
                let ended = tokio::select! {
                    ended = std::future::poll_fn(|cx| relay.poll(cx, &mut downstream, &mut upstream.stream)) => ended,
                    ended = &mut ends => ended,
                    ended = &mut old => ended,
                    () = upstream.host.pool.closed_since(upstream.closings) => Ended::HostFailed,
                };
                upstream.by_host = ended == Ended::Upstream || ended == Ended::Whole && relay.host_was_last;
                (outcome.received, outcome.sent) = relay.end();
                was_reset = relay.was_reset;
                if was_reset {
                    // Otherwise what was cut off would look whole.
                    match ended {
                        Ended::Upstream => downstream.reset_on_close(),
                        _ => upstream.stream.reset_on_close(),
                    }
                }
                Some(ended)
            }
            Err(ended) => ended,
        }
    };
    let Some(ended) = ended else { return outcome };
    match ended {
        Ended::Whole | Ended::Drained | Ended::HostFailed => {}
        Ended::Idle => proxy.stats.idle_timeout.inc(),
        Ended::TooOld => proxy.stats.max_downstream_connection_duration.inc(),
        // Envoy has no flag for that.
        Ended::Downstream if was_reset => {}
        Ended::Downstream => outcome.flags |= ResponseFlags::DC,
        Ended::Upstream if was_reset => outcome.flags |= ResponseFlags::UR,
        Ended::Upstream => outcome.flags |= ResponseFlags::UC,
    }
    // A tunnel's connection counts its own.
    if proxy.config.tunneling.is_none() {
        let stats = &outcome.carried_by.as_ref().unwrap_or(&cluster).cluster.stats;
        stats.upstream_cx_tx_bytes_total.add(outcome.received);
        stats.upstream_cx_rx_bytes_total.add(outcome.sent);
    }
    outcome
}

/// A connection to a host, counted for as long as it lives.
struct Dialed {
    stream: UpstreamStream,
    cluster: Rc<WorkerCluster>,
    host: Rc<WorkerHost>,
    since: Instant,
    /// How often the host's pool had been closed.
    closings: u32,
    /// The host closed it, and not this side.
    by_host: bool,
    _open: Tunnelled,
    /// It counts as one.
    _request: Decrement,
    _issued: Issued,
}

impl Drop for Dialed {
    fn drop(&mut self) {
        let stats = &self.cluster.cluster.stats;
        // As in Envoy it is a request that never ends.
        stats.count_end(self.by_host, true);
        stats.upstream_cx_length_ms.record(self.since.elapsed().as_millis() as u64);
        self.host.end_request();
    }
}

/// A connect that nobody waits for any more: the connection has ended before it was one.
struct GivenUp<'a>(Option<&'a ClusterStats>);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.inspect(|stats| stats.count_end(false, false));
    }
}

/// Connects to a host, and to another one where that fails, as often as is configured.
async fn dial(
    proxy: &TcpProxy,
    (cluster, metadata_match): (&Rc<WorkerCluster>, Option<&MetadataMatch>),
    info: &ConnectionInfo,
    outcome: &mut Outcome,
) -> Option<Dialed> {
    let routed = &cluster.cluster.stats;
    let hash = |policies: &[HashPolicy]| hash_of(policies, None, Some((info.remote, info.local)), &mut Vec::new());
    let of_connection = hash(&proxy.config.hash_policy);
    for attempt in 0..proxy.config.max_connect_attempts {
        proxy.pause(attempt).await;
        let is_full = |cluster: &WorkerCluster| {
            let full = cluster.cluster.is_full(Resource::Connections, false);
            if full {
                cluster.cluster.stats.upstream_cx_overflow.inc();
            }
            full
        };
        if is_full(cluster) {
            outcome.flags |= ResponseFlags::UO;
            return None;
        }
        let pick = PickCx {
            original_dst: info.original_dst,
            host: info.requested_server_name(),
            port: proxy.forward.as_ref().map(|forward| forward.port),
            metadata_match,
            hash: of_connection,
            ..PickCx::default()
        };
        let Some(Chosen { cluster: member, host }) = cluster.choose(pick, hash) else {
            routed.upstream_cx_none_healthy.inc();
            outcome.flags |= ResponseFlags::UH;
            return None;
        };
        // An aggregate's member has limits of its own.
        if !Rc::ptr_eq(cluster, &member) && is_full(&member) {
            outcome.flags |= ResponseFlags::UO;
            return None;
        }
        let (config, stats) = (&member.cluster.config, &member.cluster.stats);
        outcome.host = Some(host.host.display().to_owned());
        outcome.attempts += 1;
        stats.upstream_rq_pending_total.inc();
        let pending = Decrement::after_inc(stats.upstream_rq_pending_active);
        // Counted from the first SYN: connects that hang use up the limit as well.
        let Some(open) = Tunnelled::to(&member, &host).await else {
            outcome.flags |= ResponseFlags::UO;
            return None;
        };
        let closings = host.pool.closings();
        stats.upstream_cx_total.inc();
        host.count(HostCounter::CxTotal, 1);
        let (since, connected) = (Instant::now(), Cell::new(None));
        let peer = member.peer_of_connection(info.requested_server_name());
        let how = Dial {
            socket: SocketSettings::new(config, info.source),
            happy_eyeballs: config.happy_eyeballs,
            limit: config.connect_timeout,
            tls: member.cluster.tls_of(&host.host),
            peer: peer.as_ref(),
            alpn: AlpnFallback::None,
            connected: &connected,
        };
        let stream = {
            let mut given_up = GivenUp(Some(stats));
            let stream = connect(&host.host, how).await;
            given_up.0 = None;
            stream
        };
        match stream {
            Ok(stream) => {
                stats.upstream_cx_connect_ms.record(since.elapsed().as_millis() as u64);
                drop(pending);
                stats.upstream_rq_total.inc();
                host.begin_request();
                host.saw(Seen::ConnectedOnly);
                let issued = Issued::to(&host);
                let told = stream.info(since, connected.get());
                outcome.upstream = Some(Rc::new(told));
                outcome.carried_by = Some(Rc::clone(&member));
                return Some(Dialed {
                    stream,
                    _request: Decrement::after_inc(stats.upstream_rq_active),
                    cluster: member,
                    host,
                    since,
                    closings,
                    by_host: false,
                    _open: open,
                    _issued: issued,
                });
            }
            Err(error) => {
                stats.upstream_rq_pending_failure_eject.inc();
                stats.count_failed_connect(&error);
                host.connect_failed();
                let timed_out = matches!(error, ConnectError::Timeout);
                stats.count_end(!timed_out && !error.is_local(), false);
                if !error.is_local() {
                    host.saw(if timed_out { Seen::TimedOut(504) } else { Seen::ConnectFailed });
                    outcome.flags |= ResponseFlags::UF;
                }
                outcome.transport_failure = error.transport_failure();
                tracing::debug!(connection = info.id, host = %host.host.display(), attempt, %error, "connect failed");
            }
        }
    }
    routed.upstream_cx_connect_attempts_exceeded.inc();
    outcome.flags |= ResponseFlags::URX;
    None
}
