use std::{fmt, fs, path::PathBuf};

use culvert_xds_client::json::{self, ConfigError};
use envoy_types::pb::envoy::config::{
    bootstrap::v3::Bootstrap as Message,
    core::v3::{Locality, node::UserAgentVersionType},
};

use super::Flags;
use crate::config::{
    FieldError,
    parse::{self, Bootstrap},
};

/// The largest bootstrap file, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Why the daemon cannot start with this configuration: one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    /// The file, or `--config-yaml`.
    pub source: String,
    /// What is wrong with it, beginning with the field where there is one.
    pub message: String,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.message)
    }
}

impl std::error::Error for LoadError {}

/// Reads and checks the bootstrap that the flags name. Returns the message as well, for `/config_dump`.
///
/// # Errors
/// The file and the field that is wrong.
pub fn load(flags: &Flags) -> Result<(Message, Bootstrap), LoadError> {
    let from_flag = "--config-yaml".to_owned();
    let (source, mut message) = match (&flags.config_path, &flags.config_yaml) {
        (Some(path), overlay) => {
            let source = path.display().to_string();
            let text = read(path).map_err(|message| LoadError { source: source.clone(), message })?;
            let base: Message = json::from_yaml(&text).map_err(|error| syntax(&source, &error))?;
            let merged = match overlay {
                Some(overlay) => json::merge_yaml(base, overlay).map_err(|error| syntax(&from_flag, &error))?,
                None => base,
            };
            (source, merged)
        }
        (None, Some(text)) => (from_flag.clone(), json::from_yaml(text).map_err(|error| syntax(&from_flag, &error))?),
        (None, None) => {
            let message = "no bootstrap: name a file with -c, or write it with --config-yaml".to_owned();
            return Err(LoadError { source: "culvertd".to_owned(), message });
        }
    };
    identify(&mut message, flags);
    json::validate(&message).map_err(|error| syntax(&source, &error))?;
    let checked = parse::bootstrap(&message).map_err(|error| field(&source, &error))?;
    if (checked.cds || checked.lds) && checked.node.id.is_empty() {
        let message = "node.id: a control plane needs to know this node: set node.id or --service-node".to_owned();
        return Err(LoadError { source, message });
    }
    Ok((message, checked))
}

fn read(path: &PathBuf) -> Result<String, String> {
    let described = |error: std::io::Error| format!("cannot be read: {error}");
    let size = fs::metadata(path).map_err(described)?.len();
    if size > MAX_BYTES {
        return Err(format!("is {size} bytes long; at most {MAX_BYTES} are read"));
    }
    if path.extension().is_some_and(|extension| extension == "pb" || extension == "pb_text") {
        return Err("protobuf bootstraps are not supported by culvert yet; use YAML or JSON".to_owned());
    }
    fs::read_to_string(path).map_err(described)
}

fn syntax(source: &str, error: &ConfigError) -> LoadError {
    LoadError { source: source.to_owned(), message: error.to_string() }
}

fn field(source: &str, error: &FieldError) -> LoadError {
    LoadError { source: source.to_owned(), message: error.to_string() }
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
