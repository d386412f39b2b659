use http::StatusCode;

/// Why a message is refused: the answer's status, and what `%RESPONSE_CODE_DETAILS%` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodecError {
    /// What the client is told, where there is one to tell.
    pub status: StatusCode,
    /// Envoy's word for it.
    pub details: &'static str,
}

impl std::fmt::Display for CodecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.details)
    }
}

impl std::error::Error for CodecError {}

impl CodecError {
    /// The message is not HTTP.
    pub const CODEC: CodecError = CodecError::bad("http1.codec_error");
    /// A byte that no field and no target may have.
    pub const INVALID_CHARACTERS: CodecError = CodecError::bad("http1.invalid_characters");
    /// Both a length and a transfer coding.
    pub const LENGTH_AND_CHUNKED: CodecError = CodecError::bad("http1.content_length_and_chunked_not_allowed");
    /// A transfer coding that is not `chunked`, alone.
    pub const TRANSFER_ENCODING: CodecError =
        CodecError { status: StatusCode::NOT_IMPLEMENTED, details: "http1.invalid_transfer_encoding" };
    /// The host, or a target's authority, is none.
    pub const AUTHORITY: CodecError = CodecError::bad("http.invalid_authority");
    /// More than one host: two readers could choose different ones.
    pub const DUPLICATE_HOST: CodecError = CodecError::bad("http1.duplicate_host");
    /// The target is none.
    pub const URL: CodecError = CodecError::bad("http1.invalid_url");
    /// An absolute target that is not HTTP's.
    pub const SCHEME: CodecError = CodecError::bad("http1.invalid_scheme");
    /// A version other than 1.1 (and 1.0, where that is accepted).
    pub const LOW_VERSION: CodecError = CodecError { status: StatusCode::UPGRADE_REQUIRED, details: "low_version" };
    /// `max_request_headers_kb`
    pub const HEADERS_TOO_LARGE: CodecError =
        CodecError { status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, details: "http1.headers_too_large" };
    /// `max_headers_count`
    pub const TOO_MANY_HEADERS: CodecError =
        CodecError { status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, details: "http1.too_many_headers" };

    /// `headers_with_underscores_action`
    pub const UNDERSCORE: CodecError = CodecError::bad("http1.unexpected_underscore");
    /// `connection` names what is not this connection's, or too much.
    pub const NOMINATED: CodecError = CodecError::bad("http1.connection_header_rejected");
    /// A request for another protocol, with a body.
    pub const UPGRADE_WITH_BODY: CodecError = CodecError::bad("http1.upgrade_with_body");

    const fn bad(details: &'static str) -> CodecError {
        CodecError { status: StatusCode::BAD_REQUEST, details }
    }
}
