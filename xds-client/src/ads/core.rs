//! The state machine: takes events in, and says what is to be applied and what is to be sent.

use std::collections::{BTreeMap, btree_map::Entry};
use std::time::Instant;

use envoy_types::pb::envoy::config::core::v3::Node;

use super::entries::Offered;
use super::nack;
use super::resource::{Intake, Intook};
use super::subscription::{OnStream, Pending, Subscription};
use super::{Handled, Ignored, Interest, Outcome, Rejection, Request, Response, Token, Update, Variant, type_url};

/// The client's side of ADS.
///
/// Absence means removal where the server decides what there is: in every type that is subscribed to by wildcard, and
/// in LDS and CDS even by name. A resource of any other type that is subscribed to by name stays in force however often
/// state of the world leaves it out. Where an incremental server says that it removes one, that is obeyed, but in EDS,
/// RDS and SDS, where Envoy does not. A resource whose time to live has run out is removed whatever its type, as far as the core
/// is concerned; what its owner does about one in use is its own affair.
///
/// Any number of updates may be under way, of one type as well. They may be finished in any order: for each resource,
/// what a newer update has settled stays. Every incremental response is answered. Of state-of-the-world responses, one
/// that is finished after a newer one of its type is not: servers pass over such answers as stale.
///
/// The core has no clock: whoever owns it says what time it is, and calls [`Core::expire`] at [`Core::next_expiry`].
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
        let now = self.next_token;
        self.subscription(key).set_interest(interest, now);
    }

    /// Wants one more resource of a type, or one less, by name: costs less than [`Core::set_interest`] with all names.
    pub fn set_wanted(&mut self, type_url: &str, name: &str, wanted: bool) {
        let key = key(type_url);
        if wanted || self.subscriptions.contains_key(&key) {
            let now = self.next_token;
            self.subscription(key).set_wanted(name, wanted, now);
        }
    }

    fn subscription(&mut self, key: (u8, String)) -> &mut Subscription {
        match self.subscriptions.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let subscription = Subscription::new(&entry.key().1);
                entry.insert(subscription)
            }
        }
    }

    /// What is wanted of a type.
    pub fn interest(&self, type_url: &str) -> &Interest {
        self.subscriptions.get(&key(type_url)).map_or(&Interest::None, |subscription| &subscription.interest)
    }

    /// Takes a response in. What became of the update is told to [`Core::finish`], or [`Core::abandon`], at any time.
    pub fn handle(&mut self, response: Response, now: Instant) -> Handled {
        if self.stream.is_none() {
            return Handled::Ignored(Ignored::NotConnected);
        }
        let (key, nonce, version) = match (&response, self.variant) {
            (Response::Sotw(it), Variant::Sotw) => (key(&it.type_url), it.nonce.clone(), it.version_info.clone()),
            (Response::Delta(it), Variant::Delta) => {
                (key(&it.type_url), it.nonce.clone(), it.system_version_info.clone())
            }
            _ => return Handled::Ignored(Ignored::WrongVariant),
        };
        let Some(subscription) = self.subscriptions.get_mut(&key).filter(|it| it.on_stream.asked) else {
            return Handled::Ignored(Ignored::UnknownType);
        };
        self.next_token += 1;
        let (token, type_url) = (self.next_token, &*key.1);
        subscription.on_stream.newest = token;
        let mut intake = Intake {
            type_url,
            version: version.as_str().into(),
            by_version: self.variant == Variant::Delta,
            token,
            now,
            place: 0,
            interest: &subscription.interest,
            entries: &mut subscription.entries,
            taken: Intook::default(),
        };
        let mut complete = false;
        match response {
            Response::Sotw(response) => {
                for (place, body) in response.resources.into_iter().enumerate() {
                    intake.place = place;
                    intake.add(body);
                }
                // What only says that something is still good does not say what else there is.
                let only_heartbeats = intake.taken.heartbeats > 0 && intake.taken.bodies == 0;
                // Nor does a response of which a part cannot be told apart: the missing resource may be that part.
                let tells_all = !only_heartbeats && !intake.taken.unidentified;
                complete = subscription.interest.absence_removes(type_url) && tells_all;
                if complete {
                    intake.entries.remove_unseen(token, &mut intake.taken.offered);
                }
            }
            Response::Delta(response) => {
                for (place, wrapper) in response.resources.into_iter().enumerate() {
                    intake.place = place;
                    intake.add_wrapped(wrapper);
                }
                for name in response.removed_resources {
                    intake.remove(&name, subscription.interest.removal_removes(type_url, &name));
                }
            }
        }
        let Intook { added, unchanged, absent, offered, rejected, .. } = intake.finish();
        subscription.confirm();
        let removed = offered.removed.iter().map(|name| name.to_string()).collect();
        let (type_url, response) = (key.1.clone(), Some((nonce, version.clone())));
        subscription.pending.insert(token, Pending { response, offered, rejected, answerable: true });
        let update = Update { type_url, version, added, unchanged, removed, absent, complete };
        Handled::Update(Token { key, token }, update)
    }

    /// The types that were asked for on this stream and are wanted, and whether a response has come of each.
    pub(crate) fn asked(&self) -> impl Iterator<Item = (&str, bool)> {
        let asked = self.subscriptions.values().filter(|it| it.on_stream.asked && it.interest != Interest::None);
        asked.map(|it| (&*it.type_url, it.on_stream.responses > 0))
    }

    /// Whether all types that were asked for on this stream have had a response.
    pub(crate) fn is_answered(&self) -> bool {
        self.asked().all(|(_, answered)| answered)
    }

    /// Whether a response is rejected whatever becomes of its update: for what is wrong with it as a whole, or with resources
    /// that were never handed out.
    pub(crate) fn is_at_fault(&self, token: &Token) -> bool {
        let pending = self.subscriptions.get(&token.key).and_then(|it| it.pending.get(&token.token));
        pending.is_some_and(|it| !it.rejected.is_empty())
    }

    /// The names that a response's update rejects whatever becomes of it.
    #[cfg(test)]
    pub(super) fn rejected(&self, token: &Token) -> Vec<&str> {
        let pending = self.subscriptions.get(&token.key).and_then(|it| it.pending.get(&token.token));
        pending.into_iter().flat_map(|it| &it.rejected).map(|it| it.name.as_str()).collect()
    }

    /// The resources whose time to live has run out: removals, to be applied and finished as any update.
    pub fn expire(&mut self, now: Instant) -> Vec<(Token, Update)> {
        let mut updates = Vec::new();
        for (key, subscription) in &mut self.subscriptions {
            if subscription.entries.next_expiry().is_none_or(|at| at > now) {
                continue;
            }
            self.next_token += 1;
            let (token, mut offered) = (self.next_token, Offered::default());
            subscription.entries.remove_expired(now, token, &mut offered);
            subscription.expired = Some(token);
            let removed = offered.removed.iter().map(|name| name.to_string()).collect();
            let rejected = Vec::new();
            subscription.pending.insert(token, Pending { response: None, offered, rejected, answerable: false });
            let update = Update { type_url: key.1.clone(), removed, ..Update::default() };
            updates.push((Token { key: key.clone(), token }, update));
        }
        updates
    }

    /// When [`Core::expire`] is to be called next.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.subscriptions.values().filter_map(|subscription| subscription.entries.next_expiry()).min()
    }

    /// The update has been applied: whatever the outcome does not reject is in force. Returns all rejections, with
    /// those of resources that were never handed out.
    pub fn finish(&mut self, token: Token, outcome: Outcome) -> Vec<Rejection> {
        let Token { key, token } = token;
        let Some(subscription) = self.subscriptions.get_mut(&key) else { return outcome.rejected };
        let Some(pending) = subscription.pending.remove(&token) else { return outcome.rejected };
        let Pending { response, offered, mut rejected, answerable } = pending;
        subscription.entries.finish(token, offered, &outcome);
        rejected.extend(outcome.rejected);
        let Some((nonce, version)) = response else { return rejected };
        if rejected.is_empty() && token > subscription.version_of {
            (subscription.version, subscription.version_of) = (version, token);
            subscription.expired.take_if(|expired| *expired < token);
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

    /// How many answers to responses are to be sent.
    pub fn unsent_answers(&self) -> usize {
        self.subscriptions.values().map(|subscription| subscription.on_stream.answers.len()).sum()
    }

    /// What is to be sent now, in order: RTDS, CDS, EDS, LDS, RDS, then other types.
    pub fn outgoing(&mut self) -> Vec<Request> {
        self.outgoing_some(usize::MAX)
    }

    /// The first of what is to be sent now: `limit` requests, and those few that belong to the last of them. The rest is made
    /// when it is called again.
    pub fn outgoing_some(&mut self, limit: usize) -> Vec<Request> {
        let Some(stream) = &mut self.stream else { return Vec::new() };
        let mut requests = Vec::new();
        for ((_, type_url), subscription) in &mut self.subscriptions {
            if requests.len() >= limit {
                break;
            }
            match self.variant {
                Variant::Sotw => subscription.sotw_requests(type_url, limit, &mut requests),
                Variant::Delta => subscription.delta_requests(type_url, limit, &mut requests),
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
    /// Whether a resource that a state-of-the-world response leaves out is gone.
    fn absence_removes(&self, type_url: &str) -> bool {
        match self {
            Interest::None => false,
            Interest::Wildcard | Interest::WildcardAnd(_) => true,
            Interest::Names(_) => matches!(type_url, type_url::CLUSTER | type_url::LISTENER),
        }
    }

    /// Whether a resource that an incremental response removes is gone.
    fn removal_removes(&self, type_url: &str, name: &str) -> bool {
        match self {
            Interest::None => false,
            Interest::Wildcard | Interest::WildcardAnd(_) => true,
            Interest::Names(names) => {
                !matches!(type_url, type_url::ENDPOINT | type_url::ROUTE | type_url::SECRET) || !names.contains(name)
            }
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
        type_url::SCOPED_ROUTES => 4,
        type_url::ROUTE => 5,
        _ => 6,
    };
    (rank, type_url.to_owned())
}
