//! What a proxy is for, which decides what listeners it is given.

use std::fmt;
use std::str::FromStr;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::protobuf::value::Kind;
use serde::Serialize;

/// The metadata of a node that says what it is for.
pub const METADATA: &str = "culvert.proxy";

/// What a proxy is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// For all pods of a node, whose connections it takes over.
    #[default]
    Node,
    /// For the pod that it runs in, whose connections are redirected to it.
    Sidecar,
    /// For calls from outside the mesh.
    Edge,
}

impl Role {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Node, Self::Sidecar, Self::Edge];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Sidecar => "sidecar",
            Self::Edge => "edge",
        }
    }

    /// What a node says that it is; one that says nothing is a node's.
    ///
    /// # Errors
    /// What it says, if that is none of them.
    pub fn of(node: &Node) -> Result<Self, String> {
        let stated = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(METADATA));
        match stated.and_then(|value| value.kind.as_ref()) {
            None => Ok(Self::default()),
            Some(Kind::StringValue(name)) => {
                name.parse().map_err(|error| format!("node.metadata `{METADATA}`: {error}"))
            }
            Some(_) => Err(format!("node.metadata `{METADATA}`: is no text; it is node, sidecar or edge")),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// The longest part of it that is told, in characters.
        const SHOWN: usize = 64;
        let found = Self::ALL.into_iter().find(|role| role.name() == text);
        found.ok_or_else(|| {
            let shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
            format!("`{shown}` is not node, sidecar or edge")
        })
    }
}
