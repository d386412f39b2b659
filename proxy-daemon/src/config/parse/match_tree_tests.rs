use std::borrow::Cow;

use super::*;
use crate::config::model::StringMatcher;

/// The texts between slashes.
#[derive(Debug)]
struct Place(usize);

impl MatchInput for Place {
    type Of<'a> = str;

    fn value<'a>(&'a self, of: &'a str) -> Option<Cow<'a, str>> {
        of.split('/').nth(self.0).map(Cow::Borrowed)
    }
}

struct Parts;

impl MatchParts for Parts {
    type Input = Place;
    type Action = String;

    fn input(&mut self, config: &Any, _path: &str) -> Result<Option<Place>> {
        Ok((type_name(config) == "google.protobuf.UInt32Value")
            .then(|| Place(config.value.get(1).map_or(0, |n| usize::from(*n)))))
    }

    fn action(&mut self, config: &Any, _path: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(config.value.get(2..).unwrap_or_default()).into_owned())
    }
}

fn tree(yaml: &str) -> Result<MatchTree<Place, String>> {
    let matcher: Matcher = culvert_xds_client::json::from_yaml(yaml).unwrap();
    match_tree(&matcher, "m", &mut Parts)
}

fn place(number: usize) -> String {
    format!(
        "input: {{name: i, typed_config: {{\"@type\": type.googleapis.com/google.protobuf.UInt32Value, value: {number}}}}}"
    )
}

fn action(name: &str) -> String {
    format!(
        "{{action: {{name: a, typed_config: {{\"@type\": type.googleapis.com/google.protobuf.StringValue, value: {name}}}}}}}"
    )
}

#[test]
fn maps_of_thousands_are_looked_up() {
    let entries = |make: &dyn Fn(usize) -> String| {
        (0..5000)
            .map(|number| format!("\"{}\": {}", make(number), action(&format!("n{number}"))))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let exact = tree(&format!(
        "{{matcher_tree: {{{}, exact_match_map: {{map: {{{}}}}}}}}}",
        place(1),
        entries(&|number| format!("k{number}"))
    ))
    .unwrap();
    let prefixes = tree(&format!(
        "{{matcher_tree: {{{}, prefix_match_map: {{map: {{{}}}}}}}}}",
        place(0),
        entries(&|number| format!("k{number:04}"))
    ))
    .unwrap();
    assert_eq!(exact.find("x/k4999"), Some(&"n4999".to_owned()));
    assert_eq!(exact.find("x/k5000"), None);
    assert_eq!(exact.find("x"), None);
    assert_eq!(prefixes.find("k0042 and more"), Some(&"n42".to_owned()));
    let MatchKind::Prefixes(_, map) = &prefixes.kind else { panic!("{prefixes:?}") };
    assert_eq!(map.of("k0042 and more").count(), 1);
    assert_eq!(map.of("k\u{e9}\u{e9}").count(), 0, "a length that ends within a character");
}

#[test]
fn what_cannot_be_is_refused_with_its_path() {
    let refused = |yaml: &str| tree(yaml).unwrap_err().to_string();
    let deep = (0..40).fold(action("a"), |inner, _| format!("{{matcher: {{on_no_match: {inner}}}}}"));
    assert!(refused(&format!("{{on_no_match: {deep}}}")).ends_with("is nested too deeply"));
    let list = |predicate: &str| {
        format!("{{matcher_list: {{matchers: [{{predicate: {{{predicate}}}, on_match: {}}}]}}}}", action("a"))
    };
    let custom = |message: &str| {
        let place = place(0);
        refused(&list(&format!(
            "single_predicate: {{{place}, custom_match: {{name: c, typed_config: {{\"@type\": type.googleapis.com/{message}}}}}}}"
        )))
    };
    let hashing =
        "envoy.extensions.matching.input_matchers.consistent_hashing.v3.ConsistentHashing, threshold: 5, modulo: 4";
    assert_eq!(
        custom(hashing),
        "m.matcher_list.matchers[0].predicate.single_predicate.custom_match.typed_config.threshold: must not be greater than modulo"
    );
    assert!(
        custom("google.protobuf.Empty")
            .ends_with("matcher of type google.protobuf.Empty is not supported by culvert here")
    );
}

#[test]
fn strings_are_matched_as_everywhere() {
    let yaml = format!(
        "{{matcher_list: {{matchers: [{{predicate: {{single_predicate: {{{}, value_match: {{suffix: B, ignore_case: true}}}}}}, on_match: {}}}]}}}}",
        place(0),
        action("found")
    );
    let tree = tree(&yaml).unwrap();
    let MatchKind::List(list) = &tree.kind else { panic!("{tree:?}") };
    assert!(matches!(&list[0].0, Predicate::Single(_, ValueMatcher::String(StringMatcher { ignore_case: true, .. }))));
    assert_eq!(tree.find("ab"), Some(&"found".to_owned()));
    assert_eq!(tree.find("ba"), None);
}
