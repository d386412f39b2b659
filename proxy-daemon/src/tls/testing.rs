//! Certificates for tests.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, string::Ia5String,
};

/// An issuer.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub(crate) pem: String,
}

/// A certificate with its key, as PEM.
pub(crate) struct Issued {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for these DNS names and URIs.
    pub(crate) fn issue(&self, dns: &[&str], uris: &[&str]) -> Issued {
        self.issue_with(dns, uris, |_| {})
    }

    pub(crate) fn issue_with(&self, dns: &[&str], uris: &[&str], edit: impl FnOnce(&mut CertificateParams)) -> Issued {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::OrganizationName, "Org, Inc");
        params.distinguished_name.push(DnType::CommonName, dns.first().copied().unwrap_or("client"));
        let name = |text: &str| Ia5String::try_from(text.to_owned()).unwrap();
        let dns = dns.iter().map(|text| SanType::DnsName(name(text)));
        params.subject_alt_names = dns.chain(uris.iter().map(|text| SanType::URI(name(text)))).collect();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        edit(&mut params);
        let key = KeyPair::generate().unwrap();
        let chain = params.signed_by(&key, &self.issuer).unwrap().pem();
        Issued { chain, key: key.serialize_pem() }
    }
}

/// Text as a YAML scalar.
pub(crate) fn yaml(text: &str) -> String {
    serde_json::to_string(text).unwrap()
}
