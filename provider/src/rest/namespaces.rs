//! `/system/namespaces` and `/system/namespace/{name}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use serde_json::{Value, json};

use super::Service;
use crate::containerd::ContainerdError;
use crate::error::{ApiError, chain};
use crate::functions::check_name;

pub(super) async fn list(
    State(service): State<Arc<Service>>,
) -> Result<Json<Vec<String>>, ApiError> {
    let all = service
        .containerd
        .namespaces()
        .await
        .map_err(|e| failed(&e))?;
    let mut names: Vec<String> = all
        .into_iter()
        .filter(|(_, marked)| *marked)
        .map(|(name, _)| name)
        .collect();
    if !names.contains(&service.namespace) {
        names.push(service.namespace.clone());
    }
    names.sort();
    Ok(Json(names))
}

pub(super) async fn describe(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    known(&service, &name).await?;
    Ok(Json(
        json!({ "name": name, "labels": { "openfaas": "true" }, "annotations": {} }),
    ))
}

pub(super) async fn create(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    check_name("namespace", &name).map_err(ApiError::bad_request)?;
    let all = service
        .containerd
        .namespaces()
        .await
        .map_err(|e| failed(&e))?;
    if name == service.namespace || all.iter().any(|(n, _)| *n == name) {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            format!("The namespace {name} exists already; choose another name"),
        ));
    }
    service
        .containerd
        .mark_namespace(&name)
        .await
        .map_err(|e| failed(&e))?;
    service.scheduler.serve_namespace(&name);
    Ok(StatusCode::CREATED)
}

pub(super) async fn update(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    known(&service, &name).await?;
    service
        .containerd
        .mark_namespace(&name)
        .await
        .map_err(|e| failed(&e))?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn remove(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    known(&service, &name).await?;
    if name == service.namespace {
        return Err(ApiError::bad_request(
            "The default namespace cannot be removed; set provider.namespace to another one first",
        ));
    }
    if let Some(function) = service.functions.list(Some(&name)).first() {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            format!(
                "The namespace {name} holds the function {}; remove it first",
                function.name
            ),
        ));
    }
    service.scheduler.leave_namespace(&name).await;
    service
        .containerd
        .remove_namespace(&name)
        .await
        .map_err(|e| failed(&e))?;
    Ok(StatusCode::ACCEPTED)
}

/// 404 for a namespace that is not there, 400 for one that is not for functions.
async fn known(service: &Service, name: &str) -> Result<(), ApiError> {
    if name == service.namespace {
        return Ok(());
    }
    let all = service
        .containerd
        .namespaces()
        .await
        .map_err(|e| failed(&e))?;
    match all.iter().find(|(n, _)| n == name) {
        Some((_, true)) => Ok(()),
        Some((_, false)) => Err(ApiError::bad_request(format!(
            "The namespace {name} is not one for functions; use one made with POST /system/namespace/NAME"
        ))),
        None => Err(ApiError::not_found(format!(
            "There is no namespace {name}; make it with POST /system/namespace/{name}"
        ))),
    }
}

fn failed(err: &ContainerdError) -> ApiError {
    ApiError::internal(chain(err))
}
