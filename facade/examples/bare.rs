//! The yardstick of `bench/post.sh`: an axum handler that takes a body and stores nothing.
//! Usage: bare ADDRESS

use axum::Router;
use axum::body::Bytes;
use axum::routing::post;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1);
    let address = address.ok_or_else(|| anyhow::anyhow!("usage: bare ADDRESS"))?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let router = Router::new().route("/", post(async |body: Bytes| body));
    axum::serve(listener, router).await?;
    Ok(())
}
