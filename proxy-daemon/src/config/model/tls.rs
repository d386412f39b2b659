use std::{collections::HashMap, sync::Arc, time::Duration};

use culvert_xds_client::source::Source;
use rustls::{
    pki_types::{CertificateDer, ServerName, TrustAnchor},
    sign::CertifiedKey,
};

use super::{ResourceRef, StringMatcher};
use crate::tls::TicketKey;

/// A checked `DownstreamTlsContext`: how a filter chain's connections are decrypted.
#[derive(Debug)]
pub struct DownstreamTlsContext {
    /// What both directions have.
    pub common: CommonTlsContext,
    /// A client without a certificate is refused.
    pub require_client_certificate: bool,
    /// A client that names no server is refused.
    pub require_sni: bool,
    /// How sessions are taken up again by a ticket.
    pub session_tickets: SessionTickets,
    /// TLS 1.2 sessions may be taken up again by their id (`disable_stateful_session_resumption` is not set).
    pub session_ids: bool,
    /// How long a session may be taken up again, in whole seconds; `None`: for as long as the library says.
    pub session_timeout: Option<Duration>,
}

impl DownstreamTlsContext {
    /// The secrets that it needs, with what each has to be.
    pub fn secrets(&self) -> impl Iterator<Item = (SecretType, &SecretRef)> {
        let keys = match &self.session_tickets {
            SessionTickets::Secret(secret) => Some((SecretType::SessionTicketKeys, secret)),
            SessionTickets::Disabled | SessionTickets::OwnKeys | SessionTickets::Keys(_) => None,
        };
        self.common.secrets().chain(keys)
    }
}

/// What encrypts session tickets.
#[derive(Debug)]
pub enum SessionTickets {
    /// There are none: `disable_stateless_session_resumption`.
    Disabled,
    /// Keys that the context makes for itself, and changes.
    OwnKeys,
    /// `session_ticket_keys`.
    Keys(Arc<SessionTicketKeys>),
    /// `session_ticket_keys_sds_secret_config`.
    Secret(SecretRef),
}

/// A checked `TlsSessionTicketKeys`.
#[derive(Debug)]
pub struct SessionTicketKeys {
    /// The first encrypts, all decrypt. At least one.
    pub keys: Vec<TicketKey>,
}

/// A checked `UpstreamTlsContext`: how a cluster's connections are encrypted.
#[derive(Debug, Clone)]
pub struct UpstreamTlsContext {
    /// What both directions have.
    pub common: CommonTlsContext,
    /// The name that hosts are asked for; `None`: none is sent.
    pub sni: Option<ServerName<'static>>,
    /// The host's `hostname` is sent as the name, where it has one.
    pub auto_host_sni: bool,
    /// The host's certificate must be for the name that was sent.
    pub auto_sni_san_validation: bool,
    /// Sessions that are kept to be taken up again; 0: none. Default 1.
    pub max_session_keys: usize,
    /// The message it was made of, with the content of its files: contexts are alike where these are.
    pub digest: [u8; 32],
}

impl PartialEq for UpstreamTlsContext {
    fn eq(&self, other: &UpstreamTlsContext) -> bool {
        self.digest == other.digest
    }
}

/// A checked `CommonTlsContext`.
#[derive(Debug, Clone)]
pub struct CommonTlsContext {
    /// Versions and algorithms.
    pub params: TlsParameters,
    /// What we show to peers.
    pub certificates: Certificates,
    /// What peers must show to us.
    pub validation: Validation,
    /// In the order of preference. Empty: none, or what the protocol of the connection asks for.
    pub alpn_protocols: Vec<Vec<u8>>,
}

impl CommonTlsContext {
    /// The secrets that it needs, with what each has to be.
    pub fn secrets(&self) -> impl Iterator<Item = (SecretType, &SecretRef)> {
        let certificates = match &self.certificates {
            Certificates::Inline(_) => [].as_slice(),
            Certificates::Secrets(secrets) => secrets,
        };
        let validation = match &self.validation {
            Validation::Secret(secret) | Validation::Combined(_, secret) => Some(secret),
            Validation::None | Validation::Inline(_) => None,
        };
        let certificates = certificates.iter().map(|secret| (SecretType::TlsCertificate, secret));
        certificates.chain(validation.map(|secret| (SecretType::ValidationContext, secret)))
    }
}

/// A checked `TlsParameters`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsParameters {
    /// TLS 1.2 may be spoken.
    pub tls12: bool,
    /// TLS 1.3 may be spoken.
    pub tls13: bool,
    /// The suites of TLS 1.2, by Envoy's names; empty: all that the library has.
    pub cipher_suites: Vec<rustls::CipherSuite>,
    /// Key exchange groups; empty: the library's.
    pub ecdh_curves: Vec<rustls::NamedGroup>,
}

/// Where certificates come from.
#[derive(Debug, Clone)]
pub enum Certificates {
    /// Written into the context, or into files that it names. Empty: none.
    Inline(Vec<Arc<TlsCertificate>>),
    /// Secrets.
    Secrets(Vec<SecretRef>),
}

/// Where a validation context comes from.
#[derive(Debug, Clone)]
pub enum Validation {
    /// Peers are not verified.
    None,
    /// Written into the context.
    Inline(Arc<CertificateValidationContext>),
    /// A secret.
    Secret(SecretRef),
    /// A secret, merged over what is written into the context.
    Combined(Arc<CertificateValidationContext>, SecretRef),
}

/// A checked `SdsSecretConfig`: a secret that is somewhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretRef {
    /// `static_resources.secrets` of the bootstrap holds it, by this name.
    Static(Arc<str>),
    /// The secret discovery service delivers it.
    Discovered(ResourceRef),
}

impl SecretRef {
    /// What the secret is known by.
    pub fn name(&self) -> SecretName {
        match self {
            SecretRef::Static(name) => SecretName { source: None, name: Arc::clone(name) },
            SecretRef::Discovered(ResourceRef { name, from }) => {
                SecretName { source: Some(Arc::clone(&from.source)), name: Arc::clone(name) }
            }
        }
    }
}

/// The name of a secret, with where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecretName {
    /// Where the secret discovery service has it from; `None`: `static_resources.secrets` of the bootstrap holds it.
    pub source: Option<Arc<Source>>,
    /// Its name.
    pub name: Arc<str>,
}

/// What a secret is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SecretType {
    /// `tls_certificate`
    TlsCertificate,
    /// `validation_context`
    ValidationContext,
    /// `session_ticket_keys`
    SessionTicketKeys,
    /// `generic_secret`
    GenericSecret,
}

impl SecretType {
    /// The field of `Secret` that holds it.
    pub fn field(self) -> &'static str {
        match self {
            SecretType::TlsCertificate => "tls_certificate",
            SecretType::ValidationContext => "validation_context",
            SecretType::SessionTicketKeys => "session_ticket_keys",
            SecretType::GenericSecret => "generic_secret",
        }
    }
}

impl Secret {
    /// What it is.
    pub fn secret_type(&self) -> SecretType {
        match self {
            Secret::TlsCertificate(_) => SecretType::TlsCertificate,
            Secret::ValidationContext(_) => SecretType::ValidationContext,
            Secret::SessionTicketKeys(_) => SecretType::SessionTicketKeys,
            Secret::Generic(_) => SecretType::GenericSecret,
        }
    }
}

/// A checked `Secret`.
#[derive(Debug, Clone)]
pub enum Secret {
    /// A certificate with its key.
    TlsCertificate(Arc<TlsCertificate>),
    /// What peers must show.
    ValidationContext(Arc<CertificateValidationContext>),
    /// Keys of session tickets.
    SessionTicketKeys(Arc<SessionTicketKeys>),
    /// What filters use: keys by their ids.
    Generic(Arc<GenericSecret>),
}

/// `generic_secret.secrets`: keys of signatures, by their ids.
#[derive(Clone, Default)]
pub struct GenericSecret {
    /// Each as it is used: a line end at its end is gone.
    pub keys: HashMap<String, Box<[u8]>>,
}

impl std::fmt::Debug for GenericSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.keys.keys()).finish()
    }
}

/// A checked `TlsCertificate`: chain and key belong together.
#[derive(Debug)]
pub struct TlsCertificate {
    /// The secret's name, or empty.
    pub name: String,
    /// The file that the chain came from, or `<inline>`.
    pub chain_path: String,
    /// Chain and key.
    pub key: Arc<CertifiedKey>,
    /// The names that the leaf is for, in lower case; a wildcard as it stands.
    pub dns_names: Vec<String>,
}

/// A checked `CertificateValidationContext`.
#[derive(Debug, Clone, Default)]
pub struct CertificateValidationContext {
    /// The secret's name, or empty.
    pub name: String,
    /// Issuers that are trusted; `None`: chains are not verified.
    pub trusted_ca: Option<Arc<TrustedCa>>,
    /// One of these must match one of the certificate's names; empty: any name will do.
    pub match_typed_subject_alt_names: Vec<Arc<SubjectAltNameMatcher>>,
    /// SHA-256 of certificates that are taken.
    pub verify_certificate_hash: Vec<[u8; 32]>,
    /// SHA-256 of public keys that are taken.
    pub verify_certificate_spki: Vec<[u8; 32]>,
    /// `ACCEPT_UNTRUSTED`: what fails is counted, and taken all the same.
    pub accept_untrusted: bool,
    /// Clients are not told which issuers are trusted.
    pub suppress_client_ca_list: bool,
}

impl CertificateValidationContext {
    /// Whether it looks at certificates at all.
    pub fn verifies(&self) -> bool {
        self.trusted_ca.is_some()
            || !self.match_typed_subject_alt_names.is_empty()
            || !self.verify_certificate_hash.is_empty()
            || !self.verify_certificate_spki.is_empty()
    }

    /// This one with `over` merged into it as protobuf merges messages: lists append, what is set replaces.
    pub fn merged(&self, over: &CertificateValidationContext) -> CertificateValidationContext {
        let mut merged = self.clone();
        merged.name.clone_from(&over.name);
        merged.trusted_ca = over.trusted_ca.clone().or(merged.trusted_ca);
        merged.match_typed_subject_alt_names.extend_from_slice(&over.match_typed_subject_alt_names);
        merged.verify_certificate_hash.extend_from_slice(&over.verify_certificate_hash);
        merged.verify_certificate_spki.extend_from_slice(&over.verify_certificate_spki);
        merged.accept_untrusted |= over.accept_untrusted;
        merged.suppress_client_ca_list |= over.suppress_client_ca_list;
        merged
    }
}

/// A bundle of trusted certificates.
#[derive(Debug)]
pub struct TrustedCa {
    /// The file that it came from, or `<inline>`.
    pub path: String,
    /// At least one.
    pub certificates: Vec<CertificateDer<'static>>,
    /// The same, as chains are verified by: read once, for all contexts that trust them.
    pub anchors: Vec<TrustAnchor<'static>>,
}

/// A checked `SubjectAltNameMatcher`.
#[derive(Debug)]
pub struct SubjectAltNameMatcher {
    /// Which names it looks at; `None`: all kinds.
    pub san_type: Option<SanType>,
    /// What the name must be.
    pub matcher: StringMatcher,
}

/// `SubjectAltNameMatcher.SanType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SanType {
    /// `rfc822Name`
    Email,
    /// `dNSName`
    Dns,
    /// `uniformResourceIdentifier`
    Uri,
    /// `iPAddress`
    IpAddress,
}
