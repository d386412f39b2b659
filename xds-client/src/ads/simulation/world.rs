//! What the server has, and how it changes.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use prost::Message as _;

use super::super::type_url::{CLUSTER, ENDPOINT, LISTENER, ROUTE};
use crate::Any;

pub(super) const TYPES: [&str; 4] = [CLUSTER, ENDPOINT, LISTENER, ROUTE];

/// Versions are points in time. A resource is bad, and rejected by the sink, in some of them.
pub(super) fn is_bad(version: u64) -> bool {
    version.is_multiple_of(5)
}

/// Clusters that a wildcard does not bring: they are asked for by name.
pub(super) fn is_on_demand(name: &str) -> bool {
    name.starts_with("demand")
}

pub(super) fn body(type_url: &str, name: &str, version: u64) -> Any {
    let message = Cluster { name: name.to_owned(), alt_stat_name: version.to_string(), ..Default::default() };
    Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

pub(super) fn version_in(body: &Any) -> u64 {
    let message = Cluster::decode(body.value.as_slice()).expect("the world made it");
    message.alt_stat_name.parse().expect("the world made it")
}

#[derive(Clone, Copy, PartialEq)]
pub(super) struct Item {
    pub(super) version: u64,
    /// Time to live, in seconds.
    pub(super) ttl: Option<u64>,
}

#[derive(Default)]
pub(super) struct World {
    now: u64,
    /// By type: the time of the last change, and the resources.
    types: BTreeMap<&'static str, (u64, BTreeMap<String, Item>)>,
    /// When each resource was last removed.
    removed: BTreeMap<(&'static str, String), u64>,
}

impl World {
    fn set(&mut self, type_url: &'static str, name: &str, ttl: Option<u64>) {
        self.now += 1;
        let (changed, resources) = self.types.entry(type_url).or_default();
        *changed = self.now;
        resources.insert(name.to_owned(), Item { version: self.now, ttl });
    }

    fn remove(&mut self, type_url: &'static str, name: &str) {
        let (changed, resources) = self.types.entry(type_url).or_default();
        if resources.remove(name).is_some() {
            self.now += 1;
            *changed = self.now;
            self.removed.insert((type_url, name.to_owned()), self.now);
        }
    }

    /// A random change.
    pub(super) fn change(&mut self, rng: &mut fastrand::Rng) {
        let type_url = TYPES[rng.usize(..TYPES.len())];
        let has_demand = [CLUSTER, ENDPOINT].contains(&type_url);
        let kind = if has_demand && rng.u8(..4) == 0 { "demand" } else { "r" };
        let name = format!("{kind}{}", rng.u8(..5));
        let ttl = (rng.u8(..4) == 0).then(|| rng.u64(1..20));
        if rng.u8(..3) == 0 { self.remove(type_url, &name) } else { self.set(type_url, &name, ttl) }
    }

    /// Brings every bad resource to a good version.
    pub(super) fn repair(&mut self) {
        for type_url in TYPES {
            let items: Vec<(String, Item)> = self.items(type_url).map(|(name, item)| (name.clone(), *item)).collect();
            for (name, item) in items {
                if is_bad(item.version) {
                    self.set(type_url, &name, item.ttl);
                    if is_bad(self.now) {
                        self.set(type_url, &name, item.ttl);
                    }
                }
            }
        }
    }

    /// The time of the last change of a type.
    pub(super) fn version(&self, type_url: &str) -> u64 {
        self.types.get(type_url).map_or(0, |(changed, _)| *changed)
    }

    pub(super) fn items(&self, type_url: &str) -> impl Iterator<Item = (&String, &Item)> {
        self.types.get(type_url).into_iter().flat_map(|(_, resources)| resources)
    }

    pub(super) fn item(&self, type_url: &str, name: &str) -> Option<&Item> {
        self.types.get(type_url)?.1.get(name)
    }

    /// Whether the server removed a resource after this version of it.
    pub(super) fn was_removed(&self, type_url: &'static str, name: &str, version: u64) -> bool {
        self.removed.get(&(type_url, name.to_owned())).is_some_and(|at| *at > version)
    }
}
