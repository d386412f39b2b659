//! Requests of the incremental variant.

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;

use super::core::{Answer, Asked, Subscription};

impl Subscription {
    /// The request that changes what is asked for into `asks`; `None` where there is nothing to change.
    pub(super) fn delta_change(&mut self, type_url: &str, asks: &Asked) -> Option<DeltaDiscoveryRequest> {
        let first = self.on_stream.asked.is_none();
        let asked = self.on_stream.asked.clone().unwrap_or_default();
        if asked == *asks {
            return None;
        }
        let wildcard = |wanted: bool| wanted.then(|| "*".to_owned());
        // A stream's first request asks for everything by naming nothing, which older servers understand as well.
        let subscribe_all = asks.wildcard && !asked.wildcard && !first;
        let request = DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_subscribe: asks
                .names
                .difference(&asked.names)
                .cloned()
                .chain(wildcard(subscribe_all))
                .collect(),
            resource_names_unsubscribe: asked
                .names
                .difference(&asks.names)
                .cloned()
                .chain(wildcard(asked.wildcard && !asks.wildcard))
                .collect(),
            initial_resource_versions: match first {
                true => self.held.iter().map(|(name, version)| (name.clone(), version.clone())).collect(),
                false => Default::default(),
            },
            ..Default::default()
        };
        self.on_stream.asked = Some(asks.clone());
        Some(request)
    }
}

/// An ACK or NACK.
pub(super) fn answer(type_url: &str, answer: Answer) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: answer.nonce,
        error_detail: answer.error,
        ..Default::default()
    }
}
