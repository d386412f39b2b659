//! What the matcher that finds the policy of a response is told: things of a response and of its request.

use std::borrow::Cow;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::r#type::matcher::v3::{
        HttpRequestHeaderMatchInput, HttpResponseHeaderMatchInput, HttpResponseLocalReplyMatchInput,
        HttpResponseStatusCodeClassMatchInput, HttpResponseStatusCodeMatchInput,
    },
    google::protobuf::Any,
};
use http::HeaderName;
use prost::Name as _;

use super::{Policy, policy};
use crate::{
    config::{
        FieldError,
        model::{MatchInput, MatchedHeader},
        parse::{self, MatchParts, type_name},
    },
    http::{
        headers::joined,
        route_match::value_of,
        stream::{RequestHead, ResponseHead},
    },
    stats::Scope,
};

/// What is told of a response.
pub(super) struct Told<'a> {
    pub(super) response: &'a ResponseHead,
    /// It was made here.
    pub(super) local: bool,
    /// `None`: it was not kept.
    pub(super) request: Option<&'a RequestHead>,
}

/// What a value is taken from.
#[derive(Debug, Clone)]
pub(super) enum Input {
    Status,
    /// `4xx`
    StatusClass,
    /// `true` or `false`
    LocalReply,
    ResponseHeader(HeaderName),
    RequestHeader(MatchedHeader),
}

impl MatchInput for Input {
    type Of<'a> = Told<'a>;

    fn value<'a>(&'a self, told: &'a Told<'_>) -> Option<Cow<'a, str>> {
        match self {
            Input::Status => Some(told.response.status.as_str().into()),
            Input::StatusClass => Some(class(told.response.status.as_u16() / 100).into()),
            Input::LocalReply => Some(if told.local { "true" } else { "false" }.into()),
            Input::ResponseHeader(name) => joined(&told.response.headers, name),
            Input::RequestHeader(name) => value_of(name, told.request?),
        }
    }
}

fn class(hundreds: u16) -> &'static str {
    match hundreds {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        5 => "5xx",
        _ => "",
    }
}

/// Policies, and what they are found by. Holds where their statistics are.
pub(super) struct Policies<'a>(pub(super) &'a Scope);

impl MatchParts for Policies<'_> {
    type Input = Input;
    type Action = Policy;

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<Input>, FieldError> {
        input(config, path)
    }

    fn action(&mut self, config: &Any, path: &str) -> Result<Policy, FieldError> {
        policy(config, path, self.0)
    }
}

fn input(config: &Any, path: &str) -> Result<Option<Input>, FieldError> {
    let wanted = type_name(config);
    Ok(Some(if wanted == HttpResponseStatusCodeMatchInput::full_name() {
        Input::Status
    } else if wanted == HttpResponseStatusCodeClassMatchInput::full_name() {
        Input::StatusClass
    } else if wanted == HttpResponseLocalReplyMatchInput::full_name() {
        Input::LocalReply
    } else if wanted == HttpResponseHeaderMatchInput::full_name() {
        let HttpResponseHeaderMatchInput { header_name } = unpack(config, path)?;
        let name = header_name.parse();
        Input::ResponseHeader(name.map_err(|_| FieldError::new(format!("{path}.header_name"), "is not a header name"))?)
    } else if wanted == HttpRequestHeaderMatchInput::full_name() {
        Input::RequestHeader(parse::request_header_input(config, path)?)
    } else {
        return Ok(None);
    }))
}

#[cfg(test)]
#[path = "matcher_tests.rs"]
mod tests;
