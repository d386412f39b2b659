//! `culvert acceleration`: how far payload between pods of a node may go past TCP.

use clap::{Args, ValueEnum};

use crate::{enroll, http};

/// Shown after the flags' help.
pub const HELP: &str = "\
It holds until the daemon ends; what is configured (acceleration, outbound_acceleration and inbound_acceleration of the
extension, and of its pods and selectors) is never exceeded. Less holds at once, also for open connections. `culvert status
--node` shows what is in force, and why nothing is.

Examples:
  culvert acceleration off                         all payload by TCP
  culvert acceleration shortcut --listener outbound
  culvert acceleration joined                      as far as is configured";

/// Flags of `culvert acceleration`.
#[derive(Debug, Args)]
pub struct Flags {
    /// How far it may go
    #[arg(value_enum)]
    level: Level,

    /// Of this listener's connections only
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,

    #[command(flatten)]
    admin: enroll::Admin,
}

/// How far payload may go past TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Not at all
    Off,
    /// From pods to the daemon where the kernel keeps it from programs
    Automatic,
    /// From pods to the daemon
    Shortcut,
    /// And from the daemon to pods
    BothWays,
    /// From pod to pod past the daemon, where it has nothing left to look at
    Joined,
}

impl Level {
    /// As the daemon knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Automatic => "automatic",
            Self::Shortcut => "shortcut",
            Self::BothWays => "both-ways",
            Self::Joined => "joined",
        }
    }
}

/// Tells the daemon.
///
/// # Errors
/// When the daemon cannot be asked, or refuses.
pub fn run(flags: &Flags) -> anyhow::Result<String> {
    let level = flags.level.name();
    let listener = flags.listener.as_ref().map(|name| format!("&listener={}", enroll::encoded(name)));
    let path = format!("/interception/acceleration?level={level}{}", listener.unwrap_or_default());
    http::post(flags.admin.url(), &path)?;
    let whose = flags.listener.as_ref().map_or_else(String::new, |name| format!(" of {name}"));
    Ok(format!("payload{whose} goes past TCP at most as far as: {level}\n"))
}
