//! Carries load reports to the server, for as long as the daemon runs.

use std::{convert::Infallible, pin::pin, time::Instant};

use culvert_xds_client::grpc::Dialer;
use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::load_stats::v3::{
        LoadStatsRequest, LoadStatsResponse, load_reporting_service_client::LoadReportingServiceClient,
    },
};
use futures_util::{TryFutureExt, TryStreamExt};
use tokio::{sync::mpsc, time::sleep_until};
use tokio_stream::wrappers::ReceiverStream;

use super::{Ended, LoadReporter};
use crate::{
    runtime::DataPlane,
    stats::{self, Counter},
};

/// `load_reporter.*`, in Envoy's sense: requests are what the server asks for, responses are reports.
#[derive(Debug, Clone, Copy)]
struct LoadStats {
    requests: Counter,
    responses: Counter,
    errors: Counter,
    retries: Counter,
}

/// Reports the load of `plane`'s clusters to the server, for ever: `cluster_manager.load_stats_config`.
pub async fn report_load(mut dialer: Dialer, mut node: Node, plane: DataPlane) -> Infallible {
    let counter = |name: &str| stats::counter(&format!("load_reporter.{name}"));
    let stats = LoadStats {
        requests: counter("requests"),
        responses: counter("responses"),
        errors: counter("errors"),
        retries: counter("retries"),
    };
    node.client_features.push("envoy.lrs.supports_send_all_clusters".to_owned());
    let mut reporter = LoadReporter::default();
    loop {
        let mut answered = false;
        let Err(ended) = stream(&dialer, &node, &plane, &mut reporter, stats, &mut answered).await;
        if !matches!(ended, Ended::Closed) {
            stats.errors.inc();
        }
        let address = dialer.address().to_owned();
        let wait = dialer.lost(answered);
        tracing::warn!(%address, retry_in = ?wait, "load reports: {ended}; load is counted on and told later");
        tokio::time::sleep(wait).await;
        stats.retries.inc();
    }
}

/// Runs one stream until it is lost; `answered` is set once the server has said what it wants.
async fn stream(
    dialer: &Dialer,
    node: &Node,
    plane: &DataPlane,
    reporter: &mut LoadReporter,
    stats: LoadStats,
    answered: &mut bool,
) -> Result<Infallible, Ended> {
    let mut client = LoadReportingServiceClient::new(dialer.connect().await?);
    // A server that does not read stops the reports; what it would have been told is in the next one.
    let (sender, requests) = mpsc::channel(1);
    let report = |reporter: &mut LoadReporter| LoadStatsRequest {
        node: Some(node.clone()),
        cluster_stats: reporter.report(&plane.clusters(), Instant::now()),
    };
    let mut last = Instant::now();
    let first = report(reporter);
    // There is room: this is the first.
    let _ = sender.try_send(first);
    stats.responses.inc();
    let call = client.stream_load_stats(dialer.request(ReceiverStream::new(requests)));
    // Some servers say nothing, not even headers, before they have something to ask for.
    let mut answers = pin!(call.map_ok(tonic::Response::into_inner).try_flatten_stream());
    loop {
        let due = reporter.interval().map(|interval| last + interval);
        let due = async {
            match due {
                Some(due) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
            sender.reserve().await
        };
        tokio::select! {
            answer = answers.try_next() => {
                let answer: LoadStatsResponse = answer?.ok_or(Ended::Closed)?;
                *answered = true;
                stats.requests.inc();
                reporter.answered(answer, &plane.clusters(), Instant::now());
                last = Instant::now();
            }
            place = due => {
                let Ok(place) = place else { return Err(Ended::Closed) };
                place.send(report(reporter));
                last = Instant::now();
                stats.responses.inc();
            }
        }
    }
}
