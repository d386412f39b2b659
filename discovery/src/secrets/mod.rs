//! Certificates, authorities and other secrets that proxies are given (SDS), from files and from Kubernetes.
//!
//! Each becomes up to two resources: `NAME` is its certificate with the key, or else its values; `NAME/ca` are the authorities
//! that sign the certificates of others. Who may have which is said by [`Access`]: nothing is given to anybody who is not
//! known by a certificate.

pub mod files;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::DataSource;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, GenericSecret, Secret as Message, TlsCertificate,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::access::Pattern;
use crate::registry::Registry;

/// The label of a Kubernetes Secret that proxies may be given, with the value `true`.
pub const LABEL: &str = "culvert.dev/sds";
/// What the name of a secret's authorities ends with.
const AUTHORITIES: &str = "/ca";
/// What a node calls the secret that is its own.
pub const OWN: &str = "own";
/// The parts of a secret, as Kubernetes calls them.
const CERTIFICATE: &str = "tls.crt";
const PRIVATE_KEY: &str = "tls.key";
const AUTHORITY: &str = "ca.crt";
/// The value of a secret that has a single one, rather than values with names.
const SINGLE: &str = "secret";

/// Secrets by name. Those of Kubernetes are called `NAMESPACE/NAME`.
pub type Secrets = BTreeMap<Arc<str>, Arc<Secret>>;

/// A secret, checked.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret {
    /// A chain and its key, PEM.
    certificate: Option<(Vec<u8>, Vec<u8>)>,
    /// Who signs others' certificates, PEM.
    authorities: Option<Vec<u8>>,
    /// Values by name, if there is no certificate.
    values: BTreeMap<String, Vec<u8>>,
    /// Until when the certificate is valid, in seconds since the epoch.
    not_after: Option<i64>,
}

/// Without anything that is secret.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.kinds().join(", "))
    }
}

impl Secret {
    /// A secret of these parts, by their names. What is beside a certificate and authorities is not served.
    ///
    /// # Errors
    /// What cannot be used of it. No part is quoted.
    pub fn new(mut parts: BTreeMap<String, Vec<u8>>) -> Result<Self, String> {
        let authorities = parts.remove(AUTHORITY).filter(|pem| !pem.is_empty());
        if let Some(pem) = &authorities {
            chain(pem).map_err(|error| format!("{AUTHORITY}: {error}"))?;
        }
        let (certificate, not_after) = match (parts.remove(CERTIFICATE), parts.remove(PRIVATE_KEY)) {
            (Some(certificate), Some(key)) => {
                let not_after = check_pair(&certificate, &key)?;
                parts.clear();
                (Some((certificate, key)), not_after)
            }
            (None, None) => (None, None),
            (Some(_), None) => return Err(format!("{CERTIFICATE} without {PRIVATE_KEY}")),
            (None, Some(_)) => return Err(format!("{PRIVATE_KEY} without {CERTIFICATE}")),
        };
        if certificate.is_none() && authorities.is_none() && parts.is_empty() {
            return Err("there is nothing in it".to_owned());
        }
        Ok(Self { certificate, authorities, values: parts, not_after })
    }

    /// What it has, for people.
    #[must_use]
    pub fn kinds(&self) -> Vec<&'static str> {
        let has = [
            (self.certificate.is_some(), "certificate"),
            (self.authorities.is_some(), "authorities"),
            (!self.values.is_empty(), "values"),
        ];
        has.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect()
    }

    /// Until when its certificate is valid, in seconds since the epoch.
    #[must_use]
    pub fn not_after(&self) -> Option<i64> {
        self.not_after
    }

    /// What it is to a proxy that calls it so.
    #[must_use]
    pub fn messages(&self, name: &str) -> Vec<(String, Message)> {
        let message = |name: String, kind| (name.clone(), Message { name, r#type: Some(kind) });
        let mut messages = Vec::new();
        if let Some((chain, key)) = &self.certificate {
            let certificate = TlsCertificate {
                certificate_chain: Some(inline(chain)),
                private_key: Some(inline(key)),
                ..Default::default()
            };
            messages.push(message(name.to_owned(), Type::TlsCertificate(certificate)));
        }
        if !self.values.is_empty() {
            let secret = match (self.values.get(SINGLE), self.values.len()) {
                (Some(value), 1) => GenericSecret { secret: Some(inline(value)), ..Default::default() },
                _ => {
                    let values = self.values.iter().map(|(name, value)| (name.clone(), inline(value)));
                    GenericSecret { secret: None, secrets: values.collect() }
                }
            };
            messages.push(message(name.to_owned(), Type::GenericSecret(secret)));
        }
        if let Some(pem) = &self.authorities {
            let context = CertificateValidationContext { trusted_ca: Some(inline(pem)), ..Default::default() };
            messages.push(message(format!("{name}{AUTHORITIES}"), Type::ValidationContext(context)));
        }
        messages
    }
}

/// The name of the authorities of a secret.
#[must_use]
pub fn authorities_of(name: &str) -> String {
    format!("{name}{AUTHORITIES}")
}

fn inline(bytes: &[u8]) -> DataSource {
    DataSource { specifier: Some(Specifier::InlineBytes(bytes.to_vec())), ..Default::default() }
}

fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match read {
        Ok(chain) if !chain.is_empty() => {
            let known = chain.iter().all(|certificate| X509Certificate::from_der(certificate).is_ok());
            if known { Ok(chain) } else { Err("a certificate in it cannot be read".to_owned()) }
        }
        _ => Err("is not PEM with a certificate".to_owned()),
    }
}

/// Whether a certificate and a key go together; gives until when the certificate is valid.
fn check_pair(certificate: &[u8], key: &[u8]) -> Result<Option<i64>, String> {
    let chain = chain(certificate).map_err(|error| format!("{CERTIFICATE}: {error}"))?;
    let key =
        PrivateKeyDer::from_pem_slice(key).map_err(|_| format!("{PRIVATE_KEY}: is not PEM with a private key"))?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key)
        .map_err(|_| format!("{PRIVATE_KEY}: is not a key that can sign"))?;
    let not_after = X509Certificate::from_der(&chain[0]).ok().map(|(_, leaf)| leaf.validity().not_after.timestamp());
    CertifiedKey::new(chain, key)
        .keys_match()
        .map_err(|_| format!("{CERTIFICATE} and {PRIVATE_KEY} do not go together"))?;
    Ok(not_after)
}

/// The secrets of files and of all clusters. Where two are called the same, files count before clusters, and the cluster that is
/// configured first before others.
#[must_use]
pub fn joined(files: &Secrets, registry: &Registry, warnings: &mut Vec<String>) -> Secrets {
    let mut all = files.clone();
    for (cluster, objects) in registry.clusters.iter().filter_map(|c| Some((&c.info.name, c.objects.as_ref()?))) {
        for (key, secret) in &*objects.secrets {
            let known = all.entry(key.to_string().into()).or_insert_with(|| Arc::clone(secret));
            if known != secret {
                warnings.push(format!(
                    "Secret {key} of cluster {cluster} is not the one that counts: it is elsewhere, too"
                ));
            }
        }
    }
    all
}

/// Which secrets somebody may have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// By name. Who may have a secret may have its authorities.
    pub names: Vec<Pattern>,
    /// The one that it gets as [`OWN`], whatever it is called.
    pub own: Option<String>,
}

impl Access {
    /// Whether somebody may have a secret.
    #[must_use]
    pub fn allows(&self, name: &str) -> bool {
        let whole = name.strip_suffix(AUTHORITIES);
        self.names.iter().any(|pattern| pattern.matches(name) || whole.is_some_and(|name| pattern.matches(name)))
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair() -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["users".to_owned()]).unwrap().self_signed(&key).unwrap();
        (certificate.pem().into_bytes(), key.serialize_pem().into_bytes())
    }

    fn secret(parts: &[(&str, &[u8])]) -> Result<Secret, String> {
        Secret::new(parts.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect())
    }

    fn names(secret: &Secret) -> Vec<String> {
        secret.messages("users").into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn parts_become_resources() {
        let (certificate, key) = pair();
        let both =
            secret(&[("tls.crt", &certificate), ("tls.key", &key), ("ca.crt", &certificate), ("more", b"x")]).unwrap();
        assert_eq!(
            (names(&both), both.kinds()),
            (vec!["users".to_owned(), "users/ca".into()], vec!["certificate", "authorities"])
        );
        assert!(both.not_after().is_some());
        assert_eq!(names(&secret(&[("ca.crt", &certificate)]).unwrap()), ["users/ca"]);
        let single = secret(&[("secret", b"s")]).unwrap().messages("users").remove(0).1;
        let Some(Type::GenericSecret(single)) = single.r#type else { panic!("{single:?}") };
        assert!(single.secret.is_some() && single.secrets.is_empty());
        let keys = secret(&[("a", b"1"), ("b", b"2")]).unwrap().messages("users").remove(0).1;
        let Some(Type::GenericSecret(keys)) = keys.r#type else { panic!("{keys:?}") };
        assert!(keys.secret.is_none() && keys.secrets.len() == 2);
        assert_eq!(format!("{both:?}"), "Secret(certificate, authorities)");
    }

    #[test]
    fn what_does_not_go_together_is_no_secret() {
        let (certificate, key) = pair();
        let (_, other_key) = pair();
        for (parts, expected) in [
            (vec![], "there is nothing in it"),
            (vec![("tls.crt", &*certificate)], "tls.crt without tls.key"),
            (vec![("tls.key", &*key)], "tls.key without tls.crt"),
            (vec![("tls.crt", &*certificate), ("tls.key", &*other_key)], "do not go together"),
            (vec![("tls.crt", b"x".as_slice()), ("tls.key", &*key)], "tls.crt: is not PEM"),
            (vec![("tls.crt", &*certificate), ("tls.key", b"secret!".as_slice())], "tls.key: is not PEM"),
            (vec![("ca.crt", &*key)], "ca.crt: is not PEM with a certificate"),
        ] {
            let error = secret(&parts).unwrap_err();
            assert!(error.contains(expected) && !error.contains("secret!"), "{error}");
        }
    }

    #[test]
    fn who_may_have_a_secret_may_have_its_authorities() {
        let names = serde_saphyr::from_str("[users, 'shop/*', orders/ca]").unwrap();
        let access = Access { names, own: None };
        for (name, expected) in [
            ("users", true),
            ("users/ca", true),
            ("users/other", false),
            ("shop/a", true),
            ("shop/a/ca", true),
            ("orders/ca", true),
            ("orders", false),
        ] {
            assert_eq!(access.allows(name), expected, "{name}");
        }
        assert!(!Access::default().allows("users"));
    }
}
