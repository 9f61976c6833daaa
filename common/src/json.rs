//! JSON answers.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// A JSON answer that ends with a newline, so that a terminal shows its prompt on the next line.
#[derive(Debug)]
pub struct JsonLine<T>(pub T);

impl<T: Serialize> IntoResponse for JsonLine<T> {
    fn into_response(self) -> Response {
        let content_type = [(header::CONTENT_TYPE, "application/json")];
        (content_type, line(&self.0)).into_response()
    }
}

/// A value as one line of JSON.
pub(crate) fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("answers have plain keys and values");
    line.push(b'\n');
    line
}
