//! Requests for another protocol on the connection, such as WebSocket: what they ask for, and where they may.

use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{CONNECTION, LOCATION, UPGRADE},
};

use super::{
    codec::{Incoming, h1::Upgrade},
    stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
};
use crate::{
    access_log::ResponseFlags,
    config::model::{RouteAction, UpgradeRule},
};

/// What is said of an upgrade in the headers that concern one connection only. Hosts and clients must see it.
pub(super) struct Asked {
    connection: HeaderValue,
    protocol: HeaderValue,
}

impl Asked {
    /// What a request asks for; before its hop-by-hop headers are removed.
    pub(super) fn of_request(head: &RequestHead) -> Option<Asked> {
        head.extensions.get::<Upgrade>()?;
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
            connection: connection.unwrap_or(HeaderValue::from_static("upgrade")),
            protocol: headers.get(UPGRADE)?.clone(),
        })
    }

    /// Says it again.
    pub(super) fn tell(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, self.connection.clone());
        headers.insert(UPGRADE, self.protocol.clone());
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
            let location = response.headers.remove(LOCATION);
            response.headers = location.map(|location| (LOCATION, location)).into_iter().collect();
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
