//! Modes that run a process for each call.

use std::pin::Pin;
use std::process::ExitStatus;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::request::Parts;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::time::Sleep;

use crate::body::{BodyError, Reply, full};
use crate::children::{Children, Pipes, kill_group};
use crate::logs::{self, Stream};
use crate::settings::{Mode, Settings};

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Why a call got no answer from a process.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    #[error("Failed to start the function's process: {0}")]
    Start(std::io::Error),
    #[error("The call's body did not arrive within read_timeout ({0:?})")]
    InputTooSlow(Duration),
    #[error("The call's body could not be read: {0}")]
    Input(hyper::Error),
    #[error("The process's output could not be read: {0}")]
    Output(std::io::Error),
    #[error("The function took longer than exec_timeout ({0:?}) and was killed")]
    TooSlow(Duration),
    #[error("The function's process ended with {status}{said}")]
    Failed { status: ExitStatus, said: String },
}

impl ForkError {
    pub fn status(&self) -> StatusCode {
        match self {
            Self::InputTooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Input(_) => StatusCode::BAD_REQUEST,
            Self::TooSlow(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Start(_) | Self::Output(_) | Self::Failed { .. } => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }
}

/// Runs processes for calls.
#[derive(Debug)]
pub struct Forks {
    pub settings: Rc<Settings>,
    pub children: Rc<Children>,
}

/// Kills a process that is not waited for to its end.
struct Running {
    pid: Pid,
    children: Rc<Children>,
    ended: bool,
}

impl Running {
    async fn exit(mut self) -> ExitStatus {
        let status = self.children.exit_of(self.pid).await;
        self.ended = true;
        status
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        kill_group(self.pid);
        let (children, pid) = (Rc::clone(&self.children), self.pid);
        tokio::task::spawn_local(async move { children.exit_of(pid).await });
    }
}

impl Forks {
    pub async fn call(&self, request: Request<Incoming>) -> Result<Response<Reply>, ForkError> {
        match self.settings.mode {
            Mode::Streaming => self.stream(request).await,
            _ => self.collect(request).await,
        }
    }

    fn start(&self, head: &Parts, combine: bool) -> Result<(Running, Pipes), ForkError> {
        let environment = if self.settings.cgi_headers {
            environment(head)
        } else {
            Vec::new()
        };
        let process = &self.settings.process;
        let started = self.children.start_call(process, &environment, combine);
        let (pid, pipes) = started.map_err(ForkError::Start)?;
        let running = Running {
            pid,
            children: Rc::clone(&self.children),
            ended: false,
        };
        Ok((running, pipes))
    }

    async fn stream(&self, request: Request<Incoming>) -> Result<Response<Reply>, ForkError> {
        let (head, body) = request.into_parts();
        let (running, mut pipes) = self.start(&head, false)?;
        tokio::task::spawn_local(feed(body, pipes.stdin));
        if let Some(stderr) = pipes.stderr {
            let limit = self.settings.log_buffer_size;
            tokio::task::spawn_local(logs::forward(stderr, Stream::Err, limit));
        }
        // The first bytes are awaited, so that a process that fails at once gets a status.
        let mut deadline = self
            .settings
            .exec_timeout
            .map(|limit| Box::pin(tokio::time::sleep(limit)));
        let mut first = vec![0; 16_384];
        let count = tokio::select! {
            read = pipes.stdout.read(&mut first) => read.map_err(ForkError::Output)?,
            () = expiry(&mut deadline) => return Err(self.too_slow()),
        };
        if count == 0 {
            let status = tokio::select! {
                status = running.exit() => status,
                () = expiry(&mut deadline) => return Err(self.too_slow()),
            };
            if !status.success() {
                let said = String::new();
                return Err(ForkError::Failed { status, said });
            }
            return Ok(self.answer(&head.headers, full(Bytes::new())));
        }
        first.truncate(count);
        let body = PipeBody {
            first: Some(first.into()),
            pipe: pipes.stdout,
            buffer: vec![0; 16_384],
            running: Some(running),
            deadline,
        };
        Ok(self.answer(&head.headers, Box::pin(body)))
    }

    async fn collect(&self, request: Request<Incoming>) -> Result<Response<Reply>, ForkError> {
        let settings = &self.settings;
        let start = Instant::now();
        let (head, body) = request.into_parts();
        let input = tokio::time::timeout(settings.read_timeout, body.collect());
        let input = match input.await {
            Ok(input) => input.map_err(ForkError::Input)?.to_bytes(),
            Err(_) => return Err(ForkError::InputTooSlow(settings.read_timeout)),
        };
        let combine = settings.mode == Mode::Classic && settings.combine_output;
        let (running, pipes) = self.start(&head, combine)?;
        let mut deadline = settings
            .exec_timeout
            .map(|limit| Box::pin(tokio::time::sleep(limit)));
        let run = exchange(running, pipes, input);
        let (status, output, errors) = tokio::select! {
            run = run => run.map_err(ForkError::Output)?,
            () = expiry(&mut deadline) => return Err(self.too_slow()),
        };
        logs::text(&errors, Stream::Err);
        if settings.write_debug {
            logs::text(&output, Stream::Out);
        }
        if !status.success() {
            let said = match String::from_utf8_lossy(&output).trim_end() {
                "" => String::new(),
                text => format!(": {text}"),
            };
            return Err(ForkError::Failed { status, said });
        }
        let mut response = self.answer(&head.headers, full(output));
        let took = format!("{:.6}", start.elapsed().as_secs_f64());
        if let Ok(took) = HeaderValue::from_str(&took) {
            response.headers_mut().insert("x-duration-seconds", took);
        }
        Ok(response)
    }

    fn too_slow(&self) -> ForkError {
        ForkError::TooSlow(self.settings.exec_timeout.unwrap_or_default())
    }

    /// An answer with the content type that is set, else the call's own where the classic watchdog
    /// would give that back.
    fn answer(&self, call: &HeaderMap, body: Reply) -> Response<Reply> {
        let fixed = self.settings.content_type.as_deref();
        let content_type = fixed
            .and_then(|value| HeaderValue::from_str(value).ok())
            .or_else(|| {
                let classic = self.settings.mode == Mode::Classic;
                call.get(CONTENT_TYPE).filter(|_| classic).cloned()
            })
            .unwrap_or(OCTETS);
        let mut response = Response::new(body);
        response.headers_mut().insert(CONTENT_TYPE, content_type);
        response
    }
}

/// What a process is told of its call, as the classic watchdog does.
fn environment(head: &Parts) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for name in head.headers.keys() {
        if let Some(value) = head.headers.get(name).and_then(|v| v.to_str().ok()) {
            variables.push((
                format!("Http_{}", variable_name(name.as_str())),
                value.to_owned(),
            ));
        }
    }
    let mut put = |name: &str, value: &str| variables.push((name.to_owned(), value.to_owned()));
    put("Http_Method", head.method.as_str());
    put("Http_Path", head.uri.path());
    if let Some(query) = head.uri.query().filter(|query| !query.is_empty()) {
        put("Http_Query", query);
    }
    match head.headers.get(CONTENT_LENGTH).map(HeaderValue::to_str) {
        Some(Ok(length)) => put("Http_ContentLength", length),
        _ if head.headers.contains_key("transfer-encoding") => {
            put("Http_ContentLength", "-1");
            put("Http_Content_Length", "-1");
        }
        _ => {}
    }
    if let Some(host) = head.headers.get("host").and_then(|v| v.to_str().ok()) {
        put("Http_Host", host);
    }
    variables
}

/// `x-forwarded-by` as `X_Forwarded_By`: the canonical spelling, with underscores.
fn variable_name(header: &str) -> String {
    let mut upper = true;
    let letters = header.chars().map(|c| {
        let letter = if upper { c.to_ascii_uppercase() } else { c };
        upper = c == '-';
        if c == '-' { '_' } else { letter }
    });
    letters.collect()
}

/// Completes at the deadline; never where there is none.
async fn expiry(deadline: &mut Option<Pin<Box<Sleep>>>) {
    match deadline {
        Some(deadline) => deadline.as_mut().await,
        None => std::future::pending().await,
    }
}

/// Gives the call's body to the process. A process need not read it, so a broken pipe is no error.
async fn feed(mut body: Incoming, mut stdin: Sender) {
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(data) = frame.into_data()
            && stdin.write_all(&data).await.is_err()
        {
            return;
        }
    }
}

/// Gives a process its input and collects what it writes until it has exited.
async fn exchange(
    running: Running,
    pipes: Pipes,
    input: Bytes,
) -> std::io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let Pipes {
        mut stdin,
        mut stdout,
        stderr,
    } = pipes;
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    let give = async move {
        // As above: it need not read.
        let _ = stdin.write_all(&input).await;
    };
    let take_errors = async {
        match stderr {
            Some(mut stderr) => stderr.read_to_end(&mut errors).await.map(drop),
            None => Ok(()),
        }
    };
    let ((), taken, errors_taken) =
        tokio::join!(give, stdout.read_to_end(&mut output), take_errors);
    taken?;
    errors_taken?;
    Ok((running.exit().await, output, errors))
}

/// A process's output as it comes. The process is killed when the caller goes away.
struct PipeBody {
    first: Option<Bytes>,
    pipe: Receiver,
    buffer: Vec<u8>,
    running: Option<Running>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Body for PipeBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            this.running = None;
            return Poll::Ready(Some(Err(
                "the function took longer than exec_timeout".into()
            )));
        }
        let mut buffer = ReadBuf::new(&mut this.buffer);
        match ready!(Pin::new(&mut this.pipe).poll_read(context, &mut buffer)) {
            Err(e) => Poll::Ready(Some(Err(e.into()))),
            Ok(()) if buffer.filled().is_empty() => {
                if let Some(running) = this.running.take() {
                    tokio::task::spawn_local(running.exit());
                }
                Poll::Ready(None)
            }
            Ok(()) => {
                let data = Bytes::copy_from_slice(buffer.filled());
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
        }
    }
}
