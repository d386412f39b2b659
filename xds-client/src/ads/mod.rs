//! The xDS client as a state machine without I/O: both variants of the aggregated discovery service (ADS).
//!
//! Whoever owns the stream calls [`Core::connected`], sends what [`Core::outgoing`] returns, passes each response to
//! [`Core::handle`], applies the [`Update`] that may come of it, and reports back with [`Core::finish`]; only that
//! makes the core acknowledge the response. [`crate::grpc`] is such an owner.
//!
//! What survives a lost stream is what has been accepted: the versions of the resources in force.

mod core;
mod delta;
mod entries;
mod nack;
mod resource;
mod sotw;
mod subscription;
pub mod xdstp;

use std::collections::BTreeSet;
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};

pub use self::core::Core;
pub(crate) use self::{nack::detail as nack_detail, resource::name_in};
use crate::{Any, source::Source};

/// Type URLs of the resource types that the protocol itself treats specially.
pub mod type_url {
    /// RTDS.
    pub const RUNTIME: &str = "type.googleapis.com/envoy.service.runtime.v3.Runtime";
    /// CDS.
    pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    /// EDS.
    pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    /// LDS.
    pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
    /// RDS.
    pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
    /// ECDS.
    pub const EXTENSION_CONFIG: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
    /// SRDS.
    pub const SCOPED_ROUTES: &str = "type.googleapis.com/envoy.config.route.v3.ScopedRouteConfiguration";
    /// VHDS.
    pub const VIRTUAL_HOST: &str = "type.googleapis.com/envoy.config.route.v3.VirtualHost";
    /// SDS.
    pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
}

/// The two forms of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    /// State of the world: a response holds all resources of its type.
    Sotw,
    /// Incremental: a response holds what changed.
    Delta,
}

/// Which resources of a type are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Interest {
    /// None.
    #[default]
    None,
    /// All that the server has for this node.
    Wildcard,
    /// Those with these names.
    Names(BTreeSet<String>),
    /// All, and those with these names even where the server would not have sent them by itself (on demand).
    WildcardAnd(BTreeSet<String>),
}

/// A resource as the server sent it, its body not yet decoded.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Resource {
    /// What the resource is subscribed to by, in the one form that [`xdstp`] names have.
    pub name: String,
    /// Other names that it can be subscribed to by (VHDS).
    pub aliases: Vec<String>,
    /// The server's version of it: its own where it has one, else that of the response.
    pub version: String,
    /// The resource itself.
    pub body: Any,
    /// It is not to be kept where it would outlive this client (`cache_control`).
    pub do_not_cache: bool,
}

/// What a response asks for, or the end of resources whose time to live has run out.
///
/// That there is one is the server's first answer for the type; of a name, that it is in any of the lists.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Update {
    /// The type of all resources in here.
    pub type_url: String,
    /// The response's version. Empty where an incremental server names none, and when a time to live has run out.
    pub version: String,
    /// New, changed and possibly unchanged resources, in the server's order; only wanted ones, no name twice.
    pub added: Vec<Resource>,
    /// Resources in the response that are byte for byte what is in force. A newer version that was refused is void. Only their
    /// names: an incremental server may have given them another version, which is what it is told of the next time, and not who
    /// owns them.
    pub unchanged: Vec<Arc<str>>,
    /// Resources that were handed out and are gone: removed by the server where that is obeyed (see [`Core`]), in both
    /// variants, or past their time to live. Also those of which no version was ever taken.
    pub removed: Vec<String>,
    /// Names asked for, and aliases, that an incremental server has nothing under. What is in force stays.
    pub absent: Vec<String>,
    /// `added` and `unchanged` are all there is: whatever was handed out before and was not sent is in `removed`.
    pub complete: bool,
}

/// A resource that is not taken; its last accepted version stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The resource's name.
    pub name: String,
    /// Why, with the path of the field at fault. Goes to the server.
    pub message: String,
}

/// What became of an [`Update`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Resources of the update that were not taken. All others are in force.
    pub rejected: Vec<Rejection>,
}

/// Applies updates.
pub trait Sink: Send + Sync + 'static {
    /// Brings the update into force, now or later, and says so with `done`: only then is the response answered. Other
    /// types' updates may come in between, and the next of the same type as well.
    fn update(&self, source: &Source, update: Update, done: Done);

    /// An attempt to get resources has failed: a stream is lost or did not come about, a poll failed, a file cannot be read.
    /// `type_url`: those that were asked for; `None`: all types of the source.
    fn failed(&self, source: &Source, type_url: Option<&str>) {
        let _ = (source, type_url);
    }

    /// There was a file or an answer to a poll, and nothing of it to be brought into force: it only counts.
    fn counted(&self, source: &Source, type_url: &str, answer: Counted) {
        let _ = (source, type_url, answer);
    }

    /// A stream to the source came up, or was lost.
    fn state(&self, source: &Source, connected: bool) {
        let _ = (source, connected);
    }
}

/// A file or an answer to a poll that only counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// It is what the last one was, byte for byte; whether nothing of that was rejected.
    Same {
        /// As a whole. Not known yet counts as accepted.
        accepted: bool,
    },
    /// The server says that nothing has changed (status 304).
    Unmodified,
    /// It cannot be used.
    Rejected,
}

/// To be told what became of an update. Dropped without that, the response counts as never received.
pub struct Done(Option<Box<dyn FnOnce(Option<Outcome>) + Send>>);

impl Done {
    /// Calls `then` with the outcome, or without one when it is dropped.
    pub fn new(then: impl FnOnce(Option<Outcome>) + Send + 'static) -> Done {
        Done(Some(Box::new(then)))
    }

    /// The update has been applied, but for what was rejected.
    pub fn finish(mut self, outcome: Outcome) {
        if let Some(then) = self.0.take() {
            then(Some(outcome));
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(then) = self.0.take() {
            then(None);
        }
    }
}

/// A message to the server.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Of the state-of-the-world variant.
    Sotw(DiscoveryRequest),
    /// Of the incremental variant.
    Delta(DeltaDiscoveryRequest),
}

/// A message from the server.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// Of the state-of-the-world variant.
    Sotw(DiscoveryResponse),
    /// Of the incremental variant.
    Delta(DeltaDiscoveryResponse),
}

/// What [`Core::handle`] makes of a response.
#[derive(Debug, PartialEq)]
pub enum Handled {
    /// To be applied, and then reported to [`Core::finish`] with the token.
    Update(Token, Update),
    /// Not to be answered.
    Ignored(Ignored),
}

/// Why a response is not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Ignored {
    /// There is no stream that it could have come from.
    #[error("there is no stream")]
    NotConnected,
    /// It is of the variant that is not spoken.
    #[error("it is of the other protocol variant")]
    WrongVariant,
    /// Nothing of its type was asked for on this stream.
    #[error("nothing of its type was asked for")]
    UnknownType,
}

/// Names the response that an [`Outcome`] is about. Of one type, later ones are greater.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token {
    /// The type.
    key: (u8, String),
    token: u64,
}

#[cfg(test)]
mod concurrency_tests;
#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod ttl_tests;
#[cfg(test)]
mod wildcard_tests;
