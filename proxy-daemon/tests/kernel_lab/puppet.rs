//! A program of its own that does what a test says, in a network namespace and a cgroup: the daemon, which the test itself
//! plays, is exempt from what is done to other programs.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{DEADLINE, Namespace, REFUSAL, enter, eventually};

/// Set for the process that is the puppet: its namespace and its cgroup.
const PUPPET: &str = "CULVERT_TEST_PUPPET";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A cgroup of its own.
pub struct Group(PathBuf);

impl Group {
    /// A new one, under the root or under another.
    pub fn new(parent: Option<&Group>, name: &str) -> Self {
        let path = match parent {
            Some(parent) => parent.0.join(name),
            None => {
                let number = NEXT.fetch_add(1, Ordering::Relaxed);
                root().join(format!("culvert-hooks-{}-{number}-{name}", std::process::id()))
            }
        };
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes may still be going.
        let path = self.0.clone();
        if !std::thread::panicking() {
            eventually("the cgroup can be removed", || fs::remove_dir(&path).is_ok() || !path.exists());
        }
        let _ = fs::remove_dir(&path);
    }
}

/// Where cgroup v2 is mounted.
pub fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("/proc/mounts");
    let mut fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    PathBuf::from(fields.find(|fields| fields[2] == "cgroup2").expect("cgroup v2 is mounted")[1])
}

/// The process.
pub struct Puppet {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Puppet {
    /// Starts it. The test binary needs a test `play_the_puppet` that calls [`play`].
    pub fn new(namespace: &Namespace, cgroup: &Group) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "play_the_puppet", "--nocapture", "--quiet"])
            .env(PUPPET, format!("{},{}", namespace.name, cgroup.0.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let orders = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut puppet = Self { child, orders, answers };
        assert_eq!(puppet.answer(), Ok("ready".to_owned()));
        puppet
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order, and waits for what comes of it; the error is the number of the system's error.
    pub fn order(&mut self, order: &str) -> Result<String, i32> {
        writeln!(self.orders, "{order}").expect("the puppet listens");
        self.answer()
    }

    fn answer(&mut self) -> Result<String, i32> {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).expect("reads"), 0, "the puppet has ended");
            // The test harness talks too.
            if let Some(answer) = line.trim_end_matches('\n').strip_prefix("-> ok ") {
                return Ok(answer.to_owned());
            }
            if let Some(errno) = line.trim_end().strip_prefix("-> error ") {
                return Err(errno.parse().expect("a number"));
            }
        }
    }

    /// Connects by TCP; returns the number of the connection, and whom it is connected to as it sees it.
    pub fn connect(&mut self, to: &str) -> Result<(usize, String), i32> {
        let answer = self.order(&format!("tcp {to}"))?;
        let (number, peer) = answer.split_once(' ').expect("two words");
        Ok((number.parse().expect("a number"), peer.to_owned()))
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the process does.
pub fn play() {
    let Ok(role) = std::env::var(PUPPET) else { return };
    let (namespace, cgroup) = role.split_once(',').expect("two words");
    fs::write(format!("{cgroup}/cgroup.procs"), "0").expect("move into the cgroup");
    enter(namespace);
    println!("-> ok ready");
    let (mut streams, mut sockets) = (Vec::new(), Vec::new());
    for line in std::io::stdin().lines() {
        let line = line.expect("reads");
        let words: Vec<&str> = line.split(' ').collect();
        match obey(&words, &mut streams, &mut sockets) {
            Ok(answer) => println!("-> ok {answer}"),
            Err(error) => println!("-> error {}", error.raw_os_error().unwrap_or(0)),
        }
    }
}

fn obey(words: &[&str], streams: &mut Vec<Option<TcpStream>>, sockets: &mut Vec<UdpSocket>) -> std::io::Result<String> {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap_or_else(|_| panic!("{text} is no address"));
    let number = |text: &str| text.parse::<usize>().unwrap_or_else(|_| panic!("{text} is no number"));
    match *words {
        ["tcp" | "tcp-briefly", to] => {
            let time = if words[0] == "tcp" { DEADLINE } else { REFUSAL };
            let stream = TcpStream::connect_timeout(&address(to), time)?;
            stream.set_read_timeout(Some(DEADLINE))?;
            let peer = stream.peer_addr()?;
            streams.push(Some(stream));
            Ok(format!("{} {peer}", streams.len() - 1))
        }
        ["talk", of] => {
            let mut stream = streams[number(of)].as_ref().expect("open");
            stream.write_all(b"hello")?;
            let mut word = [0; 5];
            stream.read_exact(&mut word)?;
            Ok(String::from_utf8_lossy(&word).into_owned())
        }
        ["peer", of] => Ok(streams[number(of)].as_ref().expect("open").peer_addr()?.to_string()),
        ["close", of] => {
            streams[number(of)] = None;
            Ok(String::new())
        }
        ["udp", local] => {
            let socket = UdpSocket::bind(address(local))?;
            socket.set_read_timeout(Some(DEADLINE))?;
            sockets.push(socket);
            Ok((sockets.len() - 1).to_string())
        }
        ["associate", of, to] => {
            sockets[number(of)].connect(address(to))?;
            Ok(sockets[number(of)].peer_addr()?.to_string())
        }
        ["send", of, text] => sockets[number(of)].send(text.as_bytes()).map(|length| length.to_string()),
        ["sendto", of, to, text] => {
            sockets[number(of)].send_to(text.as_bytes(), address(to)).map(|length| length.to_string())
        }
        ["receive", of] => {
            let mut buffer = [0; 64];
            let (length, from) = sockets[number(of)].recv_from(&mut buffer)?;
            Ok(format!("{from} {}", String::from_utf8_lossy(&buffer[..length])))
        }
        _ => panic!("no such order: {words:?}"),
    }
}
