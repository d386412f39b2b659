//! Programs that run in a node or a pod.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::netns::NetNs;

/// Where a program runs.
pub(super) struct Place<'a> {
    pub(super) netns: &'a NetNs,
    pub(super) cgroup: &'a Cgroup,
    /// The file to show as /etc/hosts, in a mount namespace of the program's own.
    pub(super) hosts: Option<CString>,
}

/// A program running in the lab. Dropping it kills it, unless its lab is kept.
pub struct Process {
    child: Child,
    command: String,
    stdout: PathBuf,
    stderr: PathBuf,
    keep: Arc<AtomicBool>,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it printed as errors.
    pub stderr: String,
    command: String,
}

impl Process {
    /// Starts `command` in `place`; its output goes to files in `dir`.
    pub(super) fn spawn(
        place: Place<'_>,
        dir: &Path,
        label: &str,
        command: &[&str],
        keep: Arc<AtomicBool>,
    ) -> Result<Self> {
        static SERIAL: AtomicU32 = AtomicU32::new(1);
        let [program, arguments @ ..] = command else { bail!("no program given for {label}") };
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let file = |suffix| dir.join(format!("{label}.{serial}.{suffix}"));
        let (stdout, stderr) = (file("out"), file("err"));

        let netns = place.netns.fd().as_raw_fd();
        // The child owns a copy of this descriptor until it executes the program (it is close-on-exec).
        let procs = place.cgroup.procs()?;
        let procs_fd = procs.as_raw_fd();
        let hosts = place.hosts;
        let mut spawn = Command::new(program);
        spawn
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            .process_group(0);
        // SAFETY: the closure runs between fork and exec and makes only system calls, on descriptors and strings that were
        // prepared before the fork and outlive it; it neither allocates nor takes locks.
        unsafe {
            spawn.pre_exec(move || enter(netns, procs_fd, hosts.as_deref()));
        }
        let command = command.join(" ");
        let child = spawn.spawn().with_context(|| format!("starting `{command}` in {}", place.netns.name()))?;
        Ok(Self { child, command, stdout, stderr, keep })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// What it has printed as errors so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// The file that receives its errors and log lines.
    pub fn stderr_path(&self) -> &Path {
        &self.stderr
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, signal).with_context(|| format!("sending {signal} to `{}`", self.command))
    }

    /// Fails, with the end of its errors, if the program has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("`{}` ended ({status}): {}", self.command, tail(&self.stderr())),
        }
    }

    /// Waits for the end of the program; when `deadline` has passed, kills it and fails.
    pub fn wait(mut self, deadline: Duration) -> Result<Finished> {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if start.elapsed() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("`{}` did not end within {deadline:?}: {}", self.command, tail(&self.stderr()));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let finished = Finished { status, stdout: self.stdout(), stderr: self.stderr(), command: self.command.clone() };
        Ok(finished)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.keep.load(Ordering::Relaxed) {
            return;
        }
        // Both fail only if the process has already been reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Finished {
    /// The output, if the program ended with status 0.
    pub fn success(self) -> Result<String> {
        if !self.status.success() {
            let how = match self.status.signal() {
                Some(signal) => format!("signal {signal}"),
                None => self.status.to_string(),
            };
            bail!("`{}` ended with {how}: {}", self.command, tail(&self.stderr));
        }
        Ok(self.stdout)
    }
}

/// Moves the calling process, a fresh fork, into a network namespace and a cgroup, and lays `hosts` over /etc/hosts.
fn enter(netns: RawFd, cgroup_procs: RawFd, hosts: Option<&std::ffi::CStr>) -> io::Result<()> {
    let check = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: the buffer is valid for the one byte written.
    let written = unsafe { libc::write(cgroup_procs, b"0".as_ptr().cast(), 1) };
    if written != 1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: no memory is passed.
    check(unsafe { libc::setns(netns, libc::CLONE_NEWNET) })?;
    let Some(hosts) = hosts else { return Ok(()) };
    // SAFETY: no memory is passed.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let slave = libc::MS_SLAVE | libc::MS_REC;
    // SAFETY: the strings are NUL-terminated; source, type and data may be null when only the propagation changes.
    check(unsafe { libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), slave, ptr::null()) })?;
    // SAFETY: the strings are NUL-terminated; type and data may be null for a bind mount.
    check(unsafe { libc::mount(hosts.as_ptr(), c"/etc/hosts".as_ptr(), ptr::null(), libc::MS_BIND, ptr::null()) })
}

fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The last lines of what a program printed, for error messages.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
