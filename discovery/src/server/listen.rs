//! The port at which xDS is served: accepts connections and hands on their requests.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use super::{Xds, asked};

/// A client that answers no ping for this long is gone.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// How much of what a client does not read may wait for it, in bytes. Resources in it are shared.
const SEND_BUFFER: usize = 64 * 1024;

impl Xds {
    /// Serves on `listener` until shutdown.
    ///
    /// # Errors
    /// Never at present: connections that cannot be accepted are tried again.
    pub async fn serve(self, listener: TcpListener) -> io::Result<()> {
        let mut shutdown = self.shutdown.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = asked(&mut shutdown) => return Ok(()),
            };
            match accepted {
                Ok((connection, peer)) => {
                    let _ = connection.set_nodelay(true);
                    tokio::spawn(self.clone().connection(connection, peer));
                }
                Err(error) => {
                    // Out of file descriptors, for example: not to be retried in a busy loop.
                    warn!("cannot accept xDS clients: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(self, connection: TcpStream, peer: SocketAddr) {
        let mut shutdown = self.shutdown.clone();
        let service = service_fn(|request| {
            let xds = self.clone();
            async move { Ok::<_, Infallible>(xds.answer(request, peer).await) }
        });
        let mut server = auto::Builder::new(TokioExecutor::new());
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
            debug!("xDS: {peer}: {error}");
        }
    }
}
