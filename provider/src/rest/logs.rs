//! `/system/logs`: what functions say, one JSON object per line.

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use serde::Deserialize;

use super::Service;
use crate::error::ApiError;
use crate::functions::FunctionName;
use crate::instances::SandboxRef;
use crate::logs::{Line, Logs, split};
use crate::time::parse_rfc3339;

const FOLLOW_PAUSE: Duration = Duration::from_millis(200);
/// Read of one sandbox at a time while following.
const CHUNK: u64 = 64 << 10;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LogQuery {
    name: String,
    namespace: String,
    instance: String,
    since: String,
    tail: Option<i64>,
    follow: Option<String>,
}

pub(super) async fn logs(
    State(service): State<Arc<Service>>,
    Query(query): Query<LogQuery>,
) -> Result<Response, ApiError> {
    if query.name.is_empty() {
        return Err(ApiError::bad_request(
            "The query names no function; add ?name=NAME",
        ));
    }
    let name = service.function_name(&query.name, &query.namespace).await?;
    if service.functions.get(&name).is_none() {
        return Err(ApiError::not_found(format!(
            "There is no function {name}; deploy it first"
        )));
    }
    let since = match query.since.as_str() {
        "" => 0,
        text => parse_rfc3339(text).ok_or_else(|| {
            ApiError::bad_request(format!(
                "\"since\" is {text:?}; write it like 2026-01-02T03:04:05Z"
            ))
        })?,
    };
    let mut follower = Follower::new(&service, &name, &query.instance);
    let mut lines = service.logs.past(&name.namespace, &name.name);
    lines.extend(follower.present());
    lines.retain(|line| {
        line.seconds >= since && (query.instance.is_empty() || line.instance == query.instance)
    });
    if let Some(tail) = query.tail.and_then(|n| usize::try_from(n).ok()) {
        lines.drain(..lines.len().saturating_sub(tail));
    }
    let first = render(&lines);
    let follow = matches!(query.follow.as_deref(), Some("" | "1" | "true"));
    let body = match follow {
        false => Body::from(first),
        true => {
            let stream = futures::stream::unfold(
                (follower, Some(first)),
                |(mut follower, first)| async move {
                    let text = match first {
                        Some(first) => first,
                        None => follower.next().await,
                    };
                    Some((Ok::<_, std::convert::Infallible>(text), (follower, None)))
                },
            );
            Body::from_stream(stream)
        }
    };
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn render(lines: &[Line]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        // A line holds strings only, for which writing JSON cannot fail.
        text.push_str(&serde_json::to_string(line).unwrap_or_default());
        text.push('\n');
    }
    text.into()
}

/// Reads what the instances of a function add to their files.
struct Follower {
    service: Arc<Service>,
    logs: Logs,
    name: FunctionName,
    instance: String,
    /// How far each sandbox's file has been read.
    read: HashMap<String, u64>,
}

impl Follower {
    fn new(service: &Arc<Service>, name: &FunctionName, instance: &str) -> Self {
        Self {
            service: Arc::clone(service),
            logs: service.logs.clone(),
            name: name.clone(),
            instance: instance.to_owned(),
            read: HashMap::new(),
        }
    }

    fn sandboxes(&self) -> Vec<SandboxRef> {
        let instances = self.service.scheduler.instances(&self.name);
        instances
            .into_iter()
            .map(|i| SandboxRef {
                namespace: self.name.namespace.clone(),
                id: i.sandbox,
            })
            .filter(|s| self.instance.is_empty() || s.id == self.instance)
            .collect()
    }

    fn present(&mut self) -> Vec<Line> {
        let mut lines = Vec::new();
        for sandbox in self.sandboxes() {
            let length = std::fs::metadata(self.logs.live(&sandbox)).map_or(0, |m| m.len());
            lines.extend(self.logs.present(&sandbox, &self.name.name));
            self.read.insert(sandbox.id, length);
        }
        lines
    }

    /// The next lines; waits until there are some.
    async fn next(&mut self) -> Bytes {
        loop {
            tokio::time::sleep(FOLLOW_PAUSE).await;
            let mut lines = Vec::new();
            for sandbox in self.sandboxes() {
                let from = self.read.entry(sandbox.id.clone()).or_default();
                // A file that cannot be read now is read at the next round.
                let added = read_added(&self.logs, &sandbox, from).unwrap_or_default();
                lines.extend(split(
                    &added,
                    now(),
                    &sandbox.namespace,
                    &self.name.name,
                    &sandbox.id,
                ));
            }
            if !lines.is_empty() {
                return render(&lines);
            }
        }
    }
}

/// Whole lines that were added to a file since it was read up to `from`.
fn read_added(logs: &Logs, sandbox: &SandboxRef, from: &mut u64) -> std::io::Result<Vec<u8>> {
    let mut file = std::fs::File::open(logs.live(sandbox))?;
    if file.metadata()?.len() < *from {
        *from = 0;
    }
    file.seek(SeekFrom::Start(*from))?;
    let mut bytes = Vec::new();
    file.take(CHUNK).read_to_end(&mut bytes)?;
    let full = bytes.len() as u64 == CHUNK;
    let whole = bytes
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |at| at + 1);
    // A line longer than a chunk is passed on in pieces.
    if whole > 0 || !full {
        bytes.truncate(whole);
    }
    *from += bytes.len() as u64;
    Ok(bytes)
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
