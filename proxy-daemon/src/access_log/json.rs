//! Formats that make JSON.

use serde_json::Value;

use super::{
    Record,
    format::{Format, FormatError},
};

/// No header's value and no other text has this: an operator that writes it has nothing to say.
const NOTHING: &str = "\0";

/// A compiled template of a JSON value.
#[derive(Debug)]
pub(super) enum JsonFormat {
    /// Keys are sorted.
    Object(Box<[(String, JsonFormat)]>),
    List(Box<[JsonFormat]>),
    Text(Format),
    /// What is always the same.
    Fixed(Value),
}

impl JsonFormat {
    /// Compiles a template: its texts are formats.
    pub(super) fn parse(template: &Value) -> Result<JsonFormat, FormatError> {
        Ok(match template {
            Value::Object(fields) => {
                let parse = |(key, value): (&String, &Value)| Ok((key.clone(), JsonFormat::parse(value)?));
                let mut fields: Box<[(String, JsonFormat)]> = fields.iter().map(parse).collect::<Result<_, _>>()?;
                fields.sort_by(|a, b| a.0.cmp(&b.0));
                JsonFormat::Object(fields)
            }
            Value::Array(items) => JsonFormat::List(items.iter().map(JsonFormat::parse).collect::<Result<_, _>>()?),
            Value::String(text) => JsonFormat::Text(Format::parse(text)?),
            fixed => JsonFormat::Fixed(fixed.clone()),
        })
    }

    /// The value for `record`; `omit`: without the keys that there is nothing to say of.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>, omit: bool) {
        // Writing to a Vec cannot fail.
        let _ = serde_json::to_writer(&mut *out, &self.value(record, omit));
        out.push(b'\n');
    }

    fn value(&self, record: &Record<'_>, omit: bool) -> Value {
        match self {
            JsonFormat::Object(fields) => {
                let values = fields.iter().map(|(key, format)| (key.clone(), format.value(record, omit)));
                Value::Object(values.filter(|(_, value)| !(omit && value.is_null())).collect())
            }
            JsonFormat::List(items) => {
                let values = items.iter().map(|item| item.value(record, omit));
                Value::Array(values.filter(|value| !(omit && value.is_null())).collect())
            }
            JsonFormat::Text(format) => text(format, record, omit),
            JsonFormat::Fixed(value) => value.clone(),
        }
    }
}

fn text(format: &Format, record: &Record<'_>, omit: bool) -> Value {
    let (single, number) = format.single();
    let missing = match (single, omit) {
        (true, _) => NOTHING,
        (false, true) => "",
        (false, false) => "-",
    };
    let mut bytes = Vec::new();
    format.write(&mut bytes, &Record { missing, ..*record });
    if bytes == NOTHING.as_bytes() {
        return Value::Null;
    }
    let text = String::from_utf8_lossy(&bytes);
    match text.parse::<u64>() {
        Ok(written) if number => Value::from(written),
        _ => Value::String(text.into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_keep_their_types() {
        let template = json!({
            "status": "%RESPONSE_CODE%",
            "both": "%RESPONSE_CODE% %PROTOCOL%",
            "none": "%PROTOCOL%",
            "list": ["%BYTES_SENT%", 1.5, null],
            "a": {"text": "x", "on": true},
        });
        let format = JsonFormat::parse(&template).unwrap();
        let record = Record { response_code: 404, bytes_sent: 7, ..Record::default() };
        let written = |omit| {
            let mut out = Vec::new();
            format.write(&mut out, &record, omit);
            String::from_utf8(out).unwrap()
        };
        let all = r#"{"a":{"on":true,"text":"x"},"both":"404 -","list":[7,1.5,null],"none":null,"status":404}"#;
        assert_eq!(written(false), format!("{all}\n"));
        let some = r#"{"a":{"on":true,"text":"x"},"both":"404 ","list":[7,1.5],"status":404}"#;
        assert_eq!(written(true), format!("{some}\n"));
        assert!(JsonFormat::parse(&json!({"a": "%NOPE%"})).is_err());
    }
}
