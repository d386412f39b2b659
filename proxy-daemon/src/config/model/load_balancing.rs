use std::{collections::BTreeSet, sync::Arc, time::Duration};

use http::HeaderName;

use super::{HashPolicy, OrcaWeights};
use crate::layered_runtime::RuntimeNumber;

/// `Cluster.lb_policy`, or the first of `load_balancing_policy` that is known.
#[derive(Debug, Clone, PartialEq)]
pub enum LbPolicy {
    /// Weighted.
    RoundRobin,
    /// The least busy of some random hosts, or of all of them.
    LeastRequest(LeastRequest),
    /// By the request's hash: `RING_HASH`.
    RingHash {
        /// At least so many entries, where `max_size` lets it. Default 1024.
        min_size: u64,
        /// At most so many. Default 8 Mi.
        max_size: u64,
        /// What hosts are hashed with.
        function: HashFunction,
        /// How hashes choose hosts.
        hashing: ConsistentHashing,
    },
    /// By the request's hash: `MAGLEV`.
    Maglev {
        /// A prime. Default 65537.
        size: u64,
        /// How hashes choose hosts.
        hashing: ConsistentHashing,
    },
    /// Any host.
    Random,
    /// The first host.
    PickFirst {
        /// In an order of its own for each set of hosts.
        shuffle: bool,
    },
    /// The destination that the connection or request names: ORIGINAL_DST clusters only.
    ClusterProvided,
}

impl LbPolicy {
    /// Whether it chooses by a hash of the request.
    pub fn wants_hash(&self) -> bool {
        matches!(self, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. })
    }
}

/// `LeastRequestLbConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct LeastRequest {
    /// Of so many random hosts the least busy one, where all weights are equal. At least 2.
    pub choice_count: u32,
    /// Where weights differ, they are divided by this power of the requests under way. Default 1.
    pub active_request_bias: RuntimeNumber,
    /// `selection_method: FULL_SCAN`: of all hosts the least busy one, where all weights are equal.
    pub full_scan: bool,
}

impl Default for LeastRequest {
    fn default() -> LeastRequest {
        LeastRequest {
            choice_count: 2,
            active_request_bias: RuntimeNumber { default: 1.0, key: None },
            full_scan: false,
        }
    }
}

/// `ConsistentHashingLbConfig`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsistentHashing {
    /// Hosts are hashed by their names, not by their addresses.
    pub by_hostname: bool,
    /// No host has more than so many hundredths of its share of the requests under way. At least 100.
    pub balance_factor: Option<u32>,
}

/// `Cluster.RingHashLbConfig.HashFunction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashFunction {
    /// `XX_HASH`
    XxHash,
    /// `MURMUR_HASH_2`
    MurmurHash2,
}

/// What holds for all policies alike.
#[derive(Debug, Clone, PartialEq)]
pub struct LbOptions {
    /// `healthy_panic_threshold`, in percent: where fewer hosts of a priority may be used, all are. Default 50; 0: never.
    pub panic_threshold: u32,
    /// How a locality of a priority is chosen.
    pub locality: LocalityLb,
    /// Hosts that are new get their share little by little.
    pub slow_start: Option<SlowStart>,
    /// Hosts are chosen within subsets.
    pub subsets: Option<Arc<SubsetConfig>>,
    /// Where requests may name their hosts: what is named first is used first.
    pub override_host: Arc<[OverrideSource]>,
    /// Hosts have weights by what they report of their load, and not those of the configuration.
    pub weights: Option<Arc<OrcaWeights>>,
    /// What balancers that go by hashes hash requests by, in the place of routes' policies; empty: those of the routes.
    pub hash_policy: Arc<[HashPolicy]>,
}

/// `OverrideHostSource`: a list of addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OverrideSource {
    /// In this request header.
    Header(HeaderName),
    /// In what filters have told: a namespace, and a path.
    Metadata(Box<str>, Box<[Box<str>]>),
}

impl Default for LbOptions {
    fn default() -> LbOptions {
        LbOptions {
            panic_threshold: 50,
            locality: LocalityLb::default(),
            slow_start: None,
            subsets: None,
            override_host: Arc::new([]),
            weights: None,
            hash_policy: Arc::new([]),
        }
    }
}

/// `CommonLbConfig.locality_config_specifier`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalityLb {
    /// Hosts in the node's own zone are preferred, where the bootstrap names the local cluster.
    ZoneAware(ZoneAware),
    /// By the weights of the localities.
    Weighted,
}

impl Default for LocalityLb {
    fn default() -> LocalityLb {
        LocalityLb::ZoneAware(ZoneAware::default())
    }
}

/// `ZoneAwareLbConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneAware {
    /// Of a hundred requests so many take part. Default 100.
    pub routing_enabled: u32,
    /// With fewer healthy hosts than this zones do not matter. Default 6.
    pub min_cluster_size: u64,
    /// Where there would be panic, requests fail instead.
    pub fail_traffic_on_panic: bool,
    /// All requests stay in the zone, where it has so many healthy hosts.
    pub force_local_zone: Option<u32>,
    /// Zones are compared by the weights of their hosts, not by their number.
    pub by_weight: bool,
}

impl Default for ZoneAware {
    fn default() -> ZoneAware {
        ZoneAware {
            routing_enabled: 100,
            min_cluster_size: 6,
            fail_traffic_on_panic: false,
            force_local_zone: None,
            by_weight: false,
        }
    }
}

/// `SlowStartConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct SlowStart {
    /// A host is new for so long.
    pub window: Duration,
    /// The weight grows with the time to the power of 1 / this. Default 1.
    pub aggression: RuntimeNumber,
    /// A new host has at least this share of its weight. Default 0.1.
    pub min_weight: f64,
}

/// What is said of an endpoint under `envoy.lb`.
pub type LbMetadata = serde_json::Map<String, serde_json::Value>;

/// `ClusterLoadAssignment.Policy`, as far as it is about choosing hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignmentPolicy {
    /// In percent: how much of a priority may fail before the next one gets a part of its load. Default 140.
    pub overprovisioning_factor: u32,
    /// The health of a priority is that of its hosts' weights, not of their number.
    pub weighted_priority_health: bool,
    /// Requests that are dropped before a host is chosen.
    pub drop_overload: Option<Arc<DropOverload>>,
    /// The endpoints are forgotten so long after they came, where nothing has come since. Of EDS only.
    pub stale_after: Option<Duration>,
}

/// `ClusterLoadAssignment.Policy.DropOverload`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropOverload {
    /// So many of a million requests.
    pub per_million: u32,
    /// What load reports call them.
    pub category: Box<str>,
}

impl Default for AssignmentPolicy {
    fn default() -> AssignmentPolicy {
        AssignmentPolicy {
            overprovisioning_factor: 140,
            weighted_priority_health: false,
            drop_overload: None,
            stale_after: None,
        }
    }
}

/// Where this node is, and who else is there: what zone-aware routing goes by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalNode {
    /// `node.locality`
    pub locality: super::Locality,
    /// `cluster_manager.local_cluster_name`: the cluster that this node is a host of.
    pub cluster: Option<Arc<str>>,
}

/// `LbSubsetConfig`: hosts are balanced within those that have the metadata that a route asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SubsetConfig {
    /// Where no subset is found.
    pub fallback: SubsetFallback,
    /// What hosts of the default subset have.
    pub default_subset: LbMetadata,
    /// By which keys there are subsets.
    pub selectors: Vec<SubsetSelector>,
    /// Keys that no selector has do not matter.
    pub allow_redundant_keys: bool,
    /// Subsets have the weights of the localities.
    pub locality_weight_aware: bool,
    /// Those weights are less where a subset has not all hosts of a locality.
    pub scale_locality_weight: bool,
    /// Where the fallback has no host either, any host is chosen.
    pub panic_mode_any: bool,
    /// A list in a host's metadata stands for each of its values.
    pub list_as_any: bool,
    /// `metadata_fallback_policy: FALLBACK_LIST`
    pub fallback_list: bool,
}

/// `LbSubsetFallbackPolicy`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SubsetFallback {
    /// No host.
    #[default]
    None,
    /// Any host.
    Any,
    /// A host of the default subset.
    Default,
}

/// `LbSubsetSelector`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsetSelector {
    /// Hosts that have all of these keys are in a subset by their values.
    pub keys: BTreeSet<Box<str>>,
    /// Each subset has but one host.
    pub single_host: bool,
    /// Where no subset is found; `None`: as the cluster says.
    pub fallback: Option<SelectorFallback>,
}

/// `LbSubsetSelectorFallbackPolicy`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SelectorFallback {
    /// As of the cluster's own fallback.
    To(SubsetFallback),
    /// The subset by these keys only.
    Keys(BTreeSet<Box<str>>),
}

/// What a request asks of the metadata of its host under `envoy.lb`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MetadataMatch {
    /// All of it.
    pub fields: LbMetadata,
    /// In the order of their names.
    pub criteria: Vec<Criterion>,
    /// `fallback_list`: what is asked for instead, one after the other.
    pub fallbacks: Option<Vec<Vec<Criterion>>>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Criterion {
    /// The key.
    pub name: Box<str>,
    /// The value, as JSON.
    pub value: Box<str>,
}

/// The key that stands for a list of what to ask for instead.
const FALLBACK_LIST: &str = "fallback_list";

impl MetadataMatch {
    /// What these fields ask for; `None` where there are none.
    pub fn new(fields: &LbMetadata) -> Option<MetadataMatch> {
        let criteria = |fields: &LbMetadata| -> Vec<Criterion> {
            let mut criteria: Vec<_> = fields.iter().map(|(name, value)| Criterion::new(name, value)).collect();
            criteria.sort_by(|a, b| a.name.cmp(&b.name));
            criteria
        };
        let fallbacks = fields.get(FALLBACK_LIST).map(|list| {
            let structs = list.as_array().into_iter().flatten();
            let with = structs.map(|item| {
                let mut fields = fields.clone();
                fields.remove(FALLBACK_LIST);
                fields.extend(item.as_object().cloned().unwrap_or_default());
                criteria(&fields)
            });
            let with: Vec<_> = with.collect();
            if with.is_empty() {
                let mut fields = fields.clone();
                fields.remove(FALLBACK_LIST);
                return vec![criteria(&fields)];
            }
            with
        });
        (!fields.is_empty()).then(|| MetadataMatch { fields: fields.clone(), criteria: criteria(fields), fallbacks })
    }
}

impl MetadataMatch {
    /// What this asks for and these fields ask for, which win.
    pub fn with(earlier: Option<&MetadataMatch>, fields: LbMetadata) -> Option<MetadataMatch> {
        let mut all = earlier.map(|earlier| earlier.fields.clone()).unwrap_or_default();
        all.extend(fields);
        MetadataMatch::new(&all)
    }
}

impl Criterion {
    /// A key, and what its value has to be.
    pub fn new(name: &str, value: &serde_json::Value) -> Criterion {
        Criterion { name: name.into(), value: value.to_string().into() }
    }
}
