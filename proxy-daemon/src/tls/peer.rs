//! What a certificate says, as text.

use std::{
    cell::OnceCell,
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    time::{Duration, SystemTime},
};

use rustls::{CipherSuite, CommonState, HandshakeKind, ProtocolVersion, pki_types::CertificateDer};
use x509_parser::{
    extensions::GeneralName,
    prelude::{ASN1Time, FromDer, X509Certificate, X509Name},
};

use crate::config::model::SanType;

/// What a finished handshake came to, for access logs.
#[derive(Debug)]
pub struct TlsInfo {
    /// `TLSv1.2`, `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite, as Envoy names it.
    pub cipher: &'static str,
    /// The peer's certificate.
    certificate: Option<CertificateDer<'static>>,
    /// Read when it is first asked for.
    text: OnceCell<Option<Box<PeerText>>>,
}

/// A peer's certificate for an access log.
#[derive(Debug)]
pub struct PeerText {
    /// `O=Org,CN=name`: RFC 2253.
    pub subject: String,
    /// As the subject.
    pub issuer: String,
    /// In hexadecimal digits.
    pub serial: String,
    /// Joined with commas; empty: none.
    pub uri_sans: String,
    /// Joined with commas; empty: none.
    pub dns_sans: String,
    /// SHA-256, in hexadecimal digits.
    pub fingerprint_256: String,
    /// RFC 3339.
    pub valid_from: String,
    /// RFC 3339.
    pub valid_until: String,
}

impl TlsInfo {
    /// After the handshake.
    pub fn new(connection: &CommonState) -> TlsInfo {
        TlsInfo {
            version: version_name(connection.protocol_version()),
            cipher: connection.negotiated_cipher_suite().map_or("", |suite| cipher_name(suite.suite())),
            certificate: connection.peer_certificates().and_then(|chain| chain.first()).cloned(),
            text: OnceCell::new(),
        }
    }

    /// Whether the peer has shown a certificate.
    pub fn has_certificate(&self) -> bool {
        self.certificate.is_some()
    }

    /// What the peer's certificate says; `None` without one.
    pub fn peer(&self) -> Option<&PeerText> {
        let read = || self.certificate.as_ref().and_then(|der| PeerText::read(der)).map(Box::new);
        self.text.get_or_init(read).as_deref()
    }
}

impl PeerText {
    fn read(der: &CertificateDer<'_>) -> Option<PeerText> {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let names = alternative_names(&parsed);
        let joined = |wanted: SanType| {
            let names = names.iter().filter(|(kind, _)| *kind == wanted).map(|(_, name)| name.as_str());
            names.collect::<Vec<_>>().join(",")
        };
        let validity = parsed.validity();
        Some(PeerText {
            subject: distinguished_name(parsed.subject()),
            issuer: distinguished_name(parsed.issuer()),
            serial: serial(&parsed),
            uri_sans: joined(SanType::Uri),
            dns_sans: joined(SanType::Dns),
            fingerprint_256: hex(&super::sha256(der)),
            valid_from: rfc3339(validity.not_before, true),
            valid_until: rfc3339(validity.not_after, true),
        })
    }
}

/// As statistics and access logs name it.
pub(super) fn version_name(version: Option<ProtocolVersion>) -> &'static str {
    match version {
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "",
    }
}

/// Suites, with OpenSSL's names for those of TLS 1.2.
pub(super) const CIPHERS: &[(CipherSuite, &str)] = &[
    (CipherSuite::TLS13_AES_128_GCM_SHA256, "TLS_AES_128_GCM_SHA256"),
    (CipherSuite::TLS13_AES_256_GCM_SHA384, "TLS_AES_256_GCM_SHA384"),
    (CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, "TLS_CHACHA20_POLY1305_SHA256"),
    (CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, "ECDHE-ECDSA-AES128-GCM-SHA256"),
    (CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, "ECDHE-ECDSA-AES256-GCM-SHA384"),
    (CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, "ECDHE-ECDSA-CHACHA20-POLY1305"),
    (CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, "ECDHE-RSA-AES128-GCM-SHA256"),
    (CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, "ECDHE-RSA-AES256-GCM-SHA384"),
    (CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, "ECDHE-RSA-CHACHA20-POLY1305"),
];

fn cipher_name(suite: CipherSuite) -> &'static str {
    CIPHERS.iter().find(|(known, _)| *known == suite).map_or("", |(_, name)| name)
}

/// The names of a certificate that Envoy matches and shows.
pub(super) fn alternative_names(certificate: &X509Certificate<'_>) -> Vec<(SanType, String)> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return Vec::new() };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((SanType::Dns, (*name).to_owned())),
        GeneralName::URI(uri) => Some((SanType::Uri, (*uri).to_owned())),
        GeneralName::RFC822Name(address) => Some((SanType::Email, (*address).to_owned())),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|bytes| Ipv4Addr::from(bytes).to_string());
            let v6 = || <[u8; 16]>::try_from(*bytes).map(|bytes| Ipv6Addr::from(bytes).to_string());
            Some((SanType::IpAddress, v4.or_else(|_| v6()).ok()?))
        }
        _ => None,
    };
    extension.value.general_names.iter().filter_map(name).collect()
}

/// The serial number as Envoy shows it: two hexadecimal digits a byte, from the first byte that is not zero.
pub(super) fn serial(certificate: &X509Certificate<'_>) -> String {
    serial_text(certificate.raw_serial())
}

fn serial_text(bytes: &[u8]) -> String {
    match bytes.iter().position(|byte| *byte != 0) {
        Some(first) => hex(&bytes[first..]),
        None => "0".to_owned(),
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// RFC 3339, with milliseconds where Envoy has them.
pub(super) fn rfc3339(at: ASN1Time, milliseconds: bool) -> String {
    let seconds = u64::try_from(at.timestamp()).unwrap_or(0);
    let text = crate::access_log::rfc3339(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    if milliseconds { text } else { text.replace(".000Z", "Z") }
}

/// RFC 2253: the last part first, escaped.
fn distinguished_name(name: &X509Name<'_>) -> String {
    let parts = name.iter_rdn().map(|rdn| {
        let attributes = rdn.iter().map(|attribute| {
            let oid = attribute.attr_type().to_id_string();
            let key = ATTRIBUTES.iter().find(|(known, _)| *known == oid).map_or(oid.as_str(), |(_, short)| short);
            match attribute.as_str() {
                Ok(text) => format!("{key}={}", escaped(text)),
                Err(_) => format!("{key}=#{}", hex(attribute.as_slice())),
            }
        });
        attributes.collect::<Vec<_>>().join("+")
    });
    let parts: Vec<_> = parts.collect();
    parts.into_iter().rev().collect::<Vec<_>>().join(",")
}

/// Attribute types, by OpenSSL's short names.
const ATTRIBUTES: &[(&str, &str)] = &[
    ("2.5.4.3", "CN"),
    ("2.5.4.4", "SN"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.12", "title"),
    ("2.5.4.42", "GN"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

fn escaped(text: &str) -> String {
    let last = text.chars().count().saturating_sub(1);
    let mut out = String::with_capacity(text.len());
    for (index, c) in text.chars().enumerate() {
        let edge = (c == ' ' && (index == 0 || index == last)) || (c == '#' && index == 0);
        if edge || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
        }
        // A log line stays one line, and a terminal what it was.
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// Whether a session was taken up again.
pub(super) fn is_resumed(connection: &CommonState) -> bool {
    connection.handshake_kind() == Some(HandshakeKind::Resumed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn serial_numbers_have_whole_bytes() {
        for (bytes, text) in [(&[0, 5, 0x3e][..], "053e"), (&[0xab, 1], "ab01"), (&[0, 0], "0"), (&[], "0")] {
            assert_eq!(super::serial_text(bytes), text);
        }
    }
}
