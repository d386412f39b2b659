//! Checks by a request.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Uri, Version,
    header::{CONTENT_LENGTH, HOST, USER_AGENT},
    response::Parts,
    uri::Scheme,
};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinHandle;

use super::{Failure, Outcome, Passed, Target, contains, tcp::open};
use crate::{config::model::HttpCheck, http::headers::mutate_request, stats::Counter, tls::AlpnFallback};

/// What Envoy calls itself there.
pub(super) const HEALTH_CHECKER: HeaderValue = HeaderValue::from_static("Envoy/HC");
/// The most of a response's body that is looked at where the configuration has no limit.
const MAX_BODY: u64 = 1024 * 1024;

/// A connection that speaks HTTP. Dropped, it is closed.
pub(in crate::upstream) struct HttpConnection {
    sender: Sender,
    driver: JoinHandle<()>,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl HttpConnection {
    pub(in crate::upstream) async fn open(target: &Target, http2: bool) -> Result<HttpConnection, Failure> {
        let alpn = if http2 { AlpnFallback::Http2 } else { AlpnFallback::Http1 };
        let stream = TokioIo::new(open(target, alpn).await?);
        if http2 {
            let handshake = http2::Builder::new(TokioExecutor::new()).handshake(stream).await;
            let (sender, driver) = handshake.map_err(|_| Failure::Network)?;
            // How it ended shows in the request that it carried.
            let driver = tokio::spawn(async move { drop(driver.await) });
            Ok(HttpConnection { sender: Sender::Http2(sender), driver })
        } else {
            let (sender, driver) = http1::handshake(stream).await.map_err(|_| Failure::Network)?;
            let driver = tokio::spawn(async move { drop(driver.await) });
            Ok(HttpConnection { sender: Sender::Http1(sender), driver })
        }
    }

    /// Whether a request can be sent, as far as is known.
    pub(super) async fn is_ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    pub(in crate::upstream) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<http::Response<Incoming>, Failure> {
        let response = match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::Http2(sender) => sender.send_request(request).await,
        };
        response.map_err(|_| Failure::Network)
    }
}

impl Drop for HttpConnection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// A kept connection that is still open, else a new one.
pub(super) async fn kept_or_new(
    kept: Option<HttpConnection>,
    target: &Target,
    http2: bool,
) -> Result<HttpConnection, Failure> {
    if let Some(mut connection) = kept
        && connection.is_ready().await
    {
        return Ok(connection);
    }
    HttpConnection::open(target, http2).await
}

pub(super) struct HttpProbe {
    target: Target,
    reuse: bool,
    verify_cluster: Counter,
    connection: Option<HttpConnection>,
}

impl HttpProbe {
    pub(super) fn new(target: Target, reuse: bool, verify_cluster: Counter) -> HttpProbe {
        HttpProbe { target, reuse, verify_cluster, connection: None }
    }

    pub(super) async fn probe(&mut self, check: &HttpCheck) -> Outcome {
        let kept = self.connection.take();
        match self.attempt(kept, check).await {
            Ok((head, body, connection)) => {
                self.connection = Some(connection).filter(|_| self.reuse);
                Outcome { result: self.judge(check, &head, &body), http_status: Some(head.status.as_u16()) }
            }
            Err(failure) => failure.into(),
        }
    }

    async fn attempt(
        &self,
        kept: Option<HttpConnection>,
        check: &HttpCheck,
    ) -> Result<(Parts, Vec<u8>, HttpConnection), Failure> {
        let mut connection = kept_or_new(kept, &self.target, check.http2).await?;
        let (head, mut body) = connection.send(request(check, &self.target)).await?.into_parts();
        let limit = match check.response_buffer_size {
            _ if check.receive.is_empty() => 0,
            0 => MAX_BODY,
            size => size.min(MAX_BODY),
        };
        let mut kept = Vec::new();
        // To its end, whatever of it is looked at: only then has the host answered.
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failure::Network)?;
            let data = frame.data_ref().map(Bytes::as_ref).unwrap_or_default();
            let room = usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(kept.len());
            kept.extend_from_slice(&data[..data.len().min(room)]);
        }
        Ok((head, kept, connection))
    }

    fn judge(&self, check: &HttpCheck, head: &Parts, body: &[u8]) -> Result<Passed, Failure> {
        let status = head.status.as_u16();
        let within = |ranges: &[(u16, u16)]| ranges.iter().any(|(start, end)| (*start..*end).contains(&status));
        if !within(&check.expected_statuses) {
            return Err(if within(&check.retriable_statuses) { Failure::Retriable } else { Failure::Active });
        }
        if !contains(body, &check.receive) {
            return Err(Failure::Active);
        }
        if let Some(matcher) = &check.service_name_matcher {
            self.verify_cluster.inc();
            let name = head.headers.get("x-envoy-upstream-healthchecked-cluster");
            if !matcher.matches(name.and_then(|name| name.to_str().ok()).unwrap_or_default()) {
                return Err(Failure::Active);
            }
        }
        Ok(Passed { degraded: head.headers.contains_key("x-envoy-degraded") })
    }
}

fn request(check: &HttpCheck, target: &Target) -> Request<Full<Bytes>> {
    let host = target.host.as_ref().filter(|_| check.host_is_default).unwrap_or(&check.host);
    let mut request = Request::new(Full::new(Bytes::from(check.send.clone())));
    *request.method_mut() = check.method.clone();
    let mut uri = http::uri::Parts::default();
    uri.path_and_query = Some(check.path.clone());
    let mut headers = HeaderMap::new();
    if check.http2 {
        *request.version_mut() = Version::HTTP_2;
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = host.as_bytes().try_into().ok();
    } else {
        headers.insert(HOST, host.clone());
    }
    headers.insert(USER_AGENT, HEALTH_CHECKER);
    if matches!(check.method, Method::POST | Method::PUT | Method::PATCH | Method::OPTIONS) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(check.send.len()));
    }
    let protocol = if check.http2 { "HTTP/2" } else { "HTTP/1.1" };
    target.told(protocol, |record| mutate_request(&mut headers, &check.headers, record));
    // A path alone, or all three: the authority was checked with the configuration.
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
    *request.headers_mut() = headers;
    request
}
