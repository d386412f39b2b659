//! A daemon in a process of its own, to be killed.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

/// Set for the process that plays the daemon: what it is to be.
const DAEMON: &str = "CULVERT_TEST_DAEMON";
/// What it says when it serves.
const SERVING: &str = "the daemon serves";

/// Starts it, and waits until it serves. The test binary needs a test `play_the_daemon`, which does what [`role`] says.
pub fn daemon(role: &[&str]) -> Child {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "play_the_daemon", "--nocapture"])
        .env(DAEMON, role.join(","))
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains(SERVING)), "the daemon did not start");
    child
}

/// What this process is to be, if it plays the daemon: as many words as the test gave.
pub fn role<const WORDS: usize>() -> Option<[String; WORDS]> {
    let role = std::env::var(DAEMON).ok()?;
    let words: Vec<String> = role.split(',').map(str::to_owned).collect();
    Some(words.try_into().expect("as many words"))
}

/// Says that this process serves, and does so until it is killed.
pub fn serve(mut work: impl FnMut()) -> ! {
    println!("{SERVING}");
    loop {
        work();
    }
}
