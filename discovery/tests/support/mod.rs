//! The built program, as a process, and requests to it.
#![allow(dead_code, reason = "each file of tests uses a part of it")]

pub mod certificates;
pub mod envoy;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A running culvert-discovery. Killed when dropped.
pub struct Program {
    child: Child,
    /// What it has logged since it serves.
    said: Arc<Mutex<String>>,
    /// Where xDS is served.
    pub listen: SocketAddr,
    /// Where the pages are served.
    pub http: SocketAddr,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    /// Starts the program on free ports and waits until it serves.
    pub fn start(flags: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_culvert-discovery"))
            .args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"])
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = Vec::new();
        let (listen, http) = loop {
            let Some(line) = lines.next() else { panic!("it ended: {}", seen.join("\n")) };
            let line = line.unwrap();
            // "serving xDS on 127.0.0.1:1, status on http://127.0.0.1:2/status"
            if let Some((_, rest)) = line.split_once("serving xDS on ") {
                let (listen, http) = rest.split_once(", status on http://").unwrap();
                break (listen.parse().unwrap(), http.trim_end_matches("/status").parse().unwrap());
            }
            seen.push(line);
        };
        // The rest is read so that the program never waits for its log to be.
        let said = Arc::<Mutex<String>>::default();
        let into = Arc::clone(&said);
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| into.lock().unwrap().push_str(&(line + "\n")))
        });
        Self { child, said, listen, http }
    }

    /// Whether it has logged this since it serves.
    pub fn has_said(&self, text: &str) -> bool {
        self.said.lock().unwrap().contains(text)
    }

    /// Ends the program without a farewell.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A request; gives status, head and body.
    pub fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
        let length = body.len();
        self.raw(&format!("{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n{headers}\r\n{body}"))
    }

    /// These bytes; gives status, head and body of the answer.
    pub fn raw(&self, request: &str) -> (u16, String, String) {
        let mut connection = TcpStream::connect(self.http).unwrap();
        connection.set_read_timeout(Some(DEADLINE)).unwrap();
        connection.write_all(request.as_bytes()).unwrap();
        let mut response = String::new();
        connection.read_to_string(&mut response).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned(), body.to_owned())
    }

    /// The body of a page.
    pub fn page(&self, path: &str) -> String {
        let (status, _, body) = self.request("GET", path, "", "");
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// A page that is JSON.
    pub fn json(&self, path: &str) -> Value {
        serde_json::from_str(&self.page(path)).unwrap()
    }

    /// Sends a form.
    pub fn post(&self, path: &str, form: &str) -> (u16, String) {
        let (status, _, body) = self.request("POST", path, "Content-Type: application/x-www-form-urlencoded\r\n", form);
        (status, body)
    }

    /// Asks for a page until it is as wanted.
    pub fn until(&self, path: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let found = self.json(path);
            if holds(&found) {
                return found;
            }
            assert!(started.elapsed() < DEADLINE, "not reached: {what}: {found:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Asks until something holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !holds().await {
        assert!(started.elapsed() < DEADLINE, "not reached: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A Redis server that forgets everything when it ends. Killed when dropped.
pub struct RedisServer(Child);

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl RedisServer {
    /// Starts a server at a socket file and waits until it takes connections.
    pub fn start(socket: &Path) -> Self {
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(socket)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is needed; `cargo xtask setup` installs it");
        let server = Self(child);
        let started = Instant::now();
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            assert!(started.elapsed() < DEADLINE, "redis-server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }
}
