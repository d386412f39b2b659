//! Which cluster a request goes to.

use std::rc::Rc;

use super::{
    hash_policy,
    stream::{RequestHead, StreamCx},
};
use crate::{
    config::model::{ClusterChoice, ForwardAction, RandomValue, RouteAction, WeightedClusters},
    upstream::WorkerCluster,
};

/// The cluster that the route chooses, where it exists.
pub(super) fn choose_cluster(cx: &mut StreamCx, head: &RequestHead) -> Option<Rc<WorkerCluster>> {
    // What a filter has asked for belongs to the cluster that the request goes to no more.
    (cx.override_dst, cx.unless_connected) = (None, None);
    let RouteAction::Forward(action) = &cx.route.as_ref()?.action else { return None };
    match &action.cluster {
        ClusterChoice::Cluster(name) => cx.worker.clusters.get(name),
        ClusterChoice::Weighted(weighted) => match weighted.choose_index(random_value(action, weighted, cx, head)) {
            Some(index) => {
                let header = weighted.options.get(index).and_then(|options| options.cluster_header.as_ref());
                let cluster = match header {
                    Some(header) => {
                        head.headers.get(header).and_then(|name| cx.worker.clusters.get(name.to_str().ok()?))
                    }
                    None => cx.worker.clusters.get(weighted.name(index)),
                };
                if let Some(route) = &mut cx.route {
                    route.choose_weighted(index);
                }
                cluster
            }
            // Runtime values leave it no cluster: as in Envoy, it is no route then.
            None => {
                cx.route = None;
                None
            }
        },
        ClusterChoice::Header(header) => cx.worker.clusters.get(head.headers.get(header)?.to_str().ok()?),
    }
}

/// The number that a weighted cluster is chosen by.
fn random_value(action: &ForwardAction, weighted: &WeightedClusters, cx: &StreamCx, head: &RequestHead) -> u64 {
    let told = match &weighted.random {
        RandomValue::Own => None,
        RandomValue::Header(name) => {
            let mut values = head.headers.get_all(name).iter();
            let single = values.next().filter(|_| values.next().is_none());
            single.and_then(|value| value.to_str().ok()?.trim().parse().ok())
        }
        // Cookies are made where a host is chosen.
        RandomValue::Hash => hash_policy::hash(&action.hash_policy, head, cx, &mut Vec::new()),
    };
    told.unwrap_or(cx.random)
}

/// The cluster that the route names.
pub(super) fn cluster_name<'a>(cx: &'a StreamCx, head: &'a RequestHead) -> Option<&'a str> {
    let RouteAction::Forward(action) = &cx.route.as_ref()?.action else { return None };
    let name = match &action.cluster {
        ClusterChoice::Cluster(name) => name,
        ClusterChoice::Weighted(weighted) => {
            let index = cx.route.as_ref()?.weighted()?;
            match weighted.options.get(index).and_then(|options| options.cluster_header.as_ref()) {
                Some(header) => head.headers.get(header)?.to_str().ok()?,
                None => weighted.name(index),
            }
        }
        ClusterChoice::Header(header) => head.headers.get(header)?.to_str().ok()?,
    };
    Some(name).filter(|name| !name.is_empty())
}
