//! Who knows the addresses of names.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts, ServerOrderingStrategy},
    net::runtime::TokioRuntimeProvider,
    net::{DnsError, NetError},
    proto::op::ResponseCode,
};
use tokio::sync::Semaphore;

use crate::config::model::{DnsLookupFamily, DnsResolver, DnsServers};

/// So many names are looked up at a time; the others wait.
const AT_ONCE: usize = 256;
/// What entries of `/etc/hosts` and literal addresses are given, which say nothing themselves.
const NO_TTL: u32 = 86_400;

/// The addresses of a name; none where it has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Answer {
    /// Without doublets, in the order of the answer.
    pub(super) addresses: Vec<IpAddr>,
    /// How long it is good; `None`: nobody knows.
    pub(super) ttl: Option<Duration>,
}

/// All that are used, by their configuration.
#[derive(Debug)]
pub(super) struct Resolvers {
    default: Mutex<DnsResolver>,
    made: Mutex<HashMap<(DnsServers, DnsLookupFamily), Arc<TokioResolver>>>,
    room: Semaphore,
}

impl Default for Resolvers {
    fn default() -> Resolvers {
        Resolvers { default: Mutex::default(), made: Mutex::default(), room: Semaphore::new(AT_ONCE) }
    }
}

impl Resolvers {
    /// Says who is asked where a cluster names nobody.
    pub(super) fn set_default(&self, resolver: DnsResolver) {
        *self.default.lock().unwrap_or_else(PoisonError::into_inner) = resolver;
    }

    /// The addresses of a name.
    ///
    /// # Errors
    /// Nobody has answered, or not so that it can be understood.
    pub(super) async fn look_up(
        &self,
        name: &str,
        family: DnsLookupFamily,
        resolver: Option<&DnsResolver>,
    ) -> io::Result<Answer> {
        // A name that is an address already is nobody's to look up. With IPv6 alone Envoy's resolver still takes IPv4 addresses.
        if family == DnsLookupFamily::V4Only && name.parse::<Ipv6Addr>().is_ok() {
            return Err(io::Error::other("cares_failure:Misformatted domain name"));
        }
        let _turn = self.room.acquire().await.map_err(io::Error::other)?;
        let default = self.default.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match resolver.unwrap_or(&default) {
            DnsResolver::GetAddrInfo => by_library(name, family).await,
            DnsResolver::Servers(servers) => self.by_servers(name, family, servers).await,
        }
    }

    async fn by_servers(&self, name: &str, family: DnsLookupFamily, servers: &DnsServers) -> io::Result<Answer> {
        let Some(resolver) = self.resolver(servers, family)? else { return by_library(name, family).await };
        if servers.cache.is_zero() {
            // It has one in any case.
            resolver.clear_cache();
        }
        let mut found = resolver.lookup_ip(name).await;
        if let Err(NetError::Proto(_)) = found
            && !servers.tcp
            && let Some(over_tcp) = self.resolver(&DnsServers { tcp: true, ..servers.clone() }, family)?
        {
            // Of an answer that is longer than was asked for, only the beginning has come.
            over_tcp.clear_cache();
            found = over_tcp.lookup_ip(name).await.or(found);
        }
        let found = match found {
            // It goes by this, whatever else it says, as in Envoy.
            Ok(found) if found.as_lookup().message().response_code == ResponseCode::NXDomain => {
                return Ok(Answer::default());
            }
            Ok(found) => found,
            Err(error) if error.is_no_records_found() => return Ok(Answer::default()),
            Err(error) => {
                // The system's servers may be others by now: they are read anew.
                self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(&(servers.clone(), family));
                return Err(in_envoys_words(error));
            }
        };
        let mut answer = Answer::default();
        for record in found.as_lookup().answers() {
            let Some(address) = record.data.ip_addr() else { continue };
            if record.ttl < NO_TTL {
                let ttl = Duration::from_secs(record.ttl.into());
                answer.ttl = Some(answer.ttl.map_or(ttl, |least| least.min(ttl)));
            }
            if !answer.addresses.contains(&address) {
                answer.addresses.push(address);
            }
        }
        Ok(answer)
    }

    /// `None`: there are no servers, and the system's library may know better.
    fn resolver(&self, servers: &DnsServers, family: DnsLookupFamily) -> io::Result<Option<Arc<TokioResolver>>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = made.get(&(servers.clone(), family)) {
            return Ok(Some(Arc::clone(known)));
        }
        let Some(resolver) = make(servers, family).map_err(io::Error::other)? else { return Ok(None) };
        let resolver = Arc::new(resolver);
        made.insert((servers.clone(), family), Arc::clone(&resolver));
        Ok(Some(resolver))
    }
}

/// Why nobody has answered, as Envoy's resolver says it, which access logs tell. What it has no words for is told in those that there are.
fn in_envoys_words(error: NetError) -> io::Error {
    let words = match &error {
        NetError::Dns(DnsError::ResponseCode(code)) => match code {
            ResponseCode::ServFail => "DNS server returned general failure",
            ResponseCode::FormErr => "DNS server claims query was misformatted",
            ResponseCode::NotImp => "DNS server does not implement requested operation",
            ResponseCode::Refused => "DNS server refused query",
            _ => return io::Error::other(error),
        },
        NetError::Timeout => "Timeout while contacting DNS servers",
        NetError::NoConnections | NetError::Io(_) => "Could not contact DNS servers",
        _ => return io::Error::other(error),
    };
    io::Error::other(format!("cares_failure:{words}"))
}

fn make(servers: &DnsServers, family: DnsLookupFamily) -> Result<Option<TokioResolver>, NetError> {
    let system = hickory_resolver::system_conf::read_system_conf().ok();
    let (system, mut options) = system.unwrap_or_else(|| {
        let none = ResolverConfig::from_parts(None, Vec::new(), Vec::new());
        (none, ResolverOpts::default())
    });
    let given = servers.servers.iter().map(|address| {
        let mut server = NameServerConfig::udp_and_tcp(address.ip());
        server.connections.iter_mut().for_each(|connection| connection.port = address.port());
        server
    });
    let own = system.name_servers();
    let mut used: Vec<_> = match () {
        () if servers.servers.is_empty() || servers.as_fallback && !own.is_empty() => own.to_vec(),
        () => given.collect(),
    };
    if used.is_empty() {
        return Ok(None);
    }
    if servers.tcp {
        for server in &mut used {
            server
                .connections
                .retain(|connection| matches!(connection.protocol, hickory_resolver::config::ProtocolConfig::Tcp));
        }
    }
    let (domain, search) = match servers.no_search {
        true => (None, Vec::new()),
        false => (system.domain().cloned(), system.search().to_vec()),
    };
    options.ip_strategy = match family {
        DnsLookupFamily::Auto => LookupIpStrategy::Ipv6thenIpv4,
        DnsLookupFamily::V4Only => LookupIpStrategy::Ipv4Only,
        DnsLookupFamily::V6Only => LookupIpStrategy::Ipv6Only,
        DnsLookupFamily::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
        DnsLookupFamily::All => LookupIpStrategy::Ipv4AndIpv6,
    };
    options.timeout = servers.timeout;
    options.attempts = servers.tries.saturating_sub(1) as usize;
    options.num_concurrent_reqs = 1;
    options.server_ordering_strategy = match servers.rotate {
        true => ServerOrderingStrategy::RoundRobin,
        false => ServerOrderingStrategy::UserProvidedOrder,
    };
    options.use_hosts_file = ResolveHosts::Always;
    if !servers.cache.is_zero() {
        (options.positive_max_ttl, options.negative_max_ttl) = (Some(servers.cache), Some(servers.cache));
    }
    let config = ResolverConfig::from_parts(domain, search, used);
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    Ok(Some(builder.build()?))
}

/// What the system's own library says, on a thread of its own.
async fn by_library(name: &str, family: DnsLookupFamily) -> io::Result<Answer> {
    let found = tokio::net::lookup_host((name, 0)).await?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found.map(|address| address.ip()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(Answer { addresses: choose(addresses, family), ttl: None })
}

fn choose(found: Vec<IpAddr>, family: DnsLookupFamily) -> Vec<IpAddr> {
    let (v4, v6): (Vec<_>, Vec<_>) = found.into_iter().partition(IpAddr::is_ipv4);
    match family {
        DnsLookupFamily::V4Only => v4,
        DnsLookupFamily::V6Only => v6,
        DnsLookupFamily::Auto => Some(v6).filter(|v6| !v6.is_empty()).unwrap_or(v4),
        DnsLookupFamily::V4Preferred => Some(v4).filter(|v4| !v4.is_empty()).unwrap_or(v6),
        DnsLookupFamily::All => v4.into_iter().chain(v6).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_chosen_as_configured() {
        let (v4, v6): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
        let both = || vec![v4, v6];
        assert_eq!(choose(both(), DnsLookupFamily::Auto), [v6]);
        assert_eq!(choose(both(), DnsLookupFamily::V4Preferred), [v4]);
        assert_eq!(choose(both(), DnsLookupFamily::All), [v4, v6]);
        assert_eq!(choose(vec![v4], DnsLookupFamily::Auto), [v4]);
        assert!(choose(vec![v4], DnsLookupFamily::V6Only).is_empty());
    }

    #[tokio::test]
    async fn addresses_of_the_other_family_are_not_gone_around() {
        let resolvers = Resolvers::default();
        for resolver in [None, Some(&DnsResolver::GetAddrInfo)] {
            for (name, v4, all) in [("::1", false, true), ("::ffff:127.0.0.1", false, true), ("127.0.0.1", true, true)]
            {
                let answers = async |family| {
                    let answer = resolvers.look_up(name, family, resolver).await;
                    answer.is_ok_and(|answer| answer.addresses == [name.parse::<IpAddr>().unwrap()])
                };
                assert_eq!(answers(DnsLookupFamily::V4Only).await, v4, "{name}");
                assert_eq!(answers(DnsLookupFamily::All).await, all, "{name}");
            }
        }
    }

    #[tokio::test]
    async fn names_of_the_hosts_file_say_nothing_of_how_long_they_are_good() {
        let resolvers = Resolvers::default();
        let answer = resolvers.look_up("localhost", DnsLookupFamily::V4Only, None).await.unwrap();
        assert_eq!(answer, Answer { addresses: vec![IpAddr::from([127, 0, 0, 1])], ttl: None });
        let library = Some(&DnsResolver::GetAddrInfo);
        assert_eq!(resolvers.look_up("localhost", DnsLookupFamily::V4Only, library).await.unwrap(), answer);
    }
}
