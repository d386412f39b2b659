//! The resources of one type: which are in force, and which are being brought into force.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Outcome, Rejection};

/// One version of a resource, and whether the server may be told that it is here.
#[derive(Debug, Clone)]
pub(super) struct State {
    pub(super) version: Arc<str>,
    /// A new stream says that this version is here. Not so for one that the server has dropped and that stays.
    claimed: bool,
}

impl State {
    pub(super) fn new(version: Arc<str>) -> State {
        State { version, claimed: true }
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
}

impl Entry {
    /// There, as far as the last update that touched it goes.
    fn is_there(&self) -> bool {
        match self.offers.last() {
            Some((_, offer)) => offer.is_some(),
            None => self.in_force.is_some() || self.refused,
        }
    }

    fn is_void(&self) -> bool {
        self.in_force.is_none() && !self.refused && self.offers.is_empty()
    }
}

/// All resources of a type.
#[derive(Debug, Default)]
pub(super) struct Entries(BTreeMap<Arc<str>, Entry>);

/// What an update touches.
#[derive(Debug, Default)]
pub(super) struct Offered {
    pub(super) added: Vec<Arc<str>>,
    pub(super) removed: Vec<Arc<str>>,
}

impl Entries {
    /// Notes that a response has something under this name; whether it is the first time that it does.
    pub(super) fn see(&mut self, name: &str, token: u64) -> bool {
        match self.0.get_mut(name) {
            Some(entry) => std::mem::replace(&mut entry.seen, token) != token,
            None => {
                self.0.insert(name.into(), Entry { seen: token, ..Entry::default() });
                true
            }
        }
    }

    /// Whether a response has something under this name.
    pub(super) fn was_seen(&self, name: &str, token: u64) -> bool {
        self.0.get(name).is_some_and(|entry| entry.seen == token)
    }

    /// A version is handed out with an update.
    pub(super) fn offer(&mut self, name: &str, token: u64, state: State, offered: &mut Offered) {
        if let Some((name, _)) = self.0.get_key_value(name) {
            offered.added.push(Arc::clone(name));
        }
        if let Some(entry) = self.0.get_mut(name) {
            entry.offers.push((token, Some(state)));
        }
    }

    /// A version that was handed out with this update is taken back.
    pub(super) fn withdraw(&mut self, name: &str, token: u64) {
        if let Some(entry) = self.0.get_mut(name) {
            entry.offers.retain(|(of, _)| *of != token);
        }
        self.forget_void(name);
    }

    /// The removal of a resource is handed out with an update; whether there is something to remove.
    pub(super) fn offer_removal(&mut self, name: &str, token: u64, offered: &mut Offered) -> bool {
        let Some((name, entry)) = self.0.get_key_value(name) else { return false };
        if !entry.is_there() {
            return false;
        }
        let name = Arc::clone(name);
        if let Some(entry) = self.0.get_mut(&name) {
            entry.offers.push((token, None));
        }
        offered.removed.push(name);
        true
    }

    /// The removal of all that a response did not hold is handed out with it.
    pub(super) fn offer_removal_of_unseen(&mut self, token: u64, offered: &mut Offered) {
        for (name, entry) in &mut self.0 {
            if entry.seen != token && entry.is_there() {
                entry.offers.push((token, None));
                offered.removed.push(Arc::clone(name));
            }
        }
    }

    /// The server has dropped a resource that stays in force: a new stream must not claim to have it.
    pub(super) fn disclaim(&mut self, name: &str) {
        if let Some(entry) = self.0.get_mut(name)
            && let Some(state) = entry.offers.last_mut().map_or(entry.in_force.as_mut(), |(_, offer)| offer.as_mut())
        {
            state.claimed = false;
        }
    }

    /// An update was applied but for what was rejected. Updates may be finished in any order: what a newer one has
    /// settled stays.
    pub(super) fn finish(&mut self, token: u64, offered: Offered, outcome: &Outcome) {
        let rejected: BTreeSet<&str> = outcome.rejected.iter().map(|Rejection { name, .. }| name.as_str()).collect();
        for name in offered.added.iter().chain(&offered.removed) {
            let Some(entry) = self.0.get_mut(name) else { continue };
            let Some(at) = entry.offers.iter().position(|(of, _)| *of == token) else { continue };
            let (_, state) = entry.offers.remove(at);
            if state.is_some() && rejected.contains(&**name) {
                entry.refused = true;
            } else {
                entry.offers.drain(..at);
                entry.refused = false;
                entry.in_force = state;
            }
            self.forget_void(name);
        }
    }

    /// An update counts as never handed out.
    pub(super) fn abandon(&mut self, token: u64, offered: Offered) {
        for name in offered.added.iter().chain(&offered.removed) {
            self.withdraw(name, token);
        }
    }

    /// Forgets a name of which nothing is known.
    pub(super) fn forget_void(&mut self, name: &str) {
        if self.0.get(name).is_some_and(Entry::is_void) {
            self.0.remove(name);
        }
    }

    /// Forgets all that is not wanted any more.
    pub(super) fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.0.retain(|name, _| wanted(name));
    }

    pub(super) fn forget(&mut self, name: &str) {
        self.0.remove(name);
    }

    pub(super) fn is_in_force(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|entry| entry.in_force.is_some())
    }

    /// What a new stream claims to have: names and versions.
    pub(super) fn claims(&self) -> impl Iterator<Item = (&Arc<str>, &State)> {
        self.0.iter().filter_map(|(name, entry)| Some((name, entry.in_force.as_ref().filter(|it| it.claimed)?)))
    }
}
