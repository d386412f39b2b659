//! Where lines go: one sink a file, with a buffer in every thread that writes to it.

use std::{
    cell::RefCell,
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    sync::{Arc, LazyLock, Mutex, PoisonError, Weak},
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::{
    config::model::AccessLogSink,
    stats::{self, Counter, Gauge},
};

/// A thread's buffer is written when it holds so many bytes.
const FLUSH_BYTES: usize = 64 << 10;
/// A thread keeps so many bytes for a pipe that nobody reads; then lines are dropped.
const MAX_HELD_BYTES: usize = 1 << 20;
/// A pipe takes so many bytes at once or none of them.
const PIPE_BUF: usize = 4096;

/// A file, or one of the daemon's own outputs.
#[derive(Debug)]
pub(super) struct Sink {
    target: AccessLogSink,
    output: ArcSwap<Output>,
}

/// An open file.
#[derive(Debug)]
struct Output {
    file: File,
    /// A regular file never makes a writer wait; anything else (a pipe, a terminal) may, and is written in small pieces by
    /// one thread at a time, only when it has room.
    one_at_a_time: Option<Mutex<()>>,
}

/// Statistics under Envoy's names.
struct FileStats {
    write_buffered: Counter,
    write_completed: Counter,
    write_failed: Counter,
    write_total_buffered: Gauge,
    reopen_failed: Counter,
    lines_dropped: Counter,
}

static STATS: LazyLock<FileStats> = LazyLock::new(|| FileStats {
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
        let output = Output::open(&target).map_err(|e| format!("cannot open {} for append: {e}", name(&target)))?;
        // Before any worker writes, so that no statistic is created on the request path.
        LazyLock::force(&STATS);
        let sink = Arc::new(Sink { target, output: ArcSwap::from_pointee(output) });
        sinks.push(Arc::downgrade(&sink));
        Ok(sink)
    }

    fn reopen(&self) -> Result<(), String> {
        let output = Output::open(&self.target)
            .map_err(|e| format!("cannot reopen {}: {e}; the old file stays in use", name(&self.target)))?;
        self.output.store(Arc::new(output));
        Ok(())
    }
}

fn name(target: &AccessLogSink) -> String {
    match target {
        AccessLogSink::File(path) => format!("the access log {}", path.display()),
        AccessLogSink::Stdout => "standard output".into(),
        AccessLogSink::Stderr => "standard error".into(),
    }
}

impl Output {
    fn open(target: &AccessLogSink) -> io::Result<Output> {
        let file = match target {
            AccessLogSink::File(path) => OpenOptions::new().append(true).create(true).open(path)?,
            AccessLogSink::Stdout => File::from(io::stdout().as_fd().try_clone_to_owned()?),
            AccessLogSink::Stderr => File::from(io::stderr().as_fd().try_clone_to_owned()?),
        };
        let one_at_a_time = (!file.metadata()?.is_file()).then(Mutex::default);
        Ok(Output { file, one_at_a_time })
    }

    /// Writes `lines` and takes what was written off its front. What is left waits for room.
    fn write(&self, lines: &mut Vec<u8>) -> io::Result<()> {
        let Some(one_at_a_time) = &self.one_at_a_time else {
            // One call, so that in append mode lines of different threads do not mix.
            let result = (&self.file).write_all(lines);
            lines.clear();
            return result;
        };
        let _only_this_thread = one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let mut written = 0;
        let result = loop {
            let rest = &lines[written..];
            if rest.is_empty() || !self.has_room() {
                break Ok(());
            }
            // Of a line that no pipe takes at once, what there is room for: where the reader is slow, another thread's lines may come
            // between its parts, but nobody waits.
            let piece = &rest[..piece_len(rest).min(PIPE_BUF)];
            match (&self.file).write_all(piece) {
                Ok(()) => written += piece.len(),
                Err(error) => {
                    written = lines.len();
                    break Err(error);
                }
            }
        };
        lines.drain(..written);
        result
    }

    /// Whether a write of [`PIPE_BUF`] bytes would not wait.
    fn has_room(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: `poll` is one valid pollfd, and the descriptor is open for as long as `self.file` is.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        ready > 0
    }
}

/// As many whole lines as a pipe takes at once; a line longer than that goes alone.
fn piece_len(lines: &[u8]) -> usize {
    let window = &lines[..lines.len().min(PIPE_BUF)];
    let in_window = window.iter().rposition(|b| *b == b'\n');
    let end = in_window.or_else(|| lines.iter().position(|b| *b == b'\n'));
    end.map_or(lines.len(), |newline| newline + 1)
}

/// A thread's lines for one sink.
struct Buffer {
    sink: Arc<Sink>,
    lines: Vec<u8>,
}

impl Buffer {
    fn flush(&mut self) {
        let held = self.lines.len();
        if held == 0 {
            return;
        }
        match self.sink.output.load().write(&mut self.lines) {
            Ok(()) => STATS.write_completed.inc(),
            // Nobody can be told on a path that every request takes: the statistic is where to look.
            Err(_) => STATS.write_failed.inc(),
        }
        if self.lines.len() > MAX_HELD_BYTES {
            let dropped = self.lines.iter().filter(|b| **b == b'\n').count();
            STATS.lines_dropped.add(dropped as u64);
            self.lines.clear();
        }
        STATS.write_total_buffered.sub((held - self.lines.len()) as u64);
    }
}

/// A thread's buffers; the last is written when the thread ends.
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
        // At every 64 KiB again, where a pipe takes nothing: not at every line.
        if before / FLUSH_BYTES != buffer.lines.len() / FLUSH_BYTES {
            buffer.flush();
        }
    });
}

/// Writes what this thread has buffered. Every worker calls it once a second, and before it ends.
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

/// Told when every thread shall write what it has buffered.
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
