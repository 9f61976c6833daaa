//! The file of an import: an export, an instance's stream, or the body of a GET to the facade as JSON or NDJSON.
//!
//! It is read as JSON, so white space, line breaks, the order of keys and escapes may be those of another
//! program. The count proves that it is complete; it need not be at the end of a JSON body.

use std::cell::Cell;
use std::io::{self, BufReader, Read};
use std::rc::Rc;
use std::{fmt, mem, thread};

use anyhow::{Context, anyhow, bail, ensure};
use common::api::{MAX_BATCH_BYTES, MAX_LINE};
use common::entry::{Entry, require_entry_uuid};
use serde::de::{
    DeserializeSeed, Deserializer, Error, Expected, IgnoredAny, MapAccess, SeqAccess, Visitor,
};
use serde_json::error::Category;
use tokio::sync::mpsc;
use uuid::Uuid;

/// The size of a batch, in bytes of messages; the last entry may exceed it.
const BATCH: usize = 512 * 1024;

/// What an entry counts for in a batch besides its message, in bytes.
const OVERHEAD: usize = 64;

const WHOLE: &str =
    "import what `logging export` writes, or the body of a GET without a query, as JSON or NDJSON";

/// Reads the batches of a file. An empty one proves that the file was complete, and is the last; so is an error.
///
/// # Errors
/// When the thread that reads cannot be started. It does not hold up the end of the process.
pub(super) fn read(
    reader: impl Read + Send + 'static,
) -> io::Result<mpsc::Receiver<anyhow::Result<Vec<Entry>>>> {
    let (batches, received) = mpsc::channel(1);
    let thread = thread::Builder::new().name("import".to_owned());
    thread.spawn(move || {
        let mut source = Source {
            batches,
            batch: Vec::new(),
            batch_bytes: 0,
            count: 0,
            unread: Rc::new(Cell::new(MAX_LINE)),
        };
        if let Err(error) = source.read_all(reader) {
            // The import may have failed already.
            let _ = source.batches.blocking_send(Err(error));
        }
    })?;
    Ok(received)
}

struct Source {
    batches: mpsc::Sender<anyhow::Result<Vec<Entry>>>,
    batch: Vec<Entry>,
    batch_bytes: usize,
    /// Entries so far.
    count: u64,
    /// The bytes that may be read before the end of the next entry.
    unread: Rc<Cell<usize>>,
}

/// What proves that a file is complete, or shows that it is not.
struct Tail {
    count: u64,
    is_page: bool,
    is_search: bool,
    go_on_elsewhere: Option<String>,
}

impl Source {
    fn read_all(&mut self, reader: impl Read) -> anyhow::Result<()> {
        let limited = Limited {
            reader,
            unread: self.unread.clone(),
        };
        let mut json = serde_json::Deserializer::from_reader(BufReader::new(limited));
        loop {
            let object = Object(self).deserialize(&mut json);
            if let Some(tail) = object.map_err(|error| self.describe(&error))? {
                self.require_complete(&tail)?;
                break;
            }
        }
        ensure!(
            json.end().is_ok(),
            "more follows behind the count; import each file by itself"
        );
        if !self.batch.is_empty() {
            self.send()?;
        }
        self.send()
    }

    fn send(&mut self) -> anyhow::Result<()> {
        self.batch_bytes = 0;
        let batch = mem::take(&mut self.batch);
        let sent = self.batches.blocking_send(Ok(batch));
        sent.context("the import has ended")
    }

    fn describe(&self, error: &serde_json::Error) -> anyhow::Error {
        match error.classify() {
            Category::Io => anyhow!("cannot read: {error}"),
            Category::Eof => anyhow!(
                "the file is truncated: its {} entries are not followed by their count",
                self.count
            ),
            Category::Syntax | Category::Data => anyhow!("{error}; {WHOLE}"),
        }
    }

    fn require_complete(&self, tail: &Tail) -> anyhow::Result<()> {
        ensure!(
            tail.count == self.count,
            "the file has {} entries, but its count says {}",
            self.count,
            tail.count
        );
        if let Some(reason) = &tail.go_on_elsewhere {
            bail!("the file is incomplete: the instance stopped sending, as {reason}");
        }
        ensure!(
            !tail.is_search,
            "the file has only what a search found (`scanned`): {WHOLE}"
        );
        ensure!(
            !tail.is_page,
            "the file is one page, after which the log goes on (`next`): {WHOLE}"
        );
        Ok(())
    }

    fn add<E: Error>(&mut self, entry: Entry) -> Result<(), E> {
        require_entry_uuid(entry.uuid).map_err(E::custom)?;
        if entry.msg.is_empty() {
            return Err(E::custom("the message is empty"));
        }
        // What no instance can have stored might be longer than readers take.
        if entry.msg.len() >= MAX_BATCH_BYTES {
            return Err(E::custom(
                "the message is larger than any that an instance stores",
            ));
        }
        self.count += 1;
        self.unread.set(MAX_LINE);
        self.batch_bytes += entry.msg.len() + OVERHEAD;
        self.batch.push(entry);
        if self.batch_bytes >= BATCH {
            self.send().map_err(E::custom)?;
        }
        Ok(())
    }
}

/// An object of the file: an entry, a last line, or a whole JSON body.
struct Object<'a>(&'a mut Source);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = Option<Tail>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = Option<Tail>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an entry, {\"uuid\":…,\"msg\":…}, or the body of a GET")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
        let (mut uuid, mut msg, mut count) = (None::<Uuid>, None::<String>, None::<u64>);
        let (mut is_page, mut is_search, mut go_on_elsewhere) = (false, false, None);
        let mut has_more = false;
        while let Some(key) = members.next_key::<String>()? {
            match key.as_str() {
                "uuid" if uuid.is_none() => uuid = Some(members.next_value()?),
                "msg" if msg.is_none() => msg = Some(members.next_value()?),
                "count" if count.is_none() => count = Some(members.next_value()?),
                "logging_service" => members.next_value_seed(Entries(&mut *self.0))?,
                "go_on_elsewhere" => go_on_elsewhere = members.next_value()?,
                other => {
                    is_page |= other == "next";
                    is_search |= other == "scanned";
                    has_more = true;
                    members.next_value::<IgnoredAny>()?;
                }
            }
        }
        match (uuid, msg, count) {
            (Some(uuid), Some(msg), None) if !has_more => {
                self.0.add(Entry { uuid, msg })?;
                Ok(None)
            }
            (None, None, Some(count)) => Ok(Some(Tail {
                count,
                is_page,
                is_search,
                go_on_elsewhere,
            })),
            _ => Err(A::Error::custom(format_args!(
                "this is not {}",
                &self as &dyn Expected
            ))),
        }
    }
}

/// The entries of a JSON body.
struct Entries<'a>(&'a mut Source);

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the entries of a GET")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while let Some(entry) = entries.next_element()? {
            self.0.add(entry)?;
        }
        Ok(())
    }
}

/// Fails at an entry that is longer than any map holds, instead of growing with it.
struct Limited<R> {
    reader: R,
    unread: Rc<Cell<usize>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let unread = self.unread.get();
        if unread == 0 {
            return Err(io::Error::other(
                "an entry is longer than any that a map holds",
            ));
        }
        let most = buffer.len().min(unread);
        let read = self.reader.read(&mut buffer[..most])?;
        self.unread.set(unread - read);
        Ok(read)
    }
}
