//! The load of `bench/follow.sh`: followers of the log, and messages at a steady rate. Prints how long
//! the POSTs took, and how long after the answer each message was delivered to each follower.
//! Usage: followers URL FOLLOWERS MESSAGES_PER_SECOND SECONDS

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use reqwest::Client;
use serde_json::Value;
use tokio::task::JoinSet;
use uuid::Uuid;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, followers, rate, seconds] = &arguments[..] else {
        anyhow::bail!("usage: followers URL FOLLOWERS MESSAGES_PER_SECOND SECONDS");
    };
    let (rate, seconds): (u32, u32) = (rate.parse()?, seconds.parse()?);
    let count = rate * seconds;
    let http = Client::builder().no_proxy().build()?;
    let mut following = JoinSet::new();
    for _ in 0..followers.parse()? {
        let request = http.get(format!("{url}/?tail=0"));
        let response = request.header("accept", "text/event-stream").send();
        let response = response.await?.error_for_status()?;
        following.spawn(follow(response, count));
    }
    let mut posts = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    for n in 0..count {
        ticks.tick().await;
        let post = http.post(url).body(format!("message number {n}"));
        posts.spawn(async move {
            let begin = Instant::now();
            let answer: Value = post.send().await?.error_for_status()?.json().await?;
            let uuid: Uuid = serde_json::from_value(answer["uuid"].clone())?;
            anyhow::Ok((uuid, begin, Instant::now()))
        });
    }
    let posted = posts.join_all().await;
    let posted: Vec<(Uuid, Instant, Instant)> = posted.into_iter().collect::<Result<_, _>>()?;
    let took = posted.iter().map(|(_, begin, end)| *end - *begin).collect();
    let answered: HashMap<Uuid, Instant> =
        posted.into_iter().map(|post| (post.0, post.2)).collect();
    let mut delays = Vec::new();
    for delivered in following.join_all().await {
        let delivered = delivered?;
        ensure!(
            delivered.len() == answered.len(),
            "messages came twice or never"
        );
        for (uuid, at) in delivered {
            let answered = answered.get(&uuid).context("it was not posted here")?;
            delays.push(at.saturating_duration_since(*answered));
        }
    }
    println!(
        "| {followers} | {rate} | {} | {} |",
        percentiles(took),
        percentiles(delays)
    );
    Ok(())
}

/// The median, the 99th percentile and the longest, in milliseconds, as cells of a table.
fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let percentile = |percent: usize| {
        let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        let time = times.get(index);
        time.map_or("".to_owned(), |time| {
            format!("{:.1}", time.as_secs_f64() * 1000.0)
        })
    };
    [50, 99, 100].map(percentile).join(" | ")
}

/// When each of the next `count` messages was delivered.
async fn follow(
    mut response: reqwest::Response,
    count: u32,
) -> anyhow::Result<HashMap<Uuid, Instant>> {
    const DATA: &str = "data: {\"uuid\":\"";
    let mut delivered = HashMap::new();
    let mut read = String::new();
    while delivered.len() < count as usize {
        let piece = response.chunk().await?.context("a follower was cut")?;
        read += std::str::from_utf8(&piece)?;
        while let Some((event, rest)) = read.split_once("\n\n") {
            if let Some(at) = event.find(DATA) {
                let uuid = &event[at + DATA.len()..][..36];
                delivered.insert(uuid.parse()?, Instant::now());
            }
            read = rest.to_owned();
        }
    }
    Ok(delivered)
}
