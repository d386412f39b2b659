//! The addresses that enrolled pods have in the other family: what a pod of both calls by one may be led to a server of the other.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, LazyLock},
};

use arc_swap::ArcSwap;

/// Empty without interception.
static OTHERS: LazyLock<ArcSwap<HashMap<IpAddr, IpAddr>>> = LazyLock::new(ArcSwap::default);

/// Notes the addresses of all pods, each pod's own together.
pub(super) fn note<'a>(pods: impl Iterator<Item = Vec<&'a IpAddr>>) {
    let mut others = HashMap::new();
    for addresses in pods {
        for address in &addresses {
            let other = addresses.iter().find(|other| other.is_ipv4() != address.is_ipv4());
            others.extend(other.map(|other| (**address, **other)));
        }
    }
    if **OTHERS.load() != others {
        OTHERS.store(Arc::new(others));
    }
}

/// What a pod with this address has in the other family.
pub(crate) fn other(address: IpAddr) -> Option<IpAddr> {
    OTHERS.load().get(&address).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pod_has_its_own() {
        let [a, b, c] = ["192.0.2.9", "2001:db8::9", "192.0.2.10"].map(|text| text.parse::<IpAddr>().unwrap());
        note([vec![&a, &b], vec![&c]].into_iter());
        assert_eq!([a, b, c].map(other), [Some(b), Some(a), None]);
        note([vec![&a], vec![&c, &b]].into_iter());
        assert_eq!([a, b, c].map(other), [None, Some(c), Some(b)]);
    }
}
