//! What each host gets of the load when nothing is known of the requests: for those who choose elsewhere, as the kernel does.

use std::sync::Arc;

use super::{Balancer, Kind, Picker, Priority, STANDINGS, layout::Level, layout::those, zone::Zone};
use crate::{
    config::model::{LbPolicy, LocalityLb},
    upstream::Host,
};

impl Balancer {
    /// The hosts' shares, by their numbers: those that get nothing are left out. `None`: hosts are chosen by what only a
    /// request tells.
    pub(in crate::upstream) fn shares(&self, hosts: &[Arc<Host>], levels: &[Level]) -> Option<Vec<(u32, f64)>> {
        let Kind::Whole(picker) = &self.kind else { return None };
        let mut shares = vec![0.0; hosts.len()];
        let mut add = Adding { hosts, policy: &self.policy, shares: &mut shares };
        picker.add_shares(&self.options.locality, levels, &mut add);
        let got = (0..).zip(shares).filter(|(_, share)| *share > 0.0);
        Some(got.collect())
    }
}

struct Adding<'a> {
    hosts: &'a [Arc<Host>],
    policy: &'a LbPolicy,
    shares: &'a mut [f64],
}

impl Adding<'_> {
    /// Gives a share of the load to hosts that a policy chooses among.
    fn add(&mut self, among: &[u32], share: f64) {
        let weight = |host: &u32| match self.policy {
            LbPolicy::Random => 1.0,
            _ => f64::from(self.hosts[*host as usize].weight),
        };
        let among = match self.policy {
            LbPolicy::PickFirst { .. } => &among[..among.len().min(1)],
            _ => among,
        };
        let sum: f64 = among.iter().map(weight).sum();
        for host in among {
            self.shares[*host as usize] += share * weight(host) / sum;
        }
    }
}

impl Picker {
    fn add_shares(&self, locality: &LocalityLb, levels: &[Level], add: &mut Adding<'_>) {
        let shares = &self.load.shares;
        for (kind, shares) in [&shares.healthy, &shares.degraded].into_iter().enumerate() {
            for (at, share) in shares.iter().enumerate().filter(|(_, share)| **share > 0) {
                let (Some(priority), Some(level)) = (self.priorities.get(at), levels.get(at)) else { continue };
                let share = f64::from(*share);
                if priority.table.is_some() {
                    // What has no hash goes anywhere in the table, which has the hosts that may be used, by weight.
                    let usable: Vec<u32> = match self.load.panic[at] {
                        true => level.hosts.clone(),
                        false => those(&level.hosts, add.hosts, STANDINGS[kind]).collect(),
                    };
                    add.add(&usable, share);
                } else if self.load.panic[at] {
                    let fails = matches!(locality, LocalityLb::ZoneAware(config) if config.fail_traffic_on_panic);
                    if !fails {
                        add.add(priority.all.hosts(), share);
                    }
                } else {
                    priority.add_shares(locality, kind, share, add);
                }
            }
        }
    }
}

impl Priority {
    /// `kind`: 0 for healthy hosts, 1 for degraded ones.
    fn add_shares(&self, locality: &LocalityLb, kind: usize, share: f64, add: &mut Adding<'_>) {
        if let Some(weighted) = &self.weighted[kind] {
            let sum: f64 = weighted.weights.iter().map(|(_, weight)| weight).sum();
            for (number, weight) in &weighted.weights {
                add.add(self.localities[*number as usize][kind].hosts(), share * weight / sum);
            }
            return;
        }
        let mut rest = share;
        if let (Some(zones), LocalityLb::ZoneAware(config)) = (&self.zones, locality) {
            let zoned = share * zones.included(config);
            rest -= zoned;
            if zones.local_panic {
                if !config.fail_traffic_on_panic {
                    rest = share;
                }
            } else {
                for (locality, part) in parts(&zones.zone).into_iter().enumerate() {
                    if let Some(groups) = self.localities.get(locality) {
                        add.add(groups[kind].hosts(), zoned * part);
                    }
                }
            }
        }
        if rest > 0.0 {
            add.add(self.groups[kind].hosts(), rest);
        }
    }
}

/// What each locality gets, of 1.
fn parts(zone: &Zone) -> Vec<f64> {
    let Zone::Residual { stay, room } = zone else { return vec![1.0] };
    let stay = (*stay as f64 / 10_000.0).min(1.0);
    let (all, each) = (room.last().copied().unwrap_or(0), room.len().max(1) as f64);
    let mut before = 0;
    let mut parts: Vec<f64> = room
        .iter()
        .map(|sum| {
            let part = if all == 0 { 1.0 / each } else { (sum - before) as f64 / all as f64 };
            before = *sum;
            part * (1.0 - stay)
        })
        .collect();
    if let Some(first) = parts.first_mut() {
        *first += stay;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_share_what_does_not_stay() {
        assert_eq!(parts(&Zone::Direct), [1.0]);
        let room = vec![0, 1000, 4000].into();
        assert_eq!(parts(&Zone::Residual { stay: 6_000, room }), [0.6, 0.1, 0.30000000000000004]);
        assert_eq!(parts(&Zone::Residual { stay: 5_000, room: vec![0, 0].into() }), [0.75, 0.25]);
    }
}
