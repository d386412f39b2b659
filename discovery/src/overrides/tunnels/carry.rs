//! One tunnel: its port at discovery, and what comes in there on its way through the connection of the developer's machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};
use tracing::debug;

use super::{IDLE, PATIENCE, PING, PING_TIMEOUT, Place, SEND_BUFFER, STREAM_WINDOW, TUNNEL_WINDOW, Traffic, relay};

/// How many connections may wait to be taken.
pub(super) const BACKLOG: u32 = 1024;

impl Place {
    /// Runs the tunnel to its end; says why it ended.
    pub(super) async fn serve(&self, upgrade: OnUpgrade, most: usize) -> &'static str {
        let Ok(Ok(upgraded)) = timeout(PATIENCE, upgrade).await else { return "the connection was not handed over" };
        let handshake = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(TUNNEL_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .handshake::<_, Empty<Bytes>>(upgraded);
        let Ok(Ok((requests, connection))) = timeout(PATIENCE, handshake).await else {
            return "it does not speak HTTP/2";
        };
        tokio::pin!(connection);
        let (mut replaced, mut shutdown) = (self.replaced.clone(), self.tunnels.0.shutdown.clone());
        tokio::select! {
            _ = &mut connection => return "closed",
            () = turned(&mut replaced) => return "the same client has opened it anew",
            () = turned(&mut shutdown) => return "discovery ends",
            () = sleep_until(self.port.from) => {}
        }
        let Ok(listener) = self.port.listen() else { return "its port is taken" };
        self.tunnels.ports().told(self.port.number, &self.key);
        if let Some(tunnel) = self.tunnels.open().get_mut(&self.key)
            && Arc::ptr_eq(&tunnel.traffic, &self.traffic)
        {
            tunnel.listed = true;
        }
        self.tunnels.0.changes.send_modify(|count| *count += 1);
        // Ended with the tunnel: dropped.
        let mut carried = JoinSet::new();
        loop {
            tokio::select! {
                // What comes in when another one has the port is for that one.
                biased;
                () = turned(&mut replaced) => return "the same client has opened it anew",
                _ = &mut connection => return "closed",
                () = turned(&mut shutdown) => return "discovery ends",
                Some(_) = carried.join_next() => {}
                accepted = listener.accept() => {
                    let Ok((stream, peer)) = accepted else {
                        // Out of file descriptors, for example: not to be retried in a busy loop.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    };
                    if carried.len() >= most {
                        self.traffic.refused.fetch_add(1, Ordering::Relaxed);
                        debug!("tunnel for revision {}: {most} connections are open, {peer} is refused", self.key.revision);
                        continue;
                    }
                    let traffic = Arc::clone(&self.traffic);
                    carried.spawn(carry(requests.clone(), stream, peer, traffic));
                }
            }
        }
    }
}

/// Waits until something turns true. That whoever could turn it is gone is as good.
async fn turned(is: &mut watch::Receiver<bool>) {
    let _ = is.wait_for(|is| *is).await;
}

/// Counts a connection while it is open.
struct Open(Arc<Traffic>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Carries one connection of a proxy through the tunnel.
async fn carry(mut requests: SendRequest<Empty<Bytes>>, stream: TcpStream, peer: SocketAddr, traffic: Arc<Traffic>) {
    traffic.open.fetch_add(1, Ordering::Relaxed);
    traffic.total.fetch_add(1, Ordering::Relaxed);
    let _open = Open(Arc::clone(&traffic));
    // A proxy's node that is gone says nothing any more. That a socket cannot be set up so is no reason not to use it.
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10));
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
    let _ = stream.set_nodelay(true);
    let begin = async {
        let request = Request::connect("localhost:80").header("x-forwarded-for", peer.to_string()).body(Empty::new());
        let response = requests.send_request(request.ok()?).await.ok()?;
        if response.status() != StatusCode::OK {
            return None;
        }
        hyper::upgrade::on(response).await.ok()
    };
    match timeout(PATIENCE, begin).await {
        Ok(Some(upgraded)) => {
            relay::relay(TokioIo::new(upgraded), stream, IDLE).await;
        }
        _ => {
            traffic.refused.fetch_add(1, Ordering::Relaxed);
        }
    }
}
