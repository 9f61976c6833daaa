//! The messages binary.

use std::process::ExitCode;

use common::{config, serve};
use messages::{Config, router};

#[tokio::main]
async fn main() -> ExitCode {
    let config: Config = config::parse();
    let service = |stop| Ok(router(stop));
    serve::run(
        env!("CARGO_PKG_NAME"),
        &config.service,
        None,
        config.listen,
        config.task,
        service,
    )
    .await
}
