//! The names that requests ask for.

use std::{borrow::Cow, net::Ipv6Addr};

/// A host's name, without the brackets of an IPv6 address, and its port where it has one.
pub(crate) fn split(authority: &str) -> (&str, Option<u16>) {
    if let Some((address, rest)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return (address, rest.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (authority, None),
        },
        _ => (authority, None),
    }
}

/// The same host with a port in any case.
pub(super) fn with_port(authority: &str, default: u16) -> Cow<'_, str> {
    match split(authority) {
        (_, Some(_)) => Cow::Borrowed(authority),
        (address, None) if address.parse::<Ipv6Addr>().is_ok() => Cow::Owned(format!("[{address}]:{default}")),
        (_, None) => Cow::Owned(format!("{authority}:{default}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_a_port_in_any_case() {
        for (authority, name, port) in [
            ("a.example", "a.example", None),
            ("a.example:80", "a.example", Some(80)),
            ("a.example:", "a.example:", None),
            ("a.example:99999", "a.example:99999", None),
            ("[::1]:443", "::1", Some(443)),
            ("[::1]", "::1", None),
            ("::1", "::1", None),
            ("10.0.0.1:8", "10.0.0.1", Some(8)),
        ] {
            assert_eq!(split(authority), (name, port), "{authority}");
        }
        assert_eq!(with_port("a", 80), "a:80");
        assert_eq!(with_port("a:81", 80), "a:81");
        assert_eq!(with_port("::1", 80), "[::1]:80");
        assert_eq!(with_port("[::1]", 80), "[::1]:80");
        assert_eq!(with_port("[::1]:7", 80), "[::1]:7");
    }
}
