//! Formats that make JSON.

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

use super::{
    Record,
    format::{Format, FormatError, Op},
    json_text,
    operators::{Special, StateForm},
};

/// No header's value and no other text has this: an operator that writes it has nothing to say.
pub(super) const NOTHING: &str = "\0";

/// Values of a template may be as deep in each other.
const MAX_DEPTH: usize = 32;

/// A compiled template of a JSON value. What is always the same is text already.
#[derive(Debug)]
pub(super) enum JsonFormat {
    /// Each key with its quotes and its colon; sorted.
    Object(Box<[(Box<str>, JsonFormat)]>),
    List(Box<[JsonFormat]>),
    Made(Format),
    Fixed(Box<str>),
    Null,
}

/// What operators are asked with.
struct Asked<'a> {
    /// Alone in its text, one says so that it has nothing to say.
    alone: Record<'a>,
    /// Among others it writes what stands for that.
    among: Record<'a>,
    /// Without the keys and items that there is nothing to say of.
    omit: bool,
}

impl JsonFormat {
    /// Compiles a template: its texts are formats.
    pub(super) fn parse(template: &Struct) -> Result<JsonFormat, FormatError> {
        JsonFormat::object(template, MAX_DEPTH)
    }

    fn object(fields: &Struct, depth: usize) -> Result<JsonFormat, FormatError> {
        let depth = depth.checked_sub(1).ok_or(FormatError::TooDeep)?;
        let mut keys: Vec<_> = fields.fields.iter().collect();
        keys.sort_by_key(|(key, _)| *key);
        let parse = |(key, value): (&String, &Value)| {
            let mut name = Vec::new();
            json_text::string(&mut name, key.as_bytes());
            name.push(b':');
            Ok((fixed(name), JsonFormat::value(value, depth)?))
        };
        Ok(JsonFormat::Object(keys.into_iter().map(parse).collect::<Result<_, _>>()?))
    }

    fn value(value: &Value, depth: usize) -> Result<JsonFormat, FormatError> {
        let depth = depth.checked_sub(1).ok_or(FormatError::TooDeep)?;
        Ok(match &value.kind {
            None | Some(Kind::NullValue(_)) => JsonFormat::Null,
            Some(Kind::StructValue(fields)) => JsonFormat::object(fields, depth)?,
            Some(Kind::ListValue(list)) => {
                let items = list.values.iter().map(|item| JsonFormat::value(item, depth));
                JsonFormat::List(items.collect::<Result<_, _>>()?)
            }
            Some(Kind::StringValue(text)) => {
                let format = Format::parse(text)?;
                match format.literal() {
                    Some(literal) => {
                        let mut quoted = Vec::new();
                        json_text::string(&mut quoted, literal.as_bytes());
                        JsonFormat::Fixed(fixed(quoted))
                    }
                    None => JsonFormat::Made(format),
                }
            }
            Some(kind) => {
                let mut text = Vec::new();
                json_text::value(&mut text, kind);
                JsonFormat::Fixed(fixed(text))
            }
        })
    }

    /// The formats in it.
    pub(super) fn formats(&self) -> Box<dyn Iterator<Item = &Format> + '_> {
        match self {
            JsonFormat::Object(fields) => Box::new(fields.iter().flat_map(|(_, value)| value.formats())),
            JsonFormat::List(items) => Box::new(items.iter().flat_map(JsonFormat::formats)),
            JsonFormat::Made(format) => Box::new(std::iter::once(format)),
            JsonFormat::Fixed(_) | JsonFormat::Null => Box::new(std::iter::empty()),
        }
    }

    /// Appends the value for `record`, and a newline; `omit`: without the keys that there is nothing to say of.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>, omit: bool) {
        let asked = Asked {
            alone: Record { missing: NOTHING, ..*record },
            among: Record { missing: if omit { "" } else { "-" }, ..*record },
            omit,
        };
        if !self.append(out, &asked) {
            out.extend_from_slice(b"{}");
        }
        out.push(b'\n');
    }

    /// Appends the value, or nothing where it is to be left out.
    fn append(&self, out: &mut Vec<u8>, asked: &Asked<'_>) -> bool {
        let before = out.len();
        match self {
            JsonFormat::Object(fields) => {
                out.push(b'{');
                for (name, value) in fields {
                    let before_field = out.len();
                    if before_field > before + 1 {
                        out.push(b',');
                    }
                    out.extend_from_slice(name.as_bytes());
                    if !value.append(out, asked) {
                        out.truncate(before_field);
                    }
                }
                if asked.omit && out.len() == before + 1 {
                    out.truncate(before);
                    return false;
                }
                out.push(b'}');
            }
            JsonFormat::List(items) => {
                out.push(b'[');
                for item in items {
                    let before_item = out.len();
                    if before_item > before + 1 {
                        out.push(b',');
                    }
                    if !item.append(out, asked) {
                        out.truncate(before_item);
                    }
                }
                out.push(b']');
            }
            JsonFormat::Fixed(text) => out.extend_from_slice(text.as_bytes()),
            JsonFormat::Made(format) => match format.ops() {
                [op] if op.write_json(out, &asked.alone) => {}
                [_] => return null(out, asked.omit),
                ops => {
                    out.push(b'"');
                    for op in ops {
                        let start = out.len();
                        op.write(out, &asked.among);
                        json_text::escape(out, start);
                    }
                    out.push(b'"');
                }
            },
            JsonFormat::Null => return null(out, asked.omit),
        }
        true
    }
}

/// There is nothing to say.
fn null(out: &mut Vec<u8>, omit: bool) -> bool {
    if !omit {
        out.extend_from_slice(b"null");
    }
    !omit
}

/// What was written as JSON is UTF-8, but for texts that are none themselves: those of configurations always are.
fn fixed(text: Vec<u8>) -> Box<str> {
    String::from_utf8(text).unwrap_or_default().into()
}

impl Op {
    /// Appends what it stands for as a value of JSON, or nothing where it has nothing to say of `record`, whose `missing` is [`NOTHING`].
    fn write_json(&self, out: &mut Vec<u8>, record: &Record<'_>) -> bool {
        let before = out.len();
        let number = match self {
            Op::Metadata(path) => return path.write_json(out, record.metadata),
            Op::Special(Special::RouteMetadata(path)) => return path.write_json(out, record.route_metadata),
            Op::Special(Special::FilterState { key, form: StateForm::Typed, .. }) => {
                let state = record.metadata.and_then(|metadata| metadata.state(key));
                if let Some(state) = state {
                    json_text::string(out, &state.text);
                }
                return state.is_some();
            }
            Op::Special(Special::Coalesce(ops)) => {
                return ops.iter().any(|op| {
                    let said = op.write_json(out, record) && &out[before..] != b"\"\"";
                    if !said {
                        out.truncate(before);
                    }
                    said
                });
            }
            Op::Special(special) => special.is_number(),
            Op::Field(field) => field.is_number(),
            _ => false,
        };
        if !number {
            out.push(b'"');
        }
        let start = out.len();
        self.write(out, record);
        if &out[start..] == NOTHING.as_bytes() {
            out.truncate(before);
            return false;
        }
        if number {
            json_text::shorten_number(out, start);
        } else {
            json_text::escape(out, start);
            out.push(b'"');
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::metadata::from_json;

    fn parse(template: &serde_json::Value) -> Result<JsonFormat, FormatError> {
        JsonFormat::parse(&from_json(template.as_object().unwrap()))
    }

    fn written(format: &JsonFormat, record: &Record<'_>, omit: bool) -> String {
        let mut out = b"before ".to_vec();
        format.write(&mut out, record, omit);
        String::from_utf8(out).unwrap().strip_prefix("before ").unwrap().to_owned()
    }

    #[test]
    fn values_keep_their_types() {
        let template = json!({
            "status": "%RESPONSE_CODE%",
            "both": "%RESPONSE_CODE% %PROTOCOL%",
            "none": "%PROTOCOL%",
            "list": ["%BYTES_SENT%", 1.5, null],
            "a": {"text": "x", "on": true},
        });
        let format = parse(&template).unwrap();
        let record = Record { response_code: 404, bytes_sent: 7, ..Record::default() };
        let all = r#"{"a":{"on":true,"text":"x"},"both":"404 -","list":[7,1.5,null],"none":null,"status":404}"#;
        assert_eq!(written(&format, &record, false), format!("{all}\n"));
        let some = r#"{"a":{"on":true,"text":"x"},"both":"404 ","list":[7,1.5],"status":404}"#;
        assert_eq!(written(&format, &record, true), format!("{some}\n"));
        assert!(parse(&json!({"a": "%NOPE%"})).is_err());
    }

    #[test]
    fn what_is_empty_is_left_out_where_that_is_asked_for() {
        let format =
            parse(&json!({"a": {"b": {"c": "%PROTOCOL%"}, "d": {}}, "l": [{"e": null}, []], "t": ""})).unwrap();
        let record = Record::default();
        assert_eq!(written(&format, &record, true), "{\"l\":[[]],\"t\":\"\"}\n");
        assert_eq!(
            written(&format, &record, false),
            "{\"a\":{\"b\":{\"c\":null},\"d\":{}},\"l\":[{\"e\":null},[]],\"t\":\"\"}\n"
        );
        assert_eq!(written(&parse(&json!({"a": "%PROTOCOL%"})).unwrap(), &record, true), "{}\n");
    }

    #[test]
    fn the_first_that_has_something_to_say_keeps_its_type() {
        let operators = r#"%COALESCE({"operators": ["ROUTE_NAME", "RESPONSE_CODE"]})%"#;
        let format = parse(&json!({"a": operators, "b": "100%%"})).unwrap();
        let mut record = Record { response_code: 200, ..Record::default() };
        assert_eq!(written(&format, &record, false), "{\"a\":200,\"b\":\"100%\"}\n");
        record.route_name = Some("a\"route");
        assert_eq!(written(&format, &record, false), "{\"a\":\"a\\\"route\",\"b\":\"100%\"}\n");
    }

    #[test]
    fn too_deep_a_template_is_refused() {
        let deep = (0..40).fold(json!("x"), |inner, _| json!({"a": inner}));
        assert_eq!(parse(&deep).unwrap_err(), FormatError::TooDeep);
    }
}
