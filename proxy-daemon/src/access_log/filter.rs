//! Which requests and connections a log has a line for.

use http::HeaderName;

use super::{Record, ResponseFlags, format::Part, grpc};
use crate::{
    config::model::{AccessLogFilter, Comparison, ComparisonOp, HeaderMatcher, MatchedHeader, value_at},
    http::matches_any,
};

static X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

impl AccessLogFilter {
    /// Whether this one gets a line.
    pub(crate) fn admits(&self, record: &Record<'_>) -> bool {
        match self {
            AccessLogFilter::Always => true,
            AccessLogFilter::NotHealthCheck => !record.health_check,
            AccessLogFilter::StatusCode(comparison) => comparison.holds(u64::from(record.response_code)),
            AccessLogFilter::Duration(comparison) => comparison.holds(record.duration.as_millis() as u64),
            AccessLogFilter::Runtime { numerator, denominator, independent } => {
                let id = if *independent { None } else { request_number(record) };
                let random = id.unwrap_or_else(|| fastrand::u64(..));
                random % denominator.value() < numerator.get()
            }
            AccessLogFilter::ResponseFlags(None) => !record.response_flags.is_empty(),
            AccessLogFilter::ResponseFlags(Some(flags)) => record.response_flags.intersects(*flags),
            AccessLogFilter::Header(matcher) => header_matches(matcher, record),
            AccessLogFilter::GrpcStatus { statuses, exclude } => {
                let status = grpc::status_or_unknown(record);
                let listed = status.is_some_and(|status| status < 32 && statuses & (1 << status) != 0);
                listed != *exclude
            }
            AccessLogFilter::LogType { types, exclude } => types.contains(&record.log_type) != *exclude,
            AccessLogFilter::Metadata { matcher, by_default } => {
                let told = matcher.as_ref().and_then(|matcher| {
                    let namespace = record.metadata?.namespace(&matcher.filter);
                    value_at(namespace, matcher.path.iter().map(|key| &**key)).map(|value| (matcher, value))
                });
                // `invert` has no effect, as in Envoy.
                told.map_or(*by_default, |(matcher, value)| matcher.value.matches(Some(value)))
            }
            AccessLogFilter::And(filters) => filters.iter().all(|filter| filter.admits(record)),
            AccessLogFilter::Or(filters) => filters.iter().any(|filter| filter.admits(record)),
        }
    }

    /// The headers of a part of the messages that it looks at.
    pub(super) fn headers(&self, part: Part) -> Vec<&HeaderName> {
        match (self, part) {
            (AccessLogFilter::Runtime { independent: false, .. }, Part::Request) => vec![&X_REQUEST_ID],
            (AccessLogFilter::Header(matcher), Part::Request) => match &matcher.name {
                MatchedHeader::Name(name) => vec![name],
                _ => Vec::new(),
            },
            (AccessLogFilter::GrpcStatus { .. }, Part::Response | Part::Trailers) => vec![grpc::header(part)],
            (AccessLogFilter::And(filters) | AccessLogFilter::Or(filters), _) => {
                filters.iter().flat_map(|filter| filter.headers(part)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Whether the request's header is as it shall be; a request that could not be read has none.
fn header_matches(matcher: &HeaderMatcher, record: &Record<'_>) -> bool {
    let single = match &matcher.name {
        MatchedHeader::Method => record.method,
        MatchedHeader::Path => record.path,
        MatchedHeader::Authority => record.authority,
        MatchedHeader::Scheme => record.scheme,
        MatchedHeader::Name(name) => {
            let values = record.request_headers.into_iter().flat_map(|headers| headers.all(name));
            return matches_any(matcher, values.map(|value| String::from_utf8_lossy(value.as_bytes())));
        }
    };
    matches_any(matcher, single.into_iter())
}

impl Comparison {
    fn holds(&self, number: u64) -> bool {
        let value = self.value.get();
        match self.op {
            ComparisonOp::Equal => number == value,
            ComparisonOp::GreaterOrEqual => number >= value,
            ComparisonOp::LessOrEqual => number <= value,
            ComparisonOp::NotEqual => number != value,
        }
    }
}

/// The first eight digits of `x-request-id`: all proxies on a request's way choose alike.
fn request_number(record: &Record<'_>) -> Option<u64> {
    let id = record.request_headers?.get(&X_REQUEST_ID)?.to_str().ok()?;
    u64::from_str_radix(id.get(..8)?, 16).ok()
}

/// The flags of these names.
///
/// # Errors
/// The name that is none.
pub fn response_flags<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<ResponseFlags, &'a str> {
    names.into_iter().try_fold(ResponseFlags::default(), |flags, name| {
        ResponseFlags::from_name(name).map(|flag| flags | flag).ok_or(name)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::layered_runtime::{Denominator, Key, Layer, LayerSource, Runtime, RuntimeInteger};

    fn integer(default: u64, key: &str) -> RuntimeInteger {
        RuntimeInteger { default, key: Key::optional(key) }
    }

    fn status(op: ComparisonOp, value: u64) -> AccessLogFilter {
        AccessLogFilter::StatusCode(Comparison { op, value: integer(value, "least") })
    }

    #[test]
    fn numbers_are_compared_with_runtime_values() {
        let record = Record { response_code: 404, duration: Duration::from_millis(20), ..Record::default() };
        for (op, holds) in [
            (ComparisonOp::Equal, [false, true, false]),
            (ComparisonOp::NotEqual, [true, false, true]),
            (ComparisonOp::GreaterOrEqual, [true, true, false]),
            (ComparisonOp::LessOrEqual, [false, true, true]),
        ] {
            assert_eq!([403, 404, 405].map(|value| status(op, value).admits(&record)), holds, "{op:?}");
        }
        let slow = AccessLogFilter::Duration(Comparison { op: ComparisonOp::GreaterOrEqual, value: integer(20, "") });
        assert!(slow.admits(&record));
        assert!(!AccessLogFilter::And(vec![slow.clone(), status(ComparisonOp::Equal, 200)]).admits(&record));
        let either = AccessLogFilter::Or(vec![slow, status(ComparisonOp::Equal, 200)]);
        assert!(either.admits(&record));
        let layers = vec![Layer { name: "a".to_owned(), source: LayerSource::Admin }];
        let runtime = Runtime::start(layers).unwrap();
        runtime.modify([("least", "500")]).unwrap();
        assert!(!status(ComparisonOp::GreaterOrEqual, 400).admits(&record));
    }

    #[test]
    fn flags_are_looked_for() {
        let (none, some) = (Record::default(), Record { response_flags: ResponseFlags::UF, ..Record::default() });
        let any = AccessLogFilter::ResponseFlags(None);
        assert!(!any.admits(&none) && any.admits(&some));
        let listed =
            |names: &[&str]| AccessLogFilter::ResponseFlags(Some(response_flags(names.iter().copied()).unwrap()));
        assert!(listed(&["NR", "UF"]).admits(&some) && !listed(&["NR"]).admits(&some));
        assert_eq!(response_flags(["UF", "XX"]), Err("XX"));
    }

    #[test]
    fn statuses_of_grpc_are_looked_for() {
        let listed = |exclude| AccessLogFilter::GrpcStatus { statuses: 1 << 5 | 1 << 2, exclude };
        let status = |value: &'static str| vec![("grpc-status".parse().unwrap(), value.parse().unwrap())];
        let admits = |headers: &[(HeaderName, http::HeaderValue)], code| {
            let headers = Some(crate::access_log::Headers::Kept(headers));
            let record = Record { response_headers: headers, response_code: code, ..Record::default() };
            assert_ne!(listed(true).admits(&record), listed(false).admits(&record));
            listed(false).admits(&record)
        };
        assert!(admits(&status("5"), 200) && !admits(&status("7"), 200) && !admits(&status("x"), 404));
        assert!(admits(&[], 200) && !admits(&[], 404), "by the status of HTTP");
        assert!(admits(&[], 0), "nothing is known");
        assert_eq!(listed(false).headers(Part::Trailers), ["grpc-status"]);
        assert!(listed(false).headers(Part::Request).is_empty());
    }

    #[test]
    fn requests_are_sampled_by_their_id() {
        let sample = |independent| AccessLogFilter::Runtime {
            numerator: integer(10, "sampled"),
            denominator: Denominator::Hundred,
            independent,
        };
        let admits = |filter: &AccessLogFilter, id: &str| {
            let headers = http::HeaderMap::from_iter([(X_REQUEST_ID.clone(), id.parse().unwrap())]);
            filter.admits(&Record {
                request_headers: Some(crate::access_log::Headers::All(&headers)),
                ..Record::default()
            })
        };
        // 0x00000009 is 9, 0x0000000a is 10.
        assert!(admits(&sample(false), "00000009-1111-4111-8111-111111111111"));
        assert!(!admits(&sample(false), "0000000a-1111-4111-8111-111111111111"));
        let often = |filter: &AccessLogFilter, id: &str| (0..10_000).filter(|_| admits(filter, id)).count();
        assert!((500..1_500).contains(&often(&sample(true), "0000000a-1111")), "by its own number");
        assert!((500..1_500).contains(&often(&sample(false), "no number")), "nothing to go by");
        assert_eq!(sample(true).headers(Part::Request).len(), 0);
        assert_eq!(AccessLogFilter::Or(vec![sample(true), sample(false)]).headers(Part::Request).len(), 1);
    }
}
