//! How far payload of hops that stay on the node may go past TCP: why it may not at all, and the switches of run time.

use culvert_proxy_ebpf::Acceleration;
use serde::Serialize;

use super::config::InterceptionConfig;
use super::pods::acceleration_name;

/// Why nothing goes past TCP. The numbers are stable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Withheld {
    /// `shortcut_cgroup` is not set.
    NotConfigured,
    /// The kernel has known bugs there: which, in words.
    KernelBugs(String),
    /// The kernel does not say where it keeps what the programs read of sockets.
    NoTypes(String),
    /// The kernel does not take the programs.
    Refused(String),
}

impl Withheld {
    /// `interception.acceleration.withheld`; 0 is for no reason.
    pub(super) const fn number(&self) -> u32 {
        match self {
            Self::NotConfigured => 1,
            Self::KernelBugs(_) => 2,
            Self::NoTypes(_) => 3,
            Self::Refused(_) => 4,
        }
    }
}

impl std::fmt::Display for Withheld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotConfigured => f.write_str("shortcut_cgroup is not configured"),
            Self::KernelBugs(words) | Self::NoTypes(words) | Self::Refused(words) => f.write_str(words),
        }
    }
}

/// What was said at run time; it ends with the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Switches {
    /// Of the outbound and of the inbound listener.
    pub(super) listeners: [Acceleration; 2],
}

impl Default for Switches {
    fn default() -> Self {
        Self { listeners: [Acceleration::Joined; 2] }
    }
}

impl Switches {
    /// How far payload of each listener's connections may go now.
    pub(super) fn in_force(&self, config: &InterceptionConfig) -> [Acceleration; 2] {
        [0, 1].map(|index| self.listeners[index].min(config.listener_acceleration[index]))
    }
}

/// How far payload may go past TCP, for people.
#[derive(Clone, Debug, Serialize)]
pub struct AccelerationStatus {
    /// Whether anything can go past TCP.
    pub available: bool,
    /// Why nothing can: a number of docs/kernel.md.
    pub reason_number: Option<u32>,
    /// Why nothing can, in words.
    pub reason: Option<String>,
    /// Of pods of which nothing else is said.
    pub pods: &'static str,
    /// What `automatic` is on this kernel: `shortcut`, or `off` where programs would notice.
    pub automatic: &'static str,
    /// Each listener for redirected connections.
    pub listeners: Vec<ListenerAcceleration>,
}

/// How far payload of a listener's connections may go past TCP, for people.
#[derive(Clone, Debug, Serialize)]
pub struct ListenerAcceleration {
    /// Its name.
    pub name: String,
    /// As configured.
    pub configured: &'static str,
    /// As said at run time.
    pub run_time: &'static str,
    /// The lesser of these; pods may have less.
    pub in_force: &'static str,
}

impl AccelerationStatus {
    pub(super) fn new(
        config: &InterceptionConfig,
        switches: &Switches,
        withheld: Option<&Withheld>,
        noticed: bool,
    ) -> Self {
        let automatic = if noticed || withheld.is_some() { Acceleration::Off } else { Acceleration::Shortcut };
        let in_force = switches.in_force(config);
        let names = [&config.outbound_listener, &config.inbound_listener];
        let listener = |index: usize| ListenerAcceleration {
            name: names[index].clone(),
            configured: acceleration_name(config.listener_acceleration[index]),
            run_time: acceleration_name(switches.listeners[index]),
            in_force: acceleration_name(if withheld.is_some() { Acceleration::Off } else { in_force[index] }),
        };
        Self {
            available: withheld.is_none(),
            reason_number: withheld.map(Withheld::number),
            reason: withheld.map(ToString::to_string),
            pods: acceleration_name(config.policy.acceleration),
            automatic: acceleration_name(automatic),
            listeners: [0, 1].map(listener).to_vec(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_configuration_and_the_switch_the_least_counts() {
        let mut config = InterceptionConfig::default();
        let mut switches = Switches::default();
        assert_eq!(switches.in_force(&config), [Acceleration::Joined; 2]);
        config.listener_acceleration[1] = Acceleration::Off;
        switches.listeners = [Acceleration::Shortcut; 2];
        assert_eq!(switches.in_force(&config), [Acceleration::Shortcut, Acceleration::Off]);
        let status = AccelerationStatus::new(&config, &switches, None, false);
        assert_eq!((status.listeners[0].run_time, status.listeners[1].in_force), ("shortcut", "off"));
        assert_eq!((status.pods, status.automatic), ("automatic", "shortcut"));
        assert_eq!(AccelerationStatus::new(&config, &switches, None, true).automatic, "off");
    }

    #[test]
    fn what_is_withheld_has_its_number() {
        let withheld = Withheld::KernelBugs("bugs".to_owned());
        let status =
            AccelerationStatus::new(&InterceptionConfig::default(), &Switches::default(), Some(&withheld), false);
        assert_eq!((status.available, status.reason_number), (false, Some(2)));
        assert_eq!(status.reason.as_deref(), Some("bugs"));
        assert!(status.listeners.iter().all(|listener| listener.in_force == "off"));
    }
}
