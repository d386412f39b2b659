//! Which listeners want which addresses.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use crate::config::model::Listener;

/// The names of listeners by the addresses that their versions want, and how many of them do. An address that leaves the port to
/// the kernel is nobody's.
#[derive(Default)]
pub(super) struct Addresses(HashMap<SocketAddr, BTreeMap<Arc<str>, usize>>);

impl Addresses {
    /// A version is there.
    pub(super) fn add(&mut self, listener: &Listener) {
        for address in fixed(listener) {
            *self.0.entry(address).or_default().entry(Arc::clone(&listener.name)).or_default() += 1;
        }
    }

    /// A version is gone.
    pub(super) fn remove(&mut self, listener: &Listener) {
        for address in fixed(listener) {
            let Some(names) = self.0.get_mut(&address) else { continue };
            if let Some(versions) = names.get_mut(&listener.name) {
                *versions -= 1;
                if *versions == 0 {
                    names.remove(&listener.name);
                }
            }
            if names.is_empty() {
                self.0.remove(&address);
            }
        }
    }

    /// Whether nobody wants any.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Other listeners that want an address of this one, by name, each with the first such address.
    pub(super) fn others<'a>(&'a self, listener: &'a Listener) -> impl Iterator<Item = (&'a Arc<str>, SocketAddr)> {
        let all = fixed(listener).filter_map(|address| self.0.get(&address)).flat_map(BTreeMap::keys);
        let names: BTreeSet<_> = all.filter(|name| **name != listener.name).collect();
        names.into_iter().filter_map(|name| {
            let wants = |address: &SocketAddr| self.0.get(address).is_some_and(|names| names.contains_key(name));
            Some((name, fixed(listener).find(wants)?))
        })
    }
}

fn fixed(listener: &Listener) -> impl Iterator<Item = SocketAddr> {
    listener.addresses.iter().map(|it| it.address).filter(|address| address.port() != 0)
}
