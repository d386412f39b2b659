//! Who may do what: whoever has a token, else whoever is on the same host; and patterns of names.

use std::net::IpAddr;
use std::path::Path;

use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;

/// A text, in which each `*` stands for any text without `/`, and one at the end for any text.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Pattern(String);

impl Pattern {
    /// The pattern that is written so.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a text is of this form.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        let Some((first, rest)) = self.0.split_once('*') else { return self.0 == text };
        let Some(mut text) = text.strip_prefix(first) else { return false };
        let (between, last) = match rest.rsplit_once('*') {
            Some((between, last)) => (Some(between), last),
            None => (None, rest),
        };
        // Each star stands for as little as it can: what it leaves the next one can stand for. So a text is gone through
        // once, however long a client has made it.
        for part in between.into_iter().flat_map(|between| between.split('*')) {
            let Some(at) = text.find(part).filter(|at| !text[..*at].contains('/')) else { return false };
            text = &text[at + part.len()..];
        }
        last.is_empty() || text.strip_suffix(last).is_some_and(|skipped| !skipped.contains('/'))
    }
}

/// A refusal: a status and one line.
pub type Denied = (StatusCode, String);

/// Lets those through who are on this host or, with a file of a token, those who have the token.
///
/// # Errors
/// Why somebody is not let through. `whose` says of the token whose it is, `setting` what it is configured by.
pub fn admit(
    token_file: Option<&Path>,
    headers: &HeaderMap,
    peer: IpAddr,
    whose: &str,
    setting: &str,
) -> Result<(), Denied> {
    match token_file {
        Some(path) => bearer(path, headers, whose),
        None if peer.to_canonical().is_loopback() => Ok(()),
        None => {
            let reason = format!("only from the host itself, or with `{setting}` in the configuration");
            Err((StatusCode::FORBIDDEN, reason))
        }
    }
}

/// Lets those through who send the token that is in a file: `Authorization: Bearer TOKEN`.
///
/// # Errors
/// When they do not, or the file has none.
pub fn bearer(path: &Path, headers: &HeaderMap, whose: &str) -> Result<(), Denied> {
    // Read each time, so that it can be replaced.
    let token = match std::fs::read_to_string(path) {
        Ok(token) if !token.trim().is_empty() => token,
        _ => return Err((StatusCode::FORBIDDEN, format!("the {whose} token cannot be read here"))),
    };
    let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    let Some(sent) = sent else { return Err((StatusCode::UNAUTHORIZED, format!("the {whose} token is needed"))) };
    aws_lc_rs::constant_time::verify_slices_are_equal(sent.trim().as_bytes(), token.trim().as_bytes())
        .map_err(|_| (StatusCode::UNAUTHORIZED, format!("the token that was sent is not the {whose} token")))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn stars_stand_for_parts_of_paths_and_for_the_rest() {
        for (pattern, text, expected) in [
            ("spiffe://mesh/node", "spiffe://mesh/node", true),
            ("spiffe://mesh/node", "spiffe://mesh/node/2", false),
            ("spiffe://mesh/ns/*/sa/proxy", "spiffe://mesh/ns/shop/sa/proxy", true),
            ("spiffe://mesh/ns/*/sa/proxy", "spiffe://mesh/ns/shop/x/sa/proxy", false),
            ("spiffe://mesh/ns/*", "spiffe://mesh/ns/shop/sa/proxy", true),
            ("spiffe://mesh/*", "spiffe://meshes/ns", false),
            ("*.nodes.example", "a.nodes.example", true),
            ("*.nodes.example", "nodes.example", false),
            ("node-*-*", "node-é-", true),
            ("", "x", false),
        ] {
            assert_eq!(Pattern::new(pattern).matches(text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_pattern_matches_as_if_all_ways_were_tried() {
        fn matches(pattern: &str, text: &str) -> bool {
            let Some((before, after)) = pattern.split_once('*') else { return pattern == text };
            let Some(text) = text.strip_prefix(before) else { return false };
            let end = text.find('/').unwrap_or(text.len());
            after.is_empty() || (0..=end).any(|at| matches(after, &text[at..]))
        }
        let words = |letters: [char; 3]| {
            let mut words = vec![String::new()];
            for at in 0.. {
                let Some(word) = words.get(at).filter(|word| word.len() < 6).cloned() else { break };
                words.extend(letters.map(|letter| format!("{word}{letter}")));
            }
            words
        };
        let texts = words(['a', 'b', '/']);
        for pattern in words(['a', '/', '*']) {
            let compiled = Pattern::new(&pattern);
            for text in &texts {
                assert_eq!(compiled.matches(text), matches(&pattern, text), "{pattern} {text}");
            }
        }
    }

    #[test]
    fn a_long_text_is_gone_through_once() {
        let text = "-".repeat(8 * 1024 * 1024);
        let begun = std::time::Instant::now();
        assert!(!Pattern::new("*-*-*-*-x").matches(&text));
        assert!(Pattern::new("*-*-*-*-").matches(&text));
        assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[test]
    fn the_token_counts_if_there_is_one_else_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let (near, far) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([10, 0, 0, 1]));
        let ask = |file: Option<&Path>, sent: Option<&'static str>, peer| {
            let sent = sent.map(|sent| (header::AUTHORIZATION, HeaderValue::from_static(sent)));
            admit(file, &sent.into_iter().collect(), peer, "developers'", "token_file")
                .map_err(|denied| denied.0.as_u16())
        };
        assert_eq!(ask(None, None, near), Ok(()));
        assert_eq!(ask(None, None, "::ffff:127.0.0.1".parse().unwrap()), Ok(()));
        assert_eq!(ask(None, Some("Bearer x"), far), Err(403));
        assert_eq!(ask(Some(&path), Some("Bearer secret"), near), Err(403), "no file");
        std::fs::write(&path, " \n").unwrap();
        assert_eq!(ask(Some(&path), Some("Bearer "), near), Err(403), "an empty one");
        std::fs::write(&path, "secret\n").unwrap();
        assert_eq!(ask(Some(&path), Some("Bearer secret"), far), Ok(()));
        for wrong in [None, Some("Bearer secre"), Some("Bearer "), Some("secret"), Some("Basic secret")] {
            assert_eq!(ask(Some(&path), wrong, near), Err(401), "{wrong:?}");
        }
    }
}
