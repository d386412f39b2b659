//! Lists and watches all objects of one kind, for ever.
//!
//! ```text
//! read all (watch-list, else pages) -> watch from there -> stream ends -> watch from the last bookmark or event
//!        ^------------- 410, or the watch cannot be resumed ---------------------'
//! ```

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use crate::connection::{Access, Lines, RequestError, read_page};

/// How many objects a page has.
const PAGE: u32 = 500;
/// How long a watch lasts before the API server ends it, in seconds: this, and up to a quarter more.
const WATCH_SECONDS: u64 = 240;
/// How long a watch may be silent before the server is asked whether it is there. Bookmarks come about once a minute.
const SILENCE: Duration = Duration::from_secs(20);
/// How long the answer to that may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// The first pause after a failure, and the longest. Half of each is left to chance, so that a server that comes back is
/// not met by everybody at once.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A longer pause that a server asks for is not kept: it may not have meant it.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(30);
/// How long a watch that works again is silent when it has told all that was missed.
const LULL: Duration = Duration::from_secs(1);
/// A stream that lived that long was a good one.
const GOOD_LIFE: Duration = Duration::from_secs(5);
/// After that many failures in a row at one place everything is read anew.
const MOST_RESUMES: u32 = 5;

/// Objects of one kind, and who wants to know of them.
pub trait Objects: Send + Sync + 'static {
    /// The kind's name.
    const KIND: &'static str;
    /// Where an API server has the objects of all namespaces.
    const PATH: &'static str;
    /// All objects, while they are being read.
    type Picture: Default + Send;

    /// Puts an object into a picture.
    fn collect(picture: &mut Self::Picture, object: &Object<'_>);
    /// Takes an object out of a picture again.
    fn discard(picture: &mut Self::Picture, object: &Object<'_>);
    /// Takes in all objects that there are. That they could be read once does not say that they can be watched.
    fn replace(&self, picture: Self::Picture);
    /// Takes in an object that is new or has changed.
    fn add(&self, object: &Object<'_>);
    /// Forgets an object.
    fn remove(&self, object: &Object<'_>);
    /// Notes that objects can be read again, after `fails`, and that what was missed meanwhile has been told.
    fn works(&self);
    /// Notes that they cannot, and why.
    fn fails(&self, error: &str);
}

/// One object as it came.
#[derive(Debug)]
pub struct Object<'a> {
    /// Its JSON.
    pub text: &'a str,
    /// What it is, if that is not what was asked for.
    pub foreign: Option<&'a str>,
    /// Its place in a list; `None`: it came by a watch.
    pub index: Option<usize>,
}

/// Which objects are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// A selector of labels; empty: any.
    pub labels: String,
    /// A selector of fields; empty: any.
    pub fields: String,
}

/// Watches the objects of one kind in one cluster.
pub struct Watch<O> {
    access: Arc<Access>,
    objects: Arc<O>,
    selection: Selection,
    /// Whether the server is asked to stream the first picture too. Not any more once it would not.
    streams_lists: bool,
    /// Where to resume.
    version: Option<String>,
    /// Whether it was said that objects cannot be read, and not since then that they can.
    failing: bool,
}

/// Why a list or a watch ended early.
#[derive(Debug)]
enum Broken {
    /// What we know is too old to go on from.
    Gone,
    /// The server does not stream the first picture.
    NoWatchList,
    /// The connection broke in the middle of a watch, which may be nothing.
    CutOff(RequestError),
    /// It does not work.
    Failed(RequestError),
}

impl From<RequestError> for Broken {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Status { status: StatusCode::GONE, .. } => Self::Gone,
            error => Self::Failed(error),
        }
    }
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

/// What is in every object.
#[derive(Deserialize)]
struct Seen<'a> {
    #[serde(borrow)]
    kind: Option<Cow<'a, str>>,
    #[serde(default, borrow)]
    metadata: SeenMetadata<'a>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct SeenMetadata<'a> {
    #[serde(borrow)]
    resource_version: Option<Cow<'a, str>>,
    annotations: Option<SeenAnnotations>,
}

#[derive(Deserialize)]
struct SeenAnnotations {
    #[serde(rename = "k8s.io/initial-events-end")]
    initial_events_end: Option<String>,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMetadata {
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// The Status in an event of type ERROR.
#[derive(Deserialize)]
struct Failure {
    code: Option<u16>,
    message: Option<String>,
}

impl<O: Objects> Watch<O> {
    /// A watch that has not begun.
    pub fn new(access: Arc<Access>, objects: Arc<O>, selection: Selection) -> Self {
        Self { access, objects, selection, streams_lists: true, version: None, failing: false }
    }

    /// Runs until it is dropped.
    pub async fn run(mut self) {
        let mut failures: u32 = 0;
        loop {
            let started = Instant::now();
            let lists = self.version.is_none() && !self.streams_lists;
            let outcome = match self.version.clone() {
                None if self.streams_lists => self.stream_all().await,
                None => self.list_all().await,
                Some(version) => self.follow(&version).await,
            };
            if started.elapsed() > GOOD_LIFE {
                failures = 0;
            }
            let mut at_least = Duration::ZERO;
            match outcome {
                Ok(()) if lists => continue,
                // A watch that ends by itself has lasted minutes; of one that has not, the first time is for nothing.
                Ok(()) if failures == 0 => {
                    failures = u32::from(started.elapsed() < GOOD_LIFE);
                    continue;
                }
                Ok(()) => {}
                Err(Broken::Gone) => {
                    debug!("{}s: what is known is too old; reading all anew", O::KIND);
                    self.version = None;
                }
                Err(Broken::NoWatchList) => {
                    debug!("{}s: the server does not stream lists", O::KIND);
                    self.streams_lists = false;
                    continue;
                }
                // The first time is for nothing but to connect again.
                Err(Broken::CutOff(error)) if failures == 0 => debug!("{}s: {error}", O::KIND),
                Err(Broken::CutOff(error) | Broken::Failed(error)) => {
                    self.failing = true;
                    self.objects.fails(&error.to_string());
                    if let RequestError::Status { retry_after: Some(after), .. } = &error {
                        at_least = (*after).min(LONGEST_RETRY_AFTER);
                    }
                    self.access.renew().await;
                    if matches!(error, RequestError::Nonsense(_)) && failures >= MOST_RESUMES {
                        self.version = None;
                    }
                }
            }
            sleep(at_least).await;
            tokio::select! {
                () = sleep(pause(failures).saturating_sub(at_least)) => {}
                // What was wrong with another kind's objects is over.
                () = self.access.recovered() => {}
            }
            failures = failures.saturating_add(1);
        }
    }

    fn path(&self, query: &str) -> String {
        let mut path = format!("{}?{query}", O::PATH);
        for (name, selector) in [("labelSelector", &self.selection.labels), ("fieldSelector", &self.selection.fields)] {
            if !selector.is_empty() {
                path.push('&');
                path.push_str(name);
                path.push('=');
                path.extend(utf8_percent_encode(selector, NON_ALPHANUMERIC));
            }
        }
        path
    }

    fn watch_path(&self, from: &str) -> String {
        let seconds = WATCH_SECONDS + fastrand::u64(..WATCH_SECONDS / 4);
        self.path(&format!("watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds}&{from}"))
    }

    /// Reads all objects page by page.
    async fn list_all(&mut self) -> Result<(), Broken> {
        let mut picture = O::Picture::default();
        let mut next = String::new();
        loop {
            let mut query = format!("limit={PAGE}");
            if !next.is_empty() {
                query.push_str("&continue=");
                query.extend(utf8_percent_encode(&next, NON_ALPHANUMERIC));
            }
            let text = read_page(self.access.get(&self.path(&query)).await?.into_body()).await?;
            let page: Page<'_> = serde_json::from_slice(&text)
                .map_err(|error| nonsense(format!("the server's answer is no list of {}s: {error}", O::KIND)))?;
            for (i, item) in page.items.into_iter().flatten().enumerate() {
                O::collect(&mut picture, &Object { text: item.get(), foreign: None, index: Some(i) });
            }
            match page.metadata.next.filter(|next| !next.is_empty()) {
                Some(more) => next = more,
                None => {
                    let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                    self.version =
                        Some(version.ok_or_else(|| nonsense("the list has no metadata.resourceVersion".to_owned()))?);
                    self.objects.replace(picture);
                    return Ok(());
                }
            }
        }
    }

    /// Reads all objects as a stream, and then follows it.
    async fn stream_all(&mut self) -> Result<(), Broken> {
        let path = self.watch_path("sendInitialEvents=true&resourceVersionMatch=NotOlderThan");
        let response = match self.access.get(&path).await {
            Ok(response) => response,
            // Servers without the feature call the parameter invalid; what else is a request's own fault, a list shows.
            Err(RequestError::Status {
                status:
                    StatusCode::BAD_REQUEST
                    | StatusCode::UNPROCESSABLE_ENTITY
                    | StatusCode::FORBIDDEN
                    | StatusCode::NOT_FOUND,
                ..
            }) => return Err(Broken::NoWatchList),
            Err(error) => return Err(error.into()),
        };
        let mut lines = Lines::new(response.into_body());
        let mut picture = O::Picture::default();
        loop {
            let line = match lines.next(SILENCE).await {
                Ok(Some(line)) => line,
                // Servers that do not know the parameter pass it over, and never say that the first picture is whole.
                Err(RequestError::Timeout(_)) => return Err(Broken::NoWatchList),
                Ok(None) => return Err(nonsense("the stream ended before the first picture was whole".to_owned())),
                Err(error) => return Err(error.into()),
            };
            let (event, seen) = parse(&line)?;
            match &*event.kind {
                "ADDED" | "MODIFIED" => O::collect(&mut picture, &object::<O>(&event, &seen)),
                "DELETED" => O::discard(&mut picture, &object::<O>(&event, &seen)),
                "BOOKMARK" => {
                    if let Some(annotations) = &seen.metadata.annotations
                        && annotations.initial_events_end.as_deref() == Some("true")
                    {
                        self.note_version(&seen);
                        break;
                    }
                }
                _ => return Err(failure(&event)),
            }
        }
        self.objects.replace(picture);
        let whole = self.version.clone();
        self.follow_lines(lines, whole).await
    }

    /// Follows changes from a version on, unless the server is not that far: one that was restored from a copy takes versions that it
    /// has lost for future ones, and has the watch wait for them.
    async fn follow(&mut self, version: &str) -> Result<(), Broken> {
        let now = self.version_now().await?;
        if is_before(now.as_deref(), version) {
            return Err(Broken::Gone);
        }
        let version = utf8_percent_encode(version, NON_ALPHANUMERIC);
        let response = self.access.get(&self.watch_path(&format!("resourceVersion={version}"))).await?;
        self.follow_lines(Lines::new(response.into_body()), now).await
    }

    /// After a failure, that objects can be read again is shown by an event, or by a watch that lives for a while on a server that answers:
    /// lists alone may be all that works. Events that were missed come first, and there may be many: those are over with what is as new as
    /// `now`, the server's version when the watch began, with a bookmark, or when nothing more comes for a moment.
    async fn follow_lines(&mut self, mut lines: Lines, now: Option<String>) -> Result<(), Broken> {
        let mut heard = false;
        loop {
            let silence = match (self.failing, heard) {
                (false, _) => SILENCE,
                (true, false) => GOOD_LIFE,
                (true, true) => LULL,
            };
            let line = match lines.next(silence).await {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(()),
                Err(RequestError::Timeout(_)) => {
                    self.probe().await?;
                    continue;
                }
                Err(error @ RequestError::Nonsense(_)) => return Err(error.into()),
                Err(error) => return Err(Broken::CutOff(error)),
            };
            let (event, seen) = parse(&line)?;
            let object = object::<O>(&event, &seen);
            match &*event.kind {
                "ADDED" | "MODIFIED" => self.objects.add(&object),
                "DELETED" => self.objects.remove(&object),
                "BOOKMARK" => {}
                _ => return Err(failure(&event)),
            }
            if object.foreign.is_none() {
                heard = true;
                if event.kind == "BOOKMARK" || has_reached(seen.metadata.resource_version.as_deref(), now.as_deref()) {
                    self.works();
                }
            }
            self.note_version(&seen);
        }
    }

    fn works(&mut self) {
        if std::mem::take(&mut self.failing) {
            self.objects.works();
        }
    }

    fn note_version(&mut self, seen: &Seen<'_>) {
        if let Some(version) = seen.metadata.resource_version.as_deref().filter(|version| !version.is_empty()) {
            self.version = Some(version.to_owned());
        }
    }

    /// Asks whether a server that says nothing is there at all: a watch on a machine that hangs looks like one
    /// without news.
    async fn probe(&mut self) -> Result<(), Broken> {
        self.version_now().await?;
        self.works();
        Ok(())
    }

    /// The version that the server has now; `None` where it does not say.
    async fn version_now(&self) -> Result<Option<String>, Broken> {
        let asked = async { read_page(self.access.get(&self.path("limit=1")).await?.into_body()).await };
        let text =
            timeout(PROBE_TIMEOUT, asked).await.map_err(|_| Broken::Failed(RequestError::Timeout(PROBE_TIMEOUT)))??;
        // That it is a list of what was asked for does not matter here.
        Ok(serde_json::from_slice::<Page<'_>>(&text).ok().and_then(|page| page.metadata.resource_version))
    }
}

/// Whether a version is an earlier one. Those of Kubernetes' own API servers are numbers; of others nothing is known.
fn is_before(version: Option<&str>, other: &str) -> bool {
    numbers(version, Some(other)).is_some_and(|(version, other)| version < other)
}

/// Whether a version is another one or a later one; `false` where that is not known.
fn has_reached(version: Option<&str>, other: Option<&str>) -> bool {
    numbers(version, other).is_some_and(|(version, other)| version >= other)
}

fn numbers(version: Option<&str>, other: Option<&str>) -> Option<(u128, u128)> {
    let number = |version: &str| version.parse().ok();
    version.and_then(number).zip(other.and_then(number))
}

fn nonsense(text: String) -> Broken {
    Broken::Failed(RequestError::Nonsense(text))
}

fn parse(line: &Bytes) -> Result<(Event<'_>, Seen<'_>), Broken> {
    let event: Event<'_> = serde_json::from_slice(line)
        .map_err(|error| nonsense(format!("the watch sent a line that is no event: {error}")))?;
    // What is wrong with the object itself is told when it is read.
    let seen =
        serde_json::from_str(event.object.get()).unwrap_or(Seen { kind: None, metadata: SeenMetadata::default() });
    Ok((event, seen))
}

/// An event that is no change: ERROR, or a type that there is not.
fn failure(event: &Event<'_>) -> Broken {
    if event.kind != "ERROR" {
        return nonsense(format!("the watch sent an event of type `{}`", event.kind.escape_debug()));
    }
    let Failure { code, message } =
        serde_json::from_str(event.object.get()).unwrap_or(Failure { code: None, message: None });
    let status = code.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let message = message.unwrap_or_else(|| "an error without a message".to_owned());
    RequestError::Status { status, message, retry_after: None }.into()
}

fn object<'a, O: Objects>(event: &Event<'a>, seen: &'a Seen<'_>) -> Object<'a> {
    let foreign = seen.kind.as_deref().filter(|kind| *kind != O::KIND);
    Object { text: event.object.get(), foreign, index: None }
}

/// How long to wait after so many failures.
fn pause(failures: u32) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(1 << failures.min(10)).min(LONGEST_PAUSE);
    whole.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_missed_is_over_with_the_version_that_was_the_newest() {
        let reached = |version, now| has_reached(version, now);
        assert!(reached(Some("10"), Some("9")) && reached(Some("10"), Some("10")) && !reached(Some("9"), Some("10")));
        // Of others than numbers nothing is known.
        assert!(!reached(Some("b"), Some("a")) && !reached(Some("10"), None) && !reached(None, Some("10")));
    }

    #[test]
    fn pauses_grow_up_to_a_limit_and_differ() {
        for (failures, longest) in [(0, 0.2), (1, 0.4), (3, 1.6), (6, 10.0), (u32::MAX, 10.0)] {
            let found: Vec<_> = (0..50).map(|_| pause(failures).as_secs_f64()).collect();
            assert!(found.iter().all(|pause| (longest / 2.0..=longest).contains(pause)), "{failures}: {found:?}");
            assert!(found.iter().any(|pause| *pause != found[0]), "{failures}: {found:?}");
        }
    }
}
