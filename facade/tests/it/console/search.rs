//! The search of the page, with and without JavaScript, and as plain HTTP.

use reqwest::header::ACCEPT;
use serde_json::json;
use thirtyfour::prelude::*;

use super::browser::{Settings, complaints, in_browser, value, wait_for};
use super::{BROWSER, open, open_live, upload};
use crate::processes::Processes;
use crate::system::System;

/// The texts of the matches that the page shows.
const MATCHES: &str = "[...document.querySelectorAll('#found .msg')].map((one) => one.textContent)";
pub(super) const SUMMARY: &str = "document.getElementById('found-status')?.textContent ?? null";

/// Searches by the keyboard alone: the text and Enter, the order, and on from where the search ended.
#[tokio::test(flavor = "multi_thread")]
async fn search_shows_matches_with_and_without_scripts() {
    let system = Processes::start();
    // 45 of them end in 7, from `message 7` to `message 447`.
    upload(&system, 450).await;
    for is_without_scripts in [false, true] {
        let settings = Settings {
            is_without_scripts,
            ..Settings::default()
        };
        in_browser(settings, async |browser| {
            if is_without_scripts {
                open(browser, &system).await;
            } else {
                open_live(browser, &system).await;
            }
            let field = browser.find(By::Id("contains")).await.unwrap();
            field.send_keys("7" + Key::Enter).await.unwrap();
            // 447 to 387 in tens, 379 to 370, 367, 357, 347.
            let summary = "Matches: 20. Messages scanned: 103. There are more to search.";
            wait_for(browser, SUMMARY, |now| now == summary).await;
            let newest = value(browser, MATCHES).await;
            assert_eq!(newest.as_array().unwrap().len(), 20);
            assert_eq!(
                (&newest[0], &newest[1]),
                (&json!("message 447"), &json!("message 437"))
            );
            assert_eq!(
                value(browser, "document.querySelector('#contains').value").await,
                "7"
            );
            let path = "location.pathname + location.search";
            assert_eq!(value(browser, path).await, "/console?contains=7&order=desc");

            let order = browser.find(By::Id("order")).await.unwrap();
            order.send_keys("Oldest").await.unwrap();
            let field = browser.find(By::Id("contains")).await.unwrap();
            field.clear().await.unwrap();
            field.send_keys("message 44" + Key::Enter).await.unwrap();
            let summary = "Matches: 11. Messages scanned: 450. That is all.";
            wait_for(browser, SUMMARY, |now| now == summary).await;
            let first: Vec<String> = std::iter::once(44)
                .chain(440..450)
                .map(|n| format!("message {n}"))
                .collect();
            assert_eq!(value(browser, MATCHES).await, json!(first));
            let on = "document.getElementById('search-on').hidden";
            assert_eq!(value(browser, on).await, true);
        })
        .await;
    }
}

/// `Search on` continues behind the last match; with scripts it adds to the matches, without it
/// shows the next ones.
#[tokio::test(flavor = "multi_thread")]
async fn search_goes_on_to_the_end() {
    let system = Processes::start();
    upload(&system, 50).await;
    for (is_without_scripts, expected) in [
        (
            false,
            [
                "Matches: 40. Messages scanned: 40. There are more to search.",
                "Matches: 50. Messages scanned: 50. That is all.",
            ],
        ),
        (
            true,
            [
                "Matches: 20. Messages scanned: 20. There are more to search.",
                "Matches: 10. Messages scanned: 10. That is all.",
            ],
        ),
    ] {
        let settings = Settings {
            is_without_scripts,
            ..Settings::default()
        };
        in_browser(settings, async |browser| {
            // What the server has rendered is continued by either.
            let url = format!("{}/console?contains=message&order=asc", system.facade.url());
            browser.goto(url).await.unwrap();
            let begun = "Matches: 20. Messages scanned: 20. There are more to search.";
            wait_for(browser, SUMMARY, |now| now == begun).await;
            let mut shown = value(browser, MATCHES).await;
            let mut all = shown.as_array().unwrap().clone();
            for expected in expected {
                let button = browser.find(By::Css("#search-on button")).await.unwrap();
                button.send_keys(Key::Enter).await.unwrap();
                // The next page may have the same summary.
                let found = format!("[{SUMMARY}, {MATCHES}]");
                let before = shown;
                let now = wait_for(browser, &found, |now| {
                    now[0] == expected && now[1] != before
                });
                shown = now.await[1].clone();
                if is_without_scripts {
                    all.extend(shown.as_array().unwrap().clone());
                } else {
                    all.clone_from(shown.as_array().unwrap());
                }
            }
            let posted: Vec<String> = (0..50).map(|n| format!("message {n}")).collect();
            assert_eq!(json!(all), json!(posted));
            if !is_without_scripts {
                let focused = value(browser, "document.activeElement.id").await;
                assert_eq!(focused, "found-list");
                assert_eq!(complaints(browser).await, Vec::<String>::new());
            }
        })
        .await;
    }
}

/// As plain HTTP: the bounds of a search hold on the page, and what is wrong with one is said there.
#[tokio::test]
async fn search_of_the_page_is_that_of_the_api() {
    let system = System::start().await;
    let mut uuids = Vec::new();
    for n in 0..25 {
        uuids.push(system.store(&format!("<b>{n}</b>")).await);
    }
    let page = async |path: &str, status: u16| {
        let request = system.http.get(format!("{}{path}", system.url));
        let response = request.header(ACCEPT, BROWSER).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}");
        response.text().await.unwrap()
    };
    let bounds = format!("after={}&before={}", uuids[1], uuids[24]);
    for path in ["/", "/console"] {
        let asked = format!("{path}?contains=%3Cb%3E&order=desc&{bounds}");
        let html = page(&asked, 200).await;
        let shown = html.split("id=\"found\"").nth(1).unwrap();
        assert!(shown.contains("&#60;b&#62;4&#60;/b&#62;"), "{shown}");
        assert!(!shown.contains("<b>"), "{shown}");
        assert!(html.contains("value=\"&#60;b&#62;\" required"), "{html}");
        assert!(
            html.contains("Matches: 20. Messages scanned: 20. There are more"),
            "{html}"
        );
        for (name, index) in [("after", 1), ("before", 4)] {
            let field = format!("name=\"{name}\" value=\"{}\"", uuids[index]);
            assert!(html.contains(&field), "{field} in {html}");
        }
    }
    for (query, detail) in [
        ("contains=", "write a text of 1 to 256 bytes"),
        ("contains=%FF", "contains is not UTF-8"),
        ("contains=a&order=up", "order"),
    ] {
        let html = page(&format!("/console?{query}"), 400).await;
        let after = html.split("Not searched:</strong>").nth(1).unwrap();
        assert!(
            after.split("</p>").next().unwrap().contains(detail),
            "{after}"
        );
    }
    let nothing = page("/console?contains=B&order=asc", 200).await;
    assert!(
        nothing.contains("Matches: 0. Messages scanned: 25. That is all."),
        "{nothing}"
    );
    assert!(
        nothing.contains("<option value=\"asc\" selected>"),
        "{nothing}"
    );
    assert!(
        nothing.contains("id=\"search-on\" action=\"/console\" hidden"),
        "{nothing}"
    );
}
