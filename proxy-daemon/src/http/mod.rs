//! The HTTP connection manager: from a downstream connection to filters, router and back.

mod aside;
pub mod at_end;
mod attempts;
mod begun;
pub mod body;
mod boxed;
mod buffered;
pub(crate) mod call;
mod changes;
mod choice;
mod cluster_choice;
pub mod codec;
mod conn_manager;
mod descriptors;
pub mod filters;
mod forward;
pub mod fuzz;
pub(crate) mod hash_policy;
pub(crate) mod headers;
mod hedge;
mod illegal;
mod internal_redirect;
mod io;
pub mod leaving;
mod live_log;
mod local_reply;
mod logged;
pub(crate) mod look;
pub mod match_input;
pub mod metadata;
mod mirror;
mod node;
mod normal;
mod observe;
pub(crate) mod path;
mod proxy_status;
mod redirect;
mod replay;
mod request;
pub(crate) mod request_id;
mod request_stats;
mod retry;
mod route_index;
mod route_match;
mod route_table;
mod scopes;
mod sizes;
mod stats;
pub mod stream;
mod stream_end;
pub(crate) mod strict_check;
mod timeouts;
mod timers;
mod token_bucket;
mod trust;
pub(crate) mod tunnel;
mod upgrade;
mod upstream_head;
mod waiting;

pub use conn_manager::{ConnectionManager, serve};
pub use node::set_node;
pub use route_match::MatchCx;
pub(crate) use route_match::{matches_any, value_of};
pub use route_table::{RouteRef, RouteSlot, RouteTable};
pub use scopes::{Routes, ScopeSlot, ScopeTable};

/// How access logs name a protocol.
pub(crate) fn protocol_name(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_09 | http::Version::HTTP_10 => "HTTP/1.0",
        http::Version::HTTP_2 => "HTTP/2",
        http::Version::HTTP_3 => "HTTP/3",
        _ => "HTTP/1.1",
    }
}
