//! Certificates in files, and connections with them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tonic::transport::{Channel, Endpoint};

/// Certificates, all by one authority, as files of a directory.
pub struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    /// An authority whose certificate is `NAME.crt`.
    pub fn new(directory: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        std::fs::write(directory.join(format!("{name}.crt")), params.self_signed(&key).unwrap().pem()).unwrap();
        Self(Issuer::new(params, key))
    }

    /// A certificate with these names, as `NAME.crt` and `NAME.key`.
    pub fn issue(&self, directory: &Path, name: &str, names: &[SanType]) {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = names.to_vec();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        // The key first: what is read in between does not go together, and what was there before stays.
        std::fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        std::fs::write(directory.join(format!("{name}.crt")), certificate.pem()).unwrap();
    }
}

/// A URI name.
pub fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// The name of a server on this machine.
pub fn host() -> SanType {
    SanType::IpAddress([127, 0, 0, 1].into())
}

/// A connection with this certificate, which trusts this authority.
pub async fn channel(
    directory: &Path,
    address: SocketAddr,
    name: Option<&str>,
    authority: &str,
) -> Result<Channel, tonic::transport::Error> {
    let path = |file: String| directory.join(file);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(path(format!("{authority}.crt"))).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    let mut config = match name {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let chain = vec![CertificateDer::from_pem_file(path(format!("{name}.crt"))).unwrap()];
            let key = PrivateKeyDer::from_pem_file(path(format!("{name}.key"))).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = move |_| {
        let connector = connector.clone();
        async move {
            let connection = tokio::net::TcpStream::connect(address).await?;
            let server = rustls::pki_types::ServerName::from(address.ip());
            connector.connect(server, connection).await.map(TokioIo::new)
        }
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect_with_connector(tower::service_fn(connect)).await
}
