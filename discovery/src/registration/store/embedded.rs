//! Registrations in a file, by the embedded database redb: they survive a restart.

use std::path::Path;
use std::time::{Duration, Instant};

use redb::{Database, Durability, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tokio::task::block_in_place;

use super::{Changer, Outcome, Store, StoreError, Version};
use crate::registration::host::{Host, HostKey};

/// Service, NUL and address to the host as JSON.
const HOSTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("hosts");

/// How long another process may take to end that has the database, and how often it is looked.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(50);

fn is_taken(error: &redb::Error) -> bool {
    matches!(error, redb::Error::DatabaseAlreadyOpen)
}

/// A database file, which one process at a time can open.
#[derive(Debug)]
pub(super) struct Embedded {
    database: Database,
}

impl Embedded {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let open = || -> Result<Database, redb::Error> {
            let database = Database::create(path)?;
            // So that reading finds it.
            let transaction = database.begin_write()?;
            transaction.open_table(HOSTS)?;
            transaction.commit()?;
            Ok(database)
        };
        // One that was killed may hold it for a moment longer.
        let started = Instant::now();
        let opened = loop {
            match open() {
                Err(error) if is_taken(&error) && started.elapsed() < LOCK_PATIENCE => std::thread::sleep(LOCK_RETRY),
                opened => break opened,
            }
        };
        let database = opened.map_err(|error| {
            let hint = if is_taken(&error) { " (one process can use it at a time)" } else { "" };
            StoreError(format!("cannot open the database {}: {error}{hint}", path.display()))
        })?;
        Ok(Self { database })
    }

    fn read(&self, from: &str, to: &str) -> Result<Vec<Host>, redb::Error> {
        let table = self.database.begin_read()?.open_table(HOSTS)?;
        let mut hosts = Vec::new();
        for entry in table.range(from..to)? {
            let (_, value) = entry?;
            // What an older or newer program wrote and this one cannot read is left alone.
            hosts.extend(serde_json::from_slice::<Host>(value.value()));
        }
        // Addresses sort as text in the table.
        hosts.sort_by_key(Host::key);
        Ok(hosts)
    }

    fn write(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, redb::Error> {
        let key = format!("{}\0{}", key.service, key.ip_address);
        let mut transaction = self.database.begin_write()?;
        let outcome;
        {
            let mut table = transaction.open_table(HOSTS)?;
            let before = table.get(&*key)?.and_then(|value| serde_json::from_slice(value.value()).ok());
            let change = change(before.as_ref());
            outcome = Outcome::new(before, change);
            if !outcome.writes() {
                return Ok(outcome);
            }
            match &outcome.after {
                Some(host) => {
                    let text = serde_json::to_vec(host).map_err(std::io::Error::from)?;
                    table.insert(&*key, &*text)?;
                }
                None => {
                    table.remove(&*key)?;
                }
            }
        }
        // To lose the last heartbeats in a power cut costs nothing, to wait for the disk at each of them does.
        transaction.set_durability(if outcome.is_news() { Durability::Immediate } else { Durability::None })?;
        transaction.commit()?;
        Ok(outcome)
    }
}

impl From<redb::Error> for StoreError {
    fn from(error: redb::Error) -> Self {
        Self(format!("the database: {error}"))
    }
}

#[tonic::async_trait]
impl Store for Embedded {
    async fn all(&self) -> Result<Vec<Host>, StoreError> {
        Ok(block_in_place(|| self.read("", "\u{10ffff}"))?)
    }

    async fn of_service(&self, service: &str) -> Result<Vec<Host>, StoreError> {
        Ok(block_in_place(|| self.read(&format!("{service}\0"), &format!("{service}\u{1}")))?)
    }

    async fn update(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, StoreError> {
        Ok(block_in_place(|| self.write(key, change))?)
    }

    async fn version(&self) -> Result<Version, StoreError> {
        Ok(Version { incarnation: 0, count: 0 })
    }
}
