//! Tokens (RFC 7519), and what may be wrong with them, in Envoy's words.

use std::time::Duration;

use base64::{
    Engine as _,
    alphabet::URL_SAFE,
    engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::{Map, Value};

/// Base64url as tokens have it, without its padding. As in Envoy bits of the last character that say nothing may be anything.
pub(super) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(base64::engine::DecodePaddingMode::RequireNone),
);

/// What a text in base64url stands for. As Envoy reads it: white space counts for nothing, and of padding there is none or all.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let space = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0x0b;
    let text: Vec<u8> = text.bytes().filter(|byte| !space(byte)).collect();
    let length = text.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let padding = text.len() - length;
    if padding > 2 || padding > 0 && !text.len().is_multiple_of(4) {
        return None;
    }
    BASE64.decode(&text[..length]).ok()
}

macro_rules! statuses {
    ($($name:ident $number:literal $text:literal)*) => {
        /// What is wrong with a token, or with a request's.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Status {
            $(#[doc = $text] $name,)*
        }

        impl Status {
            /// As clients are told.
            pub(super) fn text(self) -> &'static str {
                match self {
                    $(Status::$name => $text,)*
                }
            }

            /// As other filters are told.
            pub(super) fn number(self) -> u8 {
                match self {
                    $(Status::$name => $number,)*
                }
            }
        }
    };
}

statuses! {
    Missing 1 "Jwt is missing"
    NotYetValid 2 "Jwt not yet valid"
    Expired 3 "Jwt is expired"
    BadFormat 4 "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
    HeaderBadBase64 5 "Jwt header is an invalid Base64url encoded"
    HeaderBadJson 6 "Jwt header is an invalid JSON"
    HeaderBadAlg 7 "Jwt header [alg] field is required and must be a string"
    HeaderUnknownAlg 8 "Jwt header [alg] is not supported"
    HeaderBadKid 9 "Jwt header [kid] field is not a string"
    PayloadBadBase64 10 "Jwt payload is an invalid Base64url encoded"
    PayloadBadJson 11 "Jwt payload is an invalid JSON"
    IssNotString 12 "Jwt payload [iss] field is not a string"
    SubNotString 13 "Jwt payload [sub] field is not a string"
    IatNotInteger 14 "Jwt payload [iat] field is not an integer"
    IatOutOfRange 15 "Jwt payload [iat] field is not a positive 64 bit integer"
    NbfNotInteger 16 "Jwt payload [nbf] field is not an integer"
    NbfOutOfRange 17 "Jwt payload [nbf] field is not a positive 64 bit integer"
    ExpNotInteger 18 "Jwt payload [exp] field is not an integer"
    ExpOutOfRange 19 "Jwt payload [exp] field is not a positive 64 bit integer"
    JtiNotString 20 "Jwt payload [jti] field is not a string"
    AudNotString 21 "Jwt payload [aud] field is not a string or string list"
    SignatureBadBase64 22 "Jwt signature is an invalid Base64url encoded"
    UnknownIssuer 24 "Jwt issuer is not configured"
    AudienceNotAllowed 25 "Audiences in Jwt are not allowed"
    VerificationFails 26 "Jwt verification fails"
    FetchFailed 40 "Jwks remote fetch is failed"
    NoSuchKey 32 "Jwks doesn't have key to match kid or alg from Jwt"
}

const ALGORITHMS: [&str; 13] = [
    "ES256", "ES384", "ES512", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA",
];

/// A token, taken apart. Its signature has not been verified.
#[derive(Debug)]
pub(super) struct Token {
    /// Header and payload, as they are signed.
    pub(super) signed: String,
    pub(super) signature: Vec<u8>,
    pub(super) algorithm: String,
    pub(super) key_id: String,
    pub(super) issuer: String,
    pub(super) subject: String,
    pub(super) audiences: Vec<String>,
    pub(super) not_before: u64,
    pub(super) expires: u64,
    pub(super) header: Map<String, Value>,
    pub(super) payload: Map<String, Value>,
}

/// A claim that is a text; where it is not there it is empty.
fn text(payload: &Map<String, Value>, claim: &str, wrong: Status) -> Result<String, Status> {
    match payload.get(claim) {
        None => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(wrong),
    }
}

/// A claim that is a time in seconds; where it is not there it is 0.
fn time(payload: &Map<String, Value>, claim: &str, wrong: Status, out_of_range: Status) -> Result<u64, Status> {
    match payload.get(claim) {
        None => Ok(0),
        Some(Value::Number(number)) => match (number.as_u64(), number.as_f64()) {
            (Some(seconds), _) => Ok(seconds),
            // What is in range is cut off.
            (None, Some(seconds)) if seconds >= 0.0 && seconds < i64::MAX as f64 => Ok(seconds as u64),
            _ => Err(out_of_range),
        },
        Some(_) => Err(wrong),
    }
}

impl Token {
    /// Takes a token apart.
    pub(super) fn parse(token: &str) -> Result<Token, Status> {
        let sections: Vec<_> = token.split('.').take(4).collect();
        if sections.iter().any(|section| section.is_empty()) {
            return Err(Status::BadFormat);
        }
        let [header_text, payload_text, signature] = sections[..] else { return Err(Status::BadFormat) };
        let object = |text: &str, bad_base64, bad_json| -> Result<Map<String, Value>, Status> {
            let bytes = decode(text).ok_or(bad_base64)?;
            match serde_json::from_slice(&bytes) {
                Ok(Value::Object(fields)) => Ok(fields),
                _ => Err(bad_json),
            }
        };
        let header = object(header_text, Status::HeaderBadBase64, Status::HeaderBadJson)?;
        let Some(Value::String(algorithm)) = header.get("alg") else { return Err(Status::HeaderBadAlg) };
        if !ALGORITHMS.contains(&algorithm.as_str()) {
            return Err(Status::HeaderUnknownAlg);
        }
        let key_id = text(&header, "kid", Status::HeaderBadKid)?;
        let payload = object(payload_text, Status::PayloadBadBase64, Status::PayloadBadJson)?;
        let issuer = text(&payload, "iss", Status::IssNotString)?;
        let subject = text(&payload, "sub", Status::SubNotString)?;
        time(&payload, "iat", Status::IatNotInteger, Status::IatOutOfRange)?;
        let not_before = time(&payload, "nbf", Status::NbfNotInteger, Status::NbfOutOfRange)?;
        let expires = time(&payload, "exp", Status::ExpNotInteger, Status::ExpOutOfRange)?;
        text(&payload, "jti", Status::JtiNotString)?;
        let audiences = match payload.get("aud") {
            None => Vec::new(),
            Some(Value::String(audience)) => vec![audience.clone()],
            Some(Value::Array(items)) => {
                let texts = items.iter().map(|item| item.as_str().map(str::to_owned));
                texts.collect::<Option<_>>().ok_or(Status::AudNotString)?
            }
            Some(_) => return Err(Status::AudNotString),
        };
        let signature = decode(signature).ok_or(Status::SignatureBadBase64)?;
        let signed = format!("{header_text}.{payload_text}");
        Ok(Token {
            signed,
            signature,
            algorithm: algorithm.clone(),
            key_id,
            issuer,
            subject,
            audiences,
            not_before,
            expires,
            header,
            payload,
        })
    }

    /// The payload as it came.
    pub(super) fn payload_text(&self) -> &str {
        self.signed.split_once('.').map_or("", |(_, payload)| payload)
    }

    /// Whether it is valid at `now`, in seconds; clocks may differ by `skew`.
    pub(super) fn check_time(&self, now: u64, skew: u64) -> Result<(), Status> {
        if self.not_before > 0 && now.saturating_add(skew) < self.not_before {
            return Err(Status::NotYetValid);
        }
        if self.expires > 0 && now > self.expires.saturating_add(skew) {
            return Err(Status::Expired);
        }
        Ok(())
    }

    /// Whether it is not valid for longer than that after `now`, in seconds; `None`: than for ever.
    pub(super) fn check_lifetime(&self, now: Duration, longest: Option<Duration>) -> Result<(), Status> {
        let left = Duration::from_secs(self.expires).saturating_sub(now);
        if self.expires == 0 || longest.is_some_and(|longest| left >= longest) {
            return Err(Status::VerificationFails);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(header: &str, payload: &str) -> Result<Token, Status> {
        Token::parse(&format!("{}.{}.c2ln", BASE64.encode(header), BASE64.encode(payload)))
    }

    #[test]
    fn tokens_are_taken_apart() {
        let good = r#"{"alg": "RS256"}"#;
        let token = parsed(good, r#"{"iss": "i", "aud": ["a", "b"], "exp": 5, "nbf": 2.5}"#).unwrap();
        assert_eq!((token.issuer.as_str(), token.expires, token.not_before), ("i", 5, 2));
        assert_eq!(token.audiences, ["a", "b"]);
        for (token, expected) in [
            ("", Status::BadFormat),
            ("a.b", Status::BadFormat),
            ("a.b.c.d", Status::BadFormat),
            ("eyJhbGciOiJub25lIn0.e30.", Status::BadFormat),
            ("!.b.c", Status::HeaderBadBase64),
            ("YQ.b.c", Status::HeaderBadJson),
            ("e30.b.c", Status::HeaderBadAlg),
        ] {
            assert_eq!(Token::parse(token).unwrap_err(), expected, "{token}");
        }
        for (payload, expected) in [
            ("[]", Status::PayloadBadJson),
            (r#"{"iss": 1}"#, Status::IssNotString),
            (r#"{"exp": "1"}"#, Status::ExpNotInteger),
            (r#"{"exp": -1}"#, Status::ExpOutOfRange),
            (r#"{"aud": [1]}"#, Status::AudNotString),
        ] {
            assert_eq!(parsed(good, payload).unwrap_err(), expected, "{payload}");
        }
        assert_eq!(parsed(r#"{"alg": "none"}"#, "{}").unwrap_err(), Status::HeaderUnknownAlg);
        let nested = format!("{{\"a\": {}}}", "[".repeat(100_000));
        assert_eq!(parsed(good, &nested).unwrap_err(), Status::PayloadBadJson, "it does not take the stack");
    }

    #[test]
    fn base64_is_read_as_envoy_reads_it() {
        for text in ["YQ", "YQ==", "YR", " Y Q\t=="] {
            assert_eq!(decode(text).as_deref(), Some(&b"a"[..]), "{text:?}");
        }
        for text in ["YQ=", "YQ===", "Y", "YWJj=", "Y+", "=", "YQ==YQ=="] {
            assert_eq!(decode(text), None, "{text:?}");
        }
    }

    #[test]
    fn tokens_have_their_time() {
        let token = parsed(r#"{"alg": "RS256"}"#, r#"{"exp": 100, "nbf": 50}"#).unwrap();
        assert_eq!(token.check_time(39, 10), Err(Status::NotYetValid));
        assert_eq!(token.check_time(40, 10), Ok(()));
        assert_eq!(token.check_time(110, 10), Ok(()));
        assert_eq!(token.check_time(111, 10), Err(Status::Expired));
        let (now, seconds) = (Duration::from_secs(90), Duration::from_secs);
        assert_eq!(token.check_lifetime(now, Some(seconds(11))), Ok(()));
        assert_eq!(token.check_lifetime(now, Some(seconds(10))), Err(Status::VerificationFails));
        assert_eq!(token.check_lifetime(now, None), Ok(()));
        let forever = parsed(r#"{"alg": "RS256"}"#, "{}").unwrap();
        assert_eq!(forever.check_lifetime(now, None), Err(Status::VerificationFails));
    }
}
