//! Where in a request tokens are.

use http::{HeaderName, header::AUTHORIZATION};

use super::config::Provider;
use crate::http::{path::set_path, route_match::cookie, stream::RequestHead};

/// The most tokens of a request that are looked at.
const MAX_TOKENS: usize = 100;

/// Where a provider's tokens may be.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// With what stands in front of the token.
    pub(super) headers: Vec<(HeaderName, Box<str>)>,
    pub(super) params: Vec<Box<str>>,
    pub(super) cookies: Vec<Box<str>>,
}

impl Places {
    /// Where no other is told.
    pub(super) fn usual() -> Places {
        Places {
            headers: vec![(AUTHORIZATION, "Bearer ".into())],
            params: vec!["access_token".into()],
            cookies: Vec::new(),
        }
    }
}

/// Where a token was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Header(HeaderName),
    Param(Box<str>),
    Cookie(Box<str>),
}

/// A token that was found, where, and for which of the providers.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) text: String,
    pub(super) place: Place,
    pub(super) providers: Vec<usize>,
}

/// Finds the tokens of these providers: first those in headers, then those in parameters, then cookies.
pub(super) fn tokens(providers: &[Provider], of: &[usize], head: &RequestHead) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut add = |text: &str, place: Place, provider: usize| {
        if let Some(known) = found.iter_mut().find(|it| it.place == place && it.text == text) {
            known.providers.push(provider);
        } else if found.len() < MAX_TOKENS {
            found.push(Found { text: text.to_owned(), place, providers: vec![provider] });
        }
    };
    for &number in of {
        for (name, prefix) in &providers[number].places.headers {
            let values = head.headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            // Several values are one, as in Envoy.
            let value = values.collect::<Vec<_>>().join(",");
            if value.is_empty() && !head.headers.contains_key(name) {
                continue;
            }
            if let Some(token) = after(&value, prefix) {
                add(token, Place::Header(name.clone()), number);
            }
        }
    }
    let pairs = || head.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    for &number in of {
        for name in &providers[number].places.params {
            if let Some((_, value)) = pairs().find(|(key, _)| **key == **name) {
                add(value, Place::Param(name.clone()), number);
            }
        }
    }
    for &number in of {
        for name in &providers[number].places.cookies {
            if let Some(value) = cookie(&head.headers, name).filter(|value| !value.is_empty()) {
                add(&value, Place::Cookie(name.clone()), number);
            }
        }
    }
    found
}

/// What stands behind the prefix.
fn after<'a>(value: &'a str, prefix: &str) -> Option<&'a str> {
    Some(&value[value.find(prefix)? + prefix.len()..])
}

/// Takes a token out of the request.
pub(super) fn remove(place: &Place, head: &mut RequestHead) {
    match place {
        Place::Header(name) => drop(head.headers.remove(name)),
        Place::Param(name) => {
            let query = head.uri.query().unwrap_or_default();
            let kept: Vec<_> = query.split('&').filter(|pair| pair.split('=').next() != Some(name)).collect();
            let path = head.uri.path();
            let path = if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) };
            // It is shorter than what was there.
            let _ = set_path(head, &path);
        }
        // It stays, as in Envoy.
        Place::Cookie(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_stands_behind_its_prefix() {
        assert_eq!(after("Bearer a.b-c_", "Bearer "), Some("a.b-c_"));
        assert_eq!(after("x Bearer a", "Bearer "), Some("a"));
        assert_eq!(after("Basic a", "Bearer "), None);
        assert_eq!(after("a b", ""), Some("a b"));
    }
}
