//! Requests of the incremental variant.

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;

use super::Request;
use super::subscription::{Change, Subscription, WILDCARD};

impl Subscription {
    /// What is to be sent now. Beyond `limit` requests, answers and changes stay for another time.
    pub(super) fn delta_requests(&mut self, type_url: &str, limit: usize, requests: &mut Vec<Request>) {
        while let Some(answer) = self.on_stream.answers.pop_front() {
            requests.push(Request::Delta(DeltaDiscoveryRequest {
                type_url: type_url.to_owned(),
                response_nonce: answer.nonce,
                error_detail: answer.error,
                ..Default::default()
            }));
            if requests.len() >= limit {
                return;
            }
        }
        if self.is_silent() || !self.is_changed() {
            return;
        }
        if !self.on_stream.asked {
            requests.push(self.first_delta_request(type_url));
            return;
        }
        let Change { unsubscribe, subscribe, again } = self.change();
        let request = |subscribe: Vec<String>, unsubscribe: Vec<String>| {
            Request::Delta(DeltaDiscoveryRequest {
                type_url: type_url.to_owned(),
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                ..Default::default()
            })
        };
        if !subscribe.is_empty() || !unsubscribe.is_empty() {
            requests.push(request(subscribe, unsubscribe));
        }
        if !again.is_empty() {
            requests.push(request(again, Vec::new()));
        }
    }

    fn first_delta_request(&mut self, type_url: &str) -> Request {
        self.change();
        let mut names: Vec<String> = self.interest.names().into_iter().flatten().cloned().collect();
        // A request that names nothing asks for everything, which older servers understand as well.
        if self.interest.is_wildcard() && !names.is_empty() {
            names.push(WILDCARD.to_owned());
        }
        let claims = self.entries.claims().map(|(name, version)| (name.to_string(), version.to_string()));
        Request::Delta(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_subscribe: names,
            initial_resource_versions: claims.collect(),
            ..Default::default()
        })
    }
}
