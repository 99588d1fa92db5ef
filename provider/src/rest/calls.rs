//! `/function/{name}[.namespace][/path]`: the calls of functions.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue};

use super::Service;
use crate::error::ApiError;
use crate::functions::{Function, FunctionName};
use crate::instances::LOAD_PATH;
use crate::proxy::status_of;

const PREFIX: &str = "/function/";
const CALL_ID: HeaderName = HeaderName::from_static("x-call-id");
const START_TIME: HeaderName = HeaderName::from_static("x-start-time");

pub(super) async fn call(State(service): State<Arc<Service>>, mut request: Request) -> Response {
    let begun = Instant::now();
    let (name, rest) = split(request.uri().path());
    let Some(function) = find(&service, name) else {
        return ApiError::not_found(format!(
            "There is no function {name}; deploy it, or look at /system/functions"
        ))
        .into_response();
    };
    // Of the provider alone: it says what the function's environment is.
    if rest == LOAD_PATH && function.current().record.base.is_some() {
        return ApiError::not_found(format!(
            "{LOAD_PATH} of {name} is not for callers: its base is asked once, when it is deployed"
        ))
        .into_response();
    }
    let target = match request.uri().query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest.to_owned(),
    };
    let (id, started) = identify(&mut request);
    let label = function.name.to_string();
    service.metrics.call_started(&label);
    if function.count_call() {
        service.functions.woken(&function);
    }
    let answer = service
        .proxy
        .call(&function.current(), request, &target)
        .await;
    let status = status_of(&answer).as_u16();
    service.metrics.call(&label, status, begun.elapsed());
    let mut response = answer.into_response();
    let headers = response.headers_mut();
    headers.insert(CALL_ID, id);
    headers.insert(START_TIME, started);
    headers
        .entry("x-duration-seconds")
        .or_insert_with(|| duration(begun));
    response
}

/// `/function/NAME/path` into the name and the path that the function sees.
fn split(path: &str) -> (&str, &str) {
    let rest = path.strip_prefix(PREFIX).unwrap_or(path);
    match rest.find('/') {
        Some(slash) => rest.split_at(slash),
        None => (rest, "/"),
    }
}

fn find(service: &Service, name: &str) -> Option<Arc<Function>> {
    let (name, namespace) = match name.rsplit_once('.') {
        Some((name, namespace)) => (name, namespace),
        None => (name, service.namespace.as_str()),
    };
    service.functions.get(&FunctionName {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

/// Gives the call an id and a time, which function and client both see.
fn identify(request: &mut Request) -> (HeaderValue, HeaderValue) {
    let headers = request.headers_mut();
    let id = headers
        .entry(CALL_ID)
        .or_insert_with(|| {
            HeaderValue::try_from(uuid::Uuid::new_v4().to_string())
                .unwrap_or(HeaderValue::from_static("0"))
        })
        .clone();
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos());
    let started = HeaderValue::try_from(nanos.to_string()).unwrap_or(HeaderValue::from_static("0"));
    headers.insert(START_TIME, started.clone());
    (id, started)
}

fn duration(begun: Instant) -> HeaderValue {
    HeaderValue::try_from(format!("{:.6}", begun.elapsed().as_secs_f64()))
        .unwrap_or(HeaderValue::from_static("0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_split_at_the_name() {
        assert_eq!(split("/function/a"), ("a", "/"));
        assert_eq!(split("/function/a/"), ("a", "/"));
        assert_eq!(split("/function/a.ns/b/c%20d"), ("a.ns", "/b/c%20d"));
    }
}
