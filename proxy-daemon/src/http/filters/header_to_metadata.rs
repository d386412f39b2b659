//! `envoy.filters.http.header_to_metadata`: tells headers and cookies as dynamic metadata.

use std::sync::Arc;

use base64::{
    Engine,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::header_to_metadata::v3::{
        Config,
        config::{KeyValuePair, Rule as ProtoRule, ValueEncode, ValueType},
    },
    google::protobuf::{Any, Value, value::Kind},
};
use http::{HeaderMap, HeaderName};
use prost::Message;

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig,
    shared::{Kept, Shared},
};
use crate::{
    config::{FieldError, model::RegexRewrite, parse},
    http::{
        body::Body,
        headers::joined,
        metadata::Metadata,
        redirect::scheme,
        route_match::{authority, cookie},
        stream::{RequestHead, ResponseHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

/// Longer values are not told.
const MAX_VALUE: usize = 8 * 1024;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[derive(Debug)]
struct HeaderToMetadataFactory(Shared<Rules>);

/// Streams hold on to it.
#[derive(Debug)]
struct Rules {
    request: Vec<Rule>,
    response: Vec<Rule>,
    /// Where they are asked for: those of requests, and those of responses.
    stats: Option<[Stats; 2]>,
    _lease: Option<Lease>,
}

/// What has become of headers of one direction.
#[derive(Debug)]
struct Stats {
    rules_processed: Counter,
    metadata_added: Counter,
    header_not_found: Counter,
    /// Of both.
    base64_decode_failed: Counter,
    header_value_too_long: Counter,
    regex_substitution_failed: Counter,
}

impl Stats {
    fn new(scope: &Scope, direction: &str) -> Stats {
        let of_direction = |name: &str| scope.counter(&format!("{direction}_{name}"));
        Stats {
            rules_processed: of_direction("rules_processed"),
            metadata_added: of_direction("metadata_added"),
            header_not_found: of_direction("header_not_found"),
            base64_decode_failed: scope.counter("base64_decode_failed"),
            header_value_too_long: scope.counter("header_value_too_long"),
            regex_substitution_failed: scope.counter("regex_substitution_failed"),
        }
    }
}

#[derive(Debug)]
struct Rule {
    source: Source,
    present: Option<Told>,
    missing: Option<Told>,
}

#[derive(Debug)]
enum Source {
    Header { name: HeaderName, remove: bool },
    Pseudo(Pseudo),
    Cookie(String),
}

/// What is told.
#[derive(Debug)]
struct Told {
    namespace: Box<str>,
    key: String,
    /// Instead of the header's value.
    value: String,
    rewrite: Option<RegexRewrite>,
    kind: ValueType,
    base64: bool,
}

/// What HTTP/2 has among the headers, and others before them. In a response there is only the status.
#[derive(Debug, Clone, Copy)]
enum Pseudo {
    Path,
    Method,
    Authority,
    Scheme,
    Status,
}

/// What is looked at.
enum Looked<'a> {
    Request(&'a mut RequestHead),
    Response(&'a mut ResponseHead),
}

impl Looked<'_> {
    fn headers(&mut self) -> &mut HeaderMap {
        match self {
            Looked::Request(head) => &mut head.headers,
            Looked::Response(head) => &mut head.headers,
        }
    }

    fn pseudo(&self, wanted: Pseudo) -> Option<String> {
        match (self, wanted) {
            (Looked::Request(head), Pseudo::Path) => Some(head.uri.path_and_query()?.as_str().to_owned()),
            (Looked::Request(head), Pseudo::Method) => Some(head.method.as_str().to_owned()),
            (Looked::Request(head), Pseudo::Authority) => Some(authority(head).to_owned()),
            (Looked::Request(head), Pseudo::Scheme) => Some(scheme(head).to_owned()),
            (Looked::Response(head), Pseudo::Status) => Some(head.status.as_str().to_owned()),
            _ => None,
        }
    }
}

impl Source {
    fn value(&self, message: &mut Looked<'_>) -> Option<String> {
        match self {
            Source::Header { name, remove } => {
                let headers = message.headers();
                let value = joined(headers, name).map(std::borrow::Cow::into_owned);
                if *remove {
                    headers.remove(name);
                }
                value
            }
            Source::Pseudo(wanted) => message.pseudo(*wanted),
            Source::Cookie(name) => {
                cookie(message.headers(), name).filter(|value| !value.is_empty()).map(std::borrow::Cow::into_owned)
            }
        }
    }
}

impl Told {
    /// `value` is the header's, empty where there is none.
    fn tell(&self, value: String, metadata: &mut Metadata, stats: Option<&Stats>) {
        let count = |counter: fn(&Stats) -> Counter| stats.map(counter).into_iter().for_each(|counter| counter.inc());
        let value = match (&self.rewrite, self.value.is_empty()) {
            (_, false) => self.value.clone(),
            (Some(rewrite), true) => {
                let rewritten = rewrite.apply(&value);
                if rewritten.is_empty() && !value.is_empty() {
                    count(|stats| stats.regex_substitution_failed);
                }
                rewritten
            }
            (None, true) => value,
        };
        if value.is_empty() {
            return;
        }
        if value.len() >= MAX_VALUE {
            return count(|stats| stats.header_value_too_long);
        }
        let bytes = match self.base64.then(|| BASE64.decode(&value).ok().filter(|bytes| !bytes.is_empty())) {
            Some(None) => return count(|stats| stats.base64_decode_failed),
            Some(Some(bytes)) => bytes,
            None => value.into_bytes(),
        };
        if let Some(kind) = self.decode(bytes) {
            count(|stats| stats.metadata_added);
            metadata.namespace_mut(&self.namespace).fields.insert(self.key.clone(), Value { kind: Some(kind) });
        }
    }

    fn decode(&self, bytes: Vec<u8>) -> Option<Kind> {
        match self.kind {
            ValueType::String => String::from_utf8(bytes).ok().map(Kind::StringValue),
            ValueType::Number => {
                let number: f64 = std::str::from_utf8(&bytes).ok()?.trim().parse().ok()?;
                Some(Kind::NumberValue(number))
            }
            ValueType::ProtobufValue => Value::decode(&bytes[..]).ok()?.kind,
        }
    }
}

fn apply(rules: &[Rule], stats: Option<&Stats>, mut message: Looked<'_>, cx: &StreamCx) {
    for rule in rules {
        let value = rule.source.value(&mut message);
        if let Some(stats) = stats {
            stats.rules_processed.inc();
            if value.is_none() && rule.missing.is_some() {
                stats.header_not_found.inc();
            }
        }
        let told = if value.is_some() { &rule.present } else { &rule.missing };
        if let Some(told) = told {
            cx.progress.with_metadata(|metadata| told.tell(value.unwrap_or_default(), metadata, stats));
        }
    }
}

impl HttpFilterFactory for HeaderToMetadataFactory {
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        let rules: &Shared<Rules> = route.most_specific().unwrap_or(&self.0);
        (!rules.response.is_empty()).then(|| Box::new(HeaderToMetadataFilter(rules.keep())) as _)
    }

    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let rules: &Shared<Rules> = route.most_specific().unwrap_or(&self.0);
        apply(&rules.request, rules.stats.as_ref().map(|[request, _]| request), Looked::Request(head), cx);
        instances.extend(self.stream(route));
        Flow::Continue
    }
}

/// One stream's filter, where responses tell something.
#[derive(Debug)]
struct HeaderToMetadataFilter(Kept<Rules>);

impl HttpFilter for HeaderToMetadataFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, cx: &mut StreamCx) -> Flow {
        let stats = self.0.stats.as_ref().map(|[_, response]| response);
        apply(&self.0.response, stats, Looked::Response(head), cx);
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    Ok(Arc::new(HeaderToMetadataFactory(Shared::new(rules(typed_config, cx.path)?))))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let rules = rules(config, path)?;
    if rules.request.is_empty() && rules.response.is_empty() {
        return Err(FieldError::new(
            path,
            "header_to_metadata_filter: Per filter configs must at least specify either request or response rules",
        ));
    }
    Ok(Arc::new(Shared::new(rules)))
}

fn rules(config: &Any, path: &str) -> Result<Rules, FieldError> {
    let Config { request_rules, response_rules, stat_prefix } = unpack(config, path)?;
    let each = |rules: &[ProtoRule], field: &str| {
        let parse = |(index, item)| rule(item, &format!("{path}.{field}[{index}]"));
        rules.iter().enumerate().map(parse).collect::<Result<Vec<_>, FieldError>>()
    };
    let scope = (!stat_prefix.is_empty()).then(|| Scope::new("http_filter_name").child(&stat_prefix));
    Ok(Rules {
        request: each(&request_rules, "request_rules")?,
        response: each(&response_rules, "response_rules")?,
        stats: scope.as_ref().map(|scope| ["request", "response"].map(|direction| Stats::new(scope, direction))),
        _lease: scope.as_ref().map(Scope::lease),
    })
}

fn rule(rule: &ProtoRule, path: &str) -> Result<Rule, FieldError> {
    let refuse = |text: &str| Err(FieldError::new(path, text));
    let source = match (rule.header.as_str(), rule.cookie.as_str()) {
        ("", "") => return refuse("One of Cookie or Header option needs to be specified"),
        ("", _) if rule.remove => return refuse("Cannot specify remove for cookie"),
        ("", cookie) => Source::Cookie(cookie.to_owned()),
        (header, "") if header.starts_with(':') || header.eq_ignore_ascii_case("host") => {
            if rule.remove {
                return Err(FieldError::new(format!("{path}.remove"), "without this header there is no message"));
            }
            Source::Pseudo(match header.to_ascii_lowercase().as_str() {
                ":path" => Pseudo::Path,
                ":method" => Pseudo::Method,
                ":authority" | "host" => Pseudo::Authority,
                ":scheme" => Pseudo::Scheme,
                ":status" => Pseudo::Status,
                _ => {
                    let all = ":path, :method, :authority, :scheme and :status";
                    return Err(FieldError::unsupported_value(format!("{path}.header"), header, all));
                }
            })
        }
        (header, "") => {
            let bad = |_| FieldError::new(format!("{path}.header"), format!("{header:?} is not a header name"));
            Source::Header { name: HeaderName::try_from(header).map_err(bad)?, remove: rule.remove }
        }
        _ => return refuse("Cannot specify both header and cookie"),
    };
    if rule.on_header_present.is_none() && rule.on_header_missing.is_none() {
        return refuse("rule has neither `on_header_present` nor `on_header_missing` set");
    }
    let of = |pair: &Option<KeyValuePair>, field: &str| {
        pair.as_ref().map(|pair| told(pair, &format!("{path}.{field}"))).transpose()
    };
    let present = of(&rule.on_header_present, "on_header_present")?;
    let missing = of(&rule.on_header_missing, "on_header_missing")?;
    if missing.as_ref().is_some_and(|told| told.value.is_empty()) {
        return refuse("Cannot specify on_header_missing rule with an empty value");
    }
    Ok(Rule { source, present, missing })
}

fn told(pair: &KeyValuePair, path: &str) -> Result<Told, FieldError> {
    let rewrite = pair.regex_value_rewrite.as_ref();
    if rewrite.is_some() && !pair.value.is_empty() {
        return Err(FieldError::new(path, "Cannot specify both value and regex_value_rewrite"));
    }
    let rewrite = rewrite.map(|rewrite| parse::matcher::regex_rewrite(rewrite, &format!("{path}.regex_value_rewrite")));
    let namespace = match pair.metadata_namespace.as_str() {
        "" => "envoy.filters.http.header_to_metadata",
        namespace => namespace,
    };
    Ok(Told {
        namespace: namespace.into(),
        key: pair.key.clone(),
        value: pair.value.clone(),
        rewrite: rewrite.transpose()?,
        kind: ValueType::try_from(pair.r#type).unwrap_or(ValueType::String),
        base64: pair.encode == ValueEncode::Base64 as i32,
    })
}
