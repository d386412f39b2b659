//! The state that both variants share: subscriptions, what is in force, and what is to be acknowledged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::rpc::Status;

use super::delta;
use super::resource::Incoming;
use super::{Handled, Ignored, Interest, Outcome, Rejection, Request, Response, Token, Update, Variant, type_url};

/// gRPC's code INTERNAL, which Envoy puts into its NACKs.
const NACK_CODE: i32 = 13;
/// The longest text of a NACK, in bytes: some servers log every one.
const MAX_NACK_BYTES: usize = 16 * 1024;

/// The client's side of ADS.
///
/// Absence means removal where the server decides what there is: in every type that is subscribed to by wildcard, and
/// in LDS and CDS even by name. A resource of any other type that is subscribed to by name stays in force until
/// nobody is interested in it any more, whatever the server says, as in Envoy.
pub struct Core {
    variant: Variant,
    node: Node,
    /// In the order of requests.
    subscriptions: BTreeMap<(u8, String), Subscription>,
    stream: Option<Stream>,
    /// The update that is being applied.
    pending: Option<Pending>,
    next_token: u64,
}

#[derive(Default)]
struct Stream {
    node_sent: bool,
}

/// One resource type.
#[derive(Default)]
pub(super) struct Subscription {
    pub(super) interest: Interest,
    /// The version of the last response that was accepted as a whole (state of the world only).
    pub(super) version: String,
    /// Resources in force, with their versions.
    pub(super) held: BTreeMap<String, String>,
    pub(super) on_stream: OnStream,
}

/// What is forgotten when the stream is lost.
#[derive(Default)]
pub(super) struct OnStream {
    /// What was last asked for. `None`: nothing was, ever.
    pub(super) asked: Option<Asked>,
    /// Names have been given.
    pub(super) named: bool,
    /// What interest was lost in since `asked` was sent: the server must hear of it even if it is wanted again now,
    /// or it would not send it again.
    dropped: Asked,
    /// The nonce of the last response that was finished.
    pub(super) nonce: String,
    /// The nonce of the last response that was handled.
    seen: Option<String>,
    /// Answers to be sent.
    answers: VecDeque<Answer>,
}

/// What a request asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) wildcard: bool,
    pub(super) names: BTreeSet<String>,
}

/// An ACK, or with an error a NACK.
pub(super) struct Answer {
    pub(super) nonce: String,
    pub(super) error: Option<Status>,
}

struct Pending {
    token: u64,
    key: (u8, String),
    nonce: String,
    version: String,
    /// Names and versions handed out to be applied.
    added: Vec<(String, String)>,
    removed: Vec<String>,
    rejected: Vec<Rejection>,
    /// The stream that the response came from is still there.
    answerable: bool,
}

impl Core {
    /// A client that is interested in nothing yet.
    pub fn new(node: Node, variant: Variant) -> Self {
        Core { variant, node, subscriptions: BTreeMap::new(), stream: None, pending: None, next_token: 0 }
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
        }
        if let Some(pending) = &mut self.pending {
            pending.answerable = false;
        }
    }

    /// Sets what is wanted of a type. Resources that are not wanted any more are forgotten.
    pub fn set_interest(&mut self, type_url: &str, interest: Interest) {
        let key = key(type_url);
        if interest == Interest::None && !self.subscriptions.contains_key(&key) {
            return;
        }
        let subscription = self.subscriptions.entry(key).or_default();
        let (before, now) = (subscription.interest.asks(), interest.asks());
        if before == now {
            return;
        }
        subscription.on_stream.dropped.wildcard |= before.wildcard && !now.wildcard;
        subscription.on_stream.dropped.names.extend(before.names.difference(&now.names).cloned());
        subscription.held.retain(|name, _| interest.includes(name));
        if now.is_nothing() {
            subscription.version.clear();
        }
        subscription.interest = interest;
    }

    /// What is wanted of a type.
    pub fn interest(&self, type_url: &str) -> &Interest {
        self.subscriptions.get(&key(type_url)).map_or(&Interest::None, |subscription| &subscription.interest)
    }

    /// Takes a response in. An update must be reported to [`Core::finish`] before the next response is handled: an
    /// update that is not counts as never received.
    pub fn handle(&mut self, response: Response) -> Handled {
        if self.stream.is_none() {
            return Handled::Ignored(Ignored::NotConnected);
        }
        let (type_url, nonce) = match (&response, self.variant) {
            (Response::Sotw(response), Variant::Sotw) => (response.type_url.clone(), response.nonce.clone()),
            (Response::Delta(response), Variant::Delta) => (response.type_url.clone(), response.nonce.clone()),
            _ => return Handled::Ignored(Ignored::WrongVariant),
        };
        let key = key(&type_url);
        let Some(subscription) = self.subscriptions.get_mut(&key).filter(|s| s.on_stream.asked.is_some()) else {
            return Handled::Ignored(Ignored::UnknownType);
        };
        if !nonce.is_empty() && subscription.on_stream.seen.as_ref() == Some(&nonce) {
            return Handled::Ignored(Ignored::StaleNonce);
        }
        subscription.on_stream.seen = Some(nonce.clone());

        let server_owned = subscription.interest.is_server_owned(&type_url);
        let mut incoming = Incoming::default();
        let (version, complete, removed) = match response {
            Response::Sotw(response) => {
                for body in response.resources {
                    incoming.add(&type_url, &response.version_info, body);
                }
                let absent = |name: &&String| server_owned && !incoming.names.contains(*name);
                let removed = subscription.held.keys().filter(absent).cloned().collect();
                (response.version_info, server_owned, removed)
            }
            Response::Delta(response) => {
                for wrapper in response.resources {
                    incoming.add_wrapped(&type_url, &response.system_version_info, wrapper);
                }
                let mut removed = Vec::new();
                for name in response.removed_resources {
                    if incoming.names.contains(&name) {
                        incoming.resources.retain(|resource| resource.name != name);
                        let message = "name: both sent and removed in one response".to_owned();
                        incoming.rejected.push(Rejection { name, message });
                    } else if !server_owned {
                        // Stays in force, and yet a new stream must not claim to have it.
                        subscription.held.remove(&name);
                    } else if subscription.held.contains_key(&name) {
                        removed.push(name);
                    }
                }
                (response.system_version_info, false, removed)
            }
        };
        // Nobody asked for these (or no longer): they are acknowledged all the same, as in Envoy.
        incoming.resources.retain(|resource| subscription.interest.includes(&resource.name));

        self.next_token += 1;
        let token = self.next_token;
        self.pending = Some(Pending {
            token,
            key,
            nonce,
            version,
            added: incoming.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect(),
            removed: removed.clone(),
            rejected: incoming.rejected,
            answerable: true,
        });
        Handled::Update(Token(token), Update { type_url, added: incoming.resources, removed, complete })
    }

    /// The update has been applied: whatever the outcome does not reject is in force. Returns all rejections, with
    /// those of resources that were never handed out.
    pub fn finish(&mut self, token: Token, outcome: Outcome) -> Vec<Rejection> {
        let Some(pending) = self.pending.take_if(|pending| pending.token == token.0) else { return Vec::new() };
        let Pending { key, nonce, version, added, removed, mut rejected, answerable, .. } = pending;
        rejected.extend(outcome.rejected);
        if let Some(subscription) = self.subscriptions.get_mut(&key) {
            for name in removed {
                subscription.held.remove(&name);
            }
            for (name, version) in added {
                if subscription.interest.includes(&name) && !rejected.iter().any(|rejection| rejection.name == name) {
                    subscription.held.insert(name, version);
                }
            }
            if rejected.is_empty() {
                subscription.version = version;
            }
            if answerable {
                subscription.on_stream.nonce.clone_from(&nonce);
                subscription.on_stream.answers.push_back(Answer { nonce, error: nack(&rejected) });
            }
        }
        rejected
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

impl Subscription {
    /// What to ask for, one after the other: what was lost interest in has to be left out once.
    fn steps(&mut self) -> [Asked; 2] {
        let last = self.interest.asks();
        let dropped = std::mem::take(&mut self.on_stream.dropped);
        let between = Asked {
            wildcard: last.wildcard && !dropped.wildcard,
            names: last.names.difference(&dropped.names).cloned().collect(),
        };
        // Without a first request there is nothing that the server has to forget.
        if self.on_stream.asked.is_none() { [Asked::default(), last] } else { [between, last] }
    }

    fn sotw_requests(&mut self, type_url: &str, requests: &mut Vec<Request>) {
        let steps = self.steps();
        while let Some(answer) = self.on_stream.answers.pop_front() {
            // An answer names everything that is asked for, so it makes the first change as well.
            self.on_stream.asked = Some(steps[0].clone());
            requests.push(Request::Sotw(self.sotw_answer(type_url, &steps[0], answer)));
        }
        for asks in &steps {
            if !(asks.is_nothing() && self.on_stream.asked.is_none()) {
                requests.extend(self.sotw_change(type_url, asks).map(Request::Sotw));
            }
        }
    }

    fn delta_requests(&mut self, type_url: &str, requests: &mut Vec<Request>) {
        while let Some(answer) = self.on_stream.answers.pop_front() {
            requests.push(Request::Delta(delta::answer(type_url, answer)));
        }
        for asks in &self.steps() {
            if !(asks.is_nothing() && self.on_stream.asked.is_none()) {
                requests.extend(self.delta_change(type_url, asks).map(Request::Delta));
            }
        }
    }
}

impl Interest {
    /// Whether absence from a response, or a word of the server, removes a resource.
    fn is_server_owned(&self, type_url: &str) -> bool {
        match self {
            Interest::None => false,
            Interest::Wildcard => true,
            Interest::Names(_) => matches!(type_url, type_url::CLUSTER | type_url::LISTENER),
        }
    }

    /// Whether the resource of this name is wanted.
    pub fn includes(&self, name: &str) -> bool {
        match self {
            Interest::None => false,
            Interest::Wildcard => true,
            Interest::Names(names) => names.contains(name),
        }
    }

    pub(super) fn asks(&self) -> Asked {
        match self {
            Interest::None => Asked::default(),
            Interest::Wildcard => Asked { wildcard: true, names: BTreeSet::new() },
            Interest::Names(names) => Asked { wildcard: false, names: names.clone() },
        }
    }
}

impl Asked {
    pub(super) fn is_nothing(&self) -> bool {
        !self.wildcard && self.names.is_empty()
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

/// The NACK's detail, naming every rejected resource as far as there is room.
fn nack(rejected: &[Rejection]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let mut message = String::new();
    for (index, Rejection { name, message: why }) in rejected.iter().enumerate() {
        let line = if name.is_empty() { why.clone() } else { format!("{name}: {why}") };
        if !message.is_empty() && message.len() + line.len() > MAX_NACK_BYTES {
            message.push_str(&format!("\nand {} more", rejected.len() - index));
            break;
        }
        if !message.is_empty() {
            message.push('\n');
        }
        message.push_str(&line);
    }
    Some(Status { code: NACK_CODE, message, details: Vec::new() })
}
