use bytes::Bytes;
use http::StatusCode;
use percent_encoding::percent_decode_str;
use serde_json::Value as Json;

use super::pretty;

/// The parameters of a request, decoded, in their order.
#[derive(Debug, Default)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Reads the part of a request target behind `?`.
    pub(super) fn parse(query: &str) -> Parameters {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decode(name), percent_decode(value))
        });
        Parameters(pairs.collect())
    }

    /// The first value of a parameter.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// `%41` as `A`. A `+` stays: filters are regular expressions. What is no UTF-8 becomes U+FFFD.
fn percent_decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) content_type: &'static str,
    pub(super) body: Bytes,
}

impl Reply {
    /// 200 with plain text.
    pub(super) fn text(body: impl Into<String>) -> Reply {
        Reply { status: StatusCode::OK, content_type: "text/plain; charset=UTF-8", body: body.into().into() }
    }

    /// What Envoy says when it has done something.
    pub(super) fn ok() -> Reply {
        Reply::text("OK\n")
    }

    /// Plain text with another status.
    pub(super) fn error(status: StatusCode, body: impl Into<String>) -> Reply {
        Reply { status, ..Reply::text(body) }
    }

    /// 400.
    pub(super) fn bad_request(body: impl Into<String>) -> Reply {
        Reply::error(StatusCode::BAD_REQUEST, body)
    }

    /// 200 with JSON, laid out as Envoy does.
    pub(super) fn json(value: &Json) -> Reply {
        let mut body = Vec::new();
        pretty::write(&mut body, value, 0);
        body.push(b'\n');
        Reply::json_bytes(body)
    }

    /// 200 with JSON that is written already.
    pub(super) fn json_bytes(body: Vec<u8>) -> Reply {
        Reply { status: StatusCode::OK, content_type: "application/json", body: body.into() }
    }

    /// As [`error`](Self::error), with the content type that Envoy gives errors of its dumps.
    pub(super) fn plain_error(status: StatusCode, body: String) -> Reply {
        Reply { status, content_type: "text/plain", body: body.into() }
    }

    /// 200 with a web page.
    pub(super) fn html(body: String) -> Reply {
        Reply { status: StatusCode::OK, content_type: "text/html; charset=UTF-8", body: body.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded() {
        let parameters = Parameters::parse("usedonly&filter=a%2Bb+c%zz%4&filter=second&&format=json%");
        assert_eq!(parameters.get("usedonly"), Some(""));
        assert_eq!(parameters.get("filter"), Some("a+b+c%zz%4"));
        assert_eq!(parameters.get("format"), Some("json%"));
        assert_eq!(parameters.get("nothing"), None);
        assert_eq!(percent_decode("%ff%C3%A4%+1"), "\u{fffd}ä%+1");
    }
}
