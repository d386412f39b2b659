//! A load generator that is unforgiving: whatever is not a 2xx response counts as a failure, and it says which pod answered
//! when.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::app::{Client, is_reset};
use crate::http1::Request;

/// What to send.
#[derive(Debug, Clone)]
pub struct Load {
    /// `http://host[:port]/path`.
    pub url: String,
    /// Added to every request.
    pub headers: Vec<(String, String)>,
    /// How many connections send at the same time.
    pub connections: usize,
    /// Stop after this many requests in all.
    pub requests: Option<u64>,
    /// Stop after this time.
    pub duration: Option<Duration>,
    /// Open a new connection for every request.
    pub new_connections: bool,
    /// How long each connect and each response may take.
    pub timeout: Duration,
}

/// What came back.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Requests sent.
    pub requests: u64,
    /// Responses with a status from 200 to 299.
    pub ok: u64,
    /// All others, by kind: `connect`, `reset`, `timeout`, `status_503`, ... .
    pub failures: BTreeMap<String, u64>,
    /// The first failures in words, at most ten.
    pub examples: Vec<String>,
    /// Answers by pod; a pod that answered through another one counts too.
    pub pods: BTreeMap<String, PodAnswers>,
}

/// The answers of one pod.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PodAnswers {
    /// How many.
    pub count: u64,
    /// When the request with the last one was sent, in milliseconds of Unix time.
    pub last_sent_ms: u64,
}

impl Report {
    /// The number of requests that did not get a 2xx response.
    pub fn failed(&self) -> u64 {
        self.failures.values().sum()
    }

    /// How many answers `pod` gave.
    pub fn answers(&self, pod: &str) -> u64 {
        self.pods.get(pod).map_or(0, |answers| answers.count)
    }

    fn fail(&mut self, kind: String, message: String) {
        *self.failures.entry(kind).or_default() += 1;
        if self.examples.len() < 10 {
            self.examples.push(message);
        }
    }

    fn merge(&mut self, other: Self) {
        self.requests += other.requests;
        self.ok += other.ok;
        for (kind, count) in other.failures {
            *self.failures.entry(kind).or_default() += count;
        }
        self.examples.extend(other.examples);
        self.examples.truncate(10);
        for (pod, answers) in other.pods {
            let merged = self.pods.entry(pod).or_default();
            merged.count += answers.count;
            merged.last_sent_ms = merged.last_sent_ms.max(answers.last_sent_ms);
        }
    }
}

impl Load {
    /// Sends it all and reports.
    pub fn run(&self) -> Result<Report> {
        ensure!(self.requests.is_some() || self.duration.is_some(), "set a number of requests or a duration");
        ensure!(self.connections > 0, "at least one connection is needed");
        let rest = self.url.strip_prefix("http://").with_context(|| format!("`{}` is no http:// URL", self.url))?;
        let slash = rest.find('/').unwrap_or(rest.len());
        let (base, path) = (format!("http://{}", &rest[..slash]), &rest[slash..]);
        let path = if path.is_empty() { "/" } else { path };

        let left = AtomicU64::new(self.requests.unwrap_or(u64::MAX));
        let end = self.duration.map(|duration| Instant::now() + duration);
        let mut report = Report::default();
        thread::scope(|scope| {
            let senders: Vec<_> =
                (0..self.connections).map(|_| scope.spawn(|| self.send(&base, path, &left, end))).collect();
            for sender in senders {
                report.merge(sender.join().map_err(|_| anyhow::anyhow!("a sender panicked"))??);
            }
            anyhow::Ok(())
        })?;
        Ok(report)
    }

    fn send(&self, base: &str, path: &str, left: &AtomicU64, end: Option<Instant>) -> Result<Report> {
        let mut client = Client::new(base)?.with_timeout(self.timeout);
        let mut report = Report::default();
        while end.is_none_or(|end| Instant::now() < end)
            && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        {
            let mut request = Request::get(path);
            for (name, value) in &self.headers {
                request.headers.push(name, value);
            }
            if self.new_connections {
                request.headers.push("connection", "close");
            }
            let sent_ms = unix_ms();
            report.requests += 1;
            match client.send(request) {
                Ok(response) if (200..300).contains(&response.status) => {
                    report.ok += 1;
                    count_pods(&response.body, sent_ms, &mut report.pods);
                }
                Ok(response) => report.fail(format!("status_{}", response.status), response.text()),
                Err(error) => {
                    report.fail(failure_kind(&error).to_owned(), format!("{error:#}"));
                    client.disconnect();
                }
            }
            if self.new_connections {
                client.disconnect();
            }
        }
        Ok(report)
    }
}

/// Counts the pods that had a part in an answer of the lab's service; other bodies count nothing.
fn count_pods(body: &[u8], sent_ms: u64, pods: &mut BTreeMap<String, PodAnswers>) {
    let answer: Value = serde_json::from_slice(body).unwrap_or_default();
    let mut hop = &answer;
    while let Some(pod) = hop["pod"].as_str() {
        let answers = pods.entry(pod.to_owned()).or_default();
        answers.count += 1;
        answers.last_sent_ms = answers.last_sent_ms.max(sent_ms);
        hop = &hop["upstream"];
    }
}

fn failure_kind(error: &anyhow::Error) -> &'static str {
    use std::io::ErrorKind;
    if is_reset(error) {
        return "reset";
    }
    match error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind) {
        Some(ErrorKind::TimedOut | ErrorKind::WouldBlock) => "timeout",
        Some(_) => "connect",
        None => "protocol",
    }
}

/// Milliseconds of Unix time.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
