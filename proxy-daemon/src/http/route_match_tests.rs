use http::Request;

use super::*;
use crate::config::model::{StringMatcher, StringPattern};

fn request(uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut builder = Request::builder().uri(uri);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(()).unwrap().into_parts().0
}

fn header(value: HeaderValueMatch, invert_match: bool, treat_missing_header_as_empty: bool) -> HeaderMatcher {
    let name = MatchedHeader::Name(http::HeaderName::from_static("x"));
    HeaderMatcher { name, value, invert_match, treat_missing_header_as_empty }
}

fn text(pattern: StringPattern) -> HeaderValueMatch {
    HeaderValueMatch::String(StringMatcher { pattern, ignore_case: false })
}

#[test]
fn header_matchers_follow_envoy() {
    let exact = |invert, missing| header(text(StringPattern::Exact("1".into())), invert, missing);
    let cases = [
        (exact(false, false), vec![("x", "1")], true),
        (exact(false, false), vec![("x", "2")], false),
        (exact(true, false), vec![("x", "2")], true),
        (exact(true, false), vec![], false),
        (exact(true, true), vec![], true),
        (header(text(StringPattern::Exact("1,2".into())), false, false), vec![("x", "1"), ("x", "2")], false),
        (exact(false, false), vec![("x", "2"), ("x", "1")], true),
        (exact(true, false), vec![("x", "2"), ("x", "1")], false),
        (header(HeaderValueMatch::Present(true), false, false), vec![("x", "")], true),
        (header(HeaderValueMatch::Present(true), true, false), vec![], true),
        (header(HeaderValueMatch::Present(false), false, false), vec![], true),
        (header(HeaderValueMatch::Range { start: -10, end: 0 }, false, false), vec![("x", "-1")], true),
        (header(HeaderValueMatch::Range { start: -10, end: 0 }, false, false), vec![("x", "0")], false),
        (header(HeaderValueMatch::Range { start: -10, end: 0 }, false, false), vec![("x", "somestring")], false),
    ];
    for (index, (matcher, headers, expected)) in cases.iter().enumerate() {
        assert_eq!(header_matches(matcher, &request("/", headers)), *expected, "case {index}");
    }
}

#[test]
fn bytes_that_are_no_text_hide_nothing() {
    let mut request = request("/", &[("cookie", "a=b")]);
    request.headers.insert("x", HeaderValue::from_bytes(b"bad\xe9bot").unwrap());
    request.headers.append("cookie", HeaderValue::from_bytes(b"c=\xff; d=e\xe9f").unwrap());
    assert!(header_matches(&header(HeaderValueMatch::Present(true), false, false), &request));
    assert!(header_matches(&header(text(StringPattern::Contains("bot".into())), false, false), &request));
    assert!(!header_matches(&header(text(StringPattern::Exact("badbot".into())), false, false), &request));
    assert_eq!(cookie(&request.headers, "a").as_deref(), Some("b"));
    assert_eq!(cookie(&request.headers, "d").as_deref(), Some("e\u{fffd}f"));
    assert_eq!(cookie(&request.headers, "x"), None);
}

#[test]
fn query_parameters() {
    let matcher = |value: Option<&str>| QueryParameterMatcher {
        name: "debug".to_owned(),
        value: value.map_or(QueryParameterMatch::Present(true), |value| {
            QueryParameterMatch::String(StringMatcher {
                pattern: StringPattern::Exact(value.into()),
                ignore_case: false,
            })
        }),
    };
    assert!(query_matches(&matcher(None), Some("a=1&debug")));
    assert!(query_matches(&matcher(Some("1")), Some("debug=1")));
    assert!(!query_matches(&matcher(Some("1")), Some("debug=2")));
    assert!(!query_matches(&matcher(None), None));
}
