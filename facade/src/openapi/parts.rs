//! What descriptions are made of: operations with what all of them have in common, parameters,
//! answers, problems, and the schemas that have names.

use axum::http::{StatusCode, header};
use common::entry::Entry;
use common::health::Check;
use common::middleware::REQUEST_ID;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa::openapi::example::ExampleBuilder;
use utoipa::openapi::header::{Header, HeaderBuilder};
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, PathItem,
};
use utoipa::openapi::schema::{
    AllOfBuilder, ArrayBuilder, Components, ComponentsBuilder, KnownFormat, ObjectBuilder,
    OneOfBuilder, Schema, SchemaFormat, Type,
};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, ContentBuilder, Ref, RefOr, Required, ResponseBuilder};

use crate::format::Tail;
use crate::post::Answer;
use crate::stats::Stats;
use crate::upload::{LineResult, Summary};

const PROBLEM: &str = "application/problem+json";

pub(super) fn get_only(operation: OperationBuilder) -> PathItem {
    PathItem::new(HttpMethod::Get, operation.build())
}

/// An operation with what middleware and the HTTP server add to all of them.
pub(super) fn operation(id: &str, summary: &str, description: &str) -> OperationBuilder {
    let request_id = parameter(
        REQUEST_ID.as_str(),
        ParameterIn::Header,
        "An id of the request for the logs of all services. The answer has the same; or a new one if \
         it has more than 128 characters or others than printable ASCII.",
        string(),
    );
    let challenge = header_of("Bearer and Basic.", string());
    let no_token = answer(
        "The facade asks for a token (`--token-file`), and this one is missing or not known.",
    )
    .header(header::WWW_AUTHENTICATE.as_str(), challenge)
    .content(PROBLEM, content(Ref::from_schema_name("Problem"), []));
    OperationBuilder::new()
        .operation_id(Some(id))
        .summary(Some(summary))
        .description((!description.is_empty()).then_some(description))
        .parameter(request_id)
        .response("401", no_token)
        .problem(
            429,
            "There are too many requests from this address: see `--rate`.",
            [],
        )
        .problem(
            421,
            "The facade does not serve this host: see its `--host`.",
            [],
        )
        .response(
            "414",
            ResponseBuilder::new().description("The URI has more than 65534 bytes."),
        )
        .response(
            "431",
            ResponseBuilder::new().description("The head has more than 100 headers or 128 KiB."),
        )
}

pub(super) fn query(name: &str, description: &str, schema: impl Into<RefOr<Schema>>) -> Parameter {
    parameter(name, ParameterIn::Query, description, schema)
}

pub(super) fn in_path(
    name: &str,
    description: &str,
    schema: impl Into<RefOr<Schema>>,
) -> Parameter {
    parameter(name, ParameterIn::Path, description, schema)
}

pub(super) fn parameter(
    name: &str,
    parameter_in: ParameterIn,
    description: &str,
    schema: impl Into<RefOr<Schema>>,
) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(parameter_in)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema))
        .build()
}

/// An answer of a handler.
pub(super) fn answer(description: &str) -> ResponseBuilder {
    let id = header_of("The id of the request.", string());
    ResponseBuilder::new()
        .description(description)
        .header(REQUEST_ID.as_str(), id)
}

/// The 500 of a handler that panicked, or of a map that is broken.
pub(super) const FAULT: &str = "A fault of the service, or of its map.";

pub(super) trait Problems {
    /// Adds an answer that is a problem, with the details of its examples.
    fn problem<const N: usize>(
        self,
        status: u16,
        description: &str,
        details: [(&str, &str); N],
    ) -> Self;
}

impl Problems for OperationBuilder {
    fn problem<const N: usize>(
        self,
        status: u16,
        description: &str,
        details: [(&str, &str); N],
    ) -> Self {
        let examples = details.map(|(name, detail)| (name, example(status, detail)));
        let problem = content(Ref::from_schema_name("Problem"), examples);
        let answer = answer(description).content(PROBLEM, problem);
        self.response(status.to_string(), answer)
    }
}

/// A 503, of which each has `Retry-After`.
pub(super) fn unavailable<const N: usize>(
    description: &str,
    examples: [(&str, Value); N],
) -> ResponseBuilder {
    let seconds = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(1));
    answer(description)
        .header(
            header::RETRY_AFTER.as_str(),
            header_of("Seconds after which to try again.", seconds),
        )
        .content(PROBLEM, content(Ref::from_schema_name("Problem"), examples))
}

/// The 503 of a GET.
pub(super) fn unreadable() -> ResponseBuilder {
    let detail = "retry in a moment: no logging instance is up: \
                  logging-1 refuses connections";
    unavailable(
        "No logging instance can read the map now, or there are too many reads at once.",
        [("no_instance", example(503, detail))],
    )
}

pub(super) fn header_of(description: &str, schema: ObjectBuilder) -> Header {
    HeaderBuilder::new()
        .description(Some(description))
        .schema(Some(schema.build()))
        .build()
}

pub(super) fn content<const N: usize>(
    schema: impl Into<RefOr<Schema>>,
    examples: [(&str, Value); N],
) -> Content {
    let examples = examples.map(|(name, value)| (name, ExampleBuilder::new().value(Some(value))));
    ContentBuilder::new()
        .schema(Some(schema))
        .examples_from_iter(examples)
        .build()
}

pub(super) fn string() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

pub(super) fn uuid() -> ObjectBuilder {
    string().format(Some(SchemaFormat::KnownFormat(KnownFormat::Uuid)))
}

/// A problem as it is answered.
pub(super) fn example(status: u16, detail: &str) -> Value {
    let title = StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason());
    json!({"status": status, "title": title, "detail": detail})
}

/// An object with the members of another one besides.
pub(super) fn with(mut object: Value, more: Value) -> Value {
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

pub(super) fn components() -> Components {
    let entries = ArrayBuilder::new().items(Ref::from_schema_name("Entry"));
    let log = ObjectBuilder::new()
        .property("logging_service", entries)
        .required("logging_service");
    let messages = AllOfBuilder::new()
        .item(Ref::from_schema_name("Tail"))
        .item(log);
    let checks = ArrayBuilder::new().items(Ref::from_schema_name("Check"));
    let ready = ObjectBuilder::new()
        .property("status", string().enum_values(Some(["ready", "degraded"])))
        .property("checks", checks)
        .required("status");
    let mut parts_of_stats = Vec::new();
    Stats::schemas(&mut parts_of_stats);
    ComponentsBuilder::new()
        .schema("Messages", messages)
        .schema("Problem", problem())
        .schema("Ready", ready)
        .schema_from::<Answer<'_>>()
        .schema_from::<Check>()
        .schema_from::<Entry>()
        .schema_from::<LineResult>()
        .schema_from::<Stats>()
        .schema_from::<Summary>()
        .schema_from::<Tail>()
        .schemas_from_iter(parts_of_stats)
        .security_scheme(BEARER, http(HttpAuthScheme::Bearer))
        .security_scheme(BASIC, http(HttpAuthScheme::Basic))
        .build()
}

/// Ways to send a token.
const BEARER: &str = "bearer";
const BASIC: &str = "basic";

fn http(scheme: HttpAuthScheme) -> SecurityScheme {
    let description = match scheme {
        HttpAuthScheme::Basic => "The token is the password; any user name.",
        _ => "The token.",
    };
    let http = HttpBuilder::new()
        .scheme(scheme)
        .description(Some(description));
    SecurityScheme::Http(http.build())
}

/// A facade without `--token-file` asks for none of them.
pub(super) fn securities() -> [SecurityRequirement; 3] {
    let none: [&str; 0] = [];
    [
        SecurityRequirement::default(),
        SecurityRequirement::new(BEARER, none),
        SecurityRequirement::new(BASIC, none),
    ]
}

fn problem() -> ObjectBuilder {
    let number = |description: &str| {
        ObjectBuilder::new()
            .schema_type(Type::Integer)
            .description(Some(description))
    };
    let word = string()
        .description(Some(
            "Of a POST of a message that is a 503. `unknown`: it may be stored; to store it once, post it \
             again with the `uuid` as `Idempotency-Key`.",
        ))
        .enum_values(Some(["no", "unknown"]));
    let stored = OneOfBuilder::new()
        .item(word)
        .item(number("Of an upload: how many lines are stored."));
    let errors = ArrayBuilder::new()
        .items(Ref::from_schema_name("LineResult"))
        .description(Some("The first hundred of them."));
    let checks = ArrayBuilder::new()
        .items(Ref::from_schema_name("Check"))
        .description(Some("Of `/readyz?verbose`."));
    ObjectBuilder::new()
        .property("status", number("The status of the answer."))
        .property("title", string())
        .property("detail", string().description(Some("What to do about it.")))
        .required("status")
        .required("title")
        .required("detail")
        .property("stored", stored)
        .property("uuid", uuid())
        .property(
            "lines",
            number("How many lines of an upload that broke off were read."),
        )
        .property(
            "failed",
            number("Of an upload: how many lines are not stored."),
        )
        .property("errors", errors)
        .property("checks", checks)
}
