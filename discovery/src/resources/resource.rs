//! Resources as they are served: encoded once, for all clients and both variants of the protocol.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{BufMut as _, Bytes, BytesMut};
use envoy_types::pb::google::protobuf::Any;
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use rpds::RedBlackTreeMapSync;

/// How many changes a type remembers. Whoever is further behind compares everything.
const REMEMBERED: usize = 64;

// Keys of fields that hold bytes: the number of the field times 8, and 2. Of `Any`:
const TYPE_URL: u8 = 0x0a;
const VALUE: u8 = 0x12;
// Of `Resource` in a delta response:
const VERSION: u8 = 0x0a;
const BODY: u8 = 0x12;
const NAME: u8 = 0x1a;
/// Of `resources` in both kinds of responses. That a resource's body has the same key in its `Resource` is what makes one
/// encoding do for both.
const RESOURCES: u8 = 0x12;

/// One resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Its name.
    pub name: Arc<str>,
    /// A hash of its content, the same in every replica.
    pub version: Arc<str>,
    type_url: &'static str,
    /// A field `resources` of a delta response.
    delta: Bytes,
    /// Where the body is in it, with its key and length.
    body: (usize, usize),
    /// How long the message itself is, which ends where the body ends.
    length: usize,
}

impl Resource {
    /// Encodes a message.
    pub fn new<M: Message>(type_url: &'static str, name: &str, message: &M) -> Self {
        let value = message.encode_to_vec();
        let version = hex(hash(&[&value]));
        let any = field_len(type_url.len()) + field_len(value.len());
        let resource = field_len(version.len()) + field_len(any) + field_len(name.len());
        let mut delta = BytesMut::with_capacity(field_len(resource));
        begin(&mut delta, RESOURCES, resource);
        put(&mut delta, VERSION, version.as_bytes());
        let body = delta.len();
        begin(&mut delta, BODY, any);
        put(&mut delta, TYPE_URL, type_url.as_bytes());
        put(&mut delta, VALUE, &value);
        let body = (body, delta.len());
        put(&mut delta, NAME, name.as_bytes());
        let (name, version, length) = (name.into(), version.into(), value.len());
        Self { name, version, type_url, delta: delta.freeze(), body, length }
    }

    /// The resource as a field of a `DeltaDiscoveryResponse`.
    #[must_use]
    pub fn in_delta(&self) -> Bytes {
        self.delta.clone()
    }

    /// The resource as a field of a `DiscoveryResponse`.
    #[must_use]
    pub fn in_sotw(&self) -> Bytes {
        self.delta.slice(self.body.0..self.body.1)
    }

    /// The message.
    #[must_use]
    pub fn body(&self) -> Any {
        let value = self.delta.slice(self.body.1 - self.length..self.body.1).to_vec();
        Any { type_url: self.type_url.to_owned(), value }
    }

    /// How long the message is, in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }
}

fn field_len(length: usize) -> usize {
    1 + encoded_len_varint(length as u64) + length
}

fn begin(to: &mut BytesMut, key: u8, length: usize) {
    to.put_u8(key);
    encode_varint(length as u64, to);
}

fn put(to: &mut BytesMut, key: u8, bytes: &[u8]) {
    begin(to, key, bytes.len());
    to.put_slice(bytes);
}

/// A place in a series of states, each made from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Which series, unique in this process.
    series: u64,
    /// How many states were before.
    at: u64,
}

impl Position {
    /// The beginning of a series.
    #[must_use]
    pub fn first() -> Self {
        static SERIES: AtomicU64 = AtomicU64::new(0);
        Self { series: SERIES.fetch_add(1, Ordering::Relaxed), at: 0 }
    }

    /// The place after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self { at: self.at + 1, ..self }
    }

    /// Whether another place is in the same series, and here or before.
    #[must_use]
    pub fn includes(self, other: Self) -> bool {
        self.series == other.series && other.at <= self.at
    }
}

/// What each of the newest states changed.
#[derive(Debug)]
pub(super) struct History<T> {
    position: Position,
    newest: VecDeque<Arc<[T]>>,
}

impl<T> Clone for History<T> {
    fn clone(&self) -> Self {
        Self { position: self.position, newest: self.newest.clone() }
    }
}

impl<T> History<T> {
    pub(super) fn new() -> Self {
        Self { position: Position::first(), newest: VecDeque::new() }
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn push(&mut self, changes: Vec<T>) {
        self.newest.truncate(REMEMBERED - 1);
        self.newest.push_front(changes.into());
        self.position = self.position.next();
    }

    /// What has changed since a place, newest first. `None`: that is not known.
    pub(super) fn since(&self, position: Position) -> Option<impl Iterator<Item = &T>> {
        if !self.position.includes(position) {
            return None;
        }
        let behind = usize::try_from(self.position.at - position.at).ok().filter(|n| *n <= self.newest.len())?;
        Some(self.newest.iter().take(behind).flat_map(|changes| changes.iter()))
    }
}

/// Resources by name. A copy costs nothing, and shares what is not changed in it: a thousand views of a mesh are little more than one.
pub type ByName = RedBlackTreeMapSync<Arc<str>, Arc<Resource>>;

/// A change of one type: by name, what is there now.
pub(super) type Changes = BTreeMap<Arc<str>, Option<Arc<Resource>>>;

/// All resources of one type.
#[derive(Debug, Clone)]
pub struct TypeResources {
    /// A hash over the names and versions of all of them.
    pub version: Arc<str>,
    /// The resources by name.
    pub resources: ByName,
    /// The sum of what the resources add to the version: the same in whatever order they came and went.
    sum: u64,
    history: History<Arc<str>>,
}

impl Default for TypeResources {
    fn default() -> Self {
        Self { version: hex(0).into(), resources: ByName::default(), sum: 0, history: History::new() }
    }
}

impl TypeResources {
    /// Which state of this type it is.
    #[must_use]
    pub fn position(&self) -> Position {
        self.history.position()
    }

    /// The names of what has come, changed or gone since. `None`: that is not known.
    pub fn changed_since(&self, position: Position) -> Option<impl Iterator<Item = &Arc<str>>> {
        self.history.since(position)
    }

    /// Of these names the resources that there are, and a version of all of them.
    #[must_use]
    pub fn only(&self, names: &[String]) -> (Arc<str>, Vec<Arc<Resource>>) {
        let chosen: BTreeMap<_, _> =
            names.iter().filter_map(|name| Some((&**name, self.resources.get(&**name)?))).collect();
        let sum = chosen.values().fold(0u64, |sum, resource| sum.wrapping_add(share(resource)));
        (hex(sum).into(), chosen.into_values().cloned().collect())
    }

    /// The resources after some changes, or the same if they change nothing.
    pub(super) fn with(self: &Arc<Self>, mut changes: Changes) -> Arc<Self> {
        changes.retain(|name, new| {
            let version = |resource: &Arc<Resource>| Arc::clone(&resource.version);
            self.resources.get(name).map(version) != new.as_ref().map(version)
        });
        if changes.is_empty() {
            return Arc::clone(self);
        }
        let mut next = Self::clone(self);
        next.history.push(changes.keys().cloned().collect());
        for (name, new) in changes {
            next.sum = next.sum.wrapping_sub(next.resources.get(&name).map_or(0, |old| share(old)));
            match new {
                Some(new) => {
                    next.sum = next.sum.wrapping_add(share(&new));
                    next.resources.insert_mut(name, new);
                }
                None => {
                    next.resources.remove_mut(&name);
                }
            }
        }
        next.version = hex(next.sum).into();
        Arc::new(next)
    }

    /// The same resources, as the first state of another series.
    #[must_use]
    pub(super) fn fork(&self) -> Arc<Self> {
        Arc::new(Self { history: History::new(), ..self.clone() })
    }

    /// These resources in the place of all that there were.
    pub(super) fn replaced(self: &Arc<Self>, all: BTreeMap<Arc<str>, Arc<Resource>>) -> Arc<Self> {
        let gone = self.resources.keys().filter(|name| !all.contains_key(*name)).map(|name| (Arc::clone(name), None));
        let mut changes: Changes = gone.collect();
        changes.extend(all.into_iter().map(|(name, new)| (name, Some(new))));
        self.with(changes)
    }
}

/// What a resource adds to the version of its type.
fn share(resource: &Resource) -> u64 {
    // Sums of FNV's hashes are not as good as they are: their bits are mixed once more (the end of SplitMix64).
    let mut mixed = hash(&[resource.name.as_bytes(), resource.version.as_bytes()]);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

/// FNV-1a over the parts and their lengths: not secret, but the same in every build and replica.
fn hash(parts: &[&[u8]]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = OFFSET;
    for part in parts {
        for byte in part.len().to_le_bytes().iter().chain(*part) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::cluster::v3::Cluster;
    use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};

    use super::*;
    use crate::resources::type_url::CLUSTER;

    fn resource(name: &str, alt: &str) -> Arc<Resource> {
        let cluster = Cluster { name: name.to_owned(), alt_stat_name: alt.to_owned(), ..Default::default() };
        Arc::new(Resource::new(CLUSTER, name, &cluster))
    }

    #[test]
    fn one_encoding_is_a_field_of_both_responses() {
        let resource = resource("users", &"x".repeat(300));
        let delta = DeltaDiscoveryResponse::decode(resource.in_delta()).unwrap();
        let [found] = &*delta.resources else { panic!("one resource expected: {delta:?}") };
        assert_eq!((&*found.name, &*found.version), ("users", &*resource.version));
        assert_eq!(found.resource, Some(resource.body()));
        let sotw = DiscoveryResponse::decode(resource.in_sotw()).unwrap();
        assert_eq!(sotw.resources, [resource.body()]);
        let cluster = Cluster::decode(&*resource.body().value).unwrap();
        assert_eq!((&*cluster.name, resource.length()), ("users", cluster.encoded_len()));
    }

    #[test]
    fn versions_do_not_depend_on_the_way() {
        let [a, b, c] = ["a", "b", "c"].map(|name| (Arc::<str>::from(name), resource(name, "")));
        let none = Arc::new(TypeResources::default());
        let set = |(name, resource): &(Arc<str>, Arc<Resource>)| (Arc::clone(name), Some(Arc::clone(resource)));
        let one = none.with([&a, &b].map(set).into());
        let other = none.with([set(&c)].into()).with([set(&b), (Arc::clone(&c.0), None)].into()).with([set(&a)].into());
        assert_eq!((&one.version, one.resources.size()), (&other.version, 2));
        assert_ne!(one.version, one.with([set(&c)].into()).version);
        assert_eq!(none.version, other.replaced(BTreeMap::new()).version);
        assert_eq!(one.position(), one.with([set(&a), (Arc::clone(&c.0), None)].into()).position(), "nothing changed");
    }

    #[test]
    fn changes_are_remembered_for_a_while() {
        let first = Arc::new(TypeResources::default());
        let mut newest = Arc::clone(&first);
        for i in 0..REMEMBERED {
            newest = newest.with([("a".into(), Some(resource("a", &i.to_string())))].into());
        }
        assert_eq!(newest.changed_since(first.position()).map(Iterator::count), Some(REMEMBERED));
        assert_eq!(newest.changed_since(newest.position()).map(Iterator::count), Some(0));
        let next = newest.with([("a".into(), None)].into());
        assert!(next.changed_since(first.position()).is_none(), "too long ago");
        assert!(newest.changed_since(next.position()).is_none(), "the future");
        assert!(next.changed_since(TypeResources::default().position()).is_none(), "another series");
    }
}
