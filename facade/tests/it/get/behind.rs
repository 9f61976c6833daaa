//! GET when the services behind the facade are away, hang, or contradict themselves.

use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use axum::Router;
use axum::body::Body;
use axum::extract::Query;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use common::api::{READ_SETTLED, ReadQuery};
use futures_util::{StreamExt, stream};
use tokio::sync::{Notify, mpsc};
use uuid::Uuid;

use super::{logging_of, text};
use crate::system::{Server, System, nobody, problem, serve, serve_instance};

#[tokio::test]
async fn entries_are_returned_when_the_messages_service_is_away() {
    let away = serve(Router::new().fallback(StatusCode::INTERNAL_SERVER_ERROR));
    let system = System::with_stubs(vec![logging_of(3)], away, &[]);
    let read = system.read("").await;
    assert_eq!((read.count, read.messages_service), (3, None));
    assert!(
        read.messages_service_error
            .unwrap()
            .contains("messages service")
    );
    let ndjson = text(&system, "/", "application/x-ndjson").await;
    assert!(ndjson.contains("{\"messages_service\":null,\"messages_service_error\":\""));
    let plain = text(&system, "/", "text/plain").await;
    assert!(
        plain.contains("3 messages\nthe messages service "),
        "{plain}"
    );
}

#[tokio::test]
async fn hanging_messages_service_delays_only_the_tail() {
    let answer = Arc::new(Notify::new());
    let waiting = answer.clone();
    let reply = async move || {
        waiting.notified().await;
        "at last"
    };
    let slow = serve(Router::new().route("/", get(reply)));
    let flags = ["--messages-timeout", "30s"];
    let system = System::with_stubs(vec![logging_of(3)], slow, &flags);
    let mut body = system.get("/").await.bytes_stream();
    let mut read = String::new();
    while read.lines().count() < 4 {
        let chunk = body.next().await.unwrap().unwrap();
        read += std::str::from_utf8(&chunk).unwrap();
    }
    assert!(!read.contains("messages_service"));
    answer.notify_one();
    while let Some(chunk) = body.next().await {
        read += std::str::from_utf8(&chunk.unwrap()).unwrap();
    }
    assert!(
        read.ends_with("],\"messages_service\":\"at last\",\"count\":3}\n"),
        "{read}"
    );
}

#[tokio::test]
async fn messages_service_that_never_answers_is_named_in_time() {
    let hanging = serve(Router::new().route("/", get(std::future::pending::<()>)));
    let flags = ["--messages-timeout", "100ms"];
    let system = System::with_stubs(vec![logging_of(1)], hanging, &flags);
    let read = system.read("").await;
    assert_eq!(
        read.messages_service_error.unwrap(),
        "the messages service did not answer in time"
    );
}

#[tokio::test]
async fn no_logging_instance_is_a_503() {
    let not_ready = serve_instance(Router::new().fallback(StatusCode::SERVICE_UNAVAILABLE));
    for logging in [vec![not_ready], vec![nobody(), nobody()]] {
        let system = System::with_stubs(logging, nobody(), &["--read-deadline", "200ms"]);
        let response = system.get("/").await;
        assert!(response.headers().contains_key("retry-after"));
        problem(response, 503).await;
        problem(system.get(&format!("/{}", Uuid::now_v7())).await, 503).await;
    }
}

/// During a failover the instances answer that the map cannot be read, and GETs wait. When the instances
/// are overloaded or away, GETs do not wait.
#[tokio::test]
async fn get_waits_while_the_map_cannot_be_read() {
    let refusals = Arc::new(AtomicUsize::new(3));
    let answer = |refusals: Arc<AtomicUsize>, body: String| async move {
        let left = refusals.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        match left {
            Ok(_) => Err(StatusCode::SERVICE_UNAVAILABLE),
            Err(_) => Ok(body),
        }
    };
    let (for_page, for_entry) = (refusals.clone(), refusals.clone());
    let page = move || answer(for_page.clone(), format!("{FIRST_LINE}\n{{\"count\":1}}\n"));
    let entry = move || answer(for_entry.clone(), FIRST_LINE.to_owned());
    let failing_over = Router::new()
        .route("/", get(page))
        .route("/{uuid}", get(entry));
    let system = System::with_stubs(vec![serve_instance(failing_over), nobody()], nobody(), &[]);
    assert_eq!(system.read("").await.count, 1);
    assert_eq!(refusals.swap(3, Relaxed), 0);
    let uuid = "01890000-0000-7000-8000-000000000001";
    assert_eq!(system.get(&format!("/{uuid}")).await.status(), 200);
    assert_eq!(refusals.load(Relaxed), 0);

    let reads = Arc::new(AtomicUsize::new(0));
    let count = reads.clone();
    let busy = async move || {
        count.fetch_add(1, Relaxed);
        StatusCode::TOO_MANY_REQUESTS
    };
    let busy = serve_instance(Router::new().route("/", get(busy)));
    let system = System::with_stubs(vec![busy], nobody(), &[]);
    problem(system.get("/").await, 503).await;
    assert_eq!(reads.load(Relaxed), 1);
}

/// A logging service with one of these responses for each read, and errors after the last.
fn logging_script(answers: &[&str]) -> Server {
    let answers: VecDeque<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
    let answers = Arc::new(Mutex::new(answers));
    let answer = async move || {
        let next = answers.lock().unwrap().pop_front();
        next.ok_or(StatusCode::SERVICE_UNAVAILABLE)
    };
    serve_instance(Router::new().route("/", get(answer)))
}

const FIRST_LINE: &str = r#"{"uuid":"01890000-0000-7000-8000-000000000001","msg":"a"}"#;
const SECOND_LINE: &str = r#"{"uuid":"01890000-0000-7000-8000-000000000002","msg":"b"}"#;

/// A search that finds nothing, and a follower's `tail`, get their head with the instance's first line. When
/// their clients leave, the facade leaves the instance, which ends its work too.
#[tokio::test]
async fn client_that_leaves_ends_the_work_for_it() {
    let (ended, mut has_ended) = mpsc::unbounded_channel();
    let stream = async move |Query(query): Query<ReadQuery>| {
        if query.poll.is_some() {
            let settled = "01890000-0000-7000-8000-000000000002";
            return ([(READ_SETTLED, settled)], "{\"count\":0}\n").into_response();
        }
        let tell = Tell(ended.clone());
        let line = stream::iter([Ok::<_, std::io::Error>(format!("{FIRST_LINE}\n"))]);
        let silence = stream::poll_fn(move |_| {
            let _held_by_the_body = &tell;
            Poll::Pending
        });
        Body::from_stream(line.chain(silence)).into_response()
    };
    let logging = serve_instance(Router::new().route("/", get(stream)));
    let flags = ["--max-reads", "1", "--try-timeout", "1h"];
    let system = System::with_stubs(vec![logging], nobody(), &flags);
    for path in ["/?contains=b", "/?contains=b", "/?follow=true&tail=5"] {
        let request = system.http.get(format!("{}{path}", system.url));
        let request = request.header("accept", "application/x-ndjson");
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        if path.contains("contains") {
            problem(system.get("/").await, 503).await;
        }
        drop(answer);
        has_ended.recv().await.unwrap();
    }
}

struct Tell(mpsc::UnboundedSender<()>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _nobody_may_listen = self.0.send(());
    }
}

/// When no instance can continue a stream, the body is aborted and never ended properly.
#[tokio::test]
async fn body_that_cannot_be_finished_is_aborted() {
    let handed_over = format!("{FIRST_LINE}\n{{\"count\":1,\"go_on_elsewhere\":\"I stop\"}}\n");
    let logging = logging_script(&[&handed_over]);
    let messages = serve(messages::router(Default::default()));
    let system = System::with_stubs(vec![logging], messages, &["--read-deadline", "200ms"]);
    let mut body = system.get("/").await.bytes_stream();
    let mut read = Vec::new();
    while let Some(chunk) = body.next().await {
        match chunk {
            Ok(chunk) => read.extend_from_slice(&chunk),
            Err(_) => return assert!(read.ends_with(FIRST_LINE.as_bytes())),
        }
    }
    panic!("it ended politely");
}

#[tokio::test]
async fn stream_that_contradicts_itself_is_not_passed_on() {
    let line_with_more = FIRST_LINE.replace('}', ",\"inner\":1}");
    let streams = [
        format!("{FIRST_LINE}\n{SECOND_LINE}\n{{\"count\":3}}\n"),
        format!("{SECOND_LINE}\n{FIRST_LINE}\n{{\"count\":2}}\n"),
        format!("{FIRST_LINE}\n{FIRST_LINE}\n{{\"count\":2}}\n"),
        format!("{line_with_more}\n{{\"count\":1}}\n"),
        FIRST_LINE.to_owned(),
        "nonsense\n{\"count\":1}\n".to_owned(),
        format!(
            "{}\n{{\"count\":1}}\n",
            FIRST_LINE.replace("\"a\"", "\"\u{202e}\"")
        ),
        String::new(),
    ];
    for stream in streams {
        let messages = serve(messages::router(Default::default()));
        let system = System::with_stubs(vec![logging_script(&[&stream])], messages, &[]);
        problem(system.get("/").await, 503).await;
    }
}

/// An instance that gives another entry than it was asked for is not believed.
#[tokio::test]
async fn entry_that_was_not_asked_for_is_not_passed_on() {
    let routes = Router::new().route("/{uuid}", get(FIRST_LINE));
    let system = System::with_stubs(vec![serve_instance(routes)], nobody(), &[]);
    for (last_digit, status) in [(1, 200), (2, 503)] {
        let path = format!("/01890000-0000-7000-8000-00000000000{last_digit}");
        assert_eq!(system.get(&path).await.status(), status);
    }
}
