//! What this node is called, as some headers tell it.

use std::sync::OnceLock;

use http::HeaderValue;

/// `node.id` and `node.cluster`.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: HeaderValue,
    pub(super) cluster: HeaderValue,
}

static NODE: OnceLock<Node> = OnceLock::new();

/// Names this node; the first word counts.
pub fn set_node(id: &str, cluster: &str) {
    if let (Ok(id), Ok(cluster)) = (HeaderValue::from_str(id), HeaderValue::from_str(cluster)) {
        // A later word changes nothing.
        let _ = NODE.set(Node { id, cluster });
    }
}

/// This node, where it has been named.
pub(super) fn this() -> Option<&'static Node> {
    NODE.get()
}
