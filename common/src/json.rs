//! JSON as lines: responses, and lines of a stream. Characters that act on a terminal are escaped, so that it
//! can show an answer as it is.

use std::io::{self, Write};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

use crate::escape::needs_escape;

/// How many bytes one byte of a text can become in JSON: a control character is `\u001b`.
pub const MAX_EXPANSION: usize = 6;

/// Room for the headers of an answer, so that adding the last ones does not move the first.
const USUAL_HEADERS: usize = 8;

/// Bytes that a line begins with, so that the usual one needs no more.
const USUAL_LINE: usize = 256;

/// A JSON response that ends with a newline, so that a terminal shows its prompt on the next line.
#[derive(Debug)]
pub struct JsonLine<T>(pub T);

impl<T: Serialize> IntoResponse for JsonLine<T> {
    fn into_response(self) -> Response {
        let mut line = Vec::with_capacity(USUAL_LINE);
        write_line(&mut line, &self.0);
        let mut response = Response::new(Body::from(line));
        let headers = response.headers_mut();
        headers.reserve(USUAL_HEADERS);
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        response
    }
}

/// Appends a value as one line of JSON.
pub fn write_line(out: &mut Vec<u8>, value: &impl Serialize) {
    write(out, value);
    out.push(b'\n');
}

/// Appends a value as JSON.
pub fn write(out: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) {
    let mut serializer = Serializer::with_formatter(out, Printable);
    let written = value.serialize(&mut serializer);
    written.expect("the value is plain JSON");
}

/// How many bytes [`write()`] appends for a text.
pub fn length(text: &str) -> usize {
    struct Length(usize);
    impl Write for Length {
        fn write(&mut self, written: &[u8]) -> io::Result<usize> {
            self.0 += written.len();
            Ok(written.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut length = Length(0);
    let mut serializer = Serializer::with_formatter(&mut length, Printable);
    let counted = text.serialize(&mut serializer);
    counted.expect("a text is plain JSON");
    length.0
}

/// Whether a byte of a string may begin a character that [`write()`] escapes and JSON allows: U+007F, U+0080
/// to U+009F, U+061C, U+200E and others.
fn may_begin_escape(byte: u8) -> bool {
    (byte == 0x7f) | (byte == 0xc2) | (byte == 0xd8) | (byte == 0xe2)
}

/// Compact JSON in which such characters are escaped; the others are escaped by JSON's rules.
struct Printable;

impl Formatter for Printable {
    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let bytes = fragment.as_bytes();
        // Without an early exit the compiler vectorizes the loop.
        let is_plain = !bytes
            .iter()
            .fold(false, |found, byte| found | may_begin_escape(*byte));
        if is_plain {
            return writer.write_all(bytes);
        }
        let mut plain_from = 0;
        let escaped = fragment
            .char_indices()
            .filter(|(_, one)| needs_escape(*one));
        for (at, character) in escaped {
            writer.write_all(&bytes[plain_from..at])?;
            write!(writer, "\\u{:04x}", u32::from(character))?;
            plain_from = at + character.len_utf8();
        }
        writer.write_all(&bytes[plain_from..])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn printed(text: &str) -> String {
        let mut out = Vec::new();
        write(&mut out, text);
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    #[test]
    fn marks_and_controls_are_escaped_and_letters_are_not() {
        assert_eq!(
            printed("\u{7f}\u{80}\u{9b}31m\u{61c}\u{200e}\u{2028}\u{202e}\u{2066}\u{1b}"),
            r#""\u007f\u0080\u009b31m\u061c\u200e\u2028\u202e\u2066\u001b""#
        );
        let plain = "größer – «ok» 你好 👍 ٱلسَّلَامُ \u{a0}";
        assert_eq!(printed(plain), format!("\"{plain}\""));
    }

    proptest! {
        #[test]
        fn decoded_text_is_the_text(text in any::<String>(), marks in "[\u{0}-\u{a5}\u{600}-\u{620}\u{2000}-\u{2070}]*") {
            for text in [&text, &marks, &format!("{text}{marks}{text}")] {
                let json = printed(text);
                prop_assert_eq!(length(text), json.len());
                prop_assert!(!json.chars().any(needs_escape), "{json:?}");
                prop_assert_eq!(&serde_json::from_str::<String>(&json).expect("a string"), text);
            }
        }
    }
}
