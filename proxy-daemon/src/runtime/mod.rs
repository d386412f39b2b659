//! Workers, and the handle by which the control thread gives them their configuration. See LIFECYCLE.md.

pub mod allocator;
mod balancing;
pub(crate) mod clock;
mod data_plane;
mod routes;
mod sleeps;
mod worker;

pub use data_plane::{DataPlane, ListenerStatus, Options, PreparedListener};
pub use sleeps::{Lent, Sleeps};
pub use worker::Worker;
