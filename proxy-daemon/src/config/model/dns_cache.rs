use std::time::Duration;

use super::DnsOptions;

/// `envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig`: how the names that requests ask for are looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsCacheOptions {
    /// Filters and clusters that say the same name share a cache.
    pub name: Box<str>,
    /// Who is asked for which family. `refresh_rate` is for names that have no address: 60 s by default.
    pub dns: DnsOptions,
    /// What has been found is good for as long as it says, but at least for this long. Default 5 s.
    pub min_refresh: Duration,
    /// A name that nobody asks for is forgotten after this, when it would be looked up again. Default 5 min.
    pub host_ttl: Duration,
    /// So many names are kept. Default 1024.
    pub max_hosts: u32,
    /// Limit of one look-up; `None`: that of the resolver. Default 5 s.
    pub query_timeout: Option<Duration>,
    /// So many requests may wait at a time. Default 1024.
    pub max_pending: u32,
    /// Names that are looked up before anybody asks, as `host:port`.
    pub preresolved: Vec<Box<str>>,
}
