use http::HeaderName;
use regex::Regex;

use super::{FilterStateMatcher, MetadataMatcher};
use crate::layered_runtime::RuntimeFraction;

/// `RouteMatch`: all must hold.
#[derive(Debug)]
pub struct RouteMatch {
    /// The path, without the query.
    pub path: PathMatch,
    /// Whether the path is compared as it is, or without regard to ASCII case.
    pub case_sensitive: bool,
    /// All must match.
    pub headers: Vec<HeaderMatcher>,
    /// All must match.
    pub query_parameters: Vec<QueryParameterMatcher>,
    /// Only requests whose content type is gRPC's.
    pub grpc: bool,
    /// Only this share of the requests, by the stream's random number.
    pub runtime_fraction: Option<RuntimeFraction>,
    /// All must match.
    pub cookies: Vec<CookieMatcher>,
    /// `tls_context.presented`: whether the client has a certificate.
    pub certificate_presented: Option<bool>,
    /// `tls_context.validated`: whether it was found good.
    pub certificate_validated: Option<bool>,
    /// What filters have told by the time at which the route is looked for: all must match.
    pub dynamic_metadata: Vec<MetadataMatcher>,
    /// The filter state must be so.
    pub filter_state: Vec<FilterStateMatcher>,
}

impl RouteMatch {
    /// A rule that the path alone decides, in its own case.
    pub fn new(path: PathMatch) -> RouteMatch {
        RouteMatch {
            path,
            case_sensitive: true,
            headers: Vec::new(),
            query_parameters: Vec::new(),
            grpc: false,
            runtime_fraction: None,
            cookies: Vec::new(),
            certificate_presented: None,
            certificate_validated: None,
            dynamic_metadata: Vec::new(),
            filter_state: Vec::new(),
        }
    }
}

/// `RouteMatch.path_specifier`.
#[derive(Debug)]
pub enum PathMatch {
    /// The path begins so.
    Prefix(Box<str>),
    /// The path is this.
    Path(Box<str>),
    /// The whole path matches (the expression is anchored).
    Regex(Regex),
    /// The path is this, or this and `/` and more.
    PathSeparatedPrefix(Box<str>),
    /// `path_match_policy` with a `UriTemplateMatchConfig`: the expression that the template stands for (anchored), with a named
    /// group for each variable.
    Template(Regex),
    /// `connect_matcher`: CONNECT, which has no path.
    Connect,
}

/// One `HeaderMatcher`.
#[derive(Debug)]
pub struct HeaderMatcher {
    /// The header; `:method`, `:path`, `:authority` and `:scheme` are matched as Envoy does.
    pub name: MatchedHeader,
    /// What one of its values must be.
    pub value: HeaderValueMatch,
    /// The verdict is turned round.
    pub invert_match: bool,
    /// A missing header is matched as an empty one.
    pub treat_missing_header_as_empty: bool,
}

/// What a `HeaderMatcher` looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MatchedHeader {
    /// A header field.
    Name(HeaderName),
    /// `:method`
    Method,
    /// `:path`, with the query.
    Path,
    /// `:authority`
    Authority,
    /// `:scheme`
    Scheme,
}

/// `HeaderMatcher.header_match_specifier`.
#[derive(Debug)]
pub enum HeaderValueMatch {
    /// Whether the header is there at all.
    Present(bool),
    /// Its text.
    String(StringMatcher),
    /// A whole number from `start` up to, not including, `end`.
    Range {
        /// First number that matches.
        start: i64,
        /// First number above that does not.
        end: i64,
    },
}

/// `QueryParameterMatcher`.
#[derive(Debug)]
pub struct QueryParameterMatcher {
    /// The parameter's name, as it stands in the query.
    pub name: String,
    /// What its first value must be.
    pub value: QueryParameterMatch,
}

/// `QueryParameterMatcher.query_parameter_match_specifier`.
#[derive(Debug)]
pub enum QueryParameterMatch {
    /// Whether it is there at all.
    Present(bool),
    /// Its text.
    String(StringMatcher),
}

/// `CookieMatcher`.
#[derive(Debug)]
pub struct CookieMatcher {
    /// The cookie.
    pub name: String,
    /// What its value must be; a missing one does not match.
    pub value: StringMatcher,
    /// The verdict is turned round.
    pub invert_match: bool,
}

/// `envoy.type.matcher.v3.StringMatcher`.
#[derive(Debug)]
pub struct StringMatcher {
    /// How the text is compared.
    pub pattern: StringPattern,
    /// Without regard to ASCII case; has no effect on a regex.
    pub ignore_case: bool,
}

/// `StringMatcher.match_pattern`.
#[derive(Debug)]
pub enum StringPattern {
    /// The whole text.
    Exact(Box<str>),
    /// Its beginning.
    Prefix(Box<str>),
    /// Its end.
    Suffix(Box<str>),
    /// Any part of it.
    Contains(Box<str>),
    /// The whole text (the expression is anchored).
    Regex(Regex),
}

impl StringMatcher {
    /// Whether `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        let (t, folded);
        t = if self.ignore_case && !matches!(self.pattern, StringPattern::Regex(_)) {
            folded = text.to_ascii_lowercase();
            folded.as_str()
        } else {
            text
        };
        match &self.pattern {
            StringPattern::Exact(p) => t == &**p,
            StringPattern::Prefix(p) => t.starts_with(&**p),
            StringPattern::Suffix(p) => t.ends_with(&**p),
            StringPattern::Contains(p) => t.contains(&**p),
            StringPattern::Regex(r) => r.is_match(t),
        }
    }
}
