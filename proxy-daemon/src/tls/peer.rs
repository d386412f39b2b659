//! What a certificate says, as text.

use std::{
    cell::{OnceCell, RefCell},
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::HeaderValue;
use rustls::{CipherSuite, CommonState, HandshakeKind, ProtocolVersion, pki_types::CertificateDer};
use x509_parser::{
    extensions::GeneralName,
    prelude::{ASN1Time, FromDer, X509Certificate, X509Name},
};

use crate::config::model::{ClientCertDetails, SanType, TlsCertificate};

/// What a finished handshake came to, for access logs.
#[derive(Debug)]
pub struct TlsInfo {
    /// `TLSv1.2`, `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite, as Envoy names it.
    pub cipher: &'static str,
    /// The cipher suite's number; 0: none.
    pub cipher_id: u16,
    /// What the peer has shown, its own certificate first; empty: nothing.
    chain: Vec<CertificateDer<'static>>,
    /// What the peer was shown, where we know.
    local: Option<Arc<TlsCertificate>>,
    /// Read when it is first asked for.
    text: OnceCell<Option<Box<PeerText>>>,
    /// The same of our own certificate.
    local_text: OnceCell<Option<Box<PeerText>>>,
    /// `x-forwarded-client-cert`, written when it is first asked for: as many as are configured.
    forwarded: RefCell<Vec<(ClientCertDetails, Option<HeaderValue>)>>,
    /// It has been found good, in this very handshake.
    pub(super) validated: bool,
}

/// A certificate for an access log.
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
    /// Joined with commas; empty: none.
    pub ip_sans: String,
    /// Joined with commas; empty: none.
    pub email_sans: String,
    /// SHA-256, in hexadecimal digits.
    pub fingerprint_256: String,
    /// SHA-1, in hexadecimal digits.
    pub fingerprint_1: String,
    /// Its URIs.
    uris: Vec<String>,
    /// Its DNS names.
    dns_names: Vec<String>,
    /// PEM, with the escapes of URLs.
    pub pem: String,
    /// RFC 3339.
    pub valid_from: String,
    /// RFC 3339.
    pub valid_until: String,
}

impl TlsInfo {
    /// After the handshake. `local`: the certificate that was shown.
    pub fn new(connection: &CommonState, local: Option<Arc<TlsCertificate>>) -> TlsInfo {
        let chain = connection.peer_certificates().unwrap_or_default();
        TlsInfo {
            version: version_name(connection.protocol_version()),
            cipher: connection.negotiated_cipher_suite().map_or("", |suite| cipher_name(suite.suite())),
            cipher_id: connection.negotiated_cipher_suite().map_or(0, |suite| suite.suite().into()),
            chain: chain.to_vec(),
            local,
            text: OnceCell::new(),
            local_text: OnceCell::new(),
            forwarded: RefCell::default(),
            validated: false,
        }
    }

    /// What the peer's certificate says; `None` without one.
    pub fn peer(&self) -> Option<&PeerText> {
        let read = || self.chain.first().and_then(|der| PeerText::read(der)).map(Box::new);
        self.text.get_or_init(read).as_deref()
    }

    /// What our own certificate says.
    pub fn local(&self) -> Option<&PeerText> {
        let leaf = || self.local.as_ref().and_then(|local| local.key.cert.first());
        self.local_text.get_or_init(|| leaf().and_then(|der| PeerText::read(der)).map(Box::new)).as_deref()
    }

    /// Whether the peer has shown a certificate.
    pub fn has_certificate(&self) -> bool {
        !self.chain.is_empty()
    }

    /// Whether the peer's certificate was found good. One of a session that is resumed is not looked at again, as in Envoy.
    pub fn is_validated(&self) -> bool {
        self.validated
    }

    /// What `x-forwarded-client-cert` says of the peer's certificate, in Envoy's order; `None` where there is none, or no
    /// header can hold it. `json`: the format, whatever the details say.
    pub fn forwarded(&self, details: &ClientCertDetails, json: bool) -> Option<HeaderValue> {
        let details = ClientCertDetails { json, ..*details };
        let mut known = self.forwarded.borrow_mut();
        if let Some((_, value)) = known.iter().find(|(known, _)| *known == details) {
            return value.clone();
        }
        let text = if json { self.forwarded_json(&details) } else { self.forwarded_text(&details) };
        let value = text.and_then(|text| text.try_into().ok());
        known.push((details, value.clone()));
        value
    }

    fn forwarded_text(&self, details: &ClientCertDetails) -> Option<String> {
        let peer = self.peer()?;
        let mut parts: Vec<String> = Vec::new();
        let local = self.local().map(|local| local.uris.as_slice()).unwrap_or_default();
        parts.extend(local.iter().map(|uri| format!("By={uri}")));
        parts.push(format!("Hash={}", peer.fingerprint_256));
        if details.cert {
            parts.push(format!("Cert=\"{}\"", peer.pem));
        }
        if details.chain {
            let chain: String = self.chain.iter().map(|der| url_encoded_pem(der)).collect();
            parts.push(format!("Chain=\"{chain}\""));
        }
        if details.subject {
            parts.push(format!("Subject=\"{}\"", peer.subject));
        }
        if details.uri {
            match peer.uris.is_empty() {
                true => parts.push("URI=".to_owned()),
                false => parts.extend(peer.uris.iter().map(|uri| format!("URI={uri}"))),
            }
        }
        if details.dns {
            parts.extend(peer.dns_names.iter().map(|name| format!("DNS={name}")));
        }
        if details.issuer {
            parts.push(format!("Issuer=\"{}\"", peer.issuer));
        }
        Some(parts.join(";"))
    }

    /// An array of one object, with Envoy's keys in Envoy's order.
    fn forwarded_json(&self, details: &ClientCertDetails) -> Option<String> {
        let peer = self.peer()?;
        let mut object = Vec::new();
        // A text, or a list of texts, is always JSON.
        let mut put = |name: &str, value: serde_json::Value| object.push(format!("\"{name}\":{value}"));
        let local = self.local().map(|local| local.uris.as_slice()).unwrap_or_default();
        if !local.is_empty() {
            put("by", local.into());
        }
        put("hash", peer.fingerprint_256.as_str().into());
        if details.cert {
            put("cert", self.chain.first().map(|der| pem(der)).unwrap_or_default().into());
        }
        if details.chain {
            put("chain", self.chain.iter().map(|der| pem(der)).collect::<Vec<_>>().into());
        }
        if details.subject {
            put("subject", peer.subject.as_str().into());
        }
        if details.uri {
            put("uri", peer.uris.as_slice().into());
        }
        if details.dns {
            put("dns", peer.dns_names.as_slice().into());
        }
        if details.issuer {
            put("issuer", peer.issuer.as_str().into());
        }
        Some(format!("[{{{}}}]", object.join(",")))
    }
}

/// PEM as it stands in files.
fn pem(der: &[u8]) -> String {
    let escaped = url_encoded_pem(der);
    [("%20", " "), ("%0A", "\n"), ("%2B", "+"), ("%2F", "/"), ("%3D", "=")]
        .iter()
        .fold(escaped, |text, (escape, character)| text.replace(escape, character))
}

/// PEM with the escapes that Envoy makes.
fn url_encoded_pem(der: &[u8]) -> String {
    const LINE: usize = 64;
    let mut out = String::from("-----BEGIN%20CERTIFICATE-----%0A");
    for (index, c) in STANDARD.encode(der).chars().enumerate() {
        if index > 0 && index % LINE == 0 {
            out.push_str("%0A");
        }
        match c {
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            c => out.push(c),
        }
    }
    out.push_str("%0A-----END%20CERTIFICATE-----%0A");
    out
}

impl PeerText {
    /// Its URI names.
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// Its URI names, then its DNS names.
    pub fn uri_and_dns_names(&self) -> impl Iterator<Item = &str> {
        self.uris.iter().chain(&self.dns_names).map(String::as_str)
    }

    fn read(der: &CertificateDer<'_>) -> Option<PeerText> {
        let (_, parsed) = X509Certificate::from_der(der).ok()?;
        let names = alternative_names(&parsed);
        let of = |wanted: SanType| {
            let names = names.iter().filter(|(kind, _)| *kind == wanted).map(|(_, name)| name.clone());
            names.collect::<Vec<_>>()
        };
        let joined = |wanted: SanType| of(wanted).join(",");
        let validity = parsed.validity();
        Some(PeerText {
            subject: distinguished_name(parsed.subject()),
            issuer: distinguished_name(parsed.issuer()),
            serial: serial(&parsed),
            uri_sans: joined(SanType::Uri),
            dns_sans: joined(SanType::Dns),
            ip_sans: joined(SanType::IpAddress),
            email_sans: joined(SanType::Email),
            fingerprint_256: hex(&super::sha256(der)),
            fingerprint_1: hex(digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, der).as_ref()),
            uris: of(SanType::Uri),
            dns_names: of(SanType::Dns),
            pem: url_encoded_pem(der),
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

/// What the fuzzer `certificate` feeds: what a peer has shown. A log's line and a header stay one.
pub(super) fn fuzz(certificate: &CertificateDer<'static>) {
    let info = TlsInfo {
        version: "",
        cipher: "",
        cipher_id: 0,
        chain: vec![certificate.clone()],
        local: None,
        text: OnceCell::new(),
        local_text: OnceCell::new(),
        forwarded: RefCell::default(),
        validated: false,
    };
    let Some(peer) = info.peer() else { return };
    for text in [&peer.subject, &peer.issuer, &peer.serial, &peer.ip_sans, &peer.valid_from, &peer.valid_until] {
        assert!(!text.contains(char::is_control), "{text:?}");
    }
    let details =
        ClientCertDetails { subject: true, cert: true, chain: true, dns: true, uri: true, issuer: true, json: false };
    let _ = info.forwarded(&details, false);
    if let Some(json) = info.forwarded_json(&details) {
        assert!(serde_json::from_str::<serde_json::Value>(&json).is_ok(), "{json}");
    }
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
