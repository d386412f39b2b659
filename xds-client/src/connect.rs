//! Connections to servers: TCP or a Unix domain socket, plain or with TLS.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::TlsConnector;

use crate::source::{Server, Tls, Usage};

/// TCP keepalive finds out that the server's host or the way to it is gone: after 10 s idle, 5 probes 2 s apart.
const TCP_KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(2), 5);

/// A connection.
pub(crate) struct Connection {
    stream: Box<dyn Stream>,
    heard: Option<Arc<Heard>>,
    _counted: Option<Counted>,
}

impl Connection {
    /// What the server says first is noted there.
    pub(crate) fn heard_by(self, heard: Arc<Heard>) -> Connection {
        heard.note(&[]);
        Connection { heard: Some(heard), ..self }
    }
}

/// What a server says first: it tells what it is where it is not what was expected.
#[derive(Debug, Default)]
pub(crate) struct Heard(Mutex<Option<Vec<u8>>>);

/// What begins with a few bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    /// There was no connection.
    NotConnected,
    /// Nothing was said.
    Nothing,
    /// A response in HTTP/1.
    Http1,
    /// An alert of TLS.
    TlsAlert,
    /// Anything else, such as HTTP/2.
    Other,
}

impl Heard {
    /// As many bytes as it takes to tell.
    const ENOUGH: usize = 5;

    /// Whether it wants to hear more.
    fn note(&self, bytes: &[u8]) -> bool {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let heard = heard.get_or_insert_default();
        heard.extend_from_slice(&bytes[..bytes.len().min(Self::ENOUGH.saturating_sub(heard.len()))]);
        heard.len() < Self::ENOUGH
    }

    /// What was heard.
    pub(crate) fn first(&self) -> First {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_deref() {
            None => First::NotConnected,
            Some([]) => First::Nothing,
            Some(b"HTTP/") => First::Http1,
            Some([0x15, 3, ..]) => First::TlsAlert,
            Some(_) => First::Other,
        }
    }
}

/// A connection, or an attempt at one, that its server's cluster counts.
struct Counted {
    usage: Arc<dyn Usage>,
    since: Instant,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.usage.closed(self.since.elapsed());
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("it took longer than connect_timeout ({0:?})")]
    Timeout(Duration),
    #[error("{0}")]
    Connect(io::Error),
    #[error("the connection is lost")]
    Lost,
    #[error("the TLS handshake failed: {}", crate::tls_error::describe(.0))]
    Handshake(io::Error),
    #[error("its certificates have not arrived yet")]
    NoCertificates,
    #[error("it agreed on the protocol {0:?} instead of {1:?}")]
    Protocol(String, &'static str),
}

/// Connects to `address`, one of the server's: host:port, or `unix:` and a path. `authority` is what calls it, `protocol` what is going
/// to be spoken, in ALPN's spelling.
pub(crate) async fn connect(
    server: &Server,
    address: &str,
    authority: &str,
    protocol: &'static str,
) -> Result<Connection, ConnectError> {
    let limit = server.connect_timeout;
    let counted = server.usage.clone().map(|usage| {
        usage.connecting(protocol == "h2");
        Counted { usage, since: Instant::now() }
    });
    let connection = tokio::time::timeout(limit, open(server.tls.as_deref(), (address, authority), protocol)).await;
    let connection = connection.unwrap_or(Err(ConnectError::Timeout(limit)));
    if let Some(Counted { usage, since }) = &counted {
        match &connection {
            Ok(_) => usage.connected(since.elapsed()),
            Err(error) => usage.failed(matches!(error, ConnectError::Timeout(_))),
        }
    }
    connection.map(|stream| Connection { stream, heard: None, _counted: counted })
}

async fn open(
    tls: Option<&dyn Tls>,
    names: (&str, &str),
    protocol: &'static str,
) -> Result<Box<dyn Stream>, ConnectError> {
    let address = names.0;
    if let Some(path) = address.strip_prefix("unix:") {
        let stream = UnixStream::connect(path).await.map_err(ConnectError::Connect)?;
        // Without an address of its own: any will do, none is sent.
        return secure(tls, names, std::net::Ipv4Addr::LOCALHOST.into(), stream, protocol).await;
    }
    let stream = connect_to_any(address).await.map_err(ConnectError::Connect)?;
    let peer = stream.peer_addr().map_err(ConnectError::Connect)?.ip();
    stream.set_nodelay(true).map_err(ConnectError::Connect)?;
    let (idle, interval, retries) = TCP_KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(retries);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive).map_err(ConnectError::Connect)?;
    secure(tls, names, peer, stream, protocol).await
}

/// Connects to one of the addresses of a name. Which one is tried first is left to chance, so that clients are spread over them
/// however the name is resolved.
async fn connect_to_any(address: &str) -> io::Result<TcpStream> {
    let mut addresses: Vec<_> = tokio::net::lookup_host(address).await?.collect();
    fastrand::shuffle(&mut addresses);
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn secure<T: Stream + 'static>(
    tls: Option<&dyn Tls>,
    (address, authority): (&str, &str),
    peer: std::net::IpAddr,
    stream: T,
    protocol: &'static str,
) -> Result<Box<dyn Stream>, ConnectError> {
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let (mut config, name) = tls.handshake(authority, address, peer).ok_or(ConnectError::NoCertificates)?;
    if config.alpn_protocols.is_empty() {
        let config: &mut ClientConfig = Arc::make_mut(&mut config);
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    }
    let stream = TlsConnector::from(config).connect(name, stream).await;
    tls.done(stream.as_ref().map(|stream| stream.get_ref().1));
    let stream = stream.map_err(ConnectError::Handshake)?;
    match stream.get_ref().1.alpn_protocol() {
        Some(agreed) if agreed != protocol.as_bytes() => {
            Err(ConnectError::Protocol(String::from_utf8_lossy(agreed).into_owned(), protocol))
        }
        _ => Ok(Box::new(stream)),
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        if let Some(heard) = &self.heard
            && !heard.note(&buffer.filled()[before..])
        {
            self.heard = None;
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
