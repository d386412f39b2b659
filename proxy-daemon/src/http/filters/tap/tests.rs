use culvert_xds_client::json::{from_yaml, pack};
use envoy_types::pb::envoy::data::tap::v3::{
    Body as ProtoBody, HttpStreamedTraceSegment, TraceWrapper, body::BodyType,
    http_streamed_trace_segment::MessagePiece, trace_wrapper::Trace as Kind,
};

use super::*;

fn parsed(yaml: &str) -> Result<Arc<dyn HttpFilterFactory>, String> {
    let config: Tap = from_yaml(yaml).unwrap();
    parse(&pack(&config), &FilterCx { path: "c", stat_prefix: "taps" }).map_err(|error| error.to_string())
}

fn request(id: &str, sink: &str) -> Vec<u8> {
    format!("config_id: {id}\ntap_config: {{match: {{any_match: true}}, output_config: {{sinks: [{{{sink}}}]}}}}")
        .into()
}

fn segment(body: &[u8]) -> TraceWrapper {
    let body = ProtoBody { body_type: Some(BodyType::AsBytes(body.to_vec())), truncated: true };
    let piece = MessagePiece::RequestBodyChunk(body);
    let segment = HttpStreamedTraceSegment { trace_id: 7, message_piece: Some(piece) };
    TraceWrapper { trace: Some(Kind::HttpStreamedTraceSegment(segment)), configured_sample_rate: None }
}

#[test]
fn what_is_of_no_use_is_refused_with_its_path() {
    let refused = |fields: &str| parsed(&format!("common_config: {{static_config: {{{fields}}}}}")).unwrap_err();
    let any = "match: {any_match: true}";
    assert_eq!(
        refused(&format!("{any}, output_config: {{sinks: [{{streaming_admin: {{}}}}]}}")),
        "c.common_config.static_config.output_config.sinks[0]: admin output must be configured via admin"
    );
    assert_eq!(
        refused("output_config: {sinks: [{file_per_tap: {path_prefix: /x}}]}"),
        "c.common_config.static_config.match: neither match nor match_config is set"
    );
    assert_eq!(
        refused("match: {not_match: {}}, output_config: {sinks: [{file_per_tap: {path_prefix: /x}}]}"),
        "c.common_config.static_config.match.not_match: is needed"
    );
}

#[test]
fn a_client_has_what_it_asks_for_tapped_until_it_goes() {
    let slot = Slot::register("here");
    assert!(slot.current().is_none());
    assert_eq!(
        attach(&request("elsewhere", "streaming_admin: {}")).err().unwrap(),
        "Unknown config id 'elsewhere'. No extension has registered with this id."
    );
    assert_eq!(attach(b"").err().unwrap(), "/tap requires a JSON/YAML body");
    let text = attach(&request("here", "format: PROTO_TEXT, streaming_admin: {}")).err().unwrap();
    assert!(text.starts_with("tap_config.output_config.sinks[0].format: "), "{text}");
    let text = attach(&request("here", "streaming_grpc: {grpc_service: {}}")).err().unwrap();
    assert!(text.contains("tap_config.output_config.sinks[0].streaming_grpc"), "{text}");

    let client = attach(&request("here", "streaming_admin: {}")).ok().unwrap();
    assert!(slot.current().is_some() && Slot::register("here").current().is_some());
    let text = attach(&request("here", "streaming_admin: {}")).err().unwrap();
    assert_eq!(text, "An attached /tap admin stream already exists. Detach it.");
    drop(client);
    assert!(slot.current().is_none());
    drop(slot);
    assert!(!is_registered());
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let (target, mut traces) = Target::admin();
    let sink = Sink { format: Format::JsonBodyAsBytes, target };
    let before = crate::stats::counter("tap.traces_dropped").value();
    for id in 0..10_000 {
        sink.submit(segment(b"x"), id, true);
    }
    let mut taken = 0;
    while traces.try_recv().is_ok() {
        taken += 1;
    }
    assert!(taken > 0 && taken < 10_000);
    assert_eq!(crate::stats::counter("tap.traces_dropped").value() - before, 10_000 - taken);
}

#[test]
fn traces_are_written_as_by_envoy() {
    let write = |format| String::from_utf8(output::write(segment(b"a\n\"'\\\x01\xff"), format)).unwrap();
    assert_eq!(
        write(Format::ProtoText),
        "http_streamed_trace_segment {\n  trace_id: 7\n  request_body_chunk {\n    as_bytes: \
         \"a\\n\\\"\\'\\\\\\001\\377\"\n    truncated: true\n  }\n}\n"
    );
    assert_eq!(
        write(Format::JsonBodyAsBytes),
        "{\n \"http_streamed_trace_segment\": {\n  \"trace_id\": \"7\",\n  \"request_body_chunk\": {\n   \"as_bytes\": \
         \"YQoiJ1wB/w==\",\n   \"truncated\": true\n  }\n }\n}\n"
    );
}
