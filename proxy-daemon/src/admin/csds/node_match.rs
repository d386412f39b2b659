//! `envoy.type.matcher.v3.NodeMatcher`: whether a request is about this node.

use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        r#type::matcher::v3::{
            NodeMatcher, StructMatcher, ValueMatcher, double_matcher, list_matcher,
            struct_matcher::path_segment::Segment, value_matcher::MatchPattern,
        },
    },
    google::protobuf::{Value, value::Kind},
};

use crate::config::{FieldError, model::value_at, parse::matcher};

/// Whether there are no matchers, or one of them matches. The error names a matcher that cannot be used.
pub(super) fn matches(matchers: &[NodeMatcher], node: &Node) -> Result<bool, FieldError> {
    let mut any = matchers.is_empty();
    for (index, matcher) in matchers.iter().enumerate() {
        // Each is looked at, so that a bad one is refused whatever the node is called.
        any |= one(matcher, node, &format!("node_matchers[{index}]"))?;
    }
    Ok(any)
}

fn one(matcher: &NodeMatcher, node: &Node, path: &str) -> Result<bool, FieldError> {
    let mut all = match &matcher.node_id {
        Some(id) => matcher::string(id, &format!("{path}.node_id"))?.matches(&node.id),
        None => true,
    };
    for (index, wanted) in matcher.node_metadatas.iter().enumerate() {
        let path = format!("{path}.node_metadatas[{index}]");
        let pattern = wanted.value.as_ref().ok_or_else(|| FieldError::new(format!("{path}.value"), "is required"))?;
        all &= value(pattern, find(wanted, node), &format!("{path}.value"))?;
    }
    Ok(all)
}

/// The value at a path in the node's metadata.
fn find<'a>(matcher: &StructMatcher, node: &'a Node) -> Option<&'a Value> {
    let keys = matcher.path.iter();
    let keys = keys.map(|segment| segment.segment.as_ref().map(|Segment::Key(key)| key.as_str()));
    value_at(node.metadata.as_ref(), keys.collect::<Option<Vec<_>>>()?.into_iter())
}

fn value(matcher: &ValueMatcher, value: Option<&Value>, path: &str) -> Result<bool, FieldError> {
    let kind = value.and_then(|value| value.kind.as_ref());
    let pattern = matcher.match_pattern.as_ref().ok_or_else(|| FieldError::new(path, "is required"))?;
    Ok(match pattern {
        MatchPattern::NullMatch(_) => matches!(kind, Some(Kind::NullValue(_))),
        MatchPattern::DoubleMatch(matcher) => match (kind, &matcher.match_pattern) {
            (Some(Kind::NumberValue(number)), Some(double_matcher::MatchPattern::Range(range))) => {
                range.start <= *number && *number < range.end
            }
            (Some(Kind::NumberValue(number)), Some(double_matcher::MatchPattern::Exact(exact))) => number == exact,
            _ => false,
        },
        MatchPattern::StringMatch(wanted) => {
            let wanted = matcher::string(wanted, &format!("{path}.string_match"))?;
            matches!(kind, Some(Kind::StringValue(text)) if wanted.matches(text))
        }
        MatchPattern::BoolMatch(wanted) => matches!(kind, Some(Kind::BoolValue(value)) if value == wanted),
        MatchPattern::PresentMatch(wanted) => kind.is_some() == *wanted,
        MatchPattern::ListMatch(list) => {
            let Some(list_matcher::MatchPattern::OneOf(wanted)) = &list.match_pattern else { return Ok(false) };
            let mut any = false;
            if let Some(Kind::ListValue(items)) = kind {
                for item in &items.values {
                    any |= self::value(wanted, Some(item), &format!("{path}.list_match.one_of"))?;
                }
            }
            any
        }
        MatchPattern::OrMatch(or) => {
            let mut any = false;
            for (index, wanted) in or.value_matchers.iter().enumerate() {
                any |= self::value(wanted, value, &format!("{path}.or_match.value_matchers[{index}]"))?;
            }
            any
        }
    })
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::json::from_yaml;

    use super::*;

    fn holds(matcher: &str) -> bool {
        let node: Node = from_yaml(
            "{ id: node-1, metadata: { zone: { name: a, size: 3 }, flag: true, none: null, tags: [one, two] } }",
        )
        .unwrap();
        matches(&[from_yaml(matcher).unwrap()], &node).unwrap()
    }

    fn metadata(path: &[&str], value: &str) -> bool {
        let path: Vec<_> = path.iter().map(|key| format!("{{ key: {key} }}")).collect();
        holds(&format!("node_metadatas: [{{ path: [{}], value: {value} }}]", path.join(", ")))
    }

    #[test]
    fn by_id() {
        assert!(matches(&[], &Node::default()).unwrap());
        assert!(holds("node_id: { exact: node-1 }") && holds("node_id: { prefix: NODE, ignore_case: true }"));
        assert!(!holds("node_id: { exact: node-2 }"));
        assert!(holds("node_id: { safe_regex: { regex: 'node-\\d' } }"));
    }

    #[test]
    fn by_metadata() {
        assert!(metadata(&["zone", "name"], "{ string_match: { exact: a } }"));
        assert!(!metadata(&["zone", "name", "deeper"], "{ string_match: { exact: a } }"));
        assert!(metadata(&["zone", "size"], "{ double_match: { exact: 3 } }"));
        assert!(metadata(&["zone", "size"], "{ double_match: { range: { start: 3, end: 4 } } }"));
        assert!(!metadata(&["zone", "size"], "{ double_match: { range: { start: 2, end: 3 } } }"));
        assert!(metadata(&["flag"], "{ bool_match: true }") && !metadata(&["flag"], "{ bool_match: false }"));
        assert!(metadata(&["none"], "{ null_match: {} }") && !metadata(&["flag"], "{ null_match: {} }"));
        assert!(metadata(&["flag"], "{ present_match: true }") && metadata(&["nothing"], "{ present_match: false }"));
        assert!(metadata(&["tags"], "{ list_match: { one_of: { string_match: { exact: two } } } }"));
        assert!(!metadata(&["tags"], "{ list_match: { one_of: { string_match: { exact: z } } } }"));
        assert!(metadata(&["flag"], "{ or_match: { value_matchers: [{ null_match: {} }, { bool_match: true }] } }"));
    }

    #[test]
    fn all_of_one_and_any_of_many() {
        let node = Node { id: "a".into(), ..Node::default() };
        let id = |id: &str| from_yaml::<NodeMatcher>(&format!("node_id: {{ exact: {id} }}")).unwrap();
        assert!(matches(&[id("b"), id("a")], &node).unwrap());
        assert!(!matches(&[id("b"), id("c")], &node).unwrap());
        let both =
            "{ node_id: { exact: a }, node_metadatas: [{ path: [{ key: k }], value: { present_match: true } }] }";
        assert!(!matches(&[from_yaml(both).unwrap()], &node).unwrap());
    }

    #[test]
    fn bad_matchers_are_named() {
        let bad: NodeMatcher = from_yaml("node_id: { safe_regex: { regex: '(' } }").unwrap();
        let error = matches(&[NodeMatcher::default(), bad], &Node::default()).unwrap_err();
        assert!(error.to_string().starts_with("node_matchers[1].node_id.safe_regex.regex: "), "{error}");
        let bad = NodeMatcher { node_metadatas: vec![StructMatcher::default()], ..NodeMatcher::default() };
        let error = matches(&[bad], &Node::default()).unwrap_err();
        assert_eq!(error.to_string(), "node_matchers[0].node_metadatas[0].value: is required");
    }
}
