//! Registrations in Redis, for any number of replicas.
//!
//! ```text
//! {culvert}:hosts:SERVICE   hash   address -> host as JSON
//! {culvert}:services        set    services with hosts
//! {culvert}:version         number counts up with each change other than a heartbeat
//! {culvert}:incarnation     number random, made when missing: another one tells that the data was lost
//! ```
//! The braces keep all keys in one slot of a Redis cluster. A host is changed by comparing and setting in one script,
//! so that replicas do not undo each other's changes.

use std::sync::LazyLock;
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, RedisError, Script};
use tokio::sync::OnceCell;

use super::{Changer, Outcome, Store, StoreError, Version};
use crate::registration::host::{Host, HostKey};

const SERVICES: &str = "{culvert}:services";
const VERSION: &str = "{culvert}:version";
const INCARNATION: &str = "{culvert}:incarnation";
/// How long a connection and an answer may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How often a change is tried again because another replica changed the same host.
const TRIES: usize = 20;

/// KEYS: hosts of the service, services, version. ARGV: address, what is expected there, what is to be there, service,
/// whether it is news.
static COMPARE_AND_SET: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "
        if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
        if ARGV[3] == '' then
            redis.call('HDEL', KEYS[1], ARGV[1])
            if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[2], ARGV[4]) end
        else
            redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
            redis.call('SADD', KEYS[2], ARGV[4])
        end
        if ARGV[5] == '1' then redis.call('INCR', KEYS[3]) end
        return 1
        ",
    )
});

/// The one connection to a Redis server, which heals itself once it was made.
pub(crate) struct Connection {
    client: Client,
    connection: OnceCell<ConnectionManager>,
}

/// Without the client, which holds a password.
impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redis").finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(url: &str) -> Result<Self, StoreError> {
        let client =
            Client::open(url).map_err(|error| StoreError(format!("the address of the Redis server: {error}")))?;
        Ok(Self { client, connection: OnceCell::new() })
    }

    pub(crate) async fn get(&self) -> Result<ConnectionManager, StoreError> {
        let connect = || {
            let config = ConnectionManagerConfig::new()
                .set_number_of_retries(0)
                .set_connection_timeout(Some(TIMEOUT))
                .set_response_timeout(Some(TIMEOUT));
            self.client.get_connection_manager_with_config(config)
        };
        Ok(self.connection.get_or_try_init(connect).await?.clone())
    }

    /// The version of what counts its changes in the key `count`. The incarnation is that of the whole server.
    pub(crate) async fn version(&self, count: &str) -> Result<Version, StoreError> {
        let mut connection = self.get().await?;
        let fresh = std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), 0) >> 1;
        let (incarnation, count): (u64, Option<u64>) = redis::pipe()
            .cmd("SET")
            .arg(INCARNATION)
            .arg(fresh)
            .arg("NX")
            .ignore()
            .cmd("GET")
            .arg(INCARNATION)
            .cmd("GET")
            .arg(count)
            .query_async(&mut connection)
            .await?;
        Ok(Version { incarnation, count: count.unwrap_or(0) })
    }
}

/// Hosts in a Redis server.
#[derive(Debug)]
pub(super) struct Redis(Connection);

impl Redis {
    pub(super) fn new(url: &str) -> Result<Self, StoreError> {
        Connection::new(url).map(Self)
    }
}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> Self {
        Self(format!("Redis: {}", error.to_string().replace('\n', " ")))
    }
}

fn hosts_key(service: &str) -> String {
    format!("{{culvert}}:hosts:{service}")
}

fn read(values: Vec<String>) -> Vec<Host> {
    // What an older or newer program wrote and this one cannot read is left alone.
    let mut hosts: Vec<Host> = values.iter().filter_map(|text| serde_json::from_str(text).ok()).collect();
    hosts.sort_by_key(Host::key);
    hosts
}

#[tonic::async_trait]
impl Store for Redis {
    async fn all(&self) -> Result<Vec<Host>, StoreError> {
        let mut connection = self.0.get().await?;
        let services: Vec<String> = redis::cmd("SMEMBERS").arg(SERVICES).query_async(&mut connection).await?;
        let mut hosts = Vec::new();
        // In parts, so that no answer is so large that it holds up heartbeats.
        for part in services.chunks(100) {
            let mut pipeline = redis::pipe();
            for service in part {
                pipeline.cmd("HVALS").arg(hosts_key(service));
            }
            let found: Vec<Vec<String>> = pipeline.query_async(&mut connection).await?;
            hosts.extend(found.into_iter().flat_map(read));
        }
        Ok(hosts)
    }

    async fn of_service(&self, service: &str) -> Result<Vec<Host>, StoreError> {
        let mut connection = self.0.get().await?;
        Ok(read(redis::cmd("HVALS").arg(hosts_key(service)).query_async(&mut connection).await?))
    }

    async fn update(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, StoreError> {
        let mut connection = self.0.get().await?;
        let (hosts, address) = (hosts_key(&key.service), key.ip_address.to_string());
        for _ in 0..TRIES {
            let found: Option<String> =
                redis::cmd("HGET").arg(&hosts).arg(&address).query_async(&mut connection).await?;
            let before = found.as_deref().and_then(|text| serde_json::from_str(text).ok());
            let change = change(before.as_ref());
            let outcome = Outcome::new(before, change);
            if !outcome.writes() {
                return Ok(outcome);
            }
            let text = outcome.after.as_ref().map(serde_json::to_string).transpose();
            let text = text.map_err(|error| StoreError(error.to_string()))?.unwrap_or_default();
            let mut call = COMPARE_AND_SET.key(&hosts);
            call.key(SERVICES).key(VERSION).arg(&address).arg(found.unwrap_or_default()).arg(text).arg(&key.service);
            call.arg(i32::from(outcome.is_news()));
            let done: bool = call.invoke_async(&mut connection).await?;
            if done {
                return Ok(outcome);
            }
        }
        Err(StoreError(format!("Redis: others changed {address} of {} {TRIES} times meanwhile", key.service)))
    }

    async fn version(&self) -> Result<Version, StoreError> {
        self.0.version(VERSION).await
    }
}
