//! Upstream contexts.

use std::{
    net::IpAddr,
    sync::{Arc, Weak},
};

use arc_swap::ArcSwapOption;
use rustls::{
    ClientConfig, CommonState,
    client::Resumption,
    pki_types::ServerName,
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    PeerName,
    certificate::{self, SocketCertificates},
    secrets::{Needed, SecretUser, Secrets, Subscribed},
    stats::SslStats,
    verify::{NameVerifier, Peer, PeerVerifier},
};
use crate::{config::model::UpstreamTlsContext, stats::Scope, upstream::split};

/// The protocols that a connection offers where its context does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlpnFallback {
    /// None: what passes is not ours to name.
    None,
    /// `http/1.1`
    Http1,
    /// `h2`
    Http2,
    /// `h2`, else `http/1.1`: the host chooses.
    Auto,
}

impl AlpnFallback {
    const ALL: [AlpnFallback; 4] = [AlpnFallback::None, AlpnFallback::Http1, AlpnFallback::Http2, AlpnFallback::Auto];

    fn protocols(self) -> &'static [&'static str] {
        match self {
            AlpnFallback::None => &[],
            AlpnFallback::Http1 => &["http/1.1"],
            AlpnFallback::Http2 => &["h2"],
            AlpnFallback::Auto => &["h2", "http/1.1"],
        }
    }
}

/// A cluster's transport socket, shared by all workers.
pub struct ClientTls {
    config: Arc<UpstreamTlsContext>,
    secrets: Arc<Secrets>,
    _subscribed: Subscribed,
    stats: Arc<SslStats>,
    /// Empty for as long as a secret is missing.
    current: ArcSwapOption<Context>,
}

struct Context {
    /// By [`AlpnFallback`].
    configs: [Arc<ClientConfig>; AlpnFallback::ALL.len()],
    /// Judges hosts of which a request has said the name, which they are asked for.
    by_name: Arc<NameVerifier>,
    shown: SocketCertificates,
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientTls").field("config", &self.config).finish_non_exhaustive()
    }
}

impl ClientTls {
    /// Builds the context, now or when its secrets arrive. `owner` is the scope of the cluster's statistics. A context that
    /// the library does not take makes no connections.
    pub fn new(config: Arc<UpstreamTlsContext>, owner: &Scope, secrets: &Arc<Secrets>) -> Arc<ClientTls> {
        let stats = Arc::new(SslStats::new(owner, "client_ssl_socket_factory"));
        let tls = Arc::new_cyclic(|tls: &Weak<ClientTls>| {
            let _subscribed = secrets.subscribe(config.common.secrets(), Weak::clone(tls) as Weak<dyn SecretUser>);
            ClientTls { config, secrets: Arc::clone(secrets), _subscribed, stats, current: ArcSwapOption::empty() }
        });
        if let Err(error) = tls.build() {
            tracing::error!(owner = owner.name(), %error, "the TLS context cannot be used");
        }
        tls
    }

    fn build(&self) -> Result<bool, String> {
        let Some(needed) = self.secrets.resolve(&self.config.common) else { return Ok(false) };
        let context = build(&self.config, needed, &self.stats)?;
        self.current.store(Some(Arc::new(context)));
        Ok(true)
    }

    /// rustls' configuration for one connection, to a host that is asked for `sent`, and that a request calls `peer`; `None` for as long as a
    /// secret is missing.
    pub fn config(
        &self,
        alpn: AlpnFallback,
        peer: Option<&PeerName>,
        sent: &ServerName<'_>,
    ) -> Option<Arc<ClientConfig>> {
        let current = self.current.load();
        let context = current.as_ref()?;
        let config = &context.configs[alpn as usize];
        let Some(peer) = peer.filter(|peer| peer.checked) else { return Some(Arc::clone(config)) };
        let mut config = ClientConfig::clone(config);
        let is_sent = matches!(sent, ServerName::DnsName(name) if name.as_ref().eq_ignore_ascii_case(&peer.name));
        // Sessions are only resumed with the verifier that they began with, and are found by the name that was sent.
        let verifier = match is_sent {
            true => Arc::clone(&context.by_name),
            false => {
                config.resumption = Resumption::disabled();
                Arc::new(context.by_name.of(&peer.name))
            }
        };
        config.dangerous().set_certificate_verifier(verifier);
        Some(Arc::new(config))
    }

    /// The name that a host is asked for. `hostname` is the endpoint's own, and may be empty; `peer` is what a request calls it. Where no
    /// name is to be sent, this is an address, which rustls keeps to itself.
    pub fn server_name(&self, hostname: &str, address: IpAddr, peer: Option<&PeerName>) -> ServerName<'static> {
        let sent = peer.filter(|peer| peer.sent).and_then(|peer| ServerName::try_from(peer.name.to_string()).ok());
        // What is no name of DNS cannot be sent.
        if let Some(sent @ ServerName::DnsName(_)) = sent {
            return sent;
        }
        // Of a host that requests have named, it has a port.
        let of_host = || ServerName::try_from(split(hostname).0.to_owned()).ok();
        let own = self.config.auto_host_sni.then(of_host).flatten().or_else(|| self.config.sni.clone());
        own.unwrap_or_else(|| ServerName::IpAddress(address.into()))
    }

    /// Counts a handshake of somebody else's with this context.
    pub(super) fn count(&self, handshake: Result<&CommonState, &std::io::Error>) {
        match handshake {
            Ok(connection) => self.stats.complete(connection),
            Err(error) => self.stats.failed(error),
        }
    }

    /// Counts a connection that was not made for want of a secret.
    pub(super) fn not_ready(&self) {
        self.stats.upstream_context_secrets_not_ready.inc();
    }

    /// Shakes hands with a host; `peer` is what a request calls it.
    ///
    /// # Errors
    /// Counted: a secret is missing, or the handshake failed.
    pub async fn connect<S>(
        &self,
        stream: S,
        hostname: &str,
        address: IpAddr,
        (alpn, peer): (AlpnFallback, Option<&PeerName>),
    ) -> std::io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = self.server_name(hostname, address, peer);
        let Some(config) = self.config(alpn, peer, &name) else {
            self.not_ready();
            return Err(std::io::Error::other("the certificates have not arrived yet"));
        };
        let stream = TlsConnector::from(config).connect(name, stream).await;
        self.count(stream.as_ref().map(|stream| -> &CommonState { stream.get_ref().1 }));
        stream
    }

    /// What `/certs` shows: the trusted issuers and our own certificates, where the secrets are there.
    pub fn certificates(&self) -> Option<SocketCertificates> {
        self.current.load().as_ref().map(|context| context.shown.clone())
    }
}

impl SecretUser for ClientTls {
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

fn build(config: &UpstreamTlsContext, needed: Needed, stats: &Arc<SslStats>) -> Result<Context, String> {
    let common = &config.common;
    let provider = super::restricted(&common.params);
    let peer = Peer::Server { by_name: config.auto_sni_san_validation };
    let verifier =
        Arc::new(PeerVerifier::new(peer, needed.validation.clone(), Arc::clone(&provider), Arc::clone(stats)));
    let by_name = Arc::new(NameVerifier::new(Arc::clone(&verifier)));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&super::versions(&common.params))
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut base = match needed.certificates.first() {
        Some(certificate) => {
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::clone(&certificate.key))))
        }
        None => builder.with_no_client_auth(),
    };
    base.resumption = match config.max_session_keys {
        0 => Resumption::disabled(),
        kept => Resumption::in_memory_sessions(kept),
    };
    base.alpn_protocols.clone_from(&common.alpn_protocols);
    let base = Arc::new(base);
    let configs = AlpnFallback::ALL.map(|fallback| {
        if !base.alpn_protocols.is_empty() || fallback == AlpnFallback::None {
            return Arc::clone(&base);
        }
        let mut config = ClientConfig::clone(&base);
        config.alpn_protocols = fallback.protocols().iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    });
    if let Some(certificate) = needed.certificates.first()
        && let Some(at) = certificate::expiration(&certificate.key.cert)
    {
        stats.expires(&certificate.name, "unnamed_cert_e3b0c442", at);
    }
    if let Some(validation) = &needed.validation
        && let Some(at) = validation.trusted_ca.as_ref().and_then(|ca| certificate::expiration(&ca.certificates))
    {
        stats.expires(&validation.name, "unnamed_ca_cert_e3b0c442", at);
    }
    let ca = needed.validation.and_then(|validation| validation.trusted_ca.clone());
    Ok(Context { configs, by_name, shown: SocketCertificates { ca, certificates: needed.certificates } })
}
