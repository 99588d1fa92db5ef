//! `/system/functions`, `/system/function/{name}`, `/system/scale-function/{name}`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::{Path, Query, State};
use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{NamespaceQuery, Service, read_json};
use crate::error::{ApiError, chain};
use crate::functions::{Deployment, Function, FunctionError, RevisionState};

/// The largest number of instances that may be asked for.
const MAX_REPLICAS: u64 = 10_000;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
pub(super) struct RemoveBody {
    function_name: String,
    namespace: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ScaleBody {
    #[serde(default)]
    service_name: String,
    replicas: u64,
    #[serde(default)]
    namespace: String,
}

pub(super) async fn list(
    State(service): State<Arc<Service>>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let namespace = service.namespace(&query.namespace).await?;
    let functions = service.functions.list(Some(&namespace));
    Ok(Json(
        functions.iter().map(|f| status(&service, f)).collect(),
    ))
}

pub(super) async fn describe(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Value>, ApiError> {
    let name = service.function_name(&name, &query.namespace).await?;
    let function = service.functions.get(&name);
    let function = function.ok_or_else(|| function_error(&FunctionError::Unknown(name.clone())))?;
    Ok(Json(status(&service, &function)))
}

pub(super) async fn deploy(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let deployment = read_deployment(&service, &body).await?;
    let done = service.functions.deploy(deployment).await;
    done.map_err(|err| function_error(&err))?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn update(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let deployment = read_deployment(&service, &body).await?;
    let done = service.functions.update(deployment).await;
    done.map_err(|err| function_error(&err))?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn remove(
    State(service): State<Arc<Service>>,
    Query(query): Query<NamespaceQuery>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let body: RemoveBody = read_json(&body)?;
    if body.function_name.is_empty() {
        return Err(ApiError::bad_request(
            "The body names no function; set \"functionName\"",
        ));
    }
    let namespace = match body.namespace.as_str() {
        "" => &query.namespace,
        named => named,
    };
    let name = service
        .function_name(&body.function_name, namespace)
        .await?;
    let done = service.functions.remove(&name).await;
    done.map_err(|err| function_error(&err))?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn scale(
    State(service): State<Arc<Service>>,
    Path(name): Path<String>,
    Query(query): Query<NamespaceQuery>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let body: ScaleBody = read_json(&body)?;
    if !body.service_name.is_empty() && body.service_name != name {
        return Err(ApiError::bad_request(format!(
            "The path names the function {name}, the body {}; name one",
            body.service_name
        )));
    }
    let replicas = u32::try_from(body.replicas.min(MAX_REPLICAS)).unwrap_or(u32::MAX);
    let namespace = match body.namespace.as_str() {
        "" => &query.namespace,
        named => named,
    };
    let name = service.function_name(&name, namespace).await?;
    let done = service.functions.scale(&name, replicas).await;
    done.map_err(|err| function_error(&err))?;
    Ok(StatusCode::ACCEPTED)
}

async fn read_deployment(service: &Service, body: &Bytes) -> Result<Deployment, ApiError> {
    let mut deployment: Deployment = read_json(body)?;
    deployment.namespace = service.namespace(&deployment.namespace).await?;
    Ok(deployment)
}

fn function_error(err: &FunctionError) -> ApiError {
    let message = chain(err);
    match err {
        FunctionError::Unknown(_) => ApiError::not_found(message),
        err if err.is_callers() => ApiError::bad_request(message),
        _ => ApiError::internal(message),
    }
}

/// A function's status: OpenFaaS's fields, and what trenv knows besides.
fn status(service: &Service, function: &Function) -> Value {
    let view = function.view();
    let instances = service.scheduler.instances(&function.name);
    let serves = matches!(view.state, RevisionState::Ready(_) | RevisionState::Cold(_));
    // Without a wish of the user there is always one to be had; with one, what is there counts.
    let (replicas, available) = match view.replicas {
        Some(wanted) => (u64::from(wanted), instances.len()),
        None => (
            1.max(instances.len() as u64),
            instances.len().max(usize::from(serves)),
        ),
    };
    let deployment = &view.deployment;
    let mut status = json!({
        "name": function.name.name,
        "namespace": function.name.namespace,
        "image": deployment.image,
        "envProcess": deployment.env_process,
        "envVars": deployment.env_vars,
        "constraints": deployment.constraints,
        "secrets": deployment.secrets,
        "labels": deployment.labels,
        "annotations": deployment.annotations,
        "limits": deployment.limits,
        "requests": deployment.requests,
        "readOnlyRootFilesystem": deployment.read_only_root_filesystem,
        "replicas": replicas,
        "availableReplicas": available,
        "invocationCount": function.calls.load(Ordering::Relaxed),
        "createdAt": rfc3339(function.created_at),
        "usage": { "cpu": 0, "totalMemoryBytes": 0 },
        // A function that failed and is being built anew is on its way again.
        "status": match &view.state {
            RevisionState::Failed(_) if view.updating => RevisionState::Building.word(),
            state => state.word(),
        },
        "startMethod": if matches!(view.state, RevisionState::Cold(_)) { "cold" } else { "template" },
        "imageDigest": view.current.record.image.digest,
        "instances": instances.iter().map(|i| json!({
            "sandbox": i.sandbox,
            "address": i.address.map(|a| a.ip().to_string()),
            "calls": i.in_flight,
        })).collect::<Vec<_>>(),
    });
    if let Some(reason) = view.state.reason() {
        status["reason"] = reason.into();
    }
    if view.updating {
        status["update"] = "building".into();
    } else if let Some(failure) = &view.failure {
        status["update"] = "failed".into();
        status["updateReason"] = failure.as_str().into();
    }
    if let RevisionState::Ready(template) = &view.state {
        status["templateId"] = template.id.as_str().into();
        status["template"] = json!({
            "generation": template.generation,
            "imageBytes": template.image_bytes,
            "storedBytes": template.stored_bytes,
            "notes": template.notes,
        });
    }
    status
}

/// Seconds since 1970 as clients want them.
pub(super) fn rfc3339(seconds: u64) -> String {
    let days = i64::try_from(seconds / 86_400).unwrap_or(0);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Days to a civil date, with years that begin in March.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc_3339() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_735_689_599), "2024-12-31T23:59:59Z");
    }
}
