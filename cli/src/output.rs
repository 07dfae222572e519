//! What goes to standard output: tables of at most the terminal's width (80 columns where there is none), and JSON.
//!
//! Owns: widths, units, the cleaning of text that a server or a guest chose (a VM's name must not steer the terminal).
//! Never: cuts an id. A crash here costs the output of one command.

use std::io::{IsTerminal, Write};

use serde_json::Value;

use crate::failure::{Failure, Outcome};

/// Columns of the terminal, 80 where standard output is none.
pub fn width() -> usize {
    size().map_or(80, |(columns, _)| columns).clamp(40, 240)
}

/// Columns and rows of the terminal.
pub fn size() -> Option<(usize, usize)> {
    let stdout = std::io::stdout();
    let size = rustix::termios::tcgetwinsize(&stdout).ok()?;
    (size.ws_col > 0).then_some((usize::from(size.ws_col), usize::from(size.ws_row)))
}

/// True when a person looks at standard output.
pub fn is_live() -> bool {
    std::io::stdout().is_terminal()
}

/// Prints a line. A reader that has gone (`| head`) ends the process quietly, as it ends any other tool.
pub fn line(text: impl AsRef<str>) {
    raw(format!("{}\n", text.as_ref()).as_bytes());
}

/// Prints bytes as they are.
pub fn raw(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err() {
        std::process::exit(0);
    }
}

/// Prints a remark beside the answer.
pub fn remark(text: impl AsRef<str>) {
    let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
}

/// Prints JSON, indented.
pub fn json(value: &Value) -> Outcome {
    line(serde_json::to_string_pretty(value).map_err(|e| Failure::failed(e.to_string()))?);
    Ok(())
}

/// Text from elsewhere without anything that steers a terminal.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c) { '?' } else { c })
        .collect()
}

/// A field as text: strings without quotes, nothing for null.
pub fn text(value: &Value, field: &str) -> String {
    match value.get(field) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => clean(text),
        Some(other) => clean(&other.to_string()),
    }
}

/// A field as a number, 0 where it is none.
pub fn number(value: &Value, field: &str) -> u64 {
    match value.get(field) {
        Some(Value::Number(number)) => number.as_u64().unwrap_or_else(|| number.as_f64().map_or(0, |float| float.max(0.0) as u64)),
        _ => 0,
    }
}

/// `512 B`, `64.0 MiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `5s`, `3m`, `2h`, `4d` since a time as the API writes it; empty where it is none.
pub fn age(time: &str) -> String {
    let Ok(then) = chrono::DateTime::parse_from_rfc3339(time) else { return String::new() };
    let seconds = (shared::clock::now() - then.to_utc()).num_seconds().max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A column of a table.
pub struct Column {
    title: &'static str,
    right: bool,
    /// Columns that give way, last first, down to their own minimum.
    shrinks_to: Option<usize>,
}

impl Column {
    /// Never cut.
    pub fn fixed(title: &'static str) -> Self {
        Self { title, right: false, shrinks_to: None }
    }

    /// Numbers: never cut, set to the right.
    pub fn right(title: &'static str) -> Self {
        Self { title, right: true, shrinks_to: None }
    }

    /// Text that is cut with `…` where the line would be too long.
    pub fn shrinks(title: &'static str) -> Self {
        Self { title, right: false, shrinks_to: Some(10) }
    }
}

/// Rows under titles.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(columns: Vec<Column>) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row, one cell for each column.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Prints it.
    pub fn print(&self) {
        for text in self.render(width()) {
            line(text);
        }
    }

    /// The lines for this many columns.
    pub fn render(&self, width: usize) -> Vec<String> {
        let count = |text: &str| text.chars().count();
        let mut widths: Vec<usize> = self.columns.iter().map(|column| count(column.title)).collect();
        for row in &self.rows {
            for (slot, cell) in widths.iter_mut().zip(row) {
                *slot = (*slot).max(count(cell));
            }
        }
        let gaps = 2 * self.columns.len().saturating_sub(1);
        let mut over = (widths.iter().sum::<usize>() + gaps).saturating_sub(width);
        // The widest column that may shrink gives a character until all fit or none can give any more.
        while over > 0 {
            let room = |at: &usize| self.columns[*at].shrinks_to.is_some_and(|least| widths[*at] > least);
            let Some(widest) = (0..widths.len()).filter(room).max_by_key(|at| widths[*at]) else { break };
            widths[widest] -= 1;
            over -= 1;
        }
        let titles = self.columns.iter().map(|column| column.title.to_owned()).collect();
        std::iter::once(&titles).chain(&self.rows).map(|row| self.render_row(row, &widths)).collect()
    }

    fn render_row(&self, row: &[String], widths: &[usize]) -> String {
        let mut out = String::new();
        for ((cell, column), width) in row.iter().zip(&self.columns).zip(widths) {
            let cell = shorten(cell, *width);
            match column.right {
                true => out.push_str(&format!("{cell:>width$}  ")),
                false => out.push_str(&format!("{cell:<width$}  ")),
            }
        }
        out.truncate(out.trim_end().len());
        out
    }
}

/// Cut to a width, with `…` as its last character where something is missing.
pub fn shorten(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// Pairs of name and value below each other, those without a value left out; names take `least` columns or as many as the longest needs.
pub fn pairs(least: usize, pairs: &[(&str, String)]) {
    let least = pairs.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(least);
    for (name, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        line(format!("{name:<least$}  {value}"));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_table_fits_80_columns_and_never_cuts_an_id() {
        let mut table = Table::new(vec![Column::fixed("ID"), Column::right("%"), Column::shrinks("NAME"), Column::shrinks("ERROR")]);
        let id = "job-0123456789abcdef";
        table.row(vec![id.into(), "47".into(), "a".repeat(90), "e".repeat(30)]);
        table.row(vec![id.into(), "100".into(), "short".into(), String::new()]);
        let lines = table.render(80);
        assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
        assert!(lines[1].starts_with(id) && lines[1].contains('…'));
    }

    #[test]
    fn sizes_and_cleaning() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(64 << 20), "64.0 MiB");
        assert_eq!(bytes((1 << 30) - 1), "1.0 GiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(clean("web\x1b[2Jserver\u{202e}"), "web?[2Jserver?");
    }
}
