//! Traces as they are written: JSON, protobuf's text, or its bytes.

use std::fmt::Write as _;

use culvert_xds_client::json::to_dynamic;
use envoy_types::pb::envoy::{
    config::tap::v3::output_sink::Format,
    data::tap::v3::{
        Body, TraceWrapper, body::BodyType, http_streamed_trace_segment::MessagePiece, trace_wrapper::Trace,
    },
};
use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, SerializeOptions, Value};
use serde_json::ser::PrettyFormatter;

/// What a file's name ends with.
pub(super) fn extension(format: Format) -> &'static str {
    match format {
        Format::JsonBodyAsBytes | Format::JsonBodyAsString => ".json",
        Format::ProtoBinary => ".pb",
        Format::ProtoBinaryLengthDelimited => ".pb_length_delimited",
        Format::ProtoText => ".pb_text",
    }
}

/// A trace, or a segment of one.
pub(super) fn write(mut trace: TraceWrapper, format: Format) -> Vec<u8> {
    match format {
        Format::JsonBodyAsBytes => json(&trace),
        Format::JsonBodyAsString => {
            bodies_as_strings(&mut trace);
            json(&trace)
        }
        Format::ProtoBinary => trace.encode_to_vec(),
        Format::ProtoBinaryLengthDelimited => trace.encode_length_delimited_to_vec(),
        Format::ProtoText => {
            let mut out = String::new();
            text(&mut out, &to_dynamic(&trace), 0);
            out.into_bytes()
        }
    }
}

/// As Envoy's: also what has its default value is there.
fn json(trace: &TraceWrapper) -> Vec<u8> {
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let mut serializer = serde_json::Serializer::with_formatter(Vec::new(), PrettyFormatter::with_indent(b" "));
    // Writing to memory cannot fail, and every field of a trace can be written.
    let _ = to_dynamic(trace).serialize_with_options(&mut serializer, &options);
    let mut out = serializer.into_inner();
    out.push(b'\n');
    out
}

fn bodies_as_strings(trace: &mut TraceWrapper) {
    let swap = |body: &mut Body| {
        if let Some(BodyType::AsBytes(bytes)) = &mut body.body_type {
            body.body_type = Some(BodyType::AsString(text_of(bytes)));
        }
    };
    match &mut trace.trace {
        Some(Trace::HttpBufferedTrace(trace)) => {
            let messages = [&mut trace.request, &mut trace.response].into_iter().flatten();
            messages.filter_map(|message| message.body.as_mut()).for_each(swap);
        }
        Some(Trace::HttpStreamedTraceSegment(segment)) => {
            let piece = segment.message_piece.as_mut();
            if let Some(MessagePiece::RequestBodyChunk(body) | MessagePiece::ResponseBodyChunk(body)) = piece {
                swap(body);
            }
        }
        _ => {}
    }
}

/// Bytes as text; what is no UTF-8 is shown as U+FFFD.
pub(super) fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Protobuf's text format, `depth` levels in.
fn text(out: &mut String, message: &DynamicMessage, depth: usize) {
    for (field, value) in message.fields() {
        match value {
            Value::List(items) => items.iter().for_each(|item| field_text(out, &field, item, depth)),
            value => field_text(out, &field, value, depth),
        }
    }
}

fn field_text(out: &mut String, field: &FieldDescriptor, value: &Value, depth: usize) {
    let (indent, name) = ("  ".repeat(depth), field.name());
    // Writing to a String cannot fail.
    let _ = match value {
        Value::Message(inner) => {
            let _ = writeln!(out, "{indent}{name} {{");
            text(out, inner, depth + 1);
            writeln!(out, "{indent}}}")
        }
        Value::String(text) => writeln!(out, "{indent}{name}: \"{}\"", escaped(text.as_bytes())),
        Value::Bytes(bytes) => writeln!(out, "{indent}{name}: \"{}\"", escaped(bytes)),
        Value::Bool(value) => writeln!(out, "{indent}{name}: {value}"),
        Value::I32(number) => writeln!(out, "{indent}{name}: {number}"),
        Value::I64(number) => writeln!(out, "{indent}{name}: {number}"),
        Value::U32(number) => writeln!(out, "{indent}{name}: {number}"),
        Value::U64(number) => writeln!(out, "{indent}{name}: {number}"),
        Value::EnumNumber(number) => {
            let kind = field.kind();
            let value = kind.as_enum().and_then(|desc| desc.get_value(*number));
            match value {
                Some(value) => writeln!(out, "{indent}{name}: {}", value.name()),
                None => writeln!(out, "{indent}{name}: {number}"),
            }
        }
        // No trace has any of these.
        Value::F32(_) | Value::F64(_) | Value::List(_) | Value::Map(_) => Ok(()),
    };
}

/// As in a string of C.
fn escaped(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            b'"' => out.push_str("\\\""),
            b'\'' => out.push_str("\\'"),
            b'\\' => out.push_str("\\\\"),
            b' '..=b'~' => out.push(char::from(*byte)),
            // Writing to a String cannot fail.
            other => drop(write!(out, "\\{other:03o}")),
        }
    }
    out
}
