//! The admin interface: Envoy's endpoints, texts and status codes, on a thread of its own.

mod certs;
mod clusters;
mod config_dump;
mod csds;
mod endpoints;
mod init_dump;
mod interception;
mod mask;
mod pretty;
mod request;
mod server;
mod stats;
mod xds_stats;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::Value as Json;
use tokio::sync::Notify;
use tracing::level_filters::LevelFilter;

use crate::{config::dump::Configuration, layered_runtime::Runtime, runtime::DataPlane, stats::Metric};

pub use server::run;
pub use xds_stats::xds_stats;

/// `ServerInfo.State`, as `/ready` and `server.state` show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ServerState {
    /// Serving.
    Live = 0,
    /// On its way out, or told to fail health checks.
    Draining = 1,
    /// The control plane has not answered yet.
    PreInitializing = 2,
    /// Waiting for what the configuration needs.
    Initializing = 3,
}

impl ServerState {
    /// Envoy's name of it.
    pub fn name(self) -> &'static str {
        match self {
            ServerState::Live => "LIVE",
            ServerState::Draining => "DRAINING",
            ServerState::PreInitializing => "PRE_INITIALIZING",
            ServerState::Initializing => "INITIALIZING",
        }
    }
}

/// The daemon's state, shared by those who change it and those who show it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SharedState(Arc<AtomicU8>);

impl SharedState {
    /// Begins as [`ServerState::PreInitializing`].
    pub fn new() -> SharedState {
        SharedState(Arc::new(AtomicU8::new(ServerState::PreInitializing as u8)))
    }

    /// The state now.
    pub fn get(&self) -> ServerState {
        match self.0.load(Ordering::Acquire) {
            0 => ServerState::Live,
            1 => ServerState::Draining,
            2 => ServerState::PreInitializing,
            _ => ServerState::Initializing,
        }
    }

    /// Changes the state.
    pub fn set(&self, state: ServerState) {
        self.0.store(state as u8, Ordering::Release);
    }
}

impl Default for SharedState {
    fn default() -> SharedState {
        SharedState::new()
    }
}

/// Reads statistics that are kept elsewhere. One that the registry has as well is shown as this says.
pub type ExtraStats = Box<dyn Fn() -> Vec<Metric> + Send + Sync>;

/// What the admin interface shows and changes.
pub struct AdminState {
    /// The data plane.
    pub data_plane: DataPlane,
    /// When the daemon began.
    pub started: Instant,
    /// Number of workers.
    pub concurrency: usize,
    /// The daemon's state; `/healthcheck/fail` and `/healthcheck/ok` change it.
    pub state: SharedState,
    /// `command_line_options` of `/server_info`.
    pub options: Json,
    /// `node` of `/server_info`.
    pub node: Json,
    /// What is configured.
    pub config: Arc<Configuration>,
    /// Sets the log level where one is given, and says which one is in force.
    pub log_level: Box<dyn Fn(Option<LevelFilter>) -> LevelFilter + Send + Sync>,
    /// What `/runtime` shows and `/runtime_modify` changes.
    pub runtime: Runtime,
    /// Woken by `/quitquitquit`.
    pub shutdown: Arc<Notify>,
    /// How long `/drain_listeners?graceful` leaves the listeners open (`--drain-time-s`).
    pub drain_time: Duration,
    /// For example the counters of the kernel's side.
    pub extra_stats: Vec<ExtraStats>,
}

/// The version as `/server_info` and `--version` print it, in Envoy's order: revision, version, state of the tree, kind of
/// build, TLS library.
pub fn version() -> String {
    let revision = option_env!("CULVERT_REVISION").unwrap_or("unknown");
    let build = if cfg!(debug_assertions) { "DEBUG" } else { "RELEASE" };
    format!("{revision}/{}/Distribution/{build}/none", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests;
