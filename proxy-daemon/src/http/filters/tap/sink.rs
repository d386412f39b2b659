//! Where traces go. Nothing here makes a stream wait: what cannot be taken now is dropped and counted.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        LazyLock, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use envoy_types::pb::envoy::{config::tap::v3::output_sink::Format, data::tap::v3::TraceWrapper};
use prost::Message as _;
use tokio::sync::mpsc;

use super::output;
use crate::stats::{self, Counter};

/// So many bytes of traces may be under way to their sinks.
const MAX_BYTES: usize = 64 << 20;
/// So many traces and segments.
const MAX_TRACES: usize = 4096;

static DROPPED: LazyLock<Counter> = LazyLock::new(|| stats::counter("tap.traces_dropped"));
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// A sink, and the format that it wants.
#[derive(Debug)]
pub(super) struct Sink {
    pub(super) format: Format,
    pub(super) target: Target,
}

#[derive(Debug)]
pub(super) enum Target {
    /// A file for each trace, whose path begins so.
    Files { prefix: String, writer: SyncSender<ToWriter> },
    /// The client of `/tap`.
    Admin(mpsc::Sender<Taken>),
}

/// What the thread that writes files is told.
#[derive(Debug)]
pub(super) enum ToWriter {
    /// A trace, or the first or a further part of one.
    Write { path: PathBuf, first: bool, format: Format, trace: Box<Taken> },
    /// To say when all that came before is written.
    Say(SyncSender<()>),
}

/// A trace that has its place among those under way.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) trace: TraceWrapper,
    _place: Place,
}

impl Taken {
    /// The trace, whose place is free then.
    pub(super) fn into_trace(self) -> TraceWrapper {
        self.trace
    }
}

#[derive(Debug)]
struct Place(usize);

impl Place {
    fn take(bytes: usize) -> Option<Place> {
        let before = UNDER_WAY.fetch_add(bytes, Ordering::Relaxed);
        // Given back by its drop where there is no room.
        let place = Place(bytes);
        (before + bytes <= MAX_BYTES).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(self.0, Ordering::Relaxed);
    }
}

impl Target {
    /// Files whose paths begin with `prefix`.
    ///
    /// # Errors
    /// The thread that writes them could not be started.
    pub(super) fn files(prefix: &str) -> io::Result<Target> {
        LazyLock::force(&DROPPED);
        Ok(Target::Files { prefix: prefix.to_owned(), writer: writer()? })
    }

    /// The client of `/tap`, and where its traces come out.
    pub(super) fn admin() -> (Target, mpsc::Receiver<Taken>) {
        LazyLock::force(&DROPPED);
        let (sender, receiver) = mpsc::channel(MAX_TRACES);
        (Target::Admin(sender), receiver)
    }
}

impl Sink {
    /// Hands on a trace, or the first or a further part of one.
    pub(super) fn submit(&self, trace: TraceWrapper, id: u64, first: bool) {
        let taken = match Place::take(trace.encoded_len()) {
            Some(place) => match &self.target {
                Target::Files { prefix, writer } => {
                    let path = format!("{prefix}_{id}{}", output::extension(self.format)).into();
                    let trace = Box::new(Taken { trace, _place: place });
                    writer.try_send(ToWriter::Write { path, first, format: self.format, trace }).is_ok()
                }
                // Where the client is gone nobody misses it.
                Target::Admin(client) => {
                    !matches!(client.try_send(Taken { trace, _place: place }), Err(mpsc::error::TrySendError::Full(_)))
                }
            },
            None => false,
        };
        if !taken {
            DROPPED.inc();
        }
    }
}

static WRITER: Mutex<Option<SyncSender<ToWriter>>> = Mutex::new(None);

/// Waits until what was handed on is in its files, for `limit` at most.
pub(crate) fn finish(limit: Duration) {
    let writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (say, said) = sync_channel(1);
    if writer.is_some_and(|writer| writer.try_send(ToWriter::Say(say)).is_ok()) {
        // Too late is as good as never.
        let _ = said.recv_timeout(limit);
    }
}

/// The thread that writes files: one for all filters, since the first that needs it.
fn writer() -> io::Result<SyncSender<ToWriter>> {
    let mut writer = WRITER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = &*writer {
        return Ok(known.clone());
    }
    let (sender, receiver) = sync_channel(MAX_TRACES);
    thread::Builder::new().name("taps".to_owned()).spawn(move || write_all(&receiver))?;
    *writer = Some(sender.clone());
    Ok(sender)
}

fn write_all(orders: &Receiver<ToWriter>) {
    for order in orders {
        match order {
            ToWriter::Write { path, first, format, trace } => {
                if let Err(error) = write_one(&path, first, &output::write(trace.into_trace(), format)) {
                    tracing::warn!(path = %path.display(), %error, "a tap cannot be written");
                }
            }
            // Whoever asked may have gone.
            ToWriter::Say(done) => drop(done.try_send(())),
        }
    }
}

fn write_one(path: &Path, first: bool, bytes: &[u8]) -> io::Result<()> {
    let mut file = if first { File::create(path)? } else { OpenOptions::new().append(true).create(true).open(path)? };
    file.write_all(bytes)
}
