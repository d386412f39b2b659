//! Judges a peer's certificate as Envoy does: the chain, then the names, then the pins.

use std::{fmt::Write as _, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::{
    extensions::ParsedExtension,
    prelude::{FromDer, X509Certificate},
};

use super::{peer, stats::SslStats};
use crate::{
    config::model::{CertificateValidationContext, SanType, StringMatcher, StringPattern, SubjectAltNameMatcher},
    stats::Counter,
};

/// Whose certificates are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// A downstream connection's.
    Client {
        /// One without a certificate is refused.
        required: bool,
    },
    /// An upstream connection's.
    Server {
        /// Its certificate must be for the name that it was asked for.
        by_name: bool,
    },
}

/// What a certificate has to be for.
#[derive(Debug, Clone, Copy, Default)]
struct Names<'a> {
    /// The name that was sent, where it takes the place of those that are configured.
    asked_for: Option<&'a str>,
    /// What a request calls the host. The configured names count besides.
    called: Option<&'a str>,
}

/// Verifies the certificates of one context's peers, and counts what fails.
#[derive(Debug)]
pub(super) struct PeerVerifier {
    peer: Peer,
    context: Option<Arc<CertificateValidationContext>>,
    subjects: Vec<DistinguishedName>,
    provider: Arc<CryptoProvider>,
    stats: Arc<SslStats>,
}

/// What does not hold; the text of an alert's cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Mismatch {
    #[error("verify cert failed: SAN matcher: {0}")]
    San(String),
    #[error("verify cert failed: hash list mismatch")]
    Hash,
    #[error("verify cert failed: nothing to verify it by")]
    NotValidated,
}

impl Mismatch {
    fn error(self) -> Error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(self))))
    }
}

/// Why a certificate is not good, and where that is counted.
type Unfit = (Error, Option<Counter>);

impl PeerVerifier {
    pub(super) fn new(
        peer: Peer,
        context: Option<Arc<CertificateValidationContext>>,
        provider: Arc<CryptoProvider>,
        stats: Arc<SslStats>,
    ) -> PeerVerifier {
        // Clients alone are told whom we trust.
        let tells = matches!(peer, Peer::Client { .. });
        let trusted =
            context.iter().filter(|it| tells && !it.suppress_client_ca_list).filter_map(|it| it.trusted_ca.as_ref());
        let subjects = trusted.flat_map(|ca| &ca.anchors).map(|anchor| DistinguishedName::in_sequence(&anchor.subject));
        let subjects = subjects.collect();
        PeerVerifier { peer, context, subjects, provider, stats }
    }

    fn judge(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        Names { asked_for, called }: Names<'_>,
        now: UnixTime,
    ) -> Result<(), Unfit> {
        let Some(context) = &self.context else {
            // A client's certificate that is demanded must be good for something, and so must one that has to be for a name.
            return match self.peer {
                Peer::Server { .. } if called.is_none() => Ok(()),
                Peer::Client { .. } | Peer::Server { .. } => Err((Mismatch::NotValidated.error(), None)),
            };
        };
        if called.is_some() && !context.verifies() {
            return Err((Mismatch::NotValidated.error(), None));
        }
        let mut validated = false;
        if context.trusted_ca.is_some() {
            let chain = self.chain(context, end_entity, intermediates, now);
            chain.map_err(|error| (error, Some(self.stats.fail_verify_error)))?;
            validated = true;
        }
        if let Some(called) = called {
            let unfit = |error| (error, Some(self.stats.fail_verify_san));
            let names = names(end_entity).map_err(unfit)?;
            let fits = |(kind, known): &(SanType, String)| match kind {
                SanType::Dns => covers(known, called),
                SanType::Email | SanType::Uri | SanType::IpAddress => known == called,
            };
            if !names.iter().any(fits) {
                return Err(unfit(Mismatch::San(other_names(Some(called), &names)).error()));
            }
            validated = true;
        }
        let matchers = &context.match_typed_subject_alt_names;
        if asked_for.is_some() || !matchers.is_empty() {
            let unfit = |error| (error, Some(self.stats.fail_verify_san));
            let names = names(end_entity).map_err(unfit)?;
            // The name that was sent takes the place of the configured ones.
            let fits = match asked_for {
                Some(name) => names.iter().any(|(kind, known)| *kind == SanType::Dns && covers(known, name)),
                None => matchers.iter().any(|matcher| matches(matcher, &names)),
            };
            if !fits {
                return Err(unfit(Mismatch::San(other_names(asked_for, &names)).error()));
            }
            validated = true;
        }
        if !context.verify_certificate_hash.is_empty() || !context.verify_certificate_spki.is_empty() {
            if !pinned(context, end_entity) {
                return Err((Mismatch::Hash.error(), Some(self.stats.fail_verify_cert_hash)));
            }
            validated = true;
        }
        let enough = validated || matches!(self.peer, Peer::Server { .. });
        if enough { Ok(()) } else { Err((Mismatch::NotValidated.error(), None)) }
    }

    /// The name that was sent, where certificates have to be for it.
    fn asked_for<'a>(&self, server_name: &'a ServerName<'_>) -> Option<&'a str> {
        match server_name {
            ServerName::DnsName(name) if self.peer == Peer::Server { by_name: true } => Some(name.as_ref()),
            // An address stands for no name: nothing was sent then.
            _ => None,
        }
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        names: Names<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let verdict = self.judge(end_entity, intermediates, names, now).map_err(|(error, counter)| {
            if let Some(counter) = counter {
                counter.inc();
            }
            error
        });
        if self.context.as_ref().is_some_and(|context| context.accept_untrusted) { Ok(()) } else { verdict }
    }

    /// Whether what a client has shown is good, also where it was let in all the same. Counts nothing.
    pub(super) fn finds_good(&self, shown: &[CertificateDer<'_>]) -> bool {
        let Some((end_entity, intermediates)) = shown.split_first() else { return false };
        // What is not let in otherwise need not be looked at again.
        let accepts = self.context.as_ref().is_some_and(|context| context.accept_untrusted);
        !accepts || self.judge(end_entity, intermediates, Names::default(), UnixTime::now()).is_ok()
    }

    /// A path from the certificate to a trusted one; that may be the certificate itself.
    fn chain(
        &self,
        context: &CertificateValidationContext,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let trusted = context.trusted_ca.iter().flat_map(|ca| &ca.certificates);
        if trusted.clone().any(|certificate| certificate == end_entity) {
            return self.trusted_itself(end_entity, now);
        }
        let usage = match self.peer {
            Peer::Client { .. } => KeyUsage::client_auth(),
            Peer::Server { .. } => KeyUsage::server_auth(),
        };
        let algorithms = self.provider.signature_verification_algorithms.all;
        let leaf = EndEntityCert::try_from(end_entity).map_err(chain_error)?;
        let anchors = context.trusted_ca.as_ref().map_or(&[][..], |ca| &ca.anchors);
        leaf.verify_for_usage(algorithms, anchors, intermediates, now, usage, None, None).map(drop).map_err(chain_error)
    }

    /// What is left to check of a certificate that is trusted by itself: its time, and what it is for.
    fn trusted_itself(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        let bad = Error::InvalidCertificate;
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| bad(CertificateError::BadEncoding))?;
        let (validity, now) = (parsed.validity(), i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        if now < validity.not_before.timestamp() {
            return Err(bad(CertificateError::NotValidYet));
        }
        if now > validity.not_after.timestamp() {
            return Err(bad(CertificateError::Expired));
        }
        let fits = parsed.extensions().iter().all(|extension| match extension.parsed_extension() {
            ParsedExtension::ExtendedKeyUsage(usage) => {
                usage.any
                    || match self.peer {
                        Peer::Client { .. } => usage.client_auth,
                        Peer::Server { .. } => usage.server_auth,
                    }
            }
            _ => true,
        });
        if fits { Ok(()) } else { Err(bad(CertificateError::InvalidPurpose)) }
    }

    fn signatures(&self) -> &WebPkiSupportedAlgorithms {
        &self.provider.signature_verification_algorithms
    }

    fn count_signature(&self, signature: &DigitallySignedStruct) {
        self.stats.sigalg(signature.scheme);
    }
}

fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as Chain;
    let kind = match error {
        Chain::BadDer | Chain::BadDerTime | Chain::TrailingData(_) => CertificateError::BadEncoding,
        Chain::CertExpired { .. } => CertificateError::Expired,
        Chain::CertNotValidYet { .. } => CertificateError::NotValidYet,
        Chain::CertRevoked => CertificateError::Revoked,
        Chain::UnknownIssuer => CertificateError::UnknownIssuer,
        Chain::InvalidSignatureForPublicKey => CertificateError::BadSignature,
        Chain::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    };
    Error::InvalidCertificate(kind)
}

type Known = Vec<(SanType, String)>;

fn names(certificate: &CertificateDer<'_>) -> Result<Known, Error> {
    let parsed = X509Certificate::from_der(certificate);
    let (_, parsed) = parsed.map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
    Ok(peer::alternative_names(&parsed))
}

/// What a certificate is for instead, for the log: as much of it as anybody would read.
fn other_names(asked_for: Option<&str>, names: &Known) -> String {
    const NAMES: usize = 5;
    const CHARACTERS: usize = 100;
    let shown = names.iter().take(NAMES).map(|(kind, name)| {
        let kind = match kind {
            SanType::Email => "email",
            SanType::Dns => "DNS",
            SanType::Uri => "URI",
            SanType::IpAddress => "IP",
        };
        let cut: String = name.chars().take(CHARACTERS).flat_map(char::escape_debug).collect();
        let more = if name.chars().nth(CHARACTERS).is_some() { "..." } else { "" };
        format!("{kind}:{cut}{more}")
    });
    let shown: Vec<String> = shown.collect();
    let mut text = match shown.is_empty() {
        true => "the certificate has no alternative names".to_owned(),
        false => format!("the certificate is for {}", shown.join(", ")),
    };
    if names.len() > NAMES {
        let _ = write!(text, " and {} more", names.len() - NAMES);
    }
    match asked_for {
        Some(name) => text + &format!(", not for {:?}", name.chars().take(CHARACTERS).collect::<String>()),
        None => text,
    }
}

/// Whether one of the names matches.
fn matches(matcher: &SubjectAltNameMatcher, names: &Known) -> bool {
    names.iter().any(|(kind, name)| {
        if matcher.san_type.is_some_and(|wanted| wanted != *kind) {
            return false;
        }
        match (&matcher.matcher, kind) {
            // The certificate's name may hold a wildcard.
            (StringMatcher { pattern: StringPattern::Exact(wanted), .. }, SanType::Dns) => covers(name, wanted),
            (matcher, _) => matcher.matches(name),
        }
    })
}

/// Whether a DNS name of a certificate is for `wanted`; `*` stands for one label at the front.
pub(super) fn covers(presented: &str, wanted: &str) -> bool {
    if presented.eq_ignore_ascii_case(wanted) {
        return true;
    }
    let Some(suffix) = presented.strip_prefix('*').filter(|suffix| suffix.starts_with('.')) else { return false };
    wanted
        .split_once('.')
        .is_some_and(|(label, _)| !label.is_empty() && wanted[label.len()..].eq_ignore_ascii_case(suffix))
}

fn pinned(context: &CertificateValidationContext, certificate: &CertificateDer<'_>) -> bool {
    let is_in = |list: &[[u8; 32]], bytes: &[u8]| list.iter().any(|pin| *pin == sha256(bytes));
    if !context.verify_certificate_hash.is_empty() && is_in(&context.verify_certificate_hash, certificate) {
        return true;
    }
    !context.verify_certificate_spki.is_empty()
        && X509Certificate::from_der(certificate)
            .is_ok_and(|(_, parsed)| is_in(&context.verify_certificate_spki, parsed.public_key().raw))
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    if let Some(suite) = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13() {
        // The suite is one of TLS 1.3, and its hash has 32 bytes.
        digest.copy_from_slice(suite.common.hash_provider.hash(bytes).as_ref());
    }
    digest
}

/// The methods that both traits of rustls want; `$verifier`: where the [`PeerVerifier`] is that does it.
macro_rules! signatures {
    ($self:ident => $verifier:expr) => {
        fn verify_tls12_signature(
            &$self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            $verifier.count_signature(dss);
            verify_tls12_signature(message, cert, dss, $verifier.signatures())
        }

        fn verify_tls13_signature(
            &$self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            $verifier.count_signature(dss);
            verify_tls13_signature(message, cert, dss, $verifier.signatures())
        }

        fn supported_verify_schemes(&$self) -> Vec<SignatureScheme> {
            $verifier.signatures().supported_schemes()
        }
    };
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let names = Names { asked_for: self.asked_for(server_name), called: None };
        self.verify(end_entity, intermediates, names, now)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!(self => self);
}

/// Judges the certificates of hosts that have to be for what a request calls them, too.
#[derive(Debug)]
pub(super) struct NameVerifier {
    verifier: Arc<PeerVerifier>,
    /// `None`: what they are asked for.
    called: Option<Box<str>>,
}

impl NameVerifier {
    pub(super) fn new(verifier: Arc<PeerVerifier>) -> NameVerifier {
        NameVerifier { verifier, called: None }
    }

    /// The same for a host that is called so, and asked for otherwise.
    pub(super) fn of(&self, called: &str) -> NameVerifier {
        NameVerifier { verifier: Arc::clone(&self.verifier), called: Some(called.into()) }
    }
}

impl ServerCertVerifier for NameVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let sent = server_name.to_str();
        let called = self.called.as_deref().unwrap_or(&sent);
        let names = Names { asked_for: self.verifier.asked_for(server_name), called: Some(called) };
        self.verifier.verify(end_entity, intermediates, names, now)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!(self => self.verifier);
}

impl ClientCertVerifier for PeerVerifier {
    fn offer_client_auth(&self) -> bool {
        let wanted = self.context.as_ref().is_some_and(|it| {
            it.trusted_ca.is_some() || !it.verify_certificate_hash.is_empty() || !it.verify_certificate_spki.is_empty()
        });
        wanted || self.client_auth_mandatory()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.peer == Peer::Client { required: true }
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, Names::default(), now)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!(self => self);
}

/// What the fuzzer `certificate` feeds: what a peer has shown. What is told of it is one line.
pub(super) fn fuzz(certificate: &CertificateDer<'_>) {
    let _ = EndEntityCert::try_from(certificate);
    let pins = CertificateValidationContext { verify_certificate_spki: vec![[0; 32]], ..Default::default() };
    assert!(!pinned(&pins, certificate));
    let Ok(names) = names(certificate) else { return };
    let told = other_names(Some("a.example"), &names);
    assert!(!told.contains(char::is_control), "{told:?}");
    for (_, name) in &names {
        assert!(covers(name, name));
        let _ = covers(name, "a.example");
    }
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
