//! Clusters and their hosts: how a host is chosen, reached and pooled.
//!
//! What all workers share ([`Cluster`], [`HostSet`], [`Host`]) is an immutable snapshot behind a version number; what a
//! worker needs to choose and to reach a host ([`WorkerClusters`]) is its own and is never locked.

mod aggregate;
mod ahead;
mod breakers;
mod by_address;
mod cluster;
mod connect;
pub mod dns;
mod drop_overload;
mod dynamic_forward_proxy;
mod endpoint_stats;
mod happy_eyeballs;
pub mod health_check;
mod host;
mod lb;
mod limits;
mod making;
mod mine;
mod named;
pub(crate) mod orca;
pub(crate) mod original_dst;
pub(crate) mod outlier;
mod pool;
mod recent;
mod sockets;
mod stats;
mod vitals;
mod worker;

pub use aggregate::Chosen;
pub use breakers::breaker_gauges;
pub(crate) use breakers::{Resource, Tunnelled};
pub use cluster::{Cluster, ClusterChange, ClusterMap, Clusters};
pub(crate) use connect::set_int;
pub use connect::{ConnectError, Dial, SocketSettings, Source, UpstreamInfo, UpstreamStream, connect};
pub(crate) use drop_overload::Dropped;
pub use drop_overload::Overload;
pub use dynamic_forward_proxy::DnsCache;
pub(crate) use dynamic_forward_proxy::{Asked, Found, NamedHosts, Pending, split};
pub use endpoint_stats::endpoint_metrics;
pub use host::{Host, HostCounter, HostCounters, HostSet};
pub use lb::TriedPriorities;
pub use orca::fuzz as fuzz_load_report;
pub(crate) use outlier::Seen;
pub(crate) use pool::Decrement;
pub use pool::{Client, Connection, OwnPools, PoolError, Reset, ResetReason, Wanted};
pub use stats::ClusterStats;
pub(crate) use stats::MessageSizes;
pub use vitals::{HealthFlag, Standing, Vitals};
pub(crate) use worker::Issued;
pub use worker::{PickCx, Placed, WorkerCluster, WorkerClusters, WorkerHost};
