//! A Chromium of a test of its own, and what a page in it shows.

use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::process::{Child, Command, Stdio};

use futures_util::FutureExt;
use serde_json::{Value, json};
use testing::process::{LOOK_AGAIN, PATIENCE};
use testing::requirements::{skip, trial_run};
use thirtyfour::prelude::*;
use thirtyfour::{ChromeCapabilities, ChromiumLikeCapabilities, LoggingPrefsLogLevel};

/// A chromedriver on a free port.
struct Driver {
    child: Child,
    url: String,
}

impl Driver {
    fn start() -> Self {
        let mut child = Command::new("chromedriver")
            .arg("--port=0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| {
            let line = line.unwrap();
            let port = line.split_once("started successfully on port ")?.1;
            Some(port.trim_end_matches('.').to_owned())
        });
        // Whatever it writes later is read, so that it never waits for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            child,
            url: format!("http://127.0.0.1:{}", port.unwrap()),
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is special about a browser.
#[derive(Default)]
pub(super) struct Settings {
    pub(super) is_without_scripts: bool,
    pub(super) is_dark: bool,
    /// The width of the page, as on a telephone.
    pub(super) width: Option<u32>,
}

/// Runs a test in a new browser, which ends with it. Without a Chromium the test is skipped.
pub(super) async fn in_browser(settings: Settings, test: impl AsyncFnOnce(&WebDriver)) {
    for program in ["chromium", "chromedriver"] {
        if let Err(why) = trial_run(Command::new(program).arg("--version")) {
            return skip(&format!("no {program}: {why}"), "REQUIRE_ALL");
        }
    }
    let profile = tempfile::tempdir().unwrap();
    let mut capabilities = ChromeCapabilities::new();
    let folder = format!("--user-data-dir={}", profile.path().display());
    let flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,1000",
        &folder,
    ];
    for flag in flags {
        capabilities.add_arg(flag).unwrap();
    }
    if settings.is_dark {
        let flag = "--blink-settings=preferredColorScheme=0";
        capabilities.add_arg(flag).unwrap();
    }
    if settings.is_without_scripts {
        let preferences = json!({"profile.managed_default_content_settings.javascript": 2});
        capabilities
            .add_experimental_option("prefs", preferences)
            .unwrap();
    }
    if let Some(width) = settings.width {
        let metrics = json!({"width": width, "height": 740, "pixelRatio": 1.0});
        let emulation = json!({"deviceMetrics": metrics});
        capabilities
            .add_experimental_option("mobileEmulation", emulation)
            .unwrap();
    }
    capabilities
        .set_browser_log_level(LoggingPrefsLogLevel::All)
        .unwrap();
    let chromedriver = Driver::start();
    let browser = WebDriver::new(&chromedriver.url, capabilities).await;
    let browser = browser.unwrap();
    let outcome = AssertUnwindSafe(test(&browser)).catch_unwind().await;
    browser.quit().await.unwrap();
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}

/// The value of a JavaScript expression in the page.
pub(super) async fn value(browser: &WebDriver, expression: &str) -> Value {
    let script = format!("return {expression};");
    let value = browser.execute(script, Vec::new()).await;
    value.unwrap().json().clone()
}

/// Waits until an expression has a wanted value, and returns it.
#[track_caller]
pub(super) fn wait_for(
    browser: &WebDriver,
    expression: &str,
    is_wanted: impl Fn(&Value) -> bool,
) -> impl Future<Output = Value> {
    let caller = std::panic::Location::caller();
    async move {
        let looking = async {
            loop {
                let value = value(browser, expression).await;
                if is_wanted(&value) {
                    return value;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        match tokio::time::timeout(PATIENCE, looking).await {
            Ok(value) => value,
            Err(_) => panic!("{caller}: {:#}", value(browser, expression).await),
        }
    }
}

/// Messages or warnings of the browser, among them what the policy refused.
pub(super) async fn complaints(browser: &WebDriver) -> Vec<String> {
    let log = browser.browser_log().await.unwrap();
    log.into_iter().map(|entry| entry.message).collect()
}
