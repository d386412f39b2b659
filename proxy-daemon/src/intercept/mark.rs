//! The mark by which the node delivers packets to this daemon: its own connections must not have it.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

/// Written once, before there are connections; 0: there is none.
static OURS: AtomicU32 = AtomicU32::new(0);

/// Notes interception's mark.
pub(super) fn note(mark: u32) {
    OURS.store(mark, Ordering::Relaxed);
}

/// Refuses a mark for a connection of the daemon's own that would come back to it.
///
/// # Errors
/// It is interception's.
pub(crate) fn check(mark: u32) -> io::Result<()> {
    if mark == 0 || mark != OURS.load(Ordering::Relaxed) {
        return Ok(());
    }
    let reason = format!(
        "SO_MARK {mark:#x} is the mark of culvert.bootstrap.interception: the connection would come back to this daemon"
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interceptions_own_mark_is_refused() {
        assert!(check(0).is_ok() && check(0x7c17).is_ok());
        note(0x7c17);
        assert!(check(0).is_ok() && check(5).is_ok());
        assert!(check(0x7c17).unwrap_err().to_string().starts_with("SO_MARK 0x7c17 is the mark of"));
    }
}
