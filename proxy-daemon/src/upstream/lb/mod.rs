//! Load balancers, one file each. State is per worker; the hosts are those that may be used now.

mod least_request;
mod round_robin;

use std::rc::Rc;

use self::{least_request::LeastRequest, round_robin::RoundRobin};
use super::worker::WorkerHost;
use crate::config::model::LbPolicy;

/// Chooses a host for a request or connection.
pub(super) trait LoadBalancer {
    /// The index of the host to use; `None` where there is none.
    fn pick(&mut self, hosts: &[Rc<WorkerHost>]) -> Option<usize>;
}

/// The balancer of `policy` over `hosts`; made anew whenever the hosts change.
pub(super) fn build(policy: &LbPolicy, hosts: &[Rc<WorkerHost>]) -> Box<dyn LoadBalancer> {
    match policy {
        LbPolicy::RoundRobin => Box::new(RoundRobin::new(hosts)),
        LbPolicy::LeastRequest { choice_count } => Box::new(LeastRequest::new(*choice_count)),
        LbPolicy::Random | LbPolicy::ClusterProvided => Box::new(Random),
    }
}

/// `RANDOM`: every host alike, as Envoy's ignores weights.
struct Random;

impl LoadBalancer for Random {
    fn pick(&mut self, hosts: &[Rc<WorkerHost>]) -> Option<usize> {
        (!hosts.is_empty()).then(|| fastrand::usize(..hosts.len()))
    }
}
