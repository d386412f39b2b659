//! AWS Signature Version 4, as far as presigned URLs of GET requests need it.

use std::fmt::Write as _;

use aws_lc_rs::{digest, hmac};
use jiff::Timestamp;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// Everything but what RFC 3986 calls unreserved.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Whose signature it is.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct AwsCredentials {
    pub(super) access_key_id: String,
    pub(super) secret_access_key: String,
    pub(super) session_token: Option<String>,
    /// When they end, if they do.
    pub(super) ends: Option<Timestamp>,
}

/// A GET request to be signed.
pub(super) struct Request<'a> {
    pub(super) host: &'a str,
    pub(super) path: &'a str,
    pub(super) query: &'a [(&'a str, &'a str)],
    /// Headers beside `host` that the sender will have to send: lower case, in order of their names.
    pub(super) headers: &'a [(&'a str, &'a str)],
    pub(super) region: &'a str,
    pub(super) service: &'a str,
    /// How long the URL is good for, in seconds.
    pub(super) expires: u32,
    /// The SHA-256 of the body in hexadecimal, or `UNSIGNED-PAYLOAD`.
    pub(super) payload: &'a str,
}

/// The path and query with its signature.
pub(super) fn presign(request: &Request<'_>, credentials: &AwsCredentials, now: Timestamp) -> String {
    let date_time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let date = date_time.get(..8).unwrap_or_default();
    let Request { host, path, region, service, .. } = request;
    let scope = format!("{date}/{region}/{service}/aws4_request");
    let mut headers = vec![("host", *host)];
    headers.extend(request.headers);
    headers.sort_unstable();
    let signed: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let signed = signed.join(";");
    let credential = format!("{}/{scope}", credentials.access_key_id);
    let expires = request.expires.to_string();
    let mut query: Vec<(&str, &str)> = request.query.to_vec();
    query.extend([
        ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"),
        ("X-Amz-Credential", &*credential),
        ("X-Amz-Date", &*date_time),
        ("X-Amz-Expires", &*expires),
        ("X-Amz-SignedHeaders", &*signed),
    ]);
    query.extend(credentials.session_token.as_deref().map(|token| ("X-Amz-Security-Token", token)));
    let encode = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
    let mut query: Vec<(String, String)> = query.iter().map(|(name, value)| (encode(name), encode(value))).collect();
    query.sort_unstable();
    let query: Vec<String> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let query = query.join("&");
    let mut canonical = format!("GET\n{path}\n{query}\n");
    for (name, value) in &headers {
        // Writing to a string does not fail.
        let _ = writeln!(canonical, "{name}:{}", value.trim());
    }
    let _ = write!(canonical, "\n{signed}\n{}", request.payload);
    let hash = hex(digest::digest(&digest::SHA256, canonical.as_bytes()).as_ref());
    let to_sign = format!("AWS4-HMAC-SHA256\n{date_time}\n{scope}\n{hash}");
    let key = signing_key(&credentials.secret_access_key, date, region, service);
    format!("{path}?{query}&X-Amz-Signature={}", hex(sign(&key, to_sign.as_bytes()).as_ref()))
}

fn sign(key: &[u8], text: &[u8]) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text)
}

fn signing_key(secret: &str, date: &str, region: &str, service: &str) -> Vec<u8> {
    let mut key = format!("AWS4{secret}").into_bytes();
    for part in [date, region, service, "aws4_request"] {
        key = sign(&key, part.as_bytes()).as_ref().to_vec();
    }
    key
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The SHA-256 of nothing.
pub(super) const EMPTY_PAYLOAD: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials(id: &str, secret: &str) -> AwsCredentials {
        let (access_key_id, secret_access_key) = (id.into(), secret.into());
        AwsCredentials { access_key_id, secret_access_key, session_token: None, ends: None }
    }

    fn signature(url: &str) -> &str {
        url.rsplit_once("X-Amz-Signature=").unwrap().1
    }

    /// From AWS' documentation of signing keys.
    #[test]
    fn the_documented_signing_key() {
        let key = signing_key("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "20150830", "us-east-1", "iam");
        assert_eq!(hex(&key), "c4afb1cc5771d871763a393e44b703571b55cc28424d1a5e86da6ed3c154a4b9");
    }

    /// From Amazon S3's documentation: "Authenticating Requests: Using Query Parameters".
    #[test]
    fn the_documented_presigned_url() {
        let request = Request {
            host: "examplebucket.s3.amazonaws.com",
            path: "/test.txt",
            query: &[],
            headers: &[],
            region: "us-east-1",
            service: "s3",
            expires: 86400,
            payload: "UNSIGNED-PAYLOAD",
        };
        let credentials = credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY");
        let url = presign(&request, &credentials, "2013-05-24T00:00:00Z".parse().unwrap());
        assert_eq!(signature(&url), "aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404");
        assert!(url.starts_with("/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F"));
    }

    /// From the signing test suite that AWS publishes: get-vanilla-query-order-key-case and get-header-value-order.
    #[test]
    fn the_published_test_suite() {
        let credentials = credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY");
        let sign = |query: &[(&str, &str)], headers: &[(&str, &str)]| {
            let request = Request {
                host: "example.amazonaws.com",
                path: "/",
                query,
                headers,
                region: "us-east-1",
                service: "service",
                expires: 3600,
                payload: EMPTY_PAYLOAD,
            };
            signature(&presign(&request, &credentials, "2015-08-30T12:36:00Z".parse().unwrap())).to_owned()
        };
        let query = [("Param2", "value2"), ("Param1", "value1")];
        assert_eq!(sign(&query, &[]), "86012e2c9ad4d77369f5d81c11f75158aae4f895a085212cc6d3f923d300bed5");
        let headers = [("my-header1", "value4,value1,value3,value2")];
        assert_eq!(sign(&[], &headers), "313720e71ca6202fdcfa9b20f88de01a4eb0638a83c833b1c184359a4eda864e");
    }
}
