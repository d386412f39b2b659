//! One attempt: a connection to its host, the request as that host shall see it, and the response's head.

use std::{cell::Cell, rc::Rc, time::Instant};

use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::{
    Shared,
    failed::{Failed, connect_failed, reset, unsendable},
};
use crate::{
    access_log::ResponseFlags,
    config::model::HostRewrite,
    http::{
        body::Body,
        codec::{Incoming, h1::Upgrade},
        forward::{Original, set_host},
        headers::names::*,
        illegal,
        retry::Failure,
        stream::{HostRewritten, RequestHead, UploadFlow},
        stream_end::Notes,
        upgrade,
        upstream_head::{protocol, set_scheme, to_http1, to_http2},
    },
    upstream::{
        Chosen, Client, Connection, HostCounter, PoolError, ResetReason, Seen, Wanted, WorkerCluster, WorkerHost,
    },
};

impl Shared<'_> {
    /// One attempt. `late`: it is told where an answer takes longer than it may, and the attempt goes on.
    #[inline(always)]
    pub(in crate::http) async fn attempt(
        self,
        (notes, until): (&Notes, &Cell<Option<Instant>>),
        Chosen { cluster, host }: &Chosen,
        (mut head, body): (RequestHead, Body),
        number: u32,
        late: Option<&dyn Fn()>,
    ) -> Result<(Response<Incoming>, Connection), Failed> {
        let (source, high) = (self.cx.source, self.action.high_priority);
        if self.cx.route.as_ref().is_some_and(|route| route.virtual_host().include_request_attempt_count) {
            head.headers.insert(X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(number));
        }
        notes.sizes.as_ref().inspect(|sizes| sizes.request(&head));
        let terminated = upgrade::terminated(self.action, &head.method);
        let wanted = if terminated.is_some() { Wanted::Tcp } else { protocol(cluster, &head) };
        let client = Client { id: self.cx.connection.id, pools: &self.cx.connection.pools };
        let connection = match host.acquire(cluster, wanted, (source, self.peer, Some(client)), high).await {
            Ok(connection) => connection,
            Err(error) => {
                if let PoolError::Connect(_) = &error {
                    cluster.cluster.stats.upstream_rq_pending_failure_eject.inc();
                    self.note_tunnel();
                }
                notes.refused.set(matches!(error, PoolError::TooManyRequests));
                let failed = connect_failed(error, head, body);
                notes.transport_failure.set(failed.transport.clone());
                return Err(failed);
            }
        };
        notes.upstream.set(Some(Rc::clone(connection.info())));
        cluster.cluster.stats.upstream_rq_total.inc();
        notes.count(|stats| stats.upstream_rq_total.inc());
        if let Some(connect) = terminated {
            let (from, to) = (self.cx.connection.remote, self.cx.connection.local);
            let first = connect.proxy_protocol.map(|version| upgrade::proxy_protocol(version, from, to));
            let mut response = connection.tunnel(first.unwrap_or_default(), body);
            response.extensions_mut().insert(Upgrade);
            return Ok((response, connection));
        }
        self.cx.progress.upstream_protocol.set(Some(connection.protocol()));
        let routed = &self.cluster.cluster.stats;
        self.cx.progress.upload.set(Some(UploadFlow {
            backed_up: routed.upstream_flow_control_backed_up_total,
            drained: routed.upstream_flow_control_drained_total,
        }));
        if let Some(reply) = illegal::refusal(&head) {
            self.cx.progress.instead.replace(Some(Box::new(reply)));
            return Err(unsendable());
        }
        let connects = head.method == Method::CONNECT;
        let upgrade = head.extensions.get::<Upgrade>().is_some() && !connects;
        let mut request = self.upstream_request(host, (head, body), notes, connection.is_http2());
        if connection.is_http2() && !connects && self.scheme_matches_upstream {
            set_scheme(request.uri_mut(), connection.info().tls.is_some());
        }
        let stats = &cluster.cluster.stats;
        let mut limit = self.timeouts.of_try(cluster.cluster.config.max_stream_duration, &self.cx.progress);
        until.set(limit.until);
        self.cx.progress.sent_first.set(Some(limit.since));
        let sent = {
            let mut sending = std::pin::pin!(connection.send(request, |status, headers| {
                if !self.cx.progress.health_check.get() {
                    notes.charge(self.cluster, status, (self.cx.internal, host.host.answers_as_canary(&headers)));
                }
                self.cx.progress.interim(status, headers);
            }));
            tokio::select! {
                biased;
                sent = &mut sending => sent,
                failure = limit.expired() => match late.filter(|_| failure == Failure::PerTryTimeout) {
                    None => return Err(self.timed_out(cluster, host, failure)),
                    Some(late) => {
                        host.saw(Seen::TimedOut(self.timeouts.status.as_u16()));
                        late();
                        sending.await
                    }
                },
            }
        };
        match sent {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrade => Err(Failed {
                failure: Failure::AfterRequest,
                reason: "protocol error",
                transport: None,
                status: StatusCode::BAD_GATEWAY,
                flags: ResponseFlags::UPE,
                request: None,
                stale: false,
                gone_away: false,
            }),
            Ok(response) => {
                notes.sizes.as_ref().inspect(|sizes| sizes.response(response.status(), response.headers()));
                Ok((response, connection))
            }
            Err(error) => {
                if error.reason == ResetReason::Protocol && !connection.counts_streams() {
                    stats.upstream_cx_protocol_error.inc();
                }
                Err(reset(error, connection.reused))
            }
        }
    }

    /// If it was in a tunnel that nobody could be connected to, the next requests need not try.
    fn note_tunnel(self) {
        if let (Some(address), Some(_), false) =
            (self.cx.override_dst, &self.cx.unless_connected, self.cx.progress.left_tunnel.get())
        {
            self.cx.worker.overrides.tunnel_failed(address, Instant::now());
        }
    }

    /// The request as this host shall see it.
    fn upstream_request(
        &self,
        host: &WorkerHost,
        (mut head, mut body): (RequestHead, Body),
        notes: &Notes,
        http2: bool,
    ) -> Request<Body> {
        let name = Some(host.host.hostname()).filter(|name| !name.is_empty());
        if let (HostRewrite::Auto, Some(name)) = (&self.action.host_rewrite, name)
            && let Ok(name) = HeaderValue::from_str(name)
        {
            let suppress = self.cx.suppress_envoy_headers;
            let forwarded = self.action.append_x_forwarded_host;
            self.cx.progress.host_rewritten.set(Some(HostRewritten { forwarded, suppress }));
            let original = if suppress { Original::Untold } else { Original::Told };
            set_host(&mut head, name, forwarded, original);
        }
        if let Some(sizes) = &notes.sizes {
            sizes.request(&head);
            body = sizes.counting(body);
        }
        if http2 {
            to_http2(&mut head);
        } else {
            to_http1(&mut head);
        }
        Request::from_parts(head, body)
    }

    fn timed_out(&self, cluster: &WorkerCluster, host: &WorkerHost, failure: Failure) -> Failed {
        let stats = &self.cluster.cluster.stats;
        if failure == Failure::MaxDuration {
            cluster.cluster.stats.upstream_rq_max_duration_reached.inc();
            let complete = self.cx.progress.request_complete.get().is_some();
            let status = if complete { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::REQUEST_TIMEOUT };
            let (reason, flags) = ("local reset", ResponseFlags::UMSDR);
            return Failed {
                failure,
                reason,
                transport: None,
                status,
                flags,
                request: None,
                stale: false,
                gone_away: false,
            };
        }
        if failure == Failure::PerTryIdleTimeout {
            stats.upstream_rq_per_try_idle_timeout.inc();
        } else {
            stats.upstream_rq_per_try_timeout.inc();
        }
        host.count(HostCounter::RqTimeout, 1);
        host.saw(Seen::TimedOut(self.timeouts.status.as_u16()));
        let (status, reason, flags) = (self.timeouts.status, "upstream request timeout", ResponseFlags::UT);
        Failed { failure, reason, transport: None, status, flags, request: None, stale: false, gone_away: false }
    }
}
