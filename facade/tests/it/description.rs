//! The description of the API as a judge: the statuses of all answers of the facades in this process, and the
//! members of the bodies that tests give to [`assert_described`], have to be in it.

use std::sync::OnceLock;

use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use serde_json::Value;

/// The description with the limits left open, and with what is referred to in the place of each reference.
fn description() -> &'static Value {
    static DESCRIPTION: OnceLock<Value> = OnceLock::new();
    DESCRIPTION.get_or_init(|| resolved(include_str!("../../assets/openapi.json")))
}

/// Parses a description and resolves its references.
pub(crate) fn resolved(text: &str) -> Value {
    let whole: Value = serde_json::from_str(text).unwrap();
    let mut description = whole.clone();
    resolve(&mut description, &whole);
    description
}

fn resolve(part: &mut Value, whole: &Value) {
    if let Some(reference) = part["$ref"].as_str() {
        let pointer = reference.strip_prefix('#').unwrap();
        let target = whole.pointer(pointer);
        *part = target.unwrap_or_else(|| panic!("{reference}")).clone();
    }
    match part {
        Value::Object(members) => members.values_mut().for_each(|one| resolve(one, whole)),
        Value::Array(items) => items.iter_mut().for_each(|one| resolve(one, whole)),
        _ => {}
    }
}

/// Passes an answer on whose status is described.
pub(crate) async fn check_status(request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().cloned();
    let method = match request.method().as_str() {
        "HEAD" => "get".to_owned(),
        method => method.to_lowercase(),
    };
    let response = next.run(request).await;
    let path = path.as_ref().map_or("", MatchedPath::as_str);
    let responses = &description()["paths"][path][&method]["responses"];
    let status = response.status();
    let is_described = responses.is_null() || responses[status.as_str()].is_object();
    assert!(
        is_described,
        "{method} {path} answered {status}, which openapi.json lacks"
    );
    response
}

/// Asserts that a body has only members that a named schema has.
#[track_caller]
pub(crate) fn assert_described(body: &Value, schema: &str) {
    let schema = &description()["components"]["schemas"][schema];
    assert!(schema.is_object());
    assert_has_members(body, &[schema]);
}

/// Asserts that a value has only members that at least one of these schemas has.
#[track_caller]
pub(crate) fn assert_has_members(value: &Value, schemas: &[&Value]) {
    let mut all = Vec::new();
    for schema in schemas {
        add_with_parts(&mut all, schema);
    }
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                let named = all.iter().filter_map(|one| one["properties"].get(name));
                let others = all.iter().filter_map(|one| one.get("additionalProperties"));
                let others = others.filter(|more| more.is_object());
                let schemas: Vec<&Value> = named.chain(others).collect();
                assert!(!schemas.is_empty(), "openapi.json lacks {name} of {value}");
                assert_has_members(member, &schemas);
            }
        }
        Value::Array(items) => {
            let schemas: Vec<&Value> = all.iter().filter_map(|one| one.get("items")).collect();
            for item in items {
                assert_has_members(item, &schemas);
            }
        }
        _ => {}
    }
}

fn add_with_parts<'a>(all: &mut Vec<&'a Value>, schema: &'a Value) {
    all.push(schema);
    for combined in ["allOf", "anyOf", "oneOf"] {
        for part in schema[combined].as_array().into_iter().flatten() {
            add_with_parts(all, part);
        }
    }
}
