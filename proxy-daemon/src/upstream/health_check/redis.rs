//! Checks of Redis servers: PING, or EXISTS of a key that marks those that are not to be used. As in Envoy, whose checks send them as its
//! Redis proxy does, they are traffic of the cluster: its servers are never checked at leisure.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{
    Failure, Outcome, Passed, Target,
    tcp::{is_open, open},
};
use crate::{
    config::model::RedisCheck,
    stats::{Counter, Gauge, Scope},
    tls::AlpnFallback,
    upstream::{Decrement, UpstreamStream},
};

/// The longest line that a server may answer with.
const MAX_LINE: usize = 64 * 1024;

pub(super) struct RedisProbe {
    target: Target,
    reuse: bool,
    connection: Option<Counted>,
    stats: Traffic,
}

/// What the cluster counts.
#[derive(Clone, Copy)]
struct Traffic {
    upstream_cx_total: Counter,
    upstream_cx_connect_fail: Counter,
    upstream_rq_total: Counter,
    upstream_cx_active: Gauge,
}

/// A connection, among those of the cluster.
struct Counted {
    stream: UpstreamStream,
    _active: Decrement,
}

impl RedisProbe {
    pub(super) fn new(target: Target, reuse: bool, cluster: &Scope) -> RedisProbe {
        let stats = Traffic {
            upstream_cx_total: cluster.counter("upstream_cx_total"),
            upstream_cx_connect_fail: cluster.counter("upstream_cx_connect_fail"),
            upstream_rq_total: cluster.counter("upstream_rq_total"),
            upstream_cx_active: cluster.gauge("upstream_cx_active"),
        };
        RedisProbe { target, reuse, connection: None, stats }
    }

    async fn connect(&self) -> Result<Counted, Failure> {
        let stats = self.stats;
        stats.upstream_cx_total.inc();
        let active = Decrement::after_inc(stats.upstream_cx_active);
        let opened = open(&self.target, AlpnFallback::None).await;
        let stream = opened.inspect_err(|_| stats.upstream_cx_connect_fail.inc())?;
        Ok(Counted { stream, _active: active })
    }

    pub(super) async fn probe(&mut self, check: &RedisCheck) -> Outcome {
        let kept = self.connection.take().filter(|kept| is_open(&kept.stream));
        match self.attempt(kept, check).await {
            Ok((well, connection)) => {
                // Of another answer more may be to come.
                self.connection = Some(connection).filter(|_| self.reuse && well);
                let result = if well { Ok(Passed::default()) } else { Err(Failure::Active) };
                Outcome { result, http_status: None }
            }
            Err(failure) => failure.into(),
        }
    }

    /// Whether the server says that it is well.
    async fn attempt(&self, kept: Option<Counted>, check: &RedisCheck) -> Result<(bool, Counted), Failure> {
        let (mut connection, is_new) = match kept {
            Some(connection) => (connection, false),
            None => (self.connect().await?, true),
        };
        let (mut request, mut answers) = (Vec::new(), 1);
        if let Some((user, password)) = check.auth.as_ref().filter(|_| is_new) {
            match user.is_empty() {
                true => command(&mut request, &[b"auth", password]),
                false => command(&mut request, &[b"auth", user, password]),
            }
            answers += 1;
        }
        let (asked, expected): (&[&[u8]], _) = match check.key.is_empty() {
            true => (&[b"PING"], &b"+PONG"[..]),
            false => (&[b"EXISTS", &check.key], &b":0"[..]),
        };
        command(&mut request, asked);
        self.stats.upstream_rq_total.inc();
        connection.stream.write_all(&request).await.map_err(|_| Failure::Network)?;
        let (mut answer, mut read) = (Vec::new(), Vec::new());
        // Where the password is wrong, the server says no to what follows.
        for _ in 0..answers {
            answer = line(&mut connection.stream, &mut read).await?;
        }
        Ok((answer == expected, connection))
    }
}

/// Adds a command, as an array of strings.
fn command(to: &mut Vec<u8>, words: &[&[u8]]) {
    to.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        to.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        to.extend_from_slice(word);
        to.extend_from_slice(b"\r\n");
    }
}

/// The next line, without its end; `read` is what has been read beyond the lines before.
async fn line(connection: &mut UpstreamStream, read: &mut Vec<u8>) -> Result<Vec<u8>, Failure> {
    loop {
        if let Some(end) = read.windows(2).position(|end| end == b"\r\n") {
            let rest = read.split_off(end + 2);
            let mut line = std::mem::replace(read, rest);
            line.truncate(end);
            return Ok(line);
        }
        if read.len() >= MAX_LINE || connection.read_buf(read).await.map_err(|_| Failure::Network)? == 0 {
            return Err(Failure::Network);
        }
    }
}
