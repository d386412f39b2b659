use std::time::Duration;

use culvert_xds_client::source::Source;

/// Where resources come from, and how long they are waited for (`ConfigSource`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSource {
    /// Where they come from.
    pub source: Source,
    /// How long whoever needs the first resources waits for them before it goes on without; `None`: for as long as it
    /// takes.
    pub initial_fetch_timeout: Option<Duration>,
}

impl Default for ConfigSource {
    fn default() -> ConfigSource {
        ConfigSource { source: Source::Ads, initial_fetch_timeout: Some(Duration::from_secs(15)) }
    }
}
