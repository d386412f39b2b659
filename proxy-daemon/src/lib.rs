//! culvertd: the node proxy's data plane. One folder a concern, in the order in which a request meets them;
//! docs/architecture.md has the picture.

mod grpc_status;
#[macro_use]
mod write_to_held;

pub mod access_log;
pub mod admin;
pub mod bootstrap;
pub mod config;
pub mod http;
pub mod intercept;
pub mod layered_runtime;
pub mod listener;
pub mod network;
pub mod on_demand;
pub mod report;
pub mod runtime;
pub mod stats;
pub mod tasks;
pub mod tls;
pub mod upstream;
