//! What an xds matcher is told of a request that shall be let pass or refused, and what it finds.

use std::borrow::Cow;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::rbac::v3::Action as ProtoAction,
        extensions::matching::common_inputs::{
            network::v3::{
                DestinationIpInput, DestinationPortInput, DirectSourceIpInput, ServerNameInput, SourceIpInput,
                SourcePortInput,
            },
            ssl::v3::{DnsSanInput, SubjectInput, UriSanInput},
        },
        r#type::matcher::v3::HttpRequestHeaderMatchInput,
    },
    google::protobuf::Any,
    xds::r#type::matcher::v3::Matcher,
};
use prost::Name as _;

use super::{Action, Counters, Engine, Result, action};
use crate::{
    config::{
        FieldError,
        model::{MatchInput, MatchedHeader},
        parse::{self, MatchParts, type_name},
    },
    http::{
        route_match::value_of,
        stream::{RequestHead, StreamCx},
    },
    stats::Counter,
    tls::PeerText,
};

/// What is told of a request.
pub(super) struct Told<'a> {
    pub(super) head: &'a RequestHead,
    pub(super) cx: &'a StreamCx,
}

/// What a value is taken from.
#[derive(Debug)]
pub(super) enum Input {
    RequestHeader(MatchedHeader),
    DestinationIp,
    DestinationPort,
    SourceIp,
    SourcePort,
    DirectSourceIp,
    ServerName,
    /// Something of the client's certificate.
    Certificate(fn(&PeerText) -> &String),
}

/// `config.rbac.v3.Action`
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: Box<str>,
    pub(super) action: Action,
    /// With `track_per_rule_stats`.
    pub(super) tracked: Option<(Counter, Counter)>,
}

impl MatchInput for Input {
    type Of<'a> = Told<'a>;

    fn value<'a>(&'a self, told: &'a Told<'_>) -> Option<Cow<'a, str>> {
        let connection = &told.cx.connection;
        Some(match self {
            Input::RequestHeader(name) => return value_of(name, told.head),
            Input::DestinationIp => connection.local.ip().to_canonical().to_string().into(),
            Input::DestinationPort => connection.local.port().to_string().into(),
            Input::SourceIp => told.cx.remote.ip().to_canonical().to_string().into(),
            Input::SourcePort => told.cx.remote.port().to_string().into(),
            Input::DirectSourceIp => connection.remote.ip().to_canonical().to_string().into(),
            Input::ServerName => connection.requested_server_name()?.into(),
            Input::Certificate(part) => part(connection.tls()?.peer()?).as_str().into(),
        })
        .filter(|value: &Cow<'_, str>| !value.is_empty())
    }
}

struct Parts<'a> {
    tracked: Option<&'a Counters<'a>>,
    /// An action is `LOG`.
    logs: bool,
}

pub(super) fn engine(matcher: &Matcher, tracked: Option<&Counters<'_>>, path: &str) -> Result<Engine> {
    let mut parts = Parts { tracked, logs: false };
    let tree = parse::match_tree(matcher, path, &mut parts)?;
    Ok(Engine::Matcher { tree, logs: parts.logs })
}

impl MatchParts for Parts<'_> {
    type Input = Input;
    type Action = Found;

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<Input>> {
        let inputs = [
            (DestinationIpInput::full_name(), Input::DestinationIp),
            (DestinationPortInput::full_name(), Input::DestinationPort),
            (SourceIpInput::full_name(), Input::SourceIp),
            (SourcePortInput::full_name(), Input::SourcePort),
            (DirectSourceIpInput::full_name(), Input::DirectSourceIp),
            (ServerNameInput::full_name(), Input::ServerName),
            (UriSanInput::full_name(), Input::Certificate(|text| &text.uri_sans)),
            (DnsSanInput::full_name(), Input::Certificate(|text| &text.dns_sans)),
            (SubjectInput::full_name(), Input::Certificate(|text| &text.subject)),
        ];
        let wanted = type_name(config);
        if wanted == HttpRequestHeaderMatchInput::full_name() {
            return Ok(Some(Input::RequestHeader(parse::request_header_input(config, path)?)));
        }
        Ok(inputs.into_iter().find(|(name, _)| name == wanted).map(|(_, input)| input))
    }

    fn action(&mut self, config: &Any, path: &str) -> Result<Found> {
        if type_name(config) != ProtoAction::full_name() {
            return Err(parse::unknown_action(config, path));
        }
        let ProtoAction { name, action: kind } = unpack(config, path)?;
        if name.is_empty() {
            return Err(FieldError::new(format!("{path}.name"), "value is required"));
        }
        let action = action(kind);
        self.logs |= action == Action::Log;
        let tracked = self.tracked.map(|counters| counters.of_policy(&name));
        Ok(Found { name: name.into(), action, tracked })
    }
}
