//! What goes on with a request after it was decided what to do about it: delays, answers, and what is told of it.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use culvert_xds_client::{api::culvert::overrides::v1::Action, overrides::OUTCOME};
use http::HeaderValue;

use super::{
    super::{Flow, HttpFilter, Waiting, shared::Kept},
    Configured,
    refusal::Refusal,
};
use crate::{
    access_log::ResponseFlags,
    http::{
        body::Body,
        headers::names::X_REQUEST_ID,
        route_match::authority,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
};

/// The longest text from outside that is logged, in characters.
const LONGEST: usize = 200;

/// What was decided about a request at this hop, for people: `users.default:80: applied revision x, delayed by 5 ms; refused fault
/// over_limit`.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    applied: Vec<String>,
    refused: Vec<String>,
}

impl Outcome {
    pub(super) fn done(&mut self, what: String) {
        self.applied.push(what);
    }

    /// What seemed to be done was not, after all.
    fn undone(&mut self, what: &str, action: Action, refusal: Refusal) {
        self.applied.retain(|done| done != what);
        self.refused(Some(action), refusal);
    }

    /// `action`: `None` of a whole message or override.
    pub(super) fn refused(&mut self, action: Option<Action>, refusal: Refusal) {
        self.refused.push(match action {
            Some(action) => format!("{} {}", action.name(), refusal.name()),
            None => refusal.name().to_owned(),
        });
    }

    pub(super) fn in_words(&self, hop: &str) -> String {
        let mut text = format!("{hop}: ");
        match (self.applied.is_empty(), self.refused.is_empty()) {
            (true, true) => text.push_str("nothing asked"),
            (applied, refused) => {
                if !applied {
                    text.push_str("applied ");
                    text.push_str(&self.applied.join(", "));
                }
                if !refused {
                    text.push_str(if applied { "refused " } else { "; refused " });
                    text.push_str(&self.refused.join(", "));
                }
            }
        }
        text
    }
}

/// One stream about which something is still to be done.
pub(super) struct OverrideStream {
    pub(super) delay: Duration,
    /// The answer in the place of the service's.
    pub(super) fault: Option<LocalReply>,
    /// What the client is told: the hop, and what was decided.
    pub(super) told: Option<(Arc<str>, Outcome)>,
    /// The request goes into a tunnel, by this override.
    pub(super) tunnel: Option<Tunnelled>,
    /// What is logged about it begins so.
    pub(super) logged: Option<String>,
}

/// A request that goes into a tunnel, or where it would have gone if the tunnel is gone.
pub(super) struct Tunnelled {
    pub(super) by: Kept<Configured>,
    /// In words.
    pub(super) what: String,
}

impl OverrideStream {
    pub(super) fn is_needed(&self) -> bool {
        let OverrideStream { delay, fault, told, tunnel, logged } = self;
        !delay.is_zero() || fault.is_some() || told.is_some() || tunnel.is_some() || logged.is_some()
    }

    /// What the request comes to at this filter.
    pub(super) fn begin(&mut self, cx: &mut StreamCx) -> Flow {
        if !self.delay.is_zero() {
            cx.flags |= ResponseFlags::DI;
            return Flow::Wait;
        }
        self.fault.take().map_or(Flow::Continue, Flow::Respond)
    }
}

/// What identifies a request in the log. What comes from outside is shortened.
pub(super) fn described(head: &RequestHead, cx: &StreamCx) -> String {
    let id = head.headers.get(X_REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or("-");
    let path = head.uri.path_and_query().map_or("", |path| path.as_str());
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "request {} from {}: {} {}{}",
        shortened(id),
        cx.connection.remote,
        head.method,
        shortened(authority(head)),
        shortened(path)
    );
    text
}

fn shortened(text: &str) -> String {
    text.chars().take(LONGEST).flat_map(char::escape_default).collect()
}

impl HttpFilter for OverrideStream {
    fn wait_request<'a>(
        &'a mut self,
        _head: &'a mut RequestHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async {
            tokio::time::sleep(self.delay).await;
            self.fault.take().map_or(Flow::Continue, Flow::Respond)
        })
    }

    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, cx: &mut StreamCx) -> Flow {
        if let Some(Tunnelled { by, what }) = self.tunnel.take()
            && cx.progress.left_tunnel.get()
        {
            by.stats.refused(Refusal::TunnelGone);
            by.stats.rejected.inc();
            if let Some((_, outcome)) = &mut self.told {
                outcome.undone(&what, Action::Route, Refusal::TunnelGone);
            }
        }
        if let Some((hop, outcome)) = self.told.take()
            && let Ok(told) = HeaderValue::try_from(outcome.in_words(&hop))
        {
            head.headers.append(OUTCOME, told);
        }
        if let Some(logged) = self.logged.take() {
            let host = cx.upstream_host.as_ref().map_or("none", |host| host.host.display());
            let details = cx.local_reply.as_deref().unwrap_or("via_upstream");
            tracing::info!(
                status = head.status.as_u16(),
                host,
                details,
                attempts = cx.progress.attempts.get(),
                milliseconds = cx.started.elapsed().as_millis() as u64,
                "override: {logged}: answered"
            );
        }
        Flow::Continue
    }
}

impl Drop for OverrideStream {
    fn drop(&mut self) {
        if let Some(logged) = self.logged.take() {
            tracing::info!("override: {logged}: ended without an answer");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_one_line() {
        let mut outcome = Outcome::default();
        assert_eq!(outcome.in_words("a:80"), "a:80: nothing asked");
        outcome.refused(Some(Action::Fault), Refusal::OverLimit);
        assert_eq!(outcome.in_words("a:80"), "a:80: refused fault over_limit");
        outcome.done("revision x".to_owned());
        outcome.done("delayed by 5 ms".to_owned());
        outcome.refused(None, Refusal::Unlisted);
        let expected = "a:80: applied revision x, delayed by 5 ms; refused fault over_limit, unlisted";
        assert_eq!(outcome.in_words("a:80"), expected);
        outcome.undone("revision x", Action::Route, Refusal::TunnelGone);
        let expected = "a:80: applied delayed by 5 ms; refused fault over_limit, unlisted, route tunnel_gone";
        assert_eq!(outcome.in_words("a:80"), expected);
    }

    #[test]
    fn what_is_logged_of_others_is_short_and_printable() {
        assert_eq!(shortened("a\nb\u{1b}"), "a\\nb\\u{1b}");
        assert_eq!(shortened(&"x".repeat(1000)).len(), LONGEST);
    }
}
