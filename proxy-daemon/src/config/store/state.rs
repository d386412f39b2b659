//! All that the store knows, and the waits.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use culvert_xds_client::{
    ads::Interest,
    api::culvert::overrides::v1::{OffloadedService, OverrideShare},
    source::Source,
    sources,
};
use tokio::time::Instant;

use super::{
    StartUp,
    clusters::Clusters,
    demanded::Demanded,
    held::HeldRoutes,
    kinds::{Kind, Need},
    listeners::Listeners,
    rotation::StaticFiles,
    scoped_demand::RoutesDemanded,
    scopes::AllScopes,
    updates::Updates,
    vhds::AllHosts,
    watched::{Asked, Owner, VersionId, Watched},
};
use crate::{
    config::model::{ClusterConfig, ConfigSource, SecretType, UpstreamBind},
    upstream::ClusterChange,
};

/// How far the start has come. Each phase waits for the one before it to be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Not begun.
    Idle,
    /// What comes before everything else ([`StartUp::first`]) arrives.
    First,
    /// The clusters of the bootstrap and of the first answer of CDS become warm.
    Clusters,
    /// The listeners of the bootstrap and of the first answer of LDS become ready.
    Listeners,
    /// Everything was there once.
    Running,
}

/// Everything of a type that a source has, or a collection of it: CDS, LDS.
#[derive(Debug, Default)]
pub(super) struct Collection {
    /// `None`: there is none besides the bootstrap.
    pub(super) from: Option<ConfigSource>,
    /// What is asked for there; `None`: everything.
    pub(super) name: Option<String>,
    /// It has answered.
    pub(super) answered: bool,
    /// It has answered, or is not waited for any more.
    pub(super) settled: bool,
}

impl Collection {
    pub(super) fn is(&self, source: &Source) -> bool {
        self.from.as_ref().is_some_and(|from| *from.source == *source)
    }

    /// What is asked for.
    pub(super) fn interest(&self) -> Interest {
        self.name.as_ref().map_or(Interest::Wildcard, |name| Interest::Names([name.clone()].into()))
    }
}

/// What is due at some time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Due {
    /// A resource is waited for no longer.
    Resource(Kind, Arc<Source>, Arc<str>),
    /// The first answer of CDS, or of LDS, is waited for no longer.
    Cds,
    Lds,
    /// What drains has had its time.
    Drained,
    /// Names that nobody waits for are forgotten.
    OnDemand,
    /// Routes have waited for clusters for long enough.
    HeldRoutes,
    /// Names of clusters that have been looked up are taken up.
    LookedUp,
    /// Endpoints have not been said again for too long.
    Stale(Arc<Source>, Arc<str>),
    /// A listener that could not be bound is tried again.
    Listener(Arc<str>, VersionId),
}

/// All resources.
pub(in crate::config) struct State {
    pub(super) phase: Phase,
    /// Clusters of the bootstrap, until their phase comes.
    pub(super) static_clusters: Vec<ClusterConfig>,
    /// How many of [`StartUp::first`] are not there.
    pub(super) first_waiting: usize,
    pub(super) cds: Collection,
    pub(super) lds: Collection,
    pub(in crate::config) clusters: Clusters,
    pub(in crate::config) listeners: Listeners,
    /// Those that are asked for by name, in the order of [`Kind::ALL`].
    pub(in crate::config) watched: [Watched; Kind::ALL.len()],
    /// What SRDS has delivered, by where from.
    pub(in crate::config) scopes: AllScopes,
    /// Scopes have changed since they were counted.
    pub(super) scopes_changed: bool,
    /// The names of the bootstrap's.
    pub(super) static_secrets: HashSet<(SecretType, Arc<str>)>,
    /// Those of the bootstrap's that are made of files which are followed.
    pub(super) static_files: Vec<StaticFiles>,
    /// The sources that there are.
    pub(super) sources: sources::Config,
    pub(super) offloaded: BTreeMap<String, OffloadedService>,
    pub(super) shares: BTreeMap<String, OverrideShare>,
    /// Versions of listeners that need the offloaded services.
    pub(super) overriding: usize,
    pub(super) asks_for_overrides: bool,
    pub(in crate::config) demanded: Demanded,
    pub(super) routes_demanded: RoutesDemanded,
    /// What VHDS has delivered.
    pub(in crate::config) vhds: AllHosts,
    pub(super) updates: Updates,
    pub(super) held: Vec<HeldRoutes>,
    /// Clusters to be changed when the update has been taken.
    pub(super) changes: Vec<ClusterChange>,
    due: BTreeSet<(Instant, Due)>,
    next_version: u64,
    /// See [`StartUp::bind`].
    pub(super) bind: Option<Arc<UpstreamBind>>,
    /// How long connections may go on: see [`StartUp::drain_time`].
    pub(super) drain_time: Duration,
}

impl State {
    pub(super) fn new(start: &StartUp) -> State {
        let collection = |from: &Option<ConfigSource>, name: &Option<String>| Collection {
            settled: from.is_none(),
            from: from.clone(),
            name: name.clone(),
            answered: false,
        };
        State {
            phase: Phase::Idle,
            cds: collection(&start.cds, &start.cds_collection),
            lds: collection(&start.lds, &start.lds_collection),
            static_clusters: Vec::new(),
            first_waiting: 0,
            clusters: Clusters::default(),
            listeners: Listeners::default(),
            watched: Kind::ALL.map(Watched::new),
            scopes: AllScopes::new(),
            scopes_changed: false,
            static_secrets: start.secrets.clone(),
            static_files: Vec::new(),
            sources: start.sources.clone(),
            offloaded: BTreeMap::new(),
            shares: BTreeMap::new(),
            overriding: 0,
            asks_for_overrides: false,
            demanded: Demanded::default(),
            routes_demanded: RoutesDemanded::default(),
            vhds: AllHosts::default(),
            updates: Updates::default(),
            held: Vec::new(),
            changes: Vec::new(),
            due: BTreeSet::new(),
            next_version: 0,
            bind: start.bind.clone(),
            drain_time: start.drain_time,
        }
    }

    pub(in crate::config) fn watched(&self, kind: Kind) -> &Watched {
        &self.watched[kind as usize]
    }

    pub(super) fn new_version(&mut self) -> VersionId {
        self.next_version += 1;
        VersionId(self.next_version)
    }

    /// A version needs these from now on; how many of them are not there yet.
    pub(super) fn acquire(&mut self, needs: &[Need], owner: &Owner, version: VersionId, now: Instant) -> usize {
        let mut waiting = 0;
        for need in needs {
            let Need { kind, wanted, optional, .. } = need;
            let asked = self.watched[*kind as usize].acquire(need, owner.clone(), version, now);
            match asked {
                Asked::Settled => continue,
                Asked::Waiting => {}
                Asked::New(Some(at)) => {
                    let due = Due::Resource(*kind, Arc::clone(&wanted.from.source), Arc::clone(&wanted.name));
                    self.at(at, due);
                }
                Asked::New(None) => {}
            }
            waiting += usize::from(!optional);
        }
        waiting
    }

    /// A version does not need these any more. What nobody needs is forgotten when all of the change has been made.
    pub(super) fn release(&mut self, needs: &[Need], version: VersionId) {
        needs.iter().for_each(|need| self.watched[need.kind as usize].release(&need.wanted, version));
    }

    /// Something has to be done then.
    pub(super) fn at(&mut self, at: Instant, due: Due) {
        self.due.insert((at, due));
    }

    /// It need not be done any more.
    pub(super) fn not_due(&mut self, at: Instant, due: Due) {
        self.due.remove(&(at, due));
    }

    /// When something has to be done next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| *at)
    }

    /// What has to be done by now.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<Due> {
        let mut all = Vec::new();
        while self.due.first().is_some_and(|(at, _)| *at <= now) {
            all.extend(self.due.pop_first().map(|(_, due)| due));
        }
        all
    }
}

/// How long until a listener that could not be bound is tried again: whoever has its port may go.
pub(super) const RETRY: Duration = Duration::from_secs(1);
