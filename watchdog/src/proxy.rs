//! Mode `http`: calls go to the function's own HTTP server.
//!
//! Connections are used again while calls follow each other closely, and closed after
//! [`IDLE_LIMIT`] without one, so that a process tree about to be frozen has none.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::body::{BodyError, Reply, full};
use crate::settings::Upstream;

/// How long a connection may be without a call.
const IDLE_LIMIT: Duration = Duration::from_millis(20);

/// Why a call got no answer from the function.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("The function does not accept connections at {address}: {source}")]
    Connect {
        address: std::net::SocketAddr,
        source: std::io::Error,
    },
    #[error("The function broke off before it answered: {0}")]
    Exchange(hyper::Error),
    #[error("The call's body could not be read: {0}")]
    Input(hyper::Error),
    #[error("The call's path {0:?} cannot be passed on")]
    Path(String),
}

type Connection = SendRequest<Reply>;

/// The way to the function's server.
#[derive(Debug)]
pub struct Proxy {
    upstream: Upstream,
    idle: Rc<Idle>,
    ready: Cell<bool>,
    became_ready: Notify,
}

/// Connections without a call, the one used last at the end.
#[derive(Debug, Default)]
struct Idle {
    connections: RefCell<VecDeque<(Connection, Instant)>>,
    watched: Cell<bool>,
}

impl Proxy {
    pub fn new(upstream: Upstream) -> Self {
        Self {
            upstream,
            idle: Rc::default(),
            ready: Cell::new(false),
            became_ready: Notify::new(),
        }
    }

    /// Whether the function's server has accepted a connection yet.
    pub fn is_ready(&self) -> bool {
        self.ready.get()
    }

    /// Tries until the function's server accepts a connection.
    pub async fn wait_for_server(&self) {
        let mut pause = Duration::from_millis(1);
        while TcpStream::connect(self.upstream.address).await.is_err() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        self.ready.set(true);
        self.became_ready.notify_waiters();
    }

    /// Passes a call on and gives the function's answer, whose body follows as it comes.
    pub async fn call(
        &self,
        request: Request<Incoming>,
        buffer: bool,
    ) -> Result<Response<Reply>, ProxyError> {
        let (head, body) = request.into_parts();
        let body = if buffer {
            full(body.collect().await.map_err(ProxyError::Input)?.to_bytes())
        } else if body.is_end_stream() {
            full(Bytes::new())
        } else {
            Box::pin(body.map_err(Into::into))
        };
        let mut request = Request::from_parts(head, body);
        *request.uri_mut() = self.target(request.uri())?;
        *request.version_mut() = http::Version::HTTP_11;
        drop_connection_headers(request.headers_mut());
        if !request.headers().contains_key(HOST) {
            let host = HeaderValue::from_str(&self.upstream.address.to_string());
            let host = host.unwrap_or_else(|_| HeaderValue::from_static("localhost"));
            request.headers_mut().insert(HOST, host);
        }
        self.send(request).await
    }

    /// A GET without a caller, for the readiness check.
    pub async fn probe(&self, path: &str) -> Result<StatusCode, ProxyError> {
        let uri = path
            .parse()
            .map_err(|_| ProxyError::Path(path.to_owned()))?;
        let mut request = Request::new(full(Bytes::new()));
        *request.uri_mut() = self.target(&uri)?;
        let host = HeaderValue::from_static("localhost");
        request.headers_mut().insert(HOST, host);
        Ok(self.send(request).await?.status())
    }

    async fn send(&self, mut request: Request<Reply>) -> Result<Response<Reply>, ProxyError> {
        loop {
            let changed = self.became_ready.notified();
            if self.ready.get() {
                break;
            }
            changed.await;
        }
        // A connection used before may have been closed by the function meanwhile; what was not
        // sent comes back and is tried on the next.
        while let Some(mut connection) = self.idle.take() {
            if connection.ready().await.is_err() {
                continue;
            }
            match connection.try_send_request(request).await {
                Ok(response) => return Ok(self.reply(response, connection)),
                Err(mut e) => match e.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(ProxyError::Exchange(e.into_error())),
                },
            }
        }
        let mut connection = self.connect().await?;
        match connection.send_request(request).await {
            Ok(response) => Ok(self.reply(response, connection)),
            Err(e) => Err(ProxyError::Exchange(e)),
        }
    }

    async fn connect(&self) -> Result<Connection, ProxyError> {
        let address = self.upstream.address;
        let connected = TcpStream::connect(address).await;
        let stream = connected.map_err(|source| ProxyError::Connect { address, source })?;
        // Without it a body would wait for the acknowledgement of the head.
        let _ = stream.set_nodelay(true);
        let made = http1::handshake(TokioIo::new(stream)).await;
        let (connection, exchange) = made.map_err(ProxyError::Exchange)?;
        tokio::task::spawn_local(async move {
            // Its errors come out at the call.
            let _ = exchange.await;
        });
        Ok(connection)
    }

    fn reply(&self, response: Response<Incoming>, connection: Connection) -> Response<Reply> {
        let (mut head, body) = response.into_parts();
        drop_connection_headers(&mut head.headers);
        let body = UpstreamBody {
            body,
            connection: Some(connection),
            idle: Rc::downgrade(&self.idle),
        };
        Response::from_parts(head, Box::pin(body))
    }

    fn target(&self, uri: &Uri) -> Result<Uri, ProxyError> {
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        format!("{}{path}", self.upstream.base)
            .parse()
            .map_err(|_| ProxyError::Path(path.to_owned()))
    }
}

impl Idle {
    fn take(&self) -> Option<Connection> {
        let (connection, _) = self.connections.borrow_mut().pop_back()?;
        Some(connection)
    }

    fn put(self: &Rc<Self>, connection: Connection) {
        if connection.is_closed() {
            return;
        }
        let entry = (connection, Instant::now() + IDLE_LIMIT);
        self.connections.borrow_mut().push_back(entry);
        if !self.watched.replace(true) {
            tokio::task::spawn_local(Rc::clone(self).close_in_time());
        }
    }

    /// Closes connections as they fall due, until none is left.
    async fn close_in_time(self: Rc<Self>) {
        loop {
            let due = self.connections.borrow().front().map(|(_, due)| *due);
            let Some(due) = due else {
                self.watched.set(false);
                return;
            };
            tokio::time::sleep_until(due).await;
            let now = Instant::now();
            let mut connections = self.connections.borrow_mut();
            while connections.front().is_some_and(|(_, due)| *due <= now) {
                connections.pop_front();
            }
        }
    }
}

/// The function's answer; gives the connection back when it ends.
struct UpstreamBody {
    body: Incoming,
    connection: Option<Connection>,
    idle: Weak<Idle>,
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        polled.map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for UpstreamBody {
    fn drop(&mut self) {
        // A body left unread stays in the connection, which is then of no further use.
        if self.body.is_end_stream()
            && let (Some(connection), Some(idle)) = (self.connection.take(), self.idle.upgrade())
        {
            idle.put(connection);
        }
    }
}

/// Removes the headers that speak of one connection and not of the message.
fn drop_connection_headers(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    headers.remove("keep-alive");
    headers.remove("proxy-connection");
}
