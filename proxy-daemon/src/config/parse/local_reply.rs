//! `local_reply_config`

use std::sync::Arc;

use envoy_types::pb::{
    envoy::{
        config::core::v3::{SubstitutionFormatString, substitution_format_string::Format},
        extensions::filters::network::http_connection_manager::v3::{LocalReplyConfig, ResponseMapper},
    },
    google::protobuf::{Struct, Value as ProtoValue, value::Kind},
};
use http::{HeaderValue, StatusCode};
use serde_json::{Map, Number, Value};

use super::{
    access_log,
    common::{Result, header_value, headers_to_add, inline_text, required},
    support::join,
};
use crate::{
    access_log::BodyFormat,
    config::{
        FieldError,
        model::{HeaderMutations, LocalReplies, ReplyFormat, ReplyMapper},
    },
};

/// Values of a JSON format may be as deep in each other.
const MAX_DEPTH: usize = 32;

pub(super) fn local_replies(config: Option<&LocalReplyConfig>, path: &str) -> Result<Option<Arc<LocalReplies>>> {
    let Some(config) = config else { return Ok(None) };
    let path = join(path, "local_reply_config");
    let parse = |(index, item): (usize, &ResponseMapper)| mapper(item, &format!("{}[{index}]", join(&path, "mappers")));
    let mappers = config.mappers.iter().enumerate().map(parse).collect::<Result<_>>()?;
    let format = config.body_format.as_ref().map(|format| body_format(format, &join(&path, "body_format")));
    Ok(Some(Arc::new(LocalReplies { mappers, format: format.transpose()? })))
}

fn mapper(mapper: &ResponseMapper, path: &str) -> Result<ReplyMapper> {
    let filter = mapper.filter.as_ref().ok_or_else(|| required(path, "filter"))?;
    let status = mapper.status_code.map(|code| {
        let status = u16::try_from(code.value).ok().and_then(|code| StatusCode::from_u16(code).ok());
        status.ok_or_else(|| FieldError::new(join(path, "status_code"), format!("{} is not a status", code.value)))
    });
    let body = mapper.body.as_ref().map(|body| inline_text(body, &join(path, "body")));
    let format = mapper.body_format_override.as_ref();
    let format = format.map(|format| body_format(format, &join(path, "body_format_override")));
    Ok(ReplyMapper {
        filter: access_log::filter(filter, &join(path, "filter"))?,
        status: status.transpose()?,
        body: body.transpose()?.map(Into::into),
        format: format.transpose()?,
        headers: HeaderMutations {
            response_add: headers_to_add(&mapper.headers_to_add, path, "headers_to_add")?,
            ..HeaderMutations::default()
        },
    })
}

pub(crate) fn body_format(format: &SubstitutionFormatString, path: &str) -> Result<ReplyFormat> {
    let omit = format.omit_empty_values;
    let mut content_type = HeaderValue::from_static("text/plain");
    #[expect(deprecated, reason = "the field that text_format_source replaced, which Envoy still takes")]
    let compiled = match &format.format {
        Some(Format::TextFormat(text)) => {
            BodyFormat::text(text, omit).map_err(|text| FieldError::new(join(path, "text_format"), text))?
        }
        Some(Format::TextFormatSource(source)) => {
            let path = join(path, "text_format_source");
            let text = String::from_utf8(inline_text(source, &path)?);
            let text = text.map_err(|_| FieldError::new(&path, "is not UTF-8"))?;
            BodyFormat::text(&text, omit).map_err(|text| FieldError::new(path, text))?
        }
        Some(Format::JsonFormat(template)) => {
            content_type = HeaderValue::from_static("application/json");
            let path = join(path, "json_format");
            let template = object(template, MAX_DEPTH).ok_or_else(|| FieldError::new(&path, "is nested too deeply"))?;
            BodyFormat::json(&template, omit).map_err(|text| FieldError::new(path, text))?
        }
        None => return Err(required(path, "format")),
    };
    if !format.content_type.is_empty() {
        content_type = header_value(&format.content_type, &join(path, "content_type"))?;
    }
    Ok(ReplyFormat { format: compiled, content_type })
}

fn object(template: &Struct, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    let fields = template.fields.iter().map(|(key, item)| Some((key.clone(), value(item, depth)?)));
    Some(Value::Object(fields.collect::<Option<Map<_, _>>>()?))
}

fn value(template: &ProtoValue, depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    Some(match &template.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(*value),
        Some(Kind::NumberValue(number)) => whole(*number).unwrap_or_else(|| {
            // What no JSON number can be.
            Number::from_f64(*number).map_or(Value::Null, Value::Number)
        }),
        Some(Kind::StringValue(text)) => Value::String(text.clone()),
        Some(Kind::StructValue(inner)) => object(inner, depth)?,
        Some(Kind::ListValue(list)) => {
            Value::Array(list.values.iter().map(|item| value(item, depth)).collect::<Option<_>>()?)
        }
    })
}

/// A number without a fraction is written without one.
fn whole(number: f64) -> Option<Value> {
    // Up to here every whole number is one of these.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    (number.fract() == 0.0 && number.abs() <= EXACT).then(|| Value::from(number as i64))
}
