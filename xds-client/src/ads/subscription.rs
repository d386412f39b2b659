//! One resource type: what is wanted of it, what the server was asked for, and what is to be answered.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use envoy_types::pb::google::rpc::Status;

use super::entries::{Entries, Offered};
use super::{Interest, Rejection};

/// One resource type.
#[derive(Default)]
pub(super) struct Subscription {
    pub(super) interest: Interest,
    /// The version of the last response that was accepted as a whole (state of the world only).
    pub(super) version: String,
    /// The update that `version` came with.
    pub(super) version_of: u64,
    pub(super) entries: Entries,
    /// Updates that are being applied, by token.
    pub(super) pending: BTreeMap<u64, Pending>,
    pub(super) on_stream: OnStream,
}

/// An update that is being applied.
pub(super) struct Pending {
    pub(super) nonce: String,
    pub(super) version: String,
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

/// The name of everything.
pub(super) const WILDCARD: &str = "*";

impl Subscription {
    /// Sets what is wanted, as of the update `now`.
    pub(super) fn set_interest(&mut self, interest: Interest, now: u64) {
        static NOTHING: BTreeSet<String> = BTreeSet::new();
        let before = std::mem::replace(&mut self.interest, interest);
        let (old, new) = (before.names().unwrap_or(&NOTHING), self.interest.names().unwrap_or(&NOTHING));
        let on_stream = &mut self.on_stream;
        for name in old.difference(new) {
            if on_stream.asked && !on_stream.fresh.remove(name) {
                on_stream.gone.insert(name.clone());
            }
        }
        for name in new.difference(old).filter(|_| on_stream.asked) {
            on_stream.fresh.insert(name.clone());
        }
        if before.is_wildcard() && !self.interest.is_wildcard() {
            on_stream.wildcard_gone |= on_stream.wildcard;
            let interest = &self.interest;
            self.entries.retain(|name| interest.includes(name));
        } else if !self.interest.is_wildcard() {
            for name in old.difference(new) {
                self.entries.forget(name);
            }
        }
        if before == Interest::None || self.interest == Interest::None {
            // Nothing is left of what came with it, nor will be of updates that are being applied.
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

    /// Whether the resource of this name is wanted.
    pub fn includes(&self, name: &str) -> bool {
        self.is_wildcard() || self.names().is_some_and(|names| names.contains(name))
    }

    /// The same, in the one form that it has.
    pub(super) fn normal(self) -> Interest {
        match self {
            Interest::Names(names) if names.is_empty() => Interest::None,
            Interest::WildcardAnd(names) if names.is_empty() => Interest::Wildcard,
            other => other,
        }
    }
}
