//! How the values of `/stats` are shown: the tables' columns, numbers, and advice on problems.

use bytesize::ByteSize;
use serde_json::Value;

/// A column of a table: its rows are objects of `/stats`.
pub(super) struct Column {
    /// Where the value is in the object, as a JSON pointer.
    pub(super) key: &'static str,
    pub(super) label: &'static str,
    /// How the value is shown: see [`shown`].
    pub(super) kind: &'static str,
}

pub(super) const fn column(key: &'static str, label: &'static str, kind: &'static str) -> Column {
    Column { key, label, kind }
}

pub(super) const MEMBERS: [Column; 11] = [
    column("/member", "Member", "name"),
    column("/role", "Role", "text"),
    column("/up", "State", "state"),
    column("/partitions", "Partitions", "number"),
    column("/entries", "Entries", "number"),
    column("/gets", "Gets", "number"),
    column("/puts", "Puts", "number"),
    column("/entry_memory_bytes", "Entry memory", "bytes"),
    column("/backups", "Backups", "number"),
    column("/backup_memory_bytes", "Backup memory", "bytes"),
    column("/used_memory_bytes", "Used memory", "bytes"),
];

pub(super) const INSTANCES: [Column; 13] = [
    column("/instance", "Instance", "name"),
    column("/up", "State", "state"),
    column("/received", "Received", "number"),
    column("/share", "Share", "share"),
    column("/outcomes/stored", "Stored", "number"),
    column("/outcomes/duplicate", "Duplicate", "number"),
    column("/outcomes/conflict", "Conflict", "number"),
    column("/outcomes/stale", "Stale", "number"),
    column("/outcomes/refused", "Refused", "number"),
    column("/outcomes/unknown", "Unknown", "number"),
    column("/in_flight", "In flight", "number"),
    column("/put_p50_ms", "Median ms", "ms"),
    column("/put_p99_ms", "p99 ms", "ms"),
];

/// The facade's own numbers; their keys begin at the root of `/stats`.
pub(super) const FACADE: [Column; 6] = [
    column("/map/total/entries", "Entries", "number"),
    column("/facade/posts", "POSTs", "number"),
    column("/facade/gets", "GETs", "number"),
    column("/facade/posted_bytes", "Stored", "bytes"),
    column("/facade/read_bytes", "Read", "bytes"),
    column("/facade/errors", "Errors by status", "counts"),
];

/// What to do about a problem, by the beginning of its text; the first that fits counts.
pub(super) const ADVICE: [(&str, &str); 5] = [
    (
        "logging-",
        "Start this instance again if its process ended; else its /readyz?verbose says what it lacks. \
         The other instances take its messages meanwhile.",
    ),
    (
        "member ",
        "Start this server again, or replace it: docs/redis.md. Its backups serve what it held.",
    ),
    (
        "this facade's clock ",
        "Correct the clock of the facade's machine; keep it slewed, not stepped.",
    ),
    (
        "this page ",
        "The page asks again by itself; without JavaScript, reload it.",
    ),
    (
        "",
        "/readyz?verbose of the facade and of the logging instances says what is missing.",
    ),
];

/// The text of a value of `/stats`. `show` in console.js shows the same numbers in the same way.
pub(super) fn shown(object: &Value, column: &Column) -> String {
    let value = object.pointer(column.key).unwrap_or(&Value::Null);
    if column.kind == "state" {
        return state(object).to_owned();
    }
    let number = value.as_f64().unwrap_or_default();
    match (value, column.kind) {
        (Value::Null, _) => "–".to_owned(),
        (_, "number") => grouped(value.as_u64().unwrap_or_default()),
        (_, "bytes") => ByteSize(value.as_u64().unwrap_or_default())
            .display()
            .iec()
            .to_string(),
        (_, "share") => format!("{:.1} %", 100.0 * number),
        (_, "ms") => format!("{number:.1}"),
        (Value::Object(counts), _) if counts.is_empty() => "none".to_owned(),
        (Value::Object(counts), _) => {
            let counts = counts.iter();
            let counts: Vec<String> = counts
                .map(|(name, count)| format!("{name}: {count}"))
                .collect();
            counts.join(", ")
        }
        (Value::String(time), "time") => seconds(time),
        (Value::String(time), "clock") => seconds(time).split_off(11),
        (Value::String(text), _) => text.clone(),
        (other, _) => other.to_string(),
    }
}

/// The state of a member or an instance. `down`: it does not answer, or an instance gets no messages.
pub(super) fn state(row: &Value) -> &'static str {
    if row["up"] == false { "down" } else { "up" }
}

/// The text in the row of the totals, which has no value in some columns.
pub(super) fn shown_total(total: &Value, column: &Column) -> String {
    match column.kind {
        "name" => "TOTAL".to_owned(),
        "state" if total.get("complete").is_some() => "incomplete".to_owned(),
        "state" => String::new(),
        _ if total.pointer(column.key).is_none() => String::new(),
        _ => shown(total, column),
    }
}

/// `2026-11-24 20:00:00` of an RFC 3339 time.
pub(super) fn seconds(time: &str) -> String {
    time.chars().take(19).collect::<String>().replace('T', " ")
}

/// Digits in groups of three.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

pub(super) fn advice(problem: &str) -> &'static str {
    let mut known = ADVICE.iter();
    known
        .find(|(beginning, _)| problem.starts_with(beginning))
        .map_or("", |(_, advice)| advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        let cases = [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
        ];
        for (number, text) in cases {
            assert_eq!(grouped(number), text);
        }
    }
}
