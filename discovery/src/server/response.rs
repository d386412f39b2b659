//! Responses, and how they are written: the resources in them are not copied for each client.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{BufMut as _, Bytes, BytesMut};
use envoy_types::pb::envoy::service::discovery::v3::{ResourceError, ResourceName};
use envoy_types::pb::google::rpc;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use prost::Message as _;
use prost::encoding::encode_varint;
use tokio::sync::mpsc;
use tonic::Status;

use crate::resources::Resource;

// Keys of the fields that both kinds of responses have, and one that delta responses have: number times 8, and 2.
const VERSION: u8 = 0x0a;
const TYPE_URL: u8 = 0x22;
const NONCE: u8 = 0x2a;
const REMOVED: u8 = 0x32;
/// The same of `resource_errors`, which responses of the state of the world have.
const ERROR: u8 = 0x3a;
/// gRPC's NOT_FOUND.
const NOT_FOUND: i32 = 5;
/// What is shorter is copied into a frame with others: each frame has its own head and its own part of a system call.
const COPIED: usize = 1024;
/// About how long a frame of copies becomes.
const FRAME: usize = 16 * 1024;

/// Which protocol a response is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// State of the world.
    Sotw,
    /// Incremental.
    Delta,
}

/// A response of either variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Which protocol it is of.
    pub variant: Variant,
    /// The version of the type.
    pub version: Arc<str>,
    /// The resources that are sent.
    pub resources: Vec<Arc<Resource>>,
    /// The names of those that are gone; in the state of the world, of those that there are not.
    pub removed: Vec<Arc<str>>,
    /// The type.
    pub type_url: String,
    /// What the answer refers to.
    pub nonce: String,
}

impl Response {
    /// The response as a gRPC message: parts that belong one behind the other.
    pub fn into_parts(self) -> Message {
        let Self { variant, version, resources, removed, type_url, nonce } = self;
        let mut head = BytesMut::new();
        put(&mut head, VERSION, &*version);
        let mut parts = VecDeque::with_capacity(resources.len() + 2);
        parts.extend(resources.iter().map(|resource| match variant {
            Variant::Sotw => resource.in_sotw(),
            Variant::Delta => resource.in_delta(),
        }));
        let mut tail = BytesMut::new();
        put(&mut tail, TYPE_URL, &type_url);
        put(&mut tail, NONCE, &nonce);
        for name in &removed {
            match variant {
                Variant::Delta => put(&mut tail, REMOVED, name.as_bytes()),
                Variant::Sotw => put(&mut tail, ERROR, missing(name)),
            }
        }
        parts.push_back(tail.freeze());
        let length = head.len() + parts.iter().map(Bytes::len).sum::<usize>();
        let mut first = BytesMut::with_capacity(5 + head.len());
        // Not compressed.
        first.put_u8(0);
        // Messages of 4 GiB do not fit into memory before they do not fit here.
        first.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        first.extend_from_slice(&head);
        parts.push_front(first.freeze());
        Message { parts }
    }
}

/// That there is no resource of a name.
fn missing(name: &str) -> Vec<u8> {
    let error = ResourceError {
        resource_name: Some(ResourceName { name: name.to_owned(), ..Default::default() }),
        error_detail: Some(rpc::Status { code: NOT_FOUND, message: "does not exist".to_owned(), ..Default::default() }),
    };
    error.encode_to_vec()
}

fn put(to: &mut BytesMut, key: u8, value: impl AsRef<[u8]>) {
    let value = value.as_ref();
    to.put_u8(key);
    encode_varint(value.len() as u64, to);
    to.put_slice(value);
}

/// A gRPC message that is being written.
#[derive(Debug, Default)]
pub struct Message {
    parts: VecDeque<Bytes>,
}

impl Iterator for Message {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let first = self.parts.pop_front()?;
        let is_short = |part: &Bytes| part.len() < COPIED;
        if !is_short(&first) || !self.parts.front().is_some_and(is_short) {
            return Some(first);
        }
        let mut frame = BytesMut::with_capacity(FRAME);
        frame.extend_from_slice(&first);
        while let Some(part) = self.parts.front().filter(|part| is_short(part) && frame.len() + part.len() <= FRAME) {
            frame.extend_from_slice(part);
            self.parts.pop_front();
        }
        Some(frame.freeze())
    }
}

/// The body of a stream: its responses, made into frames when the client reads.
#[derive(Debug)]
pub struct ResponseBody {
    responses: Option<mpsc::Receiver<Result<Response, Status>>>,
    current: Message,
}

impl ResponseBody {
    /// A body that ends when the channel does.
    pub fn new(responses: mpsc::Receiver<Result<Response, Status>>) -> Self {
        Self { responses: Some(responses), current: Message::default() }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let body = self.get_mut();
        loop {
            if let Some(data) = body.current.next() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            let Some(responses) = &mut body.responses else { return Poll::Ready(None) };
            let status = match ready!(responses.poll_recv(cx)) {
                Some(Ok(response)) => {
                    body.current = response.into_parts();
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            body.responses = None;
            return Poll::Ready(Some(Ok(Frame::trailers(trailers(&status)))));
        }
    }
}

fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        // What is said of it cannot be in a header: the code can.
        trailers.insert("grpc-status", HeaderValue::from(i32::from(status.code())));
    }
    trailers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::type_url::CLUSTER;
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};

    #[test]
    fn what_is_written_is_what_prost_reads() {
        let resource = |name: &str, length| {
            let cluster = Cluster { alt_stat_name: "x".repeat(length), ..Default::default() };
            Arc::new(Resource::new(CLUSTER, name, &cluster))
        };
        let resources = vec![resource("a", 10), resource("b", 5000), resource("c", 20), resource("d", 30)];
        for variant in [Variant::Sotw, Variant::Delta] {
            let response = Response {
                variant,
                version: "v".into(),
                resources: resources.clone(),
                removed: vec!["e".into(), "f".into()],
                type_url: CLUSTER.to_owned(),
                nonce: "7".to_owned(),
            };
            let frames: Vec<Bytes> = response.into_parts().collect();
            assert_eq!(frames.len(), 3, "short ones go together, long ones alone: {frames:?}");
            assert_eq!(
                frames[1].as_ptr(),
                match variant {
                    Variant::Delta => resources[1].in_delta().as_ptr(),
                    Variant::Sotw => resources[1].in_sotw().as_ptr(),
                }
            );
            let whole = frames.concat();
            assert_eq!(whole[..5], [&[0][..], &u32::try_from(whole.len() - 5).unwrap().to_be_bytes()].concat());
            let bodies: Vec<_> = resources.iter().map(|resource| resource.body()).collect();
            match variant {
                Variant::Sotw => {
                    let read = DiscoveryResponse::decode(&whole[5..]).unwrap();
                    assert_eq!((&*read.version_info, &*read.type_url, &*read.nonce), ("v", CLUSTER, "7"));
                    assert_eq!(read.resources, bodies);
                    let errors = read.resource_errors.into_iter();
                    let errors = errors.map(|it| (it.resource_name.unwrap().name, it.error_detail.unwrap().code));
                    let names = ["e", "f"].map(str::to_owned);
                    assert_eq!(errors.collect::<Vec<_>>(), names.map(|name| (name, NOT_FOUND)));
                }
                Variant::Delta => {
                    let read = DeltaDiscoveryResponse::decode(&whole[5..]).unwrap();
                    assert_eq!((&*read.system_version_info, &*read.type_url, &*read.nonce), ("v", CLUSTER, "7"));
                    assert_eq!(read.removed_resources, ["e", "f"]);
                    let found: Vec<_> = read.resources.into_iter().map(|r| (r.name, r.resource.unwrap())).collect();
                    let names = ["a", "b", "c", "d"].map(str::to_owned);
                    assert_eq!(found, names.into_iter().zip(bodies).collect::<Vec<_>>());
                }
            }
        }
    }
}
