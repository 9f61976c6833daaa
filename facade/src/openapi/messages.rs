//! The operations on messages: POST and GET of `/`, and GET of `/{uuid}`.

use serde_json::json;
use utoipa::openapi::link::LinkBuilder;
use utoipa::openapi::path::{
    HttpMethod, Operation, Parameter, ParameterIn, PathItem, PathItemBuilder,
};
use utoipa::openapi::request_body::{RequestBody, RequestBodyBuilder};
use utoipa::openapi::schema::{
    AdditionalProperties, AnyOfBuilder, KnownFormat, ObjectBuilder, OneOfBuilder, SchemaFormat,
    Type,
};
use utoipa::openapi::{Ref, RefOr, Required, ResponseBuilder};

use super::parts::{
    FAULT, Problems, answer, content, example, get_only, header_of, in_path, operation, parameter,
    query, string, unavailable, unreadable, uuid, with,
};
use super::{FIRST, JSON, NDJSON, SECOND, TEXT};
use crate::format::{Format, accept_one_of};
use crate::get::MAX_TAIL;
use crate::post::{IDEMPOTENCY_KEY, LOGGING_INSTANCE};
use crate::search::{MAX_SCANNED, MAX_TEXT};
use crate::upload::REPLY_FORMATS;

/// `/`, where a message has at most `max_message` bytes.
pub(crate) fn messages(max_message: usize) -> PathItem {
    PathItemBuilder::new()
        .operation(HttpMethod::Get, list())
        .operation(HttpMethod::Post, create(max_message))
        .build()
}

fn create(max_message: usize) -> Operation {
    let post = operation(
        "post",
        "Store a message, or many",
        "A message is stored durably when the answer is a 200, and then every GET that begins later \
         has it. An upload, `application/x-ndjson`, has a message on each line: a JSON string, or an \
         object with `msg` and optionally a `uuid`, which is to a line what `Idempotency-Key` is to \
         a message. Each line is stored or fails by itself.",
    );
    let detail = "the message was not stored, post it again: no logging instance is up: \
                  logging-1 refuses connections";
    let not_stored = with(example(503, detail), json!({"stored": "no"}));
    let too_large =
        format!("a message may have {max_message} bytes at most; split it or raise --max-message");
    post.parameter(idempotency_key())
        .request_body(Some(body(max_message)))
        .response("200", stored())
        .response("207", stored_partly())
        .problem(
            400,
            "The body, or a header, is wrong. Of an upload: no line was stored, each by its own fault.",
            [
                ("empty", "the message is empty"),
                (
                    "no_key",
                    "the idempotency-key must be a version 7 UUID made for this message: \
                     00000000-0000-0000-0000-000000000000 is not a version 7 UUID, whose first 48 \
                     bits are the time",
                ),
                (
                    "key_of_upload",
                    "an upload of many messages takes no idempotency-key; give each line its own uuid",
                ),
            ],
        )
        .problem(
            403,
            "The token may only read, or a browser says that a page of another origin sent it; nothing was \
             done.",
            [],
        )
        .problem(
            406,
            "An upload is answered as JSON or NDJSON.",
            [("text", &accept_one_of(&REPLY_FORMATS))],
        )
        .problem(
            408,
            "The body stalled.",
            [("stalled", "the body stalled; send it without long pauses")],
        )
        .problem(
            409,
            "The key is too old or in the future, and nothing is stored under it.",
            [
                (
                    "too_old",
                    "this key is too old: no POST stored its message and none will; post again with \
                     a new key",
                ),
                (
                    "in_the_future",
                    "this key's time is in the future and nothing was stored: make keys from the \
                     current time, and post again with a new key",
                ),
            ],
        )
        .problem(
            413,
            "The message is too large. A line of an upload that is too large fails alone.",
            [("too_large", &too_large)],
        )
        .problem(
            415,
            "The content type is another one, there are several, the charset is not UTF-8, or the \
             body is compressed.",
            [(
                "html",
                "send a form with the field msg, application/json, text/plain, or \
                 application/x-ndjson for many messages",
            )],
        )
        .problem(
            422,
            "The key was already used for another message.",
            [(
                "used",
                "this key was already used for another message; make a new one for each message",
            )],
        )
        .problem(500, FAULT, [])
        .response(
            "503",
            unavailable(
                "No logging instance stored the message, or any line of the upload, in time, there are too \
                 many messages at once, or this facade is stopping.",
                [("no_instance", not_stored)],
            ),
        )
        .build()
}

fn idempotency_key() -> Parameter {
    let uuid =
        "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-7[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}";
    parameter(
        IDEMPOTENCY_KEY,
        ParameterIn::Header,
        "A version 7 UUID, bare or in double quotes, that becomes the message's: it can be posted \
         again with it and is stored once. Not with an upload.",
        string().pattern(Some(format!("^({uuid}|\"{uuid}\")$"))),
    )
}

fn body(max_message: usize) -> RequestBody {
    let text = || string().min_length(Some(1)).max_length(Some(max_message));
    let object = || {
        ObjectBuilder::new()
            .property("msg", text())
            .required("msg")
            .additional_properties(Some(AdditionalProperties::FreeForm(false)))
    };
    let json = OneOfBuilder::new().item(object()).item(text());
    let special = "1+1=2 & more";
    RequestBodyBuilder::new()
        .description(Some(format!(
            "A message of 1 to {max_message} bytes of UTF-8, or an upload of any length. Without a \
             content type, or with that of a form, a body that is a form with the one field `msg`, or a JSON \
             object with the one key `msg`, is that message; one that begins like these, or is of the form's \
             type and has a `=`, is refused; any other is plain text."
        )))
        .required(Some(Required::True))
        .content(
            "application/x-www-form-urlencoded",
            content(object(), [("form", json!({"msg": special}))]),
        )
        .content(
            "multipart/form-data",
            content(object(), [("multipart", json!({"msg": special}))]),
        )
        .content(
            JSON,
            content(
                json,
                [
                    ("object", json!({"msg": special})),
                    ("string", json!("hello")),
                ],
            ),
        )
        .content(TEXT, content(text(), [("text", json!("hello"))]))
        .content(
            NDJSON,
            content(
                string(),
                [(
                    "upload",
                    json!("\"hello\"\n{\"msg\":\"still here\"}\nhello\n"),
                )],
            ),
        )
        .build()
}

/// Why a line of the examples failed.
const LINE_REASON: &str = "a line is a JSON string or {\"msg\":\"…\"} with an optional uuid: expected value at \
                           line 1 column 1";

fn stored_partly() -> ResponseBuilder {
    let failed = json!({"line": 3, "uuid": null, "stored": "no", "error": LINE_REASON});
    let upload = json!({"stored": 2, "failed": 1, "errors": [failed]});
    let summary = content(Ref::from_schema_name("Summary"), [("upload", upload)]);
    answer(
        "Of an upload: some lines are stored and some are not, or none is and both lines and the server are \
         at fault.",
    )
    .content(JSON, summary)
}

fn stored() -> ResponseBuilder {
    let lines = format!(
        "{{\"line\":1,\"uuid\":\"{FIRST}\",\"stored\":\"yes\"}}\n\
         {{\"line\":2,\"uuid\":\"{SECOND}\",\"stored\":\"yes\"}}\n\
         {{\"line\":3,\"uuid\":null,\"stored\":\"no\",\"error\":{}}}\n\
         {{\"stored\":2,\"failed\":1}}\n",
        json!(LINE_REASON)
    );
    let instance = string().examples(["127.0.0.1:8082"]);
    let read = LinkBuilder::new()
        .operation_id("show")
        .parameter("uuid", "$response.body#/uuid")
        .description("The message that was stored.");
    answer("The message is stored; of an upload, all lines.")
        .header(
            LOGGING_INSTANCE.as_str(),
            header_of("The logging instance that stored it, not with an upload.", instance),
        )
        .content(
            JSON,
            content(
                OneOfBuilder::new()
                    .item(Ref::from_schema_name("StoredMessage"))
                    .item(Ref::from_schema_name("Summary")),
                [
                    ("message", json!({"uuid": FIRST, "msg": "hello"})),
                    ("duplicate", json!({"uuid": FIRST, "msg": "hello", "duplicate": true})),
                    ("upload", json!({"stored": 2, "failed": 0, "errors": []})),
                ],
            ),
        )
        .content(
            NDJSON,
            content(
                string().description(Some(
                    "Of an upload, with `Accept: application/x-ndjson`: a `LineResult` for each line, \
                     in order, while the upload still runs, then a line that counts the `stored` and the \
                     `failed`. When the upload breaks off, it also has the number of `lines` read and the \
                     `error`, and the body is cut.",
                )),
                [("results", json!(lines))],
            ),
        )
        .link("show", RefOr::T(read.build()))
}

fn list() -> Operation {
    let get = operation(
        "list",
        "Read the messages",
        "All messages within the bounds, in the order of their UUIDs, and the reply of the messages \
         service. The body is streamed; one that cannot be finished is cut, and one that ends \
         properly holds everything, as its `count` proves. With `text/event-stream`, or `follow`, \
         new messages come after these, as they are stored, and the body has no end.",
    );
    let order = string()
        .enum_values(Some(["asc", "desc"]))
        .default(Some(json!("asc")));
    let limit = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(1))
        .maximum(Some(u64::MAX));
    get.parameter(query("after", "Only messages with a greater UUID.", uuid()))
        .parameter(query("before", "Only messages with a lower UUID.", uuid()))
        .parameter(query(
            "since",
            "Only messages from this time on: an RFC 3339 time, or how long ago.",
            moment(),
        ))
        .parameter(query("until", "Only messages before this time.", moment()))
        .parameter(query("order", "Oldest first, or newest first.", order))
        .parameter(query(
            "limit",
            "At most so many messages. When more follow, the answer has `next`: the cursor to \
             continue from, as `after` when ascending, as `before` when descending.",
            limit,
        ))
        .parameter(query(
            "contains",
            &format!(
                "Only messages that contain this text, of at most {MAX_TEXT} bytes, in the same case. One \
                 request looks at {MAX_SCANNED} entries at most: `scanned` says at how many. While the \
                 answer has `next`, there are more to look at."
            ),
            string().min_length(Some(1)).max_length(Some(MAX_TEXT)),
        ))
        .parameter(query(
            "follow",
            "Go on with new messages, in NDJSON or text; not with `before`, `until`, `limit`, \
             `contains` and `desc`.",
            ObjectBuilder::new().schema_type(Type::Boolean),
        ))
        .parameter(query(
            "tail",
            "When following: begin with so many of the newest messages.",
            ObjectBuilder::new()
                .schema_type(Type::Integer)
                .minimum(Some(0))
                .maximum(Some(MAX_TAIL)),
        ))
        .parameter(parameter(
            "last-event-id",
            ParameterIn::Header,
            "When following: the `id` of the last event, behind which to go on.",
            uuid(),
        ))
        .response("200", merged())
        .problem(
            400,
            "A query parameter is wrong, or given twice. Unknown ones are ignored.",
            [
                (
                    "contains",
                    "Failed to deserialize query string: contains: write a text of 1 to 256 bytes, or \
                     leave contains out to get all messages",
                ),
                ("limit", "limit must be at least 1"),
                (
                    "since",
                    "Failed to deserialize query string: since: write an RFC 3339 time such as \
                     2026-11-24T20:00:00Z, or how long ago, such as 10m",
                ),
            ],
        )
        .problem(
            406,
            "The formats are JSON, which is the default, NDJSON, plain text and events.",
            [("image", &accept_one_of(&Format::OF_THE_LOG))],
        )
        .problem(500, FAULT, [])
        .response("503", unreadable())
        .build()
}

fn moment() -> AnyOfBuilder {
    let at = string().format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)));
    let ago = string()
        .pattern(Some("^(0|([0-9]{1,9} ?(ns|us|ms|s|m|h|d|w) ?){1,4})$"))
        .examples(["10m", "1h 30s"]);
    AnyOfBuilder::new().item(at).item(ago)
}

fn merged() -> ResponseBuilder {
    let entries = [
        json!({"uuid": FIRST, "msg": "hello"}),
        json!({"uuid": SECOND, "msg": "still here"}),
    ];
    let reply = "Messages Service not Implemented";
    let tail = json!({"messages_service": reply, "count": 2});
    let lines = format!(
        "{{\"uuid\":\"{FIRST}\",\"msg\":\"hello\"}}\n\
         {{\"uuid\":\"{SECOND}\",\"msg\":\"still here\"}}\n\
         {{\"messages_service\":\"{reply}\",\"count\":2}}\n"
    );
    answer(
        "The messages. `next` is there when `limit` ended the answer, or a search its share of the \
         entries, and more follow.",
    )
        .content(
            Format::Json.content_type(),
            content(
                Ref::from_schema_name("Messages"),
                [
                    ("all", with(json!({"logging_service": entries}), tail)),
                    (
                        "limited",
                        json!({"logging_service": entries[..1], "messages_service": reply,
                            "count": 1, "next": FIRST}),
                    ),
                    (
                        "found",
                        json!({"logging_service": entries[1..], "messages_service": reply,
                            "count": 1, "scanned": 2}),
                    ),
                    (
                        "stub_away",
                        json!({"logging_service": entries, "messages_service": null,
                            "messages_service_error": "the messages service refuses connections",
                            "count": 2}),
                    ),
                ],
            ),
        )
        .content(
            Format::Ndjson.content_type(),
            content(
                string().description(Some(
                    "An `Entry` a line, then a line with the rest of `Messages`.",
                )),
                [("all", json!(lines))],
            ),
        )
        .content(
            TEXT,
            content(
                string().description(Some(
                    "A UUID and its message a line, with control characters escaped, then the count, \
                     then the reply of the messages service.",
                )),
                [
                    (
                        "all",
                        json!(format!("{FIRST} hello\n{SECOND} still here\n2 messages\n{reply}\n")),
                    ),
                    (
                        "found",
                        json!(format!("{SECOND} still here\n1 messages of 2 scanned\n{reply}\n")),
                    ),
                ],
            ),
        )
        .content(
            Format::EventStream.content_type(),
            content(
                string().description(Some(
                    "An event `message` for each message, an `Entry`, with a settled position as its `id`: \
                     everything up to that has been sent on this connection.",
                )),
                [],
            ),
        )
        .content(
            "text/html",
            content(
                string().description(Some("The page at `/console`, for a browser that navigates here.")),
                [],
            ),
        )
}

/// `/{uuid}`
pub(crate) fn message() -> PathItem {
    let get = operation("show", "Read one message", "");
    let entry = content(
        Ref::from_schema_name("Entry"),
        [("message", json!({"uuid": FIRST, "msg": "hello"}))],
    );
    let none = format!("there is no message {FIRST}");
    get_only(
        get.parameter(in_path("uuid", "The UUID of the message.", uuid()))
            .response("200", answer("The message.").content(JSON, entry))
            .problem(
                404,
                "There is no such message, or this is not a UUID.",
                [("none", &none)],
            )
            .problem(500, FAULT, [])
            .response("503", unreadable()),
    )
}
