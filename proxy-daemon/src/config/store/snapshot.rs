//! What `/config_dump` and its like are given: see [`Snapshot`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use culvert_xds_client::{ads::type_url, source::Source};

use super::{
    Apply, ConfigStore,
    kinds::{Kind, Need},
    rotation::StaticFiles,
    state::State,
};
use crate::config::status::{Failure, Incomplete, Missing, Resource, Snapshot, Type, Unready, Version};

impl<A: Apply> ConfigStore<A> {
    /// All that is known of the resources now.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let mut types = vec![state.clusters_now(), state.listeners_now()];
        types.extend(Kind::ALL.into_iter().map(|kind| state.named_now(kind)));
        types.push(state.hosts_now());
        let warming = state.listeners.by_name.iter().filter(|(_, entry)| entry.is_pending());
        let unready = warming.filter_map(|(name, _)| state.unready(name)).collect();
        let faults = state.static_files.iter().filter_map(StaticFiles::fault).collect();
        let incomplete = state.incomplete_now();
        Snapshot { types, unready, incomplete, faults, sources: Vec::new(), scoped: state.scoped_now() }
    }
}

impl State {
    fn clusters_now(&self) -> Type {
        let clusters = self.clusters.by_name.iter().filter(|(_, entry)| !entry.is_static);
        let known = clusters.map(|(name, entry)| Resource {
            name: name.to_string(),
            active: entry.active.as_ref().and_then(|it| it.stored.clone()),
            warming: entry.warming.as_ref().and_then(|it| it.version.stored.clone()),
            waits_for: entry.warming.iter().flat_map(|it| self.missing(&it.version.needs)).map(in_words).collect(),
            ..Resource::default()
        });
        // Whatever source has it, there is one of a name.
        let refused = self.clusters.refused.entries().map(|(_, name, failure)| (None, name, failure));
        of_type(type_url::CLUSTER, known.map(|it| (None, it)), refused)
    }

    fn listeners_now(&self) -> Type {
        let listeners = self.listeners.by_name.iter().filter(|(_, entry)| !entry.is_static);
        let known = listeners.map(|(name, entry)| {
            let active = entry.active.as_ref().and_then(|it| it.stored.clone());
            let warming = entry.newest().and_then(|it| it.stored.clone());
            let failure = entry.failure.clone().zip(warming.clone());
            Resource {
                name: name.to_string(),
                active,
                warming,
                failure: failure.map(|(details, attempt)| Arc::new(Failure { details, attempt })),
                waits_for: entry.warming.iter().flat_map(|it| self.missing(&it.needs)).map(in_words).collect(),
                ..Resource::default()
            }
        });
        let refused = self.listeners.refused.entries().map(|(_, name, failure)| (None, name, failure));
        let mut all = of_type(type_url::LISTENER, known.map(|it| (None, it)), refused);
        for (name, version) in self.listeners.draining.versions() {
            let at = all.resources.binary_search_by(|resource| (*resource.name).cmp(name));
            let at = at.unwrap_or_else(|at| {
                all.resources.insert(at, Resource { name: name.to_string(), ..Resource::default() });
                at
            });
            all.resources[at].draining = Some(Arc::clone(version));
        }
        all
    }

    fn scopes_now(&self) -> Type {
        let known = self.scopes.iter().flat_map(|(source, set)| {
            set.by_name.iter().map(move |(name, entry)| {
                let active = entry.stored.clone();
                (Some(source), Resource { name: name.clone(), active, ..Resource::default() })
            })
        });
        let refused = self.scopes.values().flat_map(|set| set.refused.entries());
        of_type(type_url::SCOPED_ROUTES, known, refused.map(|(source, name, failure)| (Some(source), name, failure)))
    }

    fn hosts_now(&self) -> Type {
        let known = self.vhds.entries().map(|(source, name, stored)| {
            let active = Some(Arc::clone(stored));
            (Some(source), Resource { name: name.clone(), active, ..Resource::default() })
        });
        let refused = self.vhds.refused.entries().map(|(source, name, failure)| (Some(source), name, failure));
        of_type(type_url::VIRTUAL_HOST, known, refused)
    }

    fn named_now(&self, kind: Kind) -> Type {
        if kind == Kind::Scopes {
            return self.scopes_now();
        }
        let known = self.watched(kind).entries().map(|(source, name, entry)| {
            let held = self.held.iter().find_map(|held| Some((held.version_of(source, name)?, held.waits_for())));
            let (warming, waits_for) = held.filter(|_| kind == Kind::Routes).unzip();
            let missing = if entry.settled { Missing::DoesNotExist } else { Missing::Requested };
            let resource = Resource {
                name: name.to_string(),
                active: match &entry.stored {
                    Some(stored) if kind == Kind::Routes => Some(self.vhds.merged_version(source, name, stored)),
                    stored => stored.clone(),
                },
                failure: entry.refused.clone().or_else(|| entry.files.as_ref()?.failure()),
                missing: (entry.stored.is_none() && entry.refused.is_none()).then_some(missing),
                warming,
                waits_for: waits_for.unwrap_or_default(),
                ..Resource::default()
            };
            (Some(source), resource)
        });
        of_type(kind.type_url(), known, std::iter::empty())
    }

    fn unready(&self, name: &Arc<str>) -> Option<Unready> {
        let entry = self.listeners.by_name.get(name)?;
        let missing = entry.warming.iter().flat_map(|warming| self.missing(&warming.needs));
        let mut targets: Vec<_> = missing.map(|need| need.kind.target(&need.wanted.name)).collect();
        if targets.is_empty() {
            targets.push("the clusters".to_owned());
        }
        Some(Unready { listener: name.to_string(), is_static: entry.is_static, targets })
    }

    fn incomplete_now(&self) -> Vec<Incomplete> {
        let clusters = self.clusters.by_name.iter();
        let clusters = clusters.filter_map(|(name, it)| Some((type_url::CLUSTER, name, &*it.active.as_ref()?.needs)));
        let listeners = self.listeners.by_name.iter();
        let listeners =
            listeners.filter_map(|(name, it)| Some((type_url::LISTENER, name, &*it.active.as_ref()?.needs)));
        let lacking = clusters.chain(listeners).map(|(of, name, needs)| Incomplete {
            type_url: of.to_owned(),
            name: name.to_string(),
            lacks: self.lacking(needs).map(in_words).collect(),
        });
        lacking.filter(|it| !it.lacks.is_empty()).collect()
    }

    /// Secrets, routes and endpoints that nobody waits for any more, and that are not there. (A filter has its default.)
    fn lacking<'a>(&self, needs: &'a [Need]) -> impl Iterator<Item = &'a Need> + use<'a, '_> {
        needs.iter().filter(|need| {
            let known = self.watched(need.kind).get(&need.wanted.from.source, &need.wanted.name);
            let matters = matches!(need.kind, Kind::Secrets | Kind::Routes | Kind::Endpoints) && !need.optional;
            matters && known.is_some_and(|known| known.settled && known.stored.is_none())
        })
    }

    /// Those of some needs that are waited for.
    fn missing<'a>(&self, needs: &'a [Need]) -> impl Iterator<Item = &'a Need> + use<'a, '_> {
        needs.iter().filter(|need| {
            let known = self.watched(need.kind).get(&need.wanted.from.source, &need.wanted.name);
            !need.optional && known.is_some_and(|known| !known.settled)
        })
    }
}

/// What is waited for, for people.
fn in_words(need: &Need) -> String {
    format!("{} {:?}", need.kind.noun(), need.wanted.name)
}

/// Resources by name, and those of one name by where they come from. `refused`: some of them may have no other version.
fn of_type<'a>(
    type_url: &str,
    known: impl Iterator<Item = (Option<&'a Arc<Source>>, Resource)>,
    refused: impl Iterator<Item = (Option<&'a Arc<Source>>, &'a String, &'a Arc<Failure>)>,
) -> Type {
    let mut resources: BTreeMap<(String, Option<&Arc<Source>>), Resource> =
        known.map(|(source, resource)| ((resource.name.clone(), source), resource)).collect();
    for (source, name, failure) in refused {
        let resource = resources.entry((name.clone(), source)).or_default();
        resource.name.clone_from(name);
        resource.failure = Some(Arc::clone(failure));
    }
    let versions: BTreeSet<&str> = resources.values().filter_map(newest).map(|it| it.version.as_str()).collect();
    // The one version that all resources have; empty where they differ.
    let version = versions.first().filter(|_| versions.len() == 1).map(|version| (*version).to_owned());
    Type {
        type_url: type_url.to_owned(),
        version: version.unwrap_or_default(),
        resources: resources.into_values().collect(),
    }
}

fn newest(resource: &Resource) -> Option<&Arc<Version>> {
    resource.warming.as_ref().or(resource.active.as_ref())
}
