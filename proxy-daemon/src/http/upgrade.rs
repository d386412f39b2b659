//! Requests for another protocol on the connection, such as WebSocket, or for a tunnel (CONNECT): what they ask for, and where they
//! may. Whatever a client speaks, in here it asks as in HTTP/1.1; codecs translate (RFC 8441).

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, UPGRADE},
};

use super::{
    codec::{Incoming, h1::Upgrade},
    stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
};
use crate::{
    access_log::ResponseFlags,
    config::model::{
        ConnectConfig, ForwardAction, HttpConnectionManagerConfig, ProxyProtocol, RouteAction, UpgradeRule,
    },
};

/// What is said of an upgrade in the headers that concern one connection only. Hosts and clients must see it.
pub(super) struct Asked {
    /// None with CONNECT, which says it by its method.
    connection: Option<HeaderValue>,
    protocol: HeaderValue,
}

impl Asked {
    /// What a request asks for; before its hop-by-hop headers are removed.
    pub(super) fn of_request(head: &RequestHead) -> Option<Asked> {
        head.extensions.get::<Upgrade>()?;
        if head.method == Method::CONNECT {
            return Some(Asked { connection: None, protocol: HeaderValue::from_static("CONNECT") });
        }
        Asked::of(&head.headers)
    }

    /// What a host has agreed to; before the hop-by-hop headers are removed.
    pub(super) fn of_response(head: &ResponseHead) -> Option<Asked> {
        if head.status == StatusCode::SWITCHING_PROTOCOLS { Asked::of(&head.headers) } else { None }
    }

    fn of(headers: &HeaderMap) -> Option<Asked> {
        let only_upgrade = |value: &&HeaderValue| {
            let mut words = value.to_str().unwrap_or_default().split(',').map(str::trim);
            words.all(|word| word.eq_ignore_ascii_case("upgrade") || word.eq_ignore_ascii_case("keep-alive"))
        };
        // What else it nominates does not go on.
        let connection = headers.get(CONNECTION).filter(only_upgrade).cloned();
        Some(Asked {
            connection: Some(connection.unwrap_or(HeaderValue::from_static("upgrade"))),
            protocol: headers.get(UPGRADE)?.clone(),
        })
    }

    /// Says it again.
    pub(super) fn tell(&self, headers: &mut HeaderMap) {
        if let Some(connection) = &self.connection {
            headers.insert(CONNECTION, connection.clone());
            headers.insert(UPGRADE, self.protocol.clone());
        }
    }

    /// Which filters such a request meets.
    pub(super) fn chain(&self, manager: &HttpConnectionManagerConfig) -> Range<usize> {
        let protocol = self.protocol.as_bytes();
        let rule = manager.upgrades.iter().find(|rule| rule.protocol.as_bytes().eq_ignore_ascii_case(protocol));
        rule.and_then(|rule| rule.filters.clone()).unwrap_or(manager.chain.clone())
    }

    /// Whether the route, or the connection manager where the route says nothing, allows it.
    pub(super) fn is_allowed(&self, cx: &StreamCx, manager: &[UpgradeRule]) -> bool {
        let route = match cx.route.as_ref().map(|route| &route.action) {
            Some(RouteAction::Forward(action)) => &*action.upgrades,
            _ => &[],
        };
        let protocol = self.protocol.as_bytes();
        let mut rules = route.iter().chain(manager);
        rules.find(|rule| rule.protocol.as_bytes().eq_ignore_ascii_case(protocol)).is_some_and(|rule| rule.enabled)
    }

    /// Of a host that answers a WebSocket client as if it had asked for nothing special, only the status and `location` go on, as
    /// in Envoy.
    pub(super) fn settle(&self, response: &mut ResponseHead, incoming: &mut Incoming) {
        let websocket = self.protocol.as_bytes().eq_ignore_ascii_case(b"websocket");
        let switched = response.status == StatusCode::SWITCHING_PROTOCOLS;
        if websocket && !switched && response.status.as_u16() < 400 {
            *incoming = Incoming::Empty;
            for name in [CONTENT_LENGTH, CONTENT_TYPE] {
                response.headers.remove(name);
            }
        }
    }
}

/// Whether the answer to a request is one after which its body is of another protocol.
pub(super) fn is_switched(method: &Method, status: StatusCode) -> bool {
    status == StatusCode::SWITCHING_PROTOCOLS || *method == Method::CONNECT && status.is_success()
}

/// Whether a request asks for WebSocket.
pub(super) fn is_websocket(head: &RequestHead) -> bool {
    head.extensions.get::<Upgrade>().is_some()
        && head.method != Method::CONNECT
        && head.headers.get(UPGRADE).is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// What a request becomes whose tunnel ends here; `None`: it goes on as it is.
pub(super) fn terminated(action: &ForwardAction, method: &Method) -> Option<ConnectConfig> {
    if !matches!(*method, Method::CONNECT | Method::POST) {
        return None;
    }
    let connect = action.upgrades.iter().find_map(|rule| rule.connect.filter(|_| rule.enabled))?;
    (*method == Method::CONNECT || connect.allow_post).then_some(connect)
}

/// What a host is told of the client, before anything else.
pub(super) fn proxy_protocol(version: ProxyProtocol, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    let (family, addresses) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (0x11, [&from.octets()[..], &to.octets()].concat()),
        (IpAddr::V6(from), IpAddr::V6(to)) => (0x21, [&from.octets()[..], &to.octets()].concat()),
        // Nobody is told of addresses that do not go together.
        _ => (0, Vec::new()),
    };
    match (version, family) {
        (ProxyProtocol::V1, 0) => b"PROXY UNKNOWN\r\n".to_vec(),
        (ProxyProtocol::V1, _) => {
            let name = if family == 0x11 { "TCP4" } else { "TCP6" };
            format!("PROXY {name} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
        }
        // LOCAL, of which nothing more is said.
        (ProxyProtocol::V2, 0) => [SIGNATURE, &[0x20, 0, 0, 0]].concat(),
        (ProxyProtocol::V2, _) => {
            let length = u16::try_from(addresses.len() + 4).unwrap_or_default().to_be_bytes();
            let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
            [SIGNATURE, &[0x21, family], &length, &addresses, &ports].concat()
        }
    }
}

/// The answer where it is not allowed.
pub(super) fn refused() -> LocalReply {
    let mut reply = LocalReply::new(StatusCode::FORBIDDEN, "", ResponseFlags::default(), "upgrade_failed");
    // What follows is not HTTP.
    reply.headers.push((CONNECTION, HeaderValue::from_static("close")));
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_told_of_clients() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (from, to) = (address("192.0.2.1:1000"), address("192.0.2.2:80"));
        let line = proxy_protocol(ProxyProtocol::V1, from, to);
        assert_eq!(line, b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 80\r\n");
        let bytes = proxy_protocol(ProxyProtocol::V2, from, to);
        assert_eq!(bytes[..16], *b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
        assert_eq!(bytes[16..], [192, 0, 2, 1, 192, 0, 2, 2, 3, 232, 0, 80]);
        let (from, to) = (address("[2001:db8::1]:1000"), address("[2001:db8::2]:80"));
        assert_eq!(proxy_protocol(ProxyProtocol::V1, from, to), b"PROXY TCP6 2001:db8::1 2001:db8::2 1000 80\r\n");
        assert_eq!(proxy_protocol(ProxyProtocol::V2, from, to).len(), 16 + 36);
        // They do not go together.
        let to = address("192.0.2.2:80");
        assert_eq!(proxy_protocol(ProxyProtocol::V1, from, to), b"PROXY UNKNOWN\r\n");
        assert_eq!(proxy_protocol(ProxyProtocol::V2, from, to).len(), 16);
    }
}
