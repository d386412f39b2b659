//! Hosts that do as their moods say.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use culvert_tests::daemon::free_port;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What a host does with requests, health checks among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Answers 200.
    Well,
    /// Answers 200, later than anybody waits for.
    Slow,
    /// Never answers.
    Hangs,
    /// Resets the connection.
    Resets,
    /// Answers 503.
    Fails,
    /// Has reset all its connections and refuses new ones.
    Crashed,
}

/// `127.0.3.<number>`, numbers from 1 on, all at one port.
pub struct Hosts {
    pub port: u16,
    hosts: Vec<Host>,
    _runtime: Runtime,
}

struct Host {
    mood: watch::Sender<Mood>,
    seen: Arc<Seen>,
}

/// What a host counts, health checks apart.
#[derive(Default)]
struct Seen {
    /// Requests, whatever became of them.
    asked: AtomicU64,
    /// Requests that it has answered with 200.
    served: AtomicU64,
}

impl Hosts {
    pub fn start(count: u8) -> Result<Hosts> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let port = free_port()?;
        let mut hosts = Vec::new();
        for number in 1..=count {
            let address = SocketAddr::from((Ipv4Addr::new(127, 0, 3, number), port));
            let (mood, changes) = watch::channel(Mood::Well);
            let seen = Arc::<Seen>::default();
            let listener = runtime.block_on(async { listen(address) })?;
            runtime.spawn(run(address, listener, changes, Arc::clone(&seen)));
            hosts.push(Host { mood, seen });
        }
        Ok(Hosts { port, hosts, _runtime: runtime })
    }

    /// Hosts have this mood from now on.
    pub fn set(&self, numbers: &[u8], mood: Mood) {
        for number in numbers {
            self.hosts[usize::from(*number) - 1].mood.send_replace(mood);
        }
    }

    /// How many requests each has answered with 200, health checks apart.
    pub fn served(&self) -> Vec<u64> {
        self.hosts.iter().map(|host| host.seen.served.load(Ordering::Relaxed)).collect()
    }

    /// How many requests these have got, health checks apart.
    pub fn asked(&self, numbers: &[u8]) -> u64 {
        let hosts = numbers.iter().map(|number| &self.hosts[usize::from(*number) - 1]);
        hosts.map(|host| host.seen.asked.load(Ordering::Relaxed)).sum()
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket.listen(1024)?)
}

async fn run(
    address: SocketAddr,
    mut listener: TcpListener,
    mut mood: watch::Receiver<Mood>,
    seen: Arc<Seen>,
) -> Result<()> {
    loop {
        let mut connections = JoinSet::new();
        let mut changes = mood.clone();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted?;
                    connections.spawn(serve(stream, mood.clone(), Arc::clone(&seen)));
                }
                Some(_) = connections.join_next() => {}
                _ = changes.wait_for(|mood| *mood == Mood::Crashed) => break,
            }
        }
        drop(listener);
        connections.shutdown().await;
        mood.wait_for(|mood| *mood != Mood::Crashed).await?;
        listener = listen(address)?;
    }
}

async fn serve(mut stream: TcpStream, mood: watch::Receiver<Mood>, seen: Arc<Seen>) -> Result<()> {
    stream.set_nodelay(true)?;
    // Whatever ends this resets the connection, except for the end that the client makes.
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    let mut head = Vec::new();
    loop {
        head.clear();
        while !head.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut head).await? == 0 {
                return Ok(());
            }
        }
        let is_check = head.starts_with(b"GET /check ");
        if !is_check {
            seen.asked.fetch_add(1, Ordering::Relaxed);
        }
        let mood = *mood.borrow();
        match mood {
            Mood::Well => {}
            // Whoever asked may have gone by then.
            Mood::Slow => drop(tokio::time::timeout(Duration::from_secs(1), std::future::pending::<()>()).await),
            Mood::Hangs => {
                stream.read_to_end(&mut head).await?;
                return Ok(());
            }
            Mood::Fails => {
                stream.write_all(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").await?;
                continue;
            }
            Mood::Resets | Mood::Crashed => return Ok(()),
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await?;
        if !is_check {
            seen.served.fetch_add(1, Ordering::Relaxed);
        }
    }
}
