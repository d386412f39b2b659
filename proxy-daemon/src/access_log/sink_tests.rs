use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    process,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use super::*;
use crate::{
    access_log::{AccessLog, Record, Substitution, finish},
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

/// Hands over what this thread has buffered, and waits until it is written.
fn flush() {
    flush_thread();
    finish(Duration::from_secs(10));
}

#[test]
fn lines_are_written_when_they_are_flushed() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME%\n");
    log.write(&route("a"));
    assert_eq!(fs::read_to_string(&path).unwrap(), "");
    flush();
    assert_eq!(fs::read_to_string(&path).unwrap(), "a\n");
    flush();
    assert_eq!(fs::read_to_string(&path).unwrap(), "a\n");
}

#[test]
fn a_full_buffer_and_the_end_of_a_thread_flush_too() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME%\n");
    thread::spawn(move || {
        let name = "x".repeat(1000);
        (0..100).for_each(|_| log.write(&route(&name)));
        finish(Duration::from_secs(10));
        assert!(fs::metadata(&path).unwrap().len() >= FLUSH_BYTES as u64, "without flush_thread");
        drop(log);
        path
    })
    .join()
    .inspect(|_| finish(Duration::from_secs(10)))
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
    finish(Duration::from_secs(10));
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
    flush();
    assert_eq!(fs::read_to_string(path).unwrap(), "1 a\n2 b\n1 c\n", "in order");
}

#[test]
fn a_rotated_file_is_opened_anew() {
    let dir = Dir::new();
    let (log, path) = dir.log("%ROUTE_NAME%\n");
    let rotated = dir.0.join("access.log.1");
    log.write(&route("old"));
    flush();
    fs::rename(&path, &rotated).unwrap();
    assert_eq!(reopen_all(), Vec::<String>::new());
    log.write(&route("new"));
    flush();
    assert_eq!(fs::read_to_string(&rotated).unwrap(), "old\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "new\n");

    // Where it cannot be opened, the old one stays.
    fs::rename(&path, dir.0.join("access.log.2")).unwrap();
    fs::create_dir(&path).unwrap();
    let errors: Vec<_> = reopen_all().into_iter().filter(|e| e.contains(dir.0.to_str().unwrap())).collect();
    assert!(errors.len() == 1 && errors[0].contains("cannot reopen the access log"), "{errors:?}");
    log.write(&route("still"));
    flush();
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
