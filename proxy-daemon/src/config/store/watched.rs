//! Resources of one type that are asked for by name, from any number of sources.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Interest, Resource},
    source::Source,
    sources::Subscriptions,
};
use tokio::time::Instant;

use super::{
    counts,
    extensions::Places,
    kinds::{Kind, Need, Value},
    resources,
    rotation::Files,
    stale::Freshness,
    subscribed::Subscribed,
};
use crate::{
    config::{
        model::{LocalityEndpoints, ResourceRef},
        status::{Failure, Version},
    },
    stats::Lease,
};

/// Who needs something.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Owner {
    Cluster(Arc<str>),
    Listener(Arc<str>),
    /// The process itself: see [`super::StartUp::first`].
    Process,
}

/// Names one version of one cluster or listener: never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct VersionId(pub(super) u64);

/// Who needs a resource.
#[derive(Debug, Clone)]
pub(super) struct User {
    pub(super) owner: Owner,
    pub(super) version: VersionId,
    /// It does not go on until the resource is there, or not waited for any more.
    waits: bool,
}

/// One resource that somebody needs.
#[derive(Debug)]
pub(in crate::config) struct Entry {
    /// The version in force.
    pub(in crate::config) stored: Option<Arc<Version>>,
    /// Where the newest version was refused: that.
    pub(in crate::config) refused: Option<Arc<Failure>>,
    pub(super) value: Option<Value>,
    /// It has arrived, or was refused, or is not waited for any more.
    pub(super) settled: bool,
    /// Until when it is waited for.
    pub(super) deadline: Option<Instant>,
    pub(super) users: Vec<User>,
    /// EDS: how long it is good for.
    pub(super) freshness: Freshness,
    /// ECDS: what it is for.
    pub(super) places: Places,
    pub(super) subscribed: Subscribed,
    /// SDS: the files that it is made of.
    pub(super) files: Option<Box<Files>>,
    /// SDS: shows what is counted for it.
    _shown: Option<Box<Lease>>,
}

type Names = BTreeMap<Arc<str>, Entry>;

/// All resources of one type that somebody needs.
#[derive(Debug)]
pub(in crate::config) struct Watched {
    kind: Kind,
    sources: BTreeMap<Arc<Source>, Names>,
    /// What nobody needed any more at some time since [`take_unused`](Watched::take_unused).
    let_go: Vec<(Arc<Source>, Arc<str>)>,
    /// Sources of which the names that are asked for have changed.
    changed: BTreeSet<Arc<Source>>,
}

/// What came of asking for a resource.
pub(super) enum Asked {
    /// Nothing to wait for.
    Settled,
    /// It has to arrive.
    Waiting,
    /// It has to arrive, and nobody asked for it before: until then, where there is a limit.
    New(Option<Instant>),
}

impl Watched {
    pub(super) fn new(kind: Kind) -> Watched {
        Watched { kind, sources: BTreeMap::new(), let_go: Vec::new(), changed: BTreeSet::new() }
    }

    pub(super) fn get(&self, source: &Source, name: &str) -> Option<&Entry> {
        self.sources.get(source)?.get(name)
    }

    pub(super) fn get_mut(&mut self, source: &Source, name: &str) -> Option<&mut Entry> {
        self.sources.get_mut(source)?.get_mut(name)
    }

    /// All of a source.
    pub(super) fn of_mut(&mut self, source: &Source) -> impl Iterator<Item = &mut Entry> {
        self.sources.get_mut(source).into_iter().flat_map(|names| names.values_mut())
    }

    /// The same for changes.
    pub(super) fn entries_mut(&mut self) -> impl Iterator<Item = (&Arc<Source>, &Arc<str>, &mut Entry)> {
        let sources = self.sources.iter_mut();
        sources.flat_map(|(source, names)| names.iter_mut().map(move |(name, entry)| (source, name, entry)))
    }

    /// Everything, for people.
    pub(in crate::config) fn entries(&self) -> impl Iterator<Item = (&Arc<Source>, &Arc<str>, &Entry)> {
        self.sources.iter().flat_map(|(source, names)| names.iter().map(move |(name, entry)| (source, name, entry)))
    }

    /// A version of a cluster or listener needs the resource from now on.
    pub(super) fn acquire(&mut self, need: &Need, owner: Owner, version: VersionId, now: Instant) -> Asked {
        let Need { wanted, optional, .. } = need;
        let source = &wanted.from.source;
        let names = match self.sources.get_mut(source) {
            Some(names) => names,
            None => self.sources.entry(Arc::clone(source)).or_default(),
        };
        let mut asked = Asked::Waiting;
        let entry = names.entry(Arc::clone(&wanted.name)).or_insert_with(|| {
            let deadline = wanted.from.initial_fetch_timeout.map(|timeout| now + timeout);
            asked = Asked::New(deadline);
            self.changed.insert(Arc::clone(source));
            let (users, places) = (Vec::new(), Places::default());
            let subscribed = Subscribed::new(source);
            let (stored, refused, value, files) = (None, None, None, None);
            let _shown = (self.kind == Kind::Secrets).then(|| Box::new(counts::secret_wanted(&wanted.name)));
            let freshness = Freshness::default();
            Entry {
                stored,
                refused,
                value,
                settled: false,
                deadline,
                users,
                freshness,
                places,
                subscribed,
                files,
                _shown,
            }
        });
        if entry.settled {
            asked = Asked::Settled;
        }
        if entry.users.is_empty() {
            // Mostly there is one.
            entry.users.reserve_exact(1);
        }
        entry.users.push(User { owner, version, waits: !entry.settled && !optional });
        asked
    }

    /// A version does not need the resource any more. It is kept until [`take_unused`](Self::take_unused), for what is taken
    /// along with this may need it again, and a source that is asked for the same as before sends nothing.
    pub(super) fn release(&mut self, wanted: &ResourceRef, version: VersionId) {
        let source = &wanted.from.source;
        let entry = self.sources.get_mut(source).and_then(|names| names.get_mut(&wanted.name));
        let Some(entry) = entry else { return };
        entry.users.retain(|user| user.version != version);
        if entry.users.is_empty() {
            self.let_go.push((Arc::clone(source), Arc::clone(&wanted.name)));
        }
    }

    /// Forgets what nobody needs any more: what that is.
    pub(super) fn take_unused(&mut self) -> Vec<(Arc<Source>, Arc<str>)> {
        let mut unused = std::mem::take(&mut self.let_go);
        unused.retain(|(source, name)| {
            let Some(names) = self.sources.get_mut(source) else { return false };
            if names.get(name).is_none_or(|entry| !entry.users.is_empty()) {
                return false;
            }
            names.remove(name);
            self.changed.insert(Arc::clone(source));
            true
        });
        unused
    }

    /// Tells the sources what is asked of them, where that has changed.
    pub(super) fn subscribe(&mut self, subscriptions: &Subscriptions) {
        while let Some(source) = self.changed.pop_first() {
            let names = self.sources.get(&source);
            let interest = match names.filter(|names| !names.is_empty()) {
                Some(_) if self.kind == Kind::Scopes => Interest::Wildcard,
                Some(names) => Interest::Names(names.keys().map(|name| name.as_ref().to_owned()).collect()),
                None => {
                    self.sources.remove(&source);
                    Interest::None
                }
            };
            subscriptions.set(Source::clone(&source), self.kind.type_url(), interest);
        }
    }
}

impl Entry {
    /// Whether this version needs it.
    pub(super) fn is_used_by(&self, version: VersionId) -> bool {
        self.users.iter().any(|user| user.version == version)
    }

    /// Whether the resource is what is known already, under whatever version. Then only the version is taken over.
    pub(super) fn is_unchanged(&mut self, resource: &Resource) -> bool {
        let Some(files) = &mut self.files else { return resources::is_unchanged(&mut self.stored, resource) };
        match &mut self.stored {
            // What is kept is what the files hold.
            Some(stored) if files.is_unchanged(resource) => {
                Arc::make_mut(stored).version.clone_from(&resource.version);
                true
            }
            _ => false,
        }
    }

    /// Whether these endpoints are those that are known already, in whatever order.
    pub(super) fn has_in_another_order(&self, name: &str, resource: &Resource, new: &[LocalityEndpoints]) -> bool {
        let Some(stored) = &self.stored else { return false };
        // What is only said in another order is as long.
        if stored.body.value.len() != resource.body.value.len() {
            return false;
        }
        let Ok(Value::Endpoints(old)) = Kind::Endpoints.parse(name, &stored.body) else { return false };
        let of = |group: &LocalityEndpoints| (group.priority, group.locality.clone());
        let groups: HashMap<_, _> = old.iter().map(|group| (of(group), group)).collect();
        // Where a locality or an endpoint is said twice it matters which comes first.
        groups.len() == old.len()
            && old.len() == new.len()
            && new.iter().all(|group| {
                let Some(old) = groups.get(&of(group)) else { return false };
                let known: HashMap<_, _> = old.endpoints.iter().map(|it| (&it.address, it)).collect();
                old.weight == group.weight
                    && old.policy == group.policy
                    && known.len() == old.endpoints.len()
                    && known.len() == group.endpoints.len()
                    && group.endpoints.iter().all(|it| known.get(&it.address).is_some_and(|known| **known == *it))
            })
    }

    /// The resource is not waited for any more: who waited for it until now.
    pub(super) fn settle(&mut self) -> Vec<(Owner, VersionId)> {
        self.settled = true;
        self.deadline = None;
        let waiting = |user: &mut User| std::mem::take(&mut user.waits).then(|| (user.owner.clone(), user.version));
        self.users.iter_mut().filter_map(waiting).collect()
    }
}
