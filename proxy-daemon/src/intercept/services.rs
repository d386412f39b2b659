//! The kernel's tables of the services that it balances.

use std::collections::{HashMap as Map, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{HashMap, MapError};
use culvert_proxy_ebpf::{Connected, Endpoint, ReplyKey, Service, Slot, SlotKey, TCP, UDP};

use super::error::{InterceptError, chain};
use super::inherit::CONNECTED;
use super::kernel::{self, map};

/// How often sockets that have closed are looked for among those that wait for their service.
const LOOKS: Duration = Duration::from_secs(60);

/// What was written.
#[derive(Default)]
pub(super) struct Services {
    /// The number of the last table.
    generation: u32,
    tables: Map<Endpoint, Table>,
    /// Every backend, with the number of the services that have it.
    backends: Map<Endpoint, u32>,
    /// Tables that the kernel did not take.
    pub(super) refused: u64,
    /// By services that are not known yet: UDP sockets that an earlier daemon's programs connected to backends of theirs that
    /// no service has.
    waiting: Waiting,
}

/// By services that are not known yet: sockets with what is known of them.
#[derive(Default)]
struct Waiting {
    sockets: Map<Endpoint, Vec<(u64, Connected)>>,
    /// When those that had closed were last let go.
    looked: Option<Instant>,
}

impl Waiting {
    fn push(&mut self, service: Endpoint, socket: (u64, Connected)) {
        self.sockets.entry(service).or_default().push(socket);
    }

    fn take(&mut self, service: Endpoint) -> Vec<(u64, Connected)> {
        self.sockets.remove(&service).unwrap_or_default()
    }

    /// Lets go of sockets that have closed, now and then: their service may never come.
    fn tidy(&mut self, now: Instant, is_open: impl Fn(u64, &Connected) -> bool) {
        let looked = *self.looked.get_or_insert(now);
        if self.sockets.is_empty() || now.saturating_duration_since(looked) < LOOKS {
            return;
        }
        self.looked = Some(now);
        self.sockets.retain(|_, sockets| {
            sockets.retain(|(cookie, connected)| is_open(*cookie, connected));
            !sockets.is_empty()
        });
    }
}

struct Table {
    service: Service,
    backends: HashSet<Endpoint>,
}

/// An address of a protocol, as the kernel programs know it.
pub(super) fn endpoint(address: SocketAddr, udp: bool) -> Endpoint {
    Endpoint::new(kernel::address(address.ip()), address.port(), if udp { UDP } else { TCP })
}

impl Services {
    /// Replaces a service's backends and their shares of the load. Returns the backends that no service has any more.
    /// After an error the service keeps the backends that it had.
    pub(super) fn set(
        &mut self,
        ebpf: &mut Ebpf,
        service: Endpoint,
        shares: &[(Endpoint, f64)],
    ) -> Result<Vec<Endpoint>, InterceptError> {
        let slots = table(shares);
        let generation = self.generation.wrapping_add(1);
        self.generation = generation;
        let next: HashSet<Endpoint> = shares.iter().filter(|(_, share)| *share > 0.0).map(|(it, _)| *it).collect();
        let new = Service { generation, slots: slots.len() as u32 };
        // Added before it is named, and removed when nothing names it: a pick finds what it looks for.
        let written = self.count_in(ebpf, &next).and_then(|()| {
            write_slots(ebpf, generation, &slots)
                .and_then(|()| insert::<Endpoint, Service>(ebpf, "SERVICES", &service, new))
                .inspect_err(|_| {
                    let _ = self.count_out(ebpf, &next);
                })
        });
        if let Err(error) = written {
            self.refused += 1;
            remove_slots(ebpf, new);
            return Err(error);
        }
        let old = self.tables.insert(service, Table { service: new, backends: next });
        match old {
            Some(old) => {
                remove_slots(ebpf, old.service);
                self.count_out(ebpf, &old.backends)
            }
            None => Ok(Vec::new()),
        }
    }

    /// Forgets a service: connections to it go their own way. Returns the backends that no service has any more.
    pub(super) fn remove(&mut self, ebpf: &mut Ebpf, service: Endpoint) -> Result<Vec<Endpoint>, InterceptError> {
        let Some(old) = self.tables.remove(&service) else { return Ok(Vec::new()) };
        remove::<Endpoint, Service>(ebpf, "SERVICES", &service)?;
        remove_slots(ebpf, old.service);
        self.count_out(ebpf, &old.backends)
    }

    /// UDP sockets that an earlier daemon's programs connected to a backend that their service does not have. Those whose
    /// service is not known wait for it: [`Self::take_stranded`].
    pub(super) fn stranded(&mut self, ebpf: &mut Ebpf) -> Vec<(u64, Connected)> {
        let Ok(connected) = map::<HashMap<_, u64, Connected>>(ebpf, CONNECTED) else { return Vec::new() };
        let mut stranded: Vec<(u64, Connected)> = connected.iter().filter_map(Result::ok).collect();
        stranded.retain(|(_, connected)| !self.backends.contains_key(&connected.backend));
        if stranded.is_empty() {
            return stranded;
        }
        let Ok(replies) = map::<HashMap<_, ReplyKey, Endpoint>>(ebpf, "REPLIES") else { return Vec::new() };
        stranded.retain(|(cookie, connected)| {
            let of = replies.get(&ReplyKey { cookie: *cookie, from: connected.backend, unused: 0 }, 0);
            let Ok(service) = of else { return false };
            let known = self.tables.contains_key(&service);
            if !known {
                self.waiting.push(service, (*cookie, *connected));
            }
            known
        });
        stranded
    }

    /// Those of them that waited for this service, and are connected to a backend that no service has.
    pub(super) fn take_stranded(&mut self, ebpf: &mut Ebpf, service: Endpoint) -> Vec<(u64, Connected)> {
        let mut stranded = self.waiting.take(service);
        if let Ok(connected) = map::<HashMap<_, u64, Connected>>(ebpf, CONNECTED) {
            // A socket that connects elsewhere has another entry.
            let is_open = |cookie: u64, known: &Connected| {
                connected.get(&cookie, 0).is_ok_and(|now| now.backend == known.backend)
            };
            self.waiting.tidy(Instant::now(), is_open);
        }
        stranded.retain(|(_, connected)| !self.backends.contains_key(&connected.backend));
        stranded
    }

    /// Notes that one more service has these backends.
    fn count_in(&mut self, ebpf: &mut Ebpf, backends: &HashSet<Endpoint>) -> Result<(), InterceptError> {
        for (done, backend) in backends.iter().enumerate() {
            let count = self.backends.entry(*backend).or_insert(0);
            *count += 1;
            if *count > 1 {
                continue;
            }
            if let Err(error) = insert::<Endpoint, u32>(ebpf, "BACKENDS", backend, 1) {
                let begun: HashSet<_> = backends.iter().take(done + 1).copied().collect();
                let _ = self.count_out(ebpf, &begun);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Notes that one service less has these backends, and returns those that none has.
    fn count_out(&mut self, ebpf: &mut Ebpf, backends: &HashSet<Endpoint>) -> Result<Vec<Endpoint>, InterceptError> {
        let mut gone = Vec::new();
        for backend in backends {
            let Some(count) = self.backends.get_mut(backend) else { continue };
            *count -= 1;
            if *count == 0 {
                self.backends.remove(backend);
                remove::<Endpoint, u32>(ebpf, "BACKENDS", backend)?;
                gone.push(*backend);
            }
        }
        Ok(gone)
    }
}

/// UDP sockets that are connected to one of these backends: their cookies and what is known of them.
pub(super) fn connected_to(ebpf: &mut Ebpf, backends: &[Endpoint]) -> Vec<(u64, Connected)> {
    if backends.iter().all(|backend| backend.protocol != UDP) {
        return Vec::new();
    }
    let Ok(connected) = map::<HashMap<_, u64, Connected>>(ebpf, CONNECTED) else { return Vec::new() };
    let all = connected.iter().filter_map(Result::ok);
    all.filter(|(_, connected)| backends.contains(&connected.backend)).collect()
}

/// The alias table of these shares: every slot is as likely as any other, and holds one backend or two. A pick takes one
/// look, however many backends there are.
fn table(shares: &[(Endpoint, f64)]) -> Vec<Slot> {
    let mut shares: Vec<(Endpoint, f64)> = shares.iter().copied().filter(|(_, share)| *share > 0.0).collect();
    // The same hosts give the same table, in whatever order they come.
    shares.sort_by_key(|(backend, _)| *backend);
    let (count, sum) = (shares.len() as f64, shares.iter().map(|(_, share)| share).sum::<f64>());
    let mut slots: Vec<Slot> =
        shares.iter().map(|(backend, _)| Slot { first: *backend, second: *backend, threshold: u32::MAX }).collect();
    // In units of a slot: what is less needs another to fill its slot, what is more has some to give.
    let mut parts: Vec<f64> = shares.iter().map(|(_, share)| share * count / sum).collect();
    let (mut less, mut more): (Vec<usize>, Vec<usize>) = (0..parts.len()).partition(|at| parts[*at] < 1.0);
    while let (Some(small), Some(large)) = (less.pop(), more.pop()) {
        slots[small].second = shares[large].0;
        // Less than 1, so it fits; u32::MAX would mean all.
        slots[small].threshold = ((parts[small] * 2_f64.powi(32)) as u32).min(u32::MAX - 1);
        parts[large] -= 1.0 - parts[small];
        if parts[large] < 1.0 { less.push(large) } else { more.push(large) }
    }
    slots
}

fn write_slots(ebpf: &mut Ebpf, generation: u32, slots: &[Slot]) -> Result<(), InterceptError> {
    const NAME: &str = "SLOTS";
    let mut table: HashMap<_, SlotKey, Slot> = map(ebpf, NAME)?;
    for (slot, value) in (0..).zip(slots) {
        let key = SlotKey { generation, slot };
        table.insert(key, value, 0).map_err(|error| InterceptError::full_or(NAME, &error))?;
    }
    Ok(())
}

/// Best effort: a slot that stays is in nobody's way but takes its place.
fn remove_slots(ebpf: &mut Ebpf, of: Service) {
    let Ok(mut table) = map::<HashMap<_, SlotKey, Slot>>(ebpf, "SLOTS") else { return };
    for slot in 0..of.slots {
        match table.remove(&SlotKey { generation: of.generation, slot }) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(error) => tracing::debug!(error = chain(&error), "a slot stays"),
        }
    }
}

fn insert<K: aya::Pod, V: aya::Pod>(
    ebpf: &mut Ebpf,
    name: &'static str,
    key: &K,
    value: V,
) -> Result<(), InterceptError> {
    let mut map: HashMap<_, K, V> = map(ebpf, name)?;
    map.insert(key, value, 0).map_err(|error| InterceptError::full_or(name, &error))
}

fn remove<K: aya::Pod, V: aya::Pod>(ebpf: &mut Ebpf, name: &'static str, key: &K) -> Result<(), InterceptError> {
    let mut map: HashMap<_, K, V> = map(ebpf, name)?;
    match map.remove(key) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(error) => Err(InterceptError::load(name, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(number: u16) -> Endpoint {
        Endpoint::new([0; 16], number, TCP)
    }

    /// What each backend gets of a table, of 1.
    fn got(slots: &[Slot]) -> Map<u16, f64> {
        let mut got = Map::new();
        for slot in slots {
            let first = if slot.threshold == u32::MAX { 1.0 } else { f64::from(slot.threshold) / 2_f64.powi(32) };
            *got.entry(slot.first.port).or_insert(0.0) += first / slots.len() as f64;
            *got.entry(slot.second.port).or_insert(0.0) += (1.0 - first) / slots.len() as f64;
        }
        got
    }

    #[test]
    fn a_table_gives_each_backend_its_share() {
        for weights in [vec![1.0], vec![1.0, 1.0, 1.0], vec![1.0, 2.0, 7.0], vec![0.001, 1.0, 0.0, 128.0, 3.0, 3.0]] {
            let shares: Vec<_> = (0..).zip(&weights).map(|(number, weight)| (backend(number), *weight)).collect();
            let (slots, sum) = (table(&shares), weights.iter().sum::<f64>());
            assert_eq!(slots.len(), weights.iter().filter(|weight| **weight > 0.0).count());
            let got = got(&slots);
            for (number, weight) in (0..).zip(&weights) {
                let found = got.get(&number).copied().unwrap_or(0.0);
                assert!((found - weight / sum).abs() < 1e-6, "{weights:?}: {number} gets {found}");
            }
        }
        assert!(table(&[]).is_empty());
    }

    #[test]
    fn sockets_that_closed_do_not_wait_for_services_that_never_come() {
        let (comes, never, mut waiting) = (backend(80), backend(81), Waiting::default());
        let connected = Connected { backend: backend(8001), process: 1, thread: 1 };
        for (service, cookie) in [(comes, 1), (never, 2), (never, 3), (never, 4)] {
            waiting.push(service, (cookie, connected));
        }
        let begin = Instant::now();
        // Not at each change of a service.
        for early in [begin, begin + LOOKS / 2] {
            waiting.tidy(early, |_, _| panic!("too early"));
        }
        waiting.tidy(begin + LOOKS, |cookie, _| cookie != 2);
        assert_eq!(waiting.take(comes).len(), 1);
        assert_eq!(waiting.sockets[&never].iter().map(|(cookie, _)| *cookie).collect::<Vec<_>>(), [3, 4]);
        waiting.tidy(begin + LOOKS * 2, |_, _| false);
        assert!(waiting.sockets.is_empty());
        assert!(waiting.take(never).is_empty());
    }

    #[test]
    fn the_order_of_the_hosts_is_no_matter() {
        let shares = [(backend(1), 2.0), (backend(2), 5.0), (backend(3), 1.0)];
        let turned = [shares[2], shares[0], shares[1]];
        assert_eq!(table(&shares), table(&turned));
    }
}
