//! Rows as a table that fits the terminal.

use std::{collections::BTreeMap, time::SystemTime};

use super::rows::{Row, State, service};

const COLUMNS: [&str; 6] = ["TYPE", "NAME", "VERSION", "STATE", "AGE", "REASON"];
const NAME: usize = 1;
const VERSION: usize = 2;
const STATE: usize = 3;
const REASON: usize = 5;
/// Between two columns.
const GAP: usize = 2;
/// To these widths columns are cut before others get less: the name is what a row is found by.
const LEAST: [(usize, usize); 3] = [(REASON, 30), (VERSION, 12), (NAME, 20)];

/// How wide the terminal is, in characters.
pub fn terminal_width() -> Option<usize> {
    terminal_size::terminal_size().map(|(width, _)| usize::from(width.0))
}

/// The table, with a line below that counts. `width`: what every line is cut to.
pub fn text(rows: &[Row], now: SystemTime, width: Option<usize>, colours: bool) -> String {
    if rows.is_empty() {
        return "no resources\n".to_owned();
    }
    let mut cells: Vec<[String; 6]> = vec![COLUMNS.map(str::to_owned)];
    cells.extend(rows.iter().map(|row| line(row, now)));
    if rows.iter().all(|row| row.rejected.is_none() && row.waits.is_none()) {
        cells.iter_mut().for_each(|line| line[REASON].clear());
    }
    let mut widths = [0; 6];
    for line in &cells {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    if let Some(limit) = width {
        fit(&mut widths, limit);
    }
    let mut text = String::new();
    for (index, line) in cells.iter().enumerate() {
        let colour = match index.checked_sub(1) {
            None => Some(BOLD),
            Some(row) => colour(rows[row].state),
        };
        write_line(&mut text, line, &widths, width, colour.filter(|_| colours), index == 0);
    }
    text.push_str(&format!("\n{}\n", summary(rows)));
    text
}

const BOLD: &str = "\x1b[1m";
const RESET: &str = "\x1b[0m";

fn colour(state: State) -> Option<&'static str> {
    match state {
        State::Serving | State::Static | State::Connected => None,
        State::Incomplete | State::Rejected | State::Disconnected => Some("\x1b[31m"),
        State::Updating | State::Warming | State::Requested | State::Unknown => Some("\x1b[33m"),
        State::Missing => Some("\x1b[35m"),
    }
}

fn line(row: &Row, now: SystemTime) -> [String; 6] {
    let reason = row.rejected.as_ref().map(|(version, reason)| match version.as_str() {
        "" => reason.clone(),
        version => format!("{version}: {reason}"),
    });
    let reason = reason.or_else(|| row.waits.clone());
    [
        service(&row.type_url),
        &row.name,
        if row.version.is_empty() { "-" } else { &row.version },
        row.state.name(),
        &row.since.map_or("-".to_owned(), |at| age(now.duration_since(at).unwrap_or_default().as_secs())),
        &reason.unwrap_or_default(),
    ]
    .map(printable)
}

/// What the control plane says goes to a terminal: without anything that a terminal would obey.
fn printable(text: &str) -> String {
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A time as its largest unit.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Takes away from the columns that can be cut, until a line has at most `limit` characters or nothing can be taken.
fn fit(widths: &mut [usize; 6], limit: usize) {
    for (column, least) in LEAST.into_iter().chain([(REASON, 0)]) {
        let total: usize = widths.iter().filter(|width| **width > 0).map(|width| width + GAP).sum::<usize>() - GAP;
        let excess = total.saturating_sub(limit);
        let spare = widths[column].saturating_sub(least);
        widths[column] -= excess.min(spare);
    }
}

fn write_line(
    text: &mut String,
    cells: &[String; 6],
    widths: &[usize; 6],
    limit: Option<usize>,
    colour: Option<&str>,
    whole_line: bool,
) {
    // What of the terminal's width is left.
    let mut left = limit.unwrap_or(usize::MAX);
    let last = cells.iter().rposition(|cell| !cell.is_empty()).unwrap_or(0);
    if whole_line {
        text.extend(colour);
    }
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate().take(last + 1) {
        let width = (*width).min(left);
        if width == 0 {
            continue;
        }
        let shown = cut(cell, width);
        let used = shown.chars().count();
        let paint = colour.filter(|_| column == STATE && !whole_line);
        text.extend(paint);
        text.push_str(&shown);
        if paint.is_some() {
            text.push_str(RESET);
        }
        left -= width;
        if column < last {
            let gap = GAP.min(left);
            text.extend(std::iter::repeat_n(' ', width - used + gap));
            left -= gap;
        }
    }
    if whole_line && colour.is_some() {
        text.push_str(RESET);
    }
    text.push('\n');
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

fn summary(rows: &[Row]) -> String {
    let (sources, resources): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.is_source());
    let all = [("resource", resources), ("source", sources)].into_iter().filter(|(_, rows)| !rows.is_empty());
    let parts = all.map(|(noun, rows)| {
        let mut counts = BTreeMap::<State, usize>::new();
        for row in &rows {
            *counts.entry(row.state).or_default() += 1;
        }
        let counts: Vec<_> = counts.into_iter().map(|(state, count)| format!("{count} {}", state.name())).collect();
        let plural = if rows.len() == 1 { "" } else { "s" };
        format!("{} {noun}{plural}: {}", rows.len(), counts.join(", "))
    });
    parts.collect::<Vec<_>>().join("; ")
}
