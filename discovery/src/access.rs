//! Who may change what discovery holds: whoever has a token, else whoever is on the same host.

use std::net::IpAddr;
use std::path::Path;

use http::{HeaderMap, StatusCode, header};

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
    let sent = sent.unwrap_or_default().trim().as_bytes();
    aws_lc_rs::constant_time::verify_slices_are_equal(sent, token.trim().as_bytes())
        .map_err(|_| (StatusCode::UNAUTHORIZED, format!("the {whose} token is needed")))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

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
