//! `culvert clean`: removes all that a daemon left on a node.

use std::path::PathBuf;

use clap::Args;
use culvert_proxy_daemon::intercept::{DEFAULT_MARK, DEFAULT_PIN_PATH, DEFAULT_ROUTE_TABLE, clean};

/// Shown after the flags' help.
pub const HELP: &str = "\
A daemon that is told to end (SIGTERM) removes what it made. One that was killed leaves its kernel programs in place, so that
pods get what their failure policy says; this removes them: programs and their pins, the routing rule and route, and queueing
disciplines that are empty afterwards. It needs root and no daemon, and works on the network namespace that it runs in. While
a daemon runs it refuses.

Examples:
  culvert clean                                    what a daemon with the default settings left
  culvert clean --pin-path /sys/fs/bpf/node-a --mark 0xC18 --route-table 3096";

/// Flags of `culvert clean`: as the bootstrap extension has them.
#[derive(Debug, Args)]
pub struct Flags {
    /// `pin_path` of the extension
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PIN_PATH)]
    pin_path: PathBuf,

    /// `mark` of the extension
    #[arg(long, value_parser = number, default_value_t = DEFAULT_MARK)]
    mark: u32,

    /// `route_table` of the extension
    #[arg(long, value_parser = number, default_value_t = DEFAULT_ROUTE_TABLE)]
    route_table: u32,
}

/// A number, decimal or, with 0x, hexadecimal.
fn number(text: &str) -> Result<u32, std::num::ParseIntError> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

/// Removes, and tells what.
///
/// # Errors
/// A daemon runs, or something cannot be removed.
pub fn run(flags: &Flags) -> anyhow::Result<String> {
    let removed = clean(&flags.pin_path, flags.mark, flags.route_table)?;
    if removed.is_empty() {
        return Ok("nothing to remove\n".to_owned());
    }
    Ok(removed.into_iter().map(|what| format!("removed {what}\n")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_the_extension_shows_them() {
        assert_eq!((number("0xC17"), number("3095")), (Ok(0xC17), Ok(3095)));
        assert!(number("c17").is_err());
    }
}
