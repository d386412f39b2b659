//! `/certs`: Envoy's `Certificates`.

use serde_json::{Value as Json, json};

use crate::tls::{SocketCertificates, certificate_json};

/// One entry a transport socket. As in Envoy, of a bundle of issuers only the first is shown, and of a chain its leaf.
pub(super) fn json(sockets: &[SocketCertificates]) -> Json {
    let entries = sockets.iter().map(|SocketCertificates { ca, certificates }| {
        let issuers = ca.iter().filter_map(|ca| Some(certificate_json(ca.certificates.first()?, &ca.path)));
        let chains = certificates.iter();
        let chains = chains.filter_map(|it| Some(certificate_json(it.key.cert.first()?, &it.chain_path)));
        json!({ "ca_cert": issuers.collect::<Vec<_>>(), "cert_chain": chains.collect::<Vec<_>>() })
    });
    json!({ "certificates": entries.collect::<Vec<_>>() })
}
