//! What can go wrong with interception, told so that an operator knows what to do next.

use std::io;
use std::path::PathBuf;

/// Why interception could not start, change or stop.
#[derive(Debug, thiserror::Error)]
pub enum InterceptError {
    /// The process may not load kernel programs or change routing.
    #[error(
        "interception needs root (or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON) to {action}: run culvertd \
         as root, or remove the bootstrap extension culvert.bootstrap.interception"
    )]
    Permission {
        /// What was refused.
        action: &'static str,
    },
    /// The kernel has not what interception cannot do without.
    #[error(
        "interception needs Linux 5.14, and this is {release}: without the bootstrap extension \
         culvert.bootstrap.interception culvertd serves here, and intercepts nothing"
    )]
    TooOld {
        /// The running kernel's release.
        release: String,
    },
    /// The kernel refused the programs or maps.
    #[error("the kernel refused interception's program or map {name}: {reason}; docs/kernel.md lists what it needs")]
    Load {
        /// The program or map.
        name: String,
        /// The kernel's or the loader's words.
        reason: String,
    },
    /// A program could not be attached to a network interface.
    #[error("cannot attach {program} to interface {interface}: {reason}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface.
        interface: String,
        /// The kernel's or the loader's words.
        reason: String,
    },
    /// A routing rule, a route or the list of interfaces could not be had by netlink.
    #[error("cannot {action}: {source}")]
    Netlink {
        /// What was tried.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The pin path is no directory on a BPF file system.
    #[error("pin_path {path}: {reason}")]
    PinPath {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The directory for the short cut is no cgroup v2 directory.
    #[error("shortcut_cgroup {path}: {reason}")]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A program could not be attached to a cgroup.
    #[error("{field} {path}: {reason}")]
    Hooks {
        /// The field of the extension that names the cgroup.
        field: &'static str,
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A map has no room.
    #[error("the kernel's map {name} is full: fewer services or backends have to be balanced")]
    Full {
        /// The map.
        name: &'static str,
    },
    /// A listening socket cannot receive redirected connections.
    #[error("worker {worker}'s listener cannot receive redirected connections: {reason}")]
    Listener {
        /// The worker's number.
        worker: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A pod cannot be enrolled, or taken out, by command.
    #[error("{0}")]
    Command(String),
    /// What was enrolled by command is not known.
    #[error("state_path {path}: {reason}")]
    StateFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Manifests of pods cannot be followed.
    #[error("enrolment.pod_manifests {path}: {reason}")]
    Manifests {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A daemon works with what was to be cleaned.
    #[error("a culvertd works with {path}: end it first (SIGTERM), it cleans up after itself")]
    InUse {
        /// The pin path.
        path: PathBuf,
    },
    /// Something that interception made could not be removed.
    #[error("cannot remove what interception made: {0}")]
    Remove(String),
}

impl InterceptError {
    /// A failed netlink request: permission errors get their own text.
    pub(super) fn netlink(action: impl Into<String>, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::PermissionDenied {
            Self::Permission { action: "change routing" }
        } else {
            Self::Netlink { action: action.into(), source }
        }
    }

    /// A failed insertion: a full map has its own text.
    pub(super) fn full_or(name: &'static str, error: &(dyn std::error::Error + 'static)) -> Self {
        if caused_by(error, nix::libc::E2BIG) || caused_by(error, nix::libc::ENOSPC) {
            Self::Full { name }
        } else {
            Self::load(name, error)
        }
    }

    /// A failed load: permission errors get their own text.
    pub(super) fn load(name: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        if caused_by(error, nix::libc::EPERM) {
            Self::Permission { action: "load kernel programs" }
        } else {
            Self::Load { name: name.to_owned(), reason: chain(error) }
        }
    }
}

/// An error and what caused it, in one line.
pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Wrappers often repeat what they wrap.
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    // A verifier's log has hundreds of lines: the last one says why, but for those of how much it did.
    let is_sum = |line: &str| line.starts_with("processed ") || line.starts_with("stack depth ");
    let tells = |line: &&str| !line.trim().is_empty() && !is_sum(line);
    let lines: Vec<&str> = text.lines().filter(tells).collect();
    match lines.as_slice() {
        [first, middle @ .., last] if middle.len() > 2 => format!("{first} … {last}"),
        lines => lines.join(" "),
    }
}

fn caused_by(error: &(dyn std::error::Error + 'static), errno: i32) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.raw_os_error() == Some(errno)
        {
            return true;
        }
        cause = error.source();
    }
    false
}
