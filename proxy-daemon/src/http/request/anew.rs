//! Requests that begin anew: where a response redirects them, or a filter wants another one.

use super::{Arrived, ConnState};
use crate::{
    config::model::RouteAction,
    http::{
        body::Body,
        filters::{Redirect, RedirectPolicy},
        internal_redirect::{self, Sent, Trail},
        stream::{RequestHead, ResponseHead, StreamCx},
        stream_end::StreamEnd,
    },
};

/// The request that begins anew because a filter wants another response; `None`: there is no route for it.
pub(super) fn lead(redirect: Redirect, state: &ConnState, cx: &StreamCx) -> Option<Arrived> {
    let Redirect { mut head, led } = redirect;
    if state.routes.route(&head, &cx.match_cx()).is_none() {
        led.policy.has_no_route();
        return None;
    }
    RedirectPolicy::finish(&mut head);
    let (remote, internal) = (cx.remote, cx.internal);
    let custom_response = Some(led);
    Some(Arrived { head: *head, body: Body::Empty, upgrade: None, remote, internal, trail: None, custom_response })
}

/// What the request becomes where the response redirects it, and that is followed here.
pub(super) fn redirected(
    sent: &Sent,
    response: &ResponseHead,
    cx: &StreamCx,
    end: &StreamEnd,
    mut trail: Box<Trail>,
) -> Option<Arrived> {
    let route = cx.route.as_ref()?;
    let RouteAction::Forward(action) = &route.action else { return None };
    let policy = action.internal_redirect.as_deref()?;
    if !policy.response_codes.contains(&response.status) {
        return None;
    }
    let state = &end.state;
    let find = |head: &RequestHead| state.routes.route(head, &cx.match_cx());
    let encrypted = cx.connection.tls().is_some();
    let stats = &state.manager.stats;
    let next = internal_redirect::follow(sent, (policy, route), response, (encrypted, &mut trail), stats, find);
    if let Some(cluster) = &cx.cluster {
        let stats = &cluster.cluster.stats;
        match next {
            Some(_) => stats.upstream_internal_redirect_succeeded_total.inc(),
            None => stats.upstream_internal_redirect_failed_total.inc(),
        }
    }
    let (head, body) = next?;
    Some(Arrived {
        head,
        body,
        upgrade: None,
        remote: cx.remote,
        internal: cx.internal,
        trail: Some(trail),
        custom_response: cx.custom_response.clone(),
    })
}
