use http::{HeaderName, StatusCode};

use super::Cidr;

/// One of `original_ip_detection_extensions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IpDetection {
    /// `x-forwarded-for`
    Xff {
        /// Which of its addresses are believed.
        trusted: TrustedXff,
        /// The peer's address is appended to it.
        append: bool,
    },
    /// A header that holds the address.
    Header {
        /// The header.
        name: HeaderName,
        /// The address may be internal.
        trusted: bool,
        /// The answer to requests without it; `None`: they are served.
        reject: Option<StatusCode>,
    },
}

/// Which addresses of `x-forwarded-for` are believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrustedXff {
    /// Those that so many proxies before this one have written.
    Hops(u32),
    /// Those that proxies with such addresses have written.
    Ranges(Vec<Cidr>),
}

/// A scheme of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// Without encryption.
    Http,
    /// With it.
    Https,
}

impl Scheme {
    /// As URLs have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}
