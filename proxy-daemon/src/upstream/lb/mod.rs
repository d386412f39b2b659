//! Load balancers, one file each. State is per worker; the hosts are those that may be used now.

mod by_hash;
mod least_request;
mod round_robin;

use std::{rc::Rc, sync::Arc};

pub(super) use self::by_hash::{HashTable, Spread};
use self::{by_hash::ByHash, least_request::LeastRequest, round_robin::RoundRobin};
use super::worker::WorkerHost;
use crate::config::model::LbPolicy;

/// What a request asks of a balancer that goes by hashes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish {
    /// Requests with the same hash go to the same host.
    pub(super) hash: Option<u64>,
    /// How many hosts have been passed over.
    pub(super) attempt: u32,
}

/// Chooses a host for a request or connection.
pub(super) trait LoadBalancer {
    /// The index of the host to use; `None` where there is none.
    fn pick(&mut self, hosts: &[Rc<WorkerHost>], wish: Wish) -> Option<usize>;
}

/// The balancer of `policy` over `hosts`; made anew whenever the hosts change.
///
/// `table`: of those policies that go by hashes.
pub(super) fn build(
    policy: &LbPolicy,
    hosts: &[Rc<WorkerHost>],
    table: Option<&Arc<HashTable>>,
) -> Box<dyn LoadBalancer> {
    if let Some(table) = table {
        return Box::new(ByHash(Arc::clone(table)));
    }
    match policy {
        LbPolicy::RoundRobin => Box::new(RoundRobin::new(hosts)),
        LbPolicy::LeastRequest { choice_count } => Box::new(LeastRequest::new(*choice_count)),
        LbPolicy::Random | LbPolicy::ClusterProvided | LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. } => {
            Box::new(Random)
        }
    }
}

/// `RANDOM`: every host alike, as Envoy's ignores weights.
struct Random;

impl LoadBalancer for Random {
    fn pick(&mut self, hosts: &[Rc<WorkerHost>], _wish: Wish) -> Option<usize> {
        (!hosts.is_empty()).then(|| fastrand::usize(..hosts.len()))
    }
}
