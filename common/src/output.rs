//! The log on standard output, which may block: a full pipe, a paused terminal, a full disk.
//!
//! A thread writes what has gathered, so no request ever waits for one that is being written. A line that
//! finds 4 MiB waiting is dropped and counted. A text of [`print()`] is never dropped: its
//! caller waits until it is written, and bounds what waits.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::fmt::MakeWriter;

use crate::escape::needs_escape;

/// Lines that wait for standard output, in bytes: some ten thousand, a moment of the highest load.
const MAX_WAITING: usize = 4 * 1024 * 1024;

/// The bytes of one write at most. Each that ends shows that the output moves.
const WRITE_PIECE: usize = 64 * 1024;

/// For how long lines gather that nobody waits for: a write, and waking the thread for it, costs more than
/// formatting a line.
const GATHER: Duration = Duration::from_millis(5);

/// The pause after a write that failed, before it is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// How long the end of the process waits for lines that are not written yet.
const LAST_LINES: Duration = Duration::from_secs(1);

static OUTPUT: LazyLock<Output> = LazyLock::new(Output::default);

thread_local! {
    /// What [`collect`] has collected on this thread.
    static COLLECTED: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

#[derive(Debug, Default)]
struct Output {
    waiting: Mutex<Waiting>,
    grown: Condvar,
    written: Condvar,
    dropped_lines: AtomicU64,
    /// Cancelled when the reader of a pipe is gone.
    lost: CancellationToken,
}

#[derive(Debug, Default)]
struct Waiting {
    text: Vec<u8>,
    /// Told when the text is written.
    callers: Vec<oneshot::Sender<()>>,
    /// Since when the output has not moved, while something is to be written.
    stuck_since: Option<Instant>,
}

/// Starts the thread that writes, and returns what waits for it at the end of the process.
///
/// # Errors
/// When standard output or a thread cannot be had.
pub(crate) fn start() -> io::Result<LastLines> {
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let thread = std::thread::Builder::new().name("log".to_owned());
    thread.spawn(move || OUTPUT.write_to(stdout))?;
    Ok(LastLines)
}

/// Waits for the last lines when it is dropped, but not for an output that is stuck.
#[derive(Debug)]
pub(crate) struct LastLines;

impl Drop for LastLines {
    fn drop(&mut self) {
        let is_waiting = |waiting: &mut Waiting| waiting.stuck_since.is_some();
        let written = &OUTPUT.written;
        written.wait_while_for(&mut OUTPUT.lock(), is_waiting, LAST_LINES);
    }
}

/// Collects the lines that `log` logs on this thread, instead of writing them.
pub fn collect(log: impl FnOnce()) -> Vec<u8> {
    COLLECTED.set(Some(Vec::new()));
    log();
    COLLECTED.take().unwrap_or_default()
}

/// Writes collected lines, with one write if they are not longer than 64 KiB. The future ends when
/// they are written; they are also if it is dropped.
pub fn print(lines: Vec<u8>) -> impl Future<Output = ()> + Send + 'static {
    let is_written = (!lines.is_empty()).then(|| OUTPUT.add(&lines));
    async {
        if let Some(is_written) = is_written {
            let _ = is_written.await;
        }
    }
}

/// For how long the output has not taken anything, while something waits for it.
pub fn stuck_for() -> Duration {
    let since = OUTPUT.lock().stuck_since;
    since.map_or(Duration::ZERO, |since| since.elapsed())
}

/// Ends the process, with a line on stderr and code 1, when the reader of its output is gone: a supervisor can
/// start it again with another one. A process that stops anyway is left to finish.
pub async fn end_when_lost(stop: CancellationToken) {
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = OUTPUT.lost.cancelled() => {
            eprintln!(
                "error: the reader of standard output is gone, and no entry is stored without its line: \
                 start this instance again with a reader"
            );
            std::process::exit(1);
        }
    }
}

/// Lines that were dropped because the output was stuck, since the start of the process.
pub(crate) fn dropped_lines() -> u64 {
    OUTPUT.dropped_lines.load(Ordering::Relaxed)
}

impl Waiting {
    /// Whether the text is written at once.
    fn is_urgent(&self) -> bool {
        !self.callers.is_empty() || self.text.len() >= WRITE_PIECE
    }
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock()
    }

    fn add(&self, lines: &[u8]) -> oneshot::Receiver<()> {
        let (caller, is_written) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.callers.push(caller);
        self.append(waiting, lines);
        is_written
    }

    fn add_or_drop(&self, line: &[u8]) {
        let waiting = self.lock();
        if waiting.text.len() < MAX_WAITING {
            self.append(waiting, line);
        } else {
            self.dropped_lines.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn append(&self, mut waiting: MutexGuard<'_, Waiting>, text: &[u8]) {
        let was_empty = waiting.text.is_empty();
        waiting.text.extend_from_slice(text);
        waiting.stuck_since.get_or_insert_with(Instant::now);
        let wakes = was_empty || waiting.is_urgent();
        drop(waiting);
        if wakes {
            self.grown.notify_one();
        }
    }

    fn write_to(&self, mut output: impl Write) {
        loop {
            let mut waiting = self.lock();
            while waiting.text.is_empty() {
                waiting.stuck_since = None;
                self.written.notify_all();
                self.grown.wait(&mut waiting);
            }
            let gathers = |waiting: &mut Waiting| !waiting.is_urgent();
            self.grown.wait_while_for(&mut waiting, gathers, GATHER);
            let text = std::mem::take(&mut waiting.text);
            let callers = std::mem::take(&mut waiting.callers);
            drop(waiting);
            self.write_whole(&mut output, &text);
            for caller in callers {
                // A caller may have given up.
                let _ = caller.send(());
            }
        }
    }

    /// Writes until all is written, however long it takes: nobody else could tell where to go on.
    fn write_whole(&self, output: &mut impl Write, mut text: &[u8]) {
        while !text.is_empty() {
            let piece = &text[..text.len().min(WRITE_PIECE)];
            match output.write(piece) {
                Ok(bytes @ 1..) => {
                    text = &text[bytes..];
                    self.lock().stuck_since = Some(Instant::now());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    self.lost.cancel();
                    std::thread::sleep(RETRY);
                }
                Ok(0) | Err(_) => std::thread::sleep(RETRY),
            }
        }
    }
}

/// Makes the log's lines safe to print, and writes them or collects them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lines;

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let escaped = escape(line);
        let safe = escaped.as_ref().map_or(line, String::as_bytes);
        COLLECTED.with_borrow_mut(|collected| match collected {
            Some(lines) => lines.extend_from_slice(safe),
            None => OUTPUT.add_or_drop(safe),
        });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes the control characters that JSON allows, such as U+009B, as JSON escapes; they occur only in
/// strings. Text lines have none left: their strings are escaped when they are formatted. `None` when
/// there is nothing to escape.
fn escape(line: &[u8]) -> Option<String> {
    // The other control characters of ASCII are the newline of the line and the colours.
    let may_be_escaped = |byte: &u8| *byte >= 0x7f;
    if !line.iter().any(may_be_escaped) {
        return None;
    }
    let is_escaped = |character: char| {
        character == '\u{7f}' || (!character.is_ascii() && needs_escape(character))
    };
    let text = std::str::from_utf8(line).ok()?;
    if !text.contains(is_escaped) {
        return None;
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_escaped(character) {
            escaped.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            escaped.push(character);
        }
    }
    Some(escaped)
}
