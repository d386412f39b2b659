//! Ctrl-C in a program that has built a lab.

use std::process;
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use super::remove;

/// Tears down the lab `name` and ends the program when it is told to end. The signals are blocked in this thread and in
/// those it starts from now on; child processes start with none blocked (std::process resets the mask).
pub(super) fn remove_on_signal(name: String) -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context("blocking the termination signals")?;
    thread::Builder::new().name("lab-signals".to_owned()).spawn(move || {
        if let Ok(signal) = signals.wait() {
            eprintln!("\n{signal}: tearing down the lab {name}");
            // The other threads may be at work on the lab: what they make meanwhile, a second attempt removes.
            if let Err(error) = remove(&name).or_else(|_| remove(&name)) {
                eprintln!("{error:#}");
            }
            process::exit(130);
        }
    })?;
    Ok(())
}
