use std::{sync::Arc, time::Duration};

use culvert_xds_client::{ads::xdstp, source::Source};

/// How long a resource is waited for where the configuration does not say (`initial_fetch_timeout`).
pub const INITIAL_FETCH_TIMEOUT: Duration = Duration::from_secs(15);

/// A checked `ConfigSource`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSource {
    /// Where the resources come from.
    pub source: Arc<Source>,
    /// How long what waits for them waits; `None`: until they come.
    pub initial_fetch_timeout: Option<Duration>,
}

impl Default for ConfigSource {
    /// The aggregated stream, with Envoy's time.
    fn default() -> ConfigSource {
        ConfigSource { source: Arc::default(), initial_fetch_timeout: Some(INITIAL_FETCH_TIMEOUT) }
    }
}

/// A resource that is to be had from a source by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceRef {
    /// Its name; of the form `xdstp:`, in the one way that it is asked for and answered ([`xdstp::normalise`]).
    pub name: Arc<str>,
    /// Where it comes from.
    pub from: ConfigSource,
}

impl ResourceRef {
    /// The resource that a configuration names in any of the ways in which it can be written.
    pub fn new(name: &str, from: ConfigSource) -> ResourceRef {
        ResourceRef { name: xdstp::normalise(name).into(), from }
    }
}
