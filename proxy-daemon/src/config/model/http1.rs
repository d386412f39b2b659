//! `Http1ProtocolOptions`.

use http::HeaderValue;

/// Of a connection manager.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Http1Options {
    /// HTTP/1.0 is served; else it is answered with 426.
    pub accept_http_10: bool,
    /// The host of an HTTP/1.0 request that names none.
    pub default_host_for_http_10: Option<HeaderValue>,
    /// Trailers pass in both directions; else they are dropped.
    pub enable_trailers: bool,
    /// `allow_absolute_url` is false: a target that is a URL is answered with 404, as one that is no path.
    pub refuses_absolute_url: bool,
    /// Methods that Envoy does not know are passed on; else they are answered with 400.
    pub allow_custom_methods: bool,
    /// How names of headers go to the client; of requests, what their names are remembered for.
    pub header_key_format: HeaderKeyFormat,
}

/// Of a cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Http1ClientOptions {
    /// Trailers pass in both directions; else they are dropped.
    pub enable_trailers: bool,
    /// How names of headers go to the host; of responses, what their names are remembered for.
    pub header_key_format: HeaderKeyFormat,
}

/// `header_key_format`: in what case the names of headers are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HeaderKeyFormat {
    /// In lower case.
    #[default]
    Lower,
    /// As `Content-Length`.
    ProperCaseWords,
    /// Those of a message that is read are written on the other side as they came.
    PreserveCase(PreserveCase),
}

/// `PreserveCaseFormatterConfig`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PreserveCase {
    /// A response's reason is passed on as it came.
    pub forward_reason_phrase: bool,
    /// `formatter_type_on_envoy_headers` is `PROPER_CASE`: names that did not come are written in proper case.
    pub proper_case_others: bool,
}
