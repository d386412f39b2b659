//! Limits hold: whatever clients and hosts do, the memory of a proxy stays flat.

use std::io::{BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::wait_until;

/// How many connections, or streams, there are at a time.
const AT_A_TIME: usize = 200;

/// What they may add to a proxy's memory, in bytes: for each a buffer that is read into, one that is written from, and some change.
const MEMORY: u64 = 200 * 160 * 1024;

/// A host whose answers have no end, or that does not read what it is sent; and how much it has got rid of.
fn host(endless: bool) -> Result<(u16, Arc<AtomicU64>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (port, passed) = (listener.local_addr()?.port(), Arc::new(AtomicU64::new(0)));
    let counter = Arc::clone(&passed);
    thread::spawn(move || {
        let mut held = Vec::new();
        for stream in listener.incoming().flatten() {
            counter.fetch_add(1, Ordering::Relaxed);
            if endless {
                let counter = Arc::clone(&counter);
                thread::spawn(move || write_on(stream, b"HTTP/1.1 200 OK\r\n\r\n", &counter));
            } else {
                held.push(stream);
            }
        }
    });
    Ok((port, passed))
}

/// Writes for as long as somebody takes it.
fn write_on(mut stream: TcpStream, head: &[u8], passed: &AtomicU64) -> Result<()> {
    stream.write_all(head)?;
    loop {
        stream.write_all(&[b'x'; 64 * 1024])?;
        passed.fetch_add(64 * 1024, Ordering::Relaxed);
    }
}

/// Waits until nothing passes any more, after something has.
fn stalls(passed: &AtomicU64) -> Result<()> {
    let mut last = (u64::MAX, 0);
    wait_until(Duration::from_secs(60), "everything to stand still", || {
        let now = passed.load(Ordering::Relaxed);
        last = if last.0 == now { (now, last.1 + 1) } else { (now, 0) };
        // Looked at every 20 ms.
        (now > 0 && last.1 >= 40).then_some(()).with_context(|| format!("{now} bytes have passed"))
    })
}

/// How much a proxy grows by `load` between clients and such a host, until everything stands still.
fn growth(kind: Kind, endless: bool, load: impl Fn(u16, &Arc<AtomicU64>) -> Result<Vec<TcpStream>>) -> Result<u64> {
    let (upstream, passed) = host(endless)?;
    let port = free_port()?;
    let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";
    let fields = "per_connection_buffer_limit_bytes: 65536";
    let yaml = Bootstrap::new().http(port, routes, &[]).cluster("app", &[upstream], &[fields]).yaml();
    let proxy = Daemon::start(kind, &yaml)?;
    let before = proxy.memory()?;
    let clients = load(port, &passed)?;
    stalls(&passed)?;
    let grown = proxy.memory()?.saturating_sub(before);
    drop(clients);
    Ok(grown)
}

fn flat(endless: bool, load: impl Fn(u16, &Arc<AtomicU64>) -> Result<Vec<TcpStream>>) -> Result<()> {
    let grown = growth(Kind::Culvert, endless, load)?;
    println!("culvertd has grown by {grown} bytes");
    ensure!(grown < MEMORY, "culvertd has grown by {grown} bytes");
    Ok(())
}

/// Clients that ask, and do not read.
#[test]
fn slow_readers_hold_up_fast_hosts() -> Result<()> {
    flat(true, |port, _| {
        let ask = |_| {
            let mut client = TcpStream::connect(("127.0.0.1", port))?;
            client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")?;
            Ok(client)
        };
        (0..AT_A_TIME).map(ask).collect()
    })
}

/// The same by streams of one connection: what waits for it is bounded for all of them together.
#[test]
fn slow_readers_of_http2_hold_up_fast_hosts() -> Result<()> {
    flat(true, |port, _| {
        let mut client = TcpStream::connect(("127.0.0.1", port))?;
        // SETTINGS: windows as large as they may be. GET, http, /, and an authority that is not compressed.
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x06\x04\0\0\0\0\0\0\x04\x7f\xff\xff\xff".to_vec();
        // The connection's window as well.
        bytes.extend_from_slice(b"\0\0\x04\x08\0\0\0\0\0\x7f\0\0\0");
        for stream in (1..).step_by(2).take(AT_A_TIME) {
            bytes.extend_from_slice(b"\0\0\x06\x01\x05");
            bytes.extend_from_slice(&u32::to_be_bytes(stream));
            bytes.extend_from_slice(b"\x82\x86\x84\x41\x01a");
        }
        client.write_all(&bytes)?;
        Ok(vec![client])
    })
}

/// Clients that send faster than the host reads.
#[test]
fn slow_hosts_hold_up_fast_writers() -> Result<()> {
    flat(false, |port, passed| {
        let send = |_| {
            let client = TcpStream::connect(("127.0.0.1", port))?;
            let (writer, passed) = (client.try_clone()?, Arc::clone(passed));
            let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000000000\r\n\r\n";
            thread::spawn(move || write_on(writer, head, &passed));
            Ok(client)
        };
        (0..AT_A_TIME).map(send).collect()
    })
}

/// Connections on which nothing happens hold no buffers. How they compare with Envoy's in a build for use, `cargo xtask bench` tells.
#[test]
fn idle_connections_cost_little() -> Result<()> {
    const CONNECTIONS: u64 = 1000;
    let cost = |kind| -> Result<u64> {
        let (upstream, port) = (answering()?, free_port()?);
        let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let yaml = Bootstrap::new().http(port, routes, &[]).cluster("app", &[upstream], &[]).yaml();
        let proxy = Daemon::start(kind, &yaml)?;
        let served = || -> Result<TcpStream> {
            let mut client = TcpStream::connect(("127.0.0.1", port))?;
            client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")?;
            let mut reader = BufReader::new(client.try_clone()?);
            culvert_tests::http1::Response::read(&mut reader, "GET")?;
            Ok(client)
        };
        // What the first ones cost is there for all.
        let first: Vec<_> = (0..50).map(|_| served()).collect::<Result<_>>()?;
        let before = proxy.memory()?;
        let idle: Vec<_> = (0..CONNECTIONS).map(|_| served()).collect::<Result<_>>()?;
        let each = proxy.memory()?.saturating_sub(before) / CONNECTIONS;
        drop((first, idle));
        Ok(each)
    };
    let (envoy, culvert) = (cost(Kind::Envoy)?, cost(Kind::Culvert)?);
    println!("an idle connection costs Envoy {envoy} bytes and culvertd {culvert}");
    // A read buffer alone is 68 KiB.
    ensure!(culvert < 32 * 1024, "an idle connection costs Envoy {envoy} bytes and culvertd {culvert}");
    Ok(())
}

/// A host that answers.
fn answering() -> Result<u16> {
    culvert_tests::server::start(|stream| {
        let mut stream = BufReader::new(stream);
        while culvert_tests::http1::Request::read(&mut stream)?.is_some() {
            stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })
}
