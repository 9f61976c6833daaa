//! A read: the query, and the stream of lines that answers it.
//!
//! A stream has one line for each entry, in exactly the form `{"uuid":"…","msg":"…"}`, then a last
//! line, a [`StreamEnd`]. The facade checks that form with [`EntryLine::parse`] and passes the line on
//! unchanged.

use memchr::memchr2;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::MAX_BATCH_BYTES;
use crate::bounds::Bounds;
use crate::escape::has_to_be_escaped;
use crate::json;

/// The query of a read.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct ReadQuery {
    /// The part of the log to read.
    #[serde(flatten)]
    pub bounds: Bounds,
    /// The greatest number of entries to return.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// Set when the facade polls for new entries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll: Option<Poll>,
}

/// A read that the facade repeats to see new entries. It includes what is stored while it runs.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Poll {
    /// Looks only for new entries.
    Recent,
    /// Also asks what is settled: see [`READ_SETTLED`]. Without `after`, the read begins there.
    Settle,
}

/// The header of the answer to [`Poll::Settle`]: a UUID below which no entry will be added any more.
/// All entries below it were visible before the read began. Missing when the map cannot tell now.
pub const READ_SETTLED: &str = "x-read-settled";

/// The header of a stream with the end of an ascending read: every entry that the map held when the read
/// began has a smaller UUID. A reader that continues on another instance sends it as `before`, so that a
/// read ends while entries are added.
pub const READ_END: &str = "x-read-end";

/// The last line of a stream. Fields of a later version are ignored.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct StreamEnd {
    /// The number of entries before this line.
    pub count: u64,
    /// The cursor to continue from: the last entry's UUID, when the limit ended the stream and the bounds
    /// hold more entries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Uuid>,
    /// Why this instance cannot finish the stream: continue behind the last entry on another instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub go_on_elsewhere: Option<String>,
}

const LINE_HEAD: &[u8] = br#"{"uuid":""#;
const LINE_MIDDLE: &[u8] = br#"","msg":"#;
const LINE_TAIL: &[u8] = b"}";

/// The longest line of an entry that a map can hold, in bytes, which every reader therefore takes: a batch
/// of one message, each byte of which is escaped. Instances no longer store a line longer than
/// [`MAX_BATCH_BYTES`], but a map of before may hold one.
pub const MAX_LINE: usize = MAX_BATCH_BYTES * json::MAX_EXPANSION;

/// Appends an entry as a line of a stream, with its newline.
pub fn write_entry(out: &mut Vec<u8>, uuid: Uuid, msg: &str) {
    write_before_message(out, uuid);
    json::write(out, msg);
    out.extend_from_slice(LINE_TAIL);
    out.push(b'\n');
}

fn write_before_message(out: &mut Vec<u8>, uuid: Uuid) {
    out.extend_from_slice(LINE_HEAD);
    let mut buffer = Uuid::encode_buffer();
    let uuid = uuid.hyphenated().encode_lower(&mut buffer);
    out.extend_from_slice(uuid.as_bytes());
    out.extend_from_slice(LINE_MIDDLE);
}

/// The bytes of a line before the first character of the message.
pub const LINE_BEGIN_BYTES: usize = LINE_HEAD.len() + Hyphenated::LENGTH + LINE_MIDDLE.len() + 1;

/// What follows the last character of the message, without the newline.
pub const LINE_END: &[u8] = b"\"}";

/// Appends the line of an entry up to the first character of its message: for a line that is made in parts.
pub fn begin_line(out: &mut Vec<u8>, uuid: Uuid) {
    write_before_message(out, uuid);
    out.push(b'"');
}

/// Appends a part of a message to a line that was begun, to about `limit` bytes of `out`. Returns how many
/// bytes of the part were written.
pub fn write_part(out: &mut Vec<u8>, part: &str, limit: usize) -> usize {
    const STEP: usize = 1024;
    let mut written = 0;
    while written < part.len() && (written == 0 || out.len() < limit) {
        let end = part.floor_char_boundary(written + STEP);
        let quote = out.len();
        json::write(out, &part[written..end]);
        out.pop();
        out.remove(quote);
        written = end;
    }
    written
}

/// The UUID of a line that is at least [`LINE_BEGIN_BYTES`] long, if it begins as the line of an entry.
pub fn parse_line_begin(line: &[u8]) -> Option<Uuid> {
    let rest = line.strip_prefix(LINE_HEAD)?;
    let (uuid, rest) = rest.split_at_checked(Hyphenated::LENGTH)?;
    let begins = is_uuid(uuid) && rest.strip_prefix(LINE_MIDDLE)?.starts_with(b"\"");
    begins.then(|| Uuid::try_parse_ascii(uuid).expect("its form was checked"))
}

/// How much of `text`, which begins within the JSON string of a message and is cut or ends with [`LINE_END`], is
/// whole characters and escapes before its last two bytes. `None` if it is not UTF-8, or has a character that has
/// to be escaped.
pub fn whole_characters(text: &[u8]) -> Option<usize> {
    if has_to_be_escaped(text) {
        return None;
    }
    let string = &text[..text.len().saturating_sub(LINE_END.len())];
    let end = characters_end(string);
    match std::str::from_utf8(&string[..end]) {
        Ok(_) => Some(end),
        Err(error) if error.error_len().is_none() && end == string.len() => {
            Some(error.valid_up_to())
        }
        Err(_) => None,
    }
}

/// A line of an entry, without its newline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryLine<'a> {
    /// The entry's UUID as lowercase text with hyphens; such texts sort like the UUIDs.
    pub uuid: &'a [u8],
    /// The message as a JSON string, with its quotes.
    pub msg: &'a str,
}

impl<'a> EntryLine<'a> {
    /// Parses a line that has exactly the form of [`write_entry`]; the facade can pass no other line on.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let rest = line.strip_prefix(LINE_HEAD)?;
        let (uuid, rest) = rest.split_at_checked(Hyphenated::LENGTH)?;
        let rest = rest.strip_prefix(LINE_MIDDLE)?;
        let msg = rest.strip_suffix(LINE_TAIL)?;
        if has_to_be_escaped(rest) || !is_json_string(msg) || !is_uuid(uuid) {
            return None;
        }
        Some(Self {
            uuid,
            msg: std::str::from_utf8(msg).ok()?,
        })
    }

    /// The entry's UUID.
    pub fn uuid(&self) -> Uuid {
        Uuid::try_parse_ascii(self.uuid).expect("its form was checked")
    }
}

/// Whether `text` is a UUID in lowercase with hyphens. Parsing every UUID would take a third of the time
/// of a read, and a reader needs only the first and the last.
fn is_uuid(text: &[u8]) -> bool {
    text.iter().enumerate().fold(true, |is_uuid, (at, byte)| {
        is_uuid
            & match at {
                8 | 13 | 18 | 23 => *byte == b'-',
                _ => byte.is_ascii_digit() | matches!(byte, b'a'..=b'f'),
            }
    })
}

/// Whether `text` is exactly one JSON string (RFC 8259, section 7). UTF-8 and control characters are not checked.
fn is_json_string(text: &[u8]) -> bool {
    let rest = text.strip_prefix(b"\"");
    rest.is_some_and(|rest| &rest[characters_end(rest)..] == b"\"")
}

/// Where the characters of a JSON string end: before its quote, or before an escape that is cut or wrong.
fn characters_end(text: &[u8]) -> usize {
    let mut end = 0;
    while let Some(at) = memchr2(b'"', b'\\', &text[end..]) {
        end += at;
        let escape = &text[end..];
        end += match escape.get(1) {
            _ if escape[0] == b'"' => return end,
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 2,
            Some(b'u') if is_character(escape.get(2..6)) => 6,
            _ => return end,
        };
    }
    text.len()
}

/// Whether `digits` are four hexadecimal digits of a character, and not half of a surrogate pair.
fn is_character(digits: Option<&[u8]>) -> bool {
    digits.is_some_and(|digits| {
        let is_surrogate = matches!(
            digits,
            [b'd' | b'D', b'8'..=b'9' | b'a'..=b'f' | b'A'..=b'F', ..]
        );
        !is_surrogate && digits.iter().all(u8::is_ascii_hexdigit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid::from_u128(0x01a203b3_3bb1_7319_90b9_a08e864b5eeb);

    fn line(msg: &str) -> Vec<u8> {
        let mut line = Vec::new();
        write_entry(&mut line, UUID, msg);
        assert_eq!(line.pop(), Some(b'\n'));
        line
    }

    #[test]
    fn entry_line_is_the_json_of_an_entry_and_is_read_back() {
        for msg in [
            "hello",
            "\"\\\n\u{1b}\u{7f}\u{2028}\0",
            "größer 👍",
            "\\u",
            "}",
        ] {
            let line = line(msg);
            let json = serde_json::json!({"uuid": UUID, "msg": msg});
            let parsed: serde_json::Value = serde_json::from_slice(&line).expect("it is JSON");
            assert_eq!(parsed, json);
            let entry = EntryLine::parse(&line).expect("it is an entry's line");
            assert_eq!(entry.uuid(), UUID);
            assert_eq!(
                serde_json::from_str::<String>(entry.msg).expect("a string"),
                msg
            );
        }
    }

    #[test]
    fn end_of_a_later_version_is_read() {
        let end: StreamEnd = serde_json::from_str(r#"{"count":1,"later":2}"#).expect("an end");
        assert_eq!(end.count, 1);
    }

    #[test]
    fn any_other_line_is_rejected() {
        let form = |uuid: &str, rest: &str| format!(r#"{{"uuid":"{uuid}","msg":{rest}"#);
        let uuid = UUID.to_string();
        for line in [
            form(&uuid, r#""a","b":"c"}"#),
            form(&uuid, r#""a"} "#),
            form(&uuid, r#""a""#),
            form(&uuid, r#""a\"}"#),
            form(&uuid, r#""a\x"}"#),
            form(&uuid, r#""a\u00g0"}"#),
            form(&uuid, r#""\ud83d"}"#),
            form(&uuid, "\"a\tb\"}"),
            form(&uuid, "\"a\u{7f}\"}"),
            form(&uuid, "\"\u{9b}31m\"}"),
            form(&uuid, "\"a\u{202e}b\"}"),
            form(&uuid, r#"1}"#),
            form(&uuid, r#"}"#),
            form(&uuid.to_uppercase(), r#""a"}"#),
            form(&uuid.replace('-', " "), r#""a"}"#),
            r#"{"count":1}"#.to_owned(),
            String::new(),
        ] {
            assert_eq!(EntryLine::parse(line.as_bytes()), None, "{line}");
        }
        let mut broken = line("ab");
        broken[54] = 0xff;
        assert_eq!(EntryLine::parse(&broken), None);
    }
}
