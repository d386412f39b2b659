//! What Culvert's end-to-end tests and its demo are made of: the [`lab`] (nodes and pods out of network namespaces), the
//! programs that run in it ([`app`], [`load`]), the [`scenario`] that both show, a daemon without a lab
//! ([`daemon`]), [`server`]s behind it, a [`name_server`], control planes: one that the test plays ([`control_plane`]), and ones that are not ours ([`peers`]); and a
//! server that proxies report to ([`report_server`]).

pub mod app;
pub mod binaries;
pub mod bootstrap;
#[cfg(feature = "control-plane")]
pub mod control_plane;
pub mod daemon;
pub mod http1;
pub mod lab;
pub mod load;
pub mod name_server;
pub mod peers;
#[cfg(feature = "control-plane")]
pub mod report_server;
pub mod scenario;
pub mod server;
pub mod stats;

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Calls `attempt` every 20 ms until it succeeds and returns its value. Fails with its last error when `deadline` has
/// passed; `what` names the thing waited for.
pub fn wait_until<T>(deadline: Duration, what: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() >= deadline => {
                return Err(error).with_context(|| format!("waited {deadline:?} in vain for {what}"));
            }
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}
