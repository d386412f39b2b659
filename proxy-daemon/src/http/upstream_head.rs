//! The head of a request in the form of the protocol that a host speaks.

use http::{HeaderValue, Method, Uri, Version, header::HOST};

use super::{
    look::Look as _,
    redirect,
    route_match::{authority, value_of},
    stream::RequestHead,
};
use crate::{
    config::model::UpstreamProtocol,
    tls::PeerName,
    upstream::{Wanted, WorkerCluster},
};

/// What a cluster's hosts are spoken to.
pub(super) fn protocol<'a>(cluster: &'a WorkerCluster, head: &RequestHead) -> Wanted<'a> {
    match &cluster.cluster.config.protocol {
        UpstreamProtocol::Http1 => Wanted::Http1,
        UpstreamProtocol::Http2(options) => Wanted::Http2(options),
        UpstreamProtocol::Downstream(options) if head.version == Version::HTTP_2 => Wanted::Http2(options),
        UpstreamProtocol::Downstream(_) => Wanted::Http1,
        UpstreamProtocol::Auto(options) => Wanted::Auto(options),
    }
}

/// What a request calls its host, where the cluster has the handshake go by that.
pub(super) fn peer_name(cluster: &WorkerCluster, head: &RequestHead) -> Option<PeerName> {
    let options = cluster.cluster.config.peer_name.as_ref()?;
    let said = options.header.as_ref().and_then(|header| value_of(header, head)).filter(|said| !said.is_empty());
    options.of(said.as_deref().unwrap_or_else(|| authority(head)))
}

/// Origin form and a `host` header.
pub(super) fn to_http1(head: &mut RequestHead) {
    if head.method == Method::CONNECT {
        if let Ok(host) = HeaderValue::from_str(authority(head)) {
            head.headers.insert(HOST, host);
        }
    } else if head.uri.authority().is_some() {
        if let Ok(host) = HeaderValue::from_str(authority(head)) {
            head.headers.insert(HOST, host);
        }
        head.uri = head.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
    }
    head.version = Version::HTTP_11;
}

/// A whole URI and no `host` header (RFC 9113, section 8.3.1).
pub(super) fn to_http2(head: &mut RequestHead) {
    if head.method == Method::CONNECT {
        head.headers.remove(HOST);
    } else if let Some(host) = head.headers.take(&HOST).filter(|_| head.uri.authority().is_none()) {
        let https = redirect::scheme(head) == "https";
        let mut parts = std::mem::take(&mut head.uri).into_parts();
        parts.scheme = Some(if https { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
        parts.authority = http::uri::Authority::try_from(host.as_bytes()).ok();
        if parts.path_and_query.is_none() {
            parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
        }
        if parts.authority.is_none() {
            parts.scheme = None;
        }
        // A scheme only with an authority, and always a path: always valid.
        head.uri = Uri::from_parts(parts).unwrap_or_default();
    }
    head.version = Version::HTTP_2;
}

/// The scheme of a whole URI.
pub(super) fn set_scheme(uri: &mut Uri, https: bool) {
    let mut parts = std::mem::take(uri).into_parts();
    if parts.authority.is_some() {
        parts.scheme = Some(if https { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
    }
    // As before, or with another scheme in its place.
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_is_the_hosts() {
        let mut uri = Uri::from_static("http://a.test/x?y");
        set_scheme(&mut uri, true);
        assert_eq!(uri, "https://a.test/x?y");
        set_scheme(&mut uri, false);
        assert_eq!(uri, "http://a.test/x?y");
        let mut path = Uri::from_static("/x");
        set_scheme(&mut path, true);
        assert_eq!(path, "/x");
    }
}
