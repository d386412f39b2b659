//! TLS: what configuration says of it made into rustls' contexts, the verification of peers, and secrets that arrive or
//! change later.
//!
//! A context is built on the control thread, and swapped in: handshakes that begin afterwards use it, connections that are
//! there stay as they are.

mod certificate;
mod client;
mod control_plane;
mod peer;
mod secrets;
mod server;
mod stats;
#[cfg(test)]
pub(crate) mod testing;
mod tickets;
mod verify;

use std::sync::{Arc, OnceLock};

use rustls::{SupportedProtocolVersion, crypto::CryptoProvider};

pub use self::{
    certificate::{Material, SocketCertificates, certificate_json, tls_certificate, trusted_ca},
    client::{AlpnFallback, ClientTls},
    control_plane::{not_ready, secure_servers},
    peer::{PeerText, TlsInfo},
    secrets::{SecretUser, Secrets},
    server::ServerTls,
    stats::{SslStats, TlsInspectorStats},
    tickets::TicketKey,
    verify::sha256,
};
use crate::config::model::TlsParameters;

/// What a request calls its host, which the handshake with that goes by (`upstream_http_protocol_options`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerName {
    /// In lower case.
    pub name: Box<str>,
    /// The host is asked for it, instead of any other name.
    pub sent: bool,
    /// The host's certificate has to be for it.
    pub checked: bool,
}

/// What the fuzzer `certificate` feeds: a certificate as a peer shows it.
pub fn fuzz_certificate(bytes: &[u8]) {
    let certificate = rustls::pki_types::CertificateDer::from(bytes.to_vec());
    peer::fuzz(&certificate);
    verify::fuzz(&certificate);
}

/// The library's algorithms.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
}

/// The library's algorithms, as far as the parameters allow them, in the order of the parameters.
fn restricted(params: &TlsParameters) -> Arc<CryptoProvider> {
    if params.cipher_suites.is_empty() && params.ecdh_curves.is_empty() {
        return Arc::clone(provider());
    }
    let mut restricted = CryptoProvider::clone(provider());
    if !params.cipher_suites.is_empty() {
        // As in Envoy, those of TLS 1.3 cannot be chosen.
        let (tls13, tls12): (Vec<_>, Vec<_>) =
            restricted.cipher_suites.into_iter().partition(|suite| suite.tls13().is_some());
        let chosen =
            params.cipher_suites.iter().filter_map(|id| tls12.iter().find(|suite| suite.suite() == *id).copied());
        restricted.cipher_suites = tls13.into_iter().chain(chosen).collect();
    }
    if !params.ecdh_curves.is_empty() {
        let all = rustls::crypto::aws_lc_rs::ALL_KX_GROUPS;
        let chosen = params.ecdh_curves.iter().filter_map(|id| all.iter().find(|group| group.name() == *id).copied());
        restricted.kx_groups = chosen.collect();
    }
    Arc::new(restricted)
}

fn versions(params: &TlsParameters) -> Vec<&'static SupportedProtocolVersion> {
    let tls12 = params.tls12.then_some(&rustls::version::TLS12);
    tls12.into_iter().chain(params.tls13.then_some(&rustls::version::TLS13)).collect()
}
