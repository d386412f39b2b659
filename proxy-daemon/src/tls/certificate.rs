//! Certificates and keys, from PEM to what handshakes need, and to what `/certs` shows.

use std::{sync::Arc, time::SystemTime};

use rustls::{
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde_json::{Value as Json, json};
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};

use super::peer;
use crate::config::model::{SanType, TlsCertificate, TrustedCa};

/// The content of a `DataSource`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Material {
    /// The content.
    pub bytes: Vec<u8>,
    /// The file that it came from, or `<inline>`, or the environment variable.
    pub origin: String,
}

/// What a transport socket trusts and shows, for `/certs`.
#[derive(Debug, Clone, Default)]
pub struct SocketCertificates {
    /// The issuers that it trusts.
    pub ca: Option<Arc<TrustedCa>>,
    /// Its own.
    pub certificates: Vec<Arc<TlsCertificate>>,
}

/// The most certificates that one chain or bundle may hold.
const MAX_CERTIFICATES: usize = 10_000;

fn certificates(pem: &Material) -> Option<Vec<CertificateDer<'static>>> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem.bytes).take(MAX_CERTIFICATES + 1).collect();
    let parsed = parsed.ok().filter(|all| !all.is_empty() && all.len() <= MAX_CERTIFICATES)?;
    parsed.iter().all(|der| X509Certificate::from_der(der).is_ok()).then_some(parsed)
}

/// A certificate with its key.
///
/// # Errors
/// The field that is wrong, `certificate_chain` or `private_key`, and what is wrong with it, as Envoy words it.
pub fn tls_certificate(
    name: &str,
    chain: &Material,
    key: &Material,
    provider: &CryptoProvider,
) -> Result<TlsCertificate, (&'static str, String)> {
    let bad_chain = || ("certificate_chain", format!("Failed to load certificate chain from {}", chain.origin));
    let parsed = certificates(chain).ok_or_else(bad_chain)?;
    let bad_key = |cause: &dyn std::fmt::Display| {
        ("private_key", format!("Failed to load private key from {}, Cause: {cause}", key.origin))
    };
    let der = PrivateKeyDer::from_pem_slice(&key.bytes).map_err(|error| bad_key(&error))?;
    let dns_names = parsed.first().map(|leaf| server_names(leaf)).unwrap_or_default();
    let certified = CertifiedKey::from_der(parsed, der, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => bad_key(&"it does not belong to the certificate"),
        error => bad_key(&error),
    })?;
    Ok(TlsCertificate { name: name.to_owned(), chain_path: chain.origin.clone(), key: Arc::new(certified), dns_names })
}

/// The names by which a client may ask for a certificate: DNS names, else the common name.
fn server_names(leaf: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = X509Certificate::from_der(leaf) else { return Vec::new() };
    let named = peer::alternative_names(&parsed).into_iter().filter(|(kind, _)| *kind == SanType::Dns);
    let named: Vec<_> = named.map(|(_, name)| name.to_ascii_lowercase()).collect();
    if !named.is_empty() {
        return named;
    }
    let common = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    common.map(str::to_ascii_lowercase).into_iter().collect()
}

/// A bundle of trusted certificates.
///
/// # Errors
/// What is wrong, as Envoy words it.
pub fn trusted_ca(pem: &Material) -> Result<TrustedCa, String> {
    let certificates =
        certificates(pem).ok_or_else(|| format!("Failed to load trusted CA certificates from {}", pem.origin))?;
    // What chains are verified by reads less than what names are read by: a context could not be built of the rest.
    let anchor = |certificate| match webpki::anchor_from_trusted_cert(certificate) {
        Ok(anchor) => Ok(anchor.to_owned()),
        Err(error) => Err(format!("Failed to load trusted CA certificates from {}: {error}", pem.origin)),
    };
    let anchors = certificates.iter().map(anchor).collect::<Result<_, _>>()?;
    Ok(TrustedCa { path: pem.origin.clone(), certificates, anchors })
}

/// One certificate as Envoy's `CertificateDetails` shows it.
pub fn certificate_json(der: &CertificateDer<'_>, path: &str) -> Json {
    let Ok((_, parsed)) = X509Certificate::from_der(der) else { return json!({ "path": path }) };
    let names = peer::alternative_names(&parsed).into_iter().filter_map(|(kind, name)| match kind {
        SanType::Dns => Some(json!({ "dns": name })),
        SanType::Uri => Some(json!({ "uri": name })),
        SanType::IpAddress => Some(json!({ "ip_address": name })),
        SanType::Email => None,
    });
    let validity = parsed.validity();
    json!({
        "path": path,
        "serial_number": peer::serial(&parsed),
        "subject_alt_names": names.collect::<Vec<_>>(),
        "days_until_expiration": days_left(validity.not_after).to_string(),
        "valid_from": timestamp(validity.not_before),
        "expiration_time": timestamp(validity.not_after),
    })
}

/// Whole days until then; 0 where it has passed.
fn days_left(at: ASN1Time) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    u64::try_from(at.timestamp()).unwrap_or(0).saturating_sub(now) / 86400
}

/// RFC 3339, in whole seconds.
fn timestamp(at: ASN1Time) -> String {
    peer::rfc3339(at, false)
}

/// When the first of these expires, in seconds since 1970.
pub(super) fn expiration(chain: &[CertificateDer<'_>]) -> Option<u64> {
    let parsed = chain.iter().filter_map(|der| X509Certificate::from_der(der).ok());
    parsed.filter_map(|(_, it)| u64::try_from(it.validity().not_after.timestamp()).ok()).min()
}
