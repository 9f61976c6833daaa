//! Tokens: who may read, and who may do everything. A file has one a line.

use std::fmt;

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use headers::authorization::{Authorization, Basic, Bearer};
use headers::{HeaderMapExt, HeaderName};
use subtle::ConstantTimeEq;

use crate::problem::Problem;

/// A shorter token could be guessed.
const MIN_LENGTH: usize = 16;

/// Both schemes: programs send `Bearer`, and a browser asks its user for the password of `Basic`.
const CHALLENGES: [(HeaderName, HeaderValue); 2] = [
    (
        header::WWW_AUTHENTICATE,
        HeaderValue::from_static("Bearer realm=\"message log\""),
    ),
    (
        header::WWW_AUTHENTICATE,
        HeaderValue::from_static("Basic realm=\"message log\", charset=\"UTF-8\""),
    ),
];

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Right {
    /// GET and HEAD.
    Read,
    All,
}

/// The tokens of a file. Their `Debug` does not show them.
pub(super) struct Tokens(Vec<(Right, String)>);

impl fmt::Debug for Tokens {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} tokens", self.0.len())
    }
}

impl Tokens {
    /// Parses a file: one token a line, or `read` and a token that may only GET. Empty lines and those that
    /// begin with `#` are skipped.
    ///
    /// # Errors
    /// The number of the wrong line, and what to write instead; never the line itself.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut tokens = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (right, token) = match words[..] {
                [] => continue,
                [first, ..] if first.starts_with('#') => continue,
                ["read", token] => (Right::Read, token),
                [token] => (Right::All, token),
                _ => return Err(wrong(index, "write one token, or `read` and a token")),
            };
            if token.len() < MIN_LENGTH {
                return Err(wrong(index, "a token has at least 16 characters"));
            }
            if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(wrong(index, "a token has only printable ASCII characters"));
            }
            tokens.push((right, token.to_owned()));
        }
        if tokens.is_empty() {
            return Err("it holds no token; write one a line".to_owned());
        }
        Ok(Self(tokens))
    }

    /// The header of a request with the first token that may do everything.
    ///
    /// # Errors
    /// When all of them may only GET.
    pub(super) fn authorization(&self) -> Result<HeaderValue, String> {
        let mut all = self.0.iter().filter(|(right, _)| *right == Right::All);
        let (_, token) = all.next().ok_or("each of its tokens may only read")?;
        let mut value =
            HeaderValue::try_from(format!("Bearer {token}")).expect("a token is printable ASCII");
        value.set_sensitive(true);
        Ok(value)
    }

    /// Whether this token allows a request of this method.
    ///
    /// # Errors
    /// The answer to a request that it does not allow.
    pub(super) fn check(&self, token: Option<&str>, method: &Method) -> Result<(), Problem> {
        match token.and_then(|token| self.right_of(token)) {
            Some(Right::All) => Ok(()),
            Some(Right::Read) if is_read(method) => Ok(()),
            Some(Right::Read) => Err(Problem::new(
                StatusCode::FORBIDDEN,
                "this token may only read",
            )),
            None => {
                let detail = match token {
                    None => {
                        "send a token: authorization: Bearer TOKEN, or Basic with the token as password"
                    }
                    Some(_) => "this token is not known, or no longer",
                };
                let problem = Problem::new(StatusCode::UNAUTHORIZED, detail);
                Err(problem.with_headers(CHALLENGES))
            }
        }
    }

    /// Takes the same time for all tokens of one length: each is compared to its end.
    fn right_of(&self, presented: &str) -> Option<Right> {
        let mut found = None;
        for (right, token) in &self.0 {
            if token.as_bytes().ct_eq(presented.as_bytes()).into() {
                found = found.max(Some(*right));
            }
        }
        found
    }
}

fn wrong(index: usize, instead: &str) -> String {
    format!("line {} is wrong: {instead}", index + 1)
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

/// The token of a request. Of several headers a proxy might have checked another one: they count as none.
pub(super) fn presented(headers: &HeaderMap) -> Option<String> {
    if headers.get_all(header::AUTHORIZATION).iter().count() != 1 {
        return None;
    }
    if let Some(Authorization(bearer)) = headers.typed_get::<Authorization<Bearer>>() {
        return Some(bearer.token().to_owned());
    }
    let basic = headers.typed_get::<Authorization<Basic>>()?;
    Some(basic.password().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# of the poster\n  poster-0123456789 \n\nread reader-0123456789\r\n";

    #[test]
    fn each_token_has_its_right() {
        let tokens = Tokens::parse(FILE).expect("tokens");
        assert_eq!(tokens.right_of("poster-0123456789"), Some(Right::All));
        assert_eq!(tokens.right_of("reader-0123456789"), Some(Right::Read));
        for unknown in ["", "poster-012345678", "poster-01234567890", "read", "#"] {
            assert_eq!(tokens.right_of(unknown), None, "{unknown}");
        }
        assert_eq!(format!("{tokens:?}"), "2 tokens");
        let sent = tokens.authorization().expect("one may do everything");
        assert_eq!(sent, "Bearer poster-0123456789");
        assert_eq!(format!("{sent:?}"), "Sensitive");
    }

    #[test]
    fn wrong_file_is_refused_without_its_tokens() {
        for (text, reason) in [
            ("", "no token"),
            ("# secret-0123456789", "no token"),
            ("\nsecret", "line 2"),
            ("read secret", "line 1"),
            ("write secret-0123456789", "line 1"),
            ("read secret-0123456789 x", "line 1"),
            ("secret-0123456789\u{e9}", "line 1"),
        ] {
            let error = Tokens::parse(text).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let reader = Tokens::parse("read secret-0123456789").expect("a token");
        assert!(reader.authorization().is_err());
    }
}
