use std::time::Duration;

use super::{MatchedHeader, RegexRewrite};

/// One of `RouteAction.hash_policy`, or of a load balancer's: a part of what a request is hashed by.
#[derive(Debug, PartialEq)]
pub struct HashPolicy {
    /// What is hashed.
    pub source: HashSource,
    /// Where there is a hash by now, nothing after it counts.
    pub terminal: bool,
}

/// `HashPolicy.policy_specifier`.
#[derive(Debug, PartialEq)]
pub enum HashSource {
    /// All values of a header, in any order.
    Header {
        /// The header.
        name: MatchedHeader,
        /// What each value is rewritten to first.
        rewrite: Option<Box<RegexRewrite>>,
    },
    /// A cookie's value.
    Cookie(HashCookie),
    /// `connection_properties.source_ip`: the client's address, without its port.
    SourceIp,
    /// The first value of a query parameter.
    QueryParameter(Box<str>),
    /// An object of the filter state that can be hashed.
    FilterState(Box<str>),
}

/// `HashPolicy.Cookie`
#[derive(Debug, PartialEq)]
pub struct HashCookie {
    /// Its name.
    pub name: Box<str>,
    /// A client without the cookie gets one, for so long; zero: for its session. `None`: it gets none.
    pub ttl: Option<Duration>,
    /// Of a cookie that is made here.
    pub path: Box<str>,
    /// Further attributes of a cookie that is made here: names, and values where they are not empty.
    pub attributes: Vec<(Box<str>, Box<str>)>,
}
