//! Reads Kubernetes manifests: YAML or JSON text -> checked [`Objects`].
//!
//! Fields that discovery does not need are passed over, as are objects of other kinds. A field that it does need and
//! that is wrong is an error with the object's and the field's name, and fails the whole file.

use std::sync::Arc;

use serde_json::Value;
use tracing::debug;

use super::convert::{self, Kind, ObjectName, one_line};
use super::{EndpointSlice, Node, Objects, Pod, Service};
use crate::policy::ServiceManifest;
use crate::secrets::Secret;

/// Why a manifest cannot be used. Its text is one line; the file is named by whoever reads files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The text is not YAML.
    #[error("not valid YAML: {0}")]
    Yaml(String),
    /// A document is not a Kubernetes object.
    #[error("document {document}: {reason}")]
    NotAnObject {
        /// Position in the file, from 1.
        document: usize,
        /// What is missing.
        reason: &'static str,
    },
    /// A document is an object of culvert's own, of a kind or a version that there is not.
    #[error(
        "document {document}: there is no kind {kind} of {api_version}; culvert has {} of {}",
        ServiceManifest::KIND,
        ServiceManifest::API_VERSION
    )]
    NotKnown {
        /// Position in the file, from 1.
        document: usize,
        /// What it says.
        api_version: String,
        /// What it says.
        kind: String,
    },
    /// A field of an object is wrong.
    #[error("{object}: {field}: {reason}")]
    Field {
        /// Kind, namespace and name.
        object: String,
        /// Path of the field in the object.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The same object is in the file twice.
    #[error("{0} is defined twice in this file; remove one of them")]
    Duplicate(String),
}

/// Reads all documents of one file.
///
/// # Errors
/// [`ManifestError`] for the first thing that is wrong.
pub fn parse(text: &str) -> Result<Objects, ManifestError> {
    let mut objects = Objects::default();
    for (index, document) in documents(text)?.into_iter().enumerate() {
        if !document.is_null() {
            add_document(document, index + 1, &mut objects)?;
        }
    }
    Ok(objects)
}

/// Says whether one document can be used.
///
/// # Errors
/// As [`parse`].
pub(crate) fn check(document: Value) -> Result<(), ManifestError> {
    if document.is_null() { Ok(()) } else { add_document(document, 1, &mut Objects::default()) }
}

/// The documents of one file.
///
/// # Errors
/// [`ManifestError::Yaml`]
pub(crate) fn documents(text: &str) -> Result<Vec<Value>, ManifestError> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // A pod may be called `y` or `no`: only `true` and `false` are booleans.
        strict_booleans: true,
        // The defaults are for configuration files; `kubectl get -o yaml` of a big cluster is larger, but has no
        // aliases: what they expand to is kept small.
        budget: serde_saphyr::budget! { max_documents: 100_000, max_nodes: 8_000_000, max_events: 20_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    };
    // The library also tells programmers which of its options to set.
    serde_saphyr::from_multiple_with_options(text, options).map_err(|error| {
        let error = one_line(&error.to_string());
        ManifestError::Yaml(error.replace(", set DuplicateKeyPolicy in Options if acceptable", ""))
    })
}

fn add_document(document: Value, position: usize, objects: &mut Objects) -> Result<(), ManifestError> {
    let not_an_object = |reason| ManifestError::NotAnObject { document: position, reason };
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion").to_owned(), text("kind").to_owned());
    if !document.is_object() {
        return Err(not_an_object("not a Kubernetes object: a mapping with apiVersion and kind is needed"));
    }
    if api_version.is_empty() {
        return Err(not_an_object("apiVersion is missing"));
    }
    if kind.is_empty() {
        return Err(not_an_object("kind is missing"));
    }
    // `kubectl get -o yaml` wraps what it prints in a list.
    if let Some(Value::Array(items)) = document.get("items").filter(|_| kind.ends_with("List")) {
        for item in items.clone() {
            add_document(item, position, objects)?;
        }
        return Ok(());
    }
    match (api_version.as_str(), kind.as_str()) {
        (Service::API_VERSION, Service::KIND) => add::<Service>(document, objects),
        (EndpointSlice::API_VERSION, EndpointSlice::KIND) => add::<EndpointSlice>(document, objects),
        (Pod::API_VERSION, Pod::KIND) => add::<Pod>(document, objects),
        (Node::API_VERSION, Node::KIND) => add::<Node>(document, objects),
        (Secret::API_VERSION, Secret::KIND) => add::<Secret>(document, objects),
        (ServiceManifest::API_VERSION, ServiceManifest::KIND) => add::<ServiceManifest>(document, objects),
        // Somebody wants it to hold: one of a later version, or misspelt.
        _ if group(&api_version) == group(ServiceManifest::API_VERSION) => {
            Err(ManifestError::NotKnown { document: position, api_version, kind })
        }
        _ => {
            debug!(%api_version, %kind, "passed over an object of a kind that is not needed");
            Ok(())
        }
    }
}

/// The group of an apiVersion.
fn group(api_version: &str) -> &str {
    api_version.split('/').next().unwrap_or_default()
}

/// Reads one object and adds it, unless it is not for us.
fn add<K: Kind>(document: Value, objects: &mut Objects) -> Result<(), ManifestError> {
    let metadata = |key: &str| {
        document.pointer(&format!("/metadata/{key}")).and_then(Value::as_str).filter(|text| !text.is_empty())
    };
    let namespace = metadata("namespace").unwrap_or(if K::NAMESPACED { "default" } else { "" });
    let object = ObjectName::new(K::KIND, namespace, metadata("name").unwrap_or_default());
    let name = object.0.clone();
    let (key, converted) = convert::read::<K, _>(document, || object)?;
    if let Some(converted) = converted
        && Arc::make_mut(K::among(objects)).insert(key, Arc::new(converted)).is_some()
    {
        return Err(ManifestError::Duplicate(name));
    }
    Ok(())
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
