//! gRPC calls: messages in frames of five bytes and their length, and a status in the trailers, or in the headers where nothing else
//! comes.

use std::{
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use culvert_xds_client::source::Target;
use envoy_types::pb::envoy::config::core::v3::{GrpcService, grpc_service::TargetSpecifier};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{CONTENT_TYPE, HOST, TE},
};
use http_body::Frame;
use prost::Message as ProtoMessage;

use super::{Answer, Failure, expect_within, grpc_stream::Prepared, mark_from, own_address, send_by, within};
use crate::{
    config::{FieldError, model::RetryPolicy, parse},
    grpc_status,
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::names::*,
        stream::{RequestHead, StreamCx},
        timeouts::to_grpc_timeout,
    },
    upstream::WorkerClusters,
};

/// The longest message that is taken from a service, where `max_receive_message_length` says nothing: 4 MiB.
const MAX_MESSAGE: usize = 4 << 20;

/// A frame's flag and length.
const FRAME_HEAD: usize = 5;

/// A service that is asked by gRPC, by way of a cluster.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Service {
    cluster: Box<str>,
    authority: HeaderValue,
    metadata: Box<[(HeaderName, HeaderValue)]>,
    timeout: Option<Duration>,
    max_message: usize,
    skip_envoy_headers: bool,
    /// Of calls with one message.
    retry: Option<Retry>,
}

/// How calls are tried again: equal to itself alone.
#[derive(Debug)]
struct Retry(Box<RetryPolicy>);

impl PartialEq for Retry {
    fn eq(&self, other: &Retry) -> bool {
        std::ptr::eq(&*self.0, &*other.0)
    }
}

impl Eq for Retry {}

/// Why a call failed: gRPC's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failed(pub(in crate::http) u32);

pub(super) const UNKNOWN: Failed = Failed(2);
const RESOURCE_EXHAUSTED: Failed = Failed(8);
pub(super) const INTERNAL: Failed = Failed(13);
pub(super) const UNAVAILABLE: Failed = Failed(14);

impl From<Failure> for Failed {
    /// As Envoy has it: what comes to no answer is answered with 503 or 504, and that is a gRPC status as any.
    fn from(failure: Failure) -> Failed {
        match failure {
            Failure::Overflow | Failure::NoHost | Failure::Reset | Failure::TimedOut => UNAVAILABLE,
            Failure::Broken => INTERNAL,
            Failure::TooLong => RESOURCE_EXHAUSTED,
        }
    }
}

impl Service {
    /// A service of streams as it is configured; `default_timeout` where it says nothing of that.
    ///
    /// # Errors
    /// The field that is wrong or not honoured, below `path`.
    pub(crate) fn parse(
        service: &GrpcService,
        default_timeout: Option<Duration>,
        path: &str,
    ) -> Result<Service, FieldError> {
        if service.retry_policy.is_some() {
            return Err(FieldError::unsupported(format!("{path}.retry_policy")));
        }
        Service::parse_unary(service, default_timeout, path)
    }

    /// The same of one that is asked with one message, and may be asked again.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub(crate) fn parse_unary(
        service: &GrpcService,
        default_timeout: Option<Duration>,
        path: &str,
    ) -> Result<Service, FieldError> {
        let parsed = parse::called_grpc_service(service, path)?;
        let Target::Cluster(cluster) = parsed.target else {
            return Err(FieldError::unsupported(format!("{path}.google_grpc")));
        };
        let Some(TargetSpecifier::EnvoyGrpc(envoy)) = &service.target_specifier else {
            return Err(FieldError::unsupported(format!("{path}.google_grpc")));
        };
        if envoy.retry_policy.is_some() {
            return Err(FieldError::unsupported(format!("{path}.envoy_grpc.retry_policy")));
        }
        let authority = HeaderValue::from_str(&parsed.authority).map_err(|_| {
            FieldError::new(format!("{path}.envoy_grpc.authority"), format!("{:?} is no authority", parsed.authority))
        })?;
        let header = |(name, value): (String, String)| {
            // Both have been checked.
            Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?))
        };
        Ok(Service {
            cluster: cluster.into(),
            authority,
            metadata: parsed.initial_metadata.into_iter().filter_map(header).collect(),
            timeout: parse::duration(service.timeout, path, "timeout")?.or(default_timeout),
            max_message: parsed.max_receive_message_length.unwrap_or(MAX_MESSAGE),
            skip_envoy_headers: envoy.skip_envoy_headers,
            retry: (service.retry_policy.as_ref())
                .map(|policy| {
                    parse::retry_policy_of_calls(policy, &format!("{path}.retry_policy"))
                        .map(|policy| Retry(Box::new(policy)))
                })
                .transpose()?,
        })
    }

    /// With another time limit.
    pub(in crate::http) fn within(mut self, limit: Duration) -> Service {
        self.timeout = Some(limit);
        self
    }

    /// A call's head. `path` is the method's.
    fn head(&self, path: &'static str, timeout: Option<Duration>, own: IpAddr) -> RequestHead {
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = Method::POST;
        head.uri = Uri::from_static(path);
        head.headers.insert(HOST, self.authority.clone());
        head.headers.insert(TE, HeaderValue::from_static("trailers"));
        head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        if let Some(timeout) = timeout {
            head.headers.insert(GRPC_TIMEOUT, to_grpc_timeout(timeout));
            expect_within(&mut head, timeout);
        }
        for (name, value) in &self.metadata {
            head.headers.append(name, value.clone());
        }
        if !self.skip_envoy_headers {
            mark_from(&mut head, own);
        }
        head
    }

    /// A stream of this method's, which may begin later. It has no time limit.
    pub(in crate::http) fn prepare(&self, path: &'static str, cx: &StreamCx) -> Prepared {
        self.prepare_from(path, &cx.worker.clusters, own_address(cx))
    }

    /// The same, where no request is the reason. `own`: this node's address.
    pub(crate) fn prepare_from(&self, path: &'static str, clusters: &WorkerClusters, own: IpAddr) -> Prepared {
        let cluster = clusters.get(&self.cluster);
        Prepared { cluster, head: self.head(path, None, own), max_message: self.max_message }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The status that the call ended with.
    pub(in crate::http) async fn unary<A: ProtoMessage + Default>(
        &self,
        path: &'static str,
        request: &impl ProtoMessage,
        cx: &StreamCx,
    ) -> Result<A, Failed> {
        self.unary_from(path, request, &cx.worker.clusters, own_address(cx)).await
    }

    /// The same, where no request waits for it. `own`: this node's address.
    ///
    /// # Errors
    /// As [`unary`](Self::unary).
    pub(in crate::http) async fn unary_from<A: ProtoMessage + Default>(
        &self,
        path: &'static str,
        request: &impl ProtoMessage,
        clusters: &WorkerClusters,
        own: IpAddr,
    ) -> Result<A, Failed> {
        let cluster = clusters.get(&self.cluster).ok_or(UNAVAILABLE)?;
        let head = self.head(path, self.timeout, own);
        let call = async {
            let framed = frame(request);
            let body = || Body::Wrapped(Box::new(Message(framed.clone())));
            let answer = send_by(&cluster, self.retry.as_ref().map(|Retry(policy)| &**policy), head, body).await?;
            if let Err(failed) = check_head(&answer) {
                return Ok(Err(failed));
            }
            // One message and its frame.
            let (head, data, trailers) = answer.read(self.max_message.saturating_add(FRAME_HEAD)).await?;
            Ok(message(&head.headers, data, trailers.as_ref()))
        };
        within(&cluster, self.timeout, call).await?
    }
}

/// A message as a body, whose length nobody tells: gRPC has it in the frame.
struct Message(Bytes);

impl WrappedBody for Message {}

impl http_body::Body for Message {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let message = std::mem::take(&mut self.0);
        Poll::Ready((!message.is_empty()).then(|| Ok(Frame::data(message))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }
}

/// What an answer's head has to say already.
pub(super) fn check_head(answer: &Answer) -> Result<(), Failed> {
    let head = &answer.head;
    if head.status == StatusCode::OK || head.headers.contains_key(GRPC_STATUS) {
        return Ok(());
    }
    Err(Failed(grpc_status::of_http(head.status.as_u16()).into()))
}

/// The message of an answer to a call with one.
fn message<A: ProtoMessage + Default>(
    head: &HeaderMap,
    data: Bytes,
    trailers: Option<&HeaderMap>,
) -> Result<A, Failed> {
    let ends = trailers.unwrap_or(head);
    match status_of(ends) {
        Some(0) => {}
        Some(status) => return Err(Failed(status)),
        None => return Err(UNKNOWN),
    }
    let mut frames = BytesMut::from(data);
    let message = take_frame(&mut frames, usize::MAX)?.ok_or(INTERNAL)?;
    A::decode(message).map_err(|_| INTERNAL)
}

/// The status in trailers, or in headers after which nothing comes.
pub(super) fn status_of(ends: &HeaderMap) -> Option<u32> {
    ends.get(GRPC_STATUS).and_then(|status| status.to_str().ok()?.parse().ok())
}

/// A message in its frame.
pub(super) fn frame(message: &impl ProtoMessage) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(FRAME_HEAD + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // It has been given the room.
    let _ = message.encode(&mut bytes);
    bytes.freeze()
}

/// Takes the message in the first frame off, where it is there as a whole.
///
/// # Errors
/// It is compressed, or longer than `limit`.
pub(super) fn take_frame(bytes: &mut BytesMut, limit: usize) -> Result<Option<Bytes>, Failed> {
    let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEAD>() else { return Ok(None) };
    let [flags, length @ ..] = *head;
    if flags != 0 {
        return Err(INTERNAL);
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        return Err(RESOURCE_EXHAUSTED);
    }
    if rest.len() < length {
        return Ok(None);
    }
    bytes.advance(FRAME_HEAD);
    Ok(Some(bytes.split_to(length).freeze()))
}

/// What the fuzzer `grpc_messages` feeds besides: a service's answer. It makes no difference where it is parted.
pub(in crate::http) fn fuzz(bytes: &[u8]) {
    let taken = |size: usize| {
        let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(size) {
            buffer.extend_from_slice(piece);
            loop {
                match take_frame(&mut buffer, 64) {
                    Ok(Some(message)) => found.push(message),
                    Ok(None) => break,
                    Err(failed) => return (found, Some(failed)),
                }
            }
        }
        (found, None)
    };
    assert_eq!(taken(1), taken(bytes.len().max(1)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_taken_when_they_are_whole() {
        let framed = frame(&"text".to_owned());
        assert_eq!(framed[..5], [0, 0, 0, 0, 6]);
        let mut bytes = BytesMut::from(&framed[..7]);
        assert_eq!(take_frame(&mut bytes, 10), Ok(None));
        bytes.extend_from_slice(&framed[7..]);
        bytes.extend_from_slice(b"\0");
        assert_eq!(take_frame(&mut bytes, 10), Ok(Some(framed.slice(5..))));
        assert_eq!(bytes.as_ref(), b"\0");
        assert_eq!(take_frame(&mut BytesMut::from(&framed[..]), 5), Err(RESOURCE_EXHAUSTED));
        assert_eq!(take_frame(&mut BytesMut::from(&b"\x01\0\0\0\0"[..]), 5), Err(INTERNAL), "compressed");
    }

    #[test]
    fn the_status_is_in_the_trailers_or_in_the_headers_alone() {
        let status = |value: &'static str| HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static(value))]);
        let none = HeaderMap::new();
        let data = || frame(&"text".to_owned());
        assert_eq!(message::<String>(&none, data(), Some(&status("0"))), Ok("text".to_owned()));
        assert_eq!(message::<String>(&none, data(), Some(&status("7"))), Err(Failed(7)));
        assert_eq!(message::<String>(&none, data(), Some(&status("many"))), Err(UNKNOWN));
        assert_eq!(message::<String>(&none, data(), None), Err(UNKNOWN));
        assert_eq!(message::<String>(&status("5"), Bytes::new(), None), Err(Failed(5)));
        assert_eq!(message::<String>(&none, Bytes::new(), Some(&status("0"))), Err(INTERNAL), "no message");
        assert_eq!(
            message::<String>(&none, Bytes::from_static(b"\0\0\0\0\x01\xff"), Some(&status("0"))),
            Err(INTERNAL)
        );
    }
}
