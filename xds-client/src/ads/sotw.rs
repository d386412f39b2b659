//! Requests of the state-of-the-world variant.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;

use super::Request;
use super::subscription::{Answer, Subscription, WILDCARD};

impl Subscription {
    /// What is to be sent now.
    ///
    /// Servers pass over a request whose nonce is not that of the newest response. So what is wanted does not change
    /// for them while that one is being applied; its answer says all of it.
    ///
    /// Beyond `limit` requests, answers stay for another time.
    pub(super) fn sotw_requests(&mut self, type_url: &str, limit: usize, requests: &mut Vec<Request>) {
        if self.is_silent() {
            return;
        }
        let first = !self.on_stream.asked;
        // On a new stream the version tells the server that this client has all of that version. Then it must not be
        // sent when something is missing, or may be once all updates are finished, or it might never come.
        let missing = |name: &String| !self.entries.is_in_force(name);
        let unsure = self.expired.is_some() || !self.pending.is_empty();
        let lacks = || unsure || self.interest.names().into_iter().flatten().any(missing);
        let version = if first && lacks() { String::new() } else { self.version.clone() };
        let mut changed = self.is_changed();
        let mut again = BTreeSet::new();
        while let Some(answer) = self.on_stream.answers.pop_front() {
            // Servers take no notice of what else an answer to an older response says.
            if answer.token == self.on_stream.newest && changed {
                again = self.sotw_change();
                changed = false;
            }
            requests.push(self.sotw_request(type_url, &again, self.version.clone(), answer));
            if requests.len() >= limit && !self.on_stream.answers.is_empty() {
                return;
            }
        }
        if self.is_answer_due() || !changed && again.is_empty() {
            return;
        }
        let nonce = self.on_stream.nonce.clone();
        let ask = |nonce| Answer { nonce, error: None, token: 0 };
        if changed {
            again = self.sotw_change();
            let left_out = !again.is_empty();
            if left_out && self.can_ask_for(&again) {
                requests.push(self.sotw_request(type_url, &again, version.clone(), ask(nonce.clone())));
            }
        }
        let nothing = BTreeSet::new();
        if self.can_ask_for(&nothing) {
            requests.push(self.sotw_request(type_url, &nothing, version, ask(nonce)));
        }
    }

    /// What is to be left out once, to be asked for again.
    fn sotw_change(&mut self) -> BTreeSet<String> {
        self.on_stream.leave_out_unheard();
        let change = self.change();
        self.on_stream.doubt(&change);
        change.again.into_iter().collect()
    }

    /// Without names a request would ask for everything, unless there were some before. There is no way back from that
    /// on one stream: what still comes is acknowledged and ignored.
    fn can_ask_for(&self, without: &BTreeSet<String>) -> bool {
        let names = self.interest.names().is_some_and(|names| names.iter().any(|name| !without.contains(name)));
        names || self.on_stream.named || self.interest.is_wildcard() && !without.contains(WILDCARD)
    }

    /// An ACK, a NACK, or a change, which is an ACK of what was answered before. Names all that is wanted.
    fn sotw_request(
        &mut self,
        type_url: &str,
        without: &BTreeSet<String>,
        version_info: String,
        answer: Answer,
    ) -> Request {
        let names = self.interest.names().into_iter().flatten();
        let mut resource_names: Vec<String> = names.filter(|name| !without.contains(*name)).cloned().collect();
        let wildcard = self.interest.is_wildcard() && !without.contains(WILDCARD);
        self.on_stream.named |= !resource_names.is_empty();
        // No names means a wildcard only as long as none was ever given.
        if wildcard && self.on_stream.named {
            resource_names.push(WILDCARD.to_owned());
        }
        Request::Sotw(DiscoveryRequest {
            version_info,
            resource_names,
            type_url: type_url.to_owned(),
            response_nonce: answer.nonce,
            error_detail: answer.error,
            ..Default::default()
        })
    }
}
