//! A call's way to its instance and back: bodies stream both ways, and the hold on the instance
//! ends with the reply's last byte.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use bytes::Bytes;
use futures::FutureExt;
use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use tokio_util::sync::CancellationToken;

use crate::connection::{connect, describe};
use crate::error::ApiError;
use crate::functions::Revision;
use crate::instances::{Connection, Guard, Scheduler, StartError};

/// How long a connection to a function may lie idle and still be used. Servers close idle
/// connections after 5 s and more; well before that a reuse cannot meet the close.
const CONNECTION_AGE: Duration = Duration::from_secs(3);
/// How often a call that has not been sent is given to another instance.
const RETRIES: u32 = 5;
/// The header by which a caller names the kind of input, and the longest name.
const INPUT: HeaderName = HeaderName::from_static("x-trenv-input");
const INPUT_LONGEST: usize = 64;
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Headers that belong to one connection, not to the call.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Calls functions.
#[derive(Debug)]
pub struct Proxy {
    scheduler: Arc<Scheduler>,
    timeout: Duration,
}

/// What became of one try.
enum Failure {
    /// Nothing of the call has reached the function: another instance may take it.
    Unsent(Box<Request<Body>>, String),
    Answer(ApiError),
}

/// What became of one sending.
enum Sent {
    Answer(Box<Response<Incoming>>),
    /// Nothing was sent.
    Back(Box<Request<Body>>, String),
    Broken(String),
    Late,
    Gone,
}

impl Proxy {
    /// A proxy whose calls may take `timeout`.
    pub fn new(scheduler: Arc<Scheduler>, timeout: Duration) -> Self {
        Self { scheduler, timeout }
    }

    /// Forwards `request` to an instance of `revision`, as `path_and_query`.
    ///
    /// # Errors
    /// When no instance answers in time.
    pub async fn call(
        &self,
        revision: &Arc<Revision>,
        request: Request<Body>,
        path_and_query: &str,
    ) -> Result<Response<Body>, ApiError> {
        let begun = Instant::now();
        let input = input_of(request.headers())?;
        let mut request = outgoing(request, path_and_query)?;
        let mut tries = 0;
        loop {
            let guard = self
                .scheduler
                .acquire(revision, &input)
                .await
                .map_err(|err| start_error(&err))?;
            let started = started_headers(&guard);
            match self.forward(guard, request, &input, begun).await {
                Ok(mut response) => {
                    response.headers_mut().extend(started);
                    return Ok(response);
                }
                Err(Failure::Unsent(unsent, reason)) if tries < RETRIES => {
                    tries += 1;
                    tracing::warn!(
                        "An instance of {} was found dead ({reason}); another one takes the call",
                        revision.function()
                    );
                    request = *unsent;
                    // Where one is dead others may be, and the news of it on its way.
                    tokio::time::sleep(RETRY_PAUSE * tries).await;
                }
                Err(Failure::Unsent(_, reason)) => {
                    return Err(ApiError::bad_gateway(format!(
                        "The function {} does not accept calls: {reason}; look at its logs",
                        revision.function()
                    )));
                }
                Err(Failure::Answer(mut err)) => {
                    err.headers = Box::new(started);
                    return Err(err);
                }
            }
        }
    }

    async fn forward(
        &self,
        mut guard: Guard,
        request: Request<Body>,
        input: &str,
        begun: Instant,
    ) -> Result<Response<Body>, Failure> {
        guard.mark_called(input);
        let gone = guard.gone.clone();
        let deadline = tokio::time::Instant::from(begun + self.timeout);
        let mut request = request;
        if let Some(mut sender) = reuse(&mut guard).await {
            match send(&mut sender, request, deadline, &gone).await {
                // The function closed the connection while it lay idle; it may be well.
                Sent::Back(back, _) => request = *back,
                sent => return self.settle(guard, sender, sent, begun),
            }
        }
        match connect(guard.address, &guard.gone).await {
            Ok(mut sender) => {
                let sent = send(&mut sender, request, deadline, &gone).await;
                self.settle(guard, sender, sent, begun)
            }
            Err(reason) => {
                guard.mark_broken();
                Err(Failure::Unsent(Box::new(request), reason))
            }
        }
    }

    fn settle(
        &self,
        mut guard: Guard,
        sender: SendRequest<Body>,
        sent: Sent,
        begun: Instant,
    ) -> Result<Response<Body>, Failure> {
        if let Sent::Answer(response) = sent {
            return Ok(self.reply(guard, sender, *response, begun));
        }
        // Whatever it is busy with, it cannot be trusted to serve the next call.
        guard.mark_broken();
        Err(match sent {
            Sent::Back(request, reason) => Failure::Unsent(request, reason),
            Sent::Broken(reason) => Failure::Answer(ApiError::bad_gateway(format!(
                "The function ended the connection without an answer: {reason}; look at its logs"
            ))),
            Sent::Late => Failure::Answer(ApiError::gateway_timeout(format!(
                "The function did not answer within {} s; raise provider.call_timeout_s if it needs longer",
                self.timeout.as_secs()
            ))),
            Sent::Gone | Sent::Answer(_) => Failure::Answer(died()),
        })
    }

    fn reply(
        &self,
        guard: Guard,
        sender: SendRequest<Body>,
        response: Response<Incoming>,
        begun: Instant,
    ) -> Response<Body> {
        let (mut head, body) = response.into_parts();
        let keep = keeps_connection(&head.headers, head.version);
        remove_hop_by_hop(&mut head.headers);
        let seconds = format!("{:.6}", begun.elapsed().as_secs_f64());
        if let Ok(value) = HeaderValue::try_from(seconds) {
            head.headers.insert("x-duration-seconds", value);
        }
        let gone = guard.gone.clone();
        let body = ReplyBody {
            body,
            ended: false,
            keep,
            hold: Some((guard, sender)),
            gone: gone.clone(),
            watch: Box::pin(gone.cancelled_owned()),
            deadline: Box::pin(tokio::time::sleep_until((begun + self.timeout).into())),
        };
        Response::from_parts(head, Body::new(body))
    }
}

/// Sends the call over a connection.
async fn send(
    sender: &mut SendRequest<Body>,
    request: Request<Body>,
    deadline: tokio::time::Instant,
    gone: &CancellationToken,
) -> Sent {
    let sent = tokio::select! {
        sent = tokio::time::timeout_at(deadline, sender.try_send_request(request)) => sent,
        () = gone.cancelled() => return Sent::Gone,
    };
    match sent {
        Ok(Ok(response)) => Sent::Answer(Box::new(response)),
        Ok(Err(mut err)) => match err.take_message() {
            Some(request) => Sent::Back(Box::new(request), describe(&err.into_error())),
            None => Sent::Broken(describe(&err.into_error())),
        },
        Err(_) => Sent::Late,
    }
}

/// An earlier call's connection, if it still stands.
async fn reuse(guard: &mut Guard) -> Option<SendRequest<Body>> {
    let mut connection = guard.take_connection()?;
    if connection.idle_since.elapsed() > CONNECTION_AGE || connection.sender.is_closed() {
        return None;
    }
    // It becomes ready when the connection's task has seen the last reply's end.
    let ready = tokio::time::timeout(Duration::from_millis(50), connection.sender.ready()).await;
    matches!(ready, Ok(Ok(()))).then_some(connection.sender)
}

fn outgoing(request: Request<Body>, path_and_query: &str) -> Result<Request<Body>, ApiError> {
    let (mut head, body) = request.into_parts();
    head.uri = Uri::builder()
        .path_and_query(path_and_query)
        .build()
        .map_err(|err| {
            ApiError::bad_request(format!("The path of the call is not valid: {err}"))
        })?;
    head.version = Version::HTTP_11;
    remove_hop_by_hop(&mut head.headers);
    if let Some(host) = head.headers.get(HOST).cloned() {
        head.headers
            .entry(HeaderName::from_static("x-forwarded-host"))
            .or_insert(host);
    } else {
        head.headers
            .insert(HOST, HeaderValue::from_static("function"));
    }
    Ok(Request::from_parts(head, body))
}

/// What the caller says that the call is about, so that the pages it needs are known by it.
fn input_of(headers: &HeaderMap) -> Result<String, ApiError> {
    let Some(value) = headers.get(INPUT) else {
        return Ok(String::new());
    };
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    match value.to_str() {
        Ok(name) if name.len() <= INPUT_LONGEST && name.as_bytes().iter().all(allowed) => {
            Ok(name.to_owned())
        }
        _ => Err(ApiError::bad_request(format!(
            "X-Trenv-Input names the call's kind of input by at most {INPUT_LONGEST} letters, digits, '.', '_' and '-'"
        ))),
    }
}

fn started_headers(guard: &Guard) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("x-trenv-start", HeaderValue::from_static(guard.kind.word()));
    if let Ok(id) = HeaderValue::try_from(&guard.sandbox.id) {
        headers.insert("x-trenv-instance", id);
    }
    if !guard.steps.is_empty() {
        // A step that was taken twice (once to evict, once to start) counts with both times.
        let mut steps = serde_json::Map::new();
        for (name, micros) in &guard.steps {
            let before = steps.get(name).and_then(serde_json::Value::as_u64);
            steps.insert(name.clone(), (before.unwrap_or(0) + micros).into());
        }
        if let Ok(value) = HeaderValue::try_from(serde_json::Value::from(steps).to_string()) {
            headers.insert("x-trenv-steps", value);
        }
    }
    headers
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::try_from(name.trim()).ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Whether the server lets the connection be used again.
fn keeps_connection(headers: &HeaderMap, version: Version) -> bool {
    let close = headers
        .get(CONNECTION)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| v.to_ascii_lowercase().contains("close"));
    version == Version::HTTP_11 && !close
}

fn start_error(err: &StartError) -> ApiError {
    let message = err.to_string();
    match err {
        StartError::Removed { .. } => ApiError::not_found(message),
        StartError::Start { .. } | StartError::ShimGone { .. } => ApiError::bad_gateway(message),
        StartError::Failed { .. }
        | StartError::Building { .. }
        | StartError::Busy { .. }
        | StartError::TemplateGone { .. }
        | StartError::Stopping => ApiError::unavailable(message),
    }
}

fn died() -> ApiError {
    ApiError::bad_gateway(
        "The function's sandbox ended during the call; call again, and look at the function's logs"
            .to_owned(),
    )
}

/// A reply's body, which holds the instance until its end.
struct ReplyBody {
    body: Incoming,
    ended: bool,
    keep: bool,
    hold: Option<(Guard, SendRequest<Body>)>,
    gone: CancellationToken,
    watch: Pin<Box<tokio_util::sync::WaitForCancellationFutureOwned>>,
    deadline: Pin<Box<tokio::time::Sleep>>,
}

impl ReplyBody {
    fn end(&mut self, clean: bool) {
        let Some((mut guard, sender)) = self.hold.take() else {
            return;
        };
        if clean && self.keep {
            guard.keep_connection(Connection {
                sender,
                idle_since: Instant::now(),
            });
        }
    }

    fn fail(&mut self, reason: &str) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some((guard, _)) = &mut self.hold {
            guard.mark_broken();
        }
        self.end(false);
        self.ended = true;
        Poll::Ready(Some(Err(axum::Error::new(reason.to_owned()))))
    }
}

impl HttpBody for ReplyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if this.body.is_end_stream() {
                    this.ended = true;
                    this.end(true);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(err))) => {
                let reason = describe(&err);
                this.fail(&reason)
            }
            Poll::Ready(None) => {
                this.ended = true;
                this.end(true);
                Poll::Ready(None)
            }
            Poll::Pending => {
                if this.gone.is_cancelled() || this.watch.poll_unpin(cx).is_ready() {
                    return this.fail("The function's sandbox ended during the reply");
                }
                if this.deadline.poll_unpin(cx).is_ready() {
                    return this.fail("The reply took longer than a call may take");
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ReplyBody {
    fn drop(&mut self) {
        let clean = self.ended || self.body.is_end_stream();
        self.end(clean);
    }
}

/// The status that a failed call counts as.
pub fn status_of(answer: &Result<Response<Body>, ApiError>) -> StatusCode {
    match answer {
        Ok(response) => response.status(),
        Err(err) => err.status,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_connection_are_not_passed_on() {
        let request = Request::post("/function/a/b?c=d")
            .header("host", "gateway")
            .header("connection", "keep-alive, x-mine")
            .header("x-mine", "1")
            .header("transfer-encoding", "chunked")
            .header("x-other", "2")
            .body(Body::empty())
            .unwrap();
        let out = outgoing(request, "/b?c=d").unwrap();
        assert_eq!(out.uri().to_string(), "/b?c=d");
        assert!(out.headers().get("x-mine").is_none());
        assert!(out.headers().get("transfer-encoding").is_none());
        assert_eq!(out.headers()["x-other"], "2");
        assert_eq!(out.headers()["x-forwarded-host"], "gateway");
    }

    #[test]
    fn old_servers_and_closing_ones_are_not_reused() {
        let mut headers = HeaderMap::new();
        assert!(keeps_connection(&headers, Version::HTTP_11));
        assert!(!keeps_connection(&headers, Version::HTTP_10));
        headers.insert(CONNECTION, HeaderValue::from_static("Close"));
        assert!(!keeps_connection(&headers, Version::HTTP_11));
    }
}
