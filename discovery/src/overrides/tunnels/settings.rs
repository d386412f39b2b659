//! Where tunnels may be, and how many connections each may have.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// What is configured about tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// An address of this host that proxies can reach.
    pub address: IpAddr,
    /// The ports for tunnels: one each.
    pub ports: RangeInclusive<u16>,
    /// The most connections of one tunnel at a time.
    pub max_connections: usize,
}

/// The most connections of one tunnel, if nothing is said.
pub const MAX_CONNECTIONS: usize = 128;

/// `ADDRESS:FIRST-LAST`.
impl FromStr for Settings {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, ports) = text.rsplit_once(':').unwrap_or_default();
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let address = address.trim_start_matches('[').trim_end_matches(']').parse();
        match (address, first.parse(), last.parse()) {
            (Ok(address), Ok(first), Ok(last)) => {
                Settings { address, ports: first..=last, max_connections: MAX_CONNECTIONS }.checked()
            }
            _ => Err(format!("`{text}` is not ADDRESS:FIRST-LAST, such as 10.0.0.5:19000-19099")),
        }
    }
}

impl Settings {
    /// These settings if they make sense.
    ///
    /// # Errors
    /// What does not.
    pub fn checked(self) -> Result<Self, String> {
        let Settings { address, ports, max_connections } = &self;
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} is not an address that proxies could connect to"));
        }
        if ports.is_empty() || *ports.start() == 0 {
            return Err(format!("{}-{} has no port", ports.start(), ports.end()));
        }
        if *max_connections == 0 {
            return Err("0 connections would let nothing through".to_owned());
        }
        Ok(self)
    }
}
