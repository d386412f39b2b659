//! Tables of text that fit the terminal.

/// Between two columns.
const GAP: &str = "  ";
/// What no column is cut below, in characters.
const LEAST: usize = 8;

/// How wide the terminal is, in characters.
pub fn terminal_width() -> Option<usize> {
    terminal_size::terminal_size().map(|(width, _)| usize::from(width.0))
}

/// Lines with a head. `width`: what the widest columns are cut for, so that lines have at most that many characters.
pub fn lines(columns: &[&str], rows: &[Vec<String>], indent: &str, width: Option<usize>) -> String {
    let head = columns.iter().map(|column| (*column).to_owned()).collect();
    let rows: Vec<Vec<String>> =
        std::iter::once(&head).chain(rows).map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let longest =
        |column: usize| rows.iter().filter_map(|row: &Vec<String>| row.get(column)).map(|c| c.chars().count()).max();
    let mut widths: Vec<usize> = (0..columns.len()).map(|column| longest(column).unwrap_or(0)).collect();
    if let Some(limit) = width {
        let between = indent.len() + GAP.len() * columns.len().saturating_sub(1);
        while between + widths.iter().sum::<usize>() > limit {
            let Some(widest) = widths.iter_mut().max().filter(|widest| **widest > LEAST) else { break };
            *widest -= 1;
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<_> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{:<width$}", cut(cell, *width))).collect();
        let line = format!("{indent}{}", cells.join(GAP));
        // A terminal narrower than all columns' least widths gets the left part.
        text.push_str(&cut(line.trim_end(), width.unwrap_or(usize::MAX)));
        text.push('\n');
    }
    text
}

/// Names from outside go to a terminal: without anything that a terminal would obey.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(width: Option<usize>) -> String {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        lines(&["NAME", "A", "LONG"], &[row(["a\x1b[1m", "1", &"x".repeat(40)]), row(["b", "22", ""])], " ", width)
    }

    #[test]
    fn columns_are_aligned_and_nothing_commands_the_terminal() {
        let x = "x".repeat(40);
        assert_eq!(table(None), format!(" NAME   A   LONG\n a [1m  1   {x}\n b      22\n"));
    }

    #[test]
    fn the_widest_column_is_cut() {
        assert_eq!(table(Some(24)), " NAME   A   LONG\n a [1m  1   xxxxxxxxxxx…\n b      22\n");
        assert!(table(Some(9)).lines().all(|line| line.chars().count() <= 9));
    }
}
