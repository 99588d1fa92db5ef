//! `/system/info`, `/healthz`, `/metrics`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::Service;
use crate::error::ApiError;

pub(super) async fn info() -> Json<Value> {
    Json(json!({
        "provider": {
            "name": "trenv",
            "orchestration": "containerd",
            "version": {
                "release": env!("CARGO_PKG_VERSION"),
                "sha": "",
                "commit_message": "",
            },
        },
        "version": { "release": env!("CARGO_PKG_VERSION"), "sha": "", "commit_message": "" },
        "arch": std::env::consts::ARCH,
    }))
}

pub(super) async fn health() -> &'static str {
    "OK"
}

pub(super) async fn metrics(State(service): State<Arc<Service>>) -> Result<Response, ApiError> {
    let functions: Vec<(String, usize)> = service
        .functions
        .list(None)
        .iter()
        .map(|f| {
            (
                f.name.to_string(),
                service.scheduler.instances(&f.name).len(),
            )
        })
        .collect();
    let text = service
        .metrics
        .render(&functions, service.scheduler.counts())
        .map_err(|err| ApiError::internal(format!("The metrics cannot be written: {err}")))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(CONTENT_TYPE, kind)], text).into_response())
}
