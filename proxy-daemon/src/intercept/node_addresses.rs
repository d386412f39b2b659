//! The node's own addresses, as interception knows them.

use std::{
    collections::HashSet,
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use arc_swap::ArcSwap;

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
}
