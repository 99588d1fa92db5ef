//! Bodies of answers.

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use tokio::sync::Notify;
use tokio::time::Sleep;

use crate::metrics::Metrics;

pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Any body of an answer.
pub type Reply = Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>;

/// A body that is there already.
pub fn full(bytes: impl Into<Bytes>) -> Reply {
    Box::pin(Full::new(bytes.into()).map_err(|never| match never {}))
}

/// A call under way; counted as done when this is dropped.
#[derive(Debug)]
pub struct Call {
    pub metrics: Rc<Metrics>,
    pub idle: Rc<Notify>,
    pub method: Method,
    pub status: StatusCode,
    pub start: Instant,
}

impl Drop for Call {
    fn drop(&mut self) {
        let took = self.start.elapsed();
        self.metrics.end(&self.method, self.status, took);
        if self.metrics.in_flight() == 0 {
            self.idle.notify_waiters();
        }
    }
}

/// The answer to a call: ends the call with its last byte, and breaks off at the deadline.
pub struct CallBody {
    inner: Reply,
    /// Dropped last, with the body.
    _call: Call,
    limit: Duration,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl CallBody {
    /// `limit` is the time for the whole answer.
    pub fn new(inner: Reply, call: Call, limit: Duration) -> Self {
        Self {
            inner,
            _call: call,
            limit,
            deadline: None,
        }
    }
}

impl Body for CallBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = self.inner.as_mut().poll_frame(context);
        if polled.is_ready() || self.limit.is_zero() {
            return polled;
        }
        // The timer is made only for an answer that is not there at once.
        let limit = self.limit;
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match deadline.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Some(Err(
                "the answer took longer than write_timeout".into()
            ))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
