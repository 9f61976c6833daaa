//! The task `export`, which can continue an interrupted file.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, bail, ensure};
use common::api::{EntryLine, MAX_LINE, StreamEnd};
use common::json;
use uuid::Uuid;

use super::{READ_PIECE, read_all};
use crate::map::DistributedMap;

/// Writes the map, up to its newest entry at the start, to a file or standard output.
///
/// # Errors
/// When the map cannot be read or the file cannot be written.
pub(super) async fn run(map: &dyn DistributedMap, file: Option<&Path>) -> anyhow::Result<()> {
    let (out, mut count, last): (Box<dyn Write>, u64, Option<Uuid>) = match file {
        Some(path) => {
            let begun = open_export(path).with_context(|| path.display().to_string())?;
            (Box::new(begun.0), begun.1, begun.2)
        }
        None => (Box::new(io::stdout()), 0, None),
    };
    let mut out = BufWriter::with_capacity(READ_PIECE, out);
    count += read_all(map, last, "exported", |lines| {
        out.write_all(lines).context("cannot write")
    })
    .await?;
    let mut line = Vec::new();
    let end = StreamEnd {
        count,
        ..StreamEnd::default()
    };
    json::write_line(&mut line, &end);
    out.write_all(&line)
        .and_then(|()| out.flush())
        .context("cannot write")?;
    if let Some(path) = file {
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.with_context(|| format!("cannot write {}", path.display()))?;
    }
    eprintln!("exported {count} entries");
    Ok(())
}

/// Opens a new file, or an interrupted export and removes its last line if that is incomplete.
/// Returns it with the number of its entries and the last one's UUID.
fn open_export(path: &Path) -> anyhow::Result<(File, u64, Option<Uuid>)> {
    let mut options = File::options();
    let options = options.read(true).write(true).create(true).truncate(false);
    let mut lines = Lines::new(BufReader::new(options.open(path)?));
    let (mut count, mut last, mut whole) = (0, None, 0);
    while let Some(line) = lines.next()? {
        let Some(line) = line.strip_suffix(b"\n") else {
            ensure!(may_be_cut(line), "this is not an export");
            break;
        };
        let Some(entry) = EntryLine::parse(line) else {
            match serde_json::from_slice(line) {
                Ok(StreamEnd {
                    go_on_elsewhere: None,
                    ..
                }) => bail!("this export is finished; choose another file"),
                _ => bail!("line {} is not an entry; this is not an export", count + 1),
            }
        };
        count += 1;
        ensure!(
            last < Some(entry.uuid()),
            "line {count} is out of order; this is not an export"
        );
        last = Some(entry.uuid());
        whole += line.len() as u64 + 1;
    }
    let mut file = lines.reader.into_inner();
    file.set_len(whole)?;
    file.seek(SeekFrom::End(0))?;
    if count > 0 {
        eprintln!("continuing after {count} entries");
    }
    Ok((file, count, last))
}

/// Whether this can be the beginning of a line of an export: it is overwritten then.
fn may_be_cut(line: &[u8]) -> bool {
    let heads = [&b"{\"uuid\":\""[..], b"{\"count\":"];
    let is_like = |head: &[u8]| line.starts_with(head) || head.starts_with(line);
    line.len() < MAX_LINE && heads.into_iter().any(is_like)
}

/// The lines of a file, one at a time.
struct Lines<R> {
    reader: R,
    line: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            line: Vec::new(),
            number: 0,
        }
    }

    /// The next line with its newline, which a truncated or overlong line lacks.
    fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        let mut limited = self.reader.by_ref().take(MAX_LINE as u64);
        limited.read_until(b'\n', &mut self.line)?;
        self.number += 1;
        Ok(Some(&*self.line).filter(|line| !line.is_empty()))
    }
}
