//! Requests of the state-of-the-world variant.

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;

use super::core::{Answer, Asked, Subscription};

impl Subscription {
    /// The request that changes what is asked for into `asks`; `None` where there is nothing to change.
    pub(super) fn sotw_change(&mut self, type_url: &str, asks: &Asked) -> Option<DiscoveryRequest> {
        let first = self.on_stream.asked.is_none();
        let asked = self.on_stream.asked.clone().unwrap_or_default();
        if asked == *asks {
            return None;
        }
        self.on_stream.asked = Some(asks.clone());
        if asks.is_nothing() && !self.on_stream.named {
            // Without names this would ask for everything. There is no way back from that on one stream: what still
            // comes is acknowledged and ignored.
            return None;
        }
        // On a new stream the version tells the server that this client has all of that version. Then it must not be
        // sent when something is missing, or it might never come.
        let missing = asks.names.iter().any(|name| !self.held.contains_key(name));
        let version = if first && missing { String::new() } else { self.version.clone() };
        Some(self.sotw_request(type_url, asks, version, self.on_stream.nonce.clone()))
    }

    /// An ACK or NACK.
    pub(super) fn sotw_answer(&mut self, type_url: &str, asks: &Asked, answer: Answer) -> DiscoveryRequest {
        let request = self.sotw_request(type_url, asks, self.version.clone(), answer.nonce);
        DiscoveryRequest { error_detail: answer.error, ..request }
    }

    fn sotw_request(&mut self, type_url: &str, asks: &Asked, version: String, nonce: String) -> DiscoveryRequest {
        let mut resource_names: Vec<String> = asks.names.iter().cloned().collect();
        if !resource_names.is_empty() {
            self.on_stream.named = true;
        } else if asks.wildcard && self.on_stream.named {
            // No names means a wildcard only as long as none was ever given.
            resource_names.push("*".to_owned());
        }
        DiscoveryRequest {
            version_info: version,
            resource_names,
            type_url: type_url.to_owned(),
            response_nonce: nonce,
            ..Default::default()
        }
    }
}
