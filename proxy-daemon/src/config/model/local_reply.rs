use bytes::Bytes;
use http::{HeaderValue, StatusCode};

use super::{AccessLogFilter, HeaderMutations};
use crate::access_log::Substitution;

/// `LocalReplyConfig`: what becomes of the answers that are made here.
#[derive(Debug)]
pub struct LocalReplies {
    /// The first whose filter admits an answer changes it.
    pub mappers: Vec<ReplyMapper>,
    /// How bodies are made, where the mapper does not say.
    pub format: Option<ReplyFormat>,
}

/// `ResponseMapper`
#[derive(Debug)]
pub struct ReplyMapper {
    /// Which answers.
    pub filter: AccessLogFilter,
    /// Their status from here on.
    pub status: Option<StatusCode>,
    /// Their body, which the format may show.
    pub body: Option<Bytes>,
    /// How their body is made.
    pub format: Option<ReplyFormat>,
    /// Only `response_add`.
    pub headers: HeaderMutations,
}

/// How a body is made, and what it is.
#[derive(Debug)]
pub struct ReplyFormat {
    /// Its text or JSON.
    pub format: Substitution,
    /// `content-type`
    pub content_type: HeaderValue,
}
