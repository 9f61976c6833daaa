//! `GET /docs`: the description of the API as a page, by Swagger UI, whose files are in this binary.
//!
//! The page needs no other host, and its content security policy has browsers hold it to that.

use axum::extract::Path;
use axum::http::{HeaderName, header};
use axum::response::{IntoResponse, Response};
use common::middleware::answer_not_found;
use common::problem::Problem;
use memchr::memmem;
use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED as ARCHIVE;

/// Swagger UI adds styles to elements, and has images in its style sheet.
const POLICY: (HeaderName, &str) = (
    header::CONTENT_SECURITY_POLICY,
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

pub(crate) async fn show() -> impl IntoResponse {
    let content_type = (header::CONTENT_TYPE, "text/html; charset=utf-8");
    ([content_type, POLICY], include_str!("docs/page.html"))
}

/// `GET /docs/{file}`: what the page consists of.
pub(crate) async fn show_file(Path(file): Path<String>) -> Result<Response, Problem> {
    let [script, style, image] = ["text/javascript", "text/css", "image/png"]
        .map(|content_type| [(header::CONTENT_TYPE, content_type)]);
    Ok(match file.as_str() {
        "start.js" => (script, include_str!("docs/start.js")).into_response(),
        "favicon-32x32.png" => (image, include_bytes!("docs/favicon-32x32.png")).into_response(),
        "swagger-ui-bundle.js" => (script, gzipped(&file)).into_response(),
        "swagger-ui.css" => (style, gzipped(&file)).into_response(),
        _ => return Err(answer_not_found().await),
    })
}

/// A file of Swagger UI as gzip, which every browser takes.
///
/// A zip archive holds the deflated bytes of a file, their checksum and size as gzip does, so only gzip's head is
/// added. The offsets are those of the file's entry in the archive's directory, and of the header before its bytes.
fn gzipped(file: &str) -> impl IntoResponse + use<> {
    const HEAD: &[u8] = &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let path = format!("swagger-ui-5.32.6/dist/{file}");
    // The directory is at the end of the archive.
    let entry = memmem::rfind(ARCHIVE, path.as_bytes()).map(|found| &ARCHIVE[found - 46..]);
    let entry = entry.expect("the archive has the files of this version");
    let number = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("4 bytes"));
    let (size, begin) = (number(20) as usize, number(42) as usize);
    let before = &ARCHIVE[begin..];
    let extra = usize::from(u16::from_le_bytes([before[28], before[29]]));
    let deflated = &before[30 + path.len() + extra..][..size];
    let gzip = [HEAD, deflated, &entry[16..20], &entry[24..28]].concat();
    ([(header::CONTENT_ENCODING, "gzip")], gzip)
}
