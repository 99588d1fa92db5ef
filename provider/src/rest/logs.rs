//! `/system/logs`: what functions say.
use super::Service;
use crate::error::ApiError;
use axum::extract::State;
use std::sync::Arc;

pub(super) async fn logs(State(service): State<Arc<Service>>) -> Result<String, ApiError> {
    Err(ApiError::not_found(format!(
        "There are no logs in {}",
        service.logs.display()
    )))
}
