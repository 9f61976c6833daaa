//! A put: the facade sends a batch of entries, the instance returns a result for each.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{LINE_BEGIN_BYTES, LINE_END};
use crate::entry::{Outcome, require_entry_uuid};
use crate::json::{self, MAX_EXPANSION};

/// The largest body that a logging instance accepts for one batch, in bytes, and the longest line of an entry
/// in it, as [`write_entry`](super::write_entry) writes the entry for its readers.
///
/// The facade keeps its batches below it and rejects a `--max-message` that might not fit.
pub const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;

/// The usual bytes of an encoded entry besides its message.
const FIELDS: usize = 128;

/// Bytes of a message from which on its length as JSON is counted before it is encoded.
const LONG_MESSAGE: usize = 64 * 1024;

/// An entry on its way to a logging instance. Fields of a later version are ignored.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct PutEntry {
    /// The UUID to store the message under.
    pub uuid: Uuid,
    /// The message.
    pub msg: String,
    /// The `x-request-id` of the POST that carried the message, for the logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The span of the try, if its request is traced: see [`crate::traces`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// An entry encoded for a [`Batch`].
#[derive(Clone, Debug)]
pub struct EncodedEntry(Vec<u8>);

impl PutEntry {
    /// Encodes the entry for a [`Batch`].
    pub fn encode(&self) -> EncodedEntry {
        // The escapes of a long message would make the vector grow, and so be in memory twice.
        let msg = match self.msg.len() {
            ..=LONG_MESSAGE => self.msg.len(),
            _ => json::length(&self.msg),
        };
        let mut encoded = Vec::with_capacity(msg + FIELDS);
        serde_json::to_writer(&mut encoded, self).expect("an entry is plain JSON");
        EncodedEntry(encoded)
    }
}

impl EncodedEntry {
    /// The bytes that it adds to a batch, without the separator.
    #[allow(clippy::len_without_is_empty, reason = "an entry is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A batch of entries as the body of a request: a JSON array. Nobody else knows its encoding.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    array: Vec<u8>,
    count: usize,
}

impl Batch {
    /// The content type of the body.
    pub const CONTENT_TYPE: &str = "application/json";

    /// A batch of these entries.
    pub fn of<'entry>(entries: impl Iterator<Item = &'entry EncodedEntry> + Clone) -> Self {
        let bytes: usize = entries.clone().map(|entry| entry.len() + 1).sum();
        let mut batch = Self {
            array: Vec::with_capacity(bytes + 1),
            count: 0,
        };
        for entry in entries {
            batch.array.push(if batch.count == 0 { b'[' } else { b',' });
            batch.array.extend_from_slice(&entry.0);
            batch.count += 1;
        }
        batch
    }

    /// The bytes of its entries and their separators.
    #[allow(
        clippy::len_without_is_empty,
        reason = "an empty batch is sent as a trial"
    )]
    pub fn len(&self) -> usize {
        self.array.len()
    }

    /// How many entries it has.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The body of the request.
    pub fn into_body(mut self) -> Vec<u8> {
        match self.count {
            0 => b"[]".to_vec(),
            _ => {
                self.array.push(b']');
                self.array
            }
        }
    }

    /// Decodes the body of a request: an array of entries, or a single entry, as a person may send it.
    ///
    /// # Errors
    /// When the body is malformed, has a UUID of another version, an empty message, or one whose line is
    /// too long: a sentence for the sender.
    pub fn decode(body: &[u8]) -> Result<Posted, String> {
        let is_single = !body.trim_ascii_start().starts_with(b"[");
        let decoded = if is_single {
            serde_json::from_slice(body).map(|entry| vec![entry])
        } else {
            serde_json::from_slice(body)
        };
        let entries: Vec<PutEntry> = decoded.map_err(|error| {
            format!(
                "this is a logging instance; post messages to the facade, by default \
                 http://localhost:8086. What a facade sends here is an entry \
                 {{\"uuid\":…,\"msg\":…}} or an array of them: {error}"
            )
        })?;
        for PutEntry { uuid, msg, .. } in &entries {
            require_entry_uuid(*uuid)?;
            if msg.is_empty() {
                return Err(format!("the message of {uuid} is empty"));
            }
            if !is_line_accepted(msg) {
                return Err(format!(
                    "the message of {uuid} is too long: readers get it as JSON in which control characters \
                     are escaped, and that may have {MAX_BATCH_BYTES} bytes at most"
                ));
            }
        }
        Ok(Posted { entries, is_single })
    }
}

/// Whether the line of a message has at most [`MAX_BATCH_BYTES`]. Only the escapes of long messages are counted.
fn is_line_accepted(msg: &str) -> bool {
    if (msg.len() + FIELDS) * MAX_EXPANSION <= MAX_BATCH_BYTES {
        return true;
    }
    let message = json::length(msg) - "\"\"".len();
    LINE_BEGIN_BYTES + message + LINE_END.len() + "\n".len() <= MAX_BATCH_BYTES
}

/// What a request brings.
#[derive(Clone, Debug)]
pub struct Posted {
    /// The entries, in order.
    pub entries: Vec<PutEntry>,
    /// Whether it is a single entry, whose response is a single result and not a list.
    pub is_single: bool,
}

/// The result of a logging instance for one entry.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(from = "WireResult", into = "WireResult")]
pub struct PutResult {
    /// The entry's UUID.
    pub uuid: Uuid,
    /// The outcome of the put.
    pub outcome: Outcome,
}

/// A [`PutResult`] on the wire: its outcome is one of six words, and the other fields tell it from those with the
/// same word. A `detail` that is missing is empty.
#[derive(Deserialize, Serialize)]
struct WireResult {
    uuid: Uuid,
    outcome: Word,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    when: Option<When>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_partition_down: bool,
}

#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum Word {
    Stored,
    Duplicate,
    Conflict,
    Stale,
    Refused,
    Unknown,
}

#[derive(Clone, Copy, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
enum When {
    Ahead,
    Leaving,
}

impl From<PutResult> for WireResult {
    fn from(PutResult { uuid, outcome }: PutResult) -> Self {
        let is_partition_down = matches!(outcome, Outcome::PartitionDown { .. });
        let (outcome, when, detail) = match outcome {
            Outcome::Stored => (Word::Stored, None, None),
            Outcome::Duplicate => (Word::Duplicate, None, None),
            Outcome::Conflict => (Word::Conflict, None, None),
            Outcome::Stale => (Word::Stale, None, None),
            Outcome::Leaving => (Word::Stale, Some(When::Leaving), None),
            Outcome::Early => (Word::Stale, Some(When::Ahead), None),
            Outcome::Refused { detail } | Outcome::PartitionDown { detail } => {
                (Word::Refused, None, Some(detail))
            }
            Outcome::Unknown { detail } => (Word::Unknown, None, Some(detail)),
        };
        Self {
            uuid,
            outcome,
            when,
            detail,
            is_partition_down,
        }
    }
}

impl From<WireResult> for PutResult {
    fn from(wire: WireResult) -> Self {
        let detail = wire.detail.unwrap_or_default();
        let outcome = match (wire.outcome, wire.when) {
            (Word::Stored, _) => Outcome::Stored,
            (Word::Duplicate, _) => Outcome::Duplicate,
            (Word::Conflict, _) => Outcome::Conflict,
            (Word::Stale, None) => Outcome::Stale,
            (Word::Stale, Some(When::Leaving)) => Outcome::Leaving,
            (Word::Stale, Some(When::Ahead)) => Outcome::Early,
            (Word::Refused, _) if wire.is_partition_down => Outcome::PartitionDown { detail },
            (Word::Refused, _) => Outcome::Refused { detail },
            (Word::Unknown, _) => Outcome::Unknown { detail },
        };
        Self {
            uuid: wire.uuid,
            outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_is_one_of_six_words_and_is_read_back() {
        let detail = || "why".to_owned();
        for (outcome, wire) in [
            (Outcome::Stored, r#"{"outcome":"stored"}"#),
            (Outcome::Duplicate, r#"{"outcome":"duplicate"}"#),
            (Outcome::Conflict, r#"{"outcome":"conflict"}"#),
            (Outcome::Stale, r#"{"outcome":"stale"}"#),
            (Outcome::Leaving, r#"{"outcome":"stale","when":"leaving"}"#),
            (Outcome::Early, r#"{"outcome":"stale","when":"ahead"}"#),
            (
                Outcome::Refused { detail: detail() },
                r#"{"outcome":"refused","detail":"why"}"#,
            ),
            (
                Outcome::PartitionDown { detail: detail() },
                r#"{"outcome":"refused","detail":"why","is_partition_down":true}"#,
            ),
            (
                Outcome::Unknown { detail: detail() },
                r#"{"outcome":"unknown","detail":"why"}"#,
            ),
        ] {
            let result = PutResult {
                uuid: Uuid::nil(),
                outcome,
            };
            let written = serde_json::to_string(&result).expect("plain JSON");
            let wire = wire.replacen(
                '{',
                "{\"uuid\":\"00000000-0000-0000-0000-000000000000\",",
                1,
            );
            assert_eq!(written, wire);
            let read: PutResult = serde_json::from_str(&wire).expect("a result");
            assert_eq!(read, result);
        }
    }

    #[test]
    fn fields_of_a_later_version_are_ignored() {
        let uuid = Uuid::now_v7();
        let entry = format!(r#"[{{"uuid":"{uuid}","msg":"a","later":1}}]"#);
        let posted = Batch::decode(entry.as_bytes()).expect("a batch");
        assert_eq!(posted.entries[0].msg, "a");
        let result = format!(r#"{{"uuid":"{uuid}","outcome":"stored","later":1}}"#);
        let result: PutResult = serde_json::from_str(&result).expect("a result");
        assert_eq!(result.outcome, Outcome::Stored);
    }

    #[test]
    fn batch_is_read_as_it_was_built() {
        assert_eq!(Batch::default().into_body(), b"[]");
        let entries = ["a", "b"].map(|msg| PutEntry {
            uuid: Uuid::now_v7(),
            msg: msg.to_owned(),
            request_id: None,
            traceparent: None,
        });
        let encoded = entries.each_ref().map(PutEntry::encode);
        let batch = Batch::of(encoded.iter());
        let Posted {
            entries: read,
            is_single,
        } = Batch::decode(&batch.into_body()).expect("a batch");
        assert!(!is_single);
        let parts = |entry: &PutEntry| (entry.uuid, entry.msg.clone());
        assert_eq!(
            read.iter().map(parts).collect::<Vec<_>>(),
            entries.iter().map(parts).collect::<Vec<_>>()
        );
    }
}
