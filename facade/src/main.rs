//! The facade binary.

use std::process::ExitCode;

use common::config;
use common::serve::{self, Timeouts};
use facade::{App, Config, router};
use mimalloc::MiMalloc;

/// A POST makes some forty allocations, and other threads free many of them. The instances, which do few for an
/// entry, would only hold more memory with it.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let config: Config = config::parse();
    let service = |stop| {
        let app = App::new(&config, Timeouts::default(), rand::make_rng(), stop);
        Ok(router(app.unwrap_or_else(|line| config::fail(&line))))
    };
    serve::run(
        env!("CARGO_PKG_NAME"),
        &config.service,
        Some(&config.door),
        config.listen,
        config.task,
        service,
    )
    .await
}
