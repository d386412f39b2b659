//! `RouteAction`

use std::{sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        core::v3::{Metadata, RoutingPriority},
        route::v3::{
            RouteAction as ProtoAction,
            route_action::{
                ClusterNotFoundResponseCode, ClusterSpecifier, HostRewriteSpecifier,
                MaxStreamDuration as ProtoMaxStreamDuration,
            },
            weighted_cluster::{
                ClusterWeight, RandomValueSpecifier, cluster_weight::HostRewriteSpecifier as WeightedHost,
            },
        },
    },
    extensions::path::rewrite::uri_template::v3::UriTemplateRewriteConfig,
};
use http::StatusCode;

use super::{
    common::{Result, duration, header_name, header_value, limit, number, required},
    hash_policy::hash_policies,
    internal_redirect::internal_redirect,
    matcher::regex_rewrite,
    mirror::mirror_policies,
    rate_limit,
    retry::retry_policy,
    route::{cors, formatted, mutations, per_filter},
    support::join,
    upgrade, uri_template,
};
use crate::{
    config::{
        FieldError,
        model::{
            ClusterChoice, ForwardAction, GrpcTimeout, HostRewrite, LbMetadata, MaxStreamDuration, MetadataMatch,
            PathMatch, PathRewrite, RandomValue, RouteMatch, WeightedClusters, WeightedOptions,
        },
    },
    http::metadata::object,
    layered_runtime::{Key, RuntimeInteger},
};

fn path_rewrite(action: &ProtoAction, matched: &RouteMatch, path: &str) -> Result<PathRewrite> {
    let set = [
        !action.prefix_rewrite.is_empty(),
        action.regex_rewrite.is_some(),
        action.path_rewrite_policy.is_some(),
        !action.path_rewrite.is_empty(),
    ];
    if set.iter().filter(|set| **set).count() > 1 {
        let text = "Specify only one of prefix_rewrite, regex_rewrite, path_rewrite_policy or path_rewrite";
        return Err(FieldError::new(path, text));
    }
    if let Some(policy) = &action.path_rewrite_policy {
        let path = join(path, "path_rewrite_policy.typed_config");
        let config = policy.typed_config.as_ref().ok_or_else(|| required(&path, "typed_config"))?;
        let config: UriTemplateRewriteConfig = unpack(config, &path)?;
        let PathMatch::Template(template) = &matched.path else {
            let text = "unable to use envoy.path.rewrite.uri_template.uri_template_rewriter extension without \
                        envoy.path.match.uri_template.uri_template_matcher extension";
            return Err(FieldError::new(path, text));
        };
        let path = join(&path, "path_template_rewrite");
        return Ok(PathRewrite::Template(uri_template::rewrite(&config.path_template_rewrite, template, &path)?));
    }
    if let Some(rewrite) = &action.regex_rewrite {
        return Ok(PathRewrite::Regex(Box::new(regex_rewrite(rewrite, &join(path, "regex_rewrite"))?)));
    }
    if !action.path_rewrite.is_empty() {
        return Ok(PathRewrite::Format(formatted(&action.path_rewrite, &join(path, "path_rewrite"))?));
    }
    Ok(match action.prefix_rewrite.as_str() {
        "" => PathRewrite::None,
        prefix => PathRewrite::Prefix(prefix.into()),
    })
}

/// What metadata asks of hosts.
pub(super) fn asked_of_hosts(metadata: Option<&Metadata>) -> LbMetadata {
    metadata.and_then(|metadata| metadata.filter_metadata.get("envoy.lb")).map(object).unwrap_or_default()
}

#[expect(deprecated, reason = "cors, which Envoy still takes")]
pub(super) fn forward(action: &ProtoAction, matched: &RouteMatch, path: &str) -> Result<ForwardAction> {
    let asked = MetadataMatch::with(None, asked_of_hosts(action.metadata_match.as_ref()));
    let cluster = match &action.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => ClusterChoice::Cluster(Arc::from(name.as_str())),
        Some(ClusterSpecifier::ClusterHeader(name)) => {
            ClusterChoice::Header(header_name(name, &join(path, "cluster_header"))?)
        }
        Some(ClusterSpecifier::WeightedClusters(clusters)) => {
            let path = join(path, "weighted_clusters");
            for (index, cluster) in clusters.clusters.iter().enumerate() {
                // Envoy's words.
                let text = match (cluster.name.is_empty(), cluster.cluster_header.is_empty()) {
                    (true, true) => "At least one of name or cluster_header need to be specified",
                    (false, false) => "Only one of name or cluster_header can be specified",
                    _ => continue,
                };
                return Err(FieldError::new(format!("{}[{index}]", join(&path, "clusters")), text));
            }
            let weights = clusters.clusters.iter().map(|cluster| (cluster.name.as_str(), number(cluster.weight, 0)));
            let mut weighted = weighted(weights.clone(), &path)?;
            let prefix = &clusters.runtime_key_prefix;
            weighted.runtime = (!prefix.is_empty()).then(|| {
                let key = |name: &str| Key::optional(&format!("{prefix}.{name}"));
                let weight =
                    |(name, weight)| (RuntimeInteger { default: u64::from(weight), key: key(name) }, name.into());
                weights.map(weight).collect()
            });
            weighted.options = weighted_options(&clusters.clusters, asked.as_ref(), &path)?;
            weighted.random = match &clusters.random_value_specifier {
                Some(RandomValueSpecifier::HeaderName(name)) => {
                    RandomValue::Header(header_name(name, &join(&path, "header_name"))?)
                }
                Some(RandomValueSpecifier::UseHashPolicy(wanted)) if wanted.value => RandomValue::Hash,
                Some(RandomValueSpecifier::UseHashPolicy(_)) | None => RandomValue::Own,
            };
            // `total_weight` is deprecated and says nothing, as in Envoy.
            ClusterChoice::Weighted(weighted)
        }
        Some(_) => return Err(FieldError::unsupported(join(path, "cluster_specifier"))),
        None => return Err(required(path, "cluster")),
    };
    let host_rewrite = match &action.host_rewrite_specifier {
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => {
            HostRewrite::Literal(header_value(host, &join(path, "host_rewrite_literal"))?)
        }
        Some(HostRewriteSpecifier::AutoHostRewrite(auto)) if auto.value => HostRewrite::Auto,
        Some(HostRewriteSpecifier::HostRewriteHeader(name)) => {
            HostRewrite::Header(header_name(name, &join(path, "host_rewrite_header"))?)
        }
        Some(HostRewriteSpecifier::HostRewritePathRegex(rewrite)) => {
            HostRewrite::PathRegex(Box::new(regex_rewrite(rewrite, &join(path, "host_rewrite_path_regex"))?))
        }
        Some(HostRewriteSpecifier::HostRewrite(format)) => {
            HostRewrite::Format(formatted(format, &join(path, "host_rewrite"))?)
        }
        Some(HostRewriteSpecifier::AutoHostRewrite(_)) | None => HostRewrite::None,
    };
    let status = match ClusterNotFoundResponseCode::try_from(action.cluster_not_found_response_code) {
        Ok(ClusterNotFoundResponseCode::NotFound) => StatusCode::NOT_FOUND,
        Ok(ClusterNotFoundResponseCode::InternalServerError) => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let retry = action.retry_policy.as_ref().map(|policy| retry_policy(policy, &join(path, "retry_policy")));
    Ok(ForwardAction {
        cluster,
        cluster_not_found_status: status,
        timeout: limit(action.timeout, Some(Duration::from_secs(15)), path, "timeout")?
            .filter(|_| action.max_stream_duration.is_none()),
        max_stream_duration: action.max_stream_duration.map(|limits| max_stream_duration(limits, path)).transpose()?,
        grpc_timeout: grpc_timeout(action, path)?,
        cors: action.cors.as_ref().map(|policy| cors(policy, path)).transpose()?,
        flush_timeout: match action.flush_timeout {
            None => None,
            some => Some(limit(some, None, path, "flush_timeout")?),
        },
        idle_timeout: match action.idle_timeout {
            None => None,
            some => Some(limit(some, None, path, "idle_timeout")?),
        },
        retry_policy: retry.transpose()?.map(Arc::new),
        internal_redirect: internal_redirect(action, path)?,
        hedge_on_per_try_timeout: action.hedge_policy.as_ref().map(|policy| policy.hedge_on_per_try_timeout),
        hash_policy: hash_policies(&action.hash_policy, path)?,
        path_rewrite: path_rewrite(action, matched, path)?,
        host_rewrite,
        append_x_forwarded_host: action.append_x_forwarded_host,
        high_priority: action.priority == RoutingPriority::High as i32,
        mirrors: mirror_policies(&action.request_mirror_policies, path)?,
        rate_limits: rate_limit::of_routes(&action.rate_limits, path)?,
        include_vh_rate_limits: include_vh_rate_limits(action),
        upgrades: upgrade::of_route(&action.upgrade_configs, path)?,
        metadata_match: asked,
    })
}

/// `max_grpc_timeout`, which says nothing beside `max_stream_duration`.
#[expect(deprecated, reason = "max_grpc_timeout and grpc_timeout_offset, which Envoy still takes")]
fn grpc_timeout(action: &ProtoAction, path: &str) -> Result<Option<GrpcTimeout>> {
    let max = duration(action.max_grpc_timeout, path, "max_grpc_timeout")?;
    let offset = duration(action.grpc_timeout_offset, path, "grpc_timeout_offset")?.unwrap_or_default();
    Ok(max.filter(|_| action.max_stream_duration.is_none()).map(|max| GrpcTimeout { max, offset }))
}

#[expect(deprecated, reason = "include_vh_rate_limits, which Envoy still takes")]
fn include_vh_rate_limits(action: &ProtoAction) -> bool {
    action.include_vh_rate_limits.is_some_and(|include| include.value)
}

fn max_stream_duration(limits: ProtoMaxStreamDuration, path: &str) -> Result<MaxStreamDuration> {
    let path = join(path, "max_stream_duration");
    Ok(MaxStreamDuration {
        max: duration(limits.max_stream_duration, &path, "max_stream_duration")?,
        grpc_max: duration(limits.grpc_timeout_header_max, &path, "grpc_timeout_header_max")?,
        grpc_offset: duration(limits.grpc_timeout_header_offset, &path, "grpc_timeout_header_offset")?,
    })
}

fn weighted_options(
    clusters: &[ClusterWeight],
    asked: Option<&MetadataMatch>,
    path: &str,
) -> Result<Arc<[WeightedOptions]>> {
    let parse = |(index, cluster): (usize, &ClusterWeight)| {
        let path = format!("{}[{index}]", join(path, "clusters"));
        let host_rewrite = match &cluster.host_rewrite_specifier {
            Some(WeightedHost::HostRewriteLiteral(host)) => {
                Some(header_value(host, &join(&path, "host_rewrite_literal"))?)
            }
            None => None,
        };
        let headers = mutations(
            (&cluster.request_headers_to_add, &cluster.request_headers_to_remove),
            (&cluster.response_headers_to_add, &cluster.response_headers_to_remove),
            &path,
        )?;
        let own = asked_of_hosts(cluster.metadata_match.as_ref());
        let metadata_match = if own.is_empty() { None } else { MetadataMatch::with(asked, own) };
        let by_header = Some(&cluster.cluster_header).filter(|name| !name.is_empty());
        let cluster_header = by_header.map(|name| header_name(name, &join(&path, "cluster_header"))).transpose()?;
        let per_filter = per_filter(&cluster.typed_per_filter_config, &path)?;
        Ok(WeightedOptions { headers, host_rewrite, metadata_match, cluster_header, per_filter })
    };
    let options: Vec<_> = clusters.iter().enumerate().map(parse).collect::<Result<_>>()?;
    let nothing = options.iter().all(WeightedOptions::is_empty);
    Ok(if nothing { Arc::new([]) } else { options.into() })
}

/// Clusters by weight; those without any are never chosen, but are named.
pub(super) fn weighted<'a>(weights: impl Iterator<Item = (&'a str, u32)>, path: &str) -> Result<WeightedClusters> {
    let mut sum = 0_u32;
    let mut cumulative = Vec::new();
    for (name, weight) in weights {
        sum = sum
            .checked_add(weight)
            .ok_or_else(|| FieldError::new(path, "the sum of weights must be below 4294967296"))?;
        cumulative.push((sum, Arc::from(name)));
    }
    if sum == 0 {
        return Err(FieldError::new(path, "the sum of weights must be greater than 0"));
    }
    Ok(WeightedClusters { cumulative, options: Arc::new([]), runtime: None, random: RandomValue::Own })
}
