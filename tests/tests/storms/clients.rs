//! Clients that ask at a steady pace, whatever comes back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How often each of them asks.
const PACE: Duration = Duration::from_millis(20);
/// How many there are for a path.
const CLIENTS: usize = 8;
/// How long any response may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// They go on until they are told to stop.
pub struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<Result<Count>>>,
}

/// What came back.
#[derive(Debug, Default)]
pub struct Count {
    pub requests: u64,
    /// Statuses other than 200, and errors.
    pub failures: BTreeMap<String, u64>,
}

impl Count {
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }
}

impl Clients {
    /// Some for each of these paths, of a proxy at a port of 127.0.0.1.
    pub fn start(port: u16, paths: &[&'static str]) -> Clients {
        Clients::start_telling(port, paths, &Arc::default())
    }

    /// The same; each request says in `x-step` what `step` was when it was sent.
    pub fn start_telling(port: u16, paths: &[&'static str], step: &Arc<AtomicUsize>) -> Clients {
        let stop = Arc::<AtomicBool>::default();
        let threads = paths.iter().map(|path| {
            let (path, stop, step) = (*path, Arc::clone(&stop), Arc::clone(step));
            thread::spawn(move || run(port, path, &stop, &step))
        });
        Clients { threads: threads.collect(), stop }
    }

    /// What came back for each path.
    pub fn stop(self) -> Result<Vec<Count>> {
        self.stop.store(true, Ordering::Relaxed);
        let join = |thread: thread::JoinHandle<Result<Count>>| {
            thread.join().map_err(|_| anyhow!("the thread of the clients panicked"))?
        };
        self.threads.into_iter().map(join).collect()
    }
}

fn run(port: u16, path: &'static str, stop: &Arc<AtomicBool>, step: &Arc<AtomicUsize>) -> Result<Count> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let clients: JoinSet<_> =
            (0..CLIENTS).map(|_| client(port, path, Arc::clone(stop), Arc::clone(step))).collect();
        let mut all = Count::default();
        for count in clients.join_all().await {
            all.requests += count.requests;
            for (kind, number) in count.failures {
                *all.failures.entry(kind).or_default() += number;
            }
        }
        Ok(all)
    })
}

async fn client(port: u16, path: &'static str, stop: Arc<AtomicBool>, step: Arc<AtomicUsize>) -> Count {
    let (mut count, mut connection) = (Count::default(), None);
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !stop.load(Ordering::Relaxed) {
        pace.tick().await;
        count.requests += 1;
        let asked = tokio::time::timeout(PATIENCE, ask(&mut connection, port, path, &step)).await;
        match asked.unwrap_or_else(|_| Err(anyhow!("no response within {PATIENCE:?}"))) {
            Ok(200) => {}
            Ok(status) => *count.failures.entry(status.to_string()).or_default() += 1,
            Err(error) => {
                connection = None;
                *count.failures.entry(format!("{error:#}")).or_default() += 1;
            }
        }
    }
    count
}

/// The status of one response, over the connection that there is.
async fn ask(connection: &mut Option<TcpStream>, port: u16, path: &str, step: &AtomicUsize) -> Result<u16> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(("127.0.0.1", port)).await.context("connecting to the proxy")?;
            stream.set_nodelay(true)?;
            connection.insert(stream)
        }
    };
    let step = step.load(Ordering::SeqCst);
    let request = format!("GET {path} HTTP/1.1\r\nhost: storm.test\r\nx-step: {step}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let (mut response, mut end) = (Vec::new(), None);
    while end.is_none_or(|end| response.len() < end) {
        ensure!(stream.read_buf(&mut response).await? > 0, "the proxy closed the connection");
        end = end_of(&response)?;
    }
    let status = response.get(9..12).and_then(|status| str::from_utf8(status).ok()).context("a status")?;
    let closes = response.to_ascii_lowercase().windows(17).any(|part| part == b"connection: close");
    if closes {
        *connection = None;
    }
    Ok(status.parse()?)
}

/// Where a response ends, as soon as its head is there.
fn end_of(response: &[u8]) -> Result<Option<usize>> {
    let Some(head) = response.windows(4).position(|part| part == b"\r\n\r\n") else { return Ok(None) };
    let text = str::from_utf8(&response[..head])?.to_ascii_lowercase();
    let Some(length) = text.lines().find_map(|line| line.strip_prefix("content-length: ")) else {
        bail!("a response without a length: {text}");
    };
    Ok(Some(head + 4 + length.parse::<usize>()?))
}
