//! What the data plane reads: plain, checked, shared by `Arc`, and free of protobuf.

mod access_log;
mod bind;
mod cidr;
mod cluster;
mod dns;
mod hcm;
mod health;
mod health_check;
mod listener;
mod load_balancing;
mod local_reply;
mod match_tree;
mod rate_limit;
mod route;
mod scoped;
mod source;
mod tls;
mod trust;

pub use access_log::*;
pub use bind::*;
pub use cidr::*;
pub use cluster::*;
pub use dns::*;
pub use hcm::*;
pub use health::*;
pub use health_check::*;
pub use listener::*;
pub use load_balancing::*;
pub use local_reply::*;
pub use match_tree::*;
pub use rate_limit::*;
pub use route::*;
pub use scoped::*;
pub use source::*;
pub use tls::*;
pub use trust::*;
