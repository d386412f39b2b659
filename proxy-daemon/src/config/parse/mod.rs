//! Envoy's messages -> [`model`](super::model).
//!
//! Two steps. [`support::check`] walks a message by its descriptor and refuses, with its full path, every field that is set and
//! that the table of honoured fields does not list: what is not listed can never be accepted and ignored. The functions here
//! then read the honoured fields.

mod access_log;
mod bind;
mod bootstrap;
mod cluster;
mod common;
mod config_source;
mod deprecated;
mod dns;
mod dynamic_forward_proxy;
mod endpoint;
mod forwarded_cert;
mod hash_policy;
mod hcm_extensions;
mod health_check;
pub mod honoured;
mod http1;
mod http_connection_manager;
mod internal_redirect;
mod layered_runtime;
mod listener;
mod load_balancing;
mod local_reply;
mod match_tree;
pub(crate) mod matcher;
pub(crate) mod metadata_match;
mod mirror;
mod orca;
mod outlier_detection;
mod peer_name;
mod pool;
mod rate_limit;
mod redis;
mod retry;
mod route;
mod route_action;
mod route_matcher;
mod scoped_routes;
mod secret_files;
pub mod support;
#[cfg(test)]
mod support_doc;
mod tcp_proxy;
mod tls;
mod upgrade;
pub(super) mod uri_template;

pub(crate) use access_log::substitution;
pub use bootstrap::{Bootstrap, StaticSecret, bootstrap};
pub use cluster::cluster;
pub(crate) use common::type_name;
pub(crate) use common::{
    added_value, cidr, duration, fraction, headers_to_add, inline_text, runtime_flag, runtime_fraction, runtime_switch,
    status,
};
pub use config_source::{called_grpc_service, config_source, grpc_service};
pub(crate) use dynamic_forward_proxy::dns_cache;
pub use endpoint::endpoints;
pub use health_check::{HealthCheckTarget, HealthChecks, health_check_specifier};
pub use http_connection_manager::extension_config;
pub use layered_runtime::runtime_values;
pub use listener::listener;
pub(crate) use local_reply::body_format;
pub(crate) use match_tree::{MatchParts, match_tree};
pub(crate) use matcher::{request_header_input, unknown_action};
pub(crate) use rate_limit::{metadata_place, rate_limits};
pub(crate) use retry::of_calls as retry_policy_of_calls;
pub(crate) use route::redirect;
pub use route::{route_config, virtual_host};
pub use scoped_routes::scoped_route;
pub use secret_files::{SecretWithFiles, discovered_secret, watched_directories, with_origins};
pub(crate) use tls::data_source;
pub use tls::secret;

#[cfg(test)]
mod tests;
