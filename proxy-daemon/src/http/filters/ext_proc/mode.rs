//! What a processor is shown of a message.

use envoy_types::pb::envoy::extensions::filters::http::ext_proc::v3::{
    ProcessingMode,
    processing_mode::{BodySendMode, HeaderSendMode},
};

use crate::config::FieldError;

/// Which of the two messages of a stream is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Request = 0,
    Response = 1,
}

/// How bodies are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyMode {
    None,
    /// Piece by piece.
    Streamed,
    /// All of it at once.
    Buffered,
    /// As much of it at once as may be in memory.
    BufferedPartial,
    /// Piece by piece, and the processor's own pieces come back whenever it likes: nobody waits for one of them.
    Duplex,
}

/// What is shown of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) headers: bool,
    pub(super) body: BodyMode,
    pub(super) trailers: bool,
}

/// `ProcessingMode`, by [`Side`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mode(pub(super) [Shown; 2]);

impl Mode {
    /// # Errors
    /// A value that is not honoured, or one that does not go with another, below `path`.
    pub(super) fn parse(mode: &ProcessingMode, path: &str) -> Result<Mode, FieldError> {
        let body = |value: i32, field: &str| {
            body_mode(value).ok_or_else(|| {
                let name = BodySendMode::try_from(value).map_or("a mode that is not known", |mode| mode.as_str_name());
                let known = "NONE, STREAMED, BUFFERED, BUFFERED_PARTIAL and FULL_DUPLEX_STREAMED";
                FieldError::unsupported_value(format!("{path}.{field}"), name, known)
            })
        };
        let mode = Mode([
            Shown {
                headers: header_mode(mode.request_header_mode, true),
                body: body(mode.request_body_mode, "request_body_mode")?,
                trailers: header_mode(mode.request_trailer_mode, false),
            },
            Shown {
                headers: header_mode(mode.response_header_mode, true),
                body: body(mode.response_body_mode, "response_body_mode")?,
                trailers: header_mode(mode.response_trailer_mode, false),
            },
        ]);
        for (side, name) in [(Side::Request, "request"), (Side::Response, "response")] {
            let shown = mode.of(side);
            if shown.body == BodyMode::Duplex && !shown.trailers {
                // Envoy's words.
                let text = format!(
                    "If the ext_proc filter has the {name}_body_mode set to FULL_DUPLEX_STREAMED, then the \
                     {name}_trailer_mode has to be set to SEND"
                );
                return Err(FieldError::new(format!("{path}.{name}_trailer_mode"), text));
            }
        }
        Ok(mode)
    }

    /// A mode that a processor may ask for.
    ///
    /// # Errors
    /// As [`parse`](Mode::parse), and what a stream cannot go over to.
    pub(super) fn parse_override(mode: &ProcessingMode, path: &str) -> Result<Mode, FieldError> {
        let parsed = Mode::parse(mode, path)?;
        if parsed.is_duplex() {
            let known = "NONE, STREAMED, BUFFERED and BUFFERED_PARTIAL";
            return Err(FieldError::unsupported_value(format!("{path}.body_mode"), "FULL_DUPLEX_STREAMED", known));
        }
        Ok(parsed)
    }

    /// Whether the processor sends pieces of its own.
    pub(super) fn is_duplex(&self) -> bool {
        self.0.iter().any(|shown| shown.body == BodyMode::Duplex)
    }

    pub(super) fn of(&self, side: Side) -> Shown {
        let Mode([request, response]) = *self;
        match side {
            Side::Request => request,
            Side::Response => response,
        }
    }
}

/// What a processor's mode makes of the one that is configured. Where it says nothing of headers or trailers, they stay.
pub(super) fn overridden(configured: &ProcessingMode, by: &ProcessingMode) -> ProcessingMode {
    let kept = |by: i32, configured| if by == HeaderSendMode::Default as i32 { configured } else { by };
    ProcessingMode {
        request_header_mode: kept(by.request_header_mode, configured.request_header_mode),
        response_header_mode: kept(by.response_header_mode, configured.response_header_mode),
        request_trailer_mode: kept(by.request_trailer_mode, configured.request_trailer_mode),
        response_trailer_mode: kept(by.response_trailer_mode, configured.response_trailer_mode),
        ..*by
    }
}

/// Whether the two are written in the same way, but for what is over by the time that one of them can be asked for: the request's
/// headers.
pub(super) fn is_written_as(mode: &ProcessingMode, other: &ProcessingMode) -> bool {
    ProcessingMode { request_header_mode: other.request_header_mode, ..*mode } == *other
}

impl Shown {
    /// Nothing is.
    pub(super) fn is_nothing(self) -> bool {
        !self.headers && self.body == BodyMode::None && !self.trailers
    }

    /// How long the body will be cannot be told before the processor has seen it.
    pub(super) fn hides_length(self) -> bool {
        match self.body {
            BodyMode::None => false,
            BodyMode::Streamed | BodyMode::BufferedPartial | BodyMode::Duplex => true,
            BodyMode::Buffered => !self.headers,
        }
    }
}

impl BodyMode {
    /// As the processor is told.
    pub(super) fn number(self) -> i32 {
        let mode = match self {
            BodyMode::None => BodySendMode::None,
            BodyMode::Streamed => BodySendMode::Streamed,
            BodyMode::Buffered => BodySendMode::Buffered,
            BodyMode::BufferedPartial => BodySendMode::BufferedPartial,
            BodyMode::Duplex => BodySendMode::FullDuplexStreamed,
        };
        mode as i32
    }
}

fn header_mode(value: i32, by_default: bool) -> bool {
    match HeaderSendMode::try_from(value) {
        Ok(HeaderSendMode::Send) => true,
        Ok(HeaderSendMode::Skip) => false,
        Ok(HeaderSendMode::Default) | Err(_) => by_default,
    }
}

fn body_mode(value: i32) -> Option<BodyMode> {
    match BodySendMode::try_from(value) {
        Ok(BodySendMode::None) => Some(BodyMode::None),
        Ok(BodySendMode::Streamed) => Some(BodyMode::Streamed),
        Ok(BodySendMode::Buffered) => Some(BodyMode::Buffered),
        Ok(BodySendMode::BufferedPartial) => Some(BodyMode::BufferedPartial),
        Ok(BodySendMode::FullDuplexStreamed) => Some(BodyMode::Duplex),
        Ok(BodySendMode::Grpc) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_leave_what_they_do_not_speak_of() {
        let configured = ProcessingMode {
            response_header_mode: HeaderSendMode::Skip as i32,
            request_trailer_mode: HeaderSendMode::Send as i32,
            request_body_mode: BodySendMode::Buffered as i32,
            ..ProcessingMode::default()
        };
        let by = ProcessingMode { response_body_mode: BodySendMode::Streamed as i32, ..ProcessingMode::default() };
        let Mode([request, response]) = Mode::parse(&overridden(&configured, &by), "m").unwrap();
        assert_eq!(request, Shown { headers: true, body: BodyMode::None, trailers: true });
        assert_eq!(response, Shown { headers: false, body: BodyMode::Streamed, trailers: false });
        let grpc = ProcessingMode { request_body_mode: BodySendMode::Grpc as i32, ..ProcessingMode::default() };
        let error = Mode::parse(&grpc, "m").unwrap_err().to_string();
        assert!(error.starts_with("m.request_body_mode"), "{error}");
    }

    #[test]
    fn what_comes_back_at_any_time_needs_trailers() {
        let body = BodySendMode::FullDuplexStreamed as i32;
        let alone = ProcessingMode { response_body_mode: body, ..ProcessingMode::default() };
        let error = Mode::parse(&alone, "m").unwrap_err().to_string();
        assert!(
            error.starts_with("m.response_trailer_mode: If the ext_proc filter has the response_body_mode"),
            "{error}"
        );
        let both = ProcessingMode { response_trailer_mode: HeaderSendMode::Send as i32, ..alone };
        assert!(Mode::parse(&both, "m").unwrap().is_duplex());
        assert!(Mode::parse_override(&both, "m").is_err(), "no stream goes over to it");
    }

    #[test]
    fn what_is_over_does_not_count() {
        let all = ProcessingMode::default();
        let skip = HeaderSendMode::Skip as i32;
        assert!(is_written_as(&all, &ProcessingMode { request_header_mode: skip, ..all }));
        assert!(!is_written_as(&all, &ProcessingMode { response_header_mode: skip, ..all }));
        // As in Envoy, what is the default otherwise is not the same.
        assert!(!is_written_as(&all, &ProcessingMode { response_header_mode: HeaderSendMode::Send as i32, ..all }));
    }
}
