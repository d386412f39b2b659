//! Named sets of overrides that end by themselves. A token stands for a set in a request's header.
//!
//! Stored as registrations are; the local copy is what proxies are told of, and stays in force while the store cannot be
//! reached.

mod store;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use culvert_xds_client::overrides::Overrides;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use self::store::Store;
use crate::access::Denied;
use crate::registration::store::{Storage, StoreError, Version};

/// How long a share lasts if nothing is said, in seconds.
pub const DEFAULT_SECONDS: i64 = 8 * 3600;
/// How long a share may last, in seconds.
pub const SECONDS: RangeInclusive<i64> = 60..=30 * 86_400;
/// The longest name of a share, in bytes.
pub const MAX_NAME: usize = 63;
/// For how long after its end a share is still told of, in seconds: so that its token is known to be one that has ended.
const AFTERLIFE: i64 = 3600;
/// The length of a token. Of 32 characters each: 60 bits.
const TOKEN: usize = 12;
/// How often a store that others write to is asked whether it changed.
const REFRESH: Duration = Duration::from_millis(500);

/// A stored set of overrides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its name, unique.
    pub name: String,
    /// What stands for it in a header.
    pub token: String,
    /// The overrides, as the value of the baggage item `overrides`.
    pub item: String,
    /// When it was made, in seconds since the epoch.
    pub created: i64,
    /// When it ends, in seconds since the epoch.
    pub expires: i64,
}

impl Share {
    /// What it stands for; `None` if that makes no sense, as what a newer program has stored may not.
    #[must_use]
    pub fn overrides(&self) -> Option<Overrides> {
        Overrides::from_baggage_item(&self.item).ok().filter(|overrides| overrides.check_shared().is_ok())
    }

    /// Which services are of which revision, for people and programs.
    #[must_use]
    pub fn entries(&self) -> Vec<Value> {
        let overrides = self.overrides().unwrap_or_default();
        let entries = overrides.overrides.iter();
        entries.map(|entry| json!({ "service": entry.service, "revision": entry.revision })).collect()
    }

    /// As the API shows it.
    #[must_use]
    pub fn as_answer(&self) -> Value {
        json!({
            "name": self.name,
            "token": self.token,
            "overrides": self.entries(),
            "item": self.item,
            "created": self.created,
            "expires": self.expires,
            "expired": self.is_expired(),
        })
    }

    /// Whether its time is over.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        now() >= self.expires
    }
}

/// What a request to make a share says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    name: String,
    /// Which services are to be of which revision; or else `item`.
    #[serde(default)]
    overrides: Vec<AskedEntry>,
    /// A whole message, as the value of the baggage item `overrides`.
    item: Option<String>,
    /// In seconds.
    expires_in: Option<i64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AskedEntry {
    service: String,
    revision: String,
}

impl Asked {
    /// The share that is asked for, with a token of its own.
    fn share(self) -> Result<Share, Denied> {
        let refuse = |reason: String| Err((StatusCode::BAD_REQUEST, reason));
        let Asked { name, overrides, item, expires_in } = self;
        if !is_name(&name) {
            return refuse(format!("name: `{}` is not 1 to {MAX_NAME} of A-Za-z0-9-_.", name.escape_default()));
        }
        let message = match (item, overrides.is_empty()) {
            (Some(item), true) => Overrides::from_baggage_item(&item),
            (None, false) => Overrides::new(overrides.into_iter().map(|entry| (entry.service, entry.revision))),
            _ => return refuse("one of overrides and item is needed".to_owned()),
        };
        let message = message.and_then(|message| message.check_shared().map(|()| message));
        let message = match message {
            Ok(message) => message,
            Err(error) => return refuse(error.to_string()),
        };
        let seconds = expires_in.unwrap_or(DEFAULT_SECONDS);
        if !SECONDS.contains(&seconds) {
            return refuse(format!(
                "expires_in: {seconds} is not {} to {} seconds (30 days)",
                SECONDS.start(),
                SECONDS.end()
            ));
        }
        let created = now();
        Ok(Share { name, token: token()?, item: message.to_baggage_item(), created, expires: created + seconds })
    }
}

/// How the storage of shares is doing, for `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Where shares are kept.
    pub storage: String,
    /// Why the storage cannot be used at present, so that its last content stays in force.
    pub error: Option<String>,
}

/// The shares and their storage.
#[derive(Debug, Clone)]
pub struct Shares(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    storage: Storage,
    max_shares: usize,
    store: Box<dyn Store>,
    copy: Mutex<LocalCopy>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct LocalCopy {
    shares: BTreeMap<String, Arc<Share>>,
    version: Option<Version>,
    error: Option<String>,
}

impl Shares {
    /// Opens the storage. `changes` counts up with each change that proxies are to see.
    ///
    /// # Errors
    /// When the storage cannot ever work: a file that is no database, or a wrong address.
    pub fn open(storage: Storage, max_shares: usize, changes: watch::Sender<u64>) -> Result<Self, StoreError> {
        let store = store::open(&storage)?;
        let copy = Mutex::default();
        Ok(Self(Arc::new(Inner { storage, max_shares, store, copy, changes })))
    }

    fn copy(&self) -> MutexGuard<'_, LocalCopy> {
        // The copy is whole after every operation on it, so a panic elsewhere does not spoil it.
        self.0.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All shares, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Share>> {
        self.copy().shares.values().cloned().collect()
    }

    /// How the storage is doing.
    #[must_use]
    pub fn health(&self) -> Health {
        Health { storage: self.0.storage.to_string(), error: self.copy().error.clone() }
    }

    /// The share with this name or, if there is none, with this token.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<Share>> {
        let copy = self.copy();
        copy.shares.get(name).or_else(|| copy.shares.values().find(|share| share.token == name)).cloned()
    }

    /// Makes a share.
    ///
    /// # Errors
    /// What is wrong with what is asked for, that there are too many, that its name is taken, or that it cannot be stored.
    pub async fn create(&self, asked: Asked) -> Result<Share, Denied> {
        let share = asked.share()?;
        // The store's word counts, but its end may have been missed.
        if let Some(earlier) =
            self.find(&share.name).filter(|earlier| earlier.name == share.name && earlier.is_expired())
        {
            self.remove(&earlier).await?;
        }
        let count = self.copy().shares.len();
        if count >= self.0.max_shares {
            let reason = format!("there are {count} shares, more are not allowed; delete some");
            return Err((StatusCode::INSUFFICIENT_STORAGE, reason));
        }
        match self.0.store.add(&share).await {
            Ok(true) => {}
            Ok(false) => {
                let reason = format!("there is a share `{}`; delete it first, or choose another name", share.name);
                return Err((StatusCode::CONFLICT, reason));
            }
            Err(error) => return Err(self.unavailable(&error)),
        }
        info!("share {} is made, for {} s", share.name, share.expires - share.created);
        self.copy().shares.insert(share.name.clone(), Arc::new(share.clone()));
        self.changed();
        Ok(share)
    }

    /// Ends a share.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn remove(&self, share: &Share) -> Result<(), Denied> {
        self.0.store.remove(share).await.map_err(|error| self.unavailable(&error))?;
        {
            let mut copy = self.copy();
            if copy.shares.get(&share.name).is_some_and(|found| found.token == share.token) {
                copy.shares.remove(&share.name);
            }
        }
        self.changed();
        Ok(())
    }

    /// Follows the storage and removes shares that ended long ago, for ever.
    pub async fn run(self) {
        loop {
            self.refresh().await;
            for share in self.list() {
                if now() >= share.expires.saturating_add(AFTERLIFE) && self.remove(&share).await.is_ok() {
                    info!("share {} has ended and is removed", share.name);
                }
            }
            tokio::time::sleep(REFRESH).await;
        }
    }

    /// Reads the store if others have changed it.
    pub async fn refresh(&self) {
        let known = self.copy().version;
        // The version first: what changes while all is read is read again the next time.
        let version = match self.0.store.version().await {
            Ok(version) => version,
            Err(error) => return self.failed(&error),
        };
        if known == Some(version) {
            return self.works();
        }
        let found = match self.0.store.all().await {
            Ok(found) => found,
            Err(error) => return self.failed(&error),
        };
        let mut found: BTreeMap<_, _> = found.into_iter().map(|share| (share.name.clone(), Arc::new(share))).collect();
        let mut lost = Vec::new();
        let changed = {
            let mut copy = self.copy();
            // A Redis server that lost its data is no reason to forget shares.
            if known.is_some_and(|known| known.incarnation != version.incarnation) {
                let missing = copy.shares.values().filter(|share| !found.contains_key(&share.name));
                lost.extend(missing.cloned());
                found.extend(lost.iter().map(|share| (share.name.clone(), Arc::clone(share))));
            }
            let changed = copy.shares != found;
            copy.shares = found;
            copy.version = Some(version);
            changed
        };
        self.works();
        if changed {
            self.changed();
        }
        for share in lost {
            if let Err(error) = self.0.store.add(&share).await {
                return self.failed(&error);
            }
        }
    }

    fn changed(&self) {
        self.0.changes.send_modify(|count| *count += 1);
    }

    fn works(&self) {
        if let Some(error) = self.copy().error.take() {
            info!("shares: {} can be used again; it was: {error}", self.0.storage);
        }
    }

    fn failed(&self, error: &StoreError) {
        let mut copy = self.copy();
        if copy.error.is_none() {
            warn!("shares: {}: {error}; what it held last stays in force", self.0.storage);
        }
        copy.error = Some(error.to_string());
    }

    fn unavailable(&self, error: &StoreError) -> Denied {
        self.failed(error);
        (StatusCode::SERVICE_UNAVAILABLE, format!("shares cannot be written at present: {error}"))
    }
}

fn is_name(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(known)
}

/// A token that nobody can guess.
fn token() -> Result<String, Denied> {
    /// Without those that look alike.
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; TOKEN];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| (StatusCode::INTERNAL_SERVER_ERROR, "the system has no random numbers".to_owned()))?;
    Ok(bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect())
}

/// Seconds since the epoch.
pub(super) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(storage: Storage) -> Shares {
        Shares::open(storage, 3, watch::channel(0).0).unwrap()
    }

    fn asked(text: &str) -> Asked {
        serde_json::from_str(text).unwrap()
    }

    fn simple(name: &str) -> Asked {
        asked(&format!(r#"{{"name": "{name}", "overrides": [{{"service": "users", "revision": "x"}}]}}"#))
    }

    #[tokio::test]
    async fn shares_are_made_found_and_removed() {
        let shares = shares(Storage::Memory);
        let made = shares.create(simple("checkout")).await.unwrap();
        assert_eq!((made.token.len(), made.expires - made.created), (TOKEN, DEFAULT_SECONDS));
        assert!(culvert_xds_client::overrides::is_share_token(&made.token) && !made.is_expired());
        assert_eq!(made.entries(), [json!({ "service": "users", "revision": "x" })]);
        for name in ["checkout", &made.token] {
            assert_eq!(shares.find(name).as_deref(), Some(&made));
        }
        assert_eq!(shares.create(simple("checkout")).await.unwrap_err().0, StatusCode::CONFLICT);
        let whole = Overrides::new([("orders.shop", "y")]).unwrap().to_baggage_item();
        let of_item = shares.create(asked(&format!(r#"{{"name": "b", "item": "{whole}", "expires_in": 60}}"#))).await;
        assert_eq!(of_item.unwrap().entries(), [json!({ "service": "orders.shop", "revision": "y" })]);
        shares.create(simple("c")).await.unwrap();
        assert_eq!(shares.create(simple("d")).await.unwrap_err().0, StatusCode::INSUFFICIENT_STORAGE);
        shares.remove(&made).await.unwrap();
        assert_eq!(shares.find("checkout"), None);
        let again = shares.create(simple("checkout")).await.unwrap();
        assert_ne!(again.token, made.token);
        // Who knows an old one does not remove the new one.
        shares.remove(&made).await.unwrap();
        assert_eq!(shares.find("checkout").as_deref(), Some(&again));
    }

    #[tokio::test]
    async fn a_share_that_has_ended_makes_room_for_one_of_its_name() {
        let shares = shares(Storage::Memory);
        let ended = Share { expires: now() - 1, ..shares.create(simple("a")).await.unwrap() };
        shares.remove(&ended).await.unwrap();
        assert!(shares.0.store.add(&ended).await.unwrap());
        shares.copy().shares.insert("a".to_owned(), Arc::new(ended.clone()));
        assert_eq!(ended.as_answer()["expired"], true);
        let new = shares.create(simple("a")).await.unwrap();
        assert_ne!(new.token, ended.token);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let nested = Overrides::new([("users", "x")]).unwrap().with_share("abcd2345").unwrap().to_baggage_item();
        let entry = r#"[{"service": "users", "revision": "x"}]"#;
        for (text, expected) in [
            (format!(r#"{{"name": "", "overrides": {entry}}}"#), "name: `` is not 1 to 63"),
            (format!(r#"{{"name": "a b", "overrides": {entry}}}"#), "name: `a b` is not"),
            (format!(r#"{{"name": "{}", "overrides": {entry}}}"#, "a".repeat(64)), "is not 1 to 63"),
            (r#"{"name": "a"}"#.to_owned(), "one of overrides and item"),
            (format!(r#"{{"name": "a", "overrides": {entry}, "item": "CAE="}}"#), "one of overrides and item"),
            (r#"{"name": "a", "item": "!"}"#.to_owned(), "not standard padded base64"),
            (format!(r#"{{"name": "a", "item": "{nested}"}}"#), "cannot stand for another share"),
            (r#"{"name": "a", "overrides": [{"service": "U", "revision": "x"}]}"#.to_owned(), "service `U`"),
            (format!(r#"{{"name": "a", "overrides": {entry}, "expires_in": 59}}"#), "59 is not 60 to 2592000"),
            (format!(r#"{{"name": "a", "overrides": {entry}, "expires_in": 2592001}}"#), "2592001 is not"),
        ] {
            let error = asked(&text).share().unwrap_err();
            assert!(error.0 == StatusCode::BAD_REQUEST && error.1.contains(expected), "{text}: {error:?}");
        }
        assert!(serde_json::from_str::<Asked>(r#"{"name": "a", "other": 1}"#).is_err());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_file_keeps_them() {
        let directory = tempfile::tempdir().unwrap();
        let storage = Storage::Embedded(directory.path().join("shares.redb"));
        let before = shares(storage.clone());
        let made = before.create(simple("a")).await.unwrap();
        let removed = before.create(simple("b")).await.unwrap();
        before.remove(&removed).await.unwrap();
        assert_eq!(before.create(simple("a")).await.unwrap_err().0, StatusCode::CONFLICT);
        drop(before);
        let after = shares(storage);
        after.refresh().await;
        assert_eq!(after.list(), [Arc::new(made)]);
    }
}
