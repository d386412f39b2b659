//! Runs long commands with a line that shows what they are at.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// How many of a failed command's last lines are shown.
const SHOWN_LINES: usize = 40;

/// Runs a command to its end. Its output is shown one line at a time, and its last lines if it fails.
pub fn run(what: &str, command: &mut Command) -> Result<()> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {elapsed:>4} {prefix}: {wide_msg}")?);
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    if bar.is_hidden() {
        eprintln!("{what} ...");
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{what}: cannot run `{}`", command.get_program().display()))?;
    let last = Mutex::new(VecDeque::with_capacity(SHOWN_LINES));
    std::thread::scope(|scope| {
        let (out, err) = (child.stdout.take(), child.stderr.take());
        scope.spawn(|| show(out, &bar, &last));
        scope.spawn(|| show(err, &bar, &last));
    });
    let status = child.wait().with_context(|| format!("{what}: cannot wait for the command"))?;
    let elapsed = bar.elapsed();
    bar.finish_and_clear();
    if !status.success() {
        let lines: Vec<String> = last.into_inner().unwrap_or_else(PoisonError::into_inner).into();
        bail!("{what} failed ({status}):\n{}", lines.join("\n"));
    }
    eprintln!("{what}: done in {:.0} s", elapsed.as_secs_f32().ceil());
    Ok(())
}

fn show(stream: Option<impl Read>, bar: &ProgressBar, last: &Mutex<VecDeque<String>>) {
    let Some(stream) = stream else { return };
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        bar.set_message(line.trim().to_owned());
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == SHOWN_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
}
