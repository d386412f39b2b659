//! `local_reply_config`

use std::sync::Arc;

use envoy_types::pb::envoy::{
    config::core::v3::{SubstitutionFormatString, substitution_format_string::Format},
    extensions::filters::network::http_connection_manager::v3::{LocalReplyConfig, ResponseMapper},
};
use http::{HeaderValue, StatusCode};

use super::{
    access_log::{self, substitution},
    common::{Result, header_value, headers_to_add, inline_text, required},
    support::join,
};
use crate::config::{
    FieldError,
    model::{HeaderMutations, LocalReplies, ReplyFormat, ReplyMapper},
};

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
    let compiled = substitution(format, path)?.ok_or_else(|| required(path, "format"))?;
    let content_type = match &format.format {
        _ if !format.content_type.is_empty() => header_value(&format.content_type, &join(path, "content_type"))?,
        Some(Format::JsonFormat(_)) => HeaderValue::from_static("application/json"),
        _ => HeaderValue::from_static("text/plain"),
    };
    Ok(ReplyFormat { format: compiled, content_type })
}
