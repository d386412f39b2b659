//! Connections to a server for calls that are not xDS: load reports, health discovery.

use std::sync::Arc;
use std::time::Duration;

use tonic::transport::Channel;

use super::backoff::Backoff;
use super::stream::{self, Lost};
use crate::source::{GrpcService, Server};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct DialError(#[from] Lost);

/// Reaches a server again and again: its addresses in turn, with Envoy's jittered backoff between rounds.
#[derive(Debug)]
pub struct Dialer {
    server: Server,
    service: GrpcService,
    next: usize,
    backoff: Backoff,
}

impl Dialer {
    /// A dialer that has not dialed yet. `server` is the service's ([`Target::server`](crate::source::Target::server)).
    pub fn new(server: Server, service: GrpcService) -> Dialer {
        let backoff = Backoff::new(service.backoff);
        Dialer { server, service, next: 0, backoff }
    }

    /// The address that is next in turn; empty where the server has none.
    pub fn address(&self) -> &str {
        self.server.endpoints.get(self.next).map_or("", String::as_str)
    }

    /// Connects to [`address`](Self::address).
    ///
    /// # Errors
    /// The address is wrong, or nobody is there.
    pub async fn connect(&self) -> Result<Channel, DialError> {
        Ok(stream::connect(&self.server, self.address(), &self.service.authority, Arc::default()).await?)
    }

    /// The request of a call, with the metadata that is configured.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = stream::metadata(&self.service);
        request
    }

    /// The stream is lost: how long to wait before the next [`connect`](Self::connect). `answered`: the server had
    /// answered on it, so it is well.
    pub fn lost(&mut self, answered: bool) -> Duration {
        if answered {
            self.backoff.reset();
            return self.backoff.next();
        }
        self.next = (self.next + 1) % self.server.endpoints.len().max(1);
        if self.next == 0 { self.backoff.next() } else { Duration::ZERO }
    }
}
