//! The two kinds of authorisation services.

use std::time::{Duration, Instant};

use bytes::Bytes;
use envoy_types::pb::{
    envoy::service::auth::v3::{
        CheckRequest,
        attribute_context::{HttpRequest, Request as Attributes},
    },
    google::protobuf::{Struct, Value, value::Kind},
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{CONTENT_LENGTH, HOST},
};

use super::verdict::{Outcome, Verdict, removable};
use crate::{
    config::model::{HeaderMutations, RetryPolicy, StringMatcher},
    http::{
        body::Body,
        call::{self, Failure, grpc},
        changes::{Action, Change},
        headers::{mutate_request, names::*},
        path::path_and_query,
        stream::{RequestHead, StreamCx},
    },
};

/// The longest body of an HTTP service's answer: 1 MiB.
const MAX_BODY: usize = 1 << 20;

/// A list of headers that the service wants to be removed from the request.
const TO_REMOVE: HeaderName = HeaderName::from_static("x-envoy-auth-headers-to-remove");

/// Who decides.
#[derive(Debug)]
pub(super) enum Service {
    Grpc(grpc::Service),
    Http(Box<HttpService>),
}

/// `HttpService`
#[derive(Debug)]
pub(super) struct HttpService {
    pub(super) cluster: Box<str>,
    pub(super) timeout: Option<Duration>,
    pub(super) path_prefix: Box<str>,
    pub(super) path_override: Box<str>,
    pub(super) headers_to_add: HeaderMutations,
    /// Headers of an answer of 200 that the request gets in the place of its own.
    pub(super) upstream: Box<[StringMatcher]>,
    /// That the request gets beside its own.
    pub(super) upstream_append: Box<[StringMatcher]>,
    /// That the response gets.
    pub(super) client_on_success: Box<[StringMatcher]>,
    /// Headers of another answer that the client gets; `None`: all of them.
    pub(super) client: Option<Box<[StringMatcher]>>,
    /// That become dynamic metadata.
    pub(super) metadata: Box<[StringMatcher]>,
    pub(super) retry: Option<RetryPolicy>,
}

fn any(matchers: &[StringMatcher], name: &HeaderName) -> bool {
    matchers.iter().any(|matcher| matcher.matches(name.as_str()))
}

impl Service {
    /// Asks.
    pub(super) async fn check(&self, request: CheckRequest, head: &mut RequestHead, cx: &StreamCx) -> Verdict {
        match self {
            Service::Grpc(service) => {
                let answer = service.unary("/envoy.service.auth.v3.Authorization/Check", &request, cx).await;
                answer.map_or_else(|_| Verdict::default(), Verdict::of)
            }
            Service::Http(service) => service.check(request, head, cx).await.unwrap_or_default(),
        }
    }
}

/// What is asked for. One that is too long must not become another one, which may be allowed.
fn target(path: &str) -> Result<Uri, Failure> {
    path_and_query(path).map(Uri::from).map_err(|_| Failure::TooLong)
}

impl HttpService {
    async fn check(&self, request: CheckRequest, head: &mut RequestHead, cx: &StreamCx) -> Result<Verdict, Failure> {
        let told = request.attributes.and_then(|attributes| attributes.request);
        let Some(Attributes { http: Some(told), .. }) = told else { return Err(Failure::Reset) };
        let cluster = cx.worker.clusters.get(&self.cluster).ok_or(Failure::NoHost)?;
        let (asking, body) = self.request(told, head, cx)?;
        let call = async {
            let body = || if body.is_empty() { Body::Empty } else { Body::Full(body.clone()) };
            let answer = call::send_by(&cluster, self.retry.as_ref(), asking, body).await?;
            if answer.head.status.is_server_error() {
                answer.discard().await;
                return Err(Failure::Broken);
            }
            answer.read(MAX_BODY).await
        };
        let began = Instant::now();
        let (mut answer, body, _) = call::within(&cluster, self.timeout, Box::pin(call)).await?;
        // As a client's answer has it, which this becomes.
        let took = HeaderValue::from(began.elapsed().as_millis() as u64);
        answer.headers.insert(X_ENVOY_UPSTREAM_SERVICE_TIME, took);
        Ok(self.verdict(answer.status, answer.headers, body))
    }

    fn request(
        &self,
        told: HttpRequest,
        head: &mut RequestHead,
        cx: &StreamCx,
    ) -> Result<(RequestHead, Bytes), Failure> {
        let (mut asking, ()) = Request::new(()).into_parts();
        let body = if told.raw_body.is_empty() { Bytes::from(told.body) } else { Bytes::from(told.raw_body) };
        let mut path = "/".to_owned();
        let raw = told.header_map.unwrap_or_default().headers.into_iter().map(|header| (header.key, header.raw_value));
        let joined = told.headers.into_iter().map(|(name, value)| (name, value.into_bytes()));
        for (name, value) in joined.chain(raw) {
            match name.as_str() {
                ":path" => path = String::from_utf8_lossy(&value).into_owned(),
                ":method" => asking.method = Method::from_bytes(&value).unwrap_or(Method::GET),
                ":authority" => asking.headers.extend(HeaderValue::from_bytes(&value).ok().map(|host| (HOST, host))),
                ":scheme" | "content-length" => {}
                _ => {
                    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                        asking.headers.append(name, value);
                    }
                }
            }
        }
        asking.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        asking.uri = match &*self.path_override {
            "" => target(&format!("{}{path}", self.path_prefix))?,
            path => target(path)?,
        };
        if !self.headers_to_add.is_empty() {
            let headers = &mut asking.headers;
            cx.format_request(head, |_, record| mutate_request(headers, &self.headers_to_add, record));
        }
        call::mark_internal(&mut asking);
        if let Some(limit) = self.timeout {
            call::expect_within(&mut asking, limit);
        }
        Ok((asking, body))
    }

    fn verdict(&self, status: StatusCode, mut headers: HeaderMap, body: Bytes) -> Verdict {
        let mut verdict = Verdict::default();
        if let Some(names) = headers.remove(TO_REMOVE) {
            let names = names.to_str().unwrap_or_default().split(',').map(str::trim);
            verdict.remove = names.filter_map(removable).collect();
        }
        let told = headers.iter().filter(|(name, _)| any(&self.metadata, name));
        let told = told.map(|(name, value)| {
            let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
            (name.as_str().to_owned(), Value { kind: Some(Kind::StringValue(text)) })
        });
        let fields: std::collections::HashMap<_, _> = told.collect();
        verdict.metadata = (!fields.is_empty()).then_some(Struct { fields: fields.into_iter().collect() });
        let taken = |matchers: &[StringMatcher], action| {
            let wanted = headers.iter().filter(|(name, _)| any(matchers, name));
            wanted.map(|(name, value)| Change::new(name.as_str(), value.as_bytes(), action)).collect::<Vec<_>>()
        };
        if status == StatusCode::OK {
            verdict.outcome = Outcome::Ok;
            verdict.request = taken(&self.upstream, Action::Set);
            verdict.request.extend(taken(&self.upstream_append, Action::Add));
            verdict.response = taken(&self.client_on_success, Action::Add);
        } else {
            verdict.outcome = Outcome::Denied;
            verdict.status = Some(status);
            verdict.body = body;
            let shown = |name: &HeaderName| {
                let always = [http::header::WWW_AUTHENTICATE, http::header::LOCATION];
                self.client.as_ref().is_none_or(|client| any(client, name) || always.contains(name))
            };
            let shown = headers.iter().filter(|(name, _)| shown(name));
            verdict.reply =
                shown.map(|(name, value)| Change::new(name.as_str(), value.as_bytes(), Action::Add)).collect();
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_too_long_with_its_prefix_is_no_other_path() {
        let path = |length: usize| format!("/check/{}", "x".repeat(length));
        assert_eq!(target(&path(60_000)).ok().map(|uri| uri.to_string()), Some(path(60_000)));
        assert!(matches!(target(&path(65_530)), Err(Failure::TooLong)));
    }
}
