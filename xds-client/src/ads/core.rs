//! The state machine: takes events in, and says what is to be applied and what is to be sent.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::Node;

use super::entries::Offered;
use super::nack;
use super::resource::Intake;
use super::subscription::{OnStream, Pending, Subscription};
use super::{Handled, Ignored, Interest, Outcome, Rejection, Request, Response, Token, Update, Variant, type_url};

/// The client's side of ADS.
///
/// Absence means removal where the server decides what there is: in every type that is subscribed to by wildcard, and
/// in LDS and CDS even by name. A resource of any other type that is subscribed to by name stays in force until
/// nobody is interested in it any more, whatever the server says, as in Envoy.
///
/// Any number of updates may be under way, of one type as well. They may be finished in any order: for each resource,
/// what a newer update has settled stays. Every incremental response is answered. Of state-of-the-world responses, one
/// that is finished after a newer one of its type is not: servers pass over such answers as stale.
pub struct Core {
    variant: Variant,
    node: Node,
    /// In the order of requests.
    subscriptions: BTreeMap<(u8, String), Subscription>,
    stream: Option<Stream>,
    next_token: u64,
}

#[derive(Default)]
struct Stream {
    node_sent: bool,
}

impl Core {
    /// A client that is interested in nothing yet.
    pub fn new(node: Node, variant: Variant) -> Self {
        Core { variant, node, subscriptions: BTreeMap::new(), stream: None, next_token: 0 }
    }

    /// The variant spoken.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// A new stream is there: what is wanted is asked for again, with the versions in force.
    pub fn connected(&mut self) {
        self.disconnected();
        self.stream = Some(Stream::default());
    }

    /// The stream is lost. What is in force stays.
    pub fn disconnected(&mut self) {
        self.stream = None;
        for subscription in self.subscriptions.values_mut() {
            subscription.on_stream = OnStream::default();
            for pending in subscription.pending.values_mut() {
                pending.answerable = false;
            }
        }
    }

    /// Sets what is wanted of a type. Resources that are not wanted any more are forgotten.
    pub fn set_interest(&mut self, type_url: &str, interest: Interest) {
        let (key, interest) = (key(type_url), interest.normal());
        if interest == Interest::None && !self.subscriptions.contains_key(&key) {
            return;
        }
        self.subscriptions.entry(key).or_default().set_interest(interest, self.next_token);
    }

    /// What is wanted of a type.
    pub fn interest(&self, type_url: &str) -> &Interest {
        self.subscriptions.get(&key(type_url)).map_or(&Interest::None, |subscription| &subscription.interest)
    }

    /// Takes a response in. What became of the update is told to [`Core::finish`], or [`Core::abandon`], at any time.
    pub fn handle(&mut self, response: Response) -> Handled {
        if self.stream.is_none() {
            return Handled::Ignored(Ignored::NotConnected);
        }
        let (type_url, nonce, version) = match (&response, self.variant) {
            (Response::Sotw(it), Variant::Sotw) => (it.type_url.clone(), it.nonce.clone(), it.version_info.clone()),
            (Response::Delta(it), Variant::Delta) => {
                (it.type_url.clone(), it.nonce.clone(), it.system_version_info.clone())
            }
            _ => return Handled::Ignored(Ignored::WrongVariant),
        };
        let key = key(&type_url);
        let Some(subscription) = self.subscriptions.get_mut(&key).filter(|it| it.on_stream.asked) else {
            return Handled::Ignored(Ignored::UnknownType);
        };
        self.next_token += 1;
        let token = self.next_token;
        subscription.on_stream.newest = token;
        let server_owned = subscription.interest.is_server_owned(&type_url);
        let mut intake = Intake {
            type_url: &type_url,
            version: version.as_str().into(),
            token,
            interest: &subscription.interest,
            entries: &mut subscription.entries,
            added: Vec::new(),
            offered: Offered::default(),
            rejected: Vec::new(),
        };
        let mut complete = false;
        match response {
            Response::Sotw(response) => {
                complete = server_owned;
                for body in response.resources {
                    intake.add(body);
                }
                if complete {
                    intake.entries.offer_removal_of_unseen(token, &mut intake.offered);
                }
            }
            Response::Delta(response) => {
                for wrapper in response.resources {
                    intake.add_wrapped(wrapper);
                }
                for name in response.removed_resources {
                    intake.remove(name, server_owned);
                }
            }
        }
        let Intake { added, offered, rejected, .. } = intake;
        let removed = offered.removed.iter().map(|name| name.to_string()).collect();
        subscription.pending.insert(token, Pending { nonce, version, offered, rejected, answerable: true });
        Handled::Update(Token { key, token }, Update { type_url, added, removed, complete })
    }

    /// The update has been applied: whatever the outcome does not reject is in force. Returns all rejections, with
    /// those of resources that were never handed out.
    pub fn finish(&mut self, token: Token, outcome: Outcome) -> Vec<Rejection> {
        let Token { key, token } = token;
        let Some(subscription) = self.subscriptions.get_mut(&key) else { return outcome.rejected };
        let Some(pending) = subscription.pending.remove(&token) else { return outcome.rejected };
        let Pending { nonce, version, offered, mut rejected, answerable } = pending;
        subscription.entries.finish(token, offered, &outcome);
        rejected.extend(outcome.rejected);
        if rejected.is_empty() && token > subscription.version_of {
            (subscription.version, subscription.version_of) = (version, token);
        }
        if answerable {
            subscription.answer(token, nonce, nack::detail(&rejected), self.variant == Variant::Sotw);
        }
        rejected
    }

    /// The update will never be applied: its response counts as never received, and is not answered.
    pub fn abandon(&mut self, token: Token) {
        let Token { key, token } = token;
        let Some(subscription) = self.subscriptions.get_mut(&key) else { return };
        let Some(pending) = subscription.pending.remove(&token) else { return };
        subscription.entries.abandon(token, pending.offered);
        if pending.answerable {
            subscription.give_up_answer(token);
        }
    }

    /// What is to be sent now, in order: RTDS, CDS, EDS, LDS, RDS, then other types.
    pub fn outgoing(&mut self) -> Vec<Request> {
        let Some(stream) = &mut self.stream else { return Vec::new() };
        let mut requests = Vec::new();
        for ((_, type_url), subscription) in &mut self.subscriptions {
            match self.variant {
                Variant::Sotw => subscription.sotw_requests(type_url, &mut requests),
                Variant::Delta => subscription.delta_requests(type_url, &mut requests),
            }
        }
        if let (false, Some(first)) = (stream.node_sent, requests.first_mut()) {
            stream.node_sent = true;
            match first {
                Request::Sotw(request) => request.node = Some(self.node.clone()),
                Request::Delta(request) => request.node = Some(self.node.clone()),
            }
        }
        requests
    }
}

impl Interest {
    /// Whether absence from a response, or a word of the server, removes a resource.
    fn is_server_owned(&self, type_url: &str) -> bool {
        match self {
            Interest::None => false,
            Interest::Wildcard | Interest::WildcardAnd(_) => true,
            Interest::Names(_) => matches!(type_url, type_url::CLUSTER | type_url::LISTENER),
        }
    }
}

/// Types in the order of requests: what others refer to comes first.
fn key(type_url: &str) -> (u8, String) {
    let rank = match type_url {
        type_url::RUNTIME => 0,
        type_url::CLUSTER => 1,
        type_url::ENDPOINT => 2,
        type_url::LISTENER => 3,
        type_url::ROUTE => 4,
        _ => 5,
    };
    (rank, type_url.to_owned())
}
