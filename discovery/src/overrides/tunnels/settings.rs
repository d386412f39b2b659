//! Where tunnels may be, and how many connections each may have.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

/// What is configured about tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// An address of this host that proxies can reach.
    pub address: IpAddr,
    /// The ports for tunnels: one each.
    pub ports: RangeInclusive<u16>,
    /// The most connections of one tunnel at a time.
    pub max_connections: usize,
    /// How long a port that one revision had, or may have had before the start, is no other's: as long as a proxy may take to hear of it.
    pub quarantine: Duration,
}

/// The most connections of one tunnel, if nothing is said.
pub const MAX_CONNECTIONS: usize = 128;
/// How long ports are no other's, if nothing is said: proxies that have lost discovery look for it every 30 s at least.
pub const QUARANTINE: Duration = Duration::from_secs(35);

/// The longest time that can be stated.
const LONGEST_QUARANTINE: Duration = Duration::from_secs(3600);

/// `ADDRESS:FIRST-LAST[,quarantine=SECONDS]`.
impl FromStr for Settings {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, quarantine) = match text.split_once(",quarantine=") {
            Some((place, seconds)) => (place, seconds.parse().map(Duration::from_secs)),
            None => (text, Ok(QUARANTINE)),
        };
        let (address, ports) = place.rsplit_once(':').unwrap_or_default();
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let address = address.trim_start_matches('[').trim_end_matches(']').parse();
        match (address, first.parse(), last.parse(), quarantine) {
            (Ok(address), Ok(first), Ok(last), Ok(quarantine)) => {
                Settings { address, ports: first..=last, max_connections: MAX_CONNECTIONS, quarantine }.checked()
            }
            _ => Err(format!("`{text}` is not ADDRESS:FIRST-LAST[,quarantine=SECONDS], such as 10.0.0.5:19000-19099")),
        }
    }
}

impl Settings {
    /// These settings if they make sense.
    ///
    /// # Errors
    /// What does not.
    pub fn checked(self) -> Result<Self, String> {
        let Settings { address, ports, max_connections, quarantine } = &self;
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} is not an address that proxies could connect to"));
        }
        if ports.is_empty() || *ports.start() == 0 {
            return Err(format!("{}-{} has no port", ports.start(), ports.end()));
        }
        if *max_connections == 0 {
            return Err("0 connections would let nothing through".to_owned());
        }
        if *quarantine > LONGEST_QUARANTINE {
            return Err(format!("quarantine: at most {LONGEST_QUARANTINE:?}"));
        }
        Ok(self)
    }
}
