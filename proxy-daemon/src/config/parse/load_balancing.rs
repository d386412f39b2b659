//! How a cluster's hosts are chosen: `lb_policy` with what belongs to it, or `load_balancing_policy`.

use std::{collections::BTreeSet, sync::Arc};

use culvert_xds_client::{Any, json::unpack};
use envoy_types::pb::envoy::{
    config::{
        cluster::v3::{
            Cluster, LoadBalancingPolicy,
            cluster::{
                CommonLbConfig, LbConfig, LbPolicy as ProtoPolicy, LbSubsetConfig, SlowStartConfig as OldSlowStart,
                common_lb_config::LocalityConfigSpecifier as OldLocality,
                ring_hash_lb_config::HashFunction as ProtoFunction,
            },
        },
        core::v3::RuntimeDouble,
    },
    extensions::load_balancing_policies::{
        client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin,
        cluster_provided::v3::ClusterProvided,
        common::v3::{
            ConsistentHashingLbConfig, LocalityLbConfig, SlowStartConfig,
            locality_lb_config::{LocalityConfigSpecifier, zone_aware_lb_config::LocalityBasis},
        },
        least_request::v3::{LeastRequest as ProtoLeastRequest, least_request::SelectionMethod},
        maglev::v3::Maglev,
        override_host::v3::{OverrideHost, override_host::OverrideHostSource},
        pick_first::v3::PickFirst,
        random::v3::Random,
        ring_hash::v3::{RingHash, ring_hash::HashFunction as TypedFunction},
        round_robin::v3::RoundRobin,
        subset::v3::{
            Subset,
            subset::{
                LbSubsetFallbackPolicy as SubsetPolicy, LbSubsetMetadataFallbackPolicy as MetadataPolicy,
                LbSubsetSelector as ProtoSelector,
                lb_subset_selector::LbSubsetSelectorFallbackPolicy as SelectorPolicy,
            },
        },
        wrr_locality::v3::WrrLocality,
    },
    r#type::{metadata::v3::metadata_key::path_segment::Segment, v3::Percent},
};
use envoy_types::pb::google::protobuf::{Duration as ProtoDuration, UInt64Value};

use super::{
    common::{Result, duration, header_name, number, required, type_name},
    hash_policy::hash_policies,
    honoured::honoured,
    orca,
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{
            ConsistentHashing, HashFunction, LbOptions, LbPolicy, LeastRequest, LocalityLb, OverrideSource,
            SelectorFallback, SlowStart, SubsetConfig, SubsetFallback, SubsetSelector, ZoneAware,
        },
    },
    http::metadata::{object, read_from},
    layered_runtime::{Key, RuntimeNumber},
};

/// The largest ring and the largest table of hosts, as in Envoy.
const MAX_RING: u64 = 8 << 20;
const MAX_MAGLEV: u64 = 5_000_011;
/// So many policies may be in each other.
const MAX_DEPTH: usize = 8;

const POLICIES: &str = "envoy.extensions.load_balancing_policies.";

/// How a host of the cluster is chosen.
pub(super) fn load_balancing(cluster: &Cluster, path: &str) -> Result<(LbPolicy, LbOptions)> {
    let by_extension = cluster.lb_policy == ProtoPolicy::LoadBalancingPolicyConfig as i32;
    let common = cluster.common_lb_config.clone().unwrap_or_default();
    let panic_threshold = percent(common.healthy_panic_threshold, 50.0).round() as u32;
    if let Some(policies) = &cluster.load_balancing_policy {
        if cluster.lb_subset_config.is_some() {
            let text = "cluster: load_balancing_policy cannot be combined with lb_subset_config";
            return Err(FieldError::new(join(path, "lb_subset_config"), text));
        }
        if common.locality_config_specifier.is_some() || common.consistent_hashing_lb_config.is_some() {
            let text = "load_balancing_policy cannot be combined with partial fields (zone_aware_lb_config, \
                        locality_weighted_lb_config, consistent_hashing_lb_config) of common_lb_config";
            return Err(FieldError::new(join(path, "common_lb_config"), text));
        }
        let (policy, options) = policies_of(policies, &join(path, "load_balancing_policy"), 0)?;
        return Ok((policy, LbOptions { panic_threshold, ..options }));
    }
    if by_extension {
        return Err(FieldError::new(join(path, "load_balancing_policy"), "field load_balancing_policy need to be set"));
    }
    let locality = match common.locality_config_specifier {
        None => LocalityLb::default(),
        Some(OldLocality::LocalityWeightedLbConfig(_)) => LocalityLb::Weighted,
        Some(OldLocality::ZoneAwareLbConfig(zone)) => LocalityLb::ZoneAware(ZoneAware {
            routing_enabled: percent(zone.routing_enabled, 100.0).round() as u32,
            min_cluster_size: number64(zone.min_cluster_size, 6),
            fail_traffic_on_panic: zone.fail_traffic_on_panic,
            ..ZoneAware::default()
        }),
    };
    let (policy, slow_start) = old_policy(cluster, &common, path)?;
    // Without selectors there are no subsets.
    let subsets = cluster.lb_subset_config.as_ref().filter(|config| !config.subset_selectors.is_empty());
    let subsets = subsets.map(|config| old_subsets(config, &join(path, "lb_subset_config"))).transpose()?;
    if subsets.is_some() && policy == LbPolicy::ClusterProvided {
        let text = "cluster: LB policy CLUSTER_PROVIDED cannot be combined with lb_subset_config";
        return Err(FieldError::new(join(path, "lb_subset_config"), text));
    }
    let subsets = subsets.map(Arc::new);
    Ok((policy, LbOptions { panic_threshold, locality, slow_start, subsets, ..LbOptions::default() }))
}

fn old_policy(cluster: &Cluster, common: &CommonLbConfig, path: &str) -> Result<(LbPolicy, Option<SlowStart>)> {
    let hashing = common.consistent_hashing_lb_config.as_ref().map(|config| ConsistentHashing {
        by_hostname: config.use_hostname_for_hashing,
        balance_factor: config.hash_balance_factor.map(|factor| factor.value),
    });
    let hashing = hashing.unwrap_or_default();
    let policy = match (ProtoPolicy::try_from(cluster.lb_policy), &cluster.lb_config) {
        (Ok(ProtoPolicy::RoundRobin), Some(LbConfig::RoundRobinLbConfig(config))) => {
            let path = join(path, "round_robin_lb_config.slow_start_config");
            return Ok((LbPolicy::RoundRobin, old_slow_start(config.slow_start_config.as_ref(), &path)?));
        }
        (Ok(ProtoPolicy::RoundRobin), _) => LbPolicy::RoundRobin,
        (Ok(ProtoPolicy::LeastRequest), Some(LbConfig::LeastRequestLbConfig(config))) => {
            let policy = LbPolicy::LeastRequest(LeastRequest {
                choice_count: number(config.choice_count, 2).max(2),
                active_request_bias: double(config.active_request_bias.as_ref(), 1.0),
                full_scan: false,
            });
            let path = join(path, "least_request_lb_config.slow_start_config");
            return Ok((policy, old_slow_start(config.slow_start_config.as_ref(), &path)?));
        }
        (Ok(ProtoPolicy::LeastRequest), _) => LbPolicy::LeastRequest(LeastRequest::default()),
        (Ok(ProtoPolicy::RingHash), config) => {
            let config = match config {
                Some(LbConfig::RingHashLbConfig(config)) => *config,
                _ => Default::default(),
            };
            let murmur = config.hash_function == ProtoFunction::MurmurHash2 as i32;
            let sizes = (config.minimum_ring_size, config.maximum_ring_size);
            ring_hash(sizes, murmur, hashing, &join(path, "ring_hash_lb_config"))?
        }
        (Ok(ProtoPolicy::Maglev), config) => {
            let size = match config {
                Some(LbConfig::MaglevLbConfig(config)) => config.table_size,
                _ => None,
            };
            maglev(size, hashing, &join(path, "maglev_lb_config"))?
        }
        (Ok(ProtoPolicy::Random), _) => LbPolicy::Random,
        (Ok(ProtoPolicy::ClusterProvided), _) => LbPolicy::ClusterProvided,
        (policy, _) => {
            let name = policy.map_or("a policy that is not known", |policy| policy.as_str_name());
            let has = "ROUND_ROBIN, LEAST_REQUEST, RING_HASH, MAGLEV, RANDOM, CLUSTER_PROVIDED and \
                       LOAD_BALANCING_POLICY_CONFIG";
            return Err(FieldError::unsupported_value(join(path, "lb_policy"), name, has));
        }
    };
    Ok((policy, None))
}

/// The place of the policy that counts: the first whose type is known.
pub(super) fn first_known<'a>(types: impl IntoIterator<Item = &'a str>) -> Option<usize> {
    types.into_iter().position(|name| name.starts_with(POLICIES) && honoured(name).is_some())
}

fn policies_of(policies: &LoadBalancingPolicy, path: &str, depth: usize) -> Result<(LbPolicy, LbOptions)> {
    let configs = || policies.policies.iter().map(|policy| policy.typed_extension_config.as_ref());
    let types = configs().map(|config| config.and_then(|config| config.typed_config.as_ref()).map_or("", type_name));
    let Some(index) = first_known(types) else {
        if policies.policies.is_empty() {
            return Err(FieldError::new(join(path, "policies"), "there is no policy in it"));
        }
        let names: Vec<_> = configs().map(|config| config.map_or("", |config| &config.name)).collect();
        let text = format!("none of these policies is supported by culvert yet: {}", names.join(", "));
        return Err(FieldError::new(join(path, "policies"), text));
    };
    let path = format!("{}[{index}].typed_extension_config.typed_config", join(path, "policies"));
    let config = policies.policies[index].typed_extension_config.as_ref().and_then(|it| it.typed_config.as_ref());
    let config = config.ok_or_else(|| required(&path, "typed_config"))?;
    if depth == MAX_DEPTH {
        return Err(FieldError::new(path, format!("more than {MAX_DEPTH} policies are in each other")));
    }
    typed_policy(config, &path, depth)
}

fn typed_policy(config: &Any, path: &str, depth: usize) -> Result<(LbPolicy, LbOptions)> {
    let with = |policy, locality: Option<&LocalityLbConfig>, slow_start: Option<SlowStart>| {
        Ok((policy, LbOptions { locality: locality_of(locality), slow_start, ..LbOptions::default() }))
    };
    let weighted = |policy, hashing: Option<&ConsistentHashingLbConfig>, weighted: bool| {
        let locality = if weighted { LocalityLb::Weighted } else { LocalityLb::default() };
        let policies = hashing.map(|config| &*config.hash_policy).unwrap_or_default();
        let hash_policy = hash_policies(policies, &join(path, "consistent_hashing_lb_config"))?.into();
        Ok((policy, LbOptions { locality, hash_policy, ..LbOptions::default() }))
    };
    match type_name(config).strip_prefix(POLICIES).unwrap_or_default() {
        "round_robin.v3.RoundRobin" => {
            let config: RoundRobin = unpack(config, path)?;
            let slow_start = slow_start(config.slow_start_config.as_ref(), &join(path, "slow_start_config"))?;
            with(LbPolicy::RoundRobin, config.locality_lb_config.as_ref(), slow_start)
        }
        "client_side_weighted_round_robin.v3.ClientSideWeightedRoundRobin" => {
            let config: ClientSideWeightedRoundRobin = unpack(config, path)?;
            let slow_start = slow_start(config.slow_start_config.as_ref(), &join(path, "slow_start_config"))?;
            let weights = Some(Arc::new(orca::weights(&config, path)?));
            Ok((LbPolicy::RoundRobin, LbOptions { slow_start, weights, ..LbOptions::default() }))
        }
        "least_request.v3.LeastRequest" => {
            let config: ProtoLeastRequest = unpack(config, path)?;
            #[expect(deprecated, reason = "the field that selection_method replaced, which Envoy still takes")]
            let scan = config.enable_full_scan.is_some_and(|scan| scan.value);
            let policy = LbPolicy::LeastRequest(LeastRequest {
                choice_count: number(config.choice_count, 2).max(2),
                active_request_bias: double(config.active_request_bias.as_ref(), 1.0),
                full_scan: scan || config.selection_method == SelectionMethod::FullScan as i32,
            });
            let slow_start = slow_start(config.slow_start_config.as_ref(), &join(path, "slow_start_config"))?;
            with(policy, config.locality_lb_config.as_ref(), slow_start)
        }
        "random.v3.Random" => {
            let config: Random = unpack(config, path)?;
            with(LbPolicy::Random, config.locality_lb_config.as_ref(), None)
        }
        "ring_hash.v3.RingHash" => {
            let config: RingHash = unpack(config, path)?;
            #[expect(deprecated, reason = "the fields that consistent_hashing_lb_config replaced")]
            let old = (config.use_hostname_for_hashing, config.hash_balance_factor.map(|factor| factor.value));
            let old = ConsistentHashing { by_hostname: old.0, balance_factor: old.1 };
            let consistent = config.consistent_hashing_lb_config.as_ref();
            let hashing = consistent.map_or(old, self::consistent);
            let murmur = config.hash_function == TypedFunction::MurmurHash2 as i32;
            let policy = ring_hash((config.minimum_ring_size, config.maximum_ring_size), murmur, hashing, path)?;
            weighted(policy, consistent, config.locality_weighted_lb_config.is_some())
        }
        "maglev.v3.Maglev" => {
            let config: Maglev = unpack(config, path)?;
            let consistent = config.consistent_hashing_lb_config.as_ref();
            let hashing = consistent.map(self::consistent).unwrap_or_default();
            let policy = maglev(config.table_size, hashing, path)?;
            weighted(policy, consistent, config.locality_weighted_lb_config.is_some())
        }
        "cluster_provided.v3.ClusterProvided" => {
            let ClusterProvided {} = unpack(config, path)?;
            Ok((LbPolicy::ClusterProvided, LbOptions::default()))
        }
        "wrr_locality.v3.WrrLocality" => {
            let config: WrrLocality = unpack(config, path)?;
            let picking = config.endpoint_picking_policy.as_ref();
            let (policy, options) = inner(picking, path, "endpoint_picking_policy", depth)?;
            Ok((policy, LbOptions { locality: LocalityLb::Weighted, ..options }))
        }
        "pick_first.v3.PickFirst" => {
            let PickFirst { shuffle_address_list } = unpack(config, path)?;
            Ok((LbPolicy::PickFirst { shuffle: shuffle_address_list }, LbOptions::default()))
        }
        "subset.v3.Subset" => {
            let config: Subset = unpack(config, path)?;
            let subsets = subsets(&config, path)?;
            let (policy, options) = inner(config.subset_lb_policy.as_ref(), path, "subset_lb_policy", depth)?;
            if options.subsets.is_some() {
                let text = "subsets within subsets are not supported by culvert yet";
                return Err(FieldError::new(join(path, "subset_lb_policy"), text));
            }
            let subsets = (!subsets.selectors.is_empty()).then(|| Arc::new(subsets));
            Ok((policy, LbOptions { subsets, ..options }))
        }
        "override_host.v3.OverrideHost" => {
            let config: OverrideHost = unpack(config, path)?;
            let sources = override_sources(&config, path)?;
            let (policy, options) = inner(config.fallback_policy.as_ref(), path, "fallback_policy", depth)?;
            if !options.override_host.is_empty() {
                let text = "an override within another one is not supported by culvert yet";
                return Err(FieldError::new(join(path, "fallback_policy"), text));
            }
            Ok((policy, LbOptions { override_host: sources, ..options }))
        }
        _ => Err(FieldError::unsupported(path)),
    }
}

/// The policy within another one.
fn inner(
    policies: Option<&LoadBalancingPolicy>,
    path: &str,
    field: &str,
    depth: usize,
) -> Result<(LbPolicy, LbOptions)> {
    let policies = policies.ok_or_else(|| required(path, field))?;
    policies_of(policies, &join(path, field), depth + 1)
}

fn override_sources(config: &OverrideHost, path: &str) -> Result<Arc<[OverrideSource]>> {
    let parse = |(index, source): (usize, &OverrideHostSource)| {
        let path = format!("{}[{index}]", join(path, "override_host_sources"));
        match (source.header.as_str(), &source.metadata) {
            ("", None) => Err(FieldError::new(path, "Empty override source")),
            (header, None) => Ok(OverrideSource::Header(header_name(header, &join(&path, "header"))?)),
            ("", Some(key)) => {
                let steps = key.path.iter().map(|step| match &step.segment {
                    Some(Segment::Key(name)) => Ok(Box::from(name.as_str())),
                    Some(Segment::Index(_)) => Err(FieldError::unsupported(join(&path, "metadata.path.index"))),
                    None => Err(required(&path, "metadata.path.key")),
                });
                Ok(OverrideSource::Metadata(read_from(&key.key), steps.collect::<Result<_>>()?))
            }
            (_, Some(_)) => Err(FieldError::new(path, "Only one override source must be set")),
        }
    };
    config.override_host_sources.iter().enumerate().map(parse).collect()
}

fn old_subsets(config: &LbSubsetConfig, path: &str) -> Result<SubsetConfig> {
    let selectors = config.subset_selectors.iter().map(|selector| ProtoSelector {
        keys: selector.keys.clone(),
        single_host_per_subset: selector.single_host_per_subset,
        fallback_policy: selector.fallback_policy,
        fallback_keys_subset: selector.fallback_keys_subset.clone(),
    });
    // The enums have the same numbers.
    let typed = Subset {
        fallback_policy: config.fallback_policy,
        default_subset: config.default_subset.clone(),
        subset_selectors: selectors.collect(),
        allow_redundant_keys: false,
        locality_weight_aware: config.locality_weight_aware,
        scale_locality_weight: config.scale_locality_weight,
        panic_mode_any: config.panic_mode_any,
        list_as_any: config.list_as_any,
        metadata_fallback_policy: config.metadata_fallback_policy,
        subset_lb_policy: None,
    };
    subsets(&typed, path)
}

fn subsets(config: &Subset, path: &str) -> Result<SubsetConfig> {
    let parse = |(index, selector): (usize, &ProtoSelector)| {
        let path = format!("{}[{index}]", join(path, "subset_selectors"));
        let set = |names: &[String]| -> BTreeSet<Box<str>> { names.iter().map(|name| name.as_str().into()).collect() };
        let keys = set(&selector.keys);
        let fallback = match SelectorPolicy::try_from(selector.fallback_policy) {
            Ok(SelectorPolicy::NotDefined) | Err(_) => None,
            Ok(SelectorPolicy::NoFallback) => Some(SelectorFallback::To(SubsetFallback::None)),
            Ok(SelectorPolicy::AnyEndpoint) => Some(SelectorFallback::To(SubsetFallback::Any)),
            Ok(SelectorPolicy::DefaultSubset) => Some(SelectorFallback::To(SubsetFallback::Default)),
            Ok(SelectorPolicy::KeysSubset) => {
                let fewer = set(&selector.fallback_keys_subset);
                let text = if fewer.is_empty() {
                    "fallback_keys_subset cannot be empty"
                } else if !fewer.is_subset(&keys) {
                    "fallback_keys_subset must be a subset of selector keys"
                } else if fewer == keys {
                    "fallback_keys_subset cannot be equal to keys"
                } else {
                    return Ok(SubsetSelector {
                        keys,
                        single_host: selector.single_host_per_subset,
                        fallback: Some(SelectorFallback::Keys(fewer)),
                    });
                };
                return Err(FieldError::new(join(&path, "fallback_keys_subset"), text));
            }
        };
        Ok(SubsetSelector { keys, single_host: selector.single_host_per_subset, fallback })
    };
    Ok(SubsetConfig {
        fallback: match SubsetPolicy::try_from(config.fallback_policy) {
            Ok(SubsetPolicy::AnyEndpoint) => SubsetFallback::Any,
            Ok(SubsetPolicy::DefaultSubset) => SubsetFallback::Default,
            Ok(SubsetPolicy::NoFallback) | Err(_) => SubsetFallback::None,
        },
        default_subset: config.default_subset.as_ref().map(object).unwrap_or_default(),
        selectors: config.subset_selectors.iter().enumerate().map(parse).collect::<Result<_>>()?,
        allow_redundant_keys: config.allow_redundant_keys,
        locality_weight_aware: config.locality_weight_aware,
        scale_locality_weight: config.scale_locality_weight,
        panic_mode_any: config.panic_mode_any,
        list_as_any: config.list_as_any,
        fallback_list: config.metadata_fallback_policy == MetadataPolicy::FallbackList as i32,
    })
}

fn locality_of(config: Option<&LocalityLbConfig>) -> LocalityLb {
    let Some(specifier) = config.and_then(|config| config.locality_config_specifier.as_ref()) else {
        return LocalityLb::default();
    };
    let zone = match specifier {
        LocalityConfigSpecifier::LocalityWeightedLbConfig(_) => return LocalityLb::Weighted,
        LocalityConfigSpecifier::ZoneAwareLbConfig(zone) => zone,
    };
    #[expect(deprecated, reason = "the field that force_local_zone replaced, which Envoy still takes")]
    let direct = zone.force_locality_direct_routing.then_some(1);
    let forced = zone.force_local_zone.as_ref().map(|config| number(config.min_size, 1));
    LocalityLb::ZoneAware(ZoneAware {
        routing_enabled: percent(zone.routing_enabled, 100.0).round() as u32,
        min_cluster_size: number64(zone.min_cluster_size, 6),
        fail_traffic_on_panic: zone.fail_traffic_on_panic,
        force_local_zone: forced.or(direct),
        by_weight: zone.locality_basis == LocalityBasis::HealthyHostsWeight as i32,
    })
}

fn consistent(config: &ConsistentHashingLbConfig) -> ConsistentHashing {
    ConsistentHashing {
        by_hostname: config.use_hostname_for_hashing,
        balance_factor: config.hash_balance_factor.map(|factor| factor.value),
    }
}

fn ring_hash(
    (min, max): (Option<UInt64Value>, Option<UInt64Value>),
    murmur: bool,
    hashing: ConsistentHashing,
    path: &str,
) -> Result<LbPolicy> {
    let (min_size, max_size) = (number64(min, 1024), number64(max, MAX_RING));
    for (value, field) in [(min_size, "minimum_ring_size"), (max_size, "maximum_ring_size")] {
        if value > MAX_RING {
            return Err(FieldError::new(join(path, field), format!("must be at most {MAX_RING}")));
        }
    }
    if min_size > max_size {
        let text = format!("ring hash: minimum_ring_size ({min_size}) > maximum_ring_size ({max_size})");
        return Err(FieldError::new(path, text));
    }
    let function = if murmur { HashFunction::MurmurHash2 } else { HashFunction::XxHash };
    Ok(LbPolicy::RingHash { min_size, max_size, function, hashing })
}

fn maglev(size: Option<UInt64Value>, hashing: ConsistentHashing, path: &str) -> Result<LbPolicy> {
    let size = number64(size, 65_537);
    let path = join(path, "table_size");
    if size > MAX_MAGLEV {
        return Err(FieldError::new(path, format!("must be at most {MAX_MAGLEV}")));
    }
    if size < 2 || (2..).take_while(|divisor| divisor * divisor <= size).any(|divisor| size.is_multiple_of(divisor)) {
        return Err(FieldError::new(path, "The table size of maglev must be prime number"));
    }
    Ok(LbPolicy::Maglev { size, hashing })
}

fn old_slow_start(config: Option<&OldSlowStart>, path: &str) -> Result<Option<SlowStart>> {
    let Some(config) = config else { return Ok(None) };
    slow_start_of(config.slow_start_window, config.aggression.as_ref(), config.min_weight_percent, path)
}

fn slow_start(config: Option<&SlowStartConfig>, path: &str) -> Result<Option<SlowStart>> {
    let Some(config) = config else { return Ok(None) };
    slow_start_of(config.slow_start_window, config.aggression.as_ref(), config.min_weight_percent, path)
}

/// `None` where the window is empty.
fn slow_start_of(
    window: Option<ProtoDuration>,
    aggression: Option<&RuntimeDouble>,
    min_weight: Option<Percent>,
    path: &str,
) -> Result<Option<SlowStart>> {
    let window = duration(window, path, "slow_start_window")?.filter(|window| window.as_millis() > 0);
    Ok(window.map(|window| SlowStart {
        window,
        aggression: double(aggression, 1.0),
        min_weight: percent(min_weight, 10.0) / 100.0,
    }))
}

fn number64(value: Option<UInt64Value>, default: u64) -> u64 {
    value.map_or(default, |value| value.value)
}

fn percent(value: Option<Percent>, default: f64) -> f64 {
    value.map_or(default, |percent| percent.value)
}

fn double(value: Option<&RuntimeDouble>, default: f64) -> RuntimeNumber {
    value.map_or(RuntimeNumber { default, key: None }, |value| RuntimeNumber {
        default: value.default_value,
        key: Key::optional(&value.runtime_key),
    })
}
