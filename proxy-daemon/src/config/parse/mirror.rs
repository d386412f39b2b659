//! `request_mirror_policies`

use envoy_types::pb::envoy::config::route::v3::route_action::RequestMirrorPolicy;

use super::{
    common::{Result, header_name, runtime_fraction},
    support::join,
};
use crate::config::{
    FieldError,
    model::{MirrorCluster, MirrorPolicy},
};

/// Which clusters get copies of requests.
pub(super) fn mirror_policies(policies: &[RequestMirrorPolicy], path: &str) -> Result<Box<[MirrorPolicy]>> {
    let parse = |(index, policy): (usize, &RequestMirrorPolicy)| {
        let path = format!("{}[{index}]", join(path, "request_mirror_policies"));
        let cluster = match (policy.cluster.as_str(), policy.cluster_header.as_str()) {
            ("", "") => {
                let text = "Exactly one of cluster or cluster_header in request mirror policy can be specified";
                return Err(FieldError::new(path, text));
            }
            (name, "") => MirrorCluster::Name(name.into()),
            ("", header) => MirrorCluster::Header(header_name(header, &join(&path, "cluster_header"))?),
            (name, header) => {
                let text = format!(
                    "Only one of cluster '{name}' or cluster_header '{header}' in request mirror policy can be specified"
                );
                return Err(FieldError::new(path, text));
            }
        };
        Ok(MirrorPolicy {
            cluster,
            share: policy.runtime_fraction.as_ref().map(runtime_fraction),
            suffix: !policy.disable_shadow_host_suffix_append,
        })
    };
    policies.iter().enumerate().map(parse).collect()
}
