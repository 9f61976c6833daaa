//! Searches: `contains=TEXT`.

use std::io::Write;
use std::process::{Command, Stdio};

use common::api::write_entry;
use common::entry::Entry;
use futures_util::StreamExt;
use reqwest::Url;
use testing::engine::EmptyMap;
use uuid::Builder;

use crate::processes::{Processes, binary};
use crate::system::{Merged, System, engine_under_test, problem};

const NDJSON: &str = "application/x-ndjson";
const REPLY: &str = "Messages Service not Implemented";

/// The path and query of a search.
fn search(text: &str, more: &str) -> String {
    let url = Url::parse_with_params("http://h/", [("contains", text)]).unwrap();
    format!("/?{}{more}", url.query().unwrap())
}

async fn found(system: &System, text: &str, more: &str) -> Vec<String> {
    let query = search(text, more);
    let read = system.read(query.trim_start_matches('/')).await;
    read.logging_service
        .into_iter()
        .map(|entry| entry.msg)
        .collect()
}

async fn body(system: &System, path: &str, accept: &str) -> String {
    let request = system.http.get(format!("{}{path}", system.url));
    let response = request.header("accept", accept).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.text().await.unwrap()
}

#[tokio::test]
async fn matches_come_in_each_format_with_the_number_scanned() {
    let system = System::start().await;
    let mut uuids = Vec::new();
    for msg in ["one fish", "two", "red fish", "Fish"] {
        uuids.push(system.store(msg).await);
    }
    let line =
        |index: usize, msg: &str| format!("{{\"uuid\":\"{}\",\"msg\":\"{msg}\"}}", uuids[index]);
    let (first, second) = (line(0, "one fish"), line(2, "red fish"));
    let tail = format!("\"messages_service\":\"{REPLY}\",\"count\":2,\"scanned\":4");
    let all = search("fish", "");
    assert_eq!(
        body(&system, &all, "*/*").await,
        format!("{{\"logging_service\":[\n{first},\n{second}\n],{tail}}}\n")
    );
    assert_eq!(
        body(&system, &all, NDJSON).await,
        format!("{first}\n{second}\n{{{tail}}}\n")
    );
    let [one, _, red, _] = uuids[..] else {
        unreachable!()
    };
    assert_eq!(
        body(&system, &all, "text/plain").await,
        format!("{one} one fish\n{red} red fish\n2 messages of 4 scanned\n{REPLY}\n")
    );
    assert_eq!(
        body(&system, &search("fish", "&limit=1"), "text/plain").await,
        format!("{one} one fish\n1 messages of 1 scanned, next {one}\n{REPLY}\n")
    );
    let nothing = search("whale", "");
    let tail = format!("\"messages_service\":\"{REPLY}\",\"count\":0,\"scanned\":4");
    assert_eq!(
        body(&system, &nothing, "*/*").await,
        format!("{{\"logging_service\":[\n],{tail}}}\n")
    );
    assert_eq!(
        body(&system, &nothing, NDJSON).await,
        format!("{{{tail}}}\n")
    );
    assert!(!body(&system, "/", NDJSON).await.contains("scanned"));
}

/// The text is compared with the message, not with the escapes of its JSON.
#[tokio::test]
async fn text_is_found_as_it_was_posted() {
    const MSG: &str = "say \"hi\"\\n\n\t\u{0}\u{1}\u{7f}\u{202e}é e\u{301} 🦀 1+1=2 & 100% </b>";
    let system = System::start().await;
    system.store("something else: n, u0001, \\u").await;
    system.store(MSG).await;
    for text in [
        "\"",
        "\"hi\"",
        "\\n\n",
        "\n\t",
        "\u{0}",
        "\u{0}\u{1}\u{7f}",
        "\u{202e}",
        "é",
        "e\u{301}",
        "🦀",
        "1+1=2 & 100% </b>",
        " ",
        MSG,
    ] {
        assert!(
            found(&system, text, "").await.contains(&MSG.to_owned()),
            "{text:?}"
        );
    }
    for text in [
        "\\\"",
        "\\t",
        "\\u0001",
        "\\u{1}",
        "SAY",
        "É",
        "e\u{301}🦀",
        "\u{fffd}",
        "\"}",
        "uuid",
    ] {
        assert_eq!(found(&system, text, "").await, [""; 0], "{text:?}");
    }
    assert_eq!(found(&system, "u0001", "").await.len(), 1);
}

/// A limit that is reached ends the search at the last match; there is a `next` only if an entry follows.
#[tokio::test]
async fn limit_counts_matches() {
    let system = System::start().await;
    let mut uuids = Vec::new();
    for msg in ["a", "b", "a", "b", "a"] {
        uuids.push(system.store(msg).await);
    }
    for (text, order, limit, count, scanned, next) in [
        ("a", "asc", 2, 2, 3, Some(2)),
        ("a", "asc", 3, 3, 5, None),
        ("a", "asc", 9, 3, 5, None),
        ("b", "asc", 2, 2, 4, Some(3)),
        ("b", "desc", 1, 1, 2, Some(3)),
        ("a", "desc", 3, 3, 5, None),
        ("c", "desc", 1, 0, 5, None),
    ] {
        let query = search(text, &format!("&order={order}&limit={limit}"));
        let read = system.read(query.trim_start_matches('/')).await;
        let case = format!("{text} {order} {limit}");
        assert_eq!((read.count, read.scanned), (count, Some(scanned)), "{case}");
        assert_eq!(read.next, next.map(|index| uuids[index]), "{case}");
        assert!(
            read.logging_service.iter().all(|entry| entry.msg == text),
            "{case}"
        );
    }
}

#[tokio::test]
async fn bounds_hold_for_a_search() {
    let system = System::start().await;
    let mut uuids = Vec::new();
    for n in 0..6 {
        uuids.push(
            system
                .store(&format!("{} {n}", ["even", "odd"][n % 2]))
                .await,
        );
    }
    let (second, fifth) = (uuids[1], uuids[4]);
    for (more, expected, scanned) in [
        (format!("&after={second}"), vec!["odd 3", "odd 5"], 4),
        (
            format!("&before={fifth}&order=desc"),
            vec!["odd 3", "odd 1"],
            4,
        ),
        (format!("&after={second}&before={fifth}"), vec!["odd 3"], 2),
        ("&since=1h".to_owned(), vec!["odd 1", "odd 3", "odd 5"], 6),
        ("&until=1h".to_owned(), vec![], 0),
    ] {
        assert_eq!(found(&system, "odd", &more).await, expected, "{more}");
        let query = search("odd", &more);
        let read = system.read(query.trim_start_matches('/')).await;
        assert_eq!(read.scanned, Some(scanned), "{more}");
    }
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let system = System::start().await;
    let too_long = format!("/?contains={}", "%C3%A9".repeat(128) + "x");
    for (path, what) in [
        ("/?contains=", "1 to 256 bytes"),
        ("/?contains", "1 to 256 bytes"),
        (&too_long, "1 to 256 bytes"),
        ("/?contains=a&contains=b", "duplicate field"),
        ("/?contains=%E9", "UTF-8"),
        ("/?contains=a&limit=0", "limit"),
        ("/?contains=a&tail=1", "tail"),
    ] {
        let answer = problem(system.get(path).await, 400).await;
        assert!(
            answer["detail"].as_str().unwrap().contains(what),
            "{path}: {answer}"
        );
    }
    for (path, accept) in [
        ("/?contains=a&follow=true", NDJSON),
        ("/?contains=a", "text/event-stream"),
    ] {
        let request = system.http.get(format!("{}{path}", system.url));
        let response = request.header("accept", accept).send().await.unwrap();
        let answer = problem(response, 400).await;
        assert!(
            answer["detail"]
                .as_str()
                .unwrap()
                .contains("contains cannot"),
            "{answer}"
        );
    }
    let longest = "é".repeat(128);
    system.store(&longest).await;
    assert_eq!(found(&system, &longest, "").await, [longest.as_str()]);
}

const ENTRIES: u64 = 250_000;

/// Messages whose number divides by this match.
const EVERY: u64 = 1000;

/// A log of so many messages with this text in each. They are imported, as posting them takes long on a busy
/// machine.
fn large_log(entries: u64, padding: &str) -> (Processes, EmptyMap) {
    let map = engine_under_test().empty_map();
    let mut import = Command::new(binary("logging"))
        .args(["import", "--map", &map.location])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut export = Vec::new();
    for n in 0..entries {
        let needle = if n % EVERY == 0 { ", a needle" } else { "" };
        let uuid = Builder::from_unix_timestamp_millis(1_700_000_000_000 + n, &[0; 10]);
        let msg = format!("message {n}{padding}{needle}");
        write_entry(&mut export, uuid.into_uuid(), &msg);
    }
    export.extend_from_slice(format!("{{\"count\":{entries}}}\n").as_bytes());
    import.stdin.take().unwrap().write_all(&export).unwrap();
    assert!(import.wait().unwrap().success());
    let system = Processes::on_map(&["--map", &map.location], &[]);
    (system, map)
}

/// All pages of a search, in each of which this limit is the greatest number of matches.
async fn pages(system: &Processes, text: &str, order: &str, limit: Option<usize>) -> Vec<Merged> {
    let cursor = if order == "asc" { "after" } else { "before" };
    let mut pages: Vec<Merged> = Vec::new();
    loop {
        let mut more = format!("&order={order}");
        limit
            .iter()
            .for_each(|limit| more += &format!("&limit={limit}"));
        let next = pages.last().and_then(|page| page.next);
        next.iter()
            .for_each(|next| more += &format!("&{cursor}={next}"));
        let url = format!("{}{}", system.facade.url(), search(text, &more));
        let response = system.http.get(url).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let page: Merged = response.json().await.unwrap();
        let is_last = page.next.is_none();
        pages.push(page);
        if is_last {
            return pages;
        }
    }
}

/// Following `next` until there is none finds every match once, however the pages are cut.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_a_search_hold_every_match_once() {
    let (system, _map) = large_log(ENTRIES, "");
    let mut expected = system.read_all().await;
    expected.retain(|entry| entry.msg.ends_with("a needle"));
    assert_eq!(expected.len() as u64, ENTRIES / EVERY);
    for order in ["asc", "desc"] {
        for (limit, sizes) in [(None, vec![100_000, 100_000, 50_000]), (Some(7), vec![])] {
            let pages = pages(&system, "needle", order, limit).await;
            let found: Vec<&Entry> = pages
                .iter()
                .flat_map(|page| &page.logging_service)
                .collect();
            assert!(
                found == expected.iter().collect::<Vec<_>>(),
                "{order} {limit:?}"
            );
            let scanned: Vec<u64> = pages.iter().filter_map(|page| page.scanned).collect();
            assert_eq!(scanned.iter().sum::<u64>(), ENTRIES, "{order} {limit:?}");
            assert_eq!(scanned.len(), pages.len());
            if limit.is_none() {
                assert_eq!(scanned, sizes, "{order}");
            }
        }
        let pages = pages(&system, "no such text", order, Some(1)).await;
        let scanned: Vec<u64> = pages.iter().filter_map(|page| page.scanned).collect();
        assert_eq!(scanned, [100_000, 100_000, 50_000]);
        expected.reverse();
    }
}

/// Several searches at once lose two of three instances in the middle: their answers are none the worse.
#[tokio::test(flavor = "multi_thread")]
async fn search_loses_nothing_when_instances_die() {
    const SEARCHES: usize = 4;
    let (mut system, _map) = large_log(101_000, &"x".repeat(100));
    let url = format!("{}{}", system.facade.url(), search("1", ""));
    let whole = system.http.get(&url).send().await.unwrap();
    let whole: Merged = whole.json().await.unwrap();
    assert_eq!(whole.scanned, Some(100_000));
    assert!((1..100_000).contains(&whole.count));
    for survivor in 0..3 {
        let mut bodies = Vec::new();
        for _ in 0..SEARCHES {
            let mut chunks = system.http.get(&url).send().await.unwrap().bytes_stream();
            let mut body = Vec::new();
            // More than the head. The answer has 6 MB, more than the sockets take meanwhile.
            while body.len() < 100 * 1024 {
                body.extend_from_slice(&chunks.next().await.unwrap().unwrap());
            }
            bodies.push((chunks, body));
        }
        let victims = || (0..3).filter(|index| *index != survivor);
        victims().for_each(|victim| system.logging[victim].kill());
        for (mut chunks, mut body) in bodies {
            while let Some(chunk) = chunks.next().await {
                body.extend_from_slice(&chunk.unwrap());
            }
            let read: Merged = serde_json::from_slice(&body).unwrap();
            assert!(read.logging_service == whole.logging_service);
            assert_eq!((read.count, read.scanned), (whole.count, whole.scanned));
            assert_eq!(read.next, whole.next);
        }
        victims().for_each(|victim| system.restart_logging(victim));
    }
    let metrics = format!("{}/metrics", system.facade.url());
    let metrics = system.http.get(metrics).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let resumed = metrics
        .lines()
        .find_map(|line| line.strip_prefix("facade_reads_resumed_total "));
    // That none of twelve searches was on a victim is one of half a million cases.
    assert!(resumed.is_some_and(|resumed| resumed != "0"), "{metrics}");
}
