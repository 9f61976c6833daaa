//! Processes whose wall clock a test steps. Their monotonic clocks stay as they are.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// A library that takes the place of libc's wall clock: the real time, plus the seconds in a file that is mapped
/// into memory. (libfaketime does not work with Debian's Redis.)
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const long right = 0;
static const volatile long *ahead = &right;

__attribute__((constructor)) static void map_offset(void) {
    int file = open(getenv("FAKE_CLOCK"), O_RDONLY);
    void *mapped = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) ahead = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += *ahead;
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *stored) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (stored) *stored = now.tv_sec;
    return now.tv_sec;
}
"#;

/// A wall clock that processes share.
#[derive(Debug)]
pub struct FakeClock(TempDir);

impl FakeClock {
    /// A clock that is right. Needs a C compiler, as building LMDB does.
    #[allow(clippy::new_without_default, reason = "it compiles a library")]
    pub fn new() -> Self {
        let clock = Self(tempfile::tempdir().unwrap());
        clock.step_to(0);
        let source = clock.file("clock.c");
        fs::write(&source, SOURCE).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]);
        compiler.arg(clock.file("clock.so")).arg(&source);
        assert!(compiler.status().unwrap().success());
        clock
    }

    /// The clock is this many seconds ahead from now on.
    pub fn step_to(&self, seconds_ahead: i64) {
        let mut file = File::options();
        let file = file.write(true).create(true).truncate(false);
        let file = file.open(self.file("ahead")).unwrap();
        file.write_all_at(&seconds_ahead.to_ne_bytes(), 0).unwrap();
    }

    /// The environment of a process with this clock.
    pub fn environment(&self) -> Vec<(String, String)> {
        let variables = [("LD_PRELOAD", "clock.so"), ("FAKE_CLOCK", "ahead")];
        let path = |file| self.file(file).display().to_string();
        variables
            .map(|(name, file)| (name.to_owned(), path(file)))
            .to_vec()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
