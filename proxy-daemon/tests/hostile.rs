//! Inputs made to cost much: the work and the memory stay in proportion to the bytes.

use std::time::{Duration, Instant};

use culvert_proxy_daemon::{config::fuzz, http};
use culvert_xds_client::{
    Any,
    json::{self, UnknownFields},
    overrides,
};
use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use prost::Message as _;

/// About how long each text is.
const BYTES: usize = 100_000;

/// Many times what the slowest of them takes, unoptimised; a hundredth of what quadratic work would.
const LIMIT: Duration = Duration::from_secs(20);

fn times(piece: &str) -> String {
    piece.repeat(BYTES / piece.len())
}

fn run(name: &str, target: fn(&[u8]), text: &str) {
    let started = Instant::now();
    target(text.as_bytes());
    let took = started.elapsed();
    assert!(took < LIMIT, "{name}: {took:?}");
}

#[test]
fn yaml() {
    let (open, close) = ("&a [".repeat(95), "]".repeat(95));
    let half = |text: &str| text[..text.len() / 2].to_owned();
    let texts = [
        ("open lists", times("[")),
        ("open objects", times("{a: ")),
        ("lists in lists", times("- ")),
        ("keys of keys", times("? ")),
        ("the same key", times("k: 1\n")),
        ("a long key", times("k")),
        ("a long unknown key", format!("{}: 1", times("k"))),
        ("lines of one text", format!("a: {}", times("b\n  "))),
        ("anchors in anchors", format!("{open}{}{close}", times("1,"))),
        ("anchors around a text", format!("{open}{}{close}", times("x"))),
        ("aliases of a list", format!("a: &a [{}]\nb: [{}]", half(&times("1,")), half(&times("*a,")))),
        ("aliases of a text", format!("a: &a {}\nb: [{}]", half(&times("x")), half(&times("*a,")))),
        ("keys that are aliases", format!("a: &a {}\nb: [{}]", half(&times("x")), half(&times("{*a : 1},")))),
        ("objects in a list", format!("[{}]", times("a: b, "))),
        ("documents", times("---\n")),
        ("tags", times("!a ")),
    ];
    texts.iter().for_each(|(name, text)| run(name, fuzz::yaml, text));
}

#[test]
fn json_texts() {
    let resources = |kind: &str, item: &str| format!("{{\"static_resources\":{{\"{kind}\":[{}]}}}}", times(item));
    let texts = [
        ("open lists", times("[")),
        ("a long number", times("1")),
        ("a long unknown key", format!("{{\"{}\":1}}", times("k"))),
        ("the same field", format!("{{{}}}", times("\"node\":{},"))),
        ("the same list", format!("{{\"static_resources\":{{{}}}}}", times("\"clusters\":[{}],"))),
        ("listeners without anything", resources("listeners", "{},")),
        ("clusters of one name", resources("clusters", "{\"name\":\"c\"},")),
        (
            "a long key around a field that is set again and again",
            format!("{{\"node\":{{\"dynamic_parameters\":{{\"{}\":{{{}}}}}}}}}", times("k"), times("\"params\":{},")),
        ),
    ];
    texts.iter().for_each(|(name, text)| run(name, fuzz::json, text));
}

/// Each message in an `Any` can have another one: the stack must hold them all.
#[test]
fn anys_in_each_other_are_bounded() {
    let nested = |depth: usize| {
        let inner = Any { type_url: "type.googleapis.com/google.protobuf.Any".to_owned(), value: Vec::new() };
        (1..depth).fold(inner.clone(), |any, _| Any { value: any.encode_to_vec(), ..inner.clone() })
    };
    let check = |any: &Any| json::validate_any(any, "resource", UnknownFields::Reject);
    assert!(check(&nested(json::MAX_ANYS - 1)).is_ok());
    let deep = nested(3_000);
    assert_eq!(check(&deep).unwrap_err().to_string(), "resource: more than 32 messages are in each other as Any");
    // What is too deep is shown as it came.
    assert!(json::any_to_json(&deep).to_string().len() < deep.value.len() * 3);
    // With something in it to look for.
    let name = "a.TypedStruct".to_owned();
    let config = TypedExtensionConfig { name, typed_config: Some(deep) };
    let error = json::resolve_typed_structs(&config, UnknownFields::Reject).unwrap_err().to_string();
    assert_eq!(error, "typed_config: more than 32 messages are in each other as Any");
}

/// What the fuzzers have stopped at.
#[test]
fn first_inputs() {
    // The first of all inputs, which waits for the descriptors to be read.
    run("any", fuzz::any, "\n");
    run("json", fuzz::json, "\n\n1");
    run("yaml", fuzz::yaml, "\\");
    // A query without a path, which hosts were asked for as it is.
    run("request", http::fuzz::request, "@GET\n/\nhost:a\nx:?x");
    run("http2_head", http::codec::fuzz::http2_head, "GET\nhttp://a?x\n");
    // Two lines of `jaeger-baggage`, which together have more members than are read.
    run("overrides", |bytes| overrides::fuzz(&[&b"\x82"[..], bytes].concat()), &["a=b"; 40].join(","));
    // Sizes of the table, of which the greatest counts.
    run("http2_blocks", http::codec::fuzz::http2_blocks, "\n ?= ?\u{e1}?= ");
}
