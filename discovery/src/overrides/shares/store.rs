//! Where shares are kept: memory, a database in a file, or Redis for several replicas. As registrations, but few and small:
//! all are read at once.
//!
//! ```text
//! {culvert}:shares             hash   name -> share as JSON
//! {culvert}:shares:version     number counts up with each change
//! {culvert}:incarnation        number random, made when missing: another one tells that the data was lost
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use redis::Script;
use tokio::task::block_in_place;

use super::Share;
use crate::registration::store::redis::Connection;
use crate::registration::store::{Storage, StoreError, Version};

/// Keeps shares.
#[tonic::async_trait]
pub(super) trait Store: fmt::Debug + Send + Sync + 'static {
    /// All shares.
    async fn all(&self) -> Result<Vec<Share>, StoreError>;

    /// Adds a share; says whether its name was free.
    async fn add(&self, share: &Share) -> Result<bool, StoreError>;

    /// Removes a share, if it is the one with this token; says whether it was there.
    async fn remove(&self, share: &Share) -> Result<bool, StoreError>;

    /// Changes when another process changed the store. What this process changes need not show.
    async fn version(&self) -> Result<Version, StoreError>;
}

pub(super) fn open(storage: &Storage) -> Result<Box<dyn Store>, StoreError> {
    Ok(match storage {
        Storage::Memory => Box::new(Memory::default()),
        Storage::Embedded(path) => Box::new(Embedded::open(path)?),
        Storage::Redis(url) => Box::new(Redis(Connection::new(url)?)),
    })
}

#[derive(Debug, Default)]
struct Memory(Mutex<BTreeMap<String, Share>>);

impl Memory {
    fn shares(&self) -> MutexGuard<'_, BTreeMap<String, Share>> {
        // The map is whole after every operation on it, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Store for Memory {
    async fn all(&self) -> Result<Vec<Share>, StoreError> {
        Ok(self.shares().values().cloned().collect())
    }

    async fn add(&self, share: &Share) -> Result<bool, StoreError> {
        let mut shares = self.shares();
        if shares.contains_key(&share.name) {
            return Ok(false);
        }
        shares.insert(share.name.clone(), share.clone());
        Ok(true)
    }

    async fn remove(&self, share: &Share) -> Result<bool, StoreError> {
        let mut shares = self.shares();
        let there = shares.get(&share.name).is_some_and(|found| found.token == share.token);
        if there {
            shares.remove(&share.name);
        }
        Ok(there)
    }

    async fn version(&self) -> Result<Version, StoreError> {
        Ok(Version { incarnation: 0, count: 0 })
    }
}

/// Name to share as JSON.
const SHARES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("shares");

#[derive(Debug)]
struct Embedded(Database);

impl Embedded {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let open = || -> Result<Database, redb::Error> {
            let database = Database::create(path)?;
            // So that reading finds it.
            let transaction = database.begin_write()?;
            transaction.open_table(SHARES)?;
            transaction.commit()?;
            Ok(database)
        };
        let failed = |error: redb::Error| {
            let path = path.display();
            StoreError(format!("cannot open the database {path}: {error} (one process can use it at a time)"))
        };
        Ok(Self(open().map_err(failed)?))
    }

    fn read(&self) -> Result<Vec<Share>, redb::Error> {
        let table = self.0.begin_read()?.open_table(SHARES)?;
        let mut shares = Vec::new();
        for entry in table.iter()? {
            let (_, value) = entry?;
            // What an older or newer program wrote and this one cannot read is left alone.
            shares.extend(serde_json::from_slice::<Share>(value.value()));
        }
        Ok(shares)
    }

    /// Writes a share where none is, or removes it where it is; says whether it did.
    fn write(&self, share: &Share, there: bool) -> Result<bool, redb::Error> {
        let transaction = self.0.begin_write()?;
        {
            let mut table = transaction.open_table(SHARES)?;
            let found = table.get(&*share.name)?.map(|value| serde_json::from_slice::<Share>(value.value()).ok());
            let fits = match &found {
                None => there,
                Some(found) => !there && found.as_ref().is_some_and(|found| found.token == share.token),
            };
            if !fits {
                return Ok(false);
            }
            if there {
                let text = serde_json::to_vec(share).map_err(std::io::Error::from)?;
                table.insert(&*share.name, &*text)?;
            } else {
                table.remove(&*share.name)?;
            }
        }
        transaction.commit()?;
        Ok(true)
    }
}

#[tonic::async_trait]
impl Store for Embedded {
    async fn all(&self) -> Result<Vec<Share>, StoreError> {
        Ok(block_in_place(|| self.read())?)
    }

    async fn add(&self, share: &Share) -> Result<bool, StoreError> {
        Ok(block_in_place(|| self.write(share, true))?)
    }

    async fn remove(&self, share: &Share) -> Result<bool, StoreError> {
        Ok(block_in_place(|| self.write(share, false))?)
    }

    async fn version(&self) -> Result<Version, StoreError> {
        Ok(Version { incarnation: 0, count: 0 })
    }
}

const HASH: &str = "{culvert}:shares";
const VERSION: &str = "{culvert}:shares:version";

/// KEYS: shares, version. ARGV: name, share.
static ADD: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "
        if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
        redis.call('INCR', KEYS[2])
        return 1
        ",
    )
});

/// KEYS: shares, version. ARGV: name, what is expected there.
static REMOVE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "
        if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
        redis.call('HDEL', KEYS[1], ARGV[1])
        redis.call('INCR', KEYS[2])
        return 1
        ",
    )
});

#[derive(Debug)]
struct Redis(Connection);

#[tonic::async_trait]
impl Store for Redis {
    async fn all(&self) -> Result<Vec<Share>, StoreError> {
        let mut connection = self.0.get().await?;
        let values: Vec<String> = redis::cmd("HVALS").arg(HASH).query_async(&mut connection).await?;
        // As above.
        Ok(values.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
    }

    async fn add(&self, share: &Share) -> Result<bool, StoreError> {
        let mut connection = self.0.get().await?;
        let text = serde_json::to_string(share).map_err(|error| StoreError(error.to_string()))?;
        let mut call = ADD.key(HASH);
        Ok(call.key(VERSION).arg(&share.name).arg(text).invoke_async(&mut connection).await?)
    }

    async fn remove(&self, share: &Share) -> Result<bool, StoreError> {
        let mut connection = self.0.get().await?;
        let found: Option<String> = redis::cmd("HGET").arg(HASH).arg(&share.name).query_async(&mut connection).await?;
        let is_it = |text: &String| serde_json::from_str::<Share>(text).is_ok_and(|found| found.token == share.token);
        let Some(text) = found.filter(is_it) else { return Ok(false) };
        let mut call = REMOVE.key(HASH);
        Ok(call.key(VERSION).arg(&share.name).arg(text).invoke_async(&mut connection).await?)
    }

    async fn version(&self) -> Result<Version, StoreError> {
        self.0.version(VERSION).await
    }
}
