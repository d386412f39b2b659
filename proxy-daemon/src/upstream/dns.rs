//! STRICT_DNS: looks the names of a cluster up again and again, on the control thread.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc};

use super::Clusters;
use crate::config::model::{ClusterConfig, Discovery, DnsLookupFamily, Endpoint, EndpointAddress, LocalityEndpoints};

/// Looks the names of a cluster up that is not in use yet. `None`: a look-up failed, and the log says why.
pub async fn resolve_once(config: &ClusterConfig) -> Option<Arc<[LocalityEndpoints]>> {
    let Discovery::StrictDns { family, .. } = config.discovery else { return None };
    match resolve(&config.endpoints, family).await {
        Ok(endpoints) => Some(endpoints.into()),
        Err(error) => {
            tracing::warn!(cluster = %config.name, %error, "DNS look-up failed; the cluster is used as it is");
            None
        }
    }
}

/// Resolves the cluster until it is replaced or removed. A failed look-up keeps the last addresses. `first`: what it was found to be
/// just now.
pub async fn resolve_forever(clusters: Arc<Clusters>, config: ClusterConfig, first: Option<Arc<[LocalityEndpoints]>>) {
    let Discovery::StrictDns { refresh_rate, family } = config.discovery else { return };
    let Some(mine) = clusters.load().get(&config.name).map(Arc::clone) else { return };
    let mut last = Vec::new();
    if let Some(first) = first {
        // There was no cluster to count it before.
        mine.stats.update_attempt.inc();
        mine.stats.update_success.inc();
        last = first.to_vec();
        tokio::time::sleep(refresh_rate).await;
    }
    loop {
        let now = clusters.load().get(&config.name).map(Arc::clone);
        let Some(cluster) = now.filter(|now| Arc::ptr_eq(now, &mine)) else { return };
        cluster.stats.update_attempt.inc();
        match resolve(&config.endpoints, family).await {
            Ok(endpoints) => {
                cluster.stats.update_success.inc();
                if endpoints != last {
                    clusters.set_endpoints(&config.name, &endpoints);
                    last = endpoints;
                }
            }
            Err(error) => {
                cluster.stats.update_failure.inc();
                tracing::warn!(cluster = %config.name, %error, "DNS look-up failed; the last addresses stay in use");
            }
        }
        drop(cluster);
        tokio::time::sleep(refresh_rate).await;
    }
}

async fn resolve(groups: &[LocalityEndpoints], family: DnsLookupFamily) -> std::io::Result<Vec<LocalityEndpoints>> {
    let mut resolved = Vec::with_capacity(groups.len());
    for group in groups {
        let mut endpoints = Vec::new();
        for endpoint in &group.endpoints {
            let EndpointAddress::Dns { host, port } = &endpoint.address else {
                endpoints.push(endpoint.clone());
                continue;
            };
            let found: BTreeSet<SocketAddr> = tokio::net::lookup_host((&**host, *port)).await?.collect();
            endpoints.extend(choose(found, family).into_iter().map(|address| Endpoint {
                address: EndpointAddress::Ip(address),
                hostname: if endpoint.hostname.is_empty() { host.clone() } else { endpoint.hostname.clone() },
                ..endpoint.clone()
            }));
        }
        resolved.push(LocalityEndpoints { endpoints, ..group.clone() });
    }
    Ok(resolved)
}

fn choose(found: BTreeSet<SocketAddr>, family: DnsLookupFamily) -> Vec<SocketAddr> {
    let (v4, v6): (Vec<_>, Vec<_>) = found.into_iter().partition(SocketAddr::is_ipv4);
    match family {
        DnsLookupFamily::V4Only => v4,
        DnsLookupFamily::V6Only => v6,
        DnsLookupFamily::Auto => {
            if v6.is_empty() {
                v4
            } else {
                v6
            }
        }
        DnsLookupFamily::V4Preferred => {
            if v4.is_empty() {
                v6
            } else {
                v4
            }
        }
        DnsLookupFamily::All => v4.into_iter().chain(v6).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_chosen_as_configured() {
        let (v4, v6): (SocketAddr, SocketAddr) = ("10.0.0.1:80".parse().unwrap(), "[fd00::1]:80".parse().unwrap());
        let both = || BTreeSet::from([v4, v6]);
        assert_eq!(choose(both(), DnsLookupFamily::Auto), [v6]);
        assert_eq!(choose(both(), DnsLookupFamily::V4Preferred), [v4]);
        assert_eq!(choose(both(), DnsLookupFamily::All), [v4, v6]);
        assert_eq!(choose(BTreeSet::from([v4]), DnsLookupFamily::Auto), [v4]);
        assert_eq!(choose(BTreeSet::from([v4]), DnsLookupFamily::V6Only), []);
    }
}
