//! What commands that go on for long show: lines of what happened, and below them on a terminal how it stands.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;

/// Lines on standard error and, if that is a terminal, a last line that changes.
#[derive(Debug, Clone)]
pub struct Terminal(ProgressBar);

impl Terminal {
    /// Shows nothing yet.
    pub fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// A line that stays, with the time of day.
    pub fn line(&self, text: &str) {
        self.plain(&format!("{} {text}", clock()));
    }

    /// A line that stays.
    pub fn plain(&self, text: &str) {
        let text = printable(text);
        self.0.suspend(|| eprintln!("{text}"));
    }

    /// How it stands.
    pub fn state(&self, text: &str) {
        self.0.set_message(printable(text));
    }
}

/// Text from outside goes to a terminal: without anything that a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

/// The time of day in UTC, as logs have it.
fn clock() -> String {
    Timestamp::now().strftime("%H:%M:%S").to_string()
}

/// A time in seconds since the epoch, in words.
pub fn time(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// A number of bytes in words.
pub fn bytes(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit behind the point")]
    let count_of = |unit: u64| count as f64 / unit as f64;
    match count {
        0..1000 => format!("{count} B"),
        1000..1_000_000 => format!("{:.1} kB", count_of(1000)),
        _ => format!("{:.1} MB", count_of(1_000_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people_and_nothing_commands_the_terminal() {
        assert_eq!([0, 999, 1500, 2_500_000].map(bytes), ["0 B", "999 B", "1.5 kB", "2.5 MB"]);
        assert_eq!(time(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(printable("a\x1b[2Jb\r\n"), "a [2Jb \n");
    }
}
