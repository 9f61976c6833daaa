//! The tasks `export`, which writes a map to a file of JSON lines, `check`, which only reads it, and
//! `import`, which puts such a file into a map of any engine: for backup, restore, and migration to
//! another engine or layout.
//!
//! A file has the form of a stream, see [`common::api::StreamEnd`]: its last line, with the count,
//! proves that it is complete. All tasks can be killed and run again.

use std::env;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Args, Subcommand};
use common::api::{EntryLine, MAX_BATCH_BYTES, MAX_LINE, StreamEnd, timestamp};
use common::bounds::Bounds;
use common::entry::{self, Entry, Outcome};
use common::json;
use serde::Deserialize;
use tokio::time::sleep;
use uuid::Uuid;

use crate::map::{self, Access, DistributedMap, Location, MapError, Options, PieceLimit};

/// How long a task retries one read or one batch before it gives up: longer than a failover takes.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How often progress is printed, and how often an import checks whether other processes write.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

const EXPORT_PIECE: usize = 256 * 1024;

/// The size of a batch of an import, in bytes of lines; the last entry may exceed it.
const IMPORT_BATCH: usize = 512 * 1024;

/// A task on the map instead of serving it.
#[derive(Clone, Debug, Subcommand)]
pub enum Transfer {
    /// Write all entries of --map as lines of JSON (NDJSON), in order, and a last line with their
    /// count. After an interruption, the same command continues after FILE's last complete line
    Export {
        /// The file to write [default: standard output]
        file: Option<PathBuf>,
    },
    /// Read all entries of --map and verify that they are complete and undamaged, while instances
    /// may run. The first fault is named and ends the check with exit code 1
    Check {
        /// Set in the process that reads, which LMDB ends at a damaged page
        #[arg(long, hide = true)]
        in_child: bool,
    },
    /// Put all entries of an export, or of the body of a GET to the facade (JSON or NDJSON), into
    /// --map, whatever their age. After an interruption run the same command again: entries that
    /// are already in the map are not stored twice
    Import(Import),
    /// Print the clock of --map and the clock that it follows: this machine's, on Redis the median of
    /// the primaries'. The map's clock decides which messages are new; it never goes back, and follows
    /// a step of the other by a tenth of the time that passes
    Clock {
        /// Move the map's clock ahead to the other at once. Messages on their way whose time is then
        /// too old are stored under a new UUID, or get a 409 if the UUID is their caller's
        #[arg(long)]
        forward: bool,
    },
}

/// The arguments of `import`.
#[derive(Args, Clone, Debug)]
pub struct Import {
    /// The file to read [default: standard input]
    file: Option<PathBuf>,

    /// Import although other processes store entries: entries that no POST acknowledged on this map
    /// then appear in its settled history, clients that continue from a cursor or follow the log miss
    /// those before their position, and a key that a 409 called never stored can become stored
    #[arg(long)]
    force: bool,
}

impl Transfer {
    /// Runs the task. A signal ends it at once, which is safe at any time.
    ///
    /// # Errors
    /// Why the task failed, for the operator.
    pub async fn run(&self, location: &Location, mut options: Options) -> anyhow::Result<()> {
        match self {
            Self::Export { file } => {
                options.access = Access::Read;
                let map = map::open(location, options)?;
                export(&*map, file.as_deref()).await
            }
            Self::Check { in_child: false } => check_in_child(),
            Self::Check { in_child: true } => {
                options.access = Access::Read;
                let map = map::open(location, options)?;
                let count = read_all(&*map, None, "checked", |_| Ok(())).await?;
                eprintln!("checked {count} entries: no fault found");
                Ok(())
            }
            Self::Import(what) => {
                options.access = Access::Import;
                let map = map::open(location, options)?;
                import(&*map, what).await
            }
            Self::Clock { forward } => {
                options.access = Access::Read;
                let map = map::open(location, options)?;
                show_clock(&*map, *forward).await
            }
        }
    }
}

/// Writes the map, up to its newest entry at the start, to a file or standard output.
///
/// # Errors
/// When the map cannot be read or the file cannot be written.
async fn export(map: &dyn DistributedMap, file: Option<&Path>) -> anyhow::Result<()> {
    let (out, mut count, last): (Box<dyn Write>, u64, Option<Uuid>) = match file {
        Some(path) => {
            let begun = open_export(path).with_context(|| path.display().to_string())?;
            (Box::new(begun.0), begun.1, begun.2)
        }
        None => (Box::new(io::stdout()), 0, None),
    };
    let mut out = BufWriter::with_capacity(EXPORT_PIECE, out);
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

/// Reads the map after `last`, up to its newest entry at the start, and hands the lines of each piece
/// to `take`. Returns the number of entries.
async fn read_all(
    map: &dyn DistributedMap,
    mut last: Option<Uuid>,
    done: &str,
    mut take: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let newest = newest_uuid(map).await?;
    let end = newest.map_or(0, |newest| newest.as_u128().saturating_add(1));
    let bounds = Bounds::default().ending_before(Uuid::from_u128(end));
    let limit = PieceLimit {
        entries: u64::MAX,
        bytes: EXPORT_PIECE,
    };
    let mut count = 0;
    let mut printed = Instant::now();
    let mut cursor = None;
    loop {
        let rest = last.map_or(bounds, |last| bounds.resumed_from(last));
        let piece = read_with_retries(map, async || {
            let mut reading = cursor.take().unwrap_or_else(|| map.read(rest));
            let piece = reading.next(limit).await?;
            cursor = Some(reading);
            Ok(piece)
        });
        let piece = piece.await?;
        take(&piece.lines)?;
        if piece.count == 0 {
            return Ok(count);
        }
        count += piece.count;
        last = piece.last;
        if is_due(&mut printed) {
            eprintln!("{count} entries {done}");
        }
    }
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

/// Checks in a process of its own: at a page of its tree that is damaged, LMDB ends the process.
///
/// # Errors
/// When a signal ended it. It has printed any other fault.
fn check_in_child() -> anyhow::Result<()> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1)).arg("--in-child");
    let status = command.status().context("cannot start the check")?;
    match status.code() {
        Some(code) => process::exit(code),
        None => {
            bail!("the check was ended ({status}): a page is damaged; restore the map from a copy")
        }
    }
}

/// Prints both clocks; with `--forward` first moves the map's ahead to the machine's.
///
/// # Errors
/// When the map's clock cannot be read or moved.
async fn show_clock(map: &dyn DistributedMap, forward: bool) -> anyhow::Result<()> {
    let mut clocks = known(map, || map.clocks()).await?;
    if forward {
        // On Redis the clock of this process alone may have begun there already.
        let forward = clocks.machine.max(clocks.map);
        read_with_retries(map, async || map.settle(forward).await).await?;
        clocks = known(map, || map.clocks()).await?;
    }
    println!("map      {}", timestamp(clocks.map));
    println!("machine  {}", timestamp(clocks.machine));
    Ok(())
}

/// Waits until an instance knows something of its map.
async fn known<T>(
    map: &dyn DistributedMap,
    mut look: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let unknown = || MapError::Unavailable("the map is not known yet".to_owned());
    read_with_retries(map, async || look().ok_or_else(unknown)).await
}

/// Puts the entries of a file or standard input into the map. Unless forced, first checks for the map's
/// settle window that no other process writes.
///
/// # Errors
/// When an entry is refused or conflicts, the file is unreadable or truncated, or others write.
async fn import(map: &dyn DistributedMap, Import { file, force }: &Import) -> anyhow::Result<()> {
    let quiet = known(map, || map.settle_window()).await?;
    let reader: Box<dyn BufRead> = match file {
        Some(path) => {
            let file = File::open(path);
            let file = file.with_context(|| format!("cannot read {}", path.display()))?;
            Box::new(BufReader::new(file))
        }
        None => Box::new(io::stdin().lock()),
    };
    let mut source = Source {
        lines: Lines::new(reader),
        count: 0,
        is_finished: false,
    };
    let mut newest = match force {
        true => None,
        false => wait_until_quiet(map, quiet).await?,
    };
    let (mut stored, mut duplicates, mut conflicts) = (0, 0, 0);
    let mut first_conflict = None;
    let mut printed = Instant::now();
    loop {
        let batch = source.next_batch()?;
        let is_last = batch.is_empty();
        newest = newest.max(batch.iter().map(|entry| entry.uuid).max());
        for (uuid, outcome) in put_all(map, batch).await? {
            match outcome {
                Outcome::Stored => stored += 1,
                Outcome::Duplicate => duplicates += 1,
                _ => {
                    conflicts += 1;
                    first_conflict.get_or_insert(uuid);
                }
            }
        }
        if !is_last && !is_due(&mut printed) {
            continue;
        }
        let so_far = format!("{stored} entries stored, {duplicates} were already in the map");
        if !force && newest_uuid(map).await? > newest {
            bail!("{so_far}; {OTHERS_WRITE}");
        }
        if is_last {
            eprintln!("imported: {so_far}");
            break;
        }
        eprintln!("{so_far}");
    }
    match first_conflict {
        None => Ok(()),
        Some(first) => bail!(
            "the map holds another message under {conflicts} of the file's UUIDs and keeps it; the \
             first is {first}"
        ),
    }
}

const OTHERS_WRITE: &str = "other processes store entries in this map: stop the facades and the \
    instances that write, or set --force (--help explains its risks)";

/// Waits until the newest entry is as old as `quiet`, and returns its UUID. Fails if a newer entry
/// appears until then.
async fn wait_until_quiet(
    map: &dyn DistributedMap,
    quiet: Duration,
) -> anyhow::Result<Option<Uuid>> {
    let newest = newest_uuid(map).await?;
    let time = newest.map_or(0, entry::unix_millis);
    let old_enough = UNIX_EPOCH + Duration::from_millis(time) + quiet;
    let clocks = known(map, || map.clocks()).await?;
    if let Ok(wait) = old_enough.duration_since(clocks.map) {
        eprintln!(
            "the newest entry is recent: checking for {wait:.1?} whether other processes write"
        );
        sleep(wait).await;
        ensure!(newest_uuid(map).await? == newest, OTHERS_WRITE);
    }
    Ok(newest)
}

/// Puts a batch and retries entries that are refused or unknown. On success each entry is stored, a
/// duplicate or a conflict.
async fn put_all(
    map: &dyn DistributedMap,
    batch: Vec<Entry>,
) -> anyhow::Result<Vec<(Uuid, Outcome)>> {
    let mut put = Vec::with_capacity(batch.len());
    let mut rest: Arc<[Entry]> = batch.into();
    let begin = Instant::now();
    while !rest.is_empty() {
        let outcomes = map.put(rest.clone()).await;
        let mut again = Vec::new();
        let mut reason = String::new();
        for (entry, outcome) in rest.iter().zip(outcomes) {
            match outcome {
                Outcome::Stored | Outcome::Duplicate | Outcome::Conflict => {
                    put.push((entry.uuid, outcome));
                }
                Outcome::Stale | Outcome::Leaving | Outcome::Early => {
                    bail!(
                        "the time in {} is in the future by the map's clock",
                        entry.uuid
                    )
                }
                Outcome::Refused { detail }
                | Outcome::PartitionDown { detail }
                | Outcome::Unknown { detail } => {
                    again.push(entry.clone());
                    reason = detail;
                }
            }
        }
        ensure!(
            again.is_empty() || begin.elapsed() < RETRY_TIMEOUT,
            "the map takes no entries: {reason}; run the same command again when it does"
        );
        if !again.is_empty() {
            sleep(RETRY_PAUSE).await;
        }
        rest = again.into();
    }
    Ok(put)
}

/// The file of an import.
struct Source {
    lines: Lines<Box<dyn BufRead>>,
    count: u64,
    is_finished: bool,
}

/// The last line of an export, of an instance's stream or of a GET's body; the messages service's reply
/// is ignored.
#[derive(Deserialize)]
struct Tail {
    count: u64,
    go_on_elsewhere: Option<String>,
}

impl Source {
    /// The next entries; none at the end.
    fn next_batch(&mut self) -> anyhow::Result<Vec<Entry>> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < IMPORT_BATCH && !self.is_finished {
            let number = self.lines.number + 1;
            let Some(line) = self.lines.next().context("cannot read")? else {
                bail!(
                    "the file is truncated: its {} entries are not followed by a line with their count",
                    self.count
                );
            };
            bytes += line.len();
            // A JSON body has the lines of NDJSON, plus a first line, commas and brackets.
            let line = line.trim_ascii_end();
            let line = line.strip_suffix(b",").unwrap_or(line);
            if line == br#"{"logging_service":["# {
                continue;
            }
            let entry: Entry = match serde_json::from_slice(line) {
                Ok(entry) => entry,
                Err(error) => {
                    let tail = match line.strip_prefix(b"],") {
                        Some(members) => serde_json::from_slice(&[b"{", members].concat()),
                        None => serde_json::from_slice(line),
                    };
                    let tail = tail.map_err(|_| error).with_context(|| {
                        format!(
                            "line {number} is not an entry; import takes an export, or a GET's body \
                             as JSON or NDJSON"
                        )
                    })?;
                    self.finish(&tail)?;
                    break;
                }
            };
            let uuid = entry::require_entry_uuid(entry.uuid);
            uuid.map_err(|reason| anyhow!("line {number}: {reason}"))?;
            ensure!(!entry.msg.is_empty(), "line {number}: the message is empty");
            // What no instance can have stored might be longer than readers take.
            ensure!(
                entry.msg.len() < MAX_BATCH_BYTES,
                "line {number}: the message is larger than any that an instance stores"
            );
            self.count += 1;
            batch.push(entry);
        }
        Ok(batch)
    }

    /// Checks that the file is complete and ends with its last line.
    fn finish(&mut self, tail: &Tail) -> anyhow::Result<()> {
        ensure!(
            tail.count == self.count,
            "the file has {} entries, but its last line says {}",
            self.count,
            tail.count
        );
        if let Some(reason) = &tail.go_on_elsewhere {
            bail!("the file is incomplete: the instance stopped sending, as {reason}");
        }
        ensure!(
            self.lines.next().context("cannot read")?.is_none(),
            "lines follow the one with the count; import each file by itself"
        );
        self.is_finished = true;
        Ok(())
    }
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

async fn newest_uuid(map: &dyn DistributedMap) -> anyhow::Result<Option<Uuid>> {
    read_with_retries(map, async || map.last().await).await
}

/// Reads from the map and retries transient errors for at most [`RETRY_TIMEOUT`].
async fn read_with_retries<T>(
    map: &dyn DistributedMap,
    mut read: impl AsyncFnMut() -> Result<T, MapError>,
) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        match read().await {
            Ok(read) => return Ok(read),
            Err(error @ MapError::Damaged(_)) => return Err(error.into()),
            Err(error) if begin.elapsed() > RETRY_TIMEOUT => {
                bail!(map.health().await.not_ready.unwrap_or(error.to_string()))
            }
            Err(_) => sleep(RETRY_PAUSE).await,
        }
    }
}

/// Whether [`PROGRESS_INTERVAL`] has passed since progress was printed, which is now then.
fn is_due(printed: &mut Instant) -> bool {
    let is_due = printed.elapsed() >= PROGRESS_INTERVAL;
    if is_due {
        *printed = Instant::now();
    }
    is_due
}
