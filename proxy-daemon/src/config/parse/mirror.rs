//! `request_mirror_policies`

use envoy_types::pb::envoy::config::route::v3::route_action::RequestMirrorPolicy;

use super::{
    common::{Result, header_name, header_value, runtime_fraction},
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{MirrorCluster, MirrorPolicy},
    },
    http::filters::EarlyMutations,
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
        let host = Some(policy.host_rewrite_literal.as_str()).filter(|host| !host.is_empty());
        let host = host.map(|host| header_value(host, &join(&path, "host_rewrite_literal")));
        Ok(MirrorPolicy {
            cluster,
            share: policy.runtime_fraction.as_ref().map(runtime_fraction),
            suffix: !policy.disable_shadow_host_suffix_append && policy.host_rewrite_literal.is_empty(),
            mutations: EarlyMutations::parse(
                &policy.request_headers_mutations,
                &join(&path, "request_headers_mutations"),
            )?,
            host: host.transpose()?,
        })
    };
    policies.iter().enumerate().map(parse).collect()
}
