//! Who works with a pin path: at most one daemon holds its lease, which ends with the process.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// The lease of a pin path, or the wish for it.
pub(super) struct Lease {
    path: PathBuf,
    held: Option<Flock<File>>,
}

impl Lease {
    /// Takes the lease, if no other process has it.
    pub(super) fn take(path: &Path) -> io::Result<Self> {
        let mut lease = Self { path: path.to_owned(), held: None };
        lease.retry()?;
        Ok(lease)
    }

    /// Whether this process has it.
    pub(super) const fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Takes it if it is free by now.
    pub(super) fn retry(&mut self) -> io::Result<()> {
        if self.held.is_some() {
            return Ok(());
        }
        match Flock::lock(File::open(&self.path)?, FlockArg::LockExclusiveNonblock) {
            Ok(held) => self.held = Some(held),
            Err((_, nix::Error::EWOULDBLOCK)) => {}
            Err((_, errno)) => return Err(errno.into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lease::take(dir.path()).unwrap();
        let mut second = Lease::take(dir.path()).unwrap();
        assert!(first.is_held() && !second.is_held());
        second.retry().unwrap();
        assert!(!second.is_held());
        drop(first);
        second.retry().unwrap();
        assert!(second.is_held());
    }
}
