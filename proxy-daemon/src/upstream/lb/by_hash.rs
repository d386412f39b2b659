//! `RING_HASH` and `MAGLEV`: the same hash goes to the same host, and hosts that come or go move few. The tables are Envoy's, entry by
//! entry. They are made once for all workers, where the hosts change.

use std::sync::Arc;

use twox_hash::XxHash64;

use super::{
    Ingredients, Pick,
    layout::{Level, those},
    mersenne::Mersenne,
};
use crate::{
    config::model::{ConsistentHashing, HashFunction, LbPolicy, LocalityLb},
    upstream::{Host, HostCounter, Standing},
};

/// Which host has which hashes.
#[derive(Debug)]
pub(super) struct HashTable {
    places: Places,
    /// The numbers of its hosts.
    hosts: Box<[u32]>,
    /// How many entries the hosts have.
    pub(super) spread: Spread,
    bound: Option<Bound>,
}

/// Of hosts by their places among [`HashTable::hosts`].
#[derive(Debug)]
enum Places {
    /// Sorted by hash: a host has what lies between the entry before and its own.
    Ring(Box<[(u64, u32)]>),
    /// A host has the hashes that leave its place as rest.
    Maglev(Box<[u32]>),
}

/// `hash_balance_factor`: how much of the load a host may have.
#[derive(Debug)]
struct Bound {
    factor: u32,
    /// The hosts' shares of the whole.
    shares: Box<[f64]>,
}

/// So many hosts are looked at while a request waits, where all of them have too much of the load. With as many hosts or fewer that is
/// all of them, as in Envoy.
const PROBES: u32 = 1000;

/// How many entries the hosts of a table have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::upstream) struct Spread {
    pub(in crate::upstream) size: u64,
    pub(in crate::upstream) min: u64,
    pub(in crate::upstream) max: u64,
}

/// A host while a table is made: its number, what it is hashed by, and its share of the whole.
type Keyed<'a> = (u32, &'a str, f64);

impl HashTable {
    /// The table of a priority; `None` where the policy needs none. `panic`: of all its hosts. `degraded`: of degraded hosts, where
    /// there are no healthy ones.
    pub(super) fn new(of: &Ingredients<'_>, level: &Level, panic: bool, degraded: bool) -> Option<HashTable> {
        let hashing = match of.policy {
            LbPolicy::RingHash { hashing, .. } | LbPolicy::Maglev { hashing, .. } => hashing,
            _ => return None,
        };
        let mut hosts = keyed(of, level, hashing, (!panic).then_some(Standing::Healthy));
        if hosts.is_empty() && degraded {
            hosts = keyed(of, level, hashing, Some(Standing::Degraded));
        }
        let (places, spread) = match of.policy {
            LbPolicy::RingHash { min_size, max_size, function, .. } => ring(&hosts, *min_size, *max_size, *function),
            LbPolicy::Maglev { size, .. } => maglev(&hosts, *size),
            _ => return None,
        };
        let bound = hashing
            .balance_factor
            .map(|factor| Bound { factor, shares: hosts.iter().map(|(_, _, share)| *share).collect() });
        Some(HashTable { places, hosts: hosts.iter().map(|(number, ..)| *number).collect(), spread, bound })
    }

    /// What its gauges are called, and what they count.
    pub(super) fn names(&self) -> (&'static str, &'static str) {
        match self.places {
            Places::Ring(_) => ("ring_hash_lb", "hashes"),
            Places::Maglev(_) => ("maglev_lb", "entries"),
        }
    }

    /// The number of the host of a hash; further attempts get others, where there are any.
    pub(super) fn pick(&self, hash: u64, cx: &Pick<'_>) -> Option<u32> {
        let place = self.places.host(hash, cx.attempt)?;
        let place = match &self.bound {
            Some(bound) => self.within(bound, place, hash, cx),
            None => place,
        };
        self.hosts.get(place).copied()
    }

    /// The host at this place, or where it has too much of the load another one: the first in an order that the hash decides that
    /// has not, or else of those that were looked at the one that has the least too much.
    fn within(&self, bound: &Bound, place: usize, hash: u64, cx: &Pick<'_>) -> usize {
        let all = cx.stats.upstream_rq_active.value();
        let slots = ((all + 1) * u64::from(bound.factor)).div_ceil(100) as f64;
        let overload = |place: usize| {
            let host = &cx.hosts[self.hosts[place] as usize];
            let mine = (slots * bound.shares[place]).ceil().max(1.0);
            host.counters.sum(HostCounter::RqActive) as f64 / mine
        };
        let (mut best, mut least) = (place, overload(place));
        if least <= 1.0 {
            return place;
        }
        // The lower half of the hash is the seed.
        let mut random = Mersenne::new(hash as u32);
        // Fisher and Yates's shuffle, of which only the places that were swapped are kept: few, unless all hosts are busy.
        let mut swapped = std::collections::HashMap::new();
        let len = self.hosts.len() as u32;
        for index in 0..len.min(PROBES) {
            let other = index + random.below(len - index);
            let next = *swapped.get(&other).unwrap_or(&other);
            let here = *swapped.get(&index).unwrap_or(&index);
            swapped.insert(other, here);
            let next = next as usize;
            if next == place {
                continue;
            }
            let factor = overload(next);
            if factor <= 1.0 {
                return next;
            }
            if factor < least {
                (best, least) = (next, factor);
            }
        }
        best
    }
}

impl Places {
    fn host(&self, hash: u64, attempt: u32) -> Option<usize> {
        match self {
            Places::Ring(ring) => {
                let at = ring.partition_point(|(point, _)| *point < hash);
                let at = if at == ring.len() { 0 } else { at };
                ring.get((at + attempt as usize) % ring.len().max(1)).map(|(_, host)| *host as usize)
            }
            Places::Maglev(table) => {
                let hash = if attempt > 0 { hash ^ (u64::MAX - u64::from(attempt) + 1) } else { hash };
                let at = hash.checked_rem(table.len() as u64)?;
                table.get(at as usize).map(|host| *host as usize)
            }
        }
    }
}

/// The hosts that stand so (`None`: all), with their shares: by weight, and by the weights of their localities where those count.
fn keyed<'a>(
    of: &Ingredients<'a>,
    level: &Level,
    hashing: &ConsistentHashing,
    standing: Option<Standing>,
) -> Vec<Keyed<'a>> {
    let chosen = |numbers: &[u32]| -> Vec<u32> {
        match standing {
            Some(standing) => those(numbers, of.hosts, standing).collect(),
            None => numbers.to_vec(),
        }
    };
    let mut keyed = Vec::with_capacity(level.hosts.len());
    let mut add = |numbers: Vec<u32>, part: f64| {
        let host = |number: u32| -> &'a Arc<Host> { &of.hosts[number as usize] };
        let sum: u64 = numbers.iter().map(|number| u64::from(host(*number).weight)).sum();
        for number in numbers {
            let host = host(number);
            keyed.push((number, host.hash_key(hashing.by_hostname), f64::from(host.weight) * part / sum as f64));
        }
    };
    if of.options.locality == LocalityLb::Weighted {
        let sum: u64 = level.localities.iter().map(|group| u64::from(group.weight)).sum();
        for group in level.localities.iter().filter(|group| group.weight > 0) {
            add(chosen(&group.hosts), f64::from(group.weight) / sum as f64);
        }
    } else {
        add(chosen(&level.hosts), 1.0);
    }
    keyed
}

fn ring(hosts: &[Keyed<'_>], min_size: u64, max_size: u64, function: HashFunction) -> (Places, Spread) {
    if hosts.is_empty() {
        return (Places::Ring(Box::default()), Spread::default());
    }
    let least = hosts.iter().fold(1.0_f64, |least, (_, _, share)| least.min(*share));
    // The host with the least weight gets a whole number of entries.
    let scale = ((least * min_size as f64).ceil() / least).min(max_size as f64);
    let size = scale.ceil() as u64;
    let mut entries = Vec::with_capacity(size as usize);
    let (mut target, mut spread) = (0.0, Spread { size, min: size, max: 0 });
    for (number, (_, key, share)) in hosts.iter().enumerate() {
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
    (Places::Ring(entries.into()), spread)
}

fn maglev(hosts: &[Keyed<'_>], size: u64) -> (Places, Spread) {
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
        return (Places::Maglev(Box::default()), Spread::default());
    }
    let greatest = hosts.iter().fold(0.0_f64, |greatest, (_, _, share)| greatest.max(*share));
    let mut order: Vec<usize> = (0..hosts.len()).collect();
    order.sort_by_key(|index| hosts[*index].1);
    let mut entries: Vec<Entry> = order
        .into_iter()
        .map(|index| {
            let key = hosts[index].1.as_bytes();
            Entry {
                host: index as u32,
                offset: XxHash64::oneshot(0, key) % size,
                skip: XxHash64::oneshot(1, key) % (size - 1) + 1,
                share: hosts[index].2,
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
    (Places::Maglev(table.into()), spread)
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
        let hosts = [(0, "127.0.0.1:90", 0.25), (1, "127.0.0.1:91", 0.5), (2, "127.0.0.1:92", 0.25)];
        let (Places::Ring(entries), spread) = ring(&hosts, 64, 1 << 20, HashFunction::XxHash) else { panic!() };
        assert_eq!((entries.len(), spread), (64, Spread { size: 64, min: 16, max: 32 }));
        assert!(entries.is_sorted_by_key(|(hash, _)| *hash));
        let (Places::Maglev(table), spread) = maglev(&hosts, 17) else { panic!() };
        assert_eq!(spread.size, 17);
        assert_eq!(table.iter().filter(|host| **host == 1).count() as u64, spread.max);
        assert!(table.iter().all(|host| *host < 3));
    }

    #[test]
    fn a_ring_ends_where_it_begins() {
        let table = Places::Ring([(10, 0), (20, 1), (30, 2)].into());
        for (hash, attempt, host) in [(0, 0, 0), (10, 0, 0), (11, 0, 1), (30, 0, 2), (31, 0, 0), (11, 1, 2), (11, 2, 0)]
        {
            assert_eq!(table.host(hash, attempt), Some(host), "{hash} {attempt}");
        }
        assert_eq!(Places::Ring(Box::default()).host(1, 0), None);
        assert_eq!(Places::Maglev(Box::default()).host(1, 0), None);
    }
}
