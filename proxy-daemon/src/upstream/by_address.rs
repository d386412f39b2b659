//! Hosts found by their addresses.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use hashbrown::HashTable;

use super::Host;
use crate::config::model::EndpointAddress;

/// The numbers of hosts, by their addresses. It has no copies of these, so it takes but seven bytes a host: of what is said about hosts
/// here, all must be about the same ones.
#[derive(Debug, Clone, Default)]
pub(super) struct ByAddress {
    numbers: HashTable<u32>,
    state: RandomState,
}

impl ByAddress {
    pub(super) fn with_capacity(hosts: usize) -> ByAddress {
        ByAddress { numbers: HashTable::with_capacity(hosts), state: RandomState::new() }
    }

    /// The number of the host at an address.
    pub(super) fn get(&self, hosts: &[Arc<Host>], address: &EndpointAddress) -> Option<u32> {
        let is_it = |number: &u32| hosts[*number as usize].address == *address;
        self.numbers.find(self.state.hash_one(address), is_it).copied()
    }

    /// Adds a host that is at no other's address.
    pub(super) fn add(&mut self, hosts: &[Arc<Host>], number: u32) {
        let ByAddress { numbers, state } = self;
        let hash = |number: &u32| state.hash_one(&hosts[*number as usize].address);
        numbers.insert_unique(hash(&number), number, hash);
    }
}
