//! The resources of one type: which are in force, which are being brought into force, and until when they are good.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hasher as _},
    ops::Bound,
    sync::Arc,
    time::Instant,
};

use super::{Outcome, Rejection};
use crate::Any;

/// One version of a resource.
#[derive(Debug, Clone)]
pub(super) struct State {
    version: Arc<str>,
    /// What tells one content from another: bodies are not kept.
    digest: u64,
    /// A new stream says that this version is here. Not so for one that the server has dropped and that stays.
    claimed: bool,
}

impl State {
    pub(super) fn new(version: Arc<str>, body: &Any) -> State {
        let mut hasher = DefaultHasher::new();
        hasher.write(&body.value);
        State { version, digest: hasher.finish(), claimed: true }
    }
}

/// What is known of a name.
#[derive(Debug, Default)]
struct Entry {
    in_force: Option<State>,
    /// The last version that was handed out was not taken.
    refused: bool,
    /// Handed out and not finished yet, by update; `None` is a removal.
    offers: Vec<(u64, Option<State>)>,
    /// The response that last held it.
    seen: u64,
    /// When it is removed unless the server says before that it is still good.
    expires: Option<Instant>,
}

impl Entry {
    /// There, as far as the last update that touched it goes.
    fn is_there(&self) -> bool {
        match self.offers.last() {
            Some((_, offer)) => offer.is_some(),
            None => self.in_force.is_some() || self.refused,
        }
    }

    /// The version that is in force once all updates that are under way are.
    fn latest(&mut self) -> Option<&mut State> {
        match self.offers.last_mut() {
            Some((_, offer)) => offer.as_mut(),
            None => self.in_force.as_mut(),
        }
    }

    fn is_void(&self) -> bool {
        self.in_force.is_none() && !self.refused && self.offers.is_empty()
    }
}

/// All resources of a type.
#[derive(Debug, Default)]
pub(super) struct Entries {
    by_name: BTreeMap<Arc<str>, Entry>,
    /// What is in `expires`, in order.
    timers: BTreeSet<(Instant, Arc<str>)>,
}

/// What an update touches.
#[derive(Debug, Default)]
pub(super) struct Offered {
    pub(super) added: Vec<Arc<str>>,
    pub(super) removed: Vec<Arc<str>>,
}

/// What a response's resource is.
#[derive(Debug, PartialEq)]
pub(super) enum Taken {
    /// New or changed: to be handed out.
    Offered,
    /// What is in force.
    Unchanged(Arc<str>),
    /// One of that name was in the response before.
    Duplicate,
}

impl Entries {
    fn get(&mut self, name: &str) -> Option<(&Arc<str>, &mut Entry)> {
        self.by_name.range_mut::<str, _>((Bound::Included(name), Bound::Included(name))).next()
    }

    /// A response has this version of a resource, good until `expires`.
    pub(super) fn take(
        &mut self,
        name: &str,
        token: u64,
        state: State,
        expires: Option<Instant>,
        offered: &mut Offered,
    ) -> Taken {
        let Some((name, entry)) = self.get(name) else {
            let name: Arc<str> = name.into();
            offered.added.push(Arc::clone(&name));
            let entry = Entry { seen: token, offers: vec![(token, Some(state))], ..Entry::default() };
            self.by_name.insert(Arc::clone(&name), entry);
            self.set_timer(&name, expires);
            return Taken::Offered;
        };
        if std::mem::replace(&mut entry.seen, token) == token {
            return Taken::Duplicate;
        }
        let (name, had_timer) = (Arc::clone(name), entry.expires.is_some());
        let same = entry.offers.is_empty() && entry.in_force.as_ref().is_some_and(|it| it.digest == state.digest);
        let taken = if same {
            (entry.in_force, entry.refused) = (Some(state), false);
            Taken::Unchanged(Arc::clone(&name))
        } else {
            entry.offers.push((token, Some(state)));
            offered.added.push(Arc::clone(&name));
            Taken::Offered
        };
        if had_timer || expires.is_some() {
            self.set_timer(&name, expires);
        }
        taken
    }

    /// The server says that a version, or whatever is here, is still good, until `expires`; whether it is the one that is here.
    pub(super) fn heartbeat(
        &mut self,
        name: &str,
        token: u64,
        version: Option<&str>,
        expires: Option<Instant>,
    ) -> bool {
        let Some((name, entry)) = self.get(name) else { return false };
        if entry.latest().is_none_or(|state| version.is_some_and(|version| *state.version != *version)) {
            return false;
        }
        entry.seen = token;
        let name = Arc::clone(name);
        self.set_timer(&name, expires);
        true
    }

    /// Notes that a response has something under this name.
    pub(super) fn see(&mut self, name: &str, token: u64) {
        if let Some((_, entry)) = self.get(name) {
            entry.seen = token;
        }
    }

    /// Whether a response has something under this name.
    pub(super) fn was_seen(&self, name: &str, token: u64) -> bool {
        self.by_name.get(name).is_some_and(|entry| entry.seen == token)
    }

    /// What was handed out with this update is taken back.
    pub(super) fn withdraw(&mut self, name: &str, token: u64) {
        if let Some((_, entry)) = self.get(name) {
            entry.offers.retain(|(of, _)| *of != token);
            if entry.is_void() {
                self.forget(name);
            }
        }
    }

    /// The removal of a resource is handed out with an update; whether there is something to remove.
    pub(super) fn remove(&mut self, name: &str, token: u64, offered: &mut Offered) -> bool {
        let Some((name, entry)) = self.get(name) else { return false };
        if !entry.is_there() {
            return false;
        }
        entry.offers.push((token, None));
        offered.removed.push(Arc::clone(name));
        true
    }

    /// The removal of all that a response did not hold is handed out with it.
    pub(super) fn remove_unseen(&mut self, token: u64, offered: &mut Offered) {
        for (name, entry) in &mut self.by_name {
            if entry.seen != token && entry.is_there() {
                entry.offers.push((token, None));
                offered.removed.push(Arc::clone(name));
            }
        }
    }

    /// The removal of all that is not good any longer is handed out with an update.
    pub(super) fn remove_expired(&mut self, now: Instant, token: u64, offered: &mut Offered) {
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, name)) = self.timers.pop_first() else { return };
            self.disclaim(&name);
            if let Some((_, entry)) = self.get(&name) {
                entry.expires = None;
            }
            self.remove(&name, token, offered);
        }
    }

    /// When the next resource ceases to be good.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// The server has dropped a resource that stays in force: a new stream must not claim to have it.
    pub(super) fn disclaim(&mut self, name: &str) {
        if let Some(state) = self.get(name).and_then(|(_, entry)| entry.latest()) {
            state.claimed = false;
        }
    }

    /// An update was applied but for what was rejected. Updates may be finished in any order: what a newer one has
    /// settled stays.
    pub(super) fn finish(&mut self, token: u64, offered: Offered, outcome: &Outcome) {
        let rejected: BTreeSet<&str> = outcome.rejected.iter().map(|Rejection { name, .. }| name.as_str()).collect();
        for name in offered.added.iter().chain(&offered.removed) {
            let Some((_, entry)) = self.get(name) else { continue };
            let Some(at) = entry.offers.iter().position(|(of, _)| *of == token) else { continue };
            let (_, state) = entry.offers.remove(at);
            if state.is_some() && rejected.contains(&**name) {
                entry.refused = true;
            } else {
                entry.offers.drain(..at);
                (entry.in_force, entry.refused) = (state, false);
            }
            if entry.offers.is_empty() {
                // There are thousands of these, and seldom an offer.
                entry.offers = Vec::new();
            }
            if entry.is_void() {
                self.forget(name);
            }
        }
    }

    /// An update counts as never handed out.
    pub(super) fn abandon(&mut self, token: u64, offered: Offered) {
        for name in offered.added.iter().chain(&offered.removed) {
            self.withdraw(name, token);
        }
    }

    /// Forgets all that is not wanted any more.
    pub(super) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.by_name.retain(|name, _| wanted(name));
        self.timers.retain(|(_, name)| wanted(name));
    }

    /// Forgets a name.
    pub(super) fn forget(&mut self, name: &str) {
        if let Some((name, Entry { expires: Some(at), .. })) = self.by_name.remove_entry(name) {
            self.timers.remove(&(at, name));
        }
    }

    /// In force, or on its way in.
    pub(super) fn is_known(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    pub(super) fn is_in_force(&self, name: &str) -> bool {
        self.by_name.get(name).is_some_and(|entry| entry.in_force.is_some())
    }

    /// What a new stream claims to have: names and versions. Where an update is under way it is not known yet what will
    /// be here, and no version is named: the server sends its own, or says that there is none.
    pub(super) fn claims(&self) -> impl Iterator<Item = (&str, &str)> {
        self.by_name.iter().filter_map(|(name, entry)| {
            let in_force = entry.in_force.as_ref().filter(|state| state.claimed);
            let offered = |(_, offer): &(u64, Option<State>)| offer.as_ref().is_some_and(|state| state.claimed);
            match in_force {
                Some(state) if entry.offers.is_empty() => Some((&**name, &*state.version)),
                _ => (in_force.is_some() || entry.offers.iter().any(offered)).then_some((&**name, "")),
            }
        })
    }

    fn set_timer(&mut self, name: &Arc<str>, expires: Option<Instant>) {
        let Some((_, entry)) = self.get(name) else { return };
        if let Some(at) = std::mem::replace(&mut entry.expires, expires) {
            self.timers.remove(&(at, Arc::clone(name)));
        }
        if let Some(at) = expires {
            self.timers.insert((at, Arc::clone(name)));
        }
    }
}
