//! The yardstick of `bench/post.sh`: an axum handler that parses the form, makes a UUID, answers JSON, and
//! stores nothing. Usage: bare ADDRESS

use axum::routing::post;
use axum::{Form, Json, Router};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[derive(Deserialize)]
struct Posted {
    msg: String,
}

#[derive(Serialize)]
struct Answer {
    uuid: Uuid,
    msg: String,
}

async fn answer(Form(Posted { msg }): Form<Posted>) -> Json<Answer> {
    let uuid = Uuid::now_v7();
    Json(Answer { uuid, msg })
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1);
    let address = address.ok_or_else(|| anyhow::anyhow!("usage: bare ADDRESS"))?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let router = Router::new().route("/", post(answer));
    axum::serve(listener, router).await?;
    Ok(())
}
