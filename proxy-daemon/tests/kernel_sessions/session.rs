//! One random session: who says how much, how, and how it ends.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use culvert_proxy_daemon::tls::provider;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};

use super::kernel_lab::*;
use super::{TCP_CLIENT, TCP_SERVER};

const MIB: u64 = 1 << 20;
/// How long no byte of a session may move: much longer than the machine may be busy otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// All sessions of a run by one way.
pub struct Run<'a> {
    pub seed: u64,
    /// Which way it is.
    pub level: &'static str,
    /// The first failure: the other ones may follow from it.
    pub failed: OnceLock<String>,
    /// What is to be known of the machine when something has failed.
    pub describe: &'a (dyn Fn() -> String + Sync),
}

/// Whose failure it is.
#[derive(Clone, Copy)]
struct Place<'a> {
    run: &'a Run<'a>,
    number: usize,
    side: &'static str,
    session: &'a Session,
    /// How many bytes both sides have moved: a side that waits for the other one's end may have to wait for long.
    moved: &'a AtomicU64,
}

impl Place<'_> {
    fn moved(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Waits, a second at a time, until something is ready; `false`: no byte of the session has moved for too long.
    fn wait(&self, mut is_ready: impl FnMut(u16) -> bool) -> bool {
        let (mut since, mut before) = (Instant::now(), self.moved.load(Ordering::Relaxed));
        while since.elapsed() < PATIENCE {
            if is_ready(1_000) {
                return true;
            }
            let moved = self.moved.load(Ordering::Relaxed);
            if moved != before {
                (since, before) = (Instant::now(), moved);
            }
        }
        false
    }

    /// Ends the run.
    fn fail(&self, what: &str) -> ! {
        let Self { run, number, side, session, moved } = self;
        let moved = moved.load(Ordering::Relaxed);
        let own = format!(
            "CULVERT_SESSIONS_SEED={}, {}, session {number}, {side}: {what}, after {moved} bytes of both sides",
            run.seed, run.level
        );
        let mut is_first = false;
        let first = run.failed.get_or_init(|| {
            is_first = true;
            own.clone()
        });
        if is_first {
            panic!("{own}: {session:?}\n{}", (run.describe)());
        }
        panic!("{own}; after {first}");
    }
}

/// What both sides do.
#[derive(Clone, Debug)]
pub struct Session {
    seed: u64,
    client: Side,
    server: Side,
    /// The client's program lets the kernel wait.
    blocking_client: bool,
    /// TLS from pod to pod.
    tls: bool,
}

#[derive(Clone, Debug)]
struct Side {
    /// How much it sends.
    length: u64,
    /// It resets the connection when it has sent this much.
    resets_after: Option<u64>,
    /// It writes when epoll says so, once for each change.
    edge_triggered: bool,
    /// It reads by splice(2).
    splices: bool,
    pauses: bool,
    /// It sends only when it has got all.
    waits: bool,
    /// The most that it writes or reads at a time.
    piece: usize,
}

/// What a session came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    client: String,
    /// What each side got, and whether that was all, in order.
    up: u64,
    down: u64,
    was_reset: bool,
    tls: bool,
}

impl Outcome {
    /// Whether it is what a plain connection comes to. How much arrives before a reset is chance.
    pub fn agrees_with(&self, plain: &Outcome) -> bool {
        self.was_reset || (self.up, self.down) == (plain.up, plain.down)
    }

    /// What the access log must say, where that is known.
    pub fn logged(&self) -> Option<(String, u64, u64)> {
        (!self.was_reset && !self.tls).then(|| (self.client.clone(), self.up, self.down))
    }
}

impl Session {
    /// The session of this number.
    pub fn random(seed: u64, number: u64) -> Self {
        let seed = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut dice = fastrand::Rng::with_seed(seed);
        let tls = dice.u8(0..100) < 8;
        let mut side = |is_server: bool| {
            let length = match dice.u8(0..100) {
                0..15 => 0,
                15..45 => dice.u64(1..1_000),
                45..78 => dice.u64(1_000..64_000),
                78..95 => dice.u64(64_000..MIB / 2),
                95..99 => dice.u64(MIB / 2..2 * MIB),
                _ => dice.u64(2 * MIB..8 * MIB),
            };
            // In each run one session has the greatest size, in one direction.
            let length = if number == 500 && !is_server { 64 * MIB } else { length };
            let resets = dice.u8(0..100) < 4 && number != 500 && !tls;
            Side {
                resets_after: resets.then(|| dice.u64(0..=length)),
                length,
                edge_triggered: dice.u8(0..100) < 30,
                splices: dice.u8(0..100) < 8 && !tls,
                // Bytes by the thousand, with pauses, would take the greatest one a minute on a busy machine.
                pauses: dice.u8(0..100) < 15 && number != 500,
                waits: is_server && dice.u8(0..100) < 50,
                piece: [if number == 500 { 16_000 } else { 1_000 }, 16_384, 70_000, 300_000][dice.usize(0..4)],
            }
        };
        let (mut client, mut server) = (side(false), side(true));
        if tls {
            client.length = client.length.min(MIB);
            server.length = server.length.min(MIB);
        }
        if client.resets_after.is_some() {
            // One reset a session; and who gets one does not wait for the rest.
            server.resets_after = None;
            server.waits = false;
        }
        let blocking_client = dice.u8(0..100) < 8 && !client.splices && !tls;
        client.edge_triggered &= !blocking_client;
        Self { seed, client, server, blocking_client, tls }
    }

    /// Runs it.
    pub fn run(&self, run: &Run, number: usize, lab: &Lab, listener: &TcpListener, port: u16) -> Outcome {
        let moved = &AtomicU64::new(0);
        let at = |side: &'static str| Place { run, number, side, session: self, moved };
        // Where pods read from TCP, so do programs that splice(2); else such a program needs a pod that does.
        let reads_tcp = !matches!(run.level, "both-ways" | "joined");
        let address =
            |side: &Side, usual: &'static str, by_tcp| if side.splices && !reads_tcp { by_tcp } else { usual };
        let from = address(&self.client, CLIENT, TCP_CLIENT);
        let to = format!("{}:{port}", address(&self.server, SERVER, TCP_SERVER));
        let connected = if self.blocking_client {
            lab.client.connect_blocking(&to).map(Stream)
        } else {
            lab.client.run(|| connect_from(from, &to))
        };
        let client = connected.unwrap_or_else(|error| at("client").fail(&format!("connects: {error}")));
        let name = client.local_addr().expect("an address").to_string();
        let Some((served, _)) = accept_within(listener, DEADLINE) else { at("server").fail("no connection came") };
        let was_reset = self.client.resets_after.or(self.server.resets_after).is_some();
        let (up, down) = std::thread::scope(|scope| {
            let served = scope.spawn(move || self.side(at("server"), served, true));
            let down = self.side(at("client"), client, false);
            (served.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), down)
        });
        if !was_reset && (up, down) != (self.client.length, self.server.length) {
            at("server and client").fail(&format!("got {up} and {down} bytes"));
        }
        Outcome { client: name, up, down, was_reset, tls: self.tls }
    }

    /// One side of it; returns how much it got.
    fn side(&self, at: Place<'_>, stream: Stream, is_server: bool) -> u64 {
        let (own, other) = if is_server { (&self.server, &self.client) } else { (&self.client, &self.server) };
        let (sends, gets) = if is_server { (self.seed ^ 1, self.seed) } else { (self.seed, self.seed ^ 1) };
        let may_break = self.client.resets_after.or(self.server.resets_after).is_some();
        if self.tls {
            return self.tls_side(at, stream, is_server);
        }
        if let Some(after) = own.resets_after {
            send(at, &stream, own, sends, after, may_break);
            socket2::SockRef::from(&stream.0).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
            return 0;
        }
        let send_all = || {
            send(at, &stream, own, sends, own.length, may_break);
            // Fails where the other side has reset the connection.
            let _ = stream.shutdown(Shutdown::Write);
        };
        let receive_all = || receive(at, &stream, own, gets, other.length, may_break);
        if own.waits {
            let got = receive_all();
            send_all();
            return got;
        }
        std::thread::scope(|scope| {
            scope.spawn(send_all);
            receive_all()
        })
    }

    fn tls_side(&self, at: Place<'_>, stream: Stream, is_server: bool) -> u64 {
        let (own, other) = if is_server { (&self.server, &self.client) } else { (&self.client, &self.server) };
        let (sends, gets) = if is_server { (self.seed ^ 1, self.seed) } else { (self.seed, self.seed ^ 1) };
        let (clients, servers) = tls_configs();
        let mut stream: Box<dyn ReadWrite> = if is_server {
            let session = rustls::ServerConnection::new(Arc::clone(servers)).expect("a session");
            Box::new(rustls::StreamOwned::new(session, stream))
        } else {
            let name = ServerName::try_from("pod.test").expect("a name");
            let session = rustls::ClientConnection::new(Arc::clone(clients), name).expect("a session");
            Box::new(rustls::StreamOwned::new(session, stream))
        };
        let put = |stream: &mut dyn ReadWrite| {
            for piece in pieces(own, own.length, sends) {
                let bytes = pattern(sends, piece.start, piece.end - piece.start);
                let wrote = stream.write_all(&bytes);
                wrote.unwrap_or_else(|error| at.fail(&format!("TLS writes from {}: {error}", piece.start)));
            }
            stream.flush().unwrap_or_else(|error| at.fail(&format!("TLS writes: {error}")));
        };
        let get = |stream: &mut dyn ReadWrite| {
            let mut buffer = vec![0; own.piece];
            let mut place = 0;
            while place < other.length {
                let most = buffer.len().min((other.length - place) as usize);
                let got = stream.read(&mut buffer[..most]);
                let got = got.unwrap_or_else(|error| at.fail(&format!("TLS reads at {place}: {error}")));
                if got == 0 || !is_pattern(gets, place, &buffer[..got]) {
                    at.fail(&format!("TLS reads: the end or wrong bytes at {place} of {}", other.length));
                }
                place += got as u64;
            }
            place
        };
        if is_server {
            let got = get(&mut *stream);
            put(&mut *stream);
            stream.finish();
            got
        } else {
            put(&mut *stream);
            let got = get(&mut *stream);
            stream.finish();
            got
        }
    }
}

trait ReadWrite: Read + Write {
    /// Closes its side, and reads what is left: closing with bytes unread would reset the connection.
    fn finish(&mut self);
}

impl<C, S> ReadWrite for rustls::StreamOwned<C, Stream>
where
    C: DerefMut + Deref<Target = rustls::ConnectionCommon<S>>,
    S: rustls::SideData,
{
    fn finish(&mut self) {
        self.conn.send_close_notify();
        while self.conn.wants_write() {
            self.conn.write_tls(&mut self.sock).expect("TLS ends");
        }
        self.sock.shutdown(Shutdown::Write).expect("half close");
        while self.sock.read(&mut [0; 1024]).expect("the end") > 0 {}
    }
}

/// The byte at a place of a stream.
pub fn byte_at(seed: u64, place: u64) -> u8 {
    block()[((place + seed % LENGTH as u64) % LENGTH as u64) as usize]
}

/// Not a multiple of any buffer's size, so that bytes that move are noticed.
const LENGTH: usize = 1_048_583;

fn block() -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    BLOCK.get_or_init(|| {
        let mut block = vec![0; LENGTH];
        fastrand::Rng::with_seed(1).fill(&mut block);
        block
    })
}

fn pattern(seed: u64, from: u64, length: u64) -> Vec<u8> {
    let mut piece = Vec::with_capacity(length as usize);
    let mut at = ((from + seed % LENGTH as u64) % LENGTH as u64) as usize;
    while (piece.len() as u64) < length {
        let end = LENGTH.min(at + (length as usize - piece.len()));
        piece.extend_from_slice(&block()[at..end]);
        at = end % LENGTH;
    }
    piece
}

fn is_pattern(seed: u64, from: u64, bytes: &[u8]) -> bool {
    pattern(seed, from, bytes.len() as u64) == bytes
}

/// How a side cuts what it sends.
fn pieces(side: &Side, length: u64, seed: u64) -> impl Iterator<Item = std::ops::Range<u64>> + use<> {
    let mut dice = fastrand::Rng::with_seed(seed);
    let (most, mut at) = (side.piece as u64, 0);
    std::iter::from_fn(move || {
        let size = dice.u64(1..=most).min(length - at);
        let start = at;
        at += size;
        (size > 0).then_some(start..at)
    })
}

fn send(at: Place<'_>, stream: &Stream, side: &Side, seed: u64, length: u64, may_break: bool) {
    let epoll = side.edge_triggered.then(|| {
        let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
        epoll.add(&stream.0, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 1)).expect("epoll");
        epoll
    });
    let mut dice = fastrand::Rng::with_seed(seed ^ 2);
    for range in pieces(side, length, seed) {
        let bytes = pattern(seed, range.start, range.end - range.start);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match (&stream.0).write(rest) {
                Ok(wrote) => {
                    at.moved(wrote);
                    rest = &rest[wrote..];
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let woken = at.wait(|time| match &epoll {
                        Some(epoll) => {
                            epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::from(time)).expect("epoll") == 1
                        }
                        None => is_ready(stream, PollFlags::POLLOUT, time),
                    });
                    if !woken {
                        let place = range.end - rest.len() as u64;
                        at.fail(&format!("may not write on at {place} of {length}, by epoll: {}", epoll.is_some()));
                    }
                }
                Err(_) if may_break => return,
                Err(error) => {
                    let place = range.end - rest.len() as u64;
                    at.fail(&format!("write at {place} of {length}: {error}"));
                }
            }
        }
        if side.pauses && dice.u8(0..100) < 10 {
            std::thread::sleep(Duration::from_millis(dice.u64(1..4)));
        }
    }
}

/// Reads to the end, and compares each byte; returns how many there were.
fn receive(at: Place<'_>, stream: &Stream, side: &Side, seed: u64, length: u64, may_break: bool) -> u64 {
    let pipe = side.splices.then(|| nix::unistd::pipe().expect("a pipe"));
    let mut dice = fastrand::Rng::with_seed(seed ^ 3);
    let (mut place, mut buffer) = (0, vec![0; side.piece]);
    loop {
        let got = match &pipe {
            None => (&stream.0).read(&mut buffer),
            Some((from, to)) => splice(stream, to, buffer.len().min(60_000)).map(|moved| match moved {
                0 => 0,
                moved => nix::unistd::read(from, &mut buffer[..moved]).expect("reads the pipe"),
            }),
        };
        match got {
            Ok(0) => break,
            Ok(got) => {
                let end = place + got as u64;
                if end > length || !is_pattern(seed, place, &buffer[..got]) {
                    at.fail(&format!("wrong bytes from {place} to {end} of {length}"));
                }
                place = end;
                at.moved(got);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if !at.wait(|time| is_ready(stream, PollFlags::POLLIN, time)) {
                    at.fail(&format!("nothing to read at {place} of {length}"));
                }
            }
            Err(_) if may_break => break,
            Err(error) => at.fail(&format!("read at {place} of {length}: {error}")),
        }
        if side.pauses && dice.u8(0..100) < 10 {
            std::thread::sleep(Duration::from_millis(dice.u64(1..4)));
        }
    }
    place
}

/// splice(2) from a socket to a pipe, without waiting.
fn splice(from: &Stream, to: &std::os::fd::OwnedFd, most: usize) -> std::io::Result<usize> {
    let (from, to) = (from.0.as_raw_fd(), to.as_raw_fd());
    let (nowhere, flags) = (std::ptr::null_mut(), nix::libc::SPLICE_F_NONBLOCK);
    // SAFETY: two open descriptors, and no offsets.
    let moved = unsafe { nix::libc::splice(from, nowhere, to, nowhere, most, flags) };
    usize::try_from(moved).map_err(|_| std::io::Error::last_os_error())
}

/// Waits for a socket, for so many milliseconds; `false`: nothing happened.
fn is_ready(stream: &Stream, flags: PollFlags, time: u16) -> bool {
    poll(&mut [PollFd::new(stream.0.as_fd(), flags)], PollTimeout::from(time)).expect("poll") == 1
}

fn tls_configs() -> &'static (Arc<rustls::ClientConfig>, Arc<rustls::ServerConfig>) {
    static CONFIGS: OnceLock<(Arc<rustls::ClientConfig>, Arc<rustls::ServerConfig>)> = OnceLock::new();
    CONFIGS.get_or_init(|| {
        let issued = rcgen::generate_simple_self_signed(["pod.test".to_owned()]).expect("a certificate");
        let chain = vec![CertificateDer::from_pem_slice(issued.cert.pem().as_bytes()).expect("a certificate")];
        let key = PrivateKeyDer::from_pem_slice(issued.signing_key.serialize_pem().as_bytes()).expect("a key");
        let mut roots = rustls::RootCertStore::empty();
        roots.add(chain[0].clone()).expect("a root");
        let clients = rustls::ClientConfig::builder_with_provider(Arc::clone(provider()));
        let clients = clients.with_safe_default_protocol_versions().expect("versions");
        let servers = rustls::ServerConfig::builder_with_provider(Arc::clone(provider()));
        let servers = servers.with_safe_default_protocol_versions().expect("versions").with_no_client_auth();
        (
            Arc::new(clients.with_root_certificates(roots).with_no_client_auth()),
            Arc::new(servers.with_single_cert(chain, key).expect("a key that fits")),
        )
    })
}
