//! What load reports say of overrides: which requests carried a context, for servers that ask.

use std::{collections::BTreeMap, time::Instant};

use culvert_xds_client::overrides::contexts::{self, Carried, Counted};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterStats;

use super::load::microseconds;
use crate::http::filters::counted_contexts;

/// What the server has been told. Outlives streams, as [`super::LoadReporter`].
#[derive(Debug, Default)]
pub(super) struct ContextReporter {
    told: BTreeMap<Counted, Carried>,
    last: Option<Instant>,
}

impl ContextReporter {
    /// What was counted since the last report, the first time since the daemon was started; `None`: nothing.
    pub(super) fn report(&mut self, now: Instant) -> Option<ClusterStats> {
        let last = self.last.replace(now).unwrap_or(now);
        let mut news = Vec::new();
        for (whose, carried) in counted_contexts() {
            let before = self.told.insert(whose.clone(), carried).unwrap_or_default();
            let since = carried.since(before);
            if since.total() > 0 {
                news.push((whose, since));
            }
        }
        (!news.is_empty()).then(|| contexts::report(news, microseconds(now.saturating_duration_since(last))))
    }
}
