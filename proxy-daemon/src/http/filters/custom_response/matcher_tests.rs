use envoy_types::pb::xds::r#type::matcher::v3::Matcher;

use super::*;
use crate::config::model::MatchTree;

struct Names;

impl MatchParts for Names {
    type Input = Input;
    type Action = String;

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<Input>, FieldError> {
        input(config, path)
    }

    fn action(&mut self, config: &Any, _path: &str) -> Result<String, FieldError> {
        Ok(String::from_utf8_lossy(&config.value).into_owned())
    }
}

fn tree_of(yaml: &str) -> Result<MatchTree<Input, String>, FieldError> {
    let matcher: Matcher = culvert_xds_client::json::from_yaml(yaml).unwrap();
    parse::match_tree(&matcher, "m", &mut Names)
}

fn found(tree: &MatchTree<Input, String>, status: u16, headers: &[(&'static str, &'static str)]) -> String {
    let (mut response, ()) = http::Response::builder().status(status).body(()).unwrap().into_parts();
    for (name, value) in headers {
        response.headers.append(*name, http::HeaderValue::from_static(value));
    }
    let found = tree.find(&Told { response: &response, local: false, request: None });
    found.map_or("none", |text| text.trim_start_matches(['\n', '\u{1}', '\u{2}'])).to_owned()
}

const STATUS: &str = "input: {name: i, typed_config: {\"@type\": \
                      type.googleapis.com/envoy.type.matcher.v3.HttpResponseStatusCodeMatchInput}}";

fn action(name: &str) -> String {
    format!(
        "{{action: {{name: a, typed_config: {{\"@type\": type.googleapis.com/google.protobuf.StringValue, value: {name}}}}}}}"
    )
}

#[test]
fn of_prefixes_the_longest_that_comes_to_an_action_counts() {
    let nested = format!(
        "{{matcher: {{matcher_tree: {{{STATUS}, exact_match_map: {{map: {{\"503\": {}}}}}}}}}}}",
        action("exact")
    );
    let tree = tree_of(&format!(
        "{{matcher_tree: {{{STATUS}, prefix_match_map: {{map: {{\"5\": {}, \"50\": {nested}}}}}}}, on_no_match: {}}}",
        action("five"),
        action("other")
    ))
    .unwrap();
    for (status, expected) in [(503, "exact"), (504, "five"), (511, "five"), (404, "other")] {
        assert!(found(&tree, status, &[]).ends_with(expected), "{status}");
    }
}

#[test]
fn what_is_not_there_is_no_value() {
    let header = "input: {name: i, typed_config: {\"@type\": \
                  type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput, header_name: x}}";
    let single = format!("single_predicate: {{{header}, value_match: {{prefix: \"\"}}}}");
    let list = |predicate: &str| {
        format!("{{matcher_list: {{matchers: [{{predicate: {{{predicate}}}, on_match: {}}}]}}}}", action("a"))
    };
    assert_eq!(found(&tree_of(&list(&single)).unwrap(), 200, &[]), "none");
    assert!(found(&tree_of(&list(&format!("not_matcher: {{{single}}}"))).unwrap(), 200, &[]).ends_with('a'));
}

#[test]
fn what_cannot_be_honoured_is_refused_with_its_path() {
    let other = "input: {name: i, typed_config: {\"@type\": type.googleapis.com/envoy.type.matcher.v3.HttpRequestQueryParamMatchInput, \
                 query_param: a}}";
    let error = tree_of(&format!(
        "{{matcher_list: {{matchers: [{{predicate: {{single_predicate: {{{other}, value_match: {{exact: a}}}}}}, on_match: {}}}]}}}}",
        action("a")
    ));
    assert_eq!(
        error.unwrap_err().to_string(),
        "m.matcher_list.matchers[0].predicate.single_predicate.input.typed_config: input of type \
         envoy.type.matcher.v3.HttpRequestQueryParamMatchInput is not supported by culvert here"
    );
}
