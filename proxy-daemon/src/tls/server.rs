//! Downstream contexts.

use std::{
    io,
    sync::{Arc, Weak},
};

use arc_swap::ArcSwapOption;
use rustls::{
    HandshakeKind, ServerConfig, ServerConnection,
    crypto::aws_lc_rs::Ticketer,
    server::{
        Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier,
        danger::ClientCertVerifier,
    },
    sign::CertifiedKey,
};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor, server::TlsStream};

use super::{
    certificate::{self, SocketCertificates},
    peer::TlsInfo,
    secrets::{Needed, SecretUser, Secrets, Subscribed},
    stats::SslStats,
    tickets::{self, AgingSessions, AgingTickets, KeyedTickets},
    verify::{Peer, PeerVerifier, covers},
};
use crate::config::model::{DownstreamTlsContext, SessionTicketKeys, SessionTickets, TlsCertificate};
use crate::listener::DownstreamStream;

/// A filter chain's transport socket, shared by all workers.
pub struct ServerTls {
    config: Arc<DownstreamTlsContext>,
    secrets: Arc<Secrets>,
    _subscribed: Subscribed,
    stats: Arc<SslStats>,
    /// Empty for as long as a secret is missing.
    current: ArcSwapOption<Context>,
}

struct Context {
    config: Arc<ServerConfig>,
    /// The same for clients that offer none of its protocols; `None`: it has none.
    without_alpn: Option<Arc<ServerConfig>>,
    resolver: Arc<Resolver>,
    /// What judges clients' certificates; `None`: they are not asked for any.
    verifier: Option<Arc<PeerVerifier>>,
    shown: SocketCertificates,
}

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerTls").field("config", &self.config).finish_non_exhaustive()
    }
}

impl ServerTls {
    /// Builds the context, now or when its secrets arrive.
    ///
    /// # Errors
    /// What the library does not take.
    pub fn new(
        config: Arc<DownstreamTlsContext>,
        stats: Arc<SslStats>,
        secrets: &Arc<Secrets>,
    ) -> Result<Arc<ServerTls>, String> {
        let tls = Arc::new_cyclic(|tls: &Weak<ServerTls>| {
            let _subscribed = secrets.subscribe(config.secrets(), Weak::clone(tls) as Weak<dyn SecretUser>);
            ServerTls { config, secrets: Arc::clone(secrets), _subscribed, stats, current: ArcSwapOption::empty() }
        });
        tls.build()?;
        Ok(tls)
    }

    fn build(&self) -> Result<bool, String> {
        let Some(needed) = self.secrets.resolve(&self.config.common) else { return Ok(false) };
        let keys = match &self.config.session_tickets {
            SessionTickets::Secret(secret) => match self.secrets.ticket_keys(secret) {
                Some(keys) => Some(keys),
                None => return Ok(false),
            },
            SessionTickets::Keys(keys) => Some(Arc::clone(keys)),
            SessionTickets::OwnKeys | SessionTickets::Disabled => None,
        };
        let context = build(&self.config, needed, keys, &self.stats)?;
        self.current.store(Some(Arc::new(context)));
        Ok(true)
    }

    /// Shakes hands with a client; with what the handshake came to.
    ///
    /// # Errors
    /// Counted: a secret is missing, or the handshake failed.
    pub async fn accept(&self, stream: DownstreamStream) -> io::Result<(TlsStream<DownstreamStream>, TlsInfo)> {
        let Some(context) = self.current.load_full() else {
            self.stats.downstream_context_secrets_not_ready.inc();
            return Err(io::Error::other("the certificates have not arrived yet"));
        };
        let config = Arc::clone(&context.config);
        // The library does not tell which certificate it has shown.
        let outcome = match context.resolver.certificates.as_slice() {
            [only] if context.without_alpn.is_none() => {
                TlsAcceptor::from(config).accept(stream).await.map(|stream| (stream, Some(Arc::clone(only))))
            }
            _ => context.choose_and_accept(stream).await,
        };
        match outcome {
            Ok((stream, shown)) => {
                self.stats.complete(stream.get_ref().1);
                let mut info = TlsInfo::new(stream.get_ref().1, shown);
                info.validated = context.finds_good(stream.get_ref().1);
                Ok((stream, info))
            }
            Err(error) => {
                self.stats.failed(&error);
                Err(error)
            }
        }
    }

    /// What `/certs` shows: the trusted issuers and our own certificates, where the secrets are there.
    pub fn certificates(&self) -> Option<SocketCertificates> {
        self.current.load().as_ref().map(|context| context.shown.clone())
    }
}

impl Context {
    /// Whether a client's certificate was found good in this handshake.
    fn finds_good(&self, connection: &ServerConnection) -> bool {
        let resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
        let shown = connection.peer_certificates().unwrap_or_default();
        !resumed && self.verifier.as_ref().is_some_and(|verifier| verifier.finds_good(shown))
    }

    /// Shakes hands in the way that the client's first message asks for.
    async fn choose_and_accept(
        &self,
        stream: DownstreamStream,
    ) -> io::Result<(TlsStream<DownstreamStream>, Option<Arc<TlsCertificate>>)> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let hello = start.client_hello();
        let shown = self.resolver.choose(&hello).cloned();
        // A client of which no protocol is known here gets none, as from Envoy; the library would refuse it.
        let knows = |offered: &[u8]| self.config.alpn_protocols.iter().any(|own| own == offered);
        let agrees = hello.alpn().is_some_and(|mut offered| offered.any(knows));
        let config = self.without_alpn.as_ref().filter(|_| !agrees).unwrap_or(&self.config);
        let config = Arc::clone(config);
        Ok((start.into_stream(config).await?, shown))
    }
}

impl SecretUser for ServerTls {
    fn is_built(&self) -> bool {
        self.current.load().is_some()
    }

    fn secrets_changed(&self, times: u64) {
        match self.build() {
            Ok(true) => self.stats.ssl_context_update_by_sds.add(times),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "a changed secret cannot be used; the context before stays"),
        }
    }
}

fn build(
    config: &DownstreamTlsContext,
    needed: Needed,
    ticket_keys: Option<Arc<SessionTicketKeys>>,
    stats: &Arc<SslStats>,
) -> Result<Context, String> {
    let common = &config.common;
    let provider = super::restricted(&common.params);
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&super::versions(&common.params))
        .map_err(|error| error.to_string())?;
    let required = config.require_client_certificate;
    let verifier = (required || needed.validation.is_some()).then(|| {
        let peer = Peer::Client { required };
        Arc::new(PeerVerifier::new(peer, needed.validation.clone(), provider, Arc::clone(stats)))
    });
    let asks: Arc<dyn ClientCertVerifier> = match &verifier {
        Some(verifier) => Arc::clone(verifier) as _,
        None => WebPkiClientVerifier::no_client_auth(),
    };
    let resolver = Arc::new(Resolver { certificates: needed.certificates.clone(), require_sni: config.require_sni });
    let mut server = builder.with_client_cert_verifier(asks).with_cert_resolver(Arc::clone(&resolver) as _);
    server.alpn_protocols.clone_from(&common.alpn_protocols);
    server.ignore_client_order = !common.params.cipher_suites.is_empty();
    if let Some(keys) = ticket_keys {
        let binding = tickets::binding(config.require_client_certificate, &needed);
        server.ticketer = Arc::new(KeyedTickets::new(keys, binding, config.session_timeout));
    } else if matches!(config.session_tickets, SessionTickets::Disabled) {
        server.send_tls13_tickets = 0;
    } else {
        let own = Ticketer::new().map_err(|error| error.to_string())?;
        server.ticketer = match config.session_timeout {
            Some(timeout) => Arc::new(AgingTickets::new(own, timeout)),
            None => own,
        };
    }
    if !config.session_ids {
        server.session_storage = Arc::new(NoServerSessionStorage {});
    } else if let Some(timeout) = config.session_timeout {
        server.session_storage = Arc::new(AgingSessions::new(Arc::clone(&server.session_storage), timeout));
    }
    for certificate in &needed.certificates {
        if let Some(at) = certificate::expiration(&certificate.key.cert) {
            stats.expires(&certificate.name, "unnamed_cert_e3b0c442", at);
        }
    }
    let ca = needed.validation.and_then(|validation| validation.trusted_ca.clone().map(|ca| (ca, validation)));
    if let Some((ca, validation)) = &ca
        && let Some(at) = certificate::expiration(&ca.certificates)
    {
        stats.expires(&validation.name, "unnamed_ca_cert_e3b0c442", at);
    }
    let without_alpn = (!server.alpn_protocols.is_empty()).then(|| {
        let mut without = server.clone();
        without.alpn_protocols.clear();
        Arc::new(without)
    });
    Ok(Context {
        config: Arc::new(server),
        without_alpn,
        resolver,
        verifier,
        shown: SocketCertificates { ca: ca.map(|(ca, _)| ca), certificates: needed.certificates },
    })
}

/// Chooses a certificate by the name that the client asks for: one for that very name, else a wildcard, else the first;
/// among those, the first that the client can verify, elliptic curves before RSA.
#[derive(Debug)]
struct Resolver {
    certificates: Vec<Arc<TlsCertificate>>,
    require_sni: bool,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.choose(&hello).map(|certificate| Arc::clone(&certificate.key))
    }
}

impl Resolver {
    fn choose(&self, hello: &ClientHello<'_>) -> Option<&Arc<TlsCertificate>> {
        let name = hello.server_name();
        if self.require_sni && name.is_none() {
            return None;
        }
        let fitness = |certificate: &TlsCertificate| {
            let by_name = name.map_or(0, |name| {
                let exact = certificate.dns_names.iter().any(|known| known.eq_ignore_ascii_case(name));
                let covered = || certificate.dns_names.iter().any(|known| covers(known, name));
                if exact { 2 } else { u8::from(covered()) }
            });
            let usable = certificate.key.key.choose_scheme(hello.signature_schemes()).is_some();
            let elliptic = certificate.key.key.algorithm() != rustls::SignatureAlgorithm::RSA;
            usable.then_some((by_name, elliptic))
        };
        let mut best: Option<((u8, bool), &Arc<TlsCertificate>)> = None;
        for certificate in &self.certificates {
            if let Some(fit) = fitness(certificate)
                && best.is_none_or(|(before, _)| fit > before)
            {
                best = Some((fit, certificate));
            }
        }
        best.map(|(_, certificate)| certificate)
    }
}
