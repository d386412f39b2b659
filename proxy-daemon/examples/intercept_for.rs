//! Intercepts pods for a program that is not culvertd: `cargo xtask bench node` has Envoy serve what culvertd's kernel programs
//! redirect, so that both are behind the same interception.
//!
//! `intercept_for <process> <port> <pin path> <pod's address>...`: the process listens on the port, transparently. Works in
//! the network namespace that it is started in, until it is killed.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use culvert_proxy_daemon::intercept::{Interception, InterceptionConfig, Pod, Policy};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [process, port, pin_path, pods @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: intercept_for <process> <port> <pin path> <pod's address>...");
    };
    let pod = |address: &String| {
        let address = address.parse().with_context(|| format!("`{address}` is no address"))?;
        Ok(Pod { address, policy: Policy::default() })
    };
    let config = InterceptionConfig {
        interfaces: vec!["veth-*".to_owned()],
        pods: pods.iter().map(pod).collect::<Result<_>>()?,
        pin_path: pin_path.into(),
        ..InterceptionConfig::default()
    };
    let interception = Interception::start(config, 1)?;
    let listener = listener_of(process.parse()?, port.parse()?)?;
    interception.set_listener(0, listener.as_fd())?;
    loop {
        std::thread::park();
    }
}

/// A copy of another process's listening socket.
fn listener_of(process: libc::pid_t, port: u16) -> Result<OwnedFd> {
    // SAFETY: takes a number and no flags; the result is a new descriptor, or negative.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    let pidfd = owned(opened).with_context(|| format!("opening process {process}"))?;
    let directory = format!("/proc/{process}/fd");
    for entry in fs::read_dir(&directory).with_context(|| directory.clone())? {
        let entry = entry?;
        let is_socket = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if !is_socket {
            continue;
        }
        // SAFETY: a descriptor of ours, the number of one of the other process's, and no flags.
        let copied = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
        let Ok(copy) = owned(copied) else { continue };
        let socket = socket2::SockRef::from(&copy);
        let at_port = socket.local_addr().ok().and_then(|it| it.as_socket()).is_some_and(|it| it.port() == port);
        if at_port && socket.is_listener().unwrap_or(false) {
            return Ok(copy);
        }
    }
    anyhow::bail!("process {process} does not listen on port {port}")
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: a descriptor that the kernel has just made, and that nobody else knows.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}
