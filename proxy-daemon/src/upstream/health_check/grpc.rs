//! Checks by `grpc.health.v1.Health`.

use bytes::{BufMut, Bytes};
use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version,
    header::{CONTENT_TYPE, TE, USER_AGENT},
    uri::{PathAndQuery, Scheme},
};
use http_body_util::{BodyExt, Full};
use prost::Message;

use super::{
    Failure, Outcome, Passed, Target,
    http::{HEALTH_CHECKER, HttpConnection, kept_or_new},
};
use crate::{
    config::model::GrpcCheck,
    http::headers::{mutate_request, names::GRPC_STATUS},
};

/// The largest answer that is read.
const MAX_ANSWER: usize = 4096;
/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// `grpc.health.v1.HealthCheckRequest`
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// `grpc.health.v1.HealthCheckResponse.ServingStatus.SERVING`
const SERVING: i32 = 1;

pub(super) struct GrpcProbe {
    target: Target,
    reuse: bool,
    connection: Option<HttpConnection>,
}

impl GrpcProbe {
    pub(super) fn new(target: Target, reuse: bool) -> GrpcProbe {
        GrpcProbe { target, reuse, connection: None }
    }

    pub(super) async fn probe(&mut self, check: &GrpcCheck) -> Outcome {
        let kept = self.connection.take();
        match self.attempt(kept, check).await {
            Ok((serving, connection)) => {
                self.connection = Some(connection).filter(|_| self.reuse);
                let result = if serving { Ok(Passed::default()) } else { Err(Failure::Active) };
                Outcome { result, http_status: None }
            }
            Err(failure) => failure.into(),
        }
    }

    /// Whether the host says that it serves.
    async fn attempt(
        &self,
        kept: Option<HttpConnection>,
        check: &GrpcCheck,
    ) -> Result<(bool, HttpConnection), Failure> {
        let mut connection = kept_or_new(kept, &self.target, true).await?;
        let (head, mut body) = connection.send(request(check, &self.target)).await?.into_parts();
        let mut status = head.headers.get(GRPC_STATUS).cloned();
        let mut answer = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| Failure::Network)?;
            if let Some(data) = frame.data_ref() {
                if answer.len() + data.len() > MAX_ANSWER {
                    return Err(Failure::Active);
                }
                answer.extend_from_slice(data);
            } else if let Some(trailers) = frame.trailers_ref() {
                status = trailers.get(GRPC_STATUS).cloned();
            }
        }
        let ok = head.status == StatusCode::OK && status.is_some_and(|status| status == "0");
        Ok((ok && serving(&answer), connection))
    }
}

/// Whether a body is one message that says SERVING.
fn serving(body: &[u8]) -> bool {
    let Some((prefix, message)) = body.split_first_chunk::<PREFIX>() else { return false };
    let [compressed, length @ ..] = *prefix;
    let whole = usize::try_from(u32::from_be_bytes(length)).is_ok_and(|length| length == message.len());
    compressed == 0 && whole && HealthCheckResponse::decode(message).is_ok_and(|answer| answer.status == SERVING)
}

fn request(check: &GrpcCheck, target: &Target) -> Request<Full<Bytes>> {
    let host =
        target.host.as_ref().filter(|_| check.authority_is_default).and_then(|host| host.as_bytes().try_into().ok());
    let message = HealthCheckRequest { service: check.service_name.clone() }.encode_to_vec();
    let mut body = Vec::with_capacity(PREFIX + message.len());
    body.put_u8(0);
    // A name in a configuration message: far shorter than 4 GiB.
    body.put_u32(message.len() as u32);
    body.extend_from_slice(&message);
    let mut request = Request::new(Full::new(Bytes::from(body)));
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    let mut uri = http::uri::Parts::default();
    uri.scheme = Some(Scheme::HTTP);
    uri.authority = Some(host.unwrap_or_else(|| check.authority.clone()));
    uri.path_and_query = Some(PathAndQuery::from_static("/grpc.health.v1.Health/Check"));
    // All three parts: always valid.
    *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert(USER_AGENT, HEALTH_CHECKER);
    target.told("HTTP/2", |record| mutate_request(&mut headers, &check.headers, record));
    *request.headers_mut() = headers;
    request
}
