//! `RedirectPolicy`: the answer is another route's, to which the request is led as one that begins anew.

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::http::custom_response::redirect_policy::v3::{
        RedirectPolicy as ProtoPolicy, redirect_policy::RedirectActionSpecifier,
    },
    google::protobuf::Any,
};
use http::{
    HeaderValue, Method, StatusCode, Uri,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING},
};

use crate::http::filters::shared::{Kept, Shared};
use crate::{
    access_log::{Headers, Record},
    config::{
        FieldError,
        model::{HeaderAdd, RedirectAction, RedirectPath},
        parse,
    },
    http::{
        filters::{Flow, Redirect},
        headers, illegal, internal_redirect, redirect,
        stream::{RequestHead, ResponseHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

/// Where requests are led to, and what becomes of the answer from there.
#[derive(Debug)]
pub(in crate::http) struct RedirectPolicy {
    to: Target,
    status: Option<StatusCode>,
    /// For the request that is led on.
    request_headers: Vec<HeaderAdd>,
    /// For the answer to that.
    response_headers: Vec<HeaderAdd>,
    redirect_no_route: Counter,
    invalid_uri: Counter,
    _lease: Lease,
}

/// A request that was led on.
#[derive(Debug, Clone)]
pub(in crate::http) struct Led {
    /// By what.
    pub(in crate::http) policy: Kept<RedirectPolicy>,
    /// The status of the response in whose place the other comes.
    status: StatusCode,
}

impl Led {
    /// Makes the answer one in the place of the other, whose status it has unless the policy says otherwise.
    pub(super) fn change(&self, head: &mut ResponseHead, cx: &StreamCx) {
        let Led { policy, status } = self;
        let host = cx.upstream_host.as_ref().map(|host| host.host.display());
        cx.format_response(head.status, &mut head.headers, host, |headers, record| {
            headers::add(headers, &policy.response_headers, record);
            illegal::strip(headers);
        });
        head.status = policy.status.unwrap_or(*status);
    }
}

#[derive(Debug)]
enum Target {
    Uri(Uri),
    Made(RedirectAction),
}

impl RedirectPolicy {
    /// What becomes of a response that the policy is for: the request is led on, where it can be.
    pub(super) fn lead(policy: &Shared<RedirectPolicy>, status: StatusCode, cx: &StreamCx) -> Flow {
        // Without the request, or with a part of it, nothing can be asked for again.
        let Some(mut head) = cx.kept_request().as_deref().cloned() else { return Flow::Continue };
        if cx.progress.request_complete.get().is_none() {
            return Flow::Continue;
        }
        let uri = match &policy.to {
            Target::Uri(uri) => Some(uri.clone()),
            Target::Made(action) => {
                let location = HeaderValue::from_str(&redirect::location(&head, None, action, "")).ok();
                location.and_then(|location| internal_redirect::absolute(&location))
            }
        };
        let Some(uri) = uri else {
            policy.invalid_uri.inc();
            return Flow::Continue;
        };
        head.headers.remove(HOST);
        head.uri = uri;
        // All are made of the headers as they were.
        let before = head.headers.clone();
        cx.format_request(&mut head, |headers, record| {
            let record = Record { request_headers: Some(Headers::All(&before)), ..*record };
            headers::add(headers, &policy.request_headers, &record);
        });
        let led = Led { policy: policy.keep(), status };
        Flow::Redirect(Redirect { head: Box::new(head), led })
    }

    /// There is no route for the request.
    pub(in crate::http) fn has_no_route(&self) {
        self.redirect_no_route.inc();
    }

    /// The request that is sent on, once there is a route for it.
    pub(in crate::http) fn finish(head: &mut RequestHead) {
        head.method = Method::GET;
        head.headers.remove(CONTENT_LENGTH);
        head.headers.remove(TRANSFER_ENCODING);
    }
}

pub(super) fn parse(config: &Any, path: &str, scope: &Scope) -> Result<Shared<RedirectPolicy>, FieldError> {
    let config: ProtoPolicy = unpack(config, path)?;
    let to = match &config.redirect_action_specifier {
        Some(RedirectActionSpecifier::Uri(uri)) => {
            let uri = HeaderValue::from_str(uri).ok().and_then(|uri| internal_redirect::absolute(&uri));
            let invalid = || FieldError::new(format!("{path}.uri"), "Invalid uri specified for redirection");
            Target::Uri(uri.ok_or_else(invalid)?)
        }
        Some(RedirectActionSpecifier::RedirectAction(action)) => {
            let path = format!("{path}.redirect_action");
            let action = parse::redirect(action, &path)?;
            let refused = match &action.path {
                RedirectPath::PrefixRewrite(_) => Some("prefix_rewrite is not supported for Custom Response"),
                RedirectPath::Format(_) => Some("path_rewrite is not supported for Custom Response"),
                RedirectPath::RegexRewrite(_) => Some("regex_rewrite is not supported for Custom Response"),
                RedirectPath::Replace(to) if to.contains('#') => Some("#fragment is not supported for custom response"),
                RedirectPath::Keep if action.host.is_none() => {
                    Some("At least one of host_redirect and path_redirect needs to be specified")
                }
                RedirectPath::Keep | RedirectPath::Replace(_) => None,
            };
            if let Some(refused) = refused {
                return Err(FieldError::new(path, refused));
            }
            Target::Made(action)
        }
        None => return Err(FieldError::new(path, "needs uri or redirect_action")),
    };
    let status = config.status_code.map(|code| {
        let status = u16::try_from(code.value).ok().filter(|code| *code >= 200);
        let status = status.and_then(|code| StatusCode::from_u16(code).ok());
        status.ok_or_else(|| FieldError::new(format!("{path}.status_code"), "is not from 200 to 999"))
    });
    Ok(Shared::new(RedirectPolicy {
        to,
        status: status.transpose()?,
        request_headers: parse::headers_to_add(&config.request_headers_to_add, path, "request_headers_to_add")?,
        response_headers: parse::headers_to_add(&config.response_headers_to_add, path, "response_headers_to_add")?,
        redirect_no_route: scope.counter("custom_response_redirect_no_route"),
        invalid_uri: scope.counter("custom_response_invalid_uri"),
        _lease: scope.lease(),
    }))
}
