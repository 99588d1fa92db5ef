//! Whether a function that has just been started can be called.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::functions::Variables;

const HEALTH_PATH: &str = "/_/health";
/// What a base answers with 200 once the function in its root is loaded.
pub const LOAD_PATH: &str = "/_/load";
/// Bytes of its reason when it cannot.
const MOST_SAID: usize = 4096;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);
/// How often a listener that accepts but does not answer HTTP is asked before it counts as ready.
const SILENT_TRIES: u32 = 3;

/// What a readiness check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// The check answered 200, or the function answered something else: it serves HTTP.
    Answers,
    /// It accepts connections, without an HTTP answer to the check.
    Accepts,
}

enum Probe {
    Refused,
    NotYet,
    Silent,
    Answer,
}

/// Asks until the function at `address` is ready or `timeout` is over.
///
/// # Errors
/// A sentence that says what was seen last.
pub async fn wait_ready(
    address: SocketAddr,
    path: Option<&str>,
    timeout: Duration,
) -> Result<Readiness, String> {
    let deadline = Instant::now() + timeout;
    let mut silent = 0;
    let mut seen = "nothing listened on its port 8080";
    while Instant::now() < deadline {
        match probe(address, path).await {
            Probe::Answer => return Ok(Readiness::Answers),
            Probe::Refused => {}
            Probe::NotYet => seen = "its health check kept answering that it was not ready",
            Probe::Silent => {
                silent += 1;
                seen = "it accepted connections without an answer";
                if silent >= SILENT_TRIES && path.is_none() {
                    return Ok(Readiness::Accepts);
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(format!(
        "it was not ready after {} s: {seen}; let it listen on 0.0.0.0:8080, or raise provider.ready_timeout_s",
        timeout.as_secs()
    ))
}

/// Has what was started from a base load the function that its root holds; returns when it has.
/// `variables` are for its environment.
///
/// # Errors
/// A sentence that says what the base answered.
pub async fn load(
    address: SocketAddr,
    variables: &Variables,
    limit: Duration,
) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    let seconds = limit.as_secs();
    let mut seen = "nothing listened on its port 8080".to_owned();
    while Instant::now() < deadline {
        let asked = tokio::time::timeout_at(deadline, ask_to_load(address, variables)).await;
        match asked {
            Ok(Some((StatusCode::OK, _))) => return Ok(()),
            Ok(Some((StatusCode::NOT_FOUND, _))) => {
                return Err(format!(
                    "its base does not know {LOAD_PATH}, by which it loads a function"
                ));
            }
            // A watchdog or a server that is not there yet.
            Ok(Some((status, _))) if status.as_u16() > 500 => {
                seen = format!("its base answered {status}");
            }
            Ok(Some((status, said))) => {
                return Err(format!(
                    "its base answered {status} when it was to load the function: {said}"
                ));
            }
            Ok(None) => {}
            Err(_) => seen = "its base did not answer".to_owned(),
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(format!(
        "it was not loaded after {seconds} s: {seen}; raise provider.ready_timeout_s"
    ))
}

async fn ask_to_load(address: SocketAddr, variables: &Variables) -> Option<(StatusCode, String)> {
    let stream = TcpStream::connect(address).await.ok()?;
    let request = match variables.is_empty() {
        true => request(Method::GET, address, LOAD_PATH, Body::empty())?,
        false => {
            let body = serde_json::json!({ "environment": variables }).to_string();
            let mut request = request(Method::POST, address, LOAD_PATH, body.into())?;
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(CONTENT_TYPE, json);
            request
        }
    };
    ask(stream, request, |answer| async move {
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MOST_SAID).collect().await;
        let said = body.map(|body| body.to_bytes()).unwrap_or_default();
        (status, String::from_utf8_lossy(&said).trim().to_owned())
    })
    .await
}

fn request(method: Method, address: SocketAddr, path: &str, body: Body) -> Option<Request<Body>> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", address.to_string())
        .header("connection", "close")
        .header("user-agent", "trenv-readiness")
        .body(body)
        .ok()
}

/// Asks over a connection of its own, which is closed when `read` has what it wants of the answer.
async fn ask<T, F: Future<Output = T>>(
    stream: TcpStream,
    request: Request<Body>,
    read: impl FnOnce(Response<Incoming>) -> F,
) -> Option<T> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .ok()?;
    // Both run here, so that the connection is closed when the check is over.
    let (answer, _) = futures::join!(
        async move {
            let answer = sender.send_request(request).await.ok()?;
            Some(read(answer).await)
        },
        connection
    );
    answer
}

async fn probe(address: SocketAddr, path: Option<&str>) -> Probe {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let Ok(Ok(stream)) = connected else {
        return Probe::Refused;
    };
    let Some(request) = request(
        Method::GET,
        address,
        path.unwrap_or(HEALTH_PATH),
        Body::empty(),
    ) else {
        return Probe::Silent;
    };
    let asked = ask(stream, request, |answer| async move { answer.status() });
    match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
        Ok(Some(StatusCode::OK)) => Probe::Answer,
        // A watchdog that is starting says so; a path named by the user must answer 200.
        Ok(Some(StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS)) => Probe::NotYet,
        Ok(Some(_)) if path.is_some() => Probe::NotYet,
        Ok(Some(_)) => Probe::Answer,
        Ok(None) | Err(_) => Probe::Silent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn serve(answers: Vec<&'static str>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            for n in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let answer = answers[n.min(answers.len() - 1)];
                let mut buffer = [0; 1024];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        address
    }

    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const BUSY: &str = "HTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    const MISSING: &str = "HTTP/1.1 404 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

    #[tokio::test]
    async fn a_watchdog_is_waited_for() {
        let address = serve(vec![BUSY, BUSY, OK]).await;
        let ready = wait_ready(address, None, Duration::from_secs(5)).await;
        assert_eq!(ready, Ok(Readiness::Answers));
    }

    #[tokio::test]
    async fn a_server_without_a_health_check_is_ready_when_it_answers() {
        let address = serve(vec![MISSING]).await;
        let ready = wait_ready(address, None, Duration::from_secs(5)).await;
        assert_eq!(ready, Ok(Readiness::Answers));
        let named = wait_ready(address, Some("/ready"), Duration::from_millis(100)).await;
        assert!(named.is_err());
    }

    #[tokio::test]
    async fn a_base_loads_a_function_or_says_why_not() {
        const BROKEN: &str =
            "HTTP/1.1 500 No\r\ncontent-length: 9\r\nconnection: close\r\n\r\nNameError";
        let limit = Duration::from_secs(5);
        let address = serve(vec![BUSY, OK]).await;
        assert_eq!(load(address, &Variables::new(), limit).await, Ok(()));
        let address = serve(vec![BROKEN]).await;
        assert!(
            load(address, &Variables::new(), limit)
                .await
                .unwrap_err()
                .contains("NameError")
        );
        let address = serve(vec![MISSING]).await;
        assert!(
            load(address, &Variables::new(), limit)
                .await
                .unwrap_err()
                .contains(LOAD_PATH)
        );
    }

    #[tokio::test]
    async fn a_closed_port_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let ready = wait_ready(address, None, Duration::from_millis(50)).await;
        assert!(ready.unwrap_err().contains("port 8080"));
    }
}
