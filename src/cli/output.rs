//! Tables and numbers for people, JSON for programs.

use serde::Serialize;

/// Prints rows under a heading, columns aligned.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) {
    let widths: Vec<usize> = (0..heading.len())
        .map(|column| rows.iter().map(|r| r[column].chars().count()).chain([heading[column].len()]).max().unwrap_or(0))
        .collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        println!("{}", padded.join("  ").trim_end());
    };
    line(&heading.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
}

/// The last `count` of a list that has the oldest first; all without a count.
pub(super) fn newest<T>(mut list: Vec<T>, count: Option<usize>) -> Vec<T> {
    list.drain(..list.len().saturating_sub(count.unwrap_or(usize::MAX)));
    list
}

/// Prints a value as JSON.
pub(super) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// A number that not every server knows.
pub(super) fn count(value: Option<usize>) -> String {
    value.map_or_else(|| "-".to_owned(), |n| n.to_string())
}

/// Seconds as people read them.
pub(super) fn seconds(value: Option<f64>) -> String {
    match value {
        None => "unknown".to_owned(),
        Some(s) if s < 10.0 => format!("{s:.1} s"),
        Some(s) if s < 120.0 => format!("{s:.0} s"),
        Some(s) if s < 7200.0 => format!("{:.0} min", s / 60.0),
        Some(s) => format!("{:.1} h", s / 3600.0),
    }
}

/// How long ago something was, in a word.
pub(super) fn ago(seconds: Option<f64>) -> String {
    match seconds {
        None => "-".to_owned(),
        Some(s) if s < 60.0 => "just now".to_owned(),
        Some(s) if s < 3600.0 => format!("{:.0} min ago", (s / 60.0).floor()),
        Some(s) if s < 48.0 * 3600.0 => format!("{:.0} h ago", (s / 3600.0).floor()),
        Some(s) => format!("{:.0} d ago", (s / 86400.0).floor()),
    }
}
