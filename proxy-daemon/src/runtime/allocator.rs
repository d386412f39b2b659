//! What a worker is not to do for memory, each of which took it five milliseconds and more while many hosts were replaced:
//!
//! - To give back what was freed: left to itself, mimalloc has whichever thread allocates next do so, for all of them together.
//! - To touch a huge page first, for which the kernel has to make room, and a hypervisor may have to find memory.

use std::ffi::{c_int, c_long};
use std::time::Duration;

// Linked, and not called by name.
use mimalloc as _;

/// How often [`give_back`] is to be called, beside after large updates.
pub const EVERY: Duration = Duration::from_secs(10);

/// `mi_option_purge_delay` (`mimalloc.h` of version 3), in milliseconds.
const PURGE_DELAY: c_int = 15;
/// [`give_back`] comes long before, and has it begin anew.
const A_DAY: c_long = 24 * 60 * 60 * 1000;

// SAFETY: as the C library that the crate `mimalloc` links declares them; any thread may call them at any time.
unsafe extern "C" {
    safe fn mi_collect(force: bool);
    safe fn mi_option_set(option: c_int, value: c_long);
    #[cfg(test)]
    safe fn mi_option_get(option: c_int) -> c_long;
}

/// To be called before there are threads: has none of them give memory back by the way, for which [`give_back`] has to be called
/// from now on, and has no further huge pages made.
pub fn prepare() {
    mi_option_set(PURGE_DELAY, A_DAY);
    // A kernel that is built without them does not know the request.
    let _ = nix::sys::prctl::set_thp_disable(true);
}

/// Gives the kernel what the calling thread has freed, and whole pages that others have. Takes about a millisecond for each 4 MB.
pub fn give_back() {
    mi_collect(true);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number is of no stable interface.
    #[test]
    fn the_option_is_the_one_that_is_meant() {
        assert_eq!(mi_option_get(PURGE_DELAY), 1000, "mimalloc's default");
        prepare();
        assert_eq!(mi_option_get(PURGE_DELAY), A_DAY);
    }
}
