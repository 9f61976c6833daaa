//! The tasks `export`, which writes a map to a file of JSON lines, `check`, which only reads it, and
//! `import`, which puts such a file into a map of any engine: for backup, restore, and migration to
//! another engine or layout.
//!
//! A file has the form of a stream, see [`common::api::StreamEnd`]: its last line, with the count,
//! proves that it is complete. All tasks can be killed and run again.

mod check;
mod clock;
mod export;
mod import;
mod source;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Subcommand;
use common::bounds::Bounds;
use tokio::time::sleep;
use uuid::Uuid;

use self::import::Import;
use crate::map::{self, Access, DistributedMap, Location, MapError, Options, PieceLimit};

/// How long a task retries one read or one batch before it gives up: longer than a failover takes.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How often progress is printed, and how often an import checks whether other processes write.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The size of a piece that is read, in bytes.
const READ_PIECE: usize = 256 * 1024;

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
    /// Put all entries of an export, or of the whole body of a GET to the facade (JSON or NDJSON, also
    /// as jq or Python wrote it again), into --map, whatever their age. After an interruption run the
    /// same command again: entries that are already in the map are not stored twice
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
                export::run(&*map, file.as_deref()).await
            }
            Self::Check { in_child: false } => check::in_child(),
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
                import::run(&*map, what).await
            }
            Self::Clock { forward } => {
                options.access = Access::Read;
                let map = map::open(location, options)?;
                clock::show(&*map, *forward).await
            }
        }
    }
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
        bytes: READ_PIECE,
        message: usize::MAX,
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

/// Waits until an instance knows something of its map.
async fn known<T>(
    map: &dyn DistributedMap,
    mut look: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let unknown = || MapError::Unavailable("the map is not known yet".to_owned());
    read_with_retries(map, async || look().ok_or_else(unknown)).await
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
