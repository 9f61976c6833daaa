//! The messages binary: configuration, log, socket, serve.

use std::process::ExitCode;

use common::healthcheck::{Task, healthcheck};
use common::server::Limits;
use common::{config, server, telemetry};
use messages::Config;

#[tokio::main]
async fn main() -> ExitCode {
    config::report(run().await)
}

async fn run() -> anyhow::Result<()> {
    let config: Config = config::parse();
    if let Some(Task::Healthcheck) = config.task {
        return healthcheck(config.listen).await.map_err(anyhow::Error::msg);
    }
    let _log =
        telemetry::init(config.service.log_format).unwrap_or_else(|line| config::fail(&line));
    let stop = server::stop_on_signal()?;
    let listener = config::bind(config.listen).map_err(anyhow::Error::msg)?;
    tracing::info!(address = %listener.local_addr()?, "serving the messages stub");
    let limits = Limits::default();
    let router = messages::router(stop.clone());
    server::serve(listener, router, limits, stop, config.service.grace).await?;
    Ok(())
}
