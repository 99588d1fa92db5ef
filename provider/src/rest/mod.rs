//! The REST interface of OpenFaaS.

mod calls;
mod functions;
mod info;
mod logs;
mod namespaces;
mod secrets;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use bytes::Bytes;
use http::header::WWW_AUTHENTICATE;
use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::auth::BasicAuth;
use crate::containerd::Containerd;
use crate::error::ApiError;
use crate::functions::{FunctionName, Functions, check_name};
use crate::instances::Scheduler;
use crate::logs::Logs;
use crate::metrics::Metrics;
use crate::proxy::Proxy;
use crate::secrets::Secrets;
use crate::usage::Meter;

/// Everything that a request may need.
#[derive(Debug)]
pub struct Service {
    pub functions: Arc<Functions>,
    pub scheduler: Arc<Scheduler>,
    pub proxy: Proxy,
    pub metrics: Arc<Metrics>,
    pub meter: Meter,
    pub secrets: Arc<Secrets>,
    pub containerd: Containerd,
    pub auth: Option<BasicAuth>,
    /// Namespace of requests that name none.
    pub namespace: String,
    pub logs: Logs,
}

/// `?namespace=`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct NamespaceQuery {
    #[serde(default)]
    pub namespace: String,
}

/// All routes.
pub fn router(service: Arc<Service>) -> Router {
    let system = Router::new()
        .route(
            "/system/functions",
            get(functions::list)
                .post(functions::deploy)
                .put(functions::update)
                .delete(functions::remove),
        )
        .route("/system/function/{name}", get(functions::describe))
        .route("/system/scale-function/{name}", post(functions::scale))
        .route("/system/info", get(info::info))
        .route(
            "/system/secrets",
            get(secrets::list)
                .post(secrets::create)
                .put(secrets::update)
                .delete(secrets::remove),
        )
        .route("/system/namespaces", get(namespaces::list))
        .route(
            "/system/namespace/{name}",
            get(namespaces::describe)
                .post(namespaces::create)
                .put(namespaces::update)
                .delete(namespaces::remove),
        )
        .route("/system/logs", get(logs::logs))
        .route_layer(from_fn_with_state(Arc::clone(&service), authenticate));
    Router::new()
        .merge(system)
        .route("/function/{name}", any(calls::call))
        .route("/function/{name}/", any(calls::call))
        .route("/function/{name}/{*path}", any(calls::call))
        .route("/healthz", get(info::health))
        .route("/metrics", get(info::metrics))
        .fallback(unknown)
        .with_state(service)
}

async fn unknown(request: Request) -> ApiError {
    ApiError::not_found(format!(
        "There is nothing at {}; functions are at /function/NAME",
        request.uri().path()
    ))
}

async fn authenticate(
    State(service): State<Arc<Service>>,
    request: Request,
    next: Next,
) -> Response {
    match &service.auth {
        Some(auth) if !auth.allows(request.headers()) => {
            let mut err = ApiError::new(
                StatusCode::UNAUTHORIZED,
                "This needs the gateway's user and password; send them by basic authentication",
            );
            err.headers.insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"trenv\""),
            );
            err.into_response()
        }
        _ => next.run(request).await,
    }
}

impl Service {
    /// The namespace that a request names, else the default; refused when it is not one for
    /// functions.
    pub(crate) async fn namespace(&self, named: &str) -> Result<String, ApiError> {
        if named.is_empty() || named == self.namespace {
            return Ok(self.namespace.clone());
        }
        check_name("namespace", named).map_err(ApiError::bad_request)?;
        let all = self
            .containerd
            .namespaces()
            .await
            .map_err(|err| ApiError::internal(crate::error::chain(&err)))?;
        match all.iter().any(|(name, marked)| name == named && *marked) {
            true => Ok(named.to_owned()),
            false => Err(ApiError::bad_request(format!(
                "The namespace {named} is not one for functions; make it with POST /system/namespace/{named}"
            ))),
        }
    }

    pub(crate) async fn function_name(
        &self,
        name: &str,
        namespace: &str,
    ) -> Result<FunctionName, ApiError> {
        Ok(FunctionName {
            namespace: self.namespace(namespace).await?,
            name: name.to_owned(),
        })
    }
}

/// Reads a body as JSON.
pub(crate) fn read_json<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    if body.is_empty() {
        return Err(ApiError::bad_request(
            "The request has no body; send a JSON object",
        ));
    }
    serde_json::from_slice(body)
        .map_err(|err| ApiError::bad_request(format!("The body is not the JSON expected: {err}")))
}
