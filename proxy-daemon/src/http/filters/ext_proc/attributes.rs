//! What a processor is told of a stream beside its messages: `request_attributes`, `response_attributes`.

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use http::{
    HeaderName,
    header::{REFERER, USER_AGENT},
};

use crate::{
    config::{FieldError, model::RouteAction},
    http::{
        headers::names::X_REQUEST_ID,
        protocol_name,
        redirect::scheme,
        route_match::authority,
        stream::{RequestHead, ResponseHead, StreamCx},
    },
};

/// One that is honoured.
#[derive(Debug, Clone, Copy)]
enum Attribute {
    Path,
    UrlPath,
    Query,
    Host,
    Scheme,
    Method,
    Header(fn() -> HeaderName),
    Protocol,
    SourceAddress,
    SourcePort,
    DestinationAddress,
    DestinationPort,
    ServerName,
    Mtls,
    TlsVersion,
    RouteName,
    ClusterName,
    /// Known with the response only.
    Code,
}

const KNOWN: &[(&str, Attribute)] = &[
    ("request.path", Attribute::Path),
    ("request.url_path", Attribute::UrlPath),
    ("request.query", Attribute::Query),
    ("request.host", Attribute::Host),
    ("request.scheme", Attribute::Scheme),
    ("request.method", Attribute::Method),
    ("request.referer", Attribute::Header(|| REFERER)),
    ("request.useragent", Attribute::Header(|| USER_AGENT)),
    ("request.id", Attribute::Header(|| X_REQUEST_ID)),
    ("request.protocol", Attribute::Protocol),
    ("source.address", Attribute::SourceAddress),
    ("source.port", Attribute::SourcePort),
    ("destination.address", Attribute::DestinationAddress),
    ("destination.port", Attribute::DestinationPort),
    ("connection.requested_server_name", Attribute::ServerName),
    ("connection.mtls", Attribute::Mtls),
    ("connection.tls_version", Attribute::TlsVersion),
    ("xds.route_name", Attribute::RouteName),
    ("xds.cluster_name", Attribute::ClusterName),
    ("response.code", Attribute::Code),
];

/// The attributes of one side.
#[derive(Debug, Default)]
pub(super) struct Attributes(Box<[(&'static str, Attribute)]>);

impl Attributes {
    /// # Errors
    /// One that is not honoured, below `path`.
    pub(super) fn parse(names: &[String], path: &str) -> Result<Attributes, FieldError> {
        let one = |(index, name): (usize, &String)| {
            KNOWN.iter().find(|(known, _)| known == name).copied().ok_or_else(|| {
                let known: Vec<_> = KNOWN.iter().map(|(known, _)| *known).collect();
                FieldError::unsupported_value(format!("{path}[{index}]"), name, &known.join(", "))
            })
        };
        Ok(Attributes(names.iter().enumerate().map(one).collect::<Result<_, _>>()?))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those that are known by the request.
    pub(super) fn of_request(&self, head: &RequestHead, cx: &StreamCx) -> Struct {
        let fields = self.0.iter().filter_map(|(name, attribute)| Some(((*name).to_owned(), attribute.of(head, cx)?)));
        Struct { fields: fields.map(|(name, kind)| (name, Value { kind: Some(kind) })).collect() }
    }

    /// Those that are known by the response, beside the others.
    pub(super) fn with_response(&self, mut known: Struct, head: &ResponseHead) -> Struct {
        for (name, _) in self.0.iter().filter(|(_, attribute)| matches!(attribute, Attribute::Code)) {
            let code = Kind::NumberValue(f64::from(head.status.as_u16()));
            known.fields.insert((*name).to_owned(), Value { kind: Some(code) });
        }
        known
    }
}

impl Attribute {
    fn of(self, head: &RequestHead, cx: &StreamCx) -> Option<Kind> {
        let text = |text: &str| Some(Kind::StringValue(text.to_owned()));
        let connection = &cx.connection;
        match self {
            Attribute::Path => text(head.uri.path_and_query().map_or("", |path| path.as_str())),
            Attribute::UrlPath => text(head.uri.path()),
            Attribute::Query => text(head.uri.query().unwrap_or_default()),
            Attribute::Host => text(authority(head)),
            Attribute::Scheme => text(scheme(head)),
            Attribute::Method => text(head.method.as_str()),
            Attribute::Header(name) => text(head.headers.get(name())?.to_str().ok()?),
            Attribute::Protocol => text(protocol_name(head.version)),
            Attribute::SourceAddress => text(&cx.remote.to_string()),
            Attribute::SourcePort => Some(Kind::NumberValue(f64::from(cx.remote.port()))),
            Attribute::DestinationAddress => text(&connection.local.to_string()),
            Attribute::DestinationPort => Some(Kind::NumberValue(f64::from(connection.local.port()))),
            Attribute::ServerName => text(connection.requested_server_name().unwrap_or_default()),
            Attribute::Mtls => Some(Kind::BoolValue(connection.tls().is_some_and(|tls| tls.has_certificate()))),
            Attribute::TlsVersion => text(connection.tls()?.version),
            Attribute::RouteName => text(cx.route.as_ref().map_or("", |route| route.name.as_str())),
            Attribute::ClusterName => {
                let action = cx.route.as_ref().map(|route| &route.action);
                let cluster = cx.cluster.as_ref().filter(|_| matches!(action, Some(RouteAction::Forward(_))));
                text(&cluster?.cluster.config.name)
            }
            Attribute::Code => None,
        }
    }
}
