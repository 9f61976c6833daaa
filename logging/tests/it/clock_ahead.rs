//! Redis servers whose clock is ahead of the machine's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::redis_servers::RedisServer;

/// A library that puts the clock of a server ahead.
#[derive(Debug)]
pub(crate) struct ClockAhead(PathBuf);

impl ClockAhead {
    /// Compiles it; a C compiler is needed to build LMDB anyway.
    pub(crate) fn compile(library: &Path) -> Self {
        const SOURCE: &str = "\
            #include <stdlib.h>\n\
            #include <sys/time.h>\n\
            #include <time.h>\n\
            int gettimeofday(struct timeval *restrict now, void *restrict zone) {\n\
                struct timespec real;\n\
                clock_gettime(CLOCK_REALTIME, &real);\n\
                long micros = real.tv_nsec / 1000 + 1000 * atol(getenv(\"AHEAD_MILLIS\"));\n\
                now->tv_sec = real.tv_sec + micros / 1000000;\n\
                now->tv_usec = micros % 1000000;\n\
                return 0;\n\
            }\n";
        let source = library.with_extension("c");
        std::fs::write(&source, SOURCE).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).arg(library);
        assert!(compiler.arg(&source).status().unwrap().success());
        Self(library.to_owned())
    }

    /// Starts a server whose clock is ahead by this much.
    pub(crate) fn start(&self, folder: &Path, flags: &[&str], ahead: Duration) -> RedisServer {
        let library = self.0.to_str().expect("the path is UTF-8");
        let millis = ahead.as_millis().to_string();
        let environment = [("LD_PRELOAD", library), ("AHEAD_MILLIS", &millis)];
        RedisServer::start_with(folder, flags, &environment)
    }
}
