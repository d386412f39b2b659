use std::{
    collections::HashMap,
    fs,
    io::Read as _,
    os::fd::OwnedFd,
    path::PathBuf,
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use super::*;
use crate::{
    access_log::{AccessLog, Record, Substitution},
    config::model::{AccessLogConfig, AccessLogFilter, AccessLogOutput},
};

/// A directory of one test, removed at its end.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("culvert-access-log-{}-{number}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    fn log(&self, format: &str) -> (AccessLog, PathBuf) {
        let path = self.0.join("access.log");
        let (sink, format) = (AccessLogSink::File(path.clone()), Substitution::text(format, false).unwrap());
        let output = AccessLogOutput::Lines { sink, format: Some(Arc::new(format)) };
        let config = AccessLogConfig { output, filter: AccessLogFilter::Always };
        (AccessLog::new(&config).unwrap(), path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn route(name: &str) -> Record<'_> {
    Record { route_name: Some(name), ..Record::default() }
}

#[test]
fn lines_are_written_when_they_are_flushed() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME%\n");
    log.write(&route("a"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "");
    flush_thread();
    assert_eq!(fs::read_to_string(&path).unwrap(), "a\n");
    flush_thread();
    assert_eq!(fs::read_to_string(&path).unwrap(), "a\n");
}

#[test]
fn a_full_buffer_and_the_end_of_a_thread_flush_too() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME%\n");
    thread::spawn(move || {
        let name = "x".repeat(1000);
        (0..100).for_each(|_| log.write(&route(&name)));
        assert!(fs::metadata(&path).unwrap().len() >= FLUSH_BYTES as u64, "without flush_thread");
        drop(log);
        path
    })
    .join()
    .map(|path| assert_eq!(fs::read_to_string(path).unwrap().lines().count(), 100))
    .unwrap();
}

#[test]
fn threads_share_a_file_without_mixing_their_lines() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME% %ROUTE_NAME%\n");
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let log = log.clone();
            thread::spawn(move || {
                let name = writer.to_string().repeat(200);
                (0..2000).for_each(|_| log.write(&route(&name)));
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let mut lines: HashMap<String, u32> = HashMap::new();
    fs::read_to_string(path).unwrap().lines().for_each(|line| *lines.entry(line.to_owned()).or_default() += 1);
    assert_eq!(lines.len(), 4, "every line is whole");
    assert!(lines.values().all(|count| *count == 2000));
}

#[test]
fn logs_of_one_file_share_their_sink() {
    let dir = Dir::new();
    let (first, path) = dir.log("1 %ROUTE_NAME%\n");
    let (second, _) = dir.log("2 %ROUTE_NAME%\n");
    first.write(&route("a"));
    second.write(&route("b"));
    first.write(&route("c"));
    flush_thread();
    assert_eq!(fs::read_to_string(path).unwrap(), "1 a\n2 b\n1 c\n", "in order");
}

#[test]
fn a_rotated_file_is_opened_anew() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME%\n");
    let rotated = dir.0.join("access.log.1");
    log.write(&route("old"));
    flush_thread();
    fs::rename(&path, &rotated).unwrap();
    assert_eq!(reopen_all(), Vec::<String>::new());
    log.write(&route("new"));
    flush_thread();
    assert_eq!(fs::read_to_string(&rotated).unwrap(), "old\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");

    // Where it cannot be opened, the old one stays.
    fs::rename(&path, dir.0.join("access.log.2")).unwrap();
    fs::create_dir(&path).unwrap();
    let errors: Vec<_> = reopen_all().into_iter().filter(|e| e.contains(dir.0.to_str().unwrap())).collect();
    assert!(errors.len() == 1 && errors[0].contains("cannot reopen the access log"), "{errors:?}");
    log.write(&route("still"));
    flush_thread();
    assert_eq!(fs::read_to_string(dir.0.join("access.log.2")).unwrap(), "new\nstill\n");
}

#[test]
fn a_path_that_cannot_be_opened_is_named() {
    let sink = AccessLogSink::File("/proc/no/such/dir/access.log".into());
    let output = AccessLogOutput::Lines { sink, format: None };
    let config = AccessLogConfig { output, filter: AccessLogFilter::Always };
    let error = AccessLog::new(&config).unwrap_err().to_string();
    assert!(error.starts_with("path: cannot open the access log /proc/no/such/dir/access.log"), "{error}");
}

/// A sink that writes to a pipe, and the pipe's other end.
fn pipe() -> (io::PipeReader, Output) {
    let (reader, writer) = io::pipe().unwrap();
    (reader, Output { file: File::from(OwnedFd::from(writer)), one_at_a_time: Some(Mutex::new(())) })
}

#[test]
fn a_pipe_that_nobody_reads_does_not_stop_the_writer() {
    let (mut reader, output) = pipe();
    let line = "y".repeat(99) + "\n";
    let mut lines = line.repeat(2000).into_bytes();
    let all = lines.len();
    output.write(&mut lines).unwrap();
    let left = lines.len();
    assert!(0 < left && left < all, "the pipe took {} of {all} bytes", all - left);
    assert_eq!(left % 100, 0, "whole lines are left");
    let mut received = vec![0; all - left];
    reader.read_exact(&mut received).unwrap();
    output.write(&mut lines).unwrap();
    assert!(lines.len() < left, "there was room again");
}

#[test]
fn a_line_longer_than_a_pipe_does_not_stop_the_writer_either() {
    let (mut reader, output) = pipe();
    // Pipes have room for 64 KiB, and may have more.
    let mut line = [vec![b'z'; 4 << 20], b"\n".to_vec()].concat();
    let all = line.len();
    output.write(&mut line).unwrap();
    assert!((1..all).contains(&line.len()), "{} of {all} bytes are left", line.len());
    let mut received = vec![0; all - line.len()];
    reader.read_exact(&mut received).unwrap();
    assert!(received.iter().all(|byte| *byte == b'z'));
}

#[test]
fn a_pipe_whose_reader_is_gone_is_an_error_and_keeps_nothing() {
    let (reader, output) = pipe();
    drop(reader);
    let mut lines = b"a\n".to_vec();
    output.write(&mut lines).unwrap_err();
    assert!(lines.is_empty());
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
