//! The thread that writes a file's lines. A disk that stalls and a pipe that nobody reads hold up this thread, and no worker.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write as _},
    os::fd::AsFd as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::sink::STATS;

/// So many bytes wait for a file that takes none; then lines are dropped.
pub(super) const MAX_WAITING_BYTES: usize = 8 << 20;
/// A pipe takes so many bytes at once or none of them.
const PIPE_BUF: usize = 4096;
/// So many empty buffers are kept.
const MAX_SPARE: usize = 8;

/// What threads hand their lines to, in the order in which they are to be written. It is locked for as long as that takes, and not while
/// anything is written.
#[derive(Debug)]
pub(super) struct Writer {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// All whose threads have not ended.
static WRITERS: Mutex<Vec<Weak<Writer>>> = Mutex::new(Vec::new());

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    /// How many bytes of lines there are, those included that are being written.
    bytes: usize,
    /// The thread is at something that it has taken out of `items`.
    busy: bool,
    /// Nothing more comes.
    closed: bool,
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
enum Item {
    Lines(Vec<u8>),
    /// What comes after it is for this file.
    Reopened(Output),
}

/// An open file.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    /// What is written to a regular file at once is not mixed with what others write to it, in append mode; to anything else (a pipe, a
    /// terminal) only small pieces are not.
    is_regular: bool,
}

impl Output {
    pub(super) fn new(file: File) -> io::Result<Output> {
        let is_regular = file.metadata()?.is_file();
        Ok(Output { file, is_regular })
    }

    fn write(&self, mut lines: &[u8]) -> io::Result<()> {
        while !lines.is_empty() {
            let (piece, rest) = lines.split_at(if self.is_regular { lines.len() } else { piece_len(lines) });
            self.write_piece(piece)?;
            lines = rest;
        }
        Ok(())
    }

    fn write_piece(&self, mut piece: &[u8]) -> io::Result<()> {
        while !piece.is_empty() {
            match (&self.file).write(piece) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => piece = &piece[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Whoever started the daemon may share the output with it, and have made it so.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut room = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut room, PollTimeout::NONE)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// As many whole lines as a pipe takes at once; a line longer than that goes alone.
fn piece_len(lines: &[u8]) -> usize {
    let window = &lines[..lines.len().min(PIPE_BUF)];
    let in_window = window.iter().rposition(|b| *b == b'\n');
    let end = in_window.or_else(|| lines.iter().position(|b| *b == b'\n'));
    end.map_or(lines.len(), |newline| newline + 1)
}

impl Writer {
    /// Starts the thread, which ends when all is written after [`close`](Self::close).
    ///
    /// # Errors
    /// There can be no further thread.
    pub(super) fn start(output: Output) -> io::Result<Arc<Writer>> {
        let writer = Arc::new(Writer { queue: Mutex::default(), changed: Condvar::new() });
        let of_thread = Arc::clone(&writer);
        let mut writers = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
        writers.retain(|writer| writer.strong_count() > 0);
        writers.push(Arc::downgrade(&writer));
        thread::Builder::new().name("access-log".into()).spawn(move || of_thread.run(output))?;
        Ok(writer)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut output: Output) {
        let mut queue = self.queue();
        loop {
            match queue.items.pop_front() {
                Some(Item::Lines(mut lines)) => {
                    queue.busy = true;
                    drop(queue);
                    match output.write(&lines) {
                        Ok(()) => STATS.write_completed.inc(),
                        // Nobody can be told for each line that is lost: the statistic is where to look.
                        Err(_) => STATS.write_failed.inc(),
                    }
                    STATS.write_total_buffered.sub(lines.len() as u64);
                    queue = self.queue();
                    queue.busy = false;
                    queue.bytes -= lines.len();
                    if queue.spare.len() < MAX_SPARE {
                        lines.clear();
                        queue.spare.push(lines);
                    }
                }
                Some(Item::Reopened(reopened)) => output = reopened,
                None => {
                    // For those who wait for this.
                    self.changed.notify_all();
                    if queue.closed {
                        return;
                    }
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Takes lines, and gives an empty buffer for further ones. Where too much waits they are dropped, and counted.
    pub(super) fn lines(&self, lines: &mut Vec<u8>) {
        let mut queue = self.queue();
        if queue.bytes + lines.len() > MAX_WAITING_BYTES {
            drop(queue);
            STATS.lines_dropped.add(lines.iter().filter(|b| **b == b'\n').count() as u64);
            STATS.write_total_buffered.sub(lines.len() as u64);
            lines.clear();
            return;
        }
        queue.bytes += lines.len();
        let empty = queue.spare.pop().unwrap_or_default();
        queue.items.push_back(Item::Lines(std::mem::replace(lines, empty)));
        drop(queue);
        self.changed.notify_all();
    }

    /// What is handed over from now on goes to this file.
    pub(super) fn reopened(&self, output: Output) {
        let mut queue = self.queue();
        match queue.items.back_mut() {
            // Nothing was written for the one before.
            Some(Item::Reopened(before)) => *before = output,
            _ => queue.items.push_back(Item::Reopened(output)),
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Nothing more comes.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }

    fn finish(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        let waiting = |queue: &mut Queue| queue.busy || !queue.items.is_empty();
        drop(self.changed.wait_timeout_while(self.queue(), left, waiting));
    }
}

/// Waits until all that was handed over is written, for `limit` at most.
pub(crate) fn finish(limit: Duration) {
    let writers: Vec<_> = {
        let writers = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
        writers.iter().filter_map(Weak::upgrade).collect()
    };
    let deadline = Instant::now() + limit;
    writers.iter().for_each(|writer| writer.finish(deadline));
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
