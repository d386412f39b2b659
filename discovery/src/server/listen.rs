//! The port at which xDS is served: accepts connections and hands on their requests.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use super::tls::{Identity, Tls};
use super::{Peer, Xds, asked};

/// A client that answers no ping for this long is gone.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long a client may take for TLS, and for the head of a request over HTTP/1.1.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// How much of what a client does not read may wait for it, in bytes. Resources in it are shared.
const SEND_BUFFER: usize = 64 * 1024;

impl Xds {
    /// Serves on `listener` until shutdown, with TLS if there is any.
    ///
    /// # Errors
    /// Never at present: connections that cannot be accepted are tried again.
    pub async fn serve(self, listener: TcpListener, mut tls: Option<Tls>) -> io::Result<()> {
        let mut shutdown = self.shutdown.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = asked(&mut shutdown) => return Ok(()),
            };
            match accepted {
                Ok((connection, peer)) => {
                    let _ = connection.set_nodelay(true);
                    match &mut tls {
                        None => {
                            let peer = Peer { address: peer, identity: Arc::default() };
                            tokio::spawn(self.clone().connection(connection, peer));
                        }
                        Some(tls) => {
                            let acceptor = TlsAcceptor::from(tls.current());
                            tokio::spawn(self.clone().secure_connection(connection, peer, acceptor));
                        }
                    }
                }
                Err(error) => {
                    // Out of file descriptors, for example: not to be retried in a busy loop.
                    warn!("cannot accept xDS clients: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn secure_connection(self, connection: TcpStream, address: SocketAddr, acceptor: TlsAcceptor) {
        let failed = |error: &dyn std::fmt::Display| {
            self.authorization.handshake_failed();
            info!("client {address}: no TLS: {error}");
        };
        match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(connection)).await {
            Ok(Ok(connection)) => {
                let identity = Arc::new(Identity::of(connection.get_ref().1.peer_certificates()));
                self.connection(connection, Peer { address, identity }).await;
            }
            Ok(Err(error)) => failed(&error),
            Err(_) => failed(&format!("it took longer than {} s", HANDSHAKE_TIMEOUT.as_secs())),
        }
    }

    async fn connection(self, connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, peer: Peer) {
        let mut shutdown = self.shutdown.clone();
        let address = peer.address;
        let service = service_fn(|request| {
            let (xds, peer) = (self.clone(), peer.clone());
            async move { Ok::<_, Infallible>(xds.answer(request, peer).await) }
        });
        let mut server = auto::Builder::new(TokioExecutor::new());
        server.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE_TIMEOUT);
        server
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(Some(KEEPALIVE_INTERVAL))
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .max_send_buf_size(SEND_BUFFER);
        let serving = server.serve_connection(TokioIo::new(connection), service);
        tokio::pin!(serving);
        let served = tokio::select! {
            served = &mut serving => served,
            () = asked(&mut shutdown) => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = served {
            debug!("xDS: {address}: {error}");
        }
    }
}
