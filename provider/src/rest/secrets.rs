//! `/system/secrets`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{NamespaceQuery, Service, read_json};
use crate::error::{ApiError, chain};
use crate::functions::check_name;
use crate::secrets::{MAX_SECRET, SecretError};

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct SecretBody {
    name: String,
    namespace: String,
    value: Option<String>,
    raw_value: Option<String>,
}

pub(super) async fn list(
    State(service): State<Arc<Service>>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<Value>>, ApiError> {
    let namespace = service.namespace(&query.namespace).await?;
    let names = service.secrets.list(&namespace).map_err(|e| failed(&e))?;
    let shown = names
        .into_iter()
        .map(|name| json!({ "name": name, "namespace": namespace }));
    Ok(Json(shown.collect()))
}

pub(super) async fn create(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let (namespace, body) = read(&service, &body).await?;
    let existed = service.secrets.exists(&namespace, &body.name);
    write(&service, &namespace, &body, existed).await?;
    Ok(StatusCode::CREATED)
}

pub(super) async fn update(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let (namespace, body) = read(&service, &body).await?;
    if !service.secrets.exists(&namespace, &body.name) {
        return Err(unknown(&body.name));
    }
    write(&service, &namespace, &body, true).await?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn remove(
    State(service): State<Arc<Service>>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let (namespace, body) = read(&service, &body).await?;
    let user = service
        .functions
        .list(Some(&namespace))
        .into_iter()
        .find(|f| {
            let deployment = f.view().deployment;
            deployment.secrets.contains(&body.name)
        });
    if let Some(user) = user {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            format!(
                "The function {} uses the secret {}; remove the function first",
                user.name, body.name
            ),
        ));
    }
    match service.secrets.remove(&namespace, &body.name) {
        Ok(true) => Ok(StatusCode::ACCEPTED),
        Ok(false) => Err(unknown(&body.name)),
        Err(err) => Err(failed(&err)),
    }
}

async fn read(service: &Service, body: &Bytes) -> Result<(String, SecretBody), ApiError> {
    let body: SecretBody = read_json(body)?;
    check_name("secret", &body.name).map_err(ApiError::bad_request)?;
    let namespace = service.namespace(&body.namespace).await?;
    Ok((namespace, body))
}

async fn write(
    service: &Service,
    namespace: &str,
    body: &SecretBody,
    existed: bool,
) -> Result<(), ApiError> {
    let value = match (&body.raw_value, &body.value) {
        (Some(raw), _) => STANDARD
            .decode(raw)
            .map_err(|err| ApiError::bad_request(format!("\"rawValue\" is not base64: {err}")))?,
        (None, Some(value)) => value.clone().into_bytes(),
        (None, None) => {
            return Err(ApiError::bad_request(
                "The secret has no value; set \"value\" or \"rawValue\"",
            ));
        }
    };
    if value.len() > MAX_SECRET {
        return Err(ApiError::bad_request(format!(
            "The secret has {} bytes, but may have {MAX_SECRET}; make it smaller",
            value.len()
        )));
    }
    let written = service.secrets.put(namespace, &body.name, &value);
    written.map_err(|err| failed(&err))?;
    if existed {
        service
            .functions
            .secret_changed(namespace, &body.name)
            .await;
    }
    Ok(())
}

fn unknown(name: &str) -> ApiError {
    ApiError::not_found(format!(
        "There is no secret {name}; create it with POST /system/secrets"
    ))
}

fn failed(err: &SecretError) -> ApiError {
    ApiError::internal(chain(err))
}
