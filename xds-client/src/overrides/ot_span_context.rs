//! The header `x-ot-span-context`: a span context as base64 of a small protobuf message.
//!
//! ```text
//! BinaryCarrier      { repeated bytes deprecated_text_ctx = 1; BasicTracerCarrier basic_ctx = 2; }
//! BasicTracerCarrier { fixed64 trace_id = 1; fixed64 span_id = 2; bool sampled = 3;
//!                      map<string, string> baggage_items = 4; }
//! ```

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;

use super::{ContextError, decode_base64};

const HEADER: &str = "x-ot-span-context";

/// What an `x-ot-span-context` header says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpanContext {
    /// Identifies the trace.
    pub trace_id: u64,
    /// Identifies the span that made the request.
    pub span_id: u64,
    /// Whether the trace is recorded.
    pub sampled: bool,
    /// What travels along, keys in lower case.
    pub baggage: BTreeMap<String, String>,
}

// These two messages belong to the header alone and are not part of any API, hence no .proto file.
#[derive(Clone, PartialEq, prost::Message)]
struct BinaryCarrier {
    #[prost(bytes = "vec", repeated, tag = "1")]
    deprecated_text_ctx: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "2")]
    basic_ctx: Option<BasicTracerCarrier>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct BasicTracerCarrier {
    #[prost(fixed64, tag = "1")]
    trace_id: u64,
    #[prost(fixed64, tag = "2")]
    span_id: u64,
    #[prost(bool, tag = "3")]
    sampled: bool,
    #[prost(btree_map = "string, string", tag = "4")]
    baggage_items: BTreeMap<String, String>,
}

/// Decodes the value of an `x-ot-span-context` header.
///
/// # Errors
/// When the value is too long, not standard padded base64, not the message above, or has no `basic_ctx`.
pub fn decode_ot_span_context(value: &[u8]) -> Result<SpanContext, ContextError> {
    let bytes = decode_base64(HEADER, value)?;
    let carrier = BinaryCarrier::decode(bytes.as_slice()).map_err(|error| ContextError::Protobuf {
        what: HEADER,
        message: "BinaryCarrier",
        reason: error.to_string(),
    })?;
    let BasicTracerCarrier { trace_id, span_id, sampled, baggage_items } =
        carrier.basic_ctx.ok_or(ContextError::NoBasicContext)?;
    let baggage = baggage_items.into_iter().map(|(key, value)| (key.to_lowercase(), value)).collect();
    Ok(SpanContext { trace_id, span_id, sampled, baggage })
}

/// The value of an `x-ot-span-context` header that says `context`.
#[must_use]
pub fn encode_ot_span_context(context: &SpanContext) -> String {
    let carrier = BinaryCarrier {
        deprecated_text_ctx: Vec::new(),
        basic_ctx: Some(BasicTracerCarrier {
            trace_id: context.trace_id,
            span_id: context.span_id,
            sampled: context.sampled,
            baggage_items: context.baggage.clone(),
        }),
    };
    STANDARD.encode(carrier.encode_to_vec())
}
