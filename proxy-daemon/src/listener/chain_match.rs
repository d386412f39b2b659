//! Chooses a filter chain by Envoy's rules: destination port, then the longest destination prefix, then the source; each
//! step takes the most specific and never goes back.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::ActiveChain;
use crate::config::model::{Cidr, FilterChainMatch, SourceType};

/// All chains of a listener, indexed. `C` is what is found.
#[derive(Debug)]
pub(super) struct ChainIndex<C = ActiveChain> {
    by_port: HashMap<Option<u16>, ByAddress<C>>,
    default: Option<Arc<C>>,
}

type ByNetwork<C> = HashMap<IpAddr, Vec<Candidate<C>>>;

#[derive(Debug)]
struct ByAddress<C> {
    /// Longest prefix first; within a length, by network.
    prefixes: Vec<(u8, ByNetwork<C>)>,
    any: Vec<Candidate<C>>,
}

#[derive(Debug)]
struct Candidate<C> {
    rule: FilterChainMatch,
    chain: Arc<C>,
}

impl<C> ChainIndex<C> {
    pub(super) fn new(chains: Vec<(FilterChainMatch, Arc<C>)>, default: Option<Arc<C>>) -> ChainIndex<C> {
        let mut by_port: HashMap<Option<u16>, ByAddress<C>> = HashMap::new();
        for (rule, chain) in chains {
            let entry = by_port
                .entry(rule.destination_port)
                .or_insert_with(|| ByAddress { prefixes: Vec::new(), any: Vec::new() });
            entry.insert(rule, chain);
        }
        by_port.values_mut().for_each(|entry| entry.prefixes.sort_by_key(|(length, _)| std::cmp::Reverse(*length)));
        ChainIndex { by_port, default }
    }

    /// The chain for a connection to `local` from `remote`.
    pub(super) fn find(&self, local: SocketAddr, remote: SocketAddr) -> Option<Arc<C>> {
        let by_address = self.by_port.get(&Some(local.port())).or_else(|| self.by_port.get(&None));
        let candidates = by_address.map(|entry| entry.candidates(local.ip()));
        let best = candidates.and_then(|candidates| {
            let fitting =
                candidates.iter().filter_map(|candidate| Some((rank(&candidate.rule, local, remote)?, candidate)));
            fitting.max_by_key(|(rank, _)| *rank).map(|(_, candidate)| &candidate.chain)
        });
        best.or(self.default.as_ref()).map(Arc::clone)
    }
}

impl<C> ByAddress<C> {
    fn insert(&mut self, rule: FilterChainMatch, chain: Arc<C>) {
        if rule.prefix_ranges.is_empty() {
            self.any.push(Candidate { rule, chain });
            return;
        }
        for range in rule.prefix_ranges.clone() {
            // An IPv4 range is as specific as the IPv6 range of its mapped addresses.
            let length = bits(range);
            let at = self.prefixes.iter().position(|(known, _)| *known == length).unwrap_or_else(|| {
                self.prefixes.push((length, HashMap::new()));
                self.prefixes.len() - 1
            });
            let candidate = Candidate { rule: rule.clone(), chain: Arc::clone(&chain) };
            self.prefixes[at].1.entry(range.network).or_default().push(candidate);
        }
    }

    fn candidates(&self, ip: IpAddr) -> &[Candidate<C>] {
        for (length, networks) in &self.prefixes {
            let own = if ip.is_ipv4() { length.checked_sub(96) } else { Some(*length) };
            let network = own.and_then(|own| Cidr::new(ip, own)).map(|range| range.network);
            if let Some(found) = network.and_then(|network| networks.get(&network)) {
                return found;
            }
        }
        &self.any
    }
}

fn bits(range: Cidr) -> u8 {
    if range.network.is_ipv4() { range.prefix_len + 96 } else { range.prefix_len }
}

/// How specific a rule's source part is, in Envoy's order; `None` where it does not match.
fn rank(rule: &FilterChainMatch, local: SocketAddr, remote: SocketAddr) -> Option<(u8, u8, u8, bool)> {
    let longest = |ranges: &[Cidr]| match ranges {
        [] => Some(0),
        ranges => ranges.iter().filter(|range| range.contains(remote.ip())).map(|range| bits(*range) + 1).max(),
    };
    let same_host = remote.ip().is_loopback() || remote.ip() == local.ip();
    let by_type = match rule.source_type {
        SourceType::Any => 0,
        SourceType::SameIpOrLoopback if same_host => 1,
        SourceType::External if !same_host => 1,
        _ => return None,
    };
    let by_port = !rule.source_ports.is_empty();
    if by_port && !rule.source_ports.contains(&remote.port()) {
        return None;
    }
    Some((longest(&rule.direct_source_prefix_ranges)?, by_type, longest(&rule.source_prefix_ranges)?, by_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(port: Option<u16>, ranges: &[&str], source: &[&str]) -> FilterChainMatch {
        let parse = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        FilterChainMatch {
            destination_port: port,
            prefix_ranges: parse(ranges),
            source_prefix_ranges: parse(source),
            ..FilterChainMatch::default()
        }
    }

    fn find(index: &ChainIndex<&'static str>, local: &str, remote: &str) -> Option<&'static str> {
        index.find(local.parse().unwrap(), remote.parse().unwrap()).map(|chain| *chain)
    }

    #[test]
    fn the_most_specific_wins_step_by_step() {
        let chains = [
            (rule(Some(80), &[], &[]), "port"),
            (rule(None, &["10.0.0.0/8"], &[]), "wide"),
            (rule(None, &["10.96.0.10/32", "fd00::10/128"], &[]), "vip"),
            (rule(None, &["10.96.0.10/32"], &["10.1.0.0/16"]), "vip from 10.1"),
            (rule(Some(6379), &["10.96.0.30/32"], &[]), "tcp"),
        ];
        let chains = chains.map(|(rule, name)| (rule, Arc::new(name))).to_vec();
        let index = ChainIndex::new(chains, Some(Arc::new("default")));
        assert_eq!(find(&index, "10.96.0.10:80", "10.2.0.1:1"), Some("port"), "the port comes first");
        assert_eq!(find(&index, "10.96.0.10:81", "10.2.0.1:1"), Some("vip"));
        assert_eq!(find(&index, "10.96.0.10:81", "10.1.0.1:1"), Some("vip from 10.1"));
        assert_eq!(find(&index, "10.96.0.11:81", "10.1.0.1:1"), Some("wide"));
        assert_eq!(find(&index, "[fd00::10]:81", "[fd00::1]:1"), Some("vip"));
        assert_eq!(find(&index, "10.96.0.30:6379", "10.1.0.1:1"), Some("tcp"));
        assert_eq!(find(&index, "10.96.0.31:6379", "10.1.0.1:1"), Some("default"), "no way back from the port");
        assert_eq!(find(&index, "192.0.2.1:81", "10.1.0.1:1"), Some("default"));
    }

    #[test]
    fn source_types() {
        let with_type = |source_type| FilterChainMatch { source_type, ..FilterChainMatch::default() };
        let chains = vec![
            (with_type(SourceType::SameIpOrLoopback), Arc::new("local")),
            (with_type(SourceType::External), Arc::new("external")),
        ];
        let index = ChainIndex::new(chains, None);
        assert_eq!(find(&index, "127.0.0.1:80", "127.0.0.1:9"), Some("local"));
        assert_eq!(find(&index, "10.0.0.1:80", "10.0.0.1:9"), Some("local"));
        assert_eq!(find(&index, "10.0.0.1:80", "10.0.0.2:9"), Some("external"));
    }
}
