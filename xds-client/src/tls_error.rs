//! Errors of TLS handshakes in words.

use std::io;

use rustls::{CertificateError, Error};

/// What went wrong in a handshake. The library shows what a verifier of one's own found only as that was written down in Rust.
pub fn describe(error: &io::Error) -> String {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(Error::InvalidCertificate(CertificateError::Other(found))) => {
            format!("invalid peer certificate: {}", found.0)
        }
        _ => error.to_string(),
    }
}
