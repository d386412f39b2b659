//! One resource type: what is wanted of it, what the server was asked for, and what is to be answered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use envoy_types::pb::google::rpc::Status;

use super::entries::{Entries, Offered};
use super::{Interest, Rejection, type_url, xdstp};

/// One resource type.
pub(super) struct Subscription {
    pub(super) type_url: String,
    pub(super) interest: Interest,
    /// The version of the last response that was accepted as a whole (state of the world only).
    pub(super) version: String,
    /// The update that `version` came with.
    pub(super) version_of: u64,
    /// The last update of what had expired: until a response has been accepted after it, `version` does not say what is
    /// here.
    pub(super) expired: Option<u64>,
    pub(super) entries: Entries,
    /// Updates that are being applied, by token.
    pub(super) pending: BTreeMap<u64, Pending>,
    pub(super) on_stream: OnStream,
}

/// An update that is being applied.
pub(super) struct Pending {
    /// The nonce and the version of the response that it came with.
    pub(super) response: Option<(String, String)>,
    pub(super) offered: Offered,
    /// What was wrong with the response itself.
    pub(super) rejected: Vec<Rejection>,
    /// The stream that the response came from is still there.
    pub(super) answerable: bool,
}

/// What is forgotten when the stream is lost.
#[derive(Default)]
pub(super) struct OnStream {
    /// Something was asked for.
    pub(super) asked: bool,
    /// Everything was asked for, by the last request.
    pub(super) wildcard: bool,
    /// Names have been given.
    pub(super) named: bool,
    /// Names that are wanted and that the server was not asked for yet.
    fresh: BTreeSet<String>,
    /// Names that the server was asked for and that interest was lost in. It must hear of that even if they are wanted
    /// again by now (and are in `fresh` as well), or it would not send them again.
    gone: BTreeSet<String>,
    wildcard_gone: bool,
    /// How many responses have come.
    pub(super) responses: u64,
    /// State of the world: names that are left out with requests that the server may have passed over, if it was sending
    /// a response meanwhile; by how many responses had come.
    pub(super) dropped: BTreeMap<String, u64>,
    /// State of the world: names that were left out and are asked for again, likewise. To a server that passed over both
    /// nothing has changed.
    pub(super) unconfirmed: BTreeMap<String, u64>,
    /// The nonce of the newest response that was answered, and its update.
    pub(super) nonce: String,
    answered: u64,
    /// The newest response's update.
    pub(super) newest: u64,
    /// Answers to be sent.
    pub(super) answers: VecDeque<Answer>,
}

/// An ACK, or with an error a NACK.
pub(super) struct Answer {
    pub(super) nonce: String,
    pub(super) error: Option<Status>,
    /// The response's update.
    pub(super) token: u64,
}

/// How what was asked for changes. What was lost interest in and is wanted again has to be left out once.
pub(super) struct Change {
    pub(super) unsubscribe: Vec<String>,
    pub(super) subscribe: Vec<String>,
    /// What is subscribed to again, with a request of its own.
    pub(super) again: Vec<String>,
}

/// How many responses of a type a server is taken to have under way to the client at most. go-control-plane has one.
const MAX_UNDER_WAY: u64 = 8;
/// How many names that were lost interest in are remembered.
const MAX_DROPPED: usize = 10_000;

/// The name of everything.
pub(super) const WILDCARD: &str = "*";

impl Subscription {
    /// Nothing is wanted yet.
    pub(super) fn new(type_url: &str) -> Subscription {
        Subscription {
            type_url: type_url.to_owned(),
            interest: Interest::None,
            version: String::new(),
            version_of: 0,
            expired: None,
            entries: Entries::default(),
            pending: BTreeMap::new(),
            on_stream: OnStream::default(),
        }
    }

    /// Sets what is wanted, as of the update `now`.
    pub(super) fn set_interest(&mut self, interest: Interest, now: u64) {
        static NOTHING: BTreeSet<String> = BTreeSet::new();
        let before = std::mem::replace(&mut self.interest, interest);
        let (old, new) = (before.names().unwrap_or(&NOTHING), self.interest.names().unwrap_or(&NOTHING));
        old.difference(new).for_each(|name| self.on_stream.unwanted(name));
        new.difference(old).for_each(|name| self.on_stream.wanted(name));
        if before.is_wildcard() && !self.interest.is_wildcard() {
            self.on_stream.wildcard_gone |= self.on_stream.wildcard;
        }
        // One name more or less can be many resources more or less, where it is a collection.
        let type_url = &*self.type_url;
        let is_collection = |name: &String| type_url == type_url::VIRTUAL_HOST || xdstp::has_scheme(name);
        if before.is_wildcard() && !self.interest.is_wildcard() || old.difference(new).any(is_collection) {
            self.entries.retain(|name| self.interest.includes(type_url, name));
        } else if !self.interest.is_wildcard() {
            old.difference(new).for_each(|name| self.entries.forget(name));
        }
        if before == Interest::None {
            // Nothing is left of what came with it, nor will be of updates that are being applied. The request that says
            // that nothing is wanted any more still has it, as in Envoy.
            (self.version, self.version_of) = (String::new(), now);
        }
    }

    /// Wants one name more, or one less.
    pub(super) fn set_wanted(&mut self, name: &str, wanted: bool, now: u64) {
        if name == WILDCARD {
            let names = self.interest.names().cloned().unwrap_or_default();
            return self.set_interest(Interest::of(wanted, names), now);
        }
        let name = xdstp::normalise(name);
        let is_collection = self.type_url == type_url::VIRTUAL_HOST || xdstp::has_scheme(&name);
        let wildcard = self.interest.is_wildcard();
        let mut names = match std::mem::take(&mut self.interest) {
            Interest::None | Interest::Wildcard => BTreeSet::new(),
            Interest::Names(names) | Interest::WildcardAnd(names) => names,
        };
        let was_nothing = !wildcard && names.is_empty();
        let changed = if wanted { names.insert(name.clone().into_owned()) } else { names.remove(&*name) };
        self.interest = Interest::of(wildcard, names);
        if !changed {
            return;
        }
        match wanted {
            true => self.on_stream.wanted(&name),
            false => self.on_stream.unwanted(&name),
        }
        if !wanted && is_collection {
            self.entries.retain(|name| self.interest.includes(&self.type_url, name));
        } else if !wanted && !wildcard {
            self.entries.forget(&name);
        }
        if was_nothing {
            (self.version, self.version_of) = (String::new(), now);
        }
    }

    /// Notes that the update of a response has been dealt with, and answers it. In state of the world, an answer that is
    /// older than one that was given is superseded: the server would take it for a step back, or for nothing.
    pub(super) fn answer(&mut self, token: u64, nonce: String, error: Option<Status>, in_order: bool) {
        let on_stream = &mut self.on_stream;
        if in_order && token < on_stream.answered {
            return;
        }
        on_stream.answered = on_stream.answered.max(token);
        on_stream.nonce.clone_from(&nonce);
        on_stream.answers.push_back(Answer { nonce, error, token });
    }

    /// The update of a response will never be dealt with: that response counts as never received.
    pub(super) fn give_up_answer(&mut self, token: u64) {
        if self.on_stream.newest == token {
            self.on_stream.newest = self.pending.keys().next_back().copied().unwrap_or(0).max(self.on_stream.answered);
        }
    }

    /// A response has come after requests that left names out and asked for them again. What it does not bring may be
    /// what the server holds back because it passed over those requests: once more, with the answer. Not without end,
    /// for it may as well be that the server does not have it, and says so each time.
    pub(super) fn confirm(&mut self) {
        let it = &mut self.on_stream;
        it.responses += 1;
        let may_be_unheard = |since: u64| it.responses - since <= MAX_UNDER_WAY;
        it.dropped.retain(|_, since| may_be_unheard(*since));
        it.unconfirmed.retain(|name, since| {
            let wanted = self.interest.names().is_some_and(|names| names.contains(name));
            wanted && !self.entries.is_known(name) && may_be_unheard(*since)
        });
        it.fresh.extend(it.unconfirmed.keys().cloned());
        it.gone.extend(it.unconfirmed.keys().cloned());
    }

    /// The newest response has not been answered yet.
    pub(super) fn is_answer_due(&self) -> bool {
        self.on_stream.answered < self.on_stream.newest
    }

    /// Nothing is wanted, and nothing was asked for.
    pub(super) fn is_silent(&self) -> bool {
        self.interest == Interest::None && !self.on_stream.asked
    }

    /// Whether what was asked for is not what is wanted.
    pub(super) fn is_changed(&self) -> bool {
        let it = &self.on_stream;
        !it.asked
            || !it.fresh.is_empty()
            || !it.gone.is_empty()
            || it.wildcard_gone
            || it.wildcard != self.interest.is_wildcard()
    }

    /// What to ask for to come to what is wanted, which from now on counts as asked for. Of a stream's first request,
    /// only what is wanted matters.
    pub(super) fn change(&mut self) -> Change {
        let it = &mut self.on_stream;
        let wildcard = self.interest.is_wildcard();
        let (fresh, gone) = (std::mem::take(&mut it.fresh), std::mem::take(&mut it.gone));
        let mut again: Vec<String> = fresh.intersection(&gone).cloned().collect();
        let mut subscribe: Vec<String> = fresh.into_iter().filter(|name| !gone.contains(name)).collect();
        let mut unsubscribe: Vec<String> = gone.into_iter().collect();
        if it.wildcard_gone || it.wildcard && !wildcard {
            unsubscribe.push(WILDCARD.to_owned());
        }
        if wildcard && it.wildcard_gone {
            again.push(WILDCARD.to_owned());
        } else if wildcard && !it.wildcard {
            subscribe.push(WILDCARD.to_owned());
        }
        (it.asked, it.wildcard, it.wildcard_gone) = (true, wildcard, false);
        Change { unsubscribe, subscribe, again }
    }
}

impl Interest {
    /// The names asked for.
    pub fn names(&self) -> Option<&BTreeSet<String>> {
        match self {
            Interest::None | Interest::Wildcard => None,
            Interest::Names(names) | Interest::WildcardAnd(names) => Some(names),
        }
    }

    /// Whether everything is wanted.
    pub fn is_wildcard(&self) -> bool {
        matches!(self, Interest::Wildcard | Interest::WildcardAnd(_))
    }

    /// Whether the resource of this name is wanted: by its name, as one of a collection, or as any.
    pub fn includes(&self, type_url: &str, name: &str) -> bool {
        if self.is_wildcard() {
            return true;
        }
        let Some(names) = self.names() else { return false };
        let collection = || match type_url {
            // Of a route configuration: its name, a slash, and that of the virtual host.
            type_url::VIRTUAL_HOST => name.rsplit_once('/').is_some_and(|(routes, _)| names.contains(routes)),
            _ => xdstp::collection_of(name).is_some_and(|collection| names.contains(&collection)),
        };
        names.contains(name) || collection()
    }

    /// The same, in the one form that it has.
    pub(super) fn normal(self) -> Interest {
        let wildcard = self.is_wildcard();
        match self {
            Interest::None | Interest::Wildcard => self,
            Interest::Names(mut names) | Interest::WildcardAnd(mut names) => {
                let wildcard = names.remove(WILDCARD) || wildcard;
                if names.iter().any(|name| xdstp::has_scheme(name)) {
                    let names = names.iter().map(|name| xdstp::normalise(name).into_owned());
                    return Interest::of(wildcard, names.collect());
                }
                Interest::of(wildcard, names)
            }
        }
    }

    /// Everything or not, and these names.
    pub(crate) fn of(wildcard: bool, names: BTreeSet<String>) -> Interest {
        match (wildcard, names.is_empty()) {
            (false, true) => Interest::None,
            (true, true) => Interest::Wildcard,
            (false, false) => Interest::Names(names),
            (true, false) => Interest::WildcardAnd(names),
        }
    }
}

impl OnStream {
    /// State of the world: what is wanted again, and of which the server may have passed over that it was not, because it
    /// sent a response that has come since, is left out once more.
    pub(super) fn leave_out_unheard(&mut self) {
        let unheard = |name: &&String| self.dropped.get(*name).is_some_and(|since| *since < self.responses);
        let unheard: Vec<String> = self.fresh.iter().filter(unheard).cloned().collect();
        self.gone.extend(unheard);
    }

    /// State of the world: `change` is asked for with requests that the server may pass over.
    pub(super) fn doubt(&mut self, change: &Change) {
        for name in &change.unsubscribe {
            if self.dropped.len() >= MAX_DROPPED {
                self.dropped.pop_first();
            }
            self.dropped.entry(name.clone()).or_insert(self.responses);
        }
        for name in change.subscribe.iter().chain(&change.again) {
            if self.dropped.remove(name).is_some() {
                self.unconfirmed.entry(name.clone()).or_insert(self.responses);
            }
        }
    }

    fn wanted(&mut self, name: &str) {
        if self.asked {
            self.unconfirmed.remove(name);
            self.fresh.insert(name.to_owned());
        }
    }

    fn unwanted(&mut self, name: &str) {
        if self.asked && !self.fresh.remove(name) {
            self.gone.insert(name.to_owned());
        }
    }
}
