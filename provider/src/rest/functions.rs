//! `/system/functions`, `/system/function/{name}`, `/system/scale-function/{name}`.

use std::collections::HashMap;
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
use crate::metrics::share_outside;
use crate::time::rfc3339;
use crate::usage::Usage;

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
    let usages = usages(&service, &namespace, &functions).await;
    Ok(Json(
        functions
            .iter()
            .zip(usages)
            .map(|(function, usage)| status(&service, function, usage))
            .collect(),
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
    let functions = [function];
    let usages = usages(&service, &name.namespace, &functions).await;
    let usage = usages.into_iter().next().unwrap_or_default();
    Ok(Json(status(&service, &functions[0], usage)))
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

/// What each of a namespace's functions uses, by one request to containerd. Only answers about
/// functions ask for it; a call does not.
async fn usages(service: &Service, namespace: &str, functions: &[Arc<Function>]) -> Vec<Usage> {
    let sandboxes: Vec<Vec<String>> = functions
        .iter()
        .map(|function| {
            let instances = service.scheduler.instances(&function.name);
            instances.into_iter().map(|i| i.sandbox).collect()
        })
        .collect();
    let measured = match service.containerd.namespace(namespace) {
        Ok(containerd) => containerd.task_figures(&sandboxes.concat()).await,
        Err(err) => Err(err),
    };
    let measured = measured.unwrap_or_else(|err| {
        tracing::warn!(
            namespace,
            "What functions use is told as 0: {}",
            chain(&err)
        );
        HashMap::new()
    });
    functions
        .iter()
        .zip(sandboxes)
        .map(|(function, sandboxes)| {
            let mut usage = Usage::default();
            for sandbox in sandboxes {
                if let Some(figures) = measured.get(&sandbox) {
                    usage += service.meter.measure(&function.name, &sandbox, *figures);
                }
            }
            usage
        })
        .collect()
}

/// A function's status: OpenFaaS's fields, and what trenv knows besides.
fn status(service: &Service, function: &Function, usage: Usage) -> Value {
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
        "usage": { "cpu": usage.cpu_millis, "totalMemoryBytes": usage.memory_bytes },
        // A function that failed and is being built anew is on its way again.
        "status": match &view.state {
            RevisionState::Failed(_) if view.updating => RevisionState::Building.word(),
            state => state.word(),
        },
        "startMethod": match view.state {
            RevisionState::Cold(_) => "cold",
            _ => view.current.methods.now().name(),
        },
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
        let sets = service.metrics.working_sets_of(&function.name.to_string());
        let sets = sets.into_iter().map(|set| {
            let drift = share_outside(&set);
            let about = json!({
                "pages": set.pages,
                "rounds": set.rounds,
                "stable": set.stable,
                "drift": drift,
            });
            let name = match set.input.is_empty() {
                true => "unnamed".to_owned(),
                false => set.input,
            };
            (name, about)
        });
        status["workingSets"] = Value::Object(sets.collect());
        status["template"] = json!({
            "generation": template.generation,
            "imageBytes": template.image_bytes,
            "storedBytes": template.stored_bytes,
            "notes": template.notes,
            "base": template.base.as_ref().map(|base| &base.function),
        });
    }
    status
}
