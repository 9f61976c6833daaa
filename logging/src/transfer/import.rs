//! The task `import`.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use clap::Args;
use common::entry::{self, Entry, Outcome};
use tokio::time::sleep;
use uuid::Uuid;

use super::{RETRY_PAUSE, RETRY_TIMEOUT, is_due, known, newest_uuid, source};
use crate::map::DistributedMap;

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

/// Puts the entries of a file or standard input into the map. Unless forced, first checks for the map's
/// settle window that no other process writes.
///
/// # Errors
/// When an entry is refused or conflicts, the file is unreadable or truncated, or others write.
pub(super) async fn run(
    map: &dyn DistributedMap,
    Import { file, force }: &Import,
) -> anyhow::Result<()> {
    let quiet = known(map, || map.settle_window()).await?;
    let reader: Box<dyn Read + Send> = match file {
        Some(path) => {
            let file = File::open(path);
            Box::new(file.with_context(|| format!("cannot read {}", path.display()))?)
        }
        None => Box::new(io::stdin()),
    };
    let mut newest = if *force {
        None
    } else {
        wait_until_quiet(map, quiet).await?
    };
    let mut batches = source::read(reader)?;
    let (mut stored, mut duplicates, mut conflicts) = (0, 0, 0);
    let mut first_conflict = None;
    let mut printed = Instant::now();
    loop {
        let batch = batches.recv().await.context("reading the file failed")??;
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
