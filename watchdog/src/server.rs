//! Taking calls: health, readiness, limits, metrics, and the way down.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Context;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use nix::unistd::Pid;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

use crate::body::{Call, CallBody, Reply, full};
use crate::children::{Children, terminate};
use crate::files;
use crate::fork::Forks;
use crate::logs::{self, Stream};
use crate::metrics::Metrics;
use crate::proxy::{Proxy, ProxyError};
use crate::settings::{Mode, Settings};

/// How long the function's server gets to end after SIGTERM.
const TERMINATION: Duration = Duration::from_secs(5);
/// Within which a server that broke off because it was killed is seen to have ended.
const ENDED_SEEN: Duration = Duration::from_millis(100);
/// How long answers may take that are still under way when the function's server has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Server {
    settings: Rc<Settings>,
    backend: Backend,
    metrics: Rc<Metrics>,
    /// Told when the last call under way ends.
    idle: Rc<Notify>,
    /// Whether the way down has begun.
    closing: watch::Sender<Stage>,
    lock_file: PathBuf,
}

#[derive(Debug)]
enum Backend {
    Http(Proxy),
    Forks(Forks),
    Files(PathBuf),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    Serving,
    /// Health says no; calls are still taken.
    Unhealthy,
    /// No call is taken; those under way are finished.
    Draining,
    /// Nobody can connect any more.
    Closed,
}

/// Serves until SIGTERM, or until the function's server exits; gives the status to exit with.
pub async fn serve(settings: Rc<Settings>) -> anyhow::Result<u8> {
    let listen = async |port: u16| {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await;
        listener.with_context(|| format!("Failed to listen on port {port}"))
    };
    let listener = listen(settings.port).await?;
    let metrics_listener = listen(settings.metrics_port).await?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;

    let children = Rc::new(Children::default());
    let mut function: Option<Pid> = None;
    let backend = match &settings.mode {
        Mode::Http(upstream) => {
            function = Some(start_function(&settings, &children)?);
            Backend::Http(Proxy::new(upstream.clone()))
        }
        Mode::Static(root) => Backend::Files(root.clone()),
        _ => Backend::Forks(Forks {
            settings: Rc::clone(&settings),
            children: Rc::clone(&children),
        }),
    };
    let server = Rc::new(Server {
        backend,
        metrics: Rc::default(),
        idle: Rc::default(),
        closing: watch::Sender::new(Stage::Serving),
        lock_file: std::env::temp_dir().join(".lock"),
        settings: Rc::clone(&settings),
    });
    tokio::task::spawn_local({
        let children = Rc::clone(&children);
        async move { children.reap().await }
    });
    tokio::task::spawn_local(Rc::clone(&server).accept(listener));
    tokio::task::spawn_local(Rc::clone(&server).accept_metrics(metrics_listener));
    logs::line(&format!(
        "Watchdog mode: {}, function: {:?}, port: {}",
        settings.mode.name(),
        settings.process.join(" "),
        settings.port
    ));

    let exit = async {
        match function {
            Some(pid) => children.exit_of(pid).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(exit);
    let ready = server.become_ready();
    tokio::pin!(ready);
    let mut is_ready = false;
    loop {
        tokio::select! {
            status = &mut exit => {
                logs::line(&format!("The function's server ended with {status}"));
                server.remove_lock_file();
                server.closing.send_replace(Stage::Draining);
                let _ = tokio::time::timeout(LAST_ANSWERS, server.all_answered()).await;
                return Ok(exit_code(status));
            }
            made = &mut ready, if !is_ready => {
                made?;
                is_ready = true;
            }
            _ = terminated.recv() => break,
            _ = interrupted.recv() => break,
        }
    }
    server.drain().await;
    if let Some(pid) = function {
        terminate(pid);
        let _ = tokio::time::timeout(TERMINATION, exit).await;
    }
    Ok(0)
}

fn start_function(settings: &Settings, children: &Children) -> anyhow::Result<Pid> {
    let started = children.start_server(&settings.process, settings.prefix_logs);
    let (pid, pipes) =
        started.with_context(|| format!("Failed to start {:?}", settings.process.join(" ")))?;
    if let Some((stdout, stderr)) = pipes {
        let limit = settings.log_buffer_size;
        tokio::task::spawn_local(logs::forward(stdout, Stream::Out, limit));
        tokio::task::spawn_local(logs::forward(stderr, Stream::Err, limit));
    }
    Ok(pid)
}

/// The status to exit with after the function's server: its own, or 128 and the signal, and never
/// success, since a server is not meant to end.
fn exit_code(status: std::process::ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok());
    code.filter(|code| *code != 0).unwrap_or(1)
}

impl Server {
    /// Waits for the function and then says that all is well.
    async fn become_ready(&self) -> anyhow::Result<()> {
        if let Backend::Http(proxy) = &self.backend {
            proxy.wait_for_server().await;
        }
        if !self.settings.suppress_lock {
            std::fs::write(&self.lock_file, []).with_context(|| {
                let path = self.lock_file.display();
                format!("Failed to write {path}; set suppress_lock=true to do without it")
            })?;
        }
        Ok(())
    }

    fn remove_lock_file(&self) {
        if !self.settings.suppress_lock {
            // Somebody may have removed it, to say that the function is not well.
            let _ = std::fs::remove_file(&self.lock_file);
        }
    }

    async fn accept(self: Rc<Self>, listener: TcpListener) {
        let mut closing = self.closing.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = reach(&mut closing, Stage::Draining) => break,
            };
            let Ok((stream, _)) = accepted else {
                // Out of descriptors, most likely: some come free as calls end.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            let _ = stream.set_nodelay(true);
            let server = Rc::clone(&self);
            let mut closing = closing.clone();
            tokio::task::spawn_local(async move {
                let service = service_fn(|request| Rc::clone(&server).answer(request));
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                tokio::pin!(connection);
                // The caller knows of a connection that breaks; nobody else needs to.
                tokio::select! {
                    _ = connection.as_mut() => {}
                    () = reach(&mut closing, Stage::Draining) => {
                        connection.as_mut().graceful_shutdown();
                        let _ = connection.await;
                    }
                }
            });
        }
        drop(listener);
        self.closing.send_replace(Stage::Closed);
    }

    async fn accept_metrics(self: Rc<Self>, listener: TcpListener) {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let server = Rc::clone(&self);
            tokio::task::spawn_local(async move {
                let service = service_fn(|request: Request<Incoming>| {
                    let response = match request.uri().path() {
                        "/metrics" => {
                            let mut response = text(StatusCode::OK, server.metrics.text());
                            let kind = "text/plain; version=0.0.4; charset=utf-8";
                            let kind = HeaderValue::from_static(kind);
                            response.headers_mut().insert(CONTENT_TYPE, kind);
                            response
                        }
                        _ => text(
                            StatusCode::NOT_FOUND,
                            "metrics are at /metrics\n".to_owned(),
                        ),
                    };
                    std::future::ready(Ok::<_, Infallible>(response))
                });
                // No connection stays open between two readings.
                let _ = http1::Builder::new()
                    .keep_alive(false)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }

    async fn answer(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Reply>, Infallible> {
        Ok(match request.uri().path() {
            "/_/health" => self.health(request.method()),
            "/_/ready" => self.readiness(request.method()).await,
            _ => self.call(request).await,
        })
    }

    fn is_healthy(&self) -> bool {
        let up = match &self.backend {
            Backend::Http(proxy) => proxy.is_ready(),
            Backend::Forks(_) | Backend::Files(_) => true,
        };
        let serving = *self.closing.borrow() == Stage::Serving;
        up && serving && (self.settings.suppress_lock || self.lock_file.exists())
    }

    fn health(&self, method: &Method) -> Response<Reply> {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, String::new());
        }
        if self.is_healthy() {
            text(StatusCode::OK, "OK".to_owned())
        } else {
            text(StatusCode::SERVICE_UNAVAILABLE, String::new())
        }
    }

    async fn readiness(&self, method: &Method) -> Response<Reply> {
        let health = self.health(method);
        if health.status() != StatusCode::OK {
            return health;
        }
        if self.is_full() {
            return text(StatusCode::TOO_MANY_REQUESTS, String::new());
        }
        let (Backend::Http(proxy), Some(path)) = (&self.backend, &self.settings.ready_path) else {
            return health;
        };
        match self.in_time(proxy.probe(path)).await {
            Some(Ok(status)) if status.is_success() => health,
            Some(Ok(status)) => text(status, String::new()),
            Some(Err(e)) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{e}\n")),
            None => text(StatusCode::SERVICE_UNAVAILABLE, self.too_slow()),
        }
    }

    fn is_full(&self) -> bool {
        let limit = self.settings.max_inflight;
        limit > 0 && self.metrics.in_flight() >= limit
    }

    async fn call(&self, request: Request<Incoming>) -> Response<Reply> {
        let full = self.is_full();
        self.metrics.begin();
        let mut call = Call {
            metrics: Rc::clone(&self.metrics),
            idle: Rc::clone(&self.idle),
            method: request.method().clone(),
            status: caller_gone(),
            start: Instant::now(),
        };
        let path = self
            .settings
            .write_debug
            .then(|| request.uri().path().to_owned());
        let response = if full {
            self.refuse()
        } else {
            self.dispatch(request).await
        };
        call.status = response.status();
        if let Some(path) = path {
            let (took, status) = (call.start.elapsed().as_secs_f64(), call.status.as_u16());
            logs::line(&format!("{} {path} - {status} ({took:.4}s)", call.method));
        }
        let limit = self.settings.write_timeout;
        response.map(|body| Box::pin(CallBody::new(body, call, limit)) as Reply)
    }

    async fn dispatch(&self, request: Request<Incoming>) -> Response<Reply> {
        match &self.backend {
            Backend::Http(proxy) => {
                let call = proxy.call(request, self.settings.buffer_body);
                match self.in_time(call).await {
                    Some(Ok(response)) => response,
                    Some(Err(e)) => {
                        logs::line(&e.to_string());
                        let status = match e {
                            ProxyError::Input(_) | ProxyError::Path(_) => StatusCode::BAD_REQUEST,
                            ProxyError::Connect { .. } | ProxyError::Exchange(_) => {
                                self.see_end().await;
                                StatusCode::BAD_GATEWAY
                            }
                        };
                        text(status, format!("{e}\n"))
                    }
                    None => text(StatusCode::GATEWAY_TIMEOUT, self.too_slow()),
                }
            }
            Backend::Forks(forks) => match forks.call(request).await {
                Ok(response) => response,
                Err(e) => {
                    logs::line(&e.to_string());
                    text(e.status(), format!("{e}\n"))
                }
            },
            Backend::Files(root) => files::answer(root, request.method(), request.uri()),
        }
    }

    /// Waits a moment for the end of the function's server. The caller must not hear of a failure
    /// by it before nobody can connect any more: its next call would go to a watchdog that ends.
    async fn see_end(&self) {
        let mut closing = self.closing.subscribe();
        let closed = reach(&mut closing, Stage::Closed);
        let _ = tokio::time::timeout(ENDED_SEEN, closed).await;
    }

    /// Awaits for at most `exec_timeout`.
    async fn in_time<T>(&self, what: impl Future<Output = T>) -> Option<T> {
        match self.settings.exec_timeout {
            Some(limit) => tokio::time::timeout(limit, what).await.ok(),
            None => Some(what.await),
        }
    }

    fn too_slow(&self) -> String {
        let limit = self.settings.exec_timeout.unwrap_or_default();
        format!("The function took longer than exec_timeout ({limit:?})\n")
    }

    fn refuse(&self) -> Response<Reply> {
        let limit = self.settings.max_inflight;
        let reason =
            format!("Concurrent request limit exceeded. Max concurrent requests: {limit}\n");
        let mut response = text(StatusCode::TOO_MANY_REQUESTS, reason);
        let by = HeaderValue::from_static("faas-middleware");
        response.headers_mut().insert("x-openfaas-internal", by);
        response
    }

    /// Says that no more calls shall come, then takes none, then waits for those under way.
    async fn drain(&self) {
        let interval = self.settings.healthcheck_interval;
        logs::line(&format!("Ending: no new connections in {interval:?}"));
        self.closing.send_replace(Stage::Unhealthy);
        self.remove_lock_file();
        tokio::time::sleep(interval).await;
        self.closing.send_replace(Stage::Draining);
        if tokio::time::timeout(self.settings.write_timeout, self.all_answered())
            .await
            .is_err()
        {
            let left = self.metrics.in_flight();
            logs::line(&format!("Ending with {left} call(s) unfinished"));
        }
    }

    /// Waits until no call is under way.
    async fn all_answered(&self) {
        loop {
            let ended = self.idle.notified();
            if self.metrics.in_flight() == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// Waits for a stage. What the channel lends is given back at once: while it is lent, nobody can
/// move to the next stage.
async fn reach(closing: &mut watch::Receiver<Stage>, wanted: Stage) {
    let _ = closing.wait_for(|stage| *stage >= wanted).await;
}

/// What a call is counted as whose caller went away before the answer.
fn caller_gone() -> StatusCode {
    StatusCode::from_u16(499).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn text(status: StatusCode, text: String) -> Response<Reply> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
