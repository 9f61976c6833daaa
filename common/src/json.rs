//! JSON as lines: responses, and lines of a stream.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// A JSON response that ends with a newline, so that a terminal shows its prompt on the next line.
#[derive(Debug)]
pub struct JsonLine<T>(pub T);

impl<T: Serialize> IntoResponse for JsonLine<T> {
    fn into_response(self) -> Response {
        let content_type = [(header::CONTENT_TYPE, "application/json")];
        let mut line = Vec::new();
        write_line(&mut line, &self.0);
        (content_type, line).into_response()
    }
}

/// Appends a value as one line of JSON.
pub fn write_line(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(&mut *out, value).expect("the value is plain JSON");
    out.push(b'\n');
}
