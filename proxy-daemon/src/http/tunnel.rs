//! Requests whose bodies are the bytes of something else: what a TCP proxy makes of connections where it is told to.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header::HOST, uri::Authority, uri::PathAndQuery};
use http_body::{Body as _, Frame};

use super::{
    body::{Body, BodyError, WrappedBody},
    call::{self, Answer, Failure},
    codec::h1::Upgrade,
    headers,
};
use crate::{
    access_log::{Record, ResponseFlags},
    config::model::{HeaderAdd, MetadataMatch},
    upstream::{Source, UpstreamInfo, WorkerCluster, WorkerHost},
};

/// What the request says of itself.
pub(crate) struct Target<'a> {
    /// Where the tunnel leads to.
    pub(crate) host: HeaderValue,
    /// It is a POST, to this path; `None`: CONNECT.
    pub(crate) post_path: Option<&'a PathAndQuery>,
    /// Further headers; formats are filled from the record.
    pub(crate) headers: &'a [HeaderAdd],
    pub(crate) record: &'a Record<'a>,
    /// What the host's metadata has to say.
    pub(crate) metadata_match: Option<&'a MetadataMatch>,
    /// What hosts are chosen by that hash.
    pub(crate) hash: Option<u64>,
}

/// A tunnel that its host has agreed to.
pub(crate) struct Tunnel(Answer);

/// Asks a host for a tunnel. `body` must wait with its bytes until there is one.
///
/// # Errors
/// What is to be said of it in access logs.
pub(crate) async fn open<B: WrappedBody + 'static>(
    cluster: &Rc<WorkerCluster>,
    source: Option<Source>,
    target: Target<'_>,
    body: B,
) -> Result<Tunnel, ResponseFlags> {
    let (mut head, ()) = Request::new(()).into_parts();
    match target.post_path {
        Some(path) => {
            head.method = Method::POST;
            head.uri = Uri::from(path.clone());
            head.headers.insert(HOST, target.host);
        }
        None => {
            head.method = Method::CONNECT;
            let authority = Authority::try_from(target.host.as_bytes());
            head.uri = Uri::from(authority.map_err(|_| ResponseFlags::UF)?);
            head.extensions.insert(Upgrade);
        }
    }
    let mut added = HeaderMap::new();
    headers::add(&mut added, target.headers, target.record);
    head.headers.extend(added);
    let body = Body::Wrapped(Box::new(body));
    let answer = call::send_to(cluster, source, (target.metadata_match, target.hash), head, body).await;
    let answer = answer.map_err(|failure| match failure {
        Failure::NoHost => ResponseFlags::UH,
        Failure::Overflow => ResponseFlags::UO,
        Failure::Reset | Failure::TimedOut | Failure::Broken | Failure::TooLong => ResponseFlags::UF,
    })?;
    let agreed = match answer.upstream().1.is_http2() {
        true => answer.head.status == StatusCode::OK,
        false => answer.head.status.is_success(),
    };
    if agreed { Ok(Tunnel(answer)) } else { Err(ResponseFlags::UF) }
}

impl Tunnel {
    /// The host, and the connection to it.
    pub(crate) fn upstream(&self) -> (&Rc<WorkerHost>, &Rc<UpstreamInfo>) {
        let (host, connection) = self.0.upstream();
        (host, connection.info())
    }

    /// What comes out of it.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(self.0.body()).poll_frame(cx)
    }

    /// Sends on what goes into it, while nobody takes what comes out.
    pub(crate) fn send_on(&mut self, cx: &mut Context<'_>) {
        self.0.body().send_on(cx);
    }
}
