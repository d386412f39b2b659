//! The node's own addresses, and those that it translates, as interception knows them.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use arc_swap::ArcSwap;

use super::config::Range;
use crate::config::model::Cidr;

/// Empty without interception.
static ADDRESSES: LazyLock<ArcSwap<HashSet<IpAddr>>> = LazyLock::new(ArcSwap::default);

/// Notes them all.
pub(super) fn note(addresses: &[IpAddr]) {
    ADDRESSES.store(Arc::new(addresses.iter().copied().collect()));
}

/// Whether what listens at this address answers from the node's own network.
pub(crate) fn include(address: IpAddr) -> bool {
    ADDRESSES.load().contains(&address.to_canonical())
}

/// Likewise, of `node_source_ranges`.
static TRANSLATED: LazyLock<ArcSwap<Vec<Cidr>>> = LazyLock::new(ArcSwap::default);

/// Notes the ranges whose addresses the node translates.
pub(super) fn note_translated(ranges: &[Range]) {
    let ranges = ranges.iter().filter_map(|range| Cidr::new(range.address, range.length));
    TRANSLATED.store(Arc::new(ranges.collect()));
}

/// Whether the node sends what is for this address to another one, so that answers would not come in a pod's name.
pub(crate) fn translates(address: IpAddr) -> bool {
    TRANSLATED.load().iter().any(|range| range.contains(address.to_canonical()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_count() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(!include(address("192.0.2.1")));
        note(&[address("192.0.2.1"), address("2001:db8::1")]);
        assert!(include(address("::ffff:192.0.2.1")) && include(address("2001:db8::1")));
        note(&[address("192.0.2.2")]);
        assert!(!include(address("192.0.2.1")) && include(address("192.0.2.2")));
    }

    #[test]
    fn what_is_translated_is_known() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(!translates(address("198.51.100.1")));
        note_translated(&[Range { address: address("198.51.100.0"), length: 24 }]);
        assert!(translates(address("::ffff:198.51.100.1")) && !translates(address("198.51.101.1")));
        note_translated(&[]);
    }
}
