//! Who knows the addresses of names.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hickory_resolver::proto::op::ResponseCode;
use tokio::sync::Semaphore;

use super::servers::{Servers, in_envoys_words};
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
    made: Mutex<HashMap<(DnsServers, DnsLookupFamily), Arc<Servers>>>,
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
        let Some(known) = self.servers(servers, family)? else { return by_library(name, family).await };
        let found = match known.look_up(name).await {
            // It goes by this, whatever else it says, as in Envoy.
            Ok(found) if found.as_lookup().message().response_code == ResponseCode::NXDomain => {
                return Ok(Answer::default());
            }
            Ok(found) => found,
            Err(error) if error.is_no_records_found() => return Ok(Answer::default()),
            Err(error) => {
                if known.are_outdated() {
                    self.made.lock().unwrap_or_else(PoisonError::into_inner).remove(&(servers.clone(), family));
                }
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

    /// `None`: there are none, and the system's library may know better.
    fn servers(&self, servers: &DnsServers, family: DnsLookupFamily) -> io::Result<Option<Arc<Servers>>> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = made.get(&(servers.clone(), family)) {
            return Ok(Some(Arc::clone(known)));
        }
        let Some(new) = Servers::new(servers, family).map_err(io::Error::other)? else { return Ok(None) };
        let new = Arc::new(new);
        made.insert((servers.clone(), family), Arc::clone(&new));
        Ok(Some(new))
    }
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
