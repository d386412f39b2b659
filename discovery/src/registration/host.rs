//! A registered host: its fields, its checks, and how the API shows it.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

/// The longest service, repository name and revision, in bytes.
pub const MAX_NAME: usize = 253;
/// The most bytes of a host's tags, as JSON.
pub const MAX_TAGS: usize = 16 * 1024;

/// What identifies a host. Ordered by service, then address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostKey {
    /// The service.
    pub service: String,
    /// The address.
    pub ip_address: Ipv4Addr,
}

impl HostKey {
    /// The key that sorts before all other keys of a service.
    #[must_use]
    pub fn first_of(service: &str) -> Self {
        Self { service: service.to_owned(), ip_address: Ipv4Addr::UNSPECIFIED }
    }
}

/// A registered host, as it is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// The service that it belongs to.
    pub service: String,
    /// Its address.
    pub ip_address: Ipv4Addr,
    /// The repository of the service. Empty if not stated.
    pub service_repo_name: String,
    /// The port on which it takes connections, not 0.
    pub port: u16,
    /// What it runs.
    pub revision: String,
    /// When it was heard of last, in microseconds since the epoch.
    pub last_check_in: i64,
    /// What else is known of it. `az`, `region` and `instance_id` are always there.
    pub tags: Map<String, Value>,
}

impl Host {
    /// What identifies it.
    #[must_use]
    pub fn key(&self) -> HostKey {
        HostKey { service: self.service.clone(), ip_address: self.ip_address }
    }

    /// As the API shows it.
    #[must_use]
    pub fn as_answer(&self) -> Value {
        json!({
            "service": self.service,
            "ip_address": self.ip_address.to_string(),
            "service_repo_name": self.service_repo_name,
            "port": self.port,
            "revision": self.revision,
            "last_check_in": in_words(self.last_check_in),
            "tags": self.tags,
        })
    }

    /// This registration with the tags that an earlier one of the same host had besides: a weight that was set by the
    /// API outlives heartbeats. `None` if that makes too many tags.
    #[must_use]
    pub fn merged_into(mut self, earlier: Option<&Host>) -> Option<Host> {
        if let Some(earlier) = earlier {
            for (name, value) in &earlier.tags {
                if !self.tags.contains_key(name) {
                    self.tags.insert(name.clone(), value.clone());
                }
            }
        }
        tags_fit(&self.tags).then_some(self)
    }

    /// Whether the two differ in anything but the time of the last heartbeat.
    #[must_use]
    pub fn differs_in_more_than_time(&self, other: &Host) -> bool {
        let Host { service, ip_address, service_repo_name, port, revision, last_check_in: _, tags } = self;
        *service != other.service
            || *ip_address != other.ip_address
            || *service_repo_name != other.service_repo_name
            || *port != other.port
            || *revision != other.revision
            || *tags != other.tags
    }

    /// A tag that is text, empty if it is not.
    #[must_use]
    pub fn tag(&self, name: &str) -> &str {
        self.tags.get(name).and_then(Value::as_str).unwrap_or_default()
    }
}

/// Whether tags are within [`MAX_TAGS`].
#[must_use]
pub fn tags_fit(tags: &Map<String, Value>) -> bool {
    // Text of a map whose keys are text cannot fail to be written.
    serde_json::to_string(tags).is_ok_and(|text| text.len() <= MAX_TAGS)
}

/// A time as the answers state it: `2018-05-21 22:01:10.123456+00:00`.
fn in_words(microseconds: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(microseconds) * 1000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (year, month, day) = time.to_calendar_date();
    let (hour, minute, second, microsecond) = time.to_hms_micro();
    let fraction = if microsecond == 0 { String::new() } else { format!(".{microsecond:06}") };
    format!("{year:04}-{:02}-{day:02} {hour:02}:{minute:02}:{second:02}{fraction}+00:00", u8::from(month))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_they_always_did() {
        assert_eq!(in_words(1_526_940_070_123_456), "2018-05-21 22:01:10.123456+00:00");
        // Whole seconds have no fraction, and small fractions keep their zeros.
        assert_eq!(in_words(1_526_940_070_000_000), "2018-05-21 22:01:10+00:00");
        assert_eq!(in_words(1_526_940_070_000_045), "2018-05-21 22:01:10.000045+00:00");
        assert_eq!(in_words(i64::MAX), "1970-01-01 00:00:00+00:00");
    }
}
