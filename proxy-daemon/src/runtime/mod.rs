//! Workers, and the handle by which the control thread gives them their configuration. See LIFECYCLE.md.

mod balancing;
mod data_plane;
mod routes;
mod worker;

pub use data_plane::{DataPlane, ListenerStatus, Options, PreparedListener};
pub use worker::Worker;
