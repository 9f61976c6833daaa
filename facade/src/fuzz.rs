//! What callers and instances send, with anything in it: it is taken whole or refused, and breaks nothing.

use std::time::{Duration, SystemTime};

use axum::body::Body;
use axum::http::Uri;
use bytes::Bytes;
use common::bounds::Bounds;
use futures_util::{StreamExt, stream};
use proptest::collection::vec;
use proptest::prelude::*;
use testing::fuzz::{in_pieces, near};
use tokio::runtime::{Builder, Runtime};

use crate::entry_stream::{EntryStream, Part};
use crate::get::ListQuery;
use crate::message::{BodyFormat, message, multipart_message};
use crate::upload::{Content, parse_line, read_lines};

const MAX_MESSAGE: usize = 100;

const BODIES: &[&[u8]] = &[
    b"msg=hello",
    b"msg=1%2B1%3D2+%26+more",
    b"hello",
    b"\"hello\"",
    b"{\"msg\":\"1+1=2 & more\"}",
    b"{\"msg\":\"\\ud83e\\udd80 \\u0000\"}",
    "\u{1f980} \u{202e}".as_bytes(),
];

const MULTIPART: &[&[u8]] = &[
    b"--b\r\nContent-Disposition: form-data; name=\"msg\"\r\n\r\nhello\r\n--b--\r\n",
    b"--b\r\nContent-Disposition: form-data; name=\"msg\"\r\nContent-Type: text/plain; charset=utf-8\r\n\r\na\r\n--b--",
];

const UPLOADS: &[&[u8]] = &[
    b"\"one\"\n{\"msg\":\"two\"}\n{\"msg\":\"three\",\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\"}",
    b"\"one\"\r\n\n\"a longer line than the limit of this test allows\"\n",
];

const STREAMS: &[&[u8]] = &[
    b"{\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\",\"msg\":\"hello\"}\n\
      {\"uuid\":\"01a203b3-3bd3-7041-bd9b-405a081b6b3b\",\"msg\":\"still here\"}\n\
      {\"count\":2}\n",
    b"{\"count\":0}\n",
    b"{\"uuid\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\",\"msg\":\"a\"}\n\
      {\"count\":1,\"next\":\"01a203b3-3bb1-7319-90b9-a08e864b5eeb\"}\n",
];

const QUERIES: &[&[u8]] = &[
    b"after=01a203b3-3bb1-7319-90b9-a08e864b5eeb&before=01a203b3-3bd3-7041-bd9b-405a081b6b3b&limit=10&order=desc",
    b"since=2026-11-24T20:00:00Z&until=10m&tail=5&follow=true",
    b"since=99999999999999d&contains=%F0%9F%A6%80&order=asc",
];

fn runtime() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_time().build().expect("a runtime")
}

/// The lines of an upload in these pieces; `None` for one that is too long.
async fn lines_of(pieces: Vec<Vec<u8>>, limit: usize) -> Vec<Option<Box<[u8]>>> {
    let body = Body::from_stream(stream::iter(
        pieces.into_iter().map(Ok::<_, std::io::Error>),
    ));
    let lines = read_lines(body, limit, Duration::from_secs(60), std::future::pending());
    let contents = lines.map(|line| match line.content {
        Content::Text(text) => Some(text),
        Content::TooLong => None,
        Content::Broken(problem) => panic!("{}", problem.detail()),
    });
    contents.collect().await
}

proptest! {
    #[test]
    fn body_is_a_whole_message_or_refused(body in near(BODIES)) {
        for format in [BodyFormat::Untyped, BodyFormat::Form, BodyFormat::Json, BodyFormat::Text] {
            if let Ok(msg) = message(format, Bytes::from(body.clone()), MAX_MESSAGE) {
                prop_assert!(!msg.is_empty() && msg.len() <= MAX_MESSAGE);
                if format == BodyFormat::Text {
                    prop_assert_eq!(msg.as_bytes(), &body);
                }
            }
        }
    }

    #[test]
    fn multipart_body_is_a_message_or_refused(body in near(MULTIPART)) {
        if let Ok(msg) = multipart_message(Bytes::from(body.clone()), "b", MAX_MESSAGE) {
            prop_assert!(!msg.is_empty() && msg.len() <= MAX_MESSAGE);
            let end = format!("\r\n\r\n{msg}\r\n--b--");
            let body = String::from_utf8(body).expect("the message is a part of it");
            prop_assert!(body.trim_ascii_end().ends_with(&end), "{body:?} became {msg:?}");
        }
    }

    #[test]
    fn lines_of_an_upload_do_not_depend_on_its_pieces(
        body in near(UPLOADS),
        lengths in vec(1_usize..40, 1..6),
    ) {
        let limit = 40;
        let (whole, pieces) = runtime().block_on(async {
            let whole = lines_of(vec![body.clone()], limit).await;
            (whole, lines_of(in_pieces(&body, &lengths), limit).await)
        });
        prop_assert_eq!(&whole, &pieces);
        for line in whole.into_iter().flatten() {
            prop_assert!(line.len() <= limit);
            if let Ok((msg, _)) = parse_line(&line, MAX_MESSAGE) {
                prop_assert!(!msg.is_empty() && msg.len() <= MAX_MESSAGE);
            }
        }
    }

    /// What a stream yields are whole lines in order, and its end proves their number.
    #[test]
    fn stream_is_checked_wherever_it_is_cut(
        bytes in near(STREAMS),
        lengths in vec(1_usize..60, 1..6),
    ) {
        let pieces = in_pieces(&bytes, &lengths).into_iter().map(|piece| Ok(Bytes::from(piece)));
        let mut stream = EntryStream::new(stream::iter(pieces).boxed(), Bounds::default(), None);
        let (mut passed, mut count) = (Vec::new(), 0);
        let is_complete = runtime().block_on(async {
            loop {
                match stream.next().await {
                    Ok(Part::Entries(lines, number)) => {
                        passed.extend_from_slice(&lines);
                        count += number;
                    }
                    Ok(Part::Fragment(fragment)) => panic!("{fragment:?}"),
                    Ok(Part::End(_)) => return true,
                    Err(_) => return false,
                }
            }
        });
        prop_assert!(bytes.starts_with(&passed));
        let lines = passed.iter().filter(|byte| **byte == b'\n').count();
        prop_assert_eq!(lines as u64, count);
        if is_complete {
            let end = String::from_utf8_lossy(&bytes[passed.len()..]).into_owned();
            prop_assert!(end.contains(&count.to_string()), "{}", end);
        }
    }

    #[test]
    fn query_is_read_or_refused(query in near(QUERIES)) {
        let uri = [b"/?", &query[..]].concat();
        if let Ok(uri) = Uri::try_from(uri)
            && let Ok(query) = ListQuery::parse(&uri)
        {
            let _ = query.bounds(SystemTime::now());
        }
    }
}
