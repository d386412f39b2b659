//! What the fuzzers call: bytes in, and nothing may panic, hang or take much memory. `fuzz/` gives them to libFuzzer;
//! `tests/mutations.rs` runs them on mutations of the corpus.

use culvert_xds_client::{
    Any,
    json::{self, Format, UnknownFields},
};
use envoy_types::pb::envoy::{
    config::{bootstrap::v3::Bootstrap, route::v3::RouteConfiguration},
    extensions::filters::network::http_connection_manager::v3::HttpConnectionManager,
};
use prost::{Message, Name};

use super::parse;

const TYPED_STRUCT: &str = "type.googleapis.com/xds.type.v3.TypedStruct";

/// Reads the descriptors, which takes seconds under a sanitizer, so that the first input does not.
pub fn prepare() {
    json::pool();
    rules(&[]);
}

/// A bootstrap in YAML, as far as the daemon's own model of it.
pub fn yaml(bytes: &[u8]) {
    text(bytes, Format::Yaml);
}

/// A bootstrap in JSON.
pub fn json(bytes: &[u8]) {
    text(bytes, Format::Json);
}

fn text(bytes: &[u8], format: Format) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(message) = json::read::<Bootstrap>(text, format, UnknownFields::Reject) else { return };
    check(&message, text);
    // What was read can be printed, and what was printed can be read.
    let printed = json::to_json(&message).to_string();
    if let Err(error) = json::read::<Bootstrap>(&printed, Format::Json, UnknownFields::Reject) {
        panic!("what is printed cannot be read: {error}\n{printed}");
    }
}

fn check(message: &Bootstrap, text: &str) {
    let checked = json::resolve_typed_structs(message, UnknownFields::Reject).and_then(|message| {
        json::validate(&*message)?;
        let refused = |error: super::FieldError| json::ConfigError::new(error.path, error.message);
        parse::bootstrap(&message).map(|_| ()).map_err(refused)
    });
    if let Err(error) = checked {
        let line = error.locate(text).to_string();
        assert!(!line.is_empty());
    }
}

/// A message in an `Any`, as xDS delivers one; the first byte says of which kind.
pub fn any(bytes: &[u8]) {
    let Some((kind, value)) = bytes.split_first() else { return };
    let manager = HttpConnectionManager::full_name();
    let any = match kind % 3 {
        0 => Any { type_url: format!("type.googleapis.com/{manager}"), value: value.to_vec() },
        1 => Any { type_url: TYPED_STRUCT.to_owned(), value: value.to_vec() },
        _ => {
            // A TypedStruct that names a message and has any JSON value.
            let Ok(value) = serde_json::from_slice::<serde_json::Value>(value) else { return };
            let whole = serde_json::json!({ "@type": TYPED_STRUCT, "type_url": manager, "value": value });
            let Ok(any) = json::from_json(whole) else { return };
            any
        }
    };
    for unknown in [UnknownFields::Reject, UnknownFields::Ignore] {
        // Refusing is as good as accepting: it must come to an end without a panic.
        let _ = json::validate_any(&any, "resource", unknown);
    }
    if let Ok(manager) = json::unpack::<HttpConnectionManager>(&any, "resource")
        && let Ok(manager) = json::resolve_typed_structs(&manager, UnknownFields::Ignore)
    {
        let _ = json::validate(&*manager);
    }
    let _ = json::any_to_json(&any);
}

/// The expression of a template that paths match, and the pieces of one that they become.
///
/// # Errors
/// Why one of them is none.
pub(crate) fn uri_templates(
    matched: &str,
    rewrite: &str,
) -> Result<(regex::Regex, Vec<super::model::TemplatePiece>), super::FieldError> {
    let matched = parse::uri_template::matcher(matched, "")?;
    let pieces = parse::uri_template::rewrite(rewrite, &matched, "")?;
    Ok((matched, pieces))
}

/// A route configuration in JSON, read as those of RDS are.
pub(crate) fn routes(text: &str) -> Option<super::model::RouteConfig> {
    let config = json::read::<RouteConfiguration>(text, Format::Json, UnknownFields::Reject).ok()?;
    json::validate(&config).ok()?;
    parse::route_config(&config, "").ok()
}

/// The `validate.rules` of a bootstrap that is given in protobuf's own encoding, and what comes after them.
pub fn rules(bytes: &[u8]) {
    let Ok(message) = Bootstrap::decode(bytes) else { return };
    let _ = json::validate(&message);
    check(&message, "");
}
