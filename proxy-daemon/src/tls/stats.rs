//! `ssl.*` and `tls_inspector.*`, as Envoy names them.

use std::sync::OnceLock;

use rustls::{CommonState, NamedGroup, SignatureScheme};

use super::peer::{self, CIPHERS};
use crate::stats::{Counter, Gauge, Histogram, Lease, Scope};

macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($counter:ident)* } { $($(#[$more:meta])* $field:ident: $type:ty),* }) => {
        $(#[$doc])*
        #[derive(Debug)]
        #[expect(missing_docs, reason = "each field is the Envoy statistic of the same name, which Envoy documents")]
        pub struct $name {
            $(pub $counter: Counter,)*
            $($(#[$more])* $field: $type,)*
        }
    };
}

counters! {
    /// `<owner>.ssl.*`: what the handshakes of one owner (a listener, a cluster) came to.
    SslStats {
        connection_error handshake session_reused no_certificate fail_verify_no_cert fail_verify_error fail_verify_san
        fail_verify_cert_hash ocsp_staple_failed ocsp_staple_omitted ocsp_staple_requests ocsp_staple_responses
        ssl_context_update_by_sds downstream_context_secrets_not_ready upstream_context_secrets_not_ready
    } {
        scope: Scope,
        _lease: Lease,
        versions: [OnceLock<Counter>; VERSIONS.len()],
        ciphers: [OnceLock<Counter>; CIPHERS.len()],
        curves: [OnceLock<Counter>; CURVES.len()],
        sigalgs: [OnceLock<Counter>; SIGALGS.len()]
    }
}

const VERSIONS: [&str; 2] = ["TLSv1.2", "TLSv1.3"];

/// Key exchange groups, by Envoy's names.
pub(super) const CURVES: &[(NamedGroup, &str)] = &[
    (NamedGroup::X25519, "X25519"),
    (NamedGroup::secp256r1, "P-256"),
    (NamedGroup::secp384r1, "P-384"),
    (NamedGroup::secp521r1, "P-521"),
    (NamedGroup::X25519MLKEM768, "X25519MLKEM768"),
    (NamedGroup::secp256r1MLKEM768, "SecP256r1MLKEM768"),
    (NamedGroup::MLKEM768, "MLKEM768"),
    (NamedGroup::MLKEM1024, "MLKEM1024"),
];

const SIGALGS: &[(SignatureScheme, &str)] = &[
    (SignatureScheme::RSA_PKCS1_SHA256, "rsa_pkcs1_sha256"),
    (SignatureScheme::RSA_PKCS1_SHA384, "rsa_pkcs1_sha384"),
    (SignatureScheme::RSA_PKCS1_SHA512, "rsa_pkcs1_sha512"),
    (SignatureScheme::RSA_PSS_SHA256, "rsa_pss_rsae_sha256"),
    (SignatureScheme::RSA_PSS_SHA384, "rsa_pss_rsae_sha384"),
    (SignatureScheme::RSA_PSS_SHA512, "rsa_pss_rsae_sha512"),
    (SignatureScheme::ECDSA_NISTP256_SHA256, "ecdsa_secp256r1_sha256"),
    (SignatureScheme::ECDSA_NISTP384_SHA384, "ecdsa_secp384r1_sha384"),
    (SignatureScheme::ECDSA_NISTP521_SHA512, "ecdsa_secp521r1_sha512"),
    (SignatureScheme::ED25519, "ed25519"),
];

impl SslStats {
    /// For a listener's or a cluster's scope. `factory` is what Envoy calls the part that makes its sockets.
    pub fn new(owner: &Scope, factory: &str) -> SslStats {
        let (scope, factory) = (owner.clone().child("ssl"), owner.clone().child(factory));
        // Taken first: what is counted by must not be somebody else's by then.
        let lease = owner.lease();
        SslStats {
            connection_error: scope.counter("connection_error"),
            handshake: scope.counter("handshake"),
            session_reused: scope.counter("session_reused"),
            no_certificate: scope.counter("no_certificate"),
            fail_verify_no_cert: scope.counter("fail_verify_no_cert"),
            fail_verify_error: scope.counter("fail_verify_error"),
            fail_verify_san: scope.counter("fail_verify_san"),
            fail_verify_cert_hash: scope.counter("fail_verify_cert_hash"),
            ocsp_staple_failed: scope.counter("ocsp_staple_failed"),
            ocsp_staple_omitted: scope.counter("ocsp_staple_omitted"),
            ocsp_staple_requests: scope.counter("ocsp_staple_requests"),
            ocsp_staple_responses: scope.counter("ocsp_staple_responses"),
            ssl_context_update_by_sds: factory.counter("ssl_context_update_by_sds"),
            downstream_context_secrets_not_ready: factory.counter("downstream_context_secrets_not_ready"),
            upstream_context_secrets_not_ready: factory.counter("upstream_context_secrets_not_ready"),
            scope,
            _lease: lease,
            versions: Default::default(),
            ciphers: Default::default(),
            curves: Default::default(),
            sigalgs: Default::default(),
        }
    }

    /// Counts a handshake that is complete.
    pub(super) fn complete(&self, connection: &CommonState) {
        self.handshake.inc();
        if peer::is_resumed(connection) {
            self.session_reused.inc();
        }
        if connection.peer_certificates().is_none_or(<[_]>::is_empty) {
            self.no_certificate.inc();
        }
        let version = peer::version_name(connection.protocol_version());
        self.count(
            "versions",
            "envoy_ssl_version",
            &self.versions,
            VERSIONS.iter().position(|it| *it == version),
            version,
        );
        if let Some(suite) = connection.negotiated_cipher_suite() {
            let at = CIPHERS.iter().position(|(id, _)| *id == suite.suite());
            self.count("ciphers", "envoy_ssl_cipher", &self.ciphers, at, at.map_or("", |at| CIPHERS[at].1));
        }
        if let Some(group) = connection.negotiated_key_exchange_group() {
            let at = CURVES.iter().position(|(id, _)| *id == group.name());
            self.count("curves", "envoy_ssl_curve", &self.curves, at, at.map_or("", |at| CURVES[at].1));
        }
    }

    /// Counts a handshake that failed. What the verification found has been counted; a peer that went away is none of ours.
    pub(super) fn failed(&self, error: &std::io::Error) {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::NoCertificatesPresented) => self.fail_verify_no_cert.inc(),
            Some(rustls::Error::InvalidCertificate(_)) | None => {}
            Some(_) => self.connection_error.inc(),
        }
    }

    /// Counts what a peer signed with.
    pub(super) fn sigalg(&self, scheme: SignatureScheme) {
        let at = SIGALGS.iter().position(|(id, _)| *id == scheme);
        self.count("sigalgs", "envoy_ssl_sigalg", &self.sigalgs, at, at.map_or("", |at| SIGALGS[at].1));
    }

    /// A counter is made when it first counts, as in Envoy: most of these never do.
    fn count(&self, kind: &str, label: &'static str, made: &[OnceLock<Counter>], at: Option<usize>, name: &str) {
        let Some(slot) = at.and_then(|at| made.get(at)) else { return };
        slot.get_or_init(|| self.scope.clone().child(kind).tagged_counter(label, name)).inc();
    }

    /// Shows when a certificate expires.
    pub(super) fn expires(&self, name: &str, unnamed: &str, at: u64) {
        let name = if name.is_empty() { unnamed } else { name };
        self.certificate(name).set(at);
    }

    fn certificate(&self, name: &str) -> Gauge {
        let scope = self.scope.clone().child("certificate").tagged("envoy_tls_certificate", name);
        scope.gauge("expiration_unix_time_seconds")
    }
}

/// `tls_inspector.*`
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "each field is the Envoy statistic of the same name, which Envoy documents")]
pub struct TlsInspectorStats {
    pub alpn_found: Counter,
    pub alpn_not_found: Counter,
    pub client_hello_too_large: Counter,
    pub sni_found: Counter,
    pub sni_not_found: Counter,
    pub tls_found: Counter,
    pub tls_not_found: Counter,
    pub bytes_processed: Histogram,
}

impl TlsInspectorStats {
    /// The same for all listeners, as in Envoy.
    pub fn new() -> TlsInspectorStats {
        let scope = Scope::new("tls_inspector");
        TlsInspectorStats {
            alpn_found: scope.counter("alpn_found"),
            alpn_not_found: scope.counter("alpn_not_found"),
            client_hello_too_large: scope.counter("client_hello_too_large"),
            sni_found: scope.counter("sni_found"),
            sni_not_found: scope.counter("sni_not_found"),
            tls_found: scope.counter("tls_found"),
            tls_not_found: scope.counter("tls_not_found"),
            bytes_processed: scope.histogram("bytes_processed"),
        }
    }
}

impl Default for TlsInspectorStats {
    fn default() -> TlsInspectorStats {
        TlsInspectorStats::new()
    }
}
