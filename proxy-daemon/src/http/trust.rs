//! Whom the connection manager believes: where a request comes from, and what it may therefore say.

use std::net::{IpAddr, SocketAddr};

use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{USER_AGENT, VIA},
};

use super::{
    headers::{append, join_lines, names::*, strip_hop_by_hop},
    look::Look as _,
    match_input::Told,
    node, request_id,
    stream::{LocalReply, RequestHead},
};
use crate::{
    access_log::ResponseFlags,
    config::model::{Cidr, ForwardClientCert, ForwardedCert, HttpConnectionManagerConfig, IpDetection, TrustedXff},
    listener::ConnectionInfo,
    tls::TlsInfo,
};

/// Obeyed from internal clients only, and removed from all others.
const INTERNAL_ONLY: [&str; 16] = [
    "x-envoy-internal",
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-stream-duration-ms",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-ip-tags",
    "x-envoy-original-url",
    "x-envoy-hedge-on-per-try-timeout",
];

/// Removed from requests that enter the mesh.
const EDGE_ONLY: [&str; 5] = [
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-original-path",
    "x-envoy-original-host",
];

/// What trust made of a request.
#[derive(Debug)]
pub(super) struct Trusted {
    pub(super) remote: SocketAddr,
    pub(super) internal: bool,
    /// Its id, where the response shall carry it.
    pub(super) request_id: Option<HeaderValue>,
}

/// Makes a client's request fit to be routed: hop-by-hop headers, trust, request id, path.
///
/// # Errors
/// The answer to a client whose address is not to be had.
pub(super) fn prepare_request(
    head: &mut RequestHead,
    config: &HttpConnectionManagerConfig,
    peer: SocketAddr,
    local_ip: IpAddr,
    tls: Option<&TlsInfo>,
) -> Result<Trusted, LocalReply> {
    strip_hop_by_hop(&mut head.headers);
    let (remote, internal) = resolve_client(&mut head.headers, config, peer, local_ip)?;
    let headers = &mut head.headers;
    let scheme = HeaderValue::from_static(if tls.is_some() { "https" } else { "http" });
    if config.use_remote_address && config.xff_num_trusted_hops == 0 {
        headers.insert(X_FORWARDED_PROTO, scheme);
    } else {
        headers.entry(X_FORWARDED_PROTO).or_insert(scheme);
    }
    if let Some(scheme) = config.scheme {
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(scheme.as_str()));
    }
    let edge = config.use_remote_address && !internal;
    if !internal && headers.keys().any(is_envoys) {
        INTERNAL_ONLY.iter().for_each(|name| drop(headers.remove(*name)));
        if edge {
            EDGE_ONLY.iter().for_each(|name| drop(headers.remove(*name)));
        }
    }
    if internal {
        headers.insert(X_ENVOY_INTERNAL, HeaderValue::from_static("true"));
    }
    if config.add_user_agent {
        tell_service(headers);
    }
    if edge && let Ok(value) = HeaderValue::from_str(&remote.ip().to_string()) {
        headers.insert(X_ENVOY_EXTERNAL_ADDRESS, value);
    }
    if config.generate_request_id {
        request_id::set(headers, edge, config);
    }
    if let Some(via) = &config.via {
        append(headers, VIA, via, ", ");
    }
    let told = config.always_set_request_id_in_response || internal && headers.has(&X_ENVOY_FORCE_TRACE);
    let request_id = if told { headers.get(X_REQUEST_ID).cloned() } else { None };
    Ok(Trusted { remote, internal, request_id })
}

/// `add_user_agent`
fn tell_service(headers: &mut HeaderMap) {
    let Some(node) = node::this() else { return };
    headers.insert(X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER, node.cluster.clone());
    if headers.get(USER_AGENT).is_none_or(HeaderValue::is_empty) {
        headers.insert(USER_AGENT, node.cluster.clone());
    }
    if !node.id.is_empty() {
        headers.insert(X_ENVOY_DOWNSTREAM_SERVICE_NODE, node.id.clone());
    }
}

/// Of several lines one is made, without those that are empty, as in Envoy.
fn join_certificates(headers: &mut HeaderMap) {
    if !headers.repeats(&X_FORWARDED_CLIENT_CERT) {
        return;
    }
    let lines = headers.get_all(X_FORWARDED_CLIENT_CERT).into_iter().map(HeaderValue::as_bytes);
    let joined = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(&b","[..]);
    // Valid values and commas make a valid value.
    if let Ok(joined) = HeaderValue::from_bytes(&joined) {
        headers.insert(X_FORWARDED_CLIENT_CERT, joined);
    }
}

/// What a client says of its certificate is no proof of one: it is passed on, or written, only as configured.
pub(super) fn forward_client_cert(
    head: &mut RequestHead,
    config: &HttpConnectionManagerConfig,
    connection: &ConnectionInfo,
) {
    let remote = connection.remote;
    let matcher = config.forward_client_cert_matcher.as_ref();
    let found = matcher.and_then(|matcher| matcher.find(&Told { head, connection, remote, metadata: None }));
    let ForwardedCert { mode, details } = found.unwrap_or(&config.forward_client_cert);
    let (mode, tls, headers) = (*mode, connection.tls(), &mut head.headers);
    if mode == ForwardClientCert::AlwaysForwardOnly {
        return join_certificates(headers);
    }
    let tls = match tls.filter(|tls| mode != ForwardClientCert::Sanitize && tls.has_certificate()) {
        Some(_) if mode == ForwardClientCert::ForwardOnly => return join_certificates(headers),
        Some(tls) => tls,
        None => return drop(headers.take(&X_FORWARDED_CLIENT_CERT)),
    };
    let mut before = Vec::new();
    if mode == ForwardClientCert::AppendForward {
        // Of several lines one is made, as in Envoy.
        let lines = headers.get_all(X_FORWARDED_CLIENT_CERT).into_iter().map(HeaderValue::as_bytes);
        before = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(&b","[..]);
    }
    // What is there already says which format it is.
    let array = before.trim_ascii().strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]"));
    let json = if before.is_empty() { details.json } else { array.is_some() };
    match tls.forwarded(details, json) {
        Some(value) if !before.is_empty() => {
            let value = value.as_bytes();
            let all = match array {
                Some(items) if items.trim_ascii().is_empty() => value.to_vec(),
                Some(items) => [b"[", items, b",", value.get(1..).unwrap_or_default()].concat(),
                None => [&before, &b","[..], value].concat(),
            };
            if let Ok(all) = HeaderValue::from_bytes(&all) {
                headers.insert(X_FORWARDED_CLIENT_CERT, all);
            }
        }
        Some(value) => drop(headers.insert(X_FORWARDED_CLIENT_CERT, value)),
        None => drop(headers.remove(X_FORWARDED_CLIENT_CERT)),
    }
}

/// Finds the client's address and whether it is internal, and appends to `x-forwarded-for`.
fn resolve_client(
    headers: &mut HeaderMap,
    config: &HttpConnectionManagerConfig,
    peer: SocketAddr,
    local_ip: IpAddr,
) -> Result<(SocketAddr, bool), LocalReply> {
    join_lines(headers, &X_FORWARDED_FOR);
    let hops = config.xff_num_trusted_hops as usize;
    let (mut found, mut appends) = (None, false);
    // Only one address can be internal: with others before it, it is some proxy's.
    let mut alone = false;
    if config.use_remote_address {
        alone = !headers.has(&X_FORWARDED_FOR);
        appends = !config.skip_xff_append;
        if hops > 0 {
            found = forwarded_for(headers, hops - 1).map(|(ip, _)| ip);
        }
        found = found.or(Some(peer.ip()));
    } else if config.ip_detection.is_empty() {
        if let Some((ip, only)) = forwarded_for(headers, hops) {
            (found, alone) = (Some(ip), only);
        }
    } else {
        for detection in &config.ip_detection {
            let (client, append) = detect(detection, headers, peer.ip())?;
            appends |= append;
            if let Some((ip, only)) = client {
                (found, alone) = (Some(ip), only);
                break;
            }
        }
    }
    if appends {
        // Envoy writes a loopback client as the node's own address.
        let ip = if peer.ip().is_loopback() { local_ip } else { peer.ip() };
        if let Ok(value) = HeaderValue::from_str(&ip.to_string()) {
            append(headers, X_FORWARDED_FOR, &value, ",");
        }
    }
    let internal = alone && found.is_some_and(|ip| is_one_of(ip, &config.internal_ranges));
    let remote = match found {
        Some(ip) if ip != peer.ip() => SocketAddr::new(ip, 0),
        _ => peer,
    };
    Ok((remote, internal))
}

fn is_one_of(ip: IpAddr, ranges: &[Cidr]) -> bool {
    let ip = ip.to_canonical();
    ranges.iter().any(|range| range.contains(ip))
}

/// The client's address and whether it may be internal, and whether the peer is to be appended to `x-forwarded-for`.
fn detect(
    detection: &IpDetection,
    headers: &HeaderMap,
    peer: IpAddr,
) -> Result<(Option<(IpAddr, bool)>, bool), LocalReply> {
    match detection {
        IpDetection::Xff { trusted, append } => Ok(match trusted {
            TrustedXff::Hops(hops) => (forwarded_for(headers, *hops as usize), *append),
            TrustedXff::Ranges(ranges) if is_one_of(peer, ranges) => (beyond(headers, ranges), *append),
            TrustedXff::Ranges(_) => (None, true),
        }),
        IpDetection::Header { name, trusted, reject } => {
            let value = headers.get(name).and_then(|value| value.to_str().ok());
            match (value.and_then(|value| value.parse().ok()), reject) {
                (Some(ip), _) => Ok((Some((ip, *trusted)), false)),
                (None, Some(status)) => Err(unknown_client(*status)),
                (None, None) => Ok((None, false)),
            }
        }
    }
}

fn unknown_client(status: StatusCode) -> LocalReply {
    LocalReply::new(status, "", ResponseFlags::default(), "rejecting_because_detection_failed")
}

/// The addresses of `x-forwarded-for`, whose lines have been joined, from the right. Bytes that belong into no address are of the one that
/// has them: a client must not be able to hide those that proxies have added.
fn addresses(headers: &HeaderMap) -> Option<impl Iterator<Item = Option<IpAddr>>> {
    let value = headers.first(&X_FORWARDED_FOR)?.as_bytes();
    let address = |text: &[u8]| str::from_utf8(text.trim_ascii()).ok()?.parse().ok();
    Some(value.rsplit(|byte| *byte == b',').map(address))
}

fn is_only_one(headers: &HeaderMap) -> bool {
    headers.first(&X_FORWARDED_FOR).is_some_and(|value| !value.as_bytes().contains(&b','))
}

/// The `x-forwarded-for` address that stands `skip` places from the right, and whether it is the only one.
fn forwarded_for(headers: &HeaderMap, skip: usize) -> Option<(IpAddr, bool)> {
    let ip = addresses(headers)?.nth(skip)??;
    Some((ip, skip == 0 && is_only_one(headers)))
}

/// The last `x-forwarded-for` address that is none of these, or the first of all.
fn beyond(headers: &HeaderMap, trusted: &[Cidr]) -> Option<(IpAddr, bool)> {
    let alone = is_only_one(headers);
    let mut last = None;
    for address in addresses(headers)? {
        let ip = address?;
        last = Some((ip, alone));
        if !is_one_of(ip, trusted) {
            break;
        }
    }
    last
}

/// One look at the few names that there are is cheaper than a look-up of each name that might be there.
fn is_envoys(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-envoy-")
}

#[cfg(test)]
#[path = "trust_tests.rs"]
mod tests;
