//! Joined connections: both pods' sockets are told of each other, and payload goes from one to the other past the daemon.
//!
//! A worker joins what it would only copy. From then on it says how many bytes it has forwarded whenever nothing is left to
//! forward: a sender that has sent just as many sends its next message straight to the receiver. `proxy-ebpf/src/kernel/joins.rs`
//! has the kernel's part, and why no byte is lost, doubled or reordered.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError, SkStorage};
use culvert_proxy_ebpf::{
    Acceleration, Address, Hop, Join, JoinedCounters, PodPolicy, Reason, Side, SocketKey, Watched,
};

use super::error::{InterceptError, chain};
use super::{kernel, pinned};

/// A direction in which nothing went past the daemon for this many tries is left to it.
const PATIENCE: u32 = 64;

/// One worker's view of the maps by which connections are joined.
pub struct Joins {
    hops: SkStorage<MapData, Hop>,
    joins: RefCell<HashMap<MapData, SocketKey, Join>>,
    joined: RefCell<HashMap<MapData, SocketKey, JoinedCounters>>,
    pods: HashMap<MapData, Address, PodPolicy>,
    switches: Array<MapData, u32>,
    /// A program that counts in the programs' map, which outlives daemons.
    counting: OwnedFd,
}

/// A connection whose pods are joined. Dropped, they are not any more.
pub struct Joined {
    joins: Rc<Joins>,
    up: Way,
    down: Way,
}

/// One direction.
struct Way {
    sender: SocketKey,
    receiver: SocketKey,
    /// How many forwarded bytes the kernel knows of.
    told: u64,
    /// How often it was told since bytes were last seen to go past the daemon.
    tries: Cell<u32>,
    /// How many these were.
    seen: Cell<u64>,
    is_open: bool,
}

/// What went past the daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// Bytes of the client.
    pub up: u64,
    /// Bytes of the server.
    pub down: u64,
}

impl Joins {
    /// Of the loaded programs.
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, InterceptError> {
        let typed = |name: &str, error: MapError| InterceptError::load(name, &error);
        let counting = kernel::counting(ebpf)?;
        Ok(Self {
            hops: SkStorage::try_from(own(ebpf, "HOPS")?).map_err(|error| typed("HOPS", error))?,
            joins: RefCell::new(HashMap::try_from(own(ebpf, "JOINS")?).map_err(|error| typed("JOINS", error))?),
            joined: RefCell::new(HashMap::try_from(own(ebpf, "JOINED")?).map_err(|error| typed("JOINED", error))?),
            pods: HashMap::try_from(own(ebpf, "PODS")?).map_err(|error| typed("PODS", error))?,
            switches: Array::try_from(own(ebpf, "SWITCHES")?).map_err(|error| typed("SWITCHES", error))?,
            counting,
        })
    }

    fn count(&self, reason: Reason) {
        if let Err(error) = pinned::run(self.counting.as_fd(), reason as u64) {
            tracing::debug!(%error, reason = reason.name(), "is not counted");
        }
    }

    /// Joins the pods at the far ends of two of the daemon's sockets, between which it would only copy bytes. `None`: they
    /// are not joined, and why was counted.
    pub fn join(self: &Rc<Self>, client: &impl AsRawFd, server: &impl AsRawFd) -> Option<Joined> {
        let refused = match self.try_join(client, server) {
            Ok(joined) => {
                self.count(Reason::JoinedConnections);
                return Some(joined);
            }
            Err(refused) => refused,
        };
        self.count(refused);
        None
    }

    fn try_join(self: &Rc<Self>, client: &impl AsRawFd, server: &impl AsRawFd) -> Result<Joined, Reason> {
        let is_daemons = |hop: &Hop| hop.own.side == Side::Node as u32 && hop.watched == Watched::No as u32;
        let of = |socket: RawFd| self.hops.get(&socket, 0).ok().filter(is_daemons);
        let down_hop = of(client.as_raw_fd()).ok_or(Reason::JoinRefusedClient)?;
        let is_joined = |level: u32| level == Acceleration::Joined as u32;
        let pod_joins =
            |hop: &Hop| self.pods.get(&hop.own.remote, 0).is_ok_and(|policy| is_joined(policy.acceleration));
        let switched_on = self.switches.get(&down_hop.direction, 0).is_ok_and(is_joined);
        if !switched_on || !pod_joins(&down_hop) {
            return Err(Reason::JoinRefusedOff);
        }
        let up_hop = of(server.as_raw_fd()).ok_or(Reason::JoinRefusedServer)?;
        if !pod_joins(&up_hop) {
            return Err(Reason::JoinRefusedOff);
        }
        let way = |sender: SocketKey, receiver: SocketKey| Way {
            sender,
            receiver,
            told: 0,
            tries: Cell::new(0),
            seen: Cell::new(0),
            is_open: true,
        };
        let joined = Joined {
            joins: Rc::clone(self),
            up: way(down_hop.peer, up_hop.peer),
            down: way(up_hop.peer, down_hop.peer),
        };
        for way in [&joined.up, &joined.down] {
            let counted = self.joined.borrow_mut().insert(way.sender, JoinedCounters::default(), 0);
            counted.and_then(|()| self.tell(way)).map_err(|error| {
                tracing::debug!(error = chain(&error), "a connection cannot be joined");
                Reason::JoinRefusedNoMemory
            })?;
        }
        Ok(joined)
    }

    fn tell(&self, way: &Way) -> Result<(), MapError> {
        self.joins.borrow_mut().insert(way.sender, Join { target: way.receiver, forwarded: way.told }, 0)
    }

    fn past(&self, way: &Way) -> JoinedCounters {
        self.joined.borrow().get(&way.sender, 0).unwrap_or_default()
    }

    /// Lets nothing more go past the daemon.
    fn close(&self, way: &mut Way) {
        if std::mem::replace(&mut way.is_open, false) {
            // Fails only if it is gone.
            let _ = self.joins.borrow_mut().remove(&way.sender);
        }
    }

    /// Tells that all of a direction is forwarded that came to the daemon.
    fn forwarded(&self, way: &mut Way, bytes: u64) {
        if way.told == bytes || !way.is_open {
            return;
        }
        way.told = bytes;
        if let Err(error) = self.tell(way) {
            tracing::debug!(error = chain(&error), "a joined connection is left to the daemon");
            self.close(way);
            return;
        }
        way.tries.set(way.tries.get() + 1);
        if way.tries.get() >= PATIENCE {
            let past = self.past(way).bytes;
            way.tries.set(0);
            if way.seen.replace(past) == past {
                self.count(Reason::JoinGivenUp);
                self.close(way);
            }
        }
    }
}

impl Joined {
    /// Tells that nothing of the client is left to forward, and how many bytes were.
    pub fn forwarded_up(&mut self, bytes: u64) {
        self.joins.forwarded(&mut self.up, bytes);
    }

    /// Likewise, of the server.
    pub fn forwarded_down(&mut self, bytes: u64) {
        self.joins.forwarded(&mut self.down, bytes);
    }

    /// When bytes last went past the daemon.
    pub fn last_activity(&self) -> Option<Instant> {
        let last = self.joins.past(&self.up).last.max(self.joins.past(&self.down).last);
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).ok().map(Duration::from)?;
        let since = now.saturating_sub(Duration::from_nanos(last));
        (last != 0).then(|| Instant::now().checked_sub(since)).flatten()
    }

    /// Lets nothing more go past the daemon, and says how much did.
    pub fn end(mut self) -> Past {
        self.close();
        Past { up: self.joins.past(&self.up).bytes, down: self.joins.past(&self.down).bytes }
    }

    fn close(&mut self) {
        self.joins.close(&mut self.up);
        self.joins.close(&mut self.down);
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.close();
        for way in [&self.up, &self.down] {
            // Fails only if it is gone.
            let _ = self.joins.joined.borrow_mut().remove(&way.sender);
        }
    }
}

/// A handle of a map that lives as long as it is used.
pub(super) fn own(ebpf: &Ebpf, name: &str) -> Result<Map, InterceptError> {
    let error = |reason: String| InterceptError::Load { name: name.to_owned(), reason };
    let again = |data: &MapData| {
        let own = data.fd().as_fd().try_clone_to_owned().map_err(|source| error(chain(&source)))?;
        MapData::from_fd(own).map_err(|source| InterceptError::load(name, &source))
    };
    match ebpf.map(name).ok_or_else(|| error("not in the kernel object".to_owned()))? {
        Map::HashMap(data) => again(data).map(Map::HashMap),
        Map::LruHashMap(data) => again(data).map(Map::LruHashMap),
        Map::Array(data) => again(data).map(Map::Array),
        Map::SkStorage(data) => again(data).map(Map::SkStorage),
        _ => Err(error("is of another type".to_owned())),
    }
}
