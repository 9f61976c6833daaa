//! A service as a real process on a free port, and its log. Dropping the process kills it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::requirements::unshare;

/// The number of log lines that are kept: enough for every assertion, bounded for bulk loads.
const KEPT_LINES: usize = 100_000;

/// Timeout for an event that must happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two polls for an event that must happen.
pub const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A running service.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pub address: SocketAddr,
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
    is_left_unread: Mutex<bool>,
    is_read_again: Condvar,
}

impl Process {
    /// Starts the command, which must run a service's binary, on `address`, and waits until it serves.
    pub fn start(mut command: Command, address: SocketAddr) -> Self {
        let mut child = command
            .args(["--listen", &address.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the service's binary can be started");
        let stdout = child.stdout.take().expect("stdout is piped");
        let log = Arc::new(Log::default());
        let writing = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let mut lines = writing.lines.lock().unwrap();
                if lines.len() < KEPT_LINES {
                    lines.push(line);
                }
                writing.grown.notify_all();
                drop(lines);
                let is_left_unread = writing.is_left_unread.lock().unwrap();
                let again = &writing.is_read_again;
                drop(again.wait_while(is_left_unread, |unread| *unread));
            }
        });
        let process = Self {
            child,
            address,
            log,
        };
        process.wait_for_line(|line| line.contains("serving requests"));
        process
    }

    /// Waits until `/readyz` returns 200.
    pub fn wait_until_ready(&self) {
        let begin = Instant::now();
        while !self.ask("/readyz").starts_with("HTTP/1.1 200") {
            assert!(begin.elapsed() < PATIENCE, "{}", self.readiness());
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits for a response to `/readyz?verbose`: the service looks at itself once a second.
    pub fn wait_for_readiness(&self, is_wanted: impl Fn(&str) -> bool) -> String {
        let begin = Instant::now();
        loop {
            let readiness = self.readiness();
            if is_wanted(&readiness) {
                return readiness;
            }
            assert!(begin.elapsed() < PATIENCE, "{readiness}");
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The whole response to `/readyz?verbose`.
    pub fn readiness(&self) -> String {
        self.ask("/readyz?verbose")
    }

    /// The whole response to a GET.
    pub fn ask(&self, path: &str) -> String {
        let mut connection = TcpStream::connect(self.address).unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        connection.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name, for example `TERM`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([format!("-{name}"), self.pid().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Ends the process with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until the process ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Reads no further line of the process's output, whose pipe then fills.
    pub fn leave_unread(&self) {
        *self.log.is_left_unread.lock().unwrap() = true;
    }

    /// Reads on.
    pub fn read_again(&self) {
        *self.log.is_left_unread.lock().unwrap() = false;
        self.log.is_read_again.notify_all();
    }

    /// The log so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lines.lock().unwrap().clone()
    }

    /// Waits until the log has a wanted line.
    #[track_caller]
    pub fn wait_for_line(&self, is_wanted: impl Fn(&str) -> bool) {
        self.wait_for_log(|lines| lines.iter().any(|line| is_wanted(line)));
    }

    /// Waits until the log is complete.
    #[track_caller]
    pub fn wait_for_log(&self, is_complete: impl Fn(&[String]) -> bool) {
        let lines = self.log.lines.lock().unwrap();
        let (lines, timed_out) = self
            .log
            .grown
            .wait_timeout_while(lines, PATIENCE, |lines| !is_complete(lines))
            .unwrap();
        let last = lines.last();
        assert!(
            !timed_out.timed_out(),
            "the log does not become complete; its last line: {last:?}"
        );
    }
}

/// A logging instance whose map is on a small disk: a tmpfs in a mount namespace, which ends with the
/// instance.
#[derive(Debug)]
pub struct OnSmallDisk {
    pub process: Process,
    filler: PathBuf,
}

impl OnSmallDisk {
    /// Starts an instance on a disk of `size` bytes at `folder`, half of it used. `None` where mounting is not
    /// allowed: the test is skipped.
    pub fn start(logging: &Path, folder: &Path, size: usize) -> Option<Self> {
        let mount = ["mount", "-t", "tmpfs", "tmpfs"];
        let trial = [&mount[..], &[folder.to_str().unwrap()]].concat();
        let mut command = unshare(&["--mount"], &trial)?;
        command
            .args(["sh", "-c"])
            .arg(format!(
                "mount -t tmpfs -o size={size} tmpfs \"$0\" && exec \"$@\""
            ))
            .arg(folder)
            .arg(logging)
            .args(["--map", &format!("lmdb:{}", folder.join("map").display())]);
        let process = Process::start(command, free_address());
        let root = Path::new("/proc")
            .join(process.pid().to_string())
            .join("root");
        let filler = root.join(folder.strip_prefix("/").unwrap()).join("filler");
        std::fs::write(&filler, vec![0; size / 2]).unwrap();
        Some(Self { process, filler })
    }

    /// Frees space on the disk.
    pub fn free_space(&self) {
        std::fs::remove_file(&self.filler).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address whose port is free, and stays free while a service is restarted on it: the port is below the
/// range from which the system takes ports for outgoing connections.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let offset = std::process::id() as u16;
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (offset.wrapping_mul(97).wrapping_add(step)) % 20_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}
