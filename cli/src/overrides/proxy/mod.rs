//! `culvert override proxy`: a local HTTP proxy that adds the headers of some overrides to everything that passes.
//!
//! Plain HTTP in absolute form (`curl -x`, a browser's proxy settings), or anything for one fixed target. CONNECT, which is
//! TLS, passes as it is: nobody between the two ends can add a header there.

mod body;
mod headers;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use culvert_discovery::overrides::tunnels::relay::relay;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::http::uri::Authority;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::LocalSet;
use tokio::time::timeout;

use self::body::Watched;
use self::headers::Added;
use super::header::{parse_key, parse_set, read_key};
use super::message;
use super::offered::Look;
use super::terminal::{Terminal, bytes};

/// Shown after the help.
pub const HELP: &str = "\
Examples:
  culvert override proxy --set users=feature-x
  curl -x http://127.0.0.1:8888 http://front.staging.example/
  chromium --proxy-server=http://127.0.0.1:8888

  culvert override proxy --set users=feature-x --target http://front.staging.example
  curl http://127.0.0.1:8888/                    # for clients that know no proxies

  culvert override proxy --share TOKEN --listen 192.168.1.5:8888    # a phone in the same network: set it as its proxy

Every request gets the headers that `culvert override header` would make, beside the baggage that it has. HTTPS passes
unchanged (CONNECT): no header can be added to what is encrypted, so use http:// inside of the mesh, or --target. The log has a
line for each request: time, status, how long, how much, and what the mesh says about where it went, if it says so.";

/// How long a connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a body, or what is passed through, may be silent.
const IDLE: Duration = Duration::from_secs(600);
/// The largest head of a request that is read, in bytes.
const MAX_HEAD: usize = 128 * 1024;
/// How many hosts are remembered so as to be warned of once.
const MAX_WARNED: usize = 1000;
/// What this proxy puts into `via`, so that it knows requests that come back.
const VIA: &str = "1.1 culvert-override-proxy";
/// Says in a response that it was made here.
const MADE_HERE: &str = "x-culvert-override-proxy";

/// Flags of `culvert override proxy`.
#[derive(Debug, Args)]
pub struct Flags {
    /// A service (name, or name.namespace) and the revision it is to be. May be repeated.
    #[arg(long = "set", value_name = "SERVICE=REVISION", required_unless_present = "share", value_parser = parse_set)]
    set: Vec<(String, String)>,

    /// The token of a share (`culvert override share`)
    #[arg(long, value_name = "TOKEN")]
    share: Option<String>,

    /// Sign what is asked for with the key in this file, which proxies know by this id; anew before it ends, which it does after 1h
    #[arg(long, value_name = "ID=FILE", value_parser = parse_key)]
    sign_key: Option<(String, String)>,

    /// Where to listen; port 0 takes any
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8888")]
    listen: SocketAddr,

    /// Send every request there, whatever it names: http://HOST[:PORT]. With an address as HOST, the names stay that requests
    /// have
    #[arg(long, value_name = "URL", value_parser = parse_target)]
    target: Option<Uri>,

    /// How long a response may take to begin, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,

    /// The most connections at a time
    #[arg(long, value_name = "NUMBER", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max_connections: u32,

    /// Ask each hop what it did with the overrides (x-culvert-override-debug), and log what they answer. The mesh has to
    /// have debug_response
    #[arg(long)]
    debug: bool,

    /// Only how it stands, no line for each request
    #[arg(long, short)]
    quiet: bool,

    #[command(flatten)]
    look: Look,
}

type Answer = Response<body::Any>;

/// What all requests share.
struct Proxy {
    added: Added,
    listen: SocketAddr,
    target: Option<Uri>,
    timeout: Duration,
    quiet: bool,
    client: Client<HttpConnector, Incoming>,
    terminal: Terminal,
    counts: Counts,
    /// Hosts of which it was said that they are not reached with the header.
    warned: RefCell<HashSet<String>>,
}

#[derive(Default)]
struct Counts {
    requests: Cell<u64>,
    under_way: Cell<u64>,
    failed: Cell<u64>,
    passed: Cell<u64>,
}

/// Runs the proxy until it is interrupted.
///
/// # Errors
/// When the flags make no sense or the address cannot be listened on.
pub fn run(flags: Flags) -> anyhow::Result<String> {
    let mut added = Added::new(message(&flags.set, flags.share.as_deref())?)?.asking(flags.debug);
    if let Some((id, file)) = &flags.sign_key {
        added = added.signed_with(id, read_key(file)?).context("--sign-key")?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind(flags.listen).await.with_context(|| {
            format!("cannot listen on {}; is another process there? --listen sets the address", flags.listen)
        })?;
        let listen = listener.local_addr()?;
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(15))
            .pool_max_idle_per_host(32)
            .build(connector);
        let proxy = Rc::new(Proxy {
            added,
            listen,
            target: flags.target.clone(),
            timeout: Duration::from_secs(flags.timeout),
            quiet: flags.quiet,
            client,
            terminal: Terminal::new(),
            counts: Counts::default(),
            warned: RefCell::default(),
        });
        proxy.greet(&flags);
        tokio::select! {
            ended = proxy.clone().serve(listener, flags.max_connections) => ended,
            interrupted = tokio::signal::ctrl_c() => interrupted.context("cannot wait for an interrupt"),
        }
    })?;
    Ok(String::new())
}

/// Whether a client's own `Host` stays in what goes to a fixed target: it names a host, and the target says only where that is.
fn keeps_host(target: &Uri, headers: &HeaderMap) -> bool {
    let stated = headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let is_name = |host: &str| {
        let address = host.trim_start_matches('[').trim_end_matches(']');
        address.parse::<IpAddr>().is_err() && !host.eq_ignore_ascii_case("localhost")
    };
    target.host().is_some_and(|host| !is_name(host)) && stated.is_some_and(|stated| is_name(stated.host()))
}

fn parse_target(text: &str) -> Result<Uri, String> {
    let expected = || format!("`{text}` is not of the form http://HOST[:PORT]");
    let uri: Uri = text.parse().map_err(|_| expected())?;
    match (uri.scheme_str(), uri.authority(), uri.path_and_query().map_or("/", |path| path.as_str())) {
        (Some("http"), Some(_), "/") => Ok(uri),
        (Some("https"), ..) => {
            Err("only http:// targets are possible: the header is for proxies that read it".to_owned())
        }
        _ => Err(expected()),
    }
}

/// The addresses of this machine at which others reach what listens at all of them.
fn own_addresses(listen: SocketAddr) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    // Without them the address that was asked for is shown.
    for interface in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let Some(address) = interface.address else { continue };
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let v6 = address.as_sockaddr_in6().map(|address| address.ip()).filter(|ip| !ip.is_unicast_link_local());
        let v6 = v6.filter(|_| listen.is_ipv6()).map(IpAddr::V6);
        found.extend(v4.or(v6).filter(|ip| !ip.is_loopback()).map(|ip| SocketAddr::new(ip, listen.port())));
    }
    found.sort_unstable();
    found.dedup();
    found
}

impl Proxy {
    fn greet(&self, flags: &Flags) {
        let terminal = &self.terminal;
        terminal.plain(&format!("listening on http://{}", self.listen));
        // The address that stands for all is none that a phone could be given.
        let mut reached_at = vec![self.listen];
        if self.listen.ip().is_unspecified() {
            reached_at = own_addresses(self.listen);
            for address in &reached_at {
                terminal.plain(&format!("  other machines reach it at http://{address}"));
            }
        }
        let example = reached_at.first().unwrap_or(&self.listen);
        for (service, revision) in &flags.set {
            terminal.plain(&format!("  {service} -> revision {revision}"));
        }
        if let Some(token) = &flags.share {
            terminal.plain(&format!("  share {token}"));
        }
        match &self.target {
            Some(target) => terminal.plain(&format!("everything goes to {target}; try: curl http://{example}/")),
            None => terminal.plain(&format!("try: curl -x http://{example} http://SERVICE/")),
        }
        for warning in flags.look.warnings(&flags.set, flags.share.as_deref()) {
            terminal.plain(&format!("warning: {warning}"));
        }
        if !self.listen.ip().is_loopback() {
            terminal.plain("note: whoever reaches this address can use it, and reach what this machine reaches");
        }
        self.show();
    }

    /// How it stands.
    fn show(&self) {
        let Counts { requests, under_way, failed, passed } = &self.counts;
        let mut text = format!("{} requests, {} under way, {} failed", requests.get(), under_way.get(), failed.get());
        if passed.get() > 0 {
            text.push_str(&format!(", {} connections without the header (TLS)", passed.get()));
        }
        self.terminal.state(&text);
    }

    async fn serve(self: Rc<Self>, listener: TcpListener, most: u32) -> anyhow::Result<()> {
        let slots = Arc::new(Semaphore::new(most as usize));
        loop {
            // The next ones wait in the kernel's queue.
            let slot = Arc::clone(&slots).acquire_owned().await.context("no more connections")?;
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, for example: not to be retried in a busy loop.
                    self.terminal.line(&format!("cannot accept a connection: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let proxy = Rc::clone(&self);
            tokio::task::spawn_local(async move {
                let service = service_fn(|request| async { Ok::<_, Infallible>(proxy.answer(request).await) });
                // What a client does wrong is its own affair.
                let _ = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .max_buf_size(MAX_HEAD)
                    .preserve_header_case(true)
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
                    .await;
                drop(slot);
            });
        }
    }

    async fn answer(self: &Rc<Self>, request: Request<Incoming>) -> Answer {
        if request.method() == Method::CONNECT {
            return self.pass_through(request).await;
        }
        let started = Instant::now();
        let (method, asked) = (request.method().clone(), request.uri().clone());
        let count = |cell: &Cell<u64>| cell.set(cell.get() + 1);
        count(&self.counts.requests);
        count(&self.counts.under_way);
        self.show();
        match self.forward(request).await {
            Ok((url, response)) => {
                let (proxy, status) = (Rc::clone(self), response.status());
                let seen = headers::seen(response.headers());
                let ended = move |passed: u64, failure: Option<&str>| {
                    if failure.is_some() {
                        proxy.counts.failed.set(proxy.counts.failed.get() + 1);
                    }
                    let failure = failure.map(|failure| format!(", {failure}")).unwrap_or_default();
                    let took = started.elapsed().as_millis();
                    let size = bytes(passed);
                    proxy.ended(&format!("{} {took} ms {size} {method} {url}{seen}{failure}", status.as_u16()));
                };
                response.map(|body| Box::pin(Watched::new(body, IDLE, ended)) as body::Any)
            }
            Err(failure) => {
                count(&self.counts.failed);
                let took = started.elapsed().as_millis();
                self.ended(&format!("{} {took} ms {method} {asked}: {}", failure.status.as_u16(), failure.reason));
                failure.response()
            }
        }
    }

    /// A request is over.
    fn ended(&self, line: &str) {
        self.counts.under_way.set(self.counts.under_way.get().saturating_sub(1));
        if !self.quiet {
            self.terminal.line(line);
        }
        self.show();
    }

    /// Sends a request on; gives where it went, and the response.
    async fn forward(self: &Rc<Self>, mut request: Request<Incoming>) -> Result<(Uri, Response<Incoming>), Failure> {
        let uri = self.destination(request.uri())?;
        let looped = |value: &HeaderValue| value.to_str().is_ok_and(|via| via.contains(VIA));
        if request.headers().get_all(header::VIA).iter().any(looped) {
            let reason = "the request comes from this proxy: what it asks for leads back here";
            return Err(Failure::new(StatusCode::LOOP_DETECTED, reason));
        }
        let upgrade = headers::prepare(request.headers_mut());
        request.headers_mut().append(header::VIA, HeaderValue::from_static(VIA));
        self.added.add(request.headers_mut());
        if self.target.is_some()
            && !keeps_host(&uri, request.headers())
            && let Some(host) = uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
        {
            request.headers_mut().insert(header::HOST, host);
        }
        *request.uri_mut() = uri.clone();
        *request.version_mut() = hyper::Version::HTTP_11;
        let client_side = upgrade.then(|| hyper::upgrade::on(&mut request));
        let mut response = match timeout(self.timeout, self.client.request(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(Failure::new(StatusCode::BAD_GATEWAY, causes(&error))),
            Err(_) => {
                let reason = format!("no response began within {} s (--timeout)", self.timeout.as_secs());
                return Err(Failure::new(StatusCode::GATEWAY_TIMEOUT, reason));
            }
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            if let Some(client_side) = client_side {
                let host_side = hyper::upgrade::on(&mut response);
                tokio::task::spawn_local(async move {
                    if let (Ok(host), Ok(client)) = (host_side.await, client_side.await) {
                        relay(TokioIo::new(client), TokioIo::new(host), IDLE).await;
                    }
                });
            }
        } else {
            headers::strip(response.headers_mut());
        }
        Ok((uri, response))
    }

    /// Where a request goes.
    fn destination(&self, asked: &Uri) -> Result<Uri, Failure> {
        let path = asked.path_and_query().map_or("/", |path| path.as_str());
        if let Some(target) = &self.target {
            let authority = target.authority().map_or("", |authority| authority.as_str());
            let uri = Uri::builder().scheme("http").authority(authority).path_and_query(path).build();
            return uri.map_err(|error| Failure::new(StatusCode::BAD_REQUEST, error.to_string()));
        }
        match (asked.scheme_str(), asked.authority()) {
            (Some("http"), Some(_)) => Ok(asked.clone()),
            (Some(_), Some(_)) => Err(Failure::new(StatusCode::NOT_IMPLEMENTED, "only http:// can be asked for here")),
            _ => {
                let reason = format!(
                    "this is a proxy, and the request does not say where it is to go: use `curl -x http://{} http://SERVICE/`, \
                     set it as your browser's HTTP proxy, or start it with --target http://HOST",
                    self.listen
                );
                Err(Failure::new(StatusCode::BAD_REQUEST, reason))
            }
        }
    }

    /// CONNECT: what is encrypted goes through as it is.
    async fn pass_through(self: &Rc<Self>, mut request: Request<Incoming>) -> Answer {
        let Some(authority) = request.uri().authority().map(ToString::to_string) else {
            return Failure::new(StatusCode::BAD_REQUEST, "CONNECT without a host").response();
        };
        let to = if request.uri().port().is_some() { authority.clone() } else { format!("{authority}:443") };
        let connected = match timeout(CONNECT_TIMEOUT, TcpStream::connect(&to)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs())),
        };
        let host = match connected {
            Ok(host) => host,
            Err(reason) => {
                self.counts.failed.set(self.counts.failed.get() + 1);
                self.terminal.line(&format!("502 CONNECT {authority}: {reason}"));
                self.show();
                return Failure::new(StatusCode::BAD_GATEWAY, reason).response();
            }
        };
        let first = {
            let mut warned = self.warned.borrow_mut();
            warned.len() < MAX_WARNED && warned.insert(authority.clone())
        };
        if first {
            self.terminal.line(&format!(
                "warning: {authority} is reached by TLS (CONNECT), to which no header can be added: it passes without the override"
            ));
        }
        self.counts.passed.set(self.counts.passed.get() + 1);
        self.show();
        let (upgrade, proxy) = (hyper::upgrade::on(&mut request), Rc::clone(self));
        tokio::task::spawn_local(async move {
            let started = Instant::now();
            let Ok(client) = upgrade.await else { return };
            let (sent, received) = relay(TokioIo::new(client), host, IDLE).await;
            if !proxy.quiet {
                let (took, sent, received) = (started.elapsed().as_millis(), bytes(sent), bytes(received));
                proxy
                    .terminal
                    .line(&format!("200 {took} ms {received} CONNECT {authority} without the header, {sent} sent"));
            }
        });
        Response::new(body::empty())
    }
}

/// Why a request is answered here.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    reason: String,
}

impl Failure {
    fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into() }
    }

    fn response(self) -> Answer {
        let text = format!("culvert override proxy: {}\n", self.reason);
        let mut response =
            Response::new(Box::pin(Full::from(text).map_err(|never| -> body::Error { match never {} })) as body::Any);
        *response.status_mut() = self.status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response.headers_mut().insert(MADE_HERE, HeaderValue::from_static("error"));
        response
    }
}

/// An error with what is behind it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// That nothing is asked for is no reason to run.
impl Added {
    fn new(overrides: culvert_xds_client::overrides::Overrides) -> anyhow::Result<Self> {
        ensure!(
            !overrides.overrides.is_empty() || !overrides.share.is_empty(),
            "no override is asked for: use --set or --share"
        );
        Ok(Self::of(overrides))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_is_an_address_leaves_the_host_s_name_to_clients() {
        let keeps = |target: &str, host: &'static str| {
            let headers = [(header::HOST, HeaderValue::from_static(host))].into_iter().collect();
            keeps_host(&target.parse().unwrap(), &headers)
        };
        assert!(keeps("http://10.0.0.1:18080/", "front.staging.example") && keeps("http://[fd00::1]/", "front:80"));
        assert!(!keeps("http://front/", "other.example") && !keeps("http://10.0.0.1/", "127.0.0.1:8888"));
        assert!(!keeps("http://10.0.0.1/", "localhost:8888") && !keeps("http://10.0.0.1/", "[::1]:8888"));
    }

    #[test]
    fn targets_are_hosts() {
        assert_eq!(parse_target("http://front:8080").unwrap().authority().unwrap(), "front:8080");
        assert!(parse_target("http://front/").is_ok());
        assert!(parse_target("https://front").unwrap_err().contains("only http://"));
        for text in ["", "front", "http://", "http://front/path", "ftp://x"] {
            assert!(parse_target(text).unwrap_err().contains("is not of the form"), "{text}");
        }
    }
}
