//! Ends connections of pods that are gone.
//!
//! A pod that is deleted says no word: its namespace and its interface go. The daemon would keep what it has of the pod's
//! connections until their idle timeouts, and whoever gets the pod's address next would find ports taken: the kernel gives
//! packets to the sockets that it knows.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::node_addresses;
use super::sock_diag::{self, Found, SockDiag};

/// So often it is tried for the same addresses.
const TRIES: u32 = 10;

/// The addresses for which it has failed, and why.
type Failed = (HashSet<IpAddr>, io::Error);

/// Ends them, and counts. In a thread of its own: all the node's sockets are looked through, and there may be many.
#[derive(Default)]
pub(super) struct Departed {
    /// The addresses of pods that are gone.
    addresses: HashSet<IpAddr>,
    /// How often it has failed for them.
    tries: u32,
    at_work: Option<JoinHandle<Result<(), Failed>>>,
    ended: Arc<AtomicU64>,
    /// It was said that this does not work.
    complained: bool,
}

impl Departed {
    /// Notes the addresses of pods that are gone.
    pub(super) fn extend(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.addresses.extend(addresses);
    }

    /// How many connections were ended.
    pub(super) fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    /// Begins to end the connections of those that were noted, or to do so again where it has failed. To be called now and then, in the
    /// node's network namespace.
    pub(super) fn end(&mut self) {
        if let Some(done) = self.at_work.take_if(|thread| thread.is_finished()) {
            match done.join() {
                Ok(Ok(())) | Err(_) => self.tries = 0,
                Ok(Err((addresses, error))) => self.failed(addresses, &error),
            }
        }
        if self.addresses.is_empty() || self.at_work.is_some() {
            return;
        }
        let (addresses, ended) = (std::mem::take(&mut self.addresses), Arc::clone(&self.ended));
        let work = move || end(&addresses, &ended).map_err(|error| (addresses, error));
        match std::thread::Builder::new().name("intercept-gone".to_owned()).spawn(work) {
            Ok(thread) => self.at_work = Some(thread),
            Err(error) => self.failed(HashSet::new(), &error),
        }
    }

    fn failed(&mut self, addresses: HashSet<IpAddr>, error: &io::Error) {
        self.tries += 1;
        if self.tries < TRIES {
            self.addresses.extend(addresses);
        }
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(
                %error,
                "connections of pods that are gone cannot be ended, and last until their idle timeouts; this needs \
                 CONFIG_INET_DIAG_DESTROY"
            );
        }
    }
}

/// Ends what can be ended, and counts it; the first error is told.
fn end(addresses: &HashSet<IpAddr>, ended: &AtomicU64) -> io::Result<()> {
    let diag = SockDiag::open(nix::libc::IPPROTO_TCP as u8)?;
    let mut own = None;
    let mut failed = None;
    let before = ended.load(Ordering::Relaxed);
    for socket in diag.list()? {
        let (local, remote) = (socket.local().0, socket.remote().0);
        if !addresses.contains(&local) && !addresses.contains(&remote) {
            continue;
        }
        // In the node's own name others connect, too. In others' names nobody does but this daemon and those that it replaces.
        let is_nodes = local.is_loopback() || node_addresses::include(local);
        if is_nodes && !own.get_or_insert_with(own_sockets).contains(&socket.inode) {
            continue;
        }
        match diag.destroy(&socket) {
            Ok(()) => _ = ended.fetch_add(1, Ordering::Relaxed),
            Err(error) if is_over(&socket, &error) => {}
            Err(error) => _ = failed.get_or_insert(error),
        }
    }
    let connections = ended.load(Ordering::Relaxed) - before;
    if connections > 0 {
        tracing::debug!(connections, ?addresses, "connections of pods that are gone were ended");
    }
    failed.map_or(Ok(()), Err)
}

/// Kernels before 6.6 do not forget before its time what has been closed.
fn is_over(socket: &Found, error: &io::Error) -> bool {
    socket.state == sock_diag::TIME_WAIT && error.raw_os_error() == Some(nix::libc::EOPNOTSUPP)
}

/// The numbers of the sockets that this process has.
fn own_sockets() -> HashSet<u32> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().filter_map(Result::ok);
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets.filter_map(|target| number_of(&target)).collect()
}

/// The number in `socket:[number]`.
fn number_of(target: &Path) -> Option<u32> {
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_knows_its_sockets() {
        use std::os::unix::fs::MetadataExt as _;
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = std::fs::File::from(std::os::fd::OwnedFd::from(socket)).metadata().unwrap().ino();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let other = std::fs::File::from(std::os::fd::OwnedFd::from(socket.try_clone().unwrap()));
        let own = own_sockets();
        assert!(own.contains(&u32::try_from(other.metadata().unwrap().ino()).unwrap()));
        assert!(!own.contains(&u32::try_from(inode).unwrap()), "it was closed");
        assert_eq!(number_of(Path::new("pipe:[7]")), None);
    }
}
