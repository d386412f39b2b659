//! Which port each tunnel has.
//!
//! A proxy that has not heard yet that a tunnel is closed, or that discovery was started anew, goes on sending a revision's requests to
//! the port that it knows. So nobody takes connections there for another revision before every proxy has had the time to hear of it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::time::Duration;

use http::StatusCode;
use tokio::net::TcpSocket;
use tokio::time::Instant;

use super::{Key, Settings};
use crate::access::Denied;

/// The ports of this replica's tunnels.
#[derive(Debug)]
pub(super) struct Ports {
    started: Instant,
    held: BTreeSet<u16>,
    known: BTreeMap<u16, Known>,
}

/// What proxies may know a port by.
#[derive(Debug)]
struct Known {
    key: Key,
    /// When its tunnel ended.
    ended: Option<Instant>,
}

/// A port that nobody else can have, at which nobody listens yet.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) socket: TcpSocket,
    pub(super) address: SocketAddr,
    /// From when on connections can be taken there.
    pub(super) from: Instant,
}

impl Ports {
    /// All of them, of a process that begins now.
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), held: BTreeSet::new(), known: BTreeMap::new() }
    }

    /// A port for a tunnel: one that can be used at once, if there is one. `before`: that of its client's last tunnel.
    pub(super) fn take(&mut self, settings: &Settings, key: &Key, before: Option<u16>) -> Result<Taken, Denied> {
        let now = Instant::now();
        let ports = settings.ports.clone();
        let count = ports.len();
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        // Less than there are ports, so that nothing is lost.
        let start = (hasher.finish() % count as u64) as usize;
        let before = before.filter(|port| ports.contains(port));
        let all = before.into_iter().chain(ports.clone().cycle().skip(start).take(count));
        let free = all.filter(|port| !self.held.contains(port));
        let mut candidates: Vec<_> = free.map(|port| (self.wait(port, key, before, settings, now), port)).collect();
        candidates.sort_by_key(|(wait, _)| *wait);
        let mut last = None;
        for ((wait, _), port) in candidates {
            match bind(SocketAddr::new(settings.address, port)) {
                Ok((socket, address)) => {
                    self.held.insert(port);
                    return Ok(Taken { socket, address, from: now + wait });
                }
                Err(error) => last = Some(error),
            }
        }
        let why = last.map(|error| format!(" (the last one: {error})")).unwrap_or_default();
        let reason = format!("no port of {}-{} is free for another tunnel{why}", ports.start(), ports.end());
        Err((StatusCode::SERVICE_UNAVAILABLE, reason))
    }

    /// How long nobody may listen at a port for this revision; and of those that are alike in that, which is the better one: its own, one that
    /// nobody has had, the one that has been free for longest.
    fn wait(
        &self,
        port: u16,
        key: &Key,
        before: Option<u16>,
        settings: &Settings,
        now: Instant,
    ) -> (Duration, Reverse<Duration>) {
        let since = |when: Instant| (settings.quarantine.saturating_sub(now - when), Reverse(now - when));
        match self.known.get(&port) {
            Some(known) if known.key == *key => (Duration::ZERO, Reverse(Duration::MAX)),
            Some(known) => since(known.ended.unwrap_or(now)),
            // Who had a port, knows best.
            None if before == Some(port) => (Duration::ZERO, Reverse(Duration::MAX)),
            // It may have been anybody's before this process began.
            None => (since(self.started).0, Reverse(Duration::MAX - Duration::from_secs(1))),
        }
    }

    /// Proxies are told of a tunnel at a port.
    pub(super) fn told(&mut self, port: u16, key: &Key) {
        self.known.insert(port, Known { key: key.clone(), ended: None });
    }

    /// The tunnel that had a port has ended.
    pub(super) fn give_back(&mut self, port: u16) {
        self.held.remove(&port);
        if let Some(known) = self.known.get_mut(&port) {
            known.ended.get_or_insert_with(Instant::now);
        }
    }
}

/// A socket at which nobody listens yet: who connects is refused.
fn bind(address: SocketAddr) -> std::io::Result<(TcpSocket, SocketAddr)> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Connections of an earlier tunnel may still be closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::ObjectKey;

    fn settings(ports: std::ops::RangeInclusive<u16>) -> Settings {
        Settings { ports, .."127.0.0.1:1".parse().unwrap() }
    }

    fn key(revision: &str) -> Key {
        Key { service: ObjectKey::new("default", "users"), port: 80, revision: revision.to_owned() }
    }

    #[tokio::test]
    async fn ports_run_out() {
        let holder = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = holder.local_addr().unwrap().port();
        let (status, reason) = Ports::new().take(&settings(port..=port), &key("me"), None).unwrap_err();
        assert!(status == 503 && reason.contains("is free for another tunnel (the last one: Address"), "{reason}");
        drop(holder);
        let mut ports = Ports::new();
        let taken = ports.take(&settings(port..=port), &key("me"), None).unwrap();
        let (_, reason) = ports.take(&settings(port..=port), &key("bob"), None).unwrap_err();
        assert!(reason.ends_with("is free for another tunnel"), "{reason}");
        let refused = tokio::net::TcpStream::connect(taken.address).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "nobody listens yet");
    }

    /// After a crash, whoever comes first must not get the port that proxies know another revision by: neither those that know which port
    /// they had, nor those that do not.
    #[tokio::test(start_paused = true)]
    async fn after_a_start_a_port_is_another_s_for_a_while() {
        let settings = settings(19_400..=19_403);
        let names: Vec<String> = (0..4).map(|number| format!("r{number}")).collect();
        let mut ports = Ports::new();
        let waits = |taken: &Taken| taken.from.saturating_duration_since(Instant::now());
        let first = ports.take(&settings, &key("r0"), None).unwrap();
        assert_eq!(waits(&first), settings.quarantine, "it may have been somebody's before");
        ports.give_back(first.address.port());
        drop(first);
        // In the other order.
        let had: Vec<u16> = (19_400..=19_403).collect();
        for (name, port) in names.iter().zip(&had).rev() {
            let taken = ports.take(&settings, &key(name), Some(*port)).unwrap();
            assert_eq!((taken.address.port(), waits(&taken)), (*port, Duration::ZERO));
            drop(taken);
            ports.give_back(*port);
        }
        let elsewhere = ports.take(&settings, &key("r0"), Some(1)).unwrap();
        assert!(had.contains(&elsewhere.address.port()) && waits(&elsewhere) > Duration::ZERO);
        ports.give_back(elsewhere.address.port());
        drop(elsewhere);
        tokio::time::advance(settings.quarantine).await;
        assert_eq!(waits(&ports.take(&settings, &key("r0"), None).unwrap()), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_is_handed_on_when_all_have_heard_that_its_tunnel_ended() {
        let settings = settings(19_410..=19_411);
        let mut ports = Ports::new();
        tokio::time::advance(settings.quarantine).await;
        let take = |ports: &mut Ports, name: &str| {
            let taken = ports.take(&settings, &key(name), None).unwrap();
            let port = taken.address.port();
            (port, taken.from.saturating_duration_since(Instant::now()))
        };
        let end = |ports: &mut Ports, name: &str, port: u16| {
            ports.told(port, &key(name));
            ports.give_back(port);
        };
        let (me, wait) = take(&mut ports, "me");
        assert_eq!(wait, Duration::ZERO);
        end(&mut ports, "me", me);
        // Another one that comes at once has the port that nobody had, wherever its name leads; and the next one has to wait.
        let (eve, wait) = take(&mut ports, "eve");
        assert!(eve != me && wait == Duration::ZERO, "{eve} {wait:?}");
        tokio::time::advance(Duration::from_secs(5)).await;
        let (bob, wait) = take(&mut ports, "bob");
        assert_eq!((bob, wait), (me, settings.quarantine - Duration::from_secs(5)));
        // It went before proxies heard of it: it is still the first one's, who has it again at once.
        ports.give_back(bob);
        assert_eq!(take(&mut ports, "me"), (me, Duration::ZERO));
        end(&mut ports, "me", me);
        end(&mut ports, "eve", eve);
        tokio::time::advance(settings.quarantine).await;
        assert_eq!(take(&mut ports, "bob").1, Duration::ZERO);
    }
}
