//! Everything Culvert speaks of Envoy's configuration API.
//!
//! - [`json`]: Envoy's JSON and YAML form of its messages: strict parsing, validation rules, `/config_dump` output.
//! - [`ads`]: the xDS client as a state machine without I/O, state of the world and delta.
//! - [`sources`]: all sources of resources, each with a client of its own; [`source`] says what they are.
//! - [`grpc`]: drives [`ads`] over a gRPC stream.
//! - [`resource_type`]: the services of each resource type; [`stats`]: what all clients count.
//! - [`api`]: Culvert's own messages, generated from `proto/`.
//! - [`watches`]: files that are replaced.
//! - [`overrides`]: how a request carries staging overrides.

pub mod ads;
mod aside;
mod connect;
mod document;
mod driver;
mod file;
pub mod grpc;
pub mod json;
pub mod overrides;
pub mod regular_file;
pub mod resource_type;
mod rest;
pub mod source;
pub mod sources;
pub mod stats;
#[cfg(test)]
mod test_sink;
pub mod tls_error;
pub mod watches;

/// Culvert's own messages, generated from `proto/`.
#[allow(missing_docs, clippy::all, reason = "generated code; the protos hold the documentation")]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/api.rs"));
}

pub use aside::aside;
pub use envoy_types::pb::google::protobuf::Any;
