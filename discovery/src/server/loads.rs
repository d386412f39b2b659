//! LRS: takes in what proxies report of the requests to each cluster, and of contexts of overrides.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use culvert_xds_client::overrides::contexts::CLUSTER;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterStats;
use envoy_types::pb::envoy::service::load_stats::v3::load_reporting_service_server::LoadReportingService;
use envoy_types::pb::envoy::service::load_stats::v3::{LoadStatsRequest, LoadStatsResponse};
use futures_util::Stream;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use super::asked;
use super::authorization::Authorization;
use super::tls::Identity;
use crate::overrides::contexts::Contexts;
use crate::resources::Snapshot;

/// How often proxies are asked to report, if nothing was said.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// The most clusters of which loads are kept: proxies report on clusters of their own too, by whatever names.
const MAX_CLUSTERS: usize = 20_000;

/// What was reported of one cluster since discovery was started, by all proxies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Requests that were begun.
    pub issued: u64,
    /// Those that succeeded.
    pub succeeded: u64,
    /// Those that failed.
    pub failed: u64,
    /// Requests that a circuit breaker refused.
    pub dropped: u64,
}

/// What was reported of each cluster.
#[derive(Debug, Clone, Default)]
pub struct Loads(Arc<Mutex<Reported>>);

#[derive(Debug, Default)]
struct Reported {
    clusters: BTreeMap<String, Load>,
    reports: u64,
}

impl Loads {
    fn with<T>(&self, change: impl FnOnce(&mut Reported) -> T) -> T {
        // Sums are whole after every change, so a panic elsewhere does not spoil them.
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The loads by cluster.
    #[must_use]
    pub fn clusters(&self) -> BTreeMap<String, Load> {
        self.with(|reported| reported.clusters.clone())
    }

    /// How many reports came.
    #[must_use]
    pub fn reports(&self) -> u64 {
        self.with(|reported| reported.reports)
    }

    fn add(&self, stats: Vec<ClusterStats>) {
        self.with(|reported| {
            reported.reports += 1;
            for ClusterStats { cluster_name, upstream_locality_stats, total_dropped_requests, .. } in stats {
                if reported.clusters.len() >= MAX_CLUSTERS && !reported.clusters.contains_key(&cluster_name) {
                    continue;
                }
                let load = reported.clusters.entry(cluster_name).or_default();
                load.dropped = load.dropped.saturating_add(total_dropped_requests);
                for locality in upstream_locality_stats {
                    load.issued = load.issued.saturating_add(locality.total_issued_requests);
                    load.succeeded = load.succeeded.saturating_add(locality.total_successful_requests);
                    load.failed = load.failed.saturating_add(locality.total_error_requests);
                }
            }
        });
    }
}

/// The service, for one client.
#[derive(Debug, Clone)]
pub(super) struct Lrs {
    pub(super) loads: Loads,
    pub(super) contexts: Contexts,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) interval: Duration,
    pub(super) authorization: Arc<Authorization>,
    pub(super) identity: Arc<Identity>,
    pub(super) shutdown: watch::Receiver<bool>,
}

impl Lrs {
    async fn run(
        mut self,
        mut requests: Streaming<LoadStatsRequest>,
        answers: mpsc::Sender<Result<LoadStatsResponse, Status>>,
    ) {
        let mut first = true;
        loop {
            let request = tokio::select! {
                request = requests.message() => request,
                () = answers.closed() => return,
                () = asked(&mut self.shutdown) => return,
            };
            let LoadStatsRequest { node, cluster_stats } = match request {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(status) => {
                    debug!("load reports: {status}");
                    return;
                }
            };
            if std::mem::take(&mut first) {
                if let Err(refusal) = self.authorization.check(&self.identity, node.as_ref()) {
                    let _ = answers.send(Err(refusal.into())).await;
                    return;
                }
                info!("node `{}` reports loads", node.unwrap_or_default().id);
                let interval = envoy_types::pb::google::protobuf::Duration {
                    seconds: i64::try_from(self.interval.as_secs()).unwrap_or(i64::MAX),
                    nanos: 0,
                };
                let wanted = LoadStatsResponse {
                    send_all_clusters: true,
                    // Others than culvertd do not look at it beside all clusters.
                    clusters: vec![CLUSTER.to_owned()],
                    load_reporting_interval: Some(interval),
                    ..Default::default()
                };
                if answers.send(Ok(wanted)).await.is_err() {
                    return;
                }
            }
            let (contexts, loads): (Vec<_>, Vec<_>) =
                cluster_stats.into_iter().partition(|stats| stats.cluster_name == CLUSTER);
            if !contexts.is_empty() {
                let mesh = Arc::clone(&self.snapshots.borrow().mesh);
                contexts.iter().for_each(|report| self.contexts.add(report, &mesh));
            }
            // The first message is a report where there were loads before the stream.
            if !loads.is_empty() {
                self.loads.add(loads);
            }
        }
    }
}

#[tonic::async_trait]
impl LoadReportingService for Lrs {
    type StreamLoadStatsStream = Pin<Box<dyn Stream<Item = Result<LoadStatsResponse, Status>> + Send>>;

    async fn stream_load_stats(
        &self,
        request: Request<Streaming<LoadStatsRequest>>,
    ) -> Result<Response<Self::StreamLoadStatsStream>, Status> {
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(self.clone().run(request.into_inner(), answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}
