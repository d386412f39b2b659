//! Kubernetes' API servers: where one is and who we are to it ([`config`], [`auth`]), requests ([`connection`]), and all
//! objects of a kind, for ever ([`watch`]). And what stands in for them: manifests in a directory ([`directory`]). What an
//! object means is its readers' affair.

pub mod auth;
pub mod config;
pub mod connection;
pub mod directory;
mod selector;
pub mod watch;

pub use config::KubernetesConfig;
pub use connection::Access;
pub use watch::{Object, Objects, Selection, Watch};
