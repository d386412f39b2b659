//! The HTTP side: status pages and the registration API.

mod metrics;
mod status;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tracing::{debug, warn};

pub use self::metrics::Activity;
pub use self::status::{
    ClusterStatus, ConnectedClient, EndpointStatus, OffloadedStatus, ServedStatus, ServiceStatus, ShareStatus, Status,
};
use crate::access::Denied;
use crate::drain::{self, Drains};
use crate::health::Checks;
use crate::overrides::{self, Overrides, tunnels};
use crate::registration::Registrations;
use crate::registration::api::{self, Refusal, Reply, Sent};
use crate::registry::Registry;
use crate::resources::Snapshot;
use crate::secrets::files::SecretFiles;
use crate::server::authorization::Authorization;
use crate::server::clients::Clients;
use crate::server::loads::Loads;

/// How long a client may take to send a request's head, and then its body.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// The most connections at a time.
const MAX_CONNECTIONS: usize = 4096;
/// Why a registration was refused.
const ERROR_HEADER: HeaderName = HeaderName::from_static("x-culvert-error");
/// The page for people. It is one file and needs nothing from elsewhere.
const PAGE: &str = include_str!("page.html");
/// What the page may do: ask this server, and nothing else. Names from outside are shown as text, never as HTML; should that
/// ever fail, nothing can be loaded or sent elsewhere.
const PAGE_POLICY: &str = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                           img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// What the pages show.
#[derive(Debug, Clone)]
pub struct StatusPages {
    /// The clusters and their sources.
    pub registry: watch::Receiver<Arc<Registry>>,
    /// What is served.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Who is connected.
    pub clients: Clients,
    /// The registration API, if it is served.
    pub registrations: Option<Registrations>,
    /// Shares of overrides and tunnels.
    pub overrides: Overrides,
    /// Takes clusters out.
    pub drains: Drains,
    /// What has been done so far.
    pub activity: Arc<Activity>,
    /// Who was refused.
    pub authorization: Arc<Authorization>,
    /// What proxies report.
    pub loads: Loads,
    /// What they check.
    pub checks: Checks,
    /// The secrets of files.
    pub secrets: SecretFiles,
}

impl StatusPages {
    /// Serves the pages on `listener` until `shutdown` turns true.
    pub async fn serve(self, listener: TcpListener, mut shutdown: watch::Receiver<bool>) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = shutdown.wait_for(|asked| *asked) => return,
            };
            let (connection, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, for example: not to be retried in a busy loop.
                    warn!("cannot accept connections to the status pages: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Over the limit the connection is dropped: monitoring must not be able to use discovery up.
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
            let pages = self.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| async { Ok::<_, Infallible>(pages.answer(request, peer).await) });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(READ_TIMEOUT)
                    .serve_connection(TokioIo::new(connection), service)
                    .with_upgrades()
                    .await;
                if let Err(error) = served {
                    debug!("status pages: {peer}: {error}");
                }
                drop(slot);
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        if let Some(registrations) = &self.registrations
            && request.uri().path().starts_with(api::PREFIX)
        {
            return register(registrations, request, peer).await;
        }
        if request.uri().path().starts_with(drain::PREFIX) {
            let path = request.uri().path();
            let (status, said) = self.drains.answer(request.method(), path, request.headers(), peer.ip()).await;
            return plain(status, &format!("{said}\n"));
        }
        if request.uri().path().starts_with(overrides::PREFIX) {
            return self.answer_overrides(request, peer).await;
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
        }
        match request.uri().path() {
            "/healthcheck" => plain(StatusCode::OK, "OK"),
            "/" => page(),
            "/metrics" => content(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.metrics()),
            "/ready" if self.is_ready() => plain(StatusCode::OK, &self.ready()),
            "/ready" => plain(StatusCode::SERVICE_UNAVAILABLE, "not all sources have been read yet\n"),
            "/status" => match serde_json::to_vec_pretty(&self.status()) {
                Ok(body) => json(StatusCode::OK, body),
                Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("cannot write the status: {error}\n")),
            },
            path if path.starts_with(api::PREFIX) => {
                plain(StatusCode::NOT_FOUND, "the registration API is off; --registration turns it on\n")
            }
            _ => plain(StatusCode::NOT_FOUND, "the pages are /, /status, /metrics, /healthcheck and /ready\n"),
        }
    }

    async fn answer_overrides(&self, mut request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
        let denied = |(status, reason): Denied| {
            let text = serde_json::json!({ "error": reason }).to_string();
            json(status, text + "\n")
        };
        let mesh = Arc::clone(&self.snapshots.borrow().mesh);
        if request.uri().path() == tunnels::PATH {
            let begun = match self.overrides.admit_tunnel(request.headers()) {
                Ok(()) => self.overrides.tunnels.begin(&mut request, peer, &mesh).await,
                Err(refusal) => Err(refusal),
            };
            return begun.map_or_else(denied, |response| response.map(|()| Full::default()));
        }
        if let Err(refusal) = self.overrides.admit(request.headers(), peer) {
            return denied(refusal);
        }
        let (head, body) = request.into_parts();
        let body = match read_body(body).await {
            Ok(body) => body,
            Err(refusal) => return reply(refusal.into()),
        };
        let (method, path) = (&head.method, head.uri.path());
        let answered = self.overrides.answer(method, path, &head.headers, &body, &mesh).await;
        answered.map_or_else(denied, |(status, answer)| json(status, format!("{answer:#}\n")))
    }

    /// That it is ready, and what it does without: a cluster that cannot be read must not keep the others from being served.
    fn ready(&self) -> String {
        let registry = self.registry.borrow();
        let unread = registry.clusters.iter().filter(|cluster| cluster.objects.is_none());
        let unread: Vec<_> = unread.map(|cluster| &*cluster.info.name).collect();
        match unread.is_empty() {
            true => "ready\n".to_owned(),
            false => format!("ready, without what has not been read yet: {}\n", unread.join(", ")),
        }
    }

    /// Whether every source has been read.
    fn is_ready(&self) -> bool {
        self.registry.borrow().is_ready() && self.registrations.as_ref().is_none_or(Registrations::is_loaded)
    }
}

fn page() -> Response<Full<Bytes>> {
    let mut response = content(StatusCode::OK, "text/html; charset=utf-8", PAGE);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// Answers a request of the registration API.
async fn register(
    registrations: &Registrations,
    request: Request<Incoming>,
    peer: SocketAddr,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = match read_body(body).await {
        Ok(body) => body,
        Err(refusal) => {
            let mut response = reply(registrations.refuse(refusal));
            // The rest of the body is not read.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
    };
    let remote = remote(&head.headers, peer);
    let content_type = text(&head.headers, &header::CONTENT_TYPE);
    let sent = Sent { content_type, body: &body, remote: &remote };
    reply(match api::parse(head.method.as_str(), head.uri.path(), sent) {
        Ok(call) => registrations.carry_out(call).await,
        Err(refusal) => registrations.refuse(refusal),
    })
}

async fn read_body(body: Incoming) -> Result<Bytes, Refusal> {
    let too_large = || Refusal::new(413, format!("the body is larger than {} bytes", api::MAX_BODY));
    if body.size_hint().lower() > api::MAX_BODY as u64 {
        return Err(too_large());
    }
    match timeout(READ_TIMEOUT, Limited::new(body, api::MAX_BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => Err(Refusal::new(400, format!("the body cannot be read: {error}"))),
        Err(_) => Err(Refusal::new(408, format!("the body took longer than {} s", READ_TIMEOUT.as_secs()))),
    }
}

/// Who sent a request: one proxy is trusted to have added the last address.
fn remote(headers: &HeaderMap, peer: SocketAddr) -> String {
    let last = headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).next_back();
    let last = last.and_then(|list| list.split(',').map(str::trim).rfind(|part| !part.is_empty()));
    last.map_or_else(|| peer.ip().to_canonical().to_string(), str::to_owned)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn reply(Reply { status, body, error, allow }: Reply) -> Response<Full<Bytes>> {
    // Every status is one of a few constants.
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, body);
    if let Some(Ok(error)) = error.map(HeaderValue::try_from) {
        response.headers_mut().insert(ERROR_HEADER, error);
    }
    if let Some(allow) = allow {
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    response
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    content(status, "application/json", body)
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    content(status, "text/plain; charset=utf-8", Bytes::copy_from_slice(text.as_bytes()))
}

fn content(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
