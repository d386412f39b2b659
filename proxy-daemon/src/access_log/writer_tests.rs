use std::{io::Read as _, os::fd::OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::*;

/// The writer of a pipe, and the pipe's other end.
fn pipe() -> (io::PipeReader, Arc<Writer>) {
    let (reader, writer) = io::pipe().unwrap();
    (reader, Writer::start(Output::new(File::from(OwnedFd::from(writer))).unwrap()).unwrap())
}

/// Hands over so many lines of 100 bytes.
fn hand(writer: &Writer, count: usize) {
    writer.lines(&mut ("y".repeat(99) + "\n").repeat(count).into_bytes());
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

#[test]
fn a_pipe_that_nobody_reads_holds_up_its_own_thread_alone() {
    let (mut reader, writer) = pipe();
    // More than pipes have room for.
    hand(&writer, 20_000);
    writer.finish(Instant::now());
    assert!(writer.queue().busy || !writer.queue().items.is_empty(), "not all is written");
    let mut received = vec![0; 2_000_000];
    reader.read_exact(&mut received).unwrap();
    writer.finish(soon());
    let queue = writer.queue();
    assert_eq!((queue.bytes, queue.busy, queue.items.len()), (0, false, 0));
    assert!(received.chunks(100).all(|line| line.ends_with(b"y\n")));
}

#[test]
fn an_output_that_does_not_block_loses_nothing() {
    let (mut reader, output) = io::pipe().unwrap();
    fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let writer = Writer::start(Output::new(File::from(OwnedFd::from(output))).unwrap()).unwrap();
    hand(&writer, 20_000);
    let mut received = vec![0; 2_000_000];
    reader.read_exact(&mut received).unwrap();
    assert!(received.chunks(100).all(|line| line.ends_with(b"y\n")));
}

#[test]
fn who_waits_is_told_when_the_last_is_written() {
    let (reader, writer) = pipe();
    hand(&writer, 20_000);
    writer.close();
    let began = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| writer.finish(Instant::now() + Duration::from_secs(60)));
        // Its thread ends with the last line.
        std::thread::spawn(move || io::copy(&mut { reader }, &mut io::sink()));
    });
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn what_is_too_much_is_dropped() {
    let (mut reader, writer) = pipe();
    let dropped = STATS.lines_dropped.value();
    for _ in 0..10 {
        hand(&writer, 10_000);
    }
    assert_eq!(STATS.lines_dropped.value() - dropped, 20_000, "10 MB came and 8 MiB are kept");
    assert_eq!(writer.queue().bytes, 8_000_000);
    let mut received = vec![0; 8_000_000];
    reader.read_exact(&mut received).unwrap();
    writer.finish(soon());
    hand(&writer, 1);
    reader.read_exact(&mut received[..100]).unwrap();
}

#[test]
fn a_pipe_whose_reader_is_gone_keeps_nothing() {
    let (reader, writer) = pipe();
    drop(reader);
    let failed = STATS.write_failed.value();
    hand(&writer, 1);
    writer.finish(soon());
    assert_eq!(STATS.write_failed.value() - failed, 1);
    assert_eq!(writer.queue().bytes, 0);
}

#[test]
fn what_comes_before_a_new_file_goes_to_the_old_one() {
    let (mut old, writer) = pipe();
    let (mut new, output) = io::pipe().unwrap();
    hand(&writer, 1000);
    writer.reopened(Output::new(File::from(OwnedFd::from(output))).unwrap());
    hand(&writer, 1);
    let mut received = Vec::new();
    // The old file is closed once the new one is there.
    old.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 100_000);
    writer.close();
    drop(writer);
    received.clear();
    new.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 100);
}

#[test]
fn pieces_are_whole_lines() {
    assert_eq!(piece_len(b"a\nb\n"), 4);
    let long = [vec![b'x'; 5000], b"\nb\n".to_vec()].concat();
    assert_eq!(piece_len(&long), 5001);
    assert_eq!(piece_len(b"no newline"), 10);
    let many = b"0123456\n".repeat(1000);
    assert_eq!(piece_len(&many), 4096);
}
