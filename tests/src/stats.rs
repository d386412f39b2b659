//! Reads an Envoy-compatible admin interface.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::app::Client;
use crate::http1::Request;

/// How long the admin interface may take to answer.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Counters and gauges by name, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Stats(BTreeMap<String, u64>);

impl Stats {
    /// Reads the text of `/stats`; histograms and text readouts are left out.
    pub fn parse(text: &str) -> Self {
        let numbers = text.lines().filter_map(|line| line.split_once(": "));
        Self(numbers.filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?))).collect())
    }

    /// Asks the admin interface at `address` (`host:port`).
    pub fn read(address: &str) -> Result<Self> {
        Ok(Self::parse(&admin_get(address, "/stats")?))
    }

    /// The value of `name`; 0 if there is no such counter or gauge.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Whether `name` exists.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The sum of all whose name ends with `suffix`.
    pub fn sum(&self, suffix: &str) -> u64 {
        self.0.iter().filter(|(name, _)| name.ends_with(suffix)).map(|(_, value)| value).sum()
    }

    /// The names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// The body of a GET of `path` from the admin interface at `address`; fails unless the status is 200.
pub fn admin_get(address: &str, path: &str) -> Result<String> {
    let mut client = Client::new(&format!("http://{address}"))?.with_timeout(ADMIN_TIMEOUT);
    let response = client.send(Request::get(path).header("connection", "close"))?;
    ensure!(response.status == 200, "GET {path} of {address}: status {}: {}", response.status, response.text());
    Ok(response.text())
}
