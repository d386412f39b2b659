use std::{net::SocketAddr, time::Duration};

/// How and when the names of a cluster are looked up: `envoy.extensions.clusters.dns.v3.DnsCluster`, or the cluster's own fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsOptions {
    /// Time between two look-ups. Default 5 s.
    pub refresh_rate: Duration,
    /// `dns_failure_refresh_rate`: the shortest and the longest time after failures; `None`: `refresh_rate`.
    pub failure_refresh: Option<(Duration, Duration)>,
    /// Answers are good for as long as they say.
    pub respect_ttl: bool,
    /// But at least for this long.
    pub min_ttl: Duration,
    /// Each look-up is later by up to this.
    pub jitter: Duration,
    /// Which families are asked for.
    pub family: DnsLookupFamily,
    /// Who is asked; `None`: whoever the bootstrap names.
    pub resolver: Option<DnsResolver>,
    /// The cluster is not used before its names have been looked up once.
    pub wait_for_warm: bool,
}

impl Default for DnsOptions {
    fn default() -> DnsOptions {
        DnsOptions {
            refresh_rate: Duration::from_secs(5),
            failure_refresh: None,
            respect_ttl: false,
            min_ttl: Duration::ZERO,
            jitter: Duration::ZERO,
            family: DnsLookupFamily::Auto,
            resolver: None,
            wait_for_warm: true,
        }
    }
}

/// `typed_dns_resolver_config`: who knows the addresses of names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DnsResolver {
    /// `CaresDnsResolverConfig`: name servers.
    Servers(DnsServers),
    /// `GetAddrInfoDnsResolverConfig`: the system's own library.
    GetAddrInfo,
}

impl Default for DnsResolver {
    fn default() -> DnsResolver {
        DnsResolver::Servers(DnsServers::default())
    }
}

/// What `CaresDnsResolverConfig` says, with the defaults of Envoy.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DnsServers {
    /// Whom to ask; empty: as `/etc/resolv.conf` says.
    pub servers: Vec<SocketAddr>,
    /// `servers` are only asked where `/etc/resolv.conf` names none.
    pub as_fallback: bool,
    /// By TCP only.
    pub tcp: bool,
    /// Names are looked up as they are, without the search domains of `/etc/resolv.conf`.
    pub no_search: bool,
    /// Limit of one question. Default 5 s.
    pub timeout: Duration,
    /// How often a question is asked. Default 4.
    pub tries: u32,
    /// The servers take turns.
    pub rotate: bool,
    /// Answers are kept for as long as they say, and at most for this long. Default 0.
    pub cache: Duration,
}

impl Default for DnsServers {
    fn default() -> DnsServers {
        DnsServers {
            servers: Vec::new(),
            as_fallback: false,
            tcp: false,
            no_search: false,
            timeout: Duration::from_secs(5),
            tries: 4,
            rotate: false,
            cache: Duration::ZERO,
        }
    }
}

/// `Cluster.DnsLookupFamily`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DnsLookupFamily {
    /// IPv6 addresses where there are any, else IPv4.
    Auto,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// IPv4 addresses where there are any, else IPv6.
    V4Preferred,
    /// Both.
    All,
}
