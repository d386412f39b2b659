//! `RING_HASH` and `MAGLEV`: the same hash goes to the same host, and hosts that come or go move few. The tables are Envoy's, entry by
//! entry. They are made once for all workers, where the hosts change.

use std::{rc::Rc, sync::Arc};

use twox_hash::XxHash64;

use super::{LoadBalancer, Wish, WorkerHost};
use crate::{
    config::model::{HashFunction, LbPolicy},
    upstream::Host,
};

/// Which host has which hashes, by the number of the host among those that may be used.
#[derive(Debug)]
pub(in crate::upstream) enum HashTable {
    /// Sorted by hash: a host has what lies between the entry before and its own.
    Ring(Box<[(u64, u32)]>),
    /// A host has the hashes that leave its place as rest.
    Maglev(Box<[u32]>),
}

/// How many entries the hosts of a table have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::upstream) struct Spread {
    pub(in crate::upstream) size: u64,
    pub(in crate::upstream) min: u64,
    pub(in crate::upstream) max: u64,
}

impl HashTable {
    /// The table of `hosts`, in their order; `None` where the policy needs none.
    pub(in crate::upstream) fn new(policy: &LbPolicy, hosts: &[&Arc<Host>]) -> Option<(HashTable, Spread)> {
        let keyed = |by_hostname: bool| -> Vec<(&str, u32)> {
            hosts.iter().map(|host| (host.hash_key(by_hostname), host.weight)).collect()
        };
        match policy {
            LbPolicy::RingHash { min_size, max_size, function, by_hostname } => {
                Some(ring(&keyed(*by_hostname), *min_size, *max_size, *function))
            }
            LbPolicy::Maglev { size, by_hostname } => Some(maglev(&keyed(*by_hostname), *size)),
            _ => None,
        }
    }

    /// What its gauges are called, and what they count.
    pub(in crate::upstream) fn names(&self) -> (&'static str, &'static str) {
        match self {
            HashTable::Ring(_) => ("ring_hash_lb", "hashes"),
            HashTable::Maglev(_) => ("maglev_lb", "entries"),
        }
    }

    /// The host of a hash; further attempts get others, where there are any.
    fn host(&self, hash: u64, attempt: u32) -> Option<usize> {
        match self {
            HashTable::Ring(ring) => {
                let at = ring.partition_point(|(point, _)| *point < hash);
                let at = if at == ring.len() { 0 } else { at };
                ring.get((at + attempt as usize) % ring.len().max(1)).map(|(_, host)| *host as usize)
            }
            HashTable::Maglev(table) => {
                let hash = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
                let at = hash.checked_rem(table.len() as u64)?;
                table.get(at as usize).map(|host| *host as usize)
            }
        }
    }
}

/// Shares of the whole, and the least and the greatest of them.
fn shares(hosts: &[(&str, u32)]) -> (Vec<f64>, f64, f64) {
    let sum: u64 = hosts.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let shares: Vec<f64> = hosts.iter().map(|(_, weight)| f64::from(*weight) / sum as f64).collect();
    let (min, max) = shares.iter().fold((1.0_f64, 0.0_f64), |(min, max), share| (min.min(*share), max.max(*share)));
    (shares, min, max)
}

fn ring(hosts: &[(&str, u32)], min_size: u64, max_size: u64, function: HashFunction) -> (HashTable, Spread) {
    if hosts.is_empty() {
        return (HashTable::Ring(Box::default()), Spread::default());
    }
    let (shares, least, _) = shares(hosts);
    // The host with the least weight gets a whole number of entries.
    let scale = ((least * min_size as f64).ceil() / least).min(max_size as f64);
    let size = scale.ceil() as u64;
    let mut entries = Vec::with_capacity(size as usize);
    let (mut target, mut spread) = (0.0, Spread { size, min: size, max: 0 });
    for (number, ((key, _), share)) in hosts.iter().zip(shares).enumerate() {
        target += scale * share;
        let mut count = 0_u64;
        let mut text = format!("{key}_");
        let stem = text.len();
        while (entries.len() as f64) < target {
            text.truncate(stem);
            text.push_str(itoa::Buffer::new().format(count));
            let hash = match function {
                HashFunction::XxHash => XxHash64::oneshot(0, text.as_bytes()),
                HashFunction::MurmurHash2 => murmur_hash_2(text.as_bytes()),
            };
            entries.push((hash, number as u32));
            count += 1;
        }
        (spread.min, spread.max) = (spread.min.min(count), spread.max.max(count));
    }
    entries.sort_by_key(|(hash, _)| *hash);
    (HashTable::Ring(entries.into()), spread)
}

fn maglev(hosts: &[(&str, u32)], size: u64) -> (HashTable, Spread) {
    struct Entry {
        host: u32,
        offset: u64,
        skip: u64,
        share: f64,
        target: f64,
        next: u64,
        count: u64,
    }
    if hosts.is_empty() {
        return (HashTable::Maglev(Box::default()), Spread::default());
    }
    let (shares, _, greatest) = shares(hosts);
    let mut order: Vec<usize> = (0..hosts.len()).collect();
    order.sort_by_key(|index| hosts[*index].0);
    let mut entries: Vec<Entry> = order
        .into_iter()
        .map(|index| {
            let key = hosts[index].0.as_bytes();
            Entry {
                host: index as u32,
                offset: XxHash64::oneshot(0, key) % size,
                skip: XxHash64::oneshot(1, key) % (size - 1) + 1,
                share: shares[index],
                target: 0.0,
                next: 0,
                count: 0,
            }
        })
        .collect();
    const FREE: u32 = u32::MAX;
    let mut table = vec![FREE; size as usize];
    let (mut filled, mut round) = (0, 0.0);
    while filled < size {
        round += 1.0;
        for entry in &mut entries {
            // One with a third of the greatest weight has its turn every third time.
            if filled == size || round * entry.share < entry.target {
                continue;
            }
            entry.target += greatest;
            // The size is a prime: every place comes.
            loop {
                let place = (entry.offset + entry.skip * entry.next) % size;
                entry.next += 1;
                if table[place as usize] == FREE {
                    table[place as usize] = entry.host;
                    break;
                }
            }
            entry.count += 1;
            filled += 1;
        }
    }
    let counts = entries.iter().map(|entry| entry.count);
    let spread = Spread { size, min: counts.clone().min().unwrap_or(0), max: counts.max().unwrap_or(0) };
    (HashTable::Maglev(table.into()), spread)
}

/// MurmurHash2 of 64 bits, as libstdc++ has it.
fn murmur_hash_2(bytes: &[u8]) -> u64 {
    const MUL: u64 = 0xc6a4_a793_5bd1_e995;
    const SEED: u64 = 0xc70f_6907;
    let mix = |value: u64| value ^ (value >> 47);
    let (words, rest) = bytes.as_chunks::<8>();
    let mut hash = SEED ^ (bytes.len() as u64).wrapping_mul(MUL);
    for word in words {
        let data = mix(u64::from_le_bytes(*word).wrapping_mul(MUL)).wrapping_mul(MUL);
        hash = (hash ^ data).wrapping_mul(MUL);
    }
    if !rest.is_empty() {
        let data = rest.iter().rev().fold(0, |data, byte| data << 8 | u64::from(*byte));
        hash = (hash ^ data).wrapping_mul(MUL);
    }
    mix(mix(hash).wrapping_mul(MUL))
}

/// A worker's view of a table.
pub(super) struct ByHash(pub(super) Arc<HashTable>);

impl LoadBalancer for ByHash {
    fn pick(&mut self, hosts: &[Rc<WorkerHost>], wish: Wish) -> Option<usize> {
        // What has no hash may go anywhere.
        let index = self.0.host(wish.hash.unwrap_or_else(|| fastrand::u64(..)), wish.attempt)?;
        (index < hosts.len()).then_some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn murmur_hash_is_that_of_libstdcxx() {
        // Of Envoy's own tests.
        assert_eq!(murmur_hash_2(b"foo"), 9_631_199_822_919_835_226);
        assert_eq!(murmur_hash_2(b"bar"), 11_474_628_671_133_349_555);
        assert_eq!(murmur_hash_2(b""), 6_142_509_188_972_423_790);
    }

    #[test]
    fn weights_are_shares_of_a_table() {
        let hosts = [("127.0.0.1:90", 1), ("127.0.0.1:91", 2), ("127.0.0.1:92", 1)];
        let (HashTable::Ring(entries), spread) = ring(&hosts, 64, 1 << 20, HashFunction::XxHash) else { panic!() };
        assert_eq!((entries.len(), spread), (64, Spread { size: 64, min: 16, max: 32 }));
        assert!(entries.is_sorted_by_key(|(hash, _)| *hash));
        let (HashTable::Maglev(table), spread) = maglev(&hosts, 17) else { panic!() };
        assert_eq!(spread.size, 17);
        assert_eq!(table.iter().filter(|host| **host == 1).count() as u64, spread.max);
        assert!(table.iter().all(|host| *host < 3));
    }

    #[test]
    fn a_ring_ends_where_it_begins() {
        let table = HashTable::Ring([(10, 0), (20, 1), (30, 2)].into());
        for (hash, attempt, host) in [(0, 0, 0), (10, 0, 0), (11, 0, 1), (30, 0, 2), (31, 0, 0), (11, 1, 2), (11, 2, 0)]
        {
            assert_eq!(table.host(hash, attempt), Some(host), "{hash} {attempt}");
        }
        assert_eq!(HashTable::Ring(Box::default()).host(1, 0), None);
        assert_eq!(HashTable::Maglev(Box::default()).host(1, 0), None);
    }
}
