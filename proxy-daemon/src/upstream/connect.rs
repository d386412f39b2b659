//! Opens connections to hosts.

use std::{
    cell::Cell,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    os::fd::AsRawFd,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::client::TlsStream;

use super::{Host, happy_eyeballs};
use crate::{
    config::model::{ClusterConfig, EndpointAddress, HappyEyeballs, OriginalSrc, TcpKeepalive, UpstreamBind},
    intercept::{mark, node_addresses, pod_families},
    tls::{AlpnFallback, ClientTls, PeerName, TlsInfo},
};

/// A connection to a host.
#[derive(Debug)]
pub enum UpstreamStream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Through TLS, over one of the others.
    Tls(Box<TlsStream<UpstreamStream>>),
}

/// What access logs tell of a connection to a host.
#[derive(Debug)]
pub struct UpstreamInfo {
    /// Our own end's address; `None` on Unix sockets.
    pub local: Option<SocketAddr>,
    /// What the TLS handshake came to.
    pub tls: Option<TlsInfo>,
    /// Unique in the process.
    pub id: u64,
    /// When it was begun, was there, and had its TLS handshake.
    pub times: [Option<Instant>; 3],
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// `connect_timeout` passed.
    #[error("connection timeout")]
    Timeout,
    /// The host, or the way to it, refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The system refused at once to connect to this address.
    #[error("{0}: {1}")]
    Unreachable(SocketAddr, io::Error),
    /// There is no socket with this source address.
    #[error("{}", bind_failed(*.0, .1))]
    Bind(SocketAddr, io::Error),
    /// There is no socket with the options that are configured.
    #[error("cannot make a socket: {0}")]
    Socket(io::Error),
    /// The TLS handshake failed, or cannot begin yet.
    #[error("TLS: {}", culvert_xds_client::tls_error::describe(.0))]
    Tls(io::Error),
}

impl ConnectError {
    /// What the transport says of it, as access logs show it; `None` where that is nothing more.
    pub fn transport_failure(&self) -> Option<String> {
        match self {
            ConnectError::Timeout | ConnectError::Socket(_) => None,
            ConnectError::Io(error) => Some(format!("delayed connect error: {}", worded(error))),
            ConnectError::Unreachable(address, error) => {
                Some(format!("immediate connect error: {}|remote address:{address}", worded(error)))
            }
            ConnectError::Bind(address, error) => Some(bind_failed(*address, error)),
            // In Envoy's frame, with the words of another library.
            ConnectError::Tls(error) => {
                Some(format!("TLS_error:|{}:TLS_error_end", culvert_xds_client::tls_error::describe(error)))
            }
        }
    }
}

impl ConnectError {
    /// It is this side's doing: no host has been asked for anything.
    pub fn is_local(&self) -> bool {
        matches!(self, ConnectError::Bind(..) | ConnectError::Socket(_))
    }
}

fn bind_failed(address: SocketAddr, error: &io::Error) -> String {
    format!("failed to bind to {address}: {}", worded(error))
}

/// As the system words it, without the number.
fn worded(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// How a connection is made.
#[derive(Debug, Clone, Copy)]
pub struct Dial<'a> {
    /// What its socket is like.
    pub socket: SocketSettings<'a>,
    /// Limit of all of it, the TLS handshake included.
    pub limit: Duration,
    /// The cluster's transport socket; `None`: plain.
    pub tls: Option<&'a ClientTls>,
    /// What a request calls the host, where the handshake goes by that.
    pub peer: Option<&'a PeerName>,
    /// Which of the host's addresses come first.
    pub happy_eyeballs: HappyEyeballs,
    /// What is offered in the handshake.
    pub alpn: AlpnFallback,
    /// Told when the connection is there, before its TLS handshake.
    pub connected: &'a Cell<Option<Instant>>,
}

/// What the socket of a connection is like.
#[derive(Debug, Clone, Copy, Default)]
pub struct SocketSettings<'a> {
    /// The source address that it keeps: wins over that of `bind`.
    pub source: Option<Source>,
    /// As the cluster has it.
    pub bind: Option<&'a UpstreamBind>,
    /// As the cluster has it.
    pub keepalive: Option<&'a TcpKeepalive>,
}

impl<'a> SocketSettings<'a> {
    /// As a cluster has it, for a connection that keeps this source address.
    pub fn new(config: &'a ClusterConfig, source: Option<Source>) -> SocketSettings<'a> {
        SocketSettings { source, bind: config.bind.as_deref(), keepalive: config.tcp_keepalive.as_ref() }
    }
}

/// The source address that an upstream connection keeps, where the listener asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The client's address.
    pub address: IpAddr,
    /// SO_MARK; 0 sets none.
    pub mark: u32,
}

impl Source {
    /// For a connection from `client` through a listener with `original_src`.
    pub fn new(original_src: OriginalSrc, client: IpAddr) -> Source {
        Source { address: client.to_canonical(), mark: original_src.mark }
    }
}

/// Connects to a host.
///
/// # Errors
/// Why there is no connection.
pub async fn connect(host: &Host, dial: Dial<'_>) -> Result<UpstreamStream, ConnectError> {
    let attempt = async {
        let stream = match &host.address {
            EndpointAddress::Ip(first) if !host.additional_addresses().is_empty() => {
                let all = happy_eyeballs::order(*first, host.additional_addresses(), dial.happy_eyeballs);
                // The others cost nothing where there are none.
                Box::pin(happy_eyeballs::race(all, |address| connect_tcp(address, dial.socket))).await?
            }
            address => connect_plain(address, dial.socket).await?,
        };
        dial.connected.set(Some(Instant::now()));
        match dial.tls {
            None => Ok(stream),
            Some(tls) => secure(tls, stream, (&host.address, host.hostname()), (dial.alpn, dial.peer)).await,
        }
    };
    match tokio::time::timeout(dial.limit, attempt).await {
        Ok(result) => result,
        Err(_elapsed) => Err(ConnectError::Timeout),
    }
}

/// Connects without TLS and without a limit.
///
/// # Errors
/// What the system says.
pub(super) async fn connect_plain(
    address: &EndpointAddress,
    how: SocketSettings<'_>,
) -> Result<UpstreamStream, ConnectError> {
    match address {
        EndpointAddress::Ip(address) => connect_tcp(*address, how).await,
        EndpointAddress::Pipe(path) => Ok(UpstreamStream::Unix(UnixStream::connect(path).await?)),
        EndpointAddress::Dns { host, .. } => {
            Err(ConnectError::Io(io::Error::other(format!("{host} has not been looked up"))))
        }
    }
}

/// Ports of connections that keep a client's address: below those that systems give out by default. If the client has a connection
/// of its own to the same server, past the daemon, it has another port: with the same one both would get the answers of one.
const APART: RangeInclusive<u16> = 10_240..=29_999;
/// How many of them are tried before the kernel chooses any.
const TRIES: usize = 8;

async fn connect_tcp(address: SocketAddr, how: SocketSettings<'_>) -> Result<UpstreamStream, ConnectError> {
    let how = SocketSettings { source: how.source.and_then(|source| lent(source, address)), ..how };
    let mut tries = if how.source.is_some() { TRIES } else { 0 };
    let socket = loop {
        let port = if tries > 0 { fastrand::u16(APART) } else { 0 };
        match begin_tcp(address, how, port) {
            Err(ConnectError::Bind(_, error) | ConnectError::Unreachable(_, error))
                if port != 0 && matches!(error.raw_os_error(), Some(libc::EADDRINUSE | libc::EADDRNOTAVAIL)) =>
            {
                tries -= 1;
            }
            result => break result?,
        }
    };
    let stream = TcpStream::from_std(socket.into())?;
    stream.writable().await?;
    match stream.take_error()? {
        None => Ok(UpstreamStream::Tcp(stream)),
        Some(error) => Err(ConnectError::Io(error)),
    }
}

/// Encrypts a connection to the host at this address, of this name. `how`: what is offered, and what a request calls the host.
///
/// # Errors
/// The handshake failed, or cannot begin yet.
pub(super) async fn secure(
    tls: &ClientTls,
    stream: UpstreamStream,
    (address, name): (&EndpointAddress, &str),
    how: (AlpnFallback, Option<&PeerName>),
) -> Result<UpstreamStream, ConnectError> {
    let address = match address {
        EndpointAddress::Ip(address) => address.ip(),
        // No name is made of it: rustls only wants one to remember sessions by.
        EndpointAddress::Dns { .. } | EndpointAddress::Pipe(_) => Ipv4Addr::UNSPECIFIED.into(),
    };
    let stream = tls.connect(stream, name, address, how).await.map_err(ConnectError::Tls)?;
    Ok(UpstreamStream::Tls(Box::new(stream)))
}

/// A socket that connects. `port`: its own, where it keeps a client's address; 0: the kernel chooses.
fn begin_tcp(to: SocketAddr, how: SocketSettings<'_>, port: u16) -> Result<Socket, ConnectError> {
    let SocketSettings { source, bind, keepalive } = how;
    let socket = plain_socket(to, keepalive).map_err(ConnectError::Socket)?;
    if let Some(bind) = bind {
        bind_as_configured(&socket, to, bind, source.is_none())?;
    }
    if let Some(source) = source {
        bind_to_source(&socket, source, port)?;
    }
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(ConnectError::Unreachable(to, error)),
        _ => Ok(socket),
    }
}

/// The address that a connection keeps, of the family of the one that it goes to: a pod may have both. `None`: it is made in the node's name.
fn lent(source: Source, to: SocketAddr) -> Option<Source> {
    let address = match source.address.is_ipv4() == to.is_ipv4() {
        true => source.address,
        false => pod_families::other(source.address)?,
    };
    can_lend(address, to).then_some(Source { address, ..source })
}

/// Whether a connection to an address can be made in the client's name; where not, it is made in the node's.
fn can_lend(client: IpAddr, to: SocketAddr) -> bool {
    let host = to.ip().to_canonical();
    // As a pod is that calls its own service: it would take what comes from its own address for forged.
    let is_itself = client == host;
    // A program of the node would answer the pod, to which its packets go straight, and not this daemon.
    let is_of_node = node_addresses::include(host) && !node_addresses::include(client);
    client.is_ipv4() == to.is_ipv4() && !is_itself && !is_of_node && !node_addresses::translates(host)
}

fn plain_socket(to: SocketAddr, keepalive: Option<&TcpKeepalive>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if let Some(keepalive) = keepalive {
        let mut settings = socket2::TcpKeepalive::new();
        if let Some(time) = keepalive.time {
            settings = settings.with_time(time);
        }
        if let Some(interval) = keepalive.interval {
            settings = settings.with_interval(interval);
        }
        if let Some(probes) = keepalive.probes {
            settings = settings.with_retries(probes);
        }
        socket.set_tcp_keepalive(&settings)?;
    }
    Ok(socket)
}

/// Sets a cluster's own options; binds to its address where it `may_bind`.
fn bind_as_configured(
    socket: &Socket,
    to: SocketAddr,
    bind: &UpstreamBind,
    may_bind: bool,
) -> Result<(), ConnectError> {
    let (source, options) = bind.choose(to);
    let source = source.filter(|_| may_bind);
    let set = |before_bind: bool| {
        let mut options = options.iter().filter(move |option| option.before_bind == before_bind);
        options.try_for_each(|option| {
            if (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_MARK)
                && let Ok(value) = <[u8; 4]>::try_from(&*option.value)
            {
                mark::check(u32::from_ne_bytes(value))?;
            }
            set_bytes(socket, option.level, option.name, &option.value)
        })
    };
    set(true).map_err(ConnectError::Socket)?;
    if let Some(source) = source {
        let set = |option| set_int(socket, libc::SOL_IP, option, 1).map_err(ConnectError::Socket);
        if bind.freebind == Some(true) {
            set(libc::IP_FREEBIND)?;
        }
        if source.port() == 0 {
            set(libc::IP_BIND_ADDRESS_NO_PORT)?;
        }
        socket.bind(&SockAddr::from(source)).map_err(|error| ConnectError::Bind(source, error))?;
    }
    if let Err(error) = set(false) {
        // As in Envoy, the connection goes on without what fails here.
        tracing::debug!(%to, %error, "a socket option with state STATE_BOUND cannot be set");
    }
    Ok(())
}

/// Binds to the client's address. A port of 0 is left to connect(), when the kernel knows the whole four-tuple: ports are then only
/// used up per destination; and so is any other, as such sockets share it.
fn bind_to_source(socket: &Socket, source: Source, port: u16) -> Result<(), ConnectError> {
    let set = || {
        if source.address.is_ipv4() {
            socket.set_ip_transparent_v4(true)?;
        } else {
            set_int(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?;
        }
        if port == 0 {
            set_int(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
        } else {
            socket.set_reuse_address(true)?;
        }
        if source.mark != 0 {
            mark::check(source.mark)?;
            socket.set_mark(source.mark)?;
        }
        Ok(())
    };
    set().map_err(ConnectError::Socket)?;
    let address = SocketAddr::new(source.address, port);
    socket.bind(&SockAddr::from(address)).map_err(|error| ConnectError::Bind(address, error))
}

/// Sets an integer option that socket2 has no name for.
pub(crate) fn set_int(socket: &impl AsRawFd, level: i32, option: i32, value: libc::c_int) -> io::Result<()> {
    set_bytes(socket, level, option, &value.to_ne_bytes())
}

fn set_bytes(socket: &impl AsRawFd, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the pointer and the length describe `value`, which outlives the call; the descriptor is open.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl UpstreamStream {
    /// What access logs tell of it, which was begun then, and there then: after all of that.
    pub fn info(&self, began: Instant, connected: Option<Instant>) -> UpstreamInfo {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let tls = match self {
            UpstreamStream::Tls(stream) => Some(TlsInfo::new(stream.get_ref().1, None)),
            UpstreamStream::Tcp(_) | UpstreamStream::Unix(_) => None,
        };
        let secured = tls.as_ref().map(|_| Instant::now());
        let times = [Some(began), connected, secured];
        UpstreamInfo { local: self.local_addr(), tls, id: NEXT.fetch_add(1, Ordering::Relaxed), times }
    }

    /// Our own end's address.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match self {
            UpstreamStream::Tcp(stream) => stream.local_addr().ok(),
            UpstreamStream::Unix(_) => None,
            UpstreamStream::Tls(stream) => stream.get_ref().0.local_addr(),
        }
    }

    /// Has the host's connection end with a reset.
    pub(crate) fn reset_on_close(&self) {
        match self {
            UpstreamStream::Tcp(stream) => crate::listener::reset_on_close(stream),
            // They have none.
            UpstreamStream::Unix(_) => {}
            UpstreamStream::Tls(stream) => stream.get_ref().0.reset_on_close(),
        }
    }

    /// The protocol that the TLS handshake chose.
    pub fn alpn(&self) -> Option<&[u8]> {
        match self {
            UpstreamStream::Tls(stream) => stream.get_ref().1.alpn_protocol(),
            UpstreamStream::Tcp(_) | UpstreamStream::Unix(_) => None,
        }
    }
}

impl AsyncRead for UpstreamStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            UpstreamStream::Tcp(stream) => crate::intercept::lanes::poll_read(stream, cx, buf),
            UpstreamStream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            UpstreamStream::Tls(stream) => Pin::new(stream).poll_read(cx, buf).map(crate::listener::eof),
        }
    }
}

write_to_held!(UpstreamStream { Tcp, Unix, Tls });
