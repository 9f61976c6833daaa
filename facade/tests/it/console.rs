//! The console, in a real Chromium with and without JavaScript, and as plain HTTP.

/// Keyboards, screen readers, small screens, large text.
mod accessibility;
/// The browser.
mod browser;
/// A Redis Cluster that loses a primary.
mod failover;
/// The search.
mod search;

use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde_json::{Value, json};
use thirtyfour::prelude::*;

use self::browser::{Settings, complaints, in_browser, value, wait_for};
use crate::processes::Processes;
use crate::system::{System, problem};

const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";

const HOSTILE: &str = "<img src=x onerror=\"window.hacked=1\"></li><script>window.hacked=1</script>\
                       \u{202e}drawkcab\u{7}\n&lt;b&gt; ' \"";

async fn open(browser: &WebDriver, system: &Processes) {
    let url = format!("{}/console", system.facade.url());
    browser.goto(url).await.unwrap();
}

async fn open_live(browser: &WebDriver, system: &Processes) {
    open(browser, system).await;
    let words = "document.getElementById('status-words').textContent";
    wait_for(browser, words, |words| words == "Live").await;
}

/// The texts of all cells of a table, row by row, the header first.
fn texts(table: &str) -> String {
    format!(
        "[...document.getElementById('{table}').rows]\
         .map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
}

async fn stats(system: &Processes) -> Value {
    let url = format!("{}/stats", system.facade.url());
    system
        .http
        .get(url)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap()
}

/// Stores many messages in one request.
async fn upload(system: &Processes, count: usize) {
    let lines: String = (0..count).map(|n| format!("\"message {n}\"\n")).collect();
    let post = system.http.post(system.facade.url());
    let post = post
        .header(CONTENT_TYPE, "application/x-ndjson")
        .body(lines);
    let summary: Value = post.send().await.unwrap().json().await.unwrap();
    assert_eq!(summary["stored"], count);
}

fn without_commas(cell: &Value) -> u64 {
    cell.as_str().unwrap().replace(',', "").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn page_shows_the_numbers_of_stats_and_a_kill() {
    let mut system = Processes::start();
    upload(&system, 1234).await;
    in_browser(Settings::default(), async |browser| {
        open_live(browser, &system).await;
        // The server renders ten. The page reads twenty, and again only when there are more entries.
        let count = "document.querySelectorAll('#newest li').length";
        wait_for(browser, count, |count| *count == 20).await;
        let known = stats(&system).await;
        let gets = known["map"]["total"]["gets"].to_string();
        let is_current = |table: &Value| table[2][0] == "TOTAL" && table[2][5] == gets;
        let members = wait_for(browser, &texts("members"), is_current).await;
        let member = &known["map"]["members"][0];
        assert_eq!(members[1][0], member["member"]);
        assert_eq!(
            (&members[1][1], &members[1][2]),
            (&json!("folder"), &json!("up"))
        );
        assert_eq!(members[1][4], "1,234");
        let columns = [
            (3, "partitions"),
            (4, "entries"),
            (5, "gets"),
            (6, "puts"),
            (8, "backups"),
        ];
        for (column, key) in columns {
            assert_eq!(without_commas(&members[1][column]), member[key], "{key}");
            if column > 3 {
                let total = &known["map"]["total"][key];
                assert_eq!(without_commas(&members[2][column]), *total, "{key}");
            }
        }
        let kibibytes = member["entry_memory_bytes"].as_f64().unwrap() / 1024.0;
        assert_eq!(members[1][7], format!("{kibibytes:.1} KiB"));
        let instances = value(browser, &texts("instances")).await;
        for (index, row) in known["instances"].as_array().unwrap().iter().enumerate() {
            let cells = &instances[index + 1];
            assert_eq!(cells[0], row["instance"]);
            assert_eq!(without_commas(&cells[2]), row["received"]);
            // Ten seconds after the upload there is nothing to share.
            let share = row["share"].as_f64();
            let share = share.map_or("–".to_owned(), |share| format!("{:.1} %", 100.0 * share));
            assert_eq!(cells[3], share);
            assert_eq!(without_commas(&cells[4]), row["outcomes"]["stored"]);
            assert_eq!(
                cells[12],
                format!("{:.1}", row["put_p99_ms"].as_f64().unwrap())
            );
        }

        let address = system.logging[1].address;
        system.logging[1].kill();
        let state = "document.getElementById('instances').tBodies[0].rows[1].cells[1].textContent";
        wait_for(browser, state, |state| state == "down").await;
        let problems = value(browser, "document.getElementById('problems').textContent").await;
        let problem = "logging-2 refuses connections";
        assert!(problems.as_str().unwrap().contains(problem), "{problems}");
        let timeline = "document.getElementById('timeline').textContent";
        let timeline_now = value(browser, timeline).await;
        let gone = format!("logging {address} is down");
        assert!(
            timeline_now.as_str().unwrap().contains(&gone),
            "{timeline_now}"
        );

        system.restart_logging(1);
        wait_for(browser, state, |state| state == "up").await;
        let timeline_now = value(browser, timeline).await;
        let back = format!("logging {address} is back");
        assert!(
            timeline_now.as_str().unwrap().contains(&back),
            "{timeline_now}"
        );
        let problems = value(browser, "document.getElementById('problems').innerText").await;
        assert_eq!(problems, "No problems.");
    })
    .await;
}

/// A browser asks its user for a token once, and sends it with all that the page asks for and posts.
#[tokio::test(flavor = "multi_thread")]
async fn page_works_with_a_token() {
    const TOKEN: &str = "poster-0123456789";
    let tokens = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&tokens, TOKEN).unwrap();
    let flags = ["--token-file", tokens.path().to_str().unwrap()];
    let system = Processes::start_with(&flags);
    in_browser(Settings::default(), async |browser| {
        // A user types it into the browser's dialog; a test puts it into a first URL.
        let url = format!("{}/livez?sign-in", system.facade.url());
        let with_token = url.replace("http://", &format!("http://:{TOKEN}@"));
        browser.goto(with_token).await.unwrap();
        open_live(browser, &system).await;
        let field = browser.find(By::Id("msg")).await.unwrap();
        field
            .send_keys("hello".to_owned() + Key::Enter)
            .await
            .unwrap();
        let newest = "document.querySelector('#newest .msg')?.textContent ?? null";
        wait_for(browser, newest, |newest| *newest == "hello").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn form_posts_with_and_without_scripts() {
    let system = Processes::start();
    for is_without_scripts in [false, true] {
        let settings = Settings {
            is_without_scripts,
            ..Settings::default()
        };
        let msg = format!("1+1=2 & more, {is_without_scripts}");
        in_browser(settings, async |browser| {
            open(browser, &system).await;
            let field = browser.find(By::Id("msg")).await.unwrap();
            field.send_keys(msg.as_str() + Key::Enter).await.unwrap();
            if is_without_scripts {
                // The browser shows the answer of the API.
                let text = "document.body.textContent";
                let is_stored = |text: &Value| text.as_str().unwrap().contains("{\"uuid\":\"");
                wait_for(browser, text, is_stored).await;
                assert_eq!(system.messages_in_log().await.last(), Some(&msg));
                return;
            }
            let answer = "document.getElementById('answer')?.textContent ?? ''";
            let is_stored = |answer: &Value| answer.as_str().unwrap().contains("Stored as");
            let answer = wait_for(browser, answer, is_stored).await;
            let by = system.logging.iter().any(|instance| {
                let by = format!(" by {} in ", instance.address);
                answer.as_str().unwrap().contains(&by)
            });
            assert!(by, "{answer}");
            let newest = "document.querySelector('#newest .msg')?.textContent ?? null";
            wait_for(browser, newest, |newest| *newest == msg).await;
            assert_eq!(system.messages_in_log().await.last(), Some(&msg));
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_sorted_by_keyboard() {
    let system = Processes::start();
    upload(&system, 100).await;
    in_browser(Settings::default(), async |browser| {
        open_live(browser, &system).await;
        let header = "#instances th[data-key='/received']";
        let button = format!("{header} button");
        let button = browser.find(By::Css(button)).await.unwrap();
        let direction = format!("document.querySelector(\"{header}\").getAttribute('aria-sort')");
        let received = "[...document.querySelectorAll('#instances tbody tr')]\
                        .map((row) => Number(row.cells[2].textContent))";
        let known = stats(&system).await;
        let known = known["instances"].as_array().unwrap().iter();
        let mut known: Vec<u64> = known.map(|row| row["received"].as_u64().unwrap()).collect();
        known.sort_unstable();
        assert_eq!(value(browser, &direction).await, Value::Null);
        button.send_keys(Key::Enter).await.unwrap();
        assert_eq!(value(browser, &direction).await, "descending");
        let descending: Vec<u64> = known.iter().copied().rev().collect();
        assert_eq!(value(browser, received).await, json!(descending));
        button.send_keys(Key::Space).await.unwrap();
        assert_eq!(value(browser, &direction).await, "ascending");
        assert_eq!(value(browser, received).await, json!(known));
        let of_members = browser.find(By::Css("#members th[data-key='/entries'] button"));
        of_members
            .await
            .unwrap()
            .send_keys(Key::Enter)
            .await
            .unwrap();
        let last = "[...document.getElementById('members').rows].at(-1).cells[0].textContent";
        assert_eq!(value(browser, last).await, "TOTAL");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_messages_are_text_and_the_browser_has_no_complaint() {
    // A part of it that closes what the page puts it into, as it is in an attribute and in a text.
    const TEXT: &str = "<img src=x onerror=\"window.hacked=1\"></li><script>";
    let system = Processes::start();
    assert_eq!(system.post(HOSTILE).await.status(), 200);
    for is_without_scripts in [true, false] {
        let settings = Settings {
            is_without_scripts,
            ..Settings::default()
        };
        in_browser(settings, async |browser| {
            if is_without_scripts { open(browser, &system).await } else {
                    open_live(browser, &system).await;
                    // The message came once from the server and once from the script.
                    assert_eq!(system.post(HOSTILE).await.status(), 200);
                    let count = "document.querySelectorAll('#newest li').length";
                    wait_for(browser, count, |count| *count == 2).await;
                }
            let shown = "document.querySelector('#newest .msg').textContent";
            let shown_as = HOSTILE
                .replace('\u{202e}', "\\u{202e}")
                .replace('\u{7}', "\\u{7}")
                .replace('\n', "\\n");
            assert_eq!(value(browser, shown).await, shown_as);
            let escapes = "[...document.querySelectorAll('#newest li:first-child mark')]\
                           .map((mark) => mark.textContent)";
            let expected = json!(["\\u{202e}", "\\u{7}", "\\n"]);
            assert_eq!(value(browser, escapes).await, expected);
            let inner = "document.querySelectorAll('#newest :is(script, img, b)').length";
            assert_eq!(value(browser, inner).await, 0);
            assert_eq!(value(browser, "window.hacked ?? null").await, Value::Null);

            let field = browser.find(By::Id("contains")).await.unwrap();
            field.send_keys(TEXT.to_owned() + Key::Enter).await.unwrap();
            let found = "[...document.querySelectorAll('#found .msg')].map((one) => one.textContent)";
            let found = wait_for(browser, found, |found| found[0] != Value::Null).await;
            assert_eq!(found[0], shown_as);
            let inner = "document.querySelectorAll('#found :is(script, img, b), .found :is(script, img, b)').length";
            assert_eq!(value(browser, inner).await, 0);
            assert_eq!(value(browser, "document.getElementById('contains').value").await, TEXT);
            assert_eq!(value(browser, "window.hacked ?? null").await, Value::Null);
            assert_eq!(complaints(browser).await, Vec::<String>::new());
        })
        .await;
    }
}

/// Only a navigation gets the page, and what it gets is small and locked down.
#[tokio::test]
async fn page_is_for_browsers() {
    const JAVA: &str = "text/html, image/gif, image/jpeg, */*; q=0.2";
    let system = System::start().await;
    system.store(HOSTILE).await;
    let get = async |path: &str, accept: &str, mode: &str| {
        let request = system.http.get(format!("{}{path}", system.url));
        let request = request
            .header(ACCEPT, accept)
            .header("sec-fetch-mode", mode);
        request.send().await.unwrap()
    };
    let html = "text/html; charset=utf-8";
    for (accept, mode, content_type) in [
        (BROWSER, "", html),
        (BROWSER, "navigate", html),
        ("*/*", "navigate", html),
        ("*/*", "cors", "application/json"),
        (JAVA, "", "application/json"),
        ("text/html", "", "application/problem+json"),
        ("*/*", "", "application/json"),
        ("", "", "application/json"),
        ("application/json, text/html", "", "application/json"),
        (
            "text/html, application/x-ndjson;q=0.5",
            "",
            "application/x-ndjson",
        ),
        ("text/*", "", "text/plain; charset=utf-8"),
    ] {
        let response = get("/?msg=HELLO", accept, mode).await;
        let given = &response.headers()[CONTENT_TYPE];
        assert_eq!(given, content_type, "{accept} {mode}");
    }
    let mut transferred = 0;
    for path in [
        "/",
        "/console",
        "/console/console.css",
        "/console/console.js",
    ] {
        let response = get(path, BROWSER, "navigate").await;
        assert_eq!(response.status(), 200);
        let headers = response.headers();
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(
            headers["content-security-policy"],
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
             connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        );
        let body = response.text().await.unwrap();
        assert!(
            !body.contains("style=") && !body.contains("onerror=\""),
            "{path}"
        );
        transferred += body.len();
    }
    assert!(transferred < 100 * 1024, "{transferred}");
    let page = get("/console", BROWSER, "navigate")
        .await
        .text()
        .await
        .unwrap();
    assert!(
        !page.contains('\u{202e}') && page.contains("\\u{202e}"),
        "{page}"
    );
    // Each GET of `/` counts as one of the log, those of the console do not.
    let stats: Value = system.get("/stats").await.json().await.unwrap();
    assert_eq!(stats["facade"]["gets"], 12);
}

/// The page's form posts to `/`.
#[tokio::test]
async fn console_takes_no_posts() {
    let system = System::start().await;
    let page = system.get("/console").await.text().await.unwrap();
    assert!(page.contains("method=\"post\" action=\"/\""), "{page}");
    for content_type in ["application/x-www-form-urlencoded", "application/x-ndjson"] {
        let post = system.http.post(format!("{}/console", system.url));
        let post = post.header(CONTENT_TYPE, content_type).body("msg=a");
        let refused = post.send().await.unwrap();
        assert_eq!(refused.headers()["allow"], "GET,HEAD");
        problem(refused, 405).await;
    }
    assert_eq!(system.read("").await.count, 0);
}
