//! Matchers of metadata.

use envoy_types::pb::envoy::r#type::matcher::v3::{
    FilterStateMatcher as ProtoState, MetadataMatcher as ProtoMetadata, ValueMatcher, double_matcher,
    filter_state_matcher::Matcher as StateKind, list_matcher, metadata_matcher::path_segment::Segment,
    value_matcher::MatchPattern,
};

use super::{
    common::{Result, required},
    matcher::string,
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{FilterStateMatcher, MetadataMatcher, ValueMatch},
    },
    http::metadata::read_from,
};

/// How deep matchers may be in each other.
const MAX_DEPTH: usize = 32;

/// A `MetadataMatcher`, checked.
pub(crate) fn metadata(matcher: &ProtoMetadata, path: &str) -> Result<MetadataMatcher> {
    if matcher.filter.is_empty() {
        return Err(required(path, "filter"));
    }
    if matcher.path.is_empty() {
        return Err(required(path, "path"));
    }
    let key = |(index, segment): (usize, &Option<Segment>)| match segment {
        Some(Segment::Key(key)) if !key.is_empty() => Ok(key.as_str().into()),
        _ => Err(required(&format!("{}[{index}]", join(path, "path")), "key")),
    };
    let keys = matcher.path.iter().map(|it| &it.segment).enumerate().map(key).collect::<Result<_>>()?;
    let value = matcher.value.as_ref().ok_or_else(|| required(path, "value"))?;
    let value = self::value(value, &join(path, "value"))?;
    Ok(MetadataMatcher { filter: read_from(&matcher.filter), path: keys, value, invert: matcher.invert })
}

/// A `FilterStateMatcher`, checked.
pub(crate) fn filter_state(matcher: &ProtoState, path: &str) -> Result<FilterStateMatcher> {
    if matcher.key.is_empty() {
        return Err(required(path, "key"));
    }
    let value = match &matcher.matcher {
        Some(StateKind::StringMatch(text)) => string(text, &join(path, "string_match"))?,
        // There are no addresses in the filter state.
        Some(StateKind::AddressMatch(_)) => return Err(FieldError::unsupported(join(path, "address_match"))),
        None => return Err(required(path, "matcher")),
    };
    Ok(FilterStateMatcher { key: matcher.key.as_str().into(), value })
}

/// A `ValueMatcher`, checked.
pub(crate) fn value(matcher: &ValueMatcher, path: &str) -> Result<ValueMatch> {
    at_depth(matcher, path, 0)
}

fn at_depth(matcher: &ValueMatcher, path: &str, depth: usize) -> Result<ValueMatch> {
    if depth == MAX_DEPTH {
        return Err(FieldError::new(path, format!("matchers may be at most {MAX_DEPTH} deep")));
    }
    Ok(match matcher.match_pattern.as_ref().ok_or_else(|| required(path, "match_pattern"))? {
        MatchPattern::NullMatch(_) => ValueMatch::Null,
        MatchPattern::DoubleMatch(number) => match &number.match_pattern {
            Some(double_matcher::MatchPattern::Range(range)) => ValueMatch::Range(range.start, range.end),
            Some(double_matcher::MatchPattern::Exact(exact)) => ValueMatch::Number(*exact),
            None => return Err(required(&join(path, "double_match"), "match_pattern")),
        },
        MatchPattern::StringMatch(text) => ValueMatch::String(string(text, &join(path, "string_match"))?),
        MatchPattern::BoolMatch(wanted) => ValueMatch::Bool(*wanted),
        MatchPattern::PresentMatch(wanted) => ValueMatch::Present(*wanted),
        MatchPattern::ListMatch(list) => {
            let path = join(path, "list_match");
            let Some(list_matcher::MatchPattern::OneOf(wanted)) = &list.match_pattern else {
                return Err(required(&path, "match_pattern"));
            };
            ValueMatch::OneOf(Box::new(at_depth(wanted, &join(&path, "one_of"), depth + 1)?))
        }
        MatchPattern::OrMatch(or) => {
            let path = join(path, "or_match.value_matchers");
            if or.value_matchers.len() < 2 {
                return Err(FieldError::new(path, "must have at least 2 items"));
            }
            let some = or.value_matchers.iter().enumerate();
            let some = some.map(|(index, wanted)| at_depth(wanted, &format!("{path}[{index}]"), depth + 1));
            ValueMatch::Any(some.collect::<Result<_>>()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::json::from_yaml;
    use envoy_types::pb::google::protobuf::Struct;

    use super::*;

    fn holds(path: &str, value: &str, more: &str) -> bool {
        let path: Vec<_> = path.split('.').map(|key| format!("{{ key: {key} }}")).collect();
        let text = format!("{{ filter: f, path: [{}], value: {value}{more} }}", path.join(", "));
        let matcher = metadata(&from_yaml(&text).unwrap(), "m").unwrap();
        let fields: Struct =
            from_yaml("{ text: abc, number: 15, flag: true, none: null, list: [one, 2], inner: { text: deep } }")
                .unwrap();
        assert_eq!(matcher.matches(None), matcher.invert, "without the namespace");
        matcher.matches(Some(&fields))
    }

    #[test]
    fn values_are_compared_by_their_kinds() {
        for (path, value, expected) in [
            ("text", "{ string_match: { prefix: ab } }", true),
            ("text", "{ string_match: { exact: ab } }", false),
            ("inner.text", "{ string_match: { exact: deep } }", true),
            ("inner", "{ string_match: { exact: deep } }", false),
            ("text.more", "{ present_match: true }", false),
            ("number", "{ double_match: { exact: 15 } }", true),
            ("number", "{ double_match: { range: { start: 15, end: 16 } } }", true),
            ("number", "{ double_match: { range: { start: 1, end: 15 } } }", false),
            ("flag", "{ bool_match: true }", true),
            ("flag", "{ bool_match: false }", false),
            ("none", "{ null_match: {} }", true),
            ("text", "{ null_match: {} }", false),
            ("inner", "{ present_match: true }", true),
            ("nothing", "{ present_match: true }", false),
            ("nothing", "{ present_match: false }", false),
            ("list", "{ list_match: { one_of: { string_match: { exact: one } } } }", true),
            ("list", "{ list_match: { one_of: { double_match: { exact: 3 } } } }", false),
            ("text", "{ or_match: { value_matchers: [{ null_match: {} }, { string_match: { suffix: c } }] } }", true),
        ] {
            assert_eq!(holds(path, value, ""), expected, "{path} {value}");
            assert_eq!(holds(path, value, ", invert: true"), !expected, "not {path} {value}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let deep = (0..40).fold("null_match: {}".to_owned(), |it, _| format!("list_match: {{ one_of: {{ {it} }} }}"));
        for (text, expected) in [
            ("{ path: [{ key: k }], value: { bool_match: true } }", "m.filter: "),
            ("{ filter: f, value: { bool_match: true } }", "m.path: "),
            ("{ filter: f, path: [{}], value: { bool_match: true } }", "m.path[0].key: "),
            ("{ filter: f, path: [{ key: k }] }", "m.value: "),
            ("{ filter: f, path: [{ key: k }], value: {} }", "m.value.match_pattern: "),
            (&format!("{{ filter: f, path: [{{ key: k }}], value: {{ {deep} }} }}"), "m.value.list_match.one_of."),
        ] {
            let error = metadata(&from_yaml(text).unwrap(), "m").unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
