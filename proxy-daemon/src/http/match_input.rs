//! What an xds matcher is told of a request and its connection.

use std::{borrow::Cow, net::SocketAddr};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        extensions::matching::common_inputs::{
            network::v3::{
                DestinationIpInput, DestinationPortInput, DirectSourceIpInput, DynamicMetadataInput, FilterStateInput,
                ServerNameInput, SourceIpInput, SourcePortInput,
                dynamic_metadata_input::{PathSegment, path_segment::Segment},
            },
            ssl::v3::{DnsSanInput, SubjectInput, UriSanInput},
        },
        r#type::matcher::v3::{HttpRequestHeaderMatchInput, HttpRequestQueryParamMatchInput},
    },
    google::protobuf::Any,
};
use prost::Name as _;

use super::{
    descriptors,
    metadata::{Metadata, read_from},
    route_match::value_of,
    stream::RequestHead,
};
use crate::{
    config::{
        FieldError,
        model::{MatchInput, MatchedHeader, ValueMatch, value_at},
        parse::{self, type_name},
    },
    listener::ConnectionInfo,
    tls::PeerText,
};

/// What is told of a request.
#[derive(Clone, Copy)]
pub struct Told<'a> {
    pub(super) head: &'a RequestHead,
    pub(super) connection: &'a ConnectionInfo,
    /// The client.
    pub(super) remote: SocketAddr,
    /// What filters have told.
    pub(super) metadata: Option<&'a Metadata>,
}

/// What a value is taken from.
#[derive(Debug)]
pub enum RequestInput {
    /// A header, or what Envoy treats as one.
    Header(MatchedHeader),
    /// The first value of a query parameter, decoded.
    QueryParameter(Box<str>),
    /// Our end of the connection.
    DestinationIp,
    /// Its port.
    DestinationPort,
    /// The client's address, after `x-forwarded-for` was looked at.
    SourceIp,
    /// Its port.
    SourcePort,
    /// The other end of the connection.
    DirectSourceIp,
    /// The server that a TLS client asked for.
    ServerName,
    /// Something of the client's certificate.
    Certificate(fn(&PeerText) -> &String),
    /// What filters have told under this namespace, at this path.
    DynamicMetadata(Box<str>, Box<[Box<str>]>),
    /// An object of the filter state.
    FilterState(Box<str>),
}

impl MatchInput for RequestInput {
    type Of<'a> = Told<'a>;

    fn value<'a>(&'a self, told: &'a Told<'_>) -> Option<Cow<'a, str>> {
        let connection = told.connection;
        Some(match self {
            RequestInput::Header(name) => return value_of(name, told.head),
            RequestInput::QueryParameter(name) => {
                return descriptors::parameter(told.head, name).map(|value| String::from(value).into());
            }
            RequestInput::DestinationIp => connection.local.ip().to_canonical().to_string().into(),
            RequestInput::DestinationPort => connection.local.port().to_string().into(),
            RequestInput::SourceIp => told.remote.ip().to_canonical().to_string().into(),
            RequestInput::SourcePort => told.remote.port().to_string().into(),
            RequestInput::DirectSourceIp => connection.remote.ip().to_canonical().to_string().into(),
            RequestInput::ServerName => connection.requested_server_name()?.into(),
            RequestInput::Certificate(part) => part(connection.tls()?.peer()?).as_str().into(),
            RequestInput::FilterState(key) => {
                return told.metadata?.state(key).map(|state| state.as_text().into_owned().into());
            }
            // It is no text.
            RequestInput::DynamicMetadata(..) => return None,
        })
        .filter(|value: &Cow<'_, str>| !value.is_empty())
    }

    fn is_metadata(&self) -> bool {
        matches!(self, RequestInput::DynamicMetadata(..))
    }

    fn metadata_matches(&self, told: &Told<'_>, wanted: &ValueMatch) -> bool {
        let RequestInput::DynamicMetadata(namespace, path) = self else { return false };
        let fields = told.metadata.and_then(|metadata| metadata.namespace(namespace));
        wanted.matches(value_at(fields, path.iter().map(|key| &**key)))
    }
}

/// Reads an input; `None`: it is no such.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn request_input(config: &Any, path: &str) -> Result<Option<RequestInput>, FieldError> {
    let inputs = [
        (DestinationIpInput::full_name(), RequestInput::DestinationIp),
        (DestinationPortInput::full_name(), RequestInput::DestinationPort),
        (SourceIpInput::full_name(), RequestInput::SourceIp),
        (SourcePortInput::full_name(), RequestInput::SourcePort),
        (DirectSourceIpInput::full_name(), RequestInput::DirectSourceIp),
        (ServerNameInput::full_name(), RequestInput::ServerName),
        (UriSanInput::full_name(), RequestInput::Certificate(|text| &text.uri_sans)),
        (DnsSanInput::full_name(), RequestInput::Certificate(|text| &text.dns_sans)),
        (SubjectInput::full_name(), RequestInput::Certificate(|text| &text.subject)),
    ];
    let wanted = type_name(config);
    if wanted == HttpRequestHeaderMatchInput::full_name() {
        return Ok(Some(RequestInput::Header(parse::request_header_input(config, path)?)));
    }
    if wanted == FilterStateInput::full_name() {
        let FilterStateInput { key, field } = unpack(config, path)?;
        if !field.is_empty() {
            return Err(FieldError::unsupported(format!("{path}.field")));
        }
        return Ok(Some(RequestInput::FilterState(key.into())));
    }
    Ok(inputs.into_iter().find(|(name, _)| name == wanted).map(|(_, input)| input))
}

/// The same, with what filters have told.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn policy_input(config: &Any, path: &str) -> Result<Option<RequestInput>, FieldError> {
    if type_name(config) != DynamicMetadataInput::full_name() {
        return request_input(config, path);
    }
    let input: DynamicMetadataInput = unpack(config, path)?;
    let key = |segment: PathSegment| match segment.segment {
        Some(Segment::Key(key)) => key.into(),
        None => Box::default(),
    };
    let keys: Box<[Box<str>]> = input.path.into_iter().map(key).collect();
    for (field, empty) in
        [("filter", input.filter.is_empty()), ("path", keys.iter().any(|key| key.is_empty()) || keys.is_empty())]
    {
        if empty {
            return Err(FieldError::new(format!("{path}.{field}"), "value is required"));
        }
    }
    Ok(Some(RequestInput::DynamicMetadata(read_from(&input.filter), keys)))
}

/// The same, with those that policies of `rbac` cannot have in Envoy.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn any_request_input(config: &Any, path: &str) -> Result<Option<RequestInput>, FieldError> {
    if type_name(config) == HttpRequestQueryParamMatchInput::full_name() {
        let HttpRequestQueryParamMatchInput { query_param } = unpack(config, path)?;
        return Ok(Some(RequestInput::QueryParameter(query_param.into())));
    }
    request_input(config, path)
}
