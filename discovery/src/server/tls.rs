//! TLS of the xDS port, and who is at its other end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use serde::Deserialize;
use tokio::time::Instant;
use tracing::{info, warn};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// How often it is looked whether the files have changed, at most.
const LOOK: Duration = Duration::from_secs(2);

/// Which files TLS is made of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The server's certificate and its chain, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM.
    pub private_key: PathBuf,
    /// Who signs the certificates of clients, PEM. Without it clients need none.
    pub client_authorities: Option<PathBuf>,
}

/// Who a client is, by its certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The URI names of its certificate: a SPIFFE ID is one.
    pub uris: Vec<String>,
    /// The DNS names of its certificate.
    pub dns: Vec<String>,
}

impl Identity {
    /// What the first certificate of a verified chain says.
    #[must_use]
    pub fn of(chain: Option<&[CertificateDer<'_>]>) -> Self {
        let mut identity = Self::default();
        let leaf = chain.and_then(<[_]>::first).and_then(|leaf| Some(X509Certificate::from_der(leaf).ok()?.1));
        let names = leaf.as_ref().and_then(|leaf| leaf.subject_alternative_name().ok()?);
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::URI(uri) => identity.uris.push((*uri).to_owned()),
                GeneralName::DNSName(name) => identity.dns.push(name.to_ascii_lowercase()),
                _ => {}
            }
        }
        identity
    }
}

/// The server's side of TLS. Files that change count for the connections that come after.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    current: Arc<ServerConfig>,
    read: Option<Vec<SystemTime>>,
    looked: Instant,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// When one of them cannot be read or used.
    pub fn new(files: TlsFiles) -> anyhow::Result<Self> {
        let read = changed(&files);
        let current = Arc::new(server_config(&files)?);
        Ok(Self { files, current, read, looked: Instant::now() })
    }

    /// What the next connection is served with.
    pub fn current(&mut self) -> Arc<ServerConfig> {
        if self.looked.elapsed() > LOOK {
            self.looked = Instant::now();
            let read = changed(&self.files);
            if read != self.read {
                self.read = read;
                match server_config(&self.files) {
                    Ok(newer) => {
                        info!("tls: {} has been read again", self.files.certificate.display());
                        self.current = Arc::new(newer);
                    }
                    Err(error) => warn!("tls: {error:#}; what was there before stays in force"),
                }
            }
        }
        Arc::clone(&self.current)
    }
}

/// When the files were changed, `None` if one of them is not there.
fn changed(files: &TlsFiles) -> Option<Vec<SystemTime>> {
    let paths = [Some(&files.certificate), Some(&files.private_key), files.client_authorities.as_ref()];
    paths.into_iter().flatten().map(|path| std::fs::metadata(path).ok()?.modified().ok()).collect()
}

fn server_config(files: &TlsFiles) -> anyhow::Result<ServerConfig> {
    let certificates = |path: &PathBuf| -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certificates = read.map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
        ensure!(!certificates.is_empty(), "{}: there is no certificate in it", path.display());
        Ok(certificates)
    };
    let chain = certificates(&files.certificate).context("tls.certificate")?;
    let key = PrivateKeyDer::from_pem_file(&files.private_key)
        .map_err(|error| anyhow::anyhow!("tls.private_key: {}: {error}", files.private_key.display()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &files.client_authorities {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for root in certificates(path).context("tls.client_authorities")? {
                roots.add(root).with_context(|| format!("tls.client_authorities: {}", path.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).context("tls: certificate and key do not go together")?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}
