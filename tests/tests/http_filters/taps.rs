//! tap.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use culvert_xds_client::json::pool;
use prost_reflect::DynamicMessage;
use serde_json::{Value, json};

use super::harness::{Case, case, is_own_value};

const TAP: &str = "tap.v3.Tap";
const TRACE: &str = "envoy.data.tap.v3.TraceWrapper";
/// What of connections is a proxy's own, or a client's.
const OWN_FIELDS: [&str; 4] = ["port_value", "headers_received_time", "trace_id", "traceId"];
/// The same in the text format.
const OWN_LINES: [&str; 4] = ["trace_id", "nanos", "seconds", "port_value"];
/// What codecs tell clients about their connection.
const CONNECTION: &str = "connection";

/// A filter that taps into files: the predicate, fields of the sink, further fields of the output and of the filter.
fn tap(matches: &str, format: &str, output: &str, more: &str) -> String {
    format!(
        "common_config: {{static_config: {{match: {{{matches}}}, output_config: {{sinks: [{{format: {format}, file_per_tap: \
         {{path_prefix: \"$taps\"}}}}]{output}}}}}}}{more}"
    )
}

/// All taps whose paths begin so, in a form that is the same for both proxies.
pub fn written(prefix: &str) -> Result<String> {
    let prefix = Path::new(prefix);
    let begins = format!("{}_", prefix.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let mut all = Vec::new();
    for entry in fs::read_dir(prefix.parent().unwrap_or(prefix))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((_, extension)) = name.strip_prefix(&begins).and_then(|rest| rest.split_once('.')) {
            let bytes = fs::read(&path)?;
            let text = match extension {
                "json" => serde_json::Deserializer::from_slice(&bytes)
                    .into_iter()
                    .collect::<Result<Vec<Value>, _>>()
                    .map(shown)?,
                "pb" => shown(vec![message(&mut &bytes[..])?]),
                "pb_length_delimited" => {
                    let (mut rest, mut messages) = (&bytes[..], Vec::new());
                    while !rest.is_empty() {
                        let length = prost_reflect::prost::decode_length_delimiter(&mut rest)?;
                        let (mut one, others) = rest.split_at_checked(length).context("a message is cut off")?;
                        messages.push(message(&mut one)?);
                        rest = others;
                    }
                    shown(messages)
                }
                _ => text(&String::from_utf8_lossy(&bytes)),
            };
            all.push(format!("{extension}: {text}"));
        }
    }
    // By the requests that they are of.
    let id = |text: &String| {
        let id = text.split("x-id").nth(1)?.split("value").find(|rest| rest.contains('-'))?;
        id.split('"').find(|part| part.contains('-')).map(str::to_owned)
    };
    all.sort_by_cached_key(id);
    Ok(format!("{} taps\n{}", all.len(), all.join("\n")))
}

fn message(bytes: &mut &[u8]) -> Result<Value> {
    let descriptor = pool().get_message_by_name(TRACE).context("no traces")?;
    Ok(serde_json::to_value(DynamicMessage::decode(descriptor, bytes)?)?)
}

/// The text format: its lines, each header's in one, in an order of their own.
fn text(text: &str) -> String {
    let joined = text.replace("\"\n", "\" ").replace("{\n", "{ ").replace("} ", "}\n");
    let own = |line: &&str| {
        !OWN_LINES.iter().any(|own| line.contains(own)) && !line.contains("\"connection\"") && line.contains('"')
    };
    let mut lines: Vec<_> = joined
        .lines()
        .filter(own)
        .map(|line| {
            let name = line.split('"').nth(1).unwrap_or_default();
            if is_own_value(name) { name.to_owned() } else { line.to_owned() }
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

/// The segments of a trace, of which those of a body that follow each other are one.
fn shown(segments: Vec<Value>) -> String {
    let mut all: Vec<Value> = Vec::new();
    for mut segment in segments {
        normalise(&mut segment);
        let joined = all.last_mut().is_some_and(|before| join(before, &segment));
        if !joined {
            all.push(segment);
        }
    }
    // Alone nothing is bigger than what it is made of.
    all.iter().map(|segment| format!("{segment:#}\n")).collect()
}

/// Adds a piece of a body to the one before it.
fn join(before: &mut Value, segment: &Value) -> bool {
    let names = ["request_body_chunk", "response_body_chunk"];
    names.iter().any(|name| {
        let pointer = format!("/http_streamed_trace_segment/{name}");
        let (Some(before), Some(piece)) = (before.pointer_mut(&pointer), segment.pointer(&pointer)) else {
            return false;
        };
        let text = |value: &Value| value["as_string"].as_str().unwrap_or_default().to_owned();
        before["as_string"] = json!(text(before) + &text(piece));
        before["truncated"] = json!(before["truncated"] == true || piece["truncated"] == true);
        true
    })
}

fn normalise(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for name in OWN_FIELDS {
                if let Some(value) = fields.get_mut(name) {
                    *value = json!("own");
                }
            }
            if fields.get("key").and_then(Value::as_str).is_some_and(is_own_value) {
                fields.insert("value".to_owned(), json!("own"));
            }
            fields.values_mut().for_each(normalise);
        }
        Value::Array(items) => {
            items.retain(|item| item["key"] != CONNECTION);
            items.iter_mut().for_each(normalise);
            items.sort_by_key(|item| item["key"].as_str().unwrap_or_default().to_owned());
        }
        _ => {}
    }
}

pub fn cases() -> Vec<Case> {
    let requests = [
        "GET /",
        "GET /path?a=b\nx-a: 1\nx-a: 2",
        "POST /\nx-a: 2\n\nhello body",
        "GET /\nx-do: 503+x-b=1+bytes=2000",
        "HEAD /",
        "GET /direct",
        "GET /created",
        "GET /\nx-do: reset",
        "POST /\ntransfer-encoding: chunked\n\n5\r\nhello\r\n3\r\n yo\r\n0\r\n\r\n",
        "POST /\ntransfer-encoding: chunked\ntrailer: x-t\n\n5\r\nhello\r\n0\r\nx-t: last\r\n\r\n",
    ];
    let any = "any_match: true";
    let (bytes, string) = ("JSON_BODY_AS_BYTES", "JSON_BODY_AS_STRING");
    let header =
        |name: &str, rest: &str| format!("http_request_headers_match: {{headers: [{{name: {name}, {rest}}}]}}");
    let a = header("x-a", "string_match: {exact: \"1\"}");
    let status = "http_response_headers_match: {headers: [{name: \":status\", string_match: {prefix: \"5\"}}]}";
    let recorded =
        ", record_headers_received_time: true, record_downstream_connection: true, record_upstream_connection: true";
    let trailers = "http_protocol_options: {enable_trailers: true}";
    let streams = ", streaming: true";
    let in_body =
        |pattern: &str| format!("http_request_generic_body_match: {{patterns: [{{string_match: {pattern}}}]}}");
    let later = "mutations: {request_mutations: [{append: {header: {key: x-later, value: \"1\"}}}], response_mutations: \
                 [{append: {header: {key: x-earlier, value: \"1\"}}}]}";
    let mut cases = vec![
        case("all, as bytes", TAP, &tap(any, bytes, "", recorded), &requests).of_manager(trailers),
        case("all, as strings", TAP, &tap(any, string, "", ""), &requests)
            .then("header_mutation.v3.HeaderMutation", later)
            .of_routes("request_headers_to_add: [{header: {key: x-routed, value: \"1\"}}]", ""),
        case("a filter before", TAP, &tap(any, string, "", ""), &requests)
            .before("header_mutation.v3.HeaderMutation", later),
        case("answered before", TAP, &tap(any, string, "", recorded), &requests[..2])
            .before("fault.v3.HTTPFault", "abort: {http_status: 418, percentage: {numerator: 100}}"),
        case("answered behind", TAP, &tap(any, string, "", ""), &requests[..2])
            .then("fault.v3.HTTPFault", "abort: {http_status: 418, percentage: {numerator: 100}}"),
        case("binary", TAP, &tap(any, "PROTO_BINARY", "", ""), &requests),
        case("length delimited", TAP, &tap(any, "PROTO_BINARY_LENGTH_DELIMITED", "", ""), &requests),
        case("text", TAP, &tap(any, "PROTO_TEXT", "", recorded), &requests[..2]),
        case(
            "little is kept",
            TAP,
            &tap(any, string, ", max_buffered_rx_bytes: 3, max_buffered_tx_bytes: 4", ""),
            &requests,
        ),
        case(
            "nothing is kept",
            TAP,
            &tap(any, string, ", max_buffered_rx_bytes: 0, max_buffered_tx_bytes: 0", ""),
            &requests,
        ),
        case("much is kept", TAP, &tap(any, string, ", max_buffered_tx_bytes: 100000", ""), &requests),
        case("streamed", TAP, &tap(any, string, streams, recorded), &requests).of_manager(trailers),
        case("streamed, length delimited", TAP, &tap(any, "PROTO_BINARY_LENGTH_DELIMITED", streams, ""), &["GET /"]),
        case(
            "sampled",
            TAP,
            &tap(any, string, "}, tap_enabled: {default_value: {numerator: 1000000, denominator: MILLION}", ""),
            &["GET /"],
        ),
        case(
            "streamed and sampled",
            TAP,
            &tap(any, string, ", streaming: true}, tap_enabled: {default_value: {numerator: 100}", ""),
            &["GET /"],
        ),
        case("sampled out", TAP, &tap(any, string, "}, tap_enabled: {default_value: {numerator: 0}", ""), &["GET /"]),
    ];
    for (name, predicate) in [
        ("a header", a.clone()),
        ("a path", header("\":path\"", "string_match: {prefix: /path}")),
        ("a method, inverted", header("\":method\"", "string_match: {exact: GET}, invert_match: true")),
        ("no headers", "http_request_headers_match: {}".to_owned()),
        ("a status", status.to_owned()),
        ("not a header", format!("not_match: {{{a}}}")),
        ("not a status", format!("not_match: {{{status}}}")),
        ("one of two", format!("or_match: {{rules: [{{{a}}}, {{{status}}}]}}")),
        ("both", format!("and_match: {{rules: [{{{a}}}, {{not_match: {{{status}}}}}]}}")),
        ("a trailer", "http_request_trailers_match: {headers: [{name: x-t, string_match: {exact: last}}]}".to_owned()),
        ("a body", in_body("hello")),
        ("a body's pieces", in_body("lo")),
        ("not a body", format!("not_match: {{{}}}", in_body("hello"))),
        (
            "a body's beginning",
            "http_request_generic_body_match: {bytes_limit: 4, patterns: [{string_match: hello}]}".to_owned(),
        ),
        ("a response's body", "http_response_generic_body_match: {patterns: [{binary_match: ZGly}]}".to_owned()),
    ] {
        cases.push(case(name, TAP, &tap(&predicate, string, "", ""), &requests).of_manager(trailers));
        cases.push(case(name, TAP, &tap(&predicate, string, streams, ""), &requests).of_manager(trailers));
    }
    cases
}
