//! The function under test: a small HTTP server on port 8080.

use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::{any, get};
use bytes::Bytes;

pub fn serve() -> ExitCode {
    if std::env::var("crash").is_ok() {
        println!("this function ends at once");
        return ExitCode::from(3);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.expect("a runtime").block_on(async {
        let delay = std::env::var("delay_ms")
            .ok()
            .and_then(|ms| ms.parse().ok());
        tokio::time::sleep(Duration::from_millis(delay.unwrap_or(0))).await;
        let app = Router::new()
            .route("/_/health", get(|| async { "OK" }))
            .route("/echo", any(|body: Body| async { body }))
            .route("/env/{name}", get(env))
            .route("/file", any(file))
            .route("/pid", get(|| async { std::process::id().to_string() }))
            .route("/uid", get(|| async { nix::unistd::geteuid().to_string() }))
            .route("/headers", any(headers))
            .route(
                "/moved",
                get(|| async { (StatusCode::FOUND, [(header::LOCATION, "/there")]) }),
            )
            .route("/slow/{ms}", get(slow))
            .route("/burn/{ms}", get(burn))
            .route("/drip", get(drip))
            .route("/die", get(die))
            .route("/say/{word}", get(say))
            .fallback(|request: Request| async move {
                format!("{} {}", request.method(), request.uri())
            });
        let listener = tokio::net::TcpListener::bind("0.0.0.0:8080")
            .await
            .expect("a port");
        axum::serve(listener, app).await.expect("serving");
    });
    ExitCode::SUCCESS
}

async fn env(Path(name): Path<String>) -> String {
    std::env::var(name).unwrap_or_default()
}

async fn file(path: String) -> impl IntoResponse {
    match std::fs::read(path.trim()) {
        Ok(bytes) => (StatusCode::OK, bytes),
        Err(err) => (StatusCode::NOT_FOUND, err.to_string().into_bytes()),
    }
}

async fn headers(headers: HeaderMap) -> String {
    let lines = headers
        .iter()
        .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap_or("?")));
    lines.collect()
}

async fn slow(Path(ms): Path<u64>) -> String {
    tokio::time::sleep(Duration::from_millis(ms)).await;
    "late".to_owned()
}

/// Five pieces, 100 ms apart.
/// Uses a processor all the time, and 32 MB.
async fn burn(Path(ms): Path<u64>) -> String {
    let begun = std::time::Instant::now();
    let mut held = vec![1u8; 32 << 20];
    while begun.elapsed() < Duration::from_millis(ms) {
        for byte in &mut held {
            *byte = byte.wrapping_mul(3);
        }
    }
    held.leak()[0].to_string()
}

async fn drip() -> Body {
    let pieces = futures::stream::unfold(0, |n| async move {
        if n == 5 {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        Some((
            Ok::<_, std::io::Error>(Bytes::from(format!("piece {n}\n"))),
            n + 1,
        ))
    });
    Body::from_stream(pieces)
}

async fn say(Path(word): Path<String>) -> String {
    println!("{word}");
    word
}

async fn die() -> String {
    println!("this function dies in a call");
    std::process::exit(7);
}
