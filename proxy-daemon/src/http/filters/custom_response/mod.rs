//! `envoy.filters.http.custom_response`: other answers in the place of some.

mod matcher;
mod redirect;

use std::sync::Arc;

use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::{
        filters::http::custom_response::v3::CustomResponse,
        http::custom_response::{
            local_response_policy::v3::{LocalResponsePolicy, local_response_policy::ResponseCodeDetailsAction},
            redirect_policy::v3::RedirectPolicy as ProtoRedirect,
        },
    },
    google::protobuf::Any,
};
use http::{HeaderMap, StatusCode};
use prost::Name as _;

use self::matcher::{Input, Told};
pub(in crate::http) use self::redirect::{Led, RedirectPolicy};
use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig,
    shared::{Kept, Shared},
};
use crate::{
    access_log::{Headers, Record, ResponseFlags},
    config::{
        FieldError,
        model::{HeaderMutations, MatchTree, ReplyFormat},
        parse::{self, type_name},
    },
    http::{
        body::Body,
        headers,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    stats::Scope,
};

/// The policies, of the filter or of a level of routes. Streams hold on to them.
type Policies = Shared<MatchTree<Input, Policy>>;

#[derive(Debug)]
struct CustomResponseFactory(Policies);

#[derive(Debug)]
enum Policy {
    Local(Box<LocalPolicy>),
    Redirect(Shared<RedirectPolicy>),
}

/// `LocalResponsePolicy`: the answer is made here.
#[derive(Debug)]
struct LocalPolicy {
    status: Option<StatusCode>,
    body: Option<Bytes>,
    format: Option<ReplyFormat>,
    /// Only `response_add`.
    headers: HeaderMutations,
    details: Details,
}

/// What `%RESPONSE_CODE_DETAILS%` is then.
#[derive(Debug)]
enum Details {
    Cleared,
    Kept,
    Of(Box<str>),
}

/// A stream, with what its route says. The most specific comes first, the filter's own last.
struct CustomResponseFilter {
    policies: Vec<Kept<MatchTree<Input, Policy>>>,
    /// The request has come past it.
    seen: bool,
}

impl HttpFilterFactory for CustomResponseFactory {
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        let policies = route.all::<Policies>().rev().chain([&self.0]).map(Shared::keep).collect();
        Some(Box::new(CustomResponseFilter { policies, seen: false }))
    }
}

impl HttpFilter for CustomResponseFilter {
    fn request(&mut self, _head: &mut RequestHead, _body: &mut Body, cx: &mut StreamCx) -> Flow {
        // Matchers and formats look at it.
        cx.keeps_request = true;
        self.seen = true;
        Flow::Continue
    }

    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, cx: &mut StreamCx) -> Flow {
        // The answer is one that was looked for because of another.
        if let Some(led) = &cx.custom_response {
            led.change(head, cx);
            return Flow::Continue;
        }
        let policy = {
            let request = cx.kept_request();
            let told = Told { response: head, local: cx.local_reply.is_some(), request: request.as_deref() };
            self.policies.iter().find_map(|policies| policies.find(&told))
        };
        match policy {
            Some(Policy::Local(policy)) => Flow::Replace(policy.answer(head, body, cx)),
            // It must have come past here: of what others have answered before nothing is known.
            Some(Policy::Redirect(policy)) if self.seen => RedirectPolicy::lead(policy, head.status, cx),
            Some(Policy::Redirect(_)) => Flow::Continue,
            None => Flow::Continue,
        }
    }
}

impl LocalPolicy {
    /// The answer in the place of `head`.
    fn answer(&self, head: &ResponseHead, body: &Body, cx: &StreamCx) -> LocalReply {
        let status = self.status.unwrap_or(head.status);
        let mut body = match (&self.body, body) {
            (Some(body), _) => body.clone(),
            // What an answer that was made here says can be shown.
            (None, Body::Full(body)) if cx.local_reply.is_some() && self.format.is_some() => body.clone(),
            (None, _) => Bytes::new(),
        };
        let mut added = HeaderMap::new();
        let host = cx.upstream_host.as_ref().map(|host| host.host.display());
        cx.tell_response(head.status, host, |record| {
            let record = Record { response_headers: Some(Headers::All(&head.headers)), ..*record };
            if let Some(format) = &self.format {
                body = format.format.write(&Record { local_reply_body: &body, missing: "-", ..record }).into();
            }
            headers::mutate_response(&mut added, &self.headers, &record);
        });
        let details = match &self.details {
            Details::Cleared => String::new(),
            Details::Kept => cx.local_reply.as_deref().unwrap_or("via_upstream").to_owned(),
            Details::Of(details) => (**details).to_owned(),
        };
        let mut reply = LocalReply::new(status, body, ResponseFlags::default(), details);
        reply.headers.extend(added.iter().map(|(name, value)| (name.clone(), value.clone())));
        reply
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    Ok(Arc::new(CustomResponseFactory(policies(typed_config, cx.path, &Scope::http(cx.stat_prefix))?)))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    Ok(Arc::new(policies(config, path, &Scope::new(""))?))
}

fn policies(config: &Any, path: &str, scope: &Scope) -> Result<Policies, FieldError> {
    let CustomResponse { custom_response_matcher } = unpack(config, path)?;
    let path = format!("{path}.custom_response_matcher");
    let tree = custom_response_matcher.as_ref();
    let tree = tree.map(|tree| parse::match_tree(tree, &path, &mut matcher::Policies(scope))).transpose()?;
    Ok(Shared::new(tree.unwrap_or_else(MatchTree::empty)))
}

fn policy(config: &Any, path: &str, scope: &Scope) -> Result<Policy, FieldError> {
    let wanted = type_name(config);
    if wanted == ProtoRedirect::full_name() {
        return Ok(Policy::Redirect(redirect::parse(config, path, scope)?));
    }
    if wanted != LocalResponsePolicy::full_name() {
        let text = format!("custom response of type {wanted} is not supported by culvert yet");
        return Err(FieldError::new(path, text));
    }
    let config: LocalResponsePolicy = unpack(config, path)?;
    let status = config.status_code.map(|code| {
        let status = u16::try_from(code.value).ok().filter(|code| (200..600).contains(code));
        let status = status.and_then(|code| StatusCode::from_u16(code).ok());
        status.ok_or_else(|| FieldError::new(format!("{path}.status_code"), "is not from 200 to 599"))
    });
    let body = config.body.as_ref().map(|body| parse::inline_text(body, &format!("{path}.body")));
    let format = config.body_format.as_ref();
    let format = format.map(|format| parse::body_format(format, &format!("{path}.body_format")));
    Ok(Policy::Local(Box::new(LocalPolicy {
        status: status.transpose()?,
        body: body.transpose()?.map(Bytes::from),
        format: format.transpose()?,
        headers: HeaderMutations {
            response_add: parse::headers_to_add(&config.response_headers_to_add, path, "response_headers_to_add")?,
            ..HeaderMutations::default()
        },
        details: match config.response_code_details_action {
            None => Details::Cleared,
            Some(ResponseCodeDetailsAction::PreserveResponseCodeDetails(_)) => Details::Kept,
            Some(ResponseCodeDetailsAction::ResponseCodeDetails(details)) => Details::Of(details.into()),
        },
    })))
}
