//! Messages that an instance does not store at the first try: their outcome, and the answer to the caller.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::entry::Outcome;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::system::{Server, System, hanging, logging_stub, nobody, problem};

fn system_of(logging: Vec<Server>) -> System {
    System::with_stubs(logging, nobody(), &["--deadline", "300ms"])
}

/// The second try begins beside the first, which has no answer and whose timeout is far away.
#[tokio::test]
async fn message_that_an_instance_does_not_answer_is_stored_by_another() {
    let storing = logging_stub(|_| Outcome::Stored);
    let name = storing.address.clone();
    let flags = ["--try-timeout", "1h", "--deadline", "3s"];
    let system = System::with_stubs(vec![hanging(), storing], nobody(), &flags);
    // Each goes to the instance that hangs with a chance of one half.
    let posts = (0..20).map(|_| system.post().body("a").send());
    for answer in join_all(posts).await {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["x-logging-instance"], name.as_str());
    }
}

#[tokio::test]
async fn refused_message_is_a_503_that_was_not_stored() {
    let system = system_of(vec![logging_stub(|_| Outcome::refused("no room"))]);
    let response = system.post().body("a").send().await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    let answer = problem(response, 503).await;
    assert_eq!(answer["stored"], "no");
    assert!(answer["detail"].as_str().unwrap().contains("no room"));
    assert!(Uuid::try_parse(answer["uuid"].as_str().unwrap()).is_ok());
}

/// A third of the partitions has no primary: messages go to the others. This is not overload, so it does
/// not use the retry budget.
#[tokio::test]
async fn message_goes_to_another_partition_when_its_own_is_down() {
    let is_down = |uuid: Uuid| uuid.as_u128().is_multiple_of(3);
    let logging = logging_stub(move |entry| {
        if is_down(entry.uuid) {
            Outcome::partition_down("no primary")
        } else {
            Outcome::Stored
        }
    });
    let system = System::with_stubs(vec![logging], nobody(), &[]);
    let posts = stream::iter(0..3000).map(|n| system.post().body(n.to_string()).send());
    let answers: Vec<_> = posts.buffer_unordered(64).collect().await;
    for answer in answers {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 200);
        let stored: Value = answer.json().await.unwrap();
        assert!(!is_down(stored["uuid"].as_str().unwrap().parse().unwrap()));
    }
}

/// A message under a caller's key, or one that may already be stored, cannot go to another partition.
#[tokio::test]
async fn message_stays_in_its_partition_when_it_must() {
    let system = system_of(vec![logging_stub(|_| {
        Outcome::partition_down("no primary")
    })]);
    let key = Uuid::now_v7().to_string();
    let with_key = system.post().header("idempotency-key", &key).body("a");
    let answer = problem(with_key.send().await.unwrap(), 503).await;
    assert_eq!(
        (&answer["uuid"], &answer["stored"]),
        (&json!(key), &json!("no"))
    );

    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let list = seen.clone();
    let system = system_of(vec![logging_stub(move |entry| {
        let mut list = list.lock().unwrap();
        list.push(entry.uuid);
        match list.len() {
            1 => Outcome::unknown("the primary died"),
            _ => Outcome::partition_down("no primary"),
        }
    })]);
    let response = system.post().body("a").send().await.unwrap();
    assert_eq!(problem(response, 503).await["stored"], "unknown");
    let seen = seen.lock().unwrap();
    assert!(
        seen.len() > 1 && seen.iter().all(|uuid| *uuid == seen[0]),
        "{seen:?}"
    );
}

#[tokio::test]
async fn message_of_unknown_outcome_is_a_503_with_the_uuid_for_a_retry() {
    let system = system_of(vec![logging_stub(|_| Outcome::unknown("lost"))]);
    let response = system.post().body("a").send().await.unwrap();
    assert!(response.headers().contains_key("retry-after"));
    let answer = problem(response, 503).await;
    assert_eq!(answer["stored"], "unknown");
    let uuid = answer["uuid"].as_str().unwrap();
    let key = Uuid::now_v7().to_string();
    let with_key = system.post().header("idempotency-key", &key).body("a");
    let answer = problem(with_key.send().await.unwrap(), 503).await;
    assert_eq!(answer["uuid"], key);
    assert_ne!(uuid, key);
}

#[tokio::test]
async fn own_uuid_is_kept_after_an_unknown_try_and_never_shown_as_duplicate() {
    let tries = Arc::new(AtomicUsize::new(0));
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (count, list) = (tries.clone(), seen.clone());
    let system = system_of(vec![logging_stub(move |entry| {
        list.lock().unwrap().push(entry.uuid);
        match count.fetch_add(1, Ordering::Relaxed) {
            0 => Outcome::refused("certainly not executed"),
            1 => Outcome::unknown("perhaps executed"),
            2 => Outcome::refused("this try was not executed"),
            _ => Outcome::Duplicate,
        }
    })]);
    let response = system.post().body("a").send().await.unwrap();
    assert_eq!(response.status(), 200);
    let answer: Value = response.json().await.unwrap();
    let seen = seen.lock().unwrap().clone();
    assert_ne!(seen[0], seen[1], "a refused message gets a new UUID");
    assert_eq!(
        [seen[1], seen[1]],
        [seen[2], seen[3]],
        "a message of unknown outcome keeps its UUID"
    );
    assert_eq!(answer, json!({"uuid": seen[3], "msg": "a"}));
}
