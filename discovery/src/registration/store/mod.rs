//! Where registrations are kept: memory, a database in a file, or Redis for several replicas.

mod embedded;
mod memory;
pub(crate) mod redis;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::host::{Host, HostKey};

/// Which storage, and where. Its text is `memory`, `redb:PATH` or `redis://...`.
#[derive(Clone, PartialEq, Eq)]
pub enum Storage {
    /// Lost with the process.
    Memory,
    /// A redb database in this file, for one process.
    Embedded(PathBuf),
    /// A Redis server, for any number of replicas.
    Redis(String),
}

impl FromStr for Storage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "memory" => Ok(Self::Memory),
            Some(("redb", path)) if !path.is_empty() => Ok(Self::Embedded(path.into())),
            Some(("redis" | "redis+unix", _)) => Ok(Self::Redis(text.to_owned())),
            _ => Err(format!(
                "`{text}` is not memory, redb:PATH, redis://[USER:PASSWORD@]HOST[:PORT][/DB] or redis+unix:///PATH"
            )),
        }
    }
}

/// Without the password of a Redis server.
impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Embedded(path) => write!(f, "redb:{}", path.display()),
            Self::Redis(url) => match (url.split_once("://"), url.rsplit_once('@')) {
                (Some((scheme, _)), Some((_, host))) => write!(f, "{scheme}://{host}"),
                _ => f.write_str(url),
            },
        }
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Storage({self})")
    }
}

impl Storage {
    pub(super) fn open(&self) -> Result<Box<dyn Store>, StoreError> {
        Ok(match self {
            Self::Memory => Box::new(memory::Memory::default()),
            Self::Embedded(path) => Box::new(embedded::Embedded::open(path)?),
            Self::Redis(url) => Box::new(redis::Redis::new(url)?),
        })
    }
}

/// What becomes of a host.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// It stays as it is, or away.
    Keep,
    /// It is this from now on.
    Put(Host),
    /// It goes.
    Remove,
}

/// Says what becomes of a host, given what is there.
pub type Changer<'a> = dyn Fn(Option<&Host>) -> Change + Send + Sync + 'a;

/// What a change did.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What was there.
    pub before: Option<Host>,
    /// What is there now.
    pub after: Option<Host>,
}

impl Outcome {
    fn new(before: Option<Host>, change: Change) -> Self {
        let after = match change {
            Change::Keep => before.clone(),
            Change::Put(host) => Some(host),
            Change::Remove => None,
        };
        Self { before, after }
    }

    /// Whether the store has to be written.
    fn writes(&self) -> bool {
        self.before != self.after
    }

    /// Whether others have to hear of it: heartbeats are too many.
    pub(super) fn is_news(&self) -> bool {
        match (&self.before, &self.after) {
            (Some(before), Some(after)) => before.differs_in_more_than_time(after),
            (None, None) => false,
            _ => true,
        }
    }
}

/// Tells whether a store has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Another one after the store lost its data.
    pub incarnation: u64,
    /// Another one after each change other than a heartbeat.
    pub count: u64,
}

/// Why a store could not do as asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// Keeps hosts.
#[tonic::async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// All hosts.
    async fn all(&self) -> Result<Vec<Host>, StoreError>;

    /// The hosts of one service, ordered by address.
    async fn of_service(&self, service: &str) -> Result<Vec<Host>, StoreError>;

    /// Changes one host in one step: nobody else changes it between `change`'s look at it and the write. `change` may be
    /// called more than once.
    async fn update(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, StoreError>;

    /// Changes when another process changed the store. What this process changes need not show.
    async fn version(&self) -> Result<Version, StoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storages_are_named_and_passwords_are_not_shown() {
        for (text, shown) in [
            ("memory", "memory"),
            ("redb:/var/lib/x.redb", "redb:/var/lib/x.redb"),
            ("redis://localhost:6379/2", "redis://localhost:6379/2"),
            ("redis://culvert:p@ss@localhost", "redis://localhost"),
        ] {
            assert_eq!(text.parse::<Storage>().unwrap().to_string(), shown);
        }
        for text in ["", "redb", "redb:", "disk:/x", "rediss://host"] {
            assert!(text.parse::<Storage>().unwrap_err().contains("is not memory, redb:PATH"), "{text}");
        }
        let redis = Storage::Redis("redis://u:secret@h".into());
        assert!(!format!("{:?}", redis.open().unwrap()).contains("secret"));
        assert!(Storage::Redis("redis://host:port".into()).open().is_err());
    }
}
