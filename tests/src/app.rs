//! The lab's service: an ordinary HTTP/1.1 program that knows nothing of Culvert. It says what it saw, and calls the
//! service behind it as services do: with the trace headers of the request it is answering.

use std::collections::BTreeMap;
use std::io::{BufReader, ErrorKind};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::http1::{Headers, Request, Response};

/// How long a call to the upstream may take.
const UPSTREAM_TIMEOUT: Duration = Duration::from_secs(10);

/// The headers a service passes on to the services it calls.
const TRACE_HEADERS: &[&str] = &["x-request-id", "x-ot-span-context", "baggage", "traceparent", "tracestate"];

/// Their prefixes.
const TRACE_PREFIXES: &[&str] = &["ot-", "x-b3-"];

/// A service. It answers each request with JSON:
/// `{"pod", "revision", "peer", "method", "path", "headers", "body_bytes", "upstream"}`.
///
/// The query of the path can ask for another answer: `status=503`, `delay_ms=200` (before it answers), `bytes=65536` (a
/// body of that many bytes instead of JSON).
#[derive(Debug, Clone)]
pub struct App {
    /// The name it answers with.
    pub pod: String,
    /// The revision it answers with.
    pub revision: String,
    /// The service it calls to answer, as `http://host[:port]`.
    pub upstream: Option<String>,
}

impl App {
    /// Serves until the process ends, a thread a connection.
    pub fn serve(self, listener: TcpListener) -> Result<()> {
        let app = Arc::new(self);
        loop {
            let (stream, _) = listener.accept().context("accepting a connection")?;
            let app = Arc::clone(&app);
            thread::spawn(move || {
                if let Err(error) = app.connection(stream) {
                    eprintln!("{}: {error:#}", app.pod);
                }
            });
        }
    }

    /// Serves on a free port of 127.0.0.1, on a thread of its own; returns the port.
    pub fn start(self) -> Result<u16> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        thread::spawn(move || self.serve(listener));
        Ok(port)
    }

    fn connection(&self, mut stream: TcpStream) -> Result<()> {
        let peer = stream.peer_addr()?.ip().to_canonical().to_string();
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut upstream = self.upstream.as_deref().map(Client::new).transpose()?;
        loop {
            let request = match Request::read(&mut reader) {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                Err(error) if is_reset(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            let response = self.respond(&request, &peer, upstream.as_mut());
            response.write(&mut stream, request.method == "HEAD")?;
            if request.wants_close() || response.wants_close() {
                return Ok(());
            }
        }
    }

    fn respond(&self, request: &Request, peer: &str, upstream: Option<&mut Client>) -> Response {
        let query = request.target.split_once('?').map_or("", |(_, query)| query);
        let parameter = |name: &str| {
            query
                .split('&')
                .filter_map(|pair| pair.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
        };
        let number = |name: &str| parameter(name).and_then(|value| value.parse::<u64>().ok());
        if let Some(delay) = number("delay_ms") {
            thread::sleep(Duration::from_millis(delay));
        }
        let status = number("status").and_then(|status| u16::try_from(status).ok()).unwrap_or(200);
        if let Some(bytes) = number("bytes") {
            let body = vec![b'x'; usize::try_from(bytes).unwrap_or(0)];
            return Response::new(status, "application/octet-stream", body);
        }
        let headers: BTreeMap<_, _> =
            request.headers.0.iter().map(|(name, value)| (name.to_lowercase(), value)).collect();
        let mut answer = json!({
            "pod": self.pod,
            "revision": self.revision,
            "peer": peer,
            "method": request.method,
            "path": request.target,
            "headers": headers,
            "body_bytes": request.body.len(),
        });
        if let Some(upstream) = upstream {
            match call(upstream, &request.headers) {
                Ok(nested) => answer["upstream"] = nested,
                Err(error) => {
                    let message = format!("{}: calling {}: {error:#}\n", self.pod, upstream.host);
                    return Response::new(502, "text/plain", message.into_bytes());
                }
            }
        }
        Response::new(status, "application/json", answer.to_string().into_bytes())
    }
}

/// Calls the next service, passing the trace headers on.
fn call(upstream: &mut Client, incoming: &Headers) -> Result<Value> {
    let mut request = Request::get("/");
    for (name, value) in &incoming.0 {
        let lower = name.to_lowercase();
        if TRACE_HEADERS.contains(&lower.as_str()) || TRACE_PREFIXES.iter().any(|prefix| lower.starts_with(prefix)) {
            request.headers.push(&lower, value);
        }
    }
    let response = upstream.send(request)?;
    let text = response.text();
    anyhow::ensure!(response.status == 200, "status {}: {text}", response.status);
    serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
}

/// A client that keeps one connection to one server.
pub struct Client {
    /// The authority, which is also the Host header.
    host: String,
    address: String,
    timeout: Duration,
    connection: Option<BufReader<TcpStream>>,
}

impl Client {
    /// A client of `http://host[:port]`; it connects when it sends.
    pub fn new(url: &str) -> Result<Self> {
        let host = url.strip_prefix("http://").with_context(|| format!("`{url}` does not start with http://"))?;
        let host = host.trim_end_matches('/');
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let address = if has_port { host.to_owned() } else { format!("{host}:80") };
        Ok(Self { host: host.to_owned(), address, timeout: UPSTREAM_TIMEOUT, connection: None })
    }

    /// Sets how long connecting, and each wait for the response, may take.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Forgets the connection; the next request opens another.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// Sends a request (adding Host if it has none) and reads the response. A kept connection that turns out to be closed is
    /// replaced once, as every HTTP client does.
    pub fn send(&mut self, mut request: Request) -> Result<Response> {
        if request.headers.get("host").is_none() {
            request.headers.0.insert(0, ("host".to_owned(), self.host.clone()));
        }
        let reused = self.connection.is_some();
        match self.exchange(&request) {
            Err(error) if reused && is_reset(&error) => self.exchange(&request),
            result => result,
        }
    }

    fn exchange(&mut self, request: &Request) -> Result<Response> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => BufReader::new(connect(&self.address, self.timeout)?),
        };
        request.write(connection.get_mut())?;
        let response = Response::read(&mut connection, &request.method)?;
        if !response.wants_close() {
            self.connection = Some(connection);
        }
        Ok(response)
    }
}

/// Connects to `host:port`, trying each address the name resolves to.
fn connect(address: &str, timeout: Duration) -> Result<TcpStream> {
    use std::net::ToSocketAddrs;
    let mut last = None;
    for resolved in address.to_socket_addrs().with_context(|| format!("resolving {address}"))? {
        match TcpStream::connect_timeout(&resolved, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                return Ok(stream);
            }
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error).with_context(|| format!("connecting to {address}")),
        None => anyhow::bail!("{address} resolves to no address"),
    }
}

/// Whether `error` says that the other side closed the connection.
pub fn is_reset(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|cause| {
        matches!(cause.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
    })
}
