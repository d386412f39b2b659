//! Where lines go: one sink a file, with a buffer in every thread that logs to it.

use std::{
    cell::RefCell,
    fs::{File, OpenOptions},
    io,
    os::fd::AsFd as _,
    path::Path,
    sync::{Arc, LazyLock, Mutex, PoisonError, Weak},
};

use tokio::sync::watch;

use super::writer::{Output, Writer};
use crate::{
    config::model::AccessLogSink,
    stats::{self, Counter, Gauge},
};

/// A thread's buffer is handed over when it holds so many bytes.
const FLUSH_BYTES: usize = 64 << 10;

/// A file, or one of the daemon's own outputs.
#[derive(Debug)]
pub(super) struct Sink {
    target: AccessLogSink,
    writer: Arc<Writer>,
}

/// Statistics under Envoy's names.
pub(super) struct FileStats {
    write_buffered: Counter,
    pub(super) write_completed: Counter,
    pub(super) write_failed: Counter,
    pub(super) write_total_buffered: Gauge,
    reopen_failed: Counter,
    pub(super) lines_dropped: Counter,
}

pub(super) static STATS: LazyLock<FileStats> = LazyLock::new(|| FileStats {
    write_buffered: stats::counter("filesystem.write_buffered"),
    write_completed: stats::counter("filesystem.write_completed"),
    write_failed: stats::counter("filesystem.write_failed"),
    write_total_buffered: stats::gauge("filesystem.write_total_buffered"),
    reopen_failed: stats::counter("filesystem.reopen_failed"),
    lines_dropped: stats::counter("access_logs.lines_dropped"),
});

/// Every sink that a log uses.
static SINKS: Mutex<Vec<Weak<Sink>>> = Mutex::new(Vec::new());

impl Sink {
    /// The sink of a target: logs that share a file share it.
    pub(super) fn open(target: &AccessLogSink) -> Result<Arc<Sink>, String> {
        let target = match target {
            AccessLogSink::File(path) if path == Path::new("/dev/stdout") => AccessLogSink::Stdout,
            AccessLogSink::File(path) if path == Path::new("/dev/stderr") => AccessLogSink::Stderr,
            other => other.clone(),
        };
        let mut sinks = SINKS.lock().unwrap_or_else(PoisonError::into_inner);
        sinks.retain(|sink| sink.strong_count() > 0);
        if let Some(known) = sinks.iter().filter_map(Weak::upgrade).find(|sink| sink.target == target) {
            return Ok(known);
        }
        // Before any worker logs, so that no statistic is created on the request path.
        LazyLock::force(&STATS);
        let output = open(&target).map_err(|e| format!("cannot open {} for append: {e}", name(&target)))?;
        let writer = Writer::start(output);
        let writer = writer.map_err(|e| format!("cannot start the thread that writes {}: {e}", name(&target)))?;
        let sink = Arc::new(Sink { target, writer });
        sinks.push(Arc::downgrade(&sink));
        Ok(sink)
    }

    fn reopen(&self) -> Result<(), String> {
        let output = open(&self.target)
            .map_err(|e| format!("cannot reopen {}: {e}; the old file stays in use", name(&self.target)))?;
        self.writer.reopened(output);
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.writer.close();
    }
}

fn name(target: &AccessLogSink) -> String {
    match target {
        AccessLogSink::File(path) => format!("the access log {}", path.display()),
        AccessLogSink::Stdout => "standard output".into(),
        AccessLogSink::Stderr => "standard error".into(),
    }
}

fn open(target: &AccessLogSink) -> io::Result<Output> {
    Output::new(match target {
        AccessLogSink::File(path) => OpenOptions::new().append(true).create(true).open(path)?,
        AccessLogSink::Stdout => File::from(io::stdout().as_fd().try_clone_to_owned()?),
        AccessLogSink::Stderr => File::from(io::stderr().as_fd().try_clone_to_owned()?),
    })
}

/// A thread's lines for one sink.
struct Buffer {
    sink: Arc<Sink>,
    lines: Vec<u8>,
}

impl Buffer {
    fn flush(&mut self) {
        if !self.lines.is_empty() {
            self.sink.writer.lines(&mut self.lines);
        }
    }
}

/// A thread's buffers; the last is handed over when the thread ends.
#[derive(Default)]
struct Buffers(Vec<Buffer>);

impl Drop for Buffers {
    fn drop(&mut self) {
        self.0.iter_mut().for_each(Buffer::flush);
    }
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = const { RefCell::new(Buffers(Vec::new())) };
}

/// Lets `format` append one line to this thread's buffer for `sink`.
pub(super) fn append(sink: &Arc<Sink>, format: impl FnOnce(&mut Vec<u8>)) {
    BUFFERS.with_borrow_mut(|Buffers(buffers)| {
        let index = match buffers.iter().position(|buffer| Arc::ptr_eq(&buffer.sink, sink)) {
            Some(index) => index,
            None => {
                buffers.push(Buffer { sink: Arc::clone(sink), lines: Vec::new() });
                buffers.len() - 1
            }
        };
        let buffer = &mut buffers[index];
        let before = buffer.lines.len();
        format(&mut buffer.lines);
        STATS.write_buffered.inc();
        STATS.write_total_buffered.add((buffer.lines.len() - before) as u64);
        if buffer.lines.len() >= FLUSH_BYTES {
            buffer.flush();
        }
    });
}

/// Hands over what this thread has buffered. Every worker calls it once a second, and before it ends.
pub fn flush_thread() {
    BUFFERS.with_borrow_mut(|Buffers(buffers)| {
        // A buffer that got nothing since the last call is given back, and with it its sink.
        buffers.retain_mut(|buffer| {
            let used = !buffer.lines.is_empty();
            buffer.flush();
            used
        });
    });
}

/// Told when every thread shall hand over what it has buffered.
static FLUSHES: LazyLock<watch::Sender<()>> = LazyLock::new(|| watch::Sender::new(()));

/// Changes whenever threads shall call [`flush_thread`] at once.
pub fn flushes() -> watch::Receiver<()> {
    FLUSHES.subscribe()
}

/// Opens all log files anew, for log rotation, and has what is buffered written there. A file that cannot be opened stays as it was: the errors say which.
pub fn reopen_all() -> Vec<String> {
    let sinks: Vec<_> = {
        let sinks = SINKS.lock().unwrap_or_else(PoisonError::into_inner);
        sinks.iter().filter_map(Weak::upgrade).collect()
    };
    let errors: Vec<_> = sinks.iter().filter_map(|sink| sink.reopen().err()).collect();
    STATS.reopen_failed.add(errors.len() as u64);
    FLUSHES.send_replace(());
    errors
}

#[cfg(test)]
#[path = "sink_tests.rs"]
mod tests;
