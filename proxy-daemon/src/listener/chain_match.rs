//! Chooses a filter chain by Envoy's rules: destination port, then the longest destination prefix, then what a TLS client
//! asks for, then the source; each step takes the most specific and never goes back.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::tls_inspector::Hello;
use crate::config::model::{Cidr, FilterChainMatch, SourceType, TransportProtocol};

/// All chains of a listener, indexed. `C` is what is found.
#[derive(Debug)]
pub(super) struct ChainIndex<C> {
    by_port: HashMap<Option<u16>, ByAddress<C>>,
    default: Option<Arc<C>>,
}

type ByNetwork<C> = HashMap<IpAddr, ByServer<C>>;

#[derive(Debug)]
struct ByAddress<C> {
    /// Longest prefix first; within a length, by network.
    prefixes: Vec<(u8, ByNetwork<C>)>,
    any: ByServer<C>,
}

#[derive(Debug)]
struct ByServer<C> {
    /// Names, and the domains of wildcards with a dot in front.
    names: HashMap<Box<str>, Vec<Candidate<C>>>,
    any: Vec<Candidate<C>>,
}

#[derive(Debug)]
struct Candidate<C> {
    rule: Arc<FilterChainMatch>,
    chain: Arc<C>,
}

impl<C> Clone for Candidate<C> {
    fn clone(&self) -> Candidate<C> {
        Candidate { rule: Arc::clone(&self.rule), chain: Arc::clone(&self.chain) }
    }
}

impl<C> Default for ByServer<C> {
    fn default() -> ByServer<C> {
        ByServer { names: HashMap::new(), any: Vec::new() }
    }
}

/// What is known of a connection when its chain is chosen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) hello: &'a Hello,
}

impl<C> ChainIndex<C> {
    pub(super) fn new(chains: Vec<(FilterChainMatch, Arc<C>)>, default: Option<Arc<C>>) -> ChainIndex<C> {
        let mut by_port: HashMap<Option<u16>, ByAddress<C>> = HashMap::new();
        for (rule, chain) in chains {
            let entry = by_port
                .entry(rule.destination_port)
                .or_insert_with(|| ByAddress { prefixes: Vec::new(), any: ByServer::default() });
            entry.insert(Candidate { rule: Arc::new(rule), chain });
        }
        by_port.values_mut().for_each(|entry| entry.prefixes.sort_by_key(|(length, _)| std::cmp::Reverse(*length)));
        ChainIndex { by_port, default }
    }

    /// The chain for a connection.
    pub(super) fn find(&self, facts: Facts<'_>) -> Option<Arc<C>> {
        let by_address = self.by_port.get(&Some(facts.local.port())).or_else(|| self.by_port.get(&None));
        let candidates = by_address.map(|entry| entry.by_server(facts.local.ip()).candidates(facts.hello));
        let best = candidates.and_then(|candidates| most_specific(candidates, facts));
        best.or(self.default.as_ref()).map(Arc::clone)
    }
}

impl<C> ByAddress<C> {
    fn insert(&mut self, candidate: Candidate<C>) {
        if candidate.rule.prefix_ranges.is_empty() {
            self.any.insert(candidate);
            return;
        }
        for range in &candidate.rule.prefix_ranges {
            // An IPv4 range is as specific as the IPv6 range of its mapped addresses.
            let length = bits(*range);
            let at = self.prefixes.iter().position(|(known, _)| *known == length).unwrap_or_else(|| {
                self.prefixes.push((length, HashMap::new()));
                self.prefixes.len() - 1
            });
            self.prefixes[at].1.entry(range.network).or_default().insert(candidate.clone());
        }
    }

    fn by_server(&self, ip: IpAddr) -> &ByServer<C> {
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

impl<C> ByServer<C> {
    fn insert(&mut self, candidate: Candidate<C>) {
        // As in Envoy, an empty name is no condition.
        let names = candidate.rule.server_names.iter().filter(|name| !name.is_empty());
        let mut any = true;
        for name in names {
            any = false;
            let key = name.strip_prefix('*').unwrap_or(name);
            self.names.entry(key.into()).or_default().push(candidate.clone());
        }
        if any {
            self.any.push(candidate);
        }
    }

    /// Those for the server's very name, else for its closest domain, else those without a condition.
    fn candidates(&self, hello: &Hello) -> &[Candidate<C>] {
        let Some(name) = hello.server_name.as_deref().filter(|_| !self.names.is_empty()) else { return &self.any };
        let domains = name.match_indices('.').filter(|(at, _)| *at > 0).map(|(at, _)| &name[at..]);
        [name].into_iter().chain(domains).find_map(|key| self.names.get(key)).unwrap_or(&self.any)
    }
}

fn bits(range: Cidr) -> u8 {
    if range.network.is_ipv4() { range.prefix_len + 96 } else { range.prefix_len }
}

/// The steps after the server's name, in Envoy's order: how specifically a rule matches; `None` where it does not.
const STEPS: [fn(&FilterChainMatch, Facts<'_>) -> Option<u16>; 6] =
    [transport_protocol, application_protocol, direct_source, source_type, source, source_port];

fn most_specific<'a, C>(candidates: &'a [Candidate<C>], facts: Facts<'_>) -> Option<&'a Arc<C>> {
    let mut best = [0; STEPS.len()];
    // Each step looks only at those that were best in all steps before.
    for (at, step) in STEPS.iter().enumerate() {
        let left = candidates.iter().filter(|it| survives(&it.rule, facts, &best[..at]));
        best[at] = left.filter_map(|it| step(&it.rule, facts)).max()?;
    }
    candidates.iter().find(|it| survives(&it.rule, facts, &best)).map(|it| &it.chain)
}

fn survives(rule: &FilterChainMatch, facts: Facts<'_>, best: &[u16]) -> bool {
    STEPS.iter().zip(best).all(|(step, best)| step(rule, facts) == Some(*best))
}

fn transport_protocol(rule: &FilterChainMatch, facts: Facts<'_>) -> Option<u16> {
    match rule.transport_protocol {
        None => Some(0),
        Some(wanted) => (facts.hello.tls == (wanted == TransportProtocol::Tls)).then_some(1),
    }
}

/// The client's first choice is the most specific.
fn application_protocol(rule: &FilterChainMatch, facts: Facts<'_>) -> Option<u16> {
    if rule.application_protocols.is_empty() {
        return Some(0);
    }
    let offered = |name: &Vec<u8>| rule.application_protocols.iter().any(|wanted| wanted.as_bytes() == name);
    let at = facts.hello.alpn.iter().position(offered)?;
    Some(u16::MAX - u16::try_from(at).unwrap_or(u16::MAX - 1))
}

fn longest(ranges: &[Cidr], ip: IpAddr) -> Option<u16> {
    match ranges {
        [] => Some(0),
        ranges => ranges.iter().filter(|range| range.contains(ip)).map(|range| u16::from(bits(*range)) + 1).max(),
    }
}

fn direct_source(rule: &FilterChainMatch, facts: Facts<'_>) -> Option<u16> {
    longest(&rule.direct_source_prefix_ranges, facts.remote.ip())
}

fn source_type(rule: &FilterChainMatch, facts: Facts<'_>) -> Option<u16> {
    let same_host = || facts.remote.ip().is_loopback() || facts.remote.ip() == facts.local.ip();
    match rule.source_type {
        SourceType::Any => Some(0),
        SourceType::SameIpOrLoopback => same_host().then_some(1),
        SourceType::External => (!same_host()).then_some(1),
    }
}

fn source(rule: &FilterChainMatch, facts: Facts<'_>) -> Option<u16> {
    longest(&rule.source_prefix_ranges, facts.remote.ip())
}

fn source_port(rule: &FilterChainMatch, facts: Facts<'_>) -> Option<u16> {
    match rule.source_ports.as_slice() {
        [] => Some(0),
        ports => ports.contains(&facts.remote.port()).then_some(1),
    }
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
        find_tls(index, local, remote, &Hello::default())
    }

    fn find_tls(index: &ChainIndex<&'static str>, local: &str, remote: &str, hello: &Hello) -> Option<&'static str> {
        let facts = Facts { local: local.parse().unwrap(), remote: remote.parse().unwrap(), hello };
        index.find(facts).map(|chain| *chain)
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

    #[test]
    fn a_step_never_goes_back() {
        let from_ten = rule(None, &[], &[]);
        let from_ten = FilterChainMatch {
            direct_source_prefix_ranges: vec!["10.0.0.0/8".parse().unwrap()],
            source_ports: vec![1],
            ..from_ten
        };
        let index = ChainIndex::new(vec![(from_ten, Arc::new("ten")), (rule(None, &[], &[]), Arc::new("any"))], None);
        assert_eq!(find(&index, "192.0.2.1:80", "10.0.0.1:1"), Some("ten"));
        assert_eq!(find(&index, "192.0.2.1:80", "11.0.0.1:2"), Some("any"));
        assert_eq!(find(&index, "192.0.2.1:80", "10.0.0.1:2"), None, "the network was chosen before the port");
    }

    fn tls_rule(names: &[&str], protocol: Option<TransportProtocol>, alpn: &[&str]) -> FilterChainMatch {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        FilterChainMatch {
            server_names: texts(names),
            transport_protocol: protocol,
            application_protocols: texts(alpn),
            ..FilterChainMatch::default()
        }
    }

    fn hello(name: &str, alpn: &[&str]) -> Hello {
        Hello {
            tls: true,
            server_name: Some(name.to_owned()).filter(|name| !name.is_empty()),
            alpn: alpn.iter().map(|name| name.as_bytes().to_vec()).collect(),
        }
    }

    #[test]
    fn tls_clients_are_told_apart() {
        let tls = Some(TransportProtocol::Tls);
        let chains = [
            (tls_rule(&["a.test", "c.test"], tls, &[]), "a"),
            (tls_rule(&["*.test"], tls, &[]), "wild"),
            (tls_rule(&["*.b.test"], tls, &["h2"]), "h2 below b"),
            (tls_rule(&["*.b.test"], tls, &["http/1.1"]), "h1 below b"),
            (tls_rule(&[], tls, &[]), "tls"),
            (tls_rule(&[], Some(TransportProtocol::RawBuffer), &[]), "plain"),
        ];
        let index = ChainIndex::new(chains.map(|(rule, name)| (rule, Arc::new(name))).to_vec(), None);
        let find = |name: &str, alpn: &[&str]| find_tls(&index, "10.0.0.1:80", "10.0.0.2:1", &hello(name, alpn));
        assert_eq!(find("a.test", &[]), Some("a"));
        assert_eq!(find("c.test", &["h2"]), Some("a"));
        assert_eq!(find("x.a.test", &[]), Some("wild"));
        assert_eq!(find("test", &[]), Some("tls"), "a wildcard needs a label");
        assert_eq!(find("x.b.test", &["h2", "http/1.1"]), Some("h2 below b"));
        assert_eq!(find("x.b.test", &["http/1.1", "h2"]), Some("h1 below b"), "the client's order counts");
        assert_eq!(find("x.b.test", &[]), None, "the closest domain was chosen before the protocol");
        assert_eq!(find("other", &[]), Some("tls"));
        assert_eq!(find("", &[]), Some("tls"));
        let plain = find_tls(&index, "10.0.0.1:80", "10.0.0.2:1", &Hello::default());
        assert_eq!(plain, Some("plain"));
    }
}
