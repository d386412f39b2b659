use std::{fmt, fs::File, io::Read, path::Path};

use culvert_xds_client::json::{self, ConfigError, Format};
use envoy_types::pb::envoy::config::{
    bootstrap::v3::Bootstrap as Message,
    core::v3::{Locality, node::UserAgentVersionType},
};

use super::{Flags, resources};
use crate::config::parse::{self, Bootstrap};

/// What stands for a file's name where the text comes from the command line.
const FROM_FLAG: &str = "--config-yaml";

/// The largest bootstrap file, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Why the daemon cannot start with this configuration: one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// The file, or `--config-yaml`; empty: there is none.
    pub source: String,
    /// What is wrong with it, and where in it.
    pub error: ConfigError,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.source {
            "" => write!(f, "{}", self.error),
            source => write!(f, "{source}: {}", self.error),
        }
    }
}

impl std::error::Error for LoadError {}

/// Reads and checks the bootstrap that the flags name. Returns the message as well, for `/config_dump`.
///
/// # Errors
/// The file and the field that is wrong, with its line where it stands in one text only.
pub fn load(flags: &Flags) -> Result<(Message, Bootstrap), LoadError> {
    let file = match &flags.config_path {
        Some(path) => {
            let source = path.display().to_string();
            let text = read(path).map_err(|error| refused(&source, error))?;
            Some((source, text))
        }
        None => None,
    };
    let format = flags.config_path.as_deref().map_or(Format::Yaml, Format::of_file);
    let unknown = flags.unknown_static_fields();
    let (source, text, mut message): (_, _, Message) = match (file, &flags.config_yaml) {
        (Some((source, text)), None) => {
            let message = json::read(&text, format, unknown).map_err(|error| refused(&source, error))?;
            (source, Some(text), message)
        }
        (Some((source, text)), Some(overlay)) => {
            let base: Message = json::read(&text, format, unknown).map_err(|error| refused(&source, error))?;
            let merged = json::merge_yaml(base, overlay, unknown).map_err(|error| refused(FROM_FLAG, error))?;
            (format!("{source} with {FROM_FLAG}"), None, merged)
        }
        (None, Some(text)) => {
            let message = json::read(text, Format::Yaml, unknown).map_err(|error| refused(FROM_FLAG, error))?;
            (FROM_FLAG.to_owned(), Some(text.clone()), message)
        }
        (None, None) => {
            let message = "no bootstrap: name a file with -c, or write it with --config-yaml".to_owned();
            return Err(refused("", ConfigError::new("", message)));
        }
    };
    identify(&mut message, flags);
    let locate = |error: ConfigError| match &text {
        Some(text) => refused(&source, error.locate(text)),
        None => refused(&source, error),
    };
    let resolved = json::resolve_typed_structs(&message, unknown).map_err(locate)?;
    json::validate(&*resolved).map_err(locate)?;
    let checked = parse::bootstrap(&resolved).map_err(|error| locate(ConfigError::new(error.path, error.message)))?;
    if checked.has_sources() {
        for (value, field, flag) in [
            (&checked.sources.node.id, "id", "--service-node"),
            (&checked.sources.node.cluster, "cluster", "--service-cluster"),
        ] {
            if value.is_empty() {
                let text = format!("a control plane needs to know this node: set node.{field} or {flag}");
                return Err(locate(ConfigError::new(format!("node.{field}"), text)));
            }
        }
    }
    Ok((message, checked))
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let refused = |message: String| ConfigError::new("", message);
    if path.extension().is_some_and(|extension| extension == "pb" || extension == "pb_text") {
        return Err(refused("protobuf bootstraps are not supported by culvert yet; use YAML or JSON".to_owned()));
    }
    let mut bytes = Vec::new();
    // The file's own length says nothing where it is a pipe.
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
    if read.map_err(|error| refused(format!("cannot be read: {error}")))? as u64 > MAX_BYTES {
        return Err(refused(format!("is longer than {MAX_BYTES} bytes, which is all that is read")));
    }
    json::text(&bytes).map(str::to_owned)
}

fn refused(source: &str, error: ConfigError) -> LoadError {
    LoadError { source: source.to_owned(), error }
}

/// The verdict of `culvertd --mode validate -c path`: where the file is good, what is deprecated in it. Of a `DiscoveryResponse`, which
/// only resources are read from, the verdict on those.
///
/// # Errors
/// As [`load`].
pub fn validate(path: &Path) -> Result<Vec<ConfigError>, LoadError> {
    let source = path.display().to_string();
    let format = Format::of_file(path);
    if let Ok(text) = read(path)
        && resources::is_response(&text, format)
    {
        return resources::validate(&text, format).map(|()| Vec::new()).map_err(|error| refused(&source, error));
    }
    let flags = Flags { config_path: Some(path.to_owned()), ..Flags::default() };
    let (_, checked) = load(&flags)?;
    if checked.warnings.is_empty() {
        return Ok(Vec::new());
    }
    let text = read(path).map_err(|error| refused(&source, error))?;
    let warnings = checked.warnings.into_iter();
    Ok(warnings.map(|warning| ConfigError::new(warning.path, warning.message).locate(&text)).collect())
}

/// Puts into `node` what the flags and the program say of it.
fn identify(message: &mut Message, flags: &Flags) {
    let node = message.node.get_or_insert_default();
    if let Some(id) = &flags.service_node {
        node.id.clone_from(id);
    }
    if let Some(cluster) = &flags.service_cluster {
        node.cluster.clone_from(cluster);
    }
    if let Some(zone) = &flags.service_zone {
        node.locality.get_or_insert_with(Locality::default).zone.clone_from(zone);
    }
    node.user_agent_name = "culvert".to_owned();
    node.user_agent_version_type = Some(UserAgentVersionType::UserAgentVersion(env!("CARGO_PKG_VERSION").to_owned()));
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
