//! `tunneling_config`: a TCP proxy's connections pass to hosts in the bodies of HTTP requests.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::{Instant, SystemTime},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderValue;
use http_body::Frame;
use tokio::io::{AsyncReadExt as _, AsyncWrite as _};

use super::tcp_proxy::{Ended, Outcome, TcpProxy};
use crate::{
    access_log::{Record, ResponseFlags},
    config::model::{AddedValue, MetadataMatch, Tunneling},
    http::{
        body::{BodyError, WrappedBody},
        hash_policy::hash_of,
        tunnel::{self, Target, Tunnel},
    },
    listener::{ConnectionInfo, DownstreamStream},
    upstream::WorkerCluster,
};

/// Bytes read from a client at a time.
const BUFFER: usize = 16 * 1024;

/// A client's connection, which is read by the request's body and written by the proxy.
struct Client {
    stream: RefCell<DownstreamStream>,
    /// There is a tunnel for what it says.
    open: Cell<bool>,
    /// It has broken off.
    broken: Cell<bool>,
    received: Cell<u64>,
    sent: Cell<u64>,
    last_activity: Cell<Instant>,
    /// Who waits for the tunnel, and who for the connection's end.
    reader: RefCell<Option<Waker>>,
    writer: RefCell<Option<Waker>>,
}

impl Client {
    fn passed(&self, count: &Cell<u64>, bytes: usize) {
        count.set(count.get() + bytes as u64);
        self.last_activity.set(Instant::now());
    }
}

/// What a client says, as a request's body.
struct Said {
    client: Rc<Client>,
    /// Without memory while the client says nothing.
    buffer: BytesMut,
}

impl WrappedBody for Said {}

impl http_body::Body for Said {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Said { client, buffer } = &mut *self;
        if !client.open.get() {
            client.reader.replace(Some(cx.waker().clone()));
            return Poll::Pending;
        }
        buffer.reserve(BUFFER);
        let Poll::Ready(read) = pin!(client.stream.borrow_mut().read_buf(buffer)).poll(cx) else {
            *buffer = BytesMut::new();
            return Poll::Pending;
        };
        Poll::Ready(match read {
            Ok(0) => None,
            Ok(read) => {
                client.passed(&client.received, read);
                let data = buffer.split();
                // As it was read, little would hold on to all of the buffer.
                let data = if read < BUFFER / 4 { Bytes::copy_from_slice(&data) } else { data.freeze() };
                Some(Ok(Frame::data(data)))
            }
            Err(error) => {
                client.broken.set(true);
                if let Some(writer) = client.writer.take() {
                    writer.wake();
                }
                Some(Err(error.into()))
            }
        })
    }
}

/// Carries a connection to its end. `ends`: it must not last longer.
pub(super) async fn carry(
    downstream: DownstreamStream,
    proxy: &TcpProxy,
    asked: (&Tunneling, Option<&MetadataMatch>),
    cluster: &Rc<WorkerCluster>,
    info: &ConnectionInfo,
    ends: impl Future<Output = Ended>,
    outcome: &mut Outcome,
) -> Option<Ended> {
    let client = Rc::new(Client {
        stream: RefCell::new(downstream),
        open: Cell::new(false),
        broken: Cell::new(false),
        received: Cell::new(0),
        sent: Cell::new(0),
        last_activity: Cell::new(Instant::now()),
        reader: RefCell::default(),
        writer: RefCell::default(),
    });
    let mut ends = pin!(ends);
    #[expect(clippy::await_holding_refcell_ref, reason = "before there is a tunnel nobody else has the connection")]
    let broke = async { client.stream.borrow().broke().await };
    let mut tunnel = tokio::select! {
        biased;
        tunnel = dial(proxy, asked, cluster, info, &client, outcome) => tunnel?,
        ended = &mut ends => return Some(ended),
        () = broke => return Some(Ended::Downstream),
    };
    let (host, upstream) = tunnel.upstream();
    outcome.host = Some(host.host.display().to_owned());
    outcome.upstream = Some(Rc::clone(upstream));
    client.open.set(true);
    if let Some(reader) = client.reader.take() {
        reader.wake();
    }
    let idle = async {
        let Some(limit) = proxy.config.idle_timeout else { return std::future::pending().await };
        loop {
            let left = limit.saturating_sub(client.last_activity.get().elapsed());
            if left.is_zero() {
                return Ended::Idle;
            }
            tokio::time::sleep(left).await;
        }
    };
    let mut pending = Bytes::new();
    let ended = tokio::select! {
        ended = poll_fn(|cx| poll(&client, &mut tunnel, &mut pending, cx)) => ended,
        ended = idle => ended,
        ended = &mut ends => ended,
    };
    (outcome.received, outcome.sent) = (client.received.get(), client.sent.get());
    Some(ended)
}

/// Hands on what comes out of the tunnel.
fn poll(client: &Client, tunnel: &mut Tunnel, pending: &mut Bytes, cx: &mut Context<'_>) -> Poll<Ended> {
    client.writer.replace(Some(cx.waker().clone()));
    loop {
        let mut stream = client.stream.borrow_mut();
        let written = if pending.is_empty() {
            Pin::new(&mut *stream).poll_flush(cx).map_ok(|()| 0)
        } else {
            Pin::new(&mut *stream).poll_write(cx, pending)
        };
        drop(stream);
        match written {
            // Nothing was left to write: that is no activity.
            Poll::Ready(Ok(0)) if pending.is_empty() => {}
            Poll::Ready(Ok(written)) => {
                client.passed(&client.sent, written);
                pending.advance(written);
            }
            Poll::Ready(Err(_)) => return Poll::Ready(Ended::Downstream),
            Poll::Pending => {
                // A client that does not read may still have something to say.
                tunnel.send_on(cx);
                return Poll::Pending;
            }
        }
        if client.broken.get() {
            return Poll::Ready(Ended::Downstream);
        }
        if !pending.is_empty() {
            continue;
        }
        match ready!(tunnel.poll_frame(cx)) {
            Some(Ok(frame)) => *pending = frame.into_data().unwrap_or_default(),
            Some(Err(_)) => return Poll::Ready(Ended::Upstream),
            None => {
                // A client that is gone already needs no half-close.
                let _ = ready!(Pin::new(&mut *client.stream.borrow_mut()).poll_shutdown(cx));
                return Poll::Ready(Ended::Whole);
            }
        }
    }
}

/// Asks a host for a tunnel, and another one where it refuses, as often as is configured.
async fn dial(
    proxy: &TcpProxy,
    (tunneling, metadata_match): (&Tunneling, Option<&MetadataMatch>),
    cluster: &Rc<WorkerCluster>,
    info: &ConnectionInfo,
    client: &Rc<Client>,
    outcome: &mut Outcome,
) -> Option<Tunnel> {
    let record = Record {
        missing: "",
        start: SystemTime::now(),
        upstream_cluster: Some(&cluster.cluster.config.name),
        ..info.record()
    };
    let host = match &tunneling.hostname {
        AddedValue::Literal(host) => host.clone(),
        AddedValue::Format(format) => format.value(&record).unwrap_or(HeaderValue::from_static("")),
    };
    let hash = hash_of(&proxy.config.hash_policy, None, Some((info.remote, info.local)), &mut Vec::new());
    for attempt in 0..proxy.config.max_connect_attempts {
        proxy.pause(attempt).await;
        let (host, post_path) = (host.clone(), tunneling.post_path.as_ref());
        let target = Target { host, post_path, headers: &tunneling.headers, record: &record, metadata_match, hash };
        let said = Said { client: Rc::clone(client), buffer: BytesMut::new() };
        match tunnel::open(cluster, info.source, target, said).await {
            Ok(tunnel) => return Some(tunnel),
            Err(flags) => {
                outcome.flags |= flags;
                if flags != ResponseFlags::UF {
                    return None;
                }
            }
        }
    }
    cluster.cluster.stats.upstream_cx_connect_attempts_exceeded.inc();
    outcome.flags |= ResponseFlags::URX;
    None
}
