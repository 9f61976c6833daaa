//! The logging binary: configuration, log, map, socket, serve.

use std::process::ExitCode;

use common::healthcheck::{Task, healthcheck};
use common::server::Limits;
use common::{config, server, telemetry};
use logging::{App, Config, LoggingTask, map};

#[tokio::main]
async fn main() -> ExitCode {
    config::report(run().await)
}

async fn run() -> anyhow::Result<()> {
    let config: Config = config::parse();
    let options = config
        .map_options()
        .unwrap_or_else(|line| config::fail(&line));
    match config.task {
        None => {}
        Some(LoggingTask::Service(Task::Healthcheck)) => {
            return healthcheck(config.listen).await.map_err(anyhow::Error::msg);
        }
        Some(LoggingTask::Transfer(transfer)) => {
            return transfer.run(&config.map, options).await;
        }
    }
    let _log =
        telemetry::init(config.service.log_format).unwrap_or_else(|line| config::fail(&line));
    let stop = server::stop_on_signal()?;
    let map = map::open(&config.map, options)?;
    let listener = config::bind(config.listen).map_err(anyhow::Error::msg)?;
    tracing::info!(address = %listener.local_addr()?, map = ?config.map, "serving the map");
    let stopping = stop.clone();
    let limits = Limits::default();
    let router = logging::router(App::new(map, limits, stop));
    server::serve(listener, router, limits, stopping, config.service.grace).await?;
    Ok(())
}
