//! `rate_limits`

use envoy_types::pb::{
    envoy::{
        config::route::v3::{
            HeaderMatcher as ProtoHeader, QueryParameterMatcher as ProtoQuery, RateLimit as ProtoLimit,
            rate_limit::{
                Action, HitsAddend, Override, XRateLimitOption,
                action::{ActionSpecifier, MetaData, meta_data::Source},
                r#override::OverrideSpecifier,
            },
        },
        r#type::metadata::v3::{MetadataKey, metadata_key::path_segment::Segment},
    },
    xds::core::v3::CidrRange,
};

use super::{
    common::{Result, number, required},
    matcher::{header, matched_header, parameter},
    support::join,
};
use crate::{
    access_log::HeaderFormat,
    config::{
        FieldError,
        model::{Cidr, Hits, HitsAmount, LimitOverride, RateLimit, RateLimitAction},
    },
    http::metadata::read_from,
    layered_runtime::{Fraction, Key, RuntimeFraction},
};

/// What requests are counted under by a route or a virtual host.
pub(super) fn of_routes(limits: &[ProtoLimit], path: &str) -> Result<Box<[RateLimit]>> {
    if let Some(index) = limits.iter().position(|limit| limit.hits_addend.is_some()) {
        // Envoy looks at it in what filters have themselves.
        return Err(FieldError::unsupported(join(path, &format!("rate_limits[{index}].hits_addend"))));
    }
    rate_limits(limits, path, "rate_limits")
}

/// What requests are counted under by a filter.
pub(crate) fn rate_limits(limits: &[ProtoLimit], path: &str, field: &str) -> Result<Box<[RateLimit]>> {
    let parse = |(index, limit): (usize, &ProtoLimit)| rate_limit(limit, &format!("{}[{index}]", join(path, field)));
    limits.iter().enumerate().map(parse).collect()
}

fn rate_limit(limit: &ProtoLimit, path: &str) -> Result<RateLimit> {
    let actions = limit.actions.iter().enumerate();
    let actions = actions.map(|(index, it)| action(it, &format!("{}[{index}]", join(path, "actions"))));
    let enabled = match limit.disable_key.as_str() {
        "" => None,
        key => Some(RuntimeFraction {
            default: Fraction::percent(100),
            key: Some(Key::new(&format!("ratelimit.{key}.http_filter_enabled"))),
        }),
    };
    let hits = limit.hits_addend.as_ref().map(|hits| hits_addend(hits, &join(path, "hits_addend"))).transpose()?;
    Ok(RateLimit {
        stage: number(limit.stage, 0),
        enabled,
        actions: actions.collect::<Result<_>>()?,
        limit: match &limit.limit {
            None => None,
            Some(Override { override_specifier: Some(OverrideSpecifier::RateLimit(limit)) }) => {
                Some(LimitOverride::Fixed(limit.requests_per_unit, limit.unit))
            }
            Some(Override { override_specifier: Some(OverrideSpecifier::DynamicMetadata(limit)) }) => {
                let (namespace, path) =
                    metadata_place(limit.metadata_key.as_ref(), &join(path, "limit.dynamic_metadata"))?;
                Some(LimitOverride::Metadata { namespace, path })
            }
            Some(Override { override_specifier: None }) => {
                return Err(required(&join(path, "limit"), "override_specifier"));
            }
        },
        hits: hits.flatten(),
        on_done: limit.apply_on_stream_done,
        is_told: match XRateLimitOption::try_from(limit.x_ratelimit_option) {
            Ok(XRateLimitOption::Off) => Some(false),
            Ok(XRateLimitOption::DraftVersion03) => Some(true),
            Ok(XRateLimitOption::Unspecified) | Err(_) => None,
        },
    })
}

fn hits_addend(hits: &HitsAddend, path: &str) -> Result<Option<Hits>> {
    let negative = hits.is_negative_hits;
    if hits.format.is_empty() {
        return Ok(hits.number.map(|number| Hits { amount: HitsAmount::Fixed(number.value), negative }));
    }
    let at = join(path, "format");
    if hits.number.is_some() {
        return Err(FieldError::new(at, "only one of number and format may be set"));
    }
    match HeaderFormat::parse(&hits.format).map_err(|text| FieldError::new(&*at, text))? {
        Ok(format) if format.is_single() => Ok(Some(Hits { amount: HitsAmount::Format(format), negative })),
        _ => Err(FieldError::new(at, "must be a single substitution")),
    }
}

/// A value that formats would fill.
fn literal(value: &str, path: &str) -> Result<Box<str>> {
    if value.contains('%') {
        let text = "format strings (%...%) in descriptors are not supported by culvert yet";
        return Err(FieldError::new(join(path, "descriptor_value"), text));
    }
    Ok(value.into())
}

fn key(key: &str, default: &str) -> Box<str> {
    if key.is_empty() { default.into() } else { key.into() }
}

fn action(action: &Action, path: &str) -> Result<RateLimitAction> {
    let headers = |matchers: &[ProtoHeader], path: &str| {
        let each = matchers.iter().enumerate();
        each.map(|(index, it)| header(it, &format!("{path}.headers[{index}]"))).collect::<Result<_>>()
    };
    let parameters = |matchers: &[ProtoQuery], path: &str| {
        let each = matchers.iter().enumerate();
        each.map(|(index, it)| parameter(it, &format!("{path}.query_parameters[{index}]"))).collect::<Result<_>>()
    };
    Ok(match action.action_specifier.as_ref().ok_or_else(|| required(path, "action_specifier"))? {
        ActionSpecifier::SourceCluster(_) => RateLimitAction::SourceCluster,
        ActionSpecifier::DestinationCluster(_) => RateLimitAction::DestinationCluster,
        ActionSpecifier::RequestHeaders(headers) => RateLimitAction::RequestHeaders {
            header: matched_header(&headers.header_name, &join(path, "request_headers.header_name"))?,
            key: headers.descriptor_key.as_str().into(),
            skip_if_absent: headers.skip_if_absent,
        },
        ActionSpecifier::QueryParameters(parameters) => RateLimitAction::QueryParameters {
            name: parameters.query_parameter_name.as_str().into(),
            key: parameters.descriptor_key.as_str().into(),
            skip_if_absent: parameters.skip_if_absent,
        },
        ActionSpecifier::RemoteAddress(_) => RateLimitAction::RemoteAddress,
        ActionSpecifier::MaskedRemoteAddress(mask) => {
            let bits = |value, most: u8| u8::try_from(number(value, u32::from(most))).unwrap_or(most).min(most);
            RateLimitAction::MaskedRemoteAddress {
                v4: bits(mask.v4_prefix_mask_len, 32),
                v6: bits(mask.v6_prefix_mask_len, 128),
            }
        }
        ActionSpecifier::GenericKey(generic) => RateLimitAction::GenericKey {
            key: key(&generic.descriptor_key, "generic_key"),
            // No format, as in Envoy, whose default_value is for formats.
            value: generic.descriptor_value.as_str().into(),
        },
        ActionSpecifier::HeaderValueMatch(matched) => {
            let path = join(path, "header_value_match");
            RateLimitAction::HeaderValueMatch {
                key: key(&matched.descriptor_key, "header_match"),
                value: matched.descriptor_value.as_str().into(),
                expect_match: matched.expect_match.is_none_or(|value| value.value),
                headers: headers(&matched.headers, &path)?,
            }
        }
        ActionSpecifier::QueryParameterValueMatch(matched) => {
            let path = join(path, "query_parameter_value_match");
            RateLimitAction::QueryParameterValueMatch {
                key: key(&matched.descriptor_key, "query_match"),
                value: matched.descriptor_value.as_str().into(),
                expect_match: matched.expect_match.is_none_or(|value| value.value),
                parameters: parameters(&matched.query_parameters, &path)?,
            }
        }
        ActionSpecifier::Metadata(metadata) => self::metadata(metadata, &join(path, "metadata"))?,
        ActionSpecifier::RemoteAddressMatch(matched) => {
            let path = join(path, "remote_address_match");
            let matcher = matched.address_matcher.as_ref().ok_or_else(|| required(&path, "address_matcher"))?;
            let range = |(index, range): (usize, &CidrRange)| {
                let path = format!("{path}.address_matcher.ranges[{index}]");
                let length = range.prefix_len.map_or(0, |length| length.value);
                let parsed = range.address_prefix.parse().ok().zip(u8::try_from(length).ok());
                let text = || format!("{}/{length} is not a range of addresses", range.address_prefix);
                parsed
                    .and_then(|(address, length)| Cidr::new(address, length))
                    .ok_or_else(|| FieldError::new(path, text()))
            };
            RateLimitAction::RemoteAddressMatch {
                key: key(&matched.descriptor_key, "remote_address_match"),
                value: literal(&matched.descriptor_value, &path)?,
                ranges: matcher.ranges.iter().enumerate().map(range).collect::<Result<_>>()?,
                inverted: matcher.invert_match,
            }
        }
        ActionSpecifier::Extension(_) => return Err(FieldError::unsupported(join(path, "extension"))),
        #[expect(deprecated, reason = "Envoy refuses it too")]
        ActionSpecifier::DynamicMetadata(_) => return Err(FieldError::unsupported(join(path, "dynamic_metadata"))),
    })
}

fn metadata(metadata: &MetaData, path: &str) -> Result<RateLimitAction> {
    let of_route = match Source::try_from(metadata.source) {
        Ok(Source::Dynamic) => false,
        Ok(Source::RouteEntry) => true,
        other => {
            let name = other.map_or("a source that is not known", |it| it.as_str_name());
            return Err(FieldError::unsupported_value(join(path, "source"), name, "DYNAMIC and ROUTE_ENTRY"));
        }
    };
    let (namespace, path) = metadata_place(metadata.metadata_key.as_ref(), path)?;
    Ok(RateLimitAction::Metadata {
        of_route,
        key: metadata.descriptor_key.as_str().into(),
        namespace,
        path,
        default: metadata.default_value.as_str().into(),
        skip_if_absent: metadata.skip_if_absent,
    })
}

/// A namespace, and the path below it.
type Place = (Box<str>, Box<[Box<str>]>);

/// Where in metadata something is: the namespace, and the keys below it.
pub(crate) fn metadata_place(from: Option<&MetadataKey>, path: &str) -> Result<Place> {
    let from = from.ok_or_else(|| required(path, "metadata_key"))?;
    let segments = from.path.iter().map(|segment| match &segment.segment {
        Some(Segment::Key(key)) => Ok(key.as_str().into()),
        // An index is refused by the table of honoured fields.
        _ => Err(required(&join(path, "metadata_key.path"), "key")),
    });
    Ok((read_from(&from.key), segments.collect::<Result<_>>()?))
}
