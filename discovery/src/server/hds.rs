//! HDS: tells proxies which endpoints to check, and takes in what they find out.

use std::pin::Pin;
use std::sync::Arc;

use envoy_types::pb::envoy::service::health::v3::health_check_request_or_endpoint_health_response::RequestType;
use envoy_types::pb::envoy::service::health::v3::health_discovery_service_server::HealthDiscoveryService;
use envoy_types::pb::envoy::service::health::v3::{
    EndpointHealthResponse, HealthCheckRequest, HealthCheckRequestOrEndpointHealthResponse as Message,
    HealthCheckSpecifier,
};
use futures_util::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use super::authorization::Authorization;
use super::tls::Identity;
use super::{asked, viewer};
use crate::health::Checks;

/// The service, for one client.
#[derive(Debug, Clone)]
pub(super) struct Hds {
    pub(super) checks: Checks,
    pub(super) authorization: Arc<Authorization>,
    pub(super) identity: Arc<Identity>,
    pub(super) shutdown: watch::Receiver<bool>,
}

impl Hds {
    async fn run(
        mut self,
        mut messages: Streaming<Message>,
        answers: mpsc::Sender<Result<HealthCheckSpecifier, Status>>,
    ) {
        let first = tokio::select! {
            first = messages.message() => first,
            () = answers.closed() => return,
            () = asked(&mut self.shutdown) => return,
        };
        let Ok(Some(Message { request_type })) = first else { return };
        let request = match request_type {
            Some(RequestType::HealthCheckRequest(request)) => self.admit(request),
            _ => Err(Status::invalid_argument("the first message has to be a health_check_request")),
        };
        let HealthCheckRequest { node, capability } = match request {
            Ok(request) => request,
            Err(refusal) => {
                let _ = answers.send(Err(refusal)).await;
                return;
            }
        };
        let node = node.unwrap_or_default();
        info!("node `{}` checks endpoints", node.id);
        let mut checker = self.checks.join(&node, viewer(&node), &capability.unwrap_or_default());
        loop {
            let message = tokio::select! {
                message = messages.message() => message,
                specifier = checker.work() => {
                    if answers.send(Ok(HealthCheckSpecifier::clone(&specifier))).await.is_err() {
                        return;
                    }
                    continue;
                }
                () = answers.closed() => return,
                () = asked(&mut self.shutdown) => return,
            };
            match message {
                Ok(Some(Message { request_type: Some(RequestType::EndpointHealthResponse(report)) })) => {
                    checker.report(&report);
                }
                // Envoy's way to say that it has nothing to check.
                Ok(Some(Message { request_type: None })) => checker.report(&EndpointHealthResponse::default()),
                Ok(Some(Message { request_type: Some(RequestType::HealthCheckRequest(_)) })) => {
                    let twice = Status::invalid_argument("a stream has one health_check_request, its first message");
                    let _ = answers.send(Err(twice)).await;
                    return;
                }
                Ok(None) => return,
                Err(status) => {
                    debug!("node `{}`: health reports: {status}", node.id);
                    return;
                }
            }
        }
    }

    fn admit(&self, request: HealthCheckRequest) -> Result<HealthCheckRequest, Status> {
        self.authorization.check_health(&self.identity, request.node.as_ref())?;
        if request.node.as_ref().is_none_or(|node| node.id.is_empty()) {
            return Err(Status::invalid_argument("health_check_request.node.id is needed: reports count by node"));
        }
        Ok(request)
    }
}

#[tonic::async_trait]
impl HealthDiscoveryService for Hds {
    type StreamHealthCheckStream = Pin<Box<dyn Stream<Item = Result<HealthCheckSpecifier, Status>> + Send>>;

    async fn stream_health_check(
        &self,
        request: Request<Streaming<Message>>,
    ) -> Result<Response<Self::StreamHealthCheckStream>, Status> {
        let (answers, stream) = mpsc::channel(1);
        tokio::spawn(self.clone().run(request.into_inner(), answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn fetch_health_check(&self, _request: Request<Message>) -> Result<Response<HealthCheckSpecifier>, Status> {
        Err(Status::unimplemented("health discovery is by streams here"))
    }
}
