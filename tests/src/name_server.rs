//! A name server on the loopback whose every answer the test decides.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::wait_until;

/// What the name server says of a name.
#[derive(Debug, Clone)]
pub enum Says {
    /// These addresses, good for so many seconds.
    Addresses(Vec<IpAddr>, u32),
    /// There is no such name.
    Unknown,
    /// The same, with addresses nevertheless.
    UnknownWith(Vec<IpAddr>),
    /// That it has failed.
    Failure,
    /// Nothing at all.
    Nothing,
}

/// A name server on 127.0.0.1, by UDP and TCP (RFC 1035). It runs for as long as the process.
pub struct NameServer {
    /// Its port of 127.0.0.1.
    pub port: u16,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    says: HashMap<String, Says>,
    /// How often it was asked for each.
    asked: HashMap<String, usize>,
}

impl NameServer {
    /// Starts one on a free port, which knows no names.
    pub fn start() -> Result<NameServer> {
        let (socket, listener) = bind()?;
        let port = socket.local_addr()?.port();
        let shared: Arc<Mutex<Shared>> = Arc::default();
        let by_tcp = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&by_tcp);
                thread::spawn(move || drop(serve(stream, &shared)));
            }
        });
        let server = NameServer { port, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut question) {
                if let Some(answer) = answer(&question[..length], &shared) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(server)
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it says this.
    pub fn say(&self, name: &str, says: Says) {
        self.shared().says.insert(name.to_owned(), says);
    }

    /// Waits until it has been asked for a name, and until what it said then must have been taken: it is asked again.
    pub fn wait_asked(&self, name: &str, deadline: Duration) -> Result<()> {
        let asked = || self.shared().asked.get(name).copied().unwrap_or_default();
        let before = asked();
        // Each round may ask for both families.
        wait_until(deadline, &format!("questions for {name}"), || {
            ensure!(asked() >= before + 5, "{} of 5", asked() - before);
            Ok(())
        })
    }
}

/// A port that is free for both.
fn bind() -> Result<(UdpSocket, TcpListener)> {
    loop {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        if let Ok(listener) = TcpListener::bind(socket.local_addr()?) {
            return Ok((socket, listener));
        }
    }
}

/// Answers each question of a connection.
fn serve(mut stream: TcpStream, shared: &Mutex<Shared>) -> Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut question = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut question)?;
        if let Some(answer) = answer(&question, shared) {
            let length = u16::try_from(answer.len())?;
            stream.write_all(&[&length.to_be_bytes()[..], &answer].concat())?;
        }
    }
}

/// The answer to a question; `None`: it is none.
fn answer(question: &[u8], shared: &Mutex<Shared>) -> Option<Vec<u8>> {
    let (header, mut rest) = question.split_at_checked(12)?;
    let mut labels = Vec::new();
    loop {
        let (length, more) = rest.split_first()?;
        if *length == 0 {
            rest = more;
            break;
        }
        let (label, more) = more.split_at_checked(usize::from(*length))?;
        labels.push(String::from_utf8_lossy(label).to_lowercase());
        rest = more;
    }
    let asked = &question[12..question.len() - rest.len() + 4];
    let wants_v6 = rest.get(..2)? == [0, 28];
    let name = labels.join(".");
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    *shared.asked.entry(name.clone()).or_default() += 1;
    let (code, addresses, ttl) = match shared.says.get(&name) {
        Some(Says::Addresses(addresses, ttl)) => (0, addresses.clone(), *ttl),
        Some(Says::Nothing) => return None,
        Some(Says::Failure) => (2, Vec::new(), 0),
        Some(Says::UnknownWith(addresses)) => (3, addresses.clone(), 60),
        Some(Says::Unknown) | None => (3, Vec::new(), 0),
    };
    let addresses: Vec<_> = addresses.into_iter().filter(|address| address.is_ipv6() == wants_v6).collect();
    let mut bytes = header[..2].to_vec();
    // A response, with recursion; one question, and answers but no more.
    bytes.extend([0x81, 0x80 | code, 0, 1, 0, addresses.len() as u8, 0, 0, 0, 0]);
    bytes.extend(asked);
    for address in addresses {
        bytes.extend([0xc0, 12, 0, if wants_v6 { 28 } else { 1 }, 0, 1]);
        bytes.extend(ttl.to_be_bytes());
        match address {
            IpAddr::V4(address) => bytes.extend([&[0, 4], &address.octets()[..]].concat()),
            IpAddr::V6(address) => bytes.extend([&[0, 16], &address.octets()[..]].concat()),
        }
    }
    Some(bytes)
}
