//! Errors of TLS handshakes in words.

use std::io;

use rustls::{CertificateError, Error};

/// What went wrong in a handshake. The library shows much of it only as it is written down in Rust.
pub fn describe(error: &io::Error) -> String {
    let Some(Error::InvalidCertificate(found)) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return error.to_string();
    };
    let name = match found {
        CertificateError::Other(found) => found.0.to_string(),
        found => found.to_string(),
    };
    match words(&name) {
        Some(words) => format!("invalid peer certificate: {words} ({name})"),
        None => format!("invalid peer certificate: {name}"),
    }
}

/// What the names of rustls and webpki mean.
fn words(name: &str) -> Option<&'static str> {
    Some(match name {
        "UnknownIssuer" => "it was not issued by an authority that is trusted here",
        "CaUsedAsEndEntity" => {
            "it is an authority's own certificate, which no server or client may show as its own; is it self-signed?"
        }
        "EndEntityUsedAsCa" => "one of its issuers is not an authority",
        "BadEncoding" | "BadDer" => "it cannot be decoded",
        "BadSignature" | "InvalidSignatureForPublicKey" => "its signature is not its issuer's",
        "Expired" => "it has expired",
        "NotValidYet" => "it is not valid yet",
        "Revoked" => "it has been revoked",
        "UnknownRevocationStatus" => "no list says whether it has been revoked",
        "ExpiredRevocationList" => "the list of what has been revoked has expired",
        "UnhandledCriticalExtension" | "UnsupportedCriticalExtension" => {
            "it has a critical extension that is not known"
        }
        "UnsupportedCertVersion" => "it is not of version 3",
        "InvalidPurpose" | "RequiredEkuNotFound" => "it is not meant for this use (extended key usage)",
        "PathLenConstraintViolated" => "it has more issuers between it and the trusted one than they allow",
        "NameConstraintViolation" => "its name is not one that its issuers may sign",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::OtherError;

    use super::*;

    #[test]
    fn what_verifiers_find_is_said_in_words() {
        let text = |found| describe(&io::Error::other(Error::InvalidCertificate(found)));
        let trusted = "it was not issued by an authority that is trusted here";
        assert_eq!(
            text(CertificateError::UnknownIssuer),
            format!("invalid peer certificate: {trusted} (UnknownIssuer)")
        );
        let other = |name: &'static str| CertificateError::Other(OtherError(Arc::new(io::Error::other(name))));
        let own = text(other("CaUsedAsEndEntity"));
        assert!(own.starts_with("invalid peer certificate: it is an authority's own certificate"), "{own}");
        assert_eq!(text(other("it is another")), "invalid peer certificate: it is another");
        assert_eq!(describe(&io::Error::other("no handshake")), "no handshake");
    }
}
