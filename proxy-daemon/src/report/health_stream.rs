//! Carries the health discovery service, for as long as the daemon runs.

use std::{
    convert::Infallible,
    pin::pin,
    time::{Duration, Instant},
};

use culvert_xds_client::{grpc::Dialer, json::newer};
use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::health::v3::{
        Capability, HealthCheckRequest, HealthCheckRequestOrEndpointHealthResponse as Message, HealthCheckSpecifier,
        capability::Protocol, health_check_request_or_endpoint_health_response::RequestType,
    },
};
use futures_util::{TryFutureExt, TryStreamExt};
use http::uri::PathAndQuery;
use prost::bytes::Buf as _;
use tokio::{sync::mpsc, time::sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstEncoder};

use super::{Ended, HealthReporter};
use crate::stats::{self, Counter};

/// The shortest time between two reports.
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// The longest, so that clocks do not overflow.
const MAX_INTERVAL: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// `hds_delegate.*`, in Envoy's sense: requests are what the server sends, responses what it is sent.
#[derive(Debug, Clone, Copy)]
struct HealthStats {
    requests: Counter,
    responses: Counter,
    errors: Counter,
    updates: Counter,
}

/// Checks what the server says, and tells it the results, for ever: `hds_config`.
pub async fn report_health(mut dialer: Dialer, node: Node) -> Infallible {
    let counter = |name: &str| stats::counter(&format!("hds_delegate.{name}"));
    let stats = HealthStats {
        requests: counter("requests"),
        responses: counter("responses"),
        errors: counter("errors"),
        updates: counter("updates"),
    };
    let mut reporter = HealthReporter::default();
    loop {
        let mut answered = false;
        let Err(ended) = stream(&dialer, &node, &mut reporter, stats, &mut answered).await;
        stats.errors.inc();
        let address = dialer.address().to_owned();
        let wait = dialer.lost(answered);
        tracing::warn!(%address, retry_in = ?wait, "health discovery: {ended}; the checks go on");
        tokio::time::sleep(wait).await;
    }
}

/// Runs one stream until it is lost; `answered` is set once the server has said what to check.
async fn stream(
    dialer: &Dialer,
    node: &Node,
    reporter: &mut HealthReporter,
    stats: HealthStats,
    answered: &mut bool,
) -> Result<Infallible, Ended> {
    let mut client = Grpc::new(dialer.connect().await?);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    // A server that does not read stops the reports; it gets the newest when it does.
    let (sender, messages) = mpsc::channel(1);
    // There is room: this is the first.
    let _ = sender.try_send(first_message(node));
    stats.responses.inc();
    let method = PathAndQuery::from_static("/envoy.service.health.v3.HealthDiscoveryService/StreamHealthCheck");
    let call = client.streaming(dialer.request(ReceiverStream::new(messages)), method, Health::default());
    let mut answers = pin!(call.map_ok(tonic::Response::into_inner).try_flatten_stream());
    let mut last: Option<HealthCheckSpecifier> = None;
    // When the next report is due, and the time between two; nothing is told before the server has said what to check.
    let mut due: Option<(Instant, Duration)> = None;
    loop {
        let report = async {
            match due {
                Some((due, _)) => sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
            sender.reserve().await
        };
        tokio::select! {
            answer = answers.try_next() => {
                let specifier = answer?.ok_or(Ended::Closed)?;
                *answered = true;
                stats.requests.inc();
                if last.as_ref() == Some(&specifier) {
                    continue;
                }
                match reporter.assign(&specifier) {
                    Ok(interval) => {
                        stats.updates.inc();
                        let interval = interval.clamp(MIN_INTERVAL, MAX_INTERVAL);
                        if due.is_none_or(|(_, before)| before != interval) {
                            due = Some((Instant::now() + interval, interval));
                        }
                        last = Some(specifier);
                    }
                    Err(error) => {
                        stats.errors.inc();
                        tracing::warn!("health check specifier refused: {error}; what was checked before still is");
                    }
                }
            }
            place = report => {
                let Ok(place) = place else { return Err(Ended::Closed) };
                place.send(Message { request_type: Some(RequestType::EndpointHealthResponse(reporter.report())) });
                stats.responses.inc();
                due = due.map(|(_, interval)| (Instant::now() + interval, interval));
            }
        }
    }
}

/// The messages of the service; those of the server with the fields that the typed ones lack.
#[derive(Debug, Default)]
struct Health(ProstCodec<Message, HealthCheckSpecifier>);

impl Codec for Health {
    type Encode = Message;
    type Decode = HealthCheckSpecifier;
    type Encoder = ProstEncoder<Message>;
    type Decoder = Specifiers;

    fn encoder(&mut self) -> Self::Encoder {
        self.0.encoder()
    }

    fn decoder(&mut self) -> Specifiers {
        Specifiers
    }
}

#[derive(Debug)]
struct Specifiers;

impl Decoder for Specifiers {
    type Item = HealthCheckSpecifier;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<HealthCheckSpecifier>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        newer::decode_specifier(&bytes).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// Who asks for work, and what it can do: the same as Envoy, whose gRPC checks have no capability of their own.
fn first_message(node: &Node) -> Message {
    let protocols = [Protocol::Http, Protocol::Tcp];
    let capability = Capability { health_check_protocols: protocols.map(i32::from).into() };
    let request = HealthCheckRequest { node: Some(node.clone()), capability: Some(capability) };
    Message { request_type: Some(RequestType::HealthCheckRequest(request)) }
}
