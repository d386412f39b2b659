//! Requests whose bodies are larger than what may be kept of them, and that other clusters get a copy of, with culvertd and with the real
//! Envoy on the same bootstrap.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::http1::Response;
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const ROUTES: &str = "- {name: all, domains: ['*'], include_request_attempt_count: true, routes: [{match: {prefix: /}, route: \
                      {cluster: app, timeout: 0s, request_mirror_policies: [{cluster: copy}]}}]}";
const PIECE: usize = 64 * 1024;

/// A host that has its requests' bodies counted while they come, and answers each once it has come whole.
#[derive(Clone, Default)]
struct Host {
    read: Arc<AtomicUsize>,
    /// The connection ended in the middle of a request.
    broken: Arc<AtomicBool>,
}

impl Host {
    /// Its port, and the heads that it has had.
    fn start(&self) -> Result<(u16, Receiver<String>)> {
        let (told, heads) = channel();
        let (read, broken) = (Arc::clone(&self.read), Arc::clone(&self.broken));
        let port = server::start(move |mut stream| {
            let head = read_head(&mut stream)?;
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.and_then(|length| length.parse().ok()).context("no length")?;
            // Not every test asks.
            let _ = told.send(head);
            let (mut so_far, mut buffer) = (0, vec![0; PIECE]);
            while so_far < length {
                let bytes = stream.read(&mut buffer)?;
                broken.fetch_or(bytes == 0, SeqCst);
                ensure!(bytes > 0 && buffer[..bytes].iter().all(|byte| *byte == b'x'), "no body");
                so_far += bytes;
                read.fetch_add(bytes, SeqCst);
            }
            Ok(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?)
        })?;
        Ok((port, heads))
    }

    fn wait_read(&self, bytes: usize, what: &str) -> Result<()> {
        wait_until(DEADLINE, what, || {
            let read = self.read.load(SeqCst);
            ensure!(read == bytes, "{read} of {bytes} bytes");
            Ok(())
        })
    }
}

fn read_head(stream: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "no whole head");
        head.push(byte[0]);
    }
    Ok(String::from_utf8(head)?)
}

fn start(kind: Kind, app: u16, copy: u16) -> Result<(Daemon, TcpStream)> {
    let web = free_port()?;
    let yaml = Bootstrap::new().http(web, ROUTES, &[]).cluster("app", &[app], &[]).cluster("copy", &[copy], &[]).yaml();
    let yaml =
        yaml.replace("    filter_chains:\n", "    per_connection_buffer_limit_bytes: 16384\n    filter_chains:\n");
    let daemon = Daemon::start(kind, &yaml)?;
    let client = TcpStream::connect(("127.0.0.1", web))?;
    client.set_read_timeout(Some(DEADLINE))?;
    client.set_write_timeout(Some(DEADLINE))?;
    Ok((daemon, client))
}

/// The copy has each piece of the body while the request passes, and its answer is nobody's.
#[test]
fn a_copy_has_the_body_while_it_passes() -> Result<()> {
    const PIECES: usize = 40;
    let mut seen = Vec::new();
    for kind in KINDS {
        let hosts = [Host::default(), Host::default()];
        let ((app, _), (copy, heads)) = (hosts[0].start()?, hosts[1].start()?);
        let (daemon, mut client) = start(kind, app, copy)?;
        write!(client, "POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: {}\r\n\r\n", PIECES * PIECE)?;
        for piece in 1..=PIECES {
            client.write_all(&vec![b'x'; PIECE])?;
            for (name, host) in ["app", "copy"].iter().zip(&hosts) {
                host.wait_read(piece * PIECE, &format!("{kind:?}: piece {piece} at {name}"))?;
            }
        }
        let answer = Response::read(&mut BufReader::new(&client), "POST").with_context(|| format!("{kind:?}"))?;
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"), "{kind:?}");
        let mut head: Vec<_> = heads.recv_timeout(DEADLINE)?.lines().map(str::to_owned).collect();
        head.retain(|line| !line.starts_with("x-request-id") && !line.starts_with("x-forwarded-for"));
        head.sort();
        // The proxy has had the copy's answer.
        wait_until(DEADLINE, "the copy's answer", || {
            ensure!(daemon.stats()?.get("cluster.copy.upstream_rq_200") == 1, "not yet");
            Ok(())
        })?;
        let abandoned = daemon.stats()?.get("cluster.app.retry_or_shadow_abandoned");
        seen.push((head, abandoned));
    }
    assert_eq!(seen[0], seen[1]);
    assert!(seen[0].0.contains(&"x-envoy-attempt-count: 1".to_owned()), "{seen:?}");
    Ok(())
}

/// A client that gives up leaves no whole copies.
#[test]
fn what_breaks_off_has_no_whole_copy() -> Result<()> {
    for kind in KINDS {
        let hosts = [Host::default(), Host::default()];
        let ((app, _), (copy, _)) = (hosts[0].start()?, hosts[1].start()?);
        let (_daemon, mut client) = start(kind, app, copy)?;
        write!(client, "POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: {}\r\n\r\n", 2 * PIECE)?;
        client.write_all(&vec![b'x'; PIECE])?;
        for host in &hosts {
            host.wait_read(PIECE, &format!("{kind:?}: the first piece"))?;
        }
        drop(client);
        for host in &hosts {
            wait_until(DEADLINE, "the end", || {
                ensure!(host.broken.load(SeqCst), "{kind:?}: still open");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// A copy's host that reads nothing holds nobody up: the copy breaks off, and no more is kept of it than may be. (Envoy has the request
/// wait.)
#[test]
fn a_copy_that_nobody_reads_holds_nobody_up() -> Result<()> {
    // More than sockets hold.
    const PIECES: usize = 1024;
    let (kept, keep) = channel::<()>();
    let keep = Arc::new(std::sync::Mutex::new(keep));
    let deaf = server::start(move |mut stream| {
        read_head(&mut stream)?;
        // Until the test is over.
        let _ = keep.lock().map(|keep| keep.recv());
        Ok(())
    })?;
    let host = Host::default();
    let (app, _) = host.start()?;
    let (daemon, mut client) = start(Kind::Culvert, app, deaf)?;
    let before = daemon.memory()?;
    let mut writer = client.try_clone()?;
    let writing = thread::spawn(move || -> Result<()> {
        write!(writer, "POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: {}\r\n\r\n", PIECES * PIECE)?;
        for _ in 0..PIECES {
            writer.write_all(&vec![b'x'; PIECE])?;
        }
        Ok(())
    });
    let answer = Response::read(&mut BufReader::new(&mut client), "POST").context("no answer")?;
    assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    writing.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    host.wait_read(PIECES * PIECE, "the body")?;
    assert_eq!(daemon.stats()?.get("cluster.app.retry_or_shadow_abandoned"), 1);
    let grown = daemon.memory()?.saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more than before");
    drop(kept);
    Ok(())
}
