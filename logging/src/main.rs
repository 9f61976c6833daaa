//! The logging binary.

use std::process::ExitCode;

use common::door::Door;
use common::serve::{self, Timeouts};
use common::{config, output};
use logging::{App, Config, Task, map, router};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> ExitCode {
    let config: Config = config::parse();
    let (location, options) = config.map().unwrap_or_else(|line| config::fail(&line));
    let task = match config.task {
        Some(Task::Transfer(transfer)) => {
            return config::exit_code(transfer.run(&location, options).await);
        }
        Some(Task::Service(task)) => Some(task),
        None => None,
    };
    let service = |stop: CancellationToken| {
        let door = Door::new(&config.door, config.listen, &[]);
        let door = door.unwrap_or_else(|line| config::fail(&line));
        let map = map::open(&location, options)?;
        tokio::spawn(output::end_when_lost(stop.clone()));
        Ok(router(App::new(
            map,
            door,
            Timeouts::default(),
            config.store_timeout,
            stop,
        )))
    };
    serve::run(
        env!("CARGO_PKG_NAME"),
        &config.service,
        Some(&config.door),
        config.listen,
        task,
        service,
    )
    .await
}
