//! Secrets whose content is in files that are replaced now and then.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use culvert_xds_client::watches::directory_of;
use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, WatchedDirectory, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{Secret as ProtoSecret, secret::Type},
};

use super::{common::Result, support::join, tls};
use crate::config::{FieldError, model::Secret};

/// How often files are read until two readings agree. Envoy's number.
const MAX_READS: usize = 5;

/// A secret of SDS: what it is, and where what it is made of changes.
#[derive(Debug, Clone)]
pub struct SecretWithFiles {
    /// The secret.
    pub secret: Secret,
    /// The message with the files' content in place of their names: what is shown, as in Envoy. `None`: it names no file.
    pub resolved: Option<ProtoSecret>,
    /// It is read again when something is moved into one of these.
    pub directories: BTreeSet<PathBuf>,
}

/// The sources of a secret that may be files, with their paths.
fn sources(message: &mut ProtoSecret) -> Vec<(String, &mut DataSource)> {
    let sources = match &mut message.r#type {
        Some(Type::GenericSecret(it)) => {
            let path = |id: &String| format!("generic_secret.secrets[\"{id}\"]");
            return it.secrets.iter_mut().map(|(id, source)| (path(id), source)).collect();
        }
        Some(Type::TlsCertificate(it)) => vec![
            ("tls_certificate.certificate_chain", &mut it.certificate_chain),
            ("tls_certificate.private_key", &mut it.private_key),
        ],
        Some(Type::ValidationContext(it)) => vec![("validation_context.trusted_ca", &mut it.trusted_ca)],
        Some(Type::SessionTicketKeys(_)) | None => Vec::new(),
    };
    sources.into_iter().filter_map(|(path, source)| source.as_mut().map(|source| (path.to_owned(), source))).collect()
}

fn directory(watched: Option<&WatchedDirectory>) -> Option<PathBuf> {
    watched.map(|watched| PathBuf::from(&watched.path))
}

/// The directory that a secret names as the one to be watched.
pub fn watched_directory(message: &ProtoSecret) -> Option<PathBuf> {
    match &message.r#type {
        Some(Type::TlsCertificate(it)) => directory(it.watched_directory.as_ref()),
        Some(Type::ValidationContext(it)) => directory(it.watched_directory.as_ref()),
        _ => None,
    }
}

/// The directory that a secret of the bootstrap is read again for: the one that it names; of a generic secret, which can name none, that
/// of its files.
///
/// # Errors
/// A generic secret has files in several directories.
pub(super) fn followed_directory(message: &ProtoSecret, path: &str) -> Result<Option<PathBuf>> {
    if !matches!(message.r#type, Some(Type::GenericSecret(_))) {
        return Ok(watched_directory(message));
    }
    let mut directories = watched_directories(message).into_iter();
    match (directories.next(), directories.next()) {
        (directory, None) => Ok(directory),
        _ => Err(FieldError::new(join(path, "generic_secret.secrets"), "its files have to be in one directory")),
    }
}

/// The directories that a secret of SDS is read again for when something is moved into one of them: the one that it names,
/// else those of its files, as in Envoy.
pub fn watched_directories(message: &ProtoSecret) -> BTreeSet<PathBuf> {
    if let Some(directory) = watched_directory(message) {
        return [directory].into();
    }
    let mut message = message.clone();
    let files = sources(&mut message).into_iter().filter_map(|(_, source)| match &source.specifier {
        Some(Specifier::Filename(name)) => Some(directory_of(Path::new(name)).to_path_buf()),
        _ => None,
    });
    files.collect()
}

/// A checked secret of SDS, with the content that its files have now.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn discovered_secret(message: &ProtoSecret, path: &str) -> Result<SecretWithFiles> {
    let mut resolved = message.clone();
    let mut content = read(&mut resolved, path)?;
    if content.is_empty() {
        let directories = watched_directories(message);
        return Ok(SecretWithFiles { secret: tls::secret(message, path)?, resolved: None, directories });
    }
    // A chain of one rotation and the key of another do not belong together.
    for again in 0.. {
        let newer = read(&mut resolved, path)?;
        if newer == content {
            break;
        }
        content = newer;
        if again == MAX_READS {
            tracing::warn!(secret = %message.name, "its files change faster than they can be read");
            break;
        }
    }
    for (field, source) in sources(&mut resolved) {
        if let Some(bytes) = content.remove(&field) {
            source.specifier = Some(Specifier::InlineBytes(bytes));
        }
    }
    let secret = tls::secret(&resolved, path)?;
    Ok(SecretWithFiles { secret, resolved: Some(resolved), directories: watched_directories(message) })
}

/// The secret with the names of the files that it came from, which `/certs` shows of the bootstrap's.
pub fn with_origins(mut secret: Secret, message: &ProtoSecret) -> Secret {
    let name = |source: Option<&DataSource>| match source.and_then(|source| source.specifier.as_ref()) {
        Some(Specifier::Filename(name)) => Some(name.clone()),
        _ => None,
    };
    match (&mut secret, &message.r#type) {
        (Secret::TlsCertificate(certificate), Some(Type::TlsCertificate(it))) => {
            if let (Some(certificate), Some(name)) = (Arc::get_mut(certificate), name(it.certificate_chain.as_ref())) {
                certificate.chain_path = name;
            }
        }
        (Secret::ValidationContext(context), Some(Type::ValidationContext(it))) => {
            let ca = Arc::get_mut(context).and_then(|context| context.trusted_ca.as_mut()).and_then(Arc::get_mut);
            if let (Some(ca), Some(name)) = (ca, name(it.trusted_ca.as_ref())) {
                ca.path = name;
            }
        }
        _ => {}
    }
    secret
}

/// What is in the files now, by the field that names them.
fn read(message: &mut ProtoSecret, path: &str) -> Result<BTreeMap<String, Vec<u8>>> {
    let files = sources(message).into_iter().filter_map(|(field, source)| match &source.specifier {
        Some(Specifier::Filename(_)) => {
            Some(tls::material(source, &join(path, &field)).map(|material| (field, material.bytes)))
        }
        _ => None,
    });
    files.collect()
}

/// Refuses `watched_directory` where nothing follows it: Envoy does not either, and does not say so.
pub(super) fn not_watched(watched: Option<&WatchedDirectory>, path: &str) -> Result<()> {
    match watched {
        Some(_) => {
            let text =
                "not supported by culvert yet outside of secrets (SDS, static_resources.secrets); Envoy passes over it";
            Err(FieldError::new(join(path, "watched_directory"), text))
        }
        None => Ok(()),
    }
}
