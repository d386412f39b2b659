//! What requests say of the host that they want: metadata for subsets, and addresses.

use std::{borrow::Cow, cell::Cell, rc::Rc};

use super::{
    metadata::object,
    stream::{RequestHead, StreamCx},
};
use crate::{
    config::model::{ForwardAction, MetadataMatch, OverrideSource},
    upstream::{WorkerCluster, WorkerHost},
};

/// What the metadata of a request's host has to say: by the route, and by what filters have told under `envoy.lb`, which wins.
pub(super) fn metadata_match<'a>(
    cx: &'a StreamCx,
    action: &'a ForwardAction,
    cluster: &WorkerCluster,
) -> Option<Cow<'a, MetadataMatch>> {
    if !cluster.has_subsets() {
        return None;
    }
    let own = cx.weighted_options().and_then(|options| options.metadata_match.as_ref());
    let configured = own.or(action.metadata_match.as_ref());
    let metadata = cx.progress.metadata.borrow();
    match metadata.as_ref().and_then(|metadata| metadata.namespace("envoy.lb")) {
        Some(told) => MetadataMatch::with(configured, object(told)).map(Cow::Owned),
        None => configured.map(Cow::Borrowed),
    }
}

/// The next host that the request names, where the cluster lets it: `taken` is how many of those it names have had their turn.
pub(super) fn named_host(
    cx: &StreamCx,
    head: &RequestHead,
    cluster: &WorkerCluster,
    taken: &Cell<usize>,
) -> Option<Rc<WorkerHost>> {
    let mut number = 0;
    for source in cluster.cluster.config.lb.override_host.iter() {
        let metadata = cx.progress.metadata.borrow();
        let told;
        let list = match source {
            OverrideSource::Header(name) => head.headers.get(name).and_then(|value| value.to_str().ok()),
            OverrideSource::Metadata(namespace, path) => {
                told = metadata.as_ref().and_then(|metadata| metadata.show(namespace, path));
                told.as_deref()
            }
        };
        for address in list.into_iter().flat_map(|list| list.split(',')).map(str::trim).filter(|it| !it.is_empty()) {
            number += 1;
            if number <= taken.get() {
                continue;
            }
            taken.set(number);
            if let Some(host) = cluster.host_at(address) {
                return Some(host);
            }
        }
    }
    None
}
