use std::sync::Arc;

use http::{HeaderName, HeaderValue};

use super::{HeaderMutations, PerFilterConfigs};
use crate::{config::model::MetadataMatch, layered_runtime::RuntimeInteger};

/// Where a request or connection goes.
#[derive(Debug, Clone)]
pub enum ClusterChoice {
    /// Always there.
    Cluster(Arc<str>),
    /// One of several, by weight.
    Weighted(WeightedClusters),
    /// The cluster that this request header names.
    Header(HeaderName),
}

impl ClusterChoice {
    /// The clusters that it names; none where a header does.
    pub fn names(&self) -> Vec<&str> {
        match self {
            ClusterChoice::Cluster(name) => vec![name],
            ClusterChoice::Weighted(weighted) => {
                let names: Vec<&str> = match &weighted.runtime {
                    Some(clusters) => clusters.iter().map(|(_, name)| &**name).collect(),
                    None => weighted.cumulative.iter().map(|(_, name)| &**name).collect(),
                };
                // Those that headers name have none.
                names.into_iter().filter(|name| !name.is_empty()).collect()
            }
            ClusterChoice::Header(_) => Vec::new(),
        }
    }
}

/// Clusters with weights.
#[derive(Debug, Clone)]
pub struct WeightedClusters {
    /// Each with the sum of all weights up to and including its own, so that a pick is a binary search.
    pub cumulative: Vec<(u32, Arc<str>)>,
    /// What holds for the requests of each, in the same order; empty: nothing.
    pub options: Arc<[WeightedOptions]>,
    /// With a `runtime_key_prefix`: every cluster with its weight now; `cumulative` is what is configured.
    pub runtime: Option<Vec<(RuntimeInteger, Arc<str>)>>,
    /// What one is chosen by.
    pub random: RandomValue,
}

/// `WeightedCluster.random_value_specifier`
#[derive(Debug, Clone, Default)]
pub enum RandomValue {
    /// The stream's random number.
    #[default]
    Own,
    /// `header_name`: the number in this header of the request, where there is one, and one alone.
    Header(HeaderName),
    /// `use_hash_policy`: the request's hash, where it has any.
    Hash,
}

/// What `WeightedCluster.ClusterWeight` says besides name and weight.
#[derive(Debug, Default)]
pub struct WeightedOptions {
    /// Applied before the route's.
    pub headers: HeaderMutations,
    /// `host_rewrite_literal`; the route's host rewrite comes after it.
    pub host_rewrite: Option<HeaderValue>,
    /// `metadata_match`, with what the route asks for.
    pub metadata_match: Option<MetadataMatch>,
    /// The request header that names the cluster, which has no name of its own then.
    pub cluster_header: Option<HeaderName>,
    /// What filters are told: more specific than the route's.
    pub per_filter: PerFilterConfigs,
}

impl WeightedOptions {
    /// Whether they say nothing.
    pub fn is_empty(&self) -> bool {
        let WeightedOptions { headers, host_rewrite, metadata_match, cluster_header, per_filter } = self;
        let nothing = headers.is_empty() && host_rewrite.is_none() && metadata_match.is_none();
        nothing && cluster_header.is_none() && per_filter.is_empty()
    }
}

impl WeightedClusters {
    /// The sum of all weights; never 0.
    pub fn total(&self) -> u32 {
        self.cumulative.last().map_or(1, |(sum, _)| *sum)
    }

    /// The cluster for a random number; `None` where runtime values leave no weight at all, or too much.
    pub fn choose(&self, random: u64) -> Option<&Arc<str>> {
        self.choose_index(random).map(|index| self.name(index))
    }

    /// The name of the cluster with this number.
    pub fn name(&self, index: usize) -> &Arc<str> {
        match &self.runtime {
            Some(clusters) => &clusters[index].1,
            None => &self.cumulative[index].1,
        }
    }

    /// The number of the cluster for a random number.
    pub fn choose_index(&self, random: u64) -> Option<usize> {
        let Some(clusters) = &self.runtime else { return Some(self.at((random % u64::from(self.total())) as u32)) };
        let total = clusters.iter().try_fold(0_u64, |sum, (weight, _)| sum.checked_add(weight.get()))?;
        if total == 0 || total > u64::from(u32::MAX) {
            return None;
        }
        let mut point = random % total;
        // The weights may change in between: the last one takes what is over.
        let chosen = clusters.iter().position(|(weight, _)| match point.checked_sub(weight.get()) {
            Some(rest) => {
                point = rest;
                false
            }
            None => true,
        });
        Some(chosen.unwrap_or(clusters.len() - 1))
    }

    /// The number of the cluster at `point`, which is below [`total`](Self::total).
    pub fn at(&self, point: u32) -> usize {
        self.cumulative.partition_point(|(sum, _)| *sum <= point).min(self.cumulative.len() - 1)
    }
}
