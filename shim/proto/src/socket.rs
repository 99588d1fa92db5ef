//! Sockets on which a ttrpc message is one write.
//!
//! ttrpc writes a message's header field by field. On a stream socket each write wakes the reader,
//! who finds too little and waits again: four times for nothing, on a path that is measured in
//! microseconds. [`whole_messages`] holds the header back until its payload comes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::{Listener, Socket};

/// Length, stream, type and flags (ttrpc's PROTOCOL.md); the length comes first, in network order.
const HEADER: usize = 10;

/// Connects to a shim by its address, `unix://PATH`.
///
/// # Errors
/// When nobody listens there.
pub async fn connect(address: &str) -> io::Result<Client> {
    let path = address.strip_prefix("unix://").ok_or_else(|| {
        let reason = format!("the address {address:?} is not that of a unix socket");
        io::Error::new(io::ErrorKind::InvalidInput, reason)
    })?;
    let stream = UnixStream::connect(path).await?;
    Ok(Client::new(Socket::new(whole_messages(stream))))
}

/// A server's side of the same.
pub fn listen(listener: UnixListener) -> Listener {
    Listener::new(futures::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await;
        Some((accepted.map(|(stream, _)| whole_messages(stream)), listener))
    }))
}

/// Writes each message to `inner` at once.
pub fn whole_messages<S>(inner: S) -> WholeMessages<S> {
    WholeMessages {
        inner,
        header: [0; HEADER],
        held: 0,
        sent: 0,
        left: 0,
    }
}

/// See [`whole_messages`].
#[derive(Debug)]
pub struct WholeMessages<S> {
    inner: S,
    header: [u8; HEADER],
    /// Bytes of the header that are here, and those of them that were sent.
    held: usize,
    sent: usize,
    /// Bytes of the payload that are still to come.
    left: usize,
}

impl<S: AsyncWrite + Unpin> WholeMessages<S> {
    /// Counts bytes of the payload as sent; after the last one the next header comes.
    fn paid(&mut self, count: usize) {
        self.left = self.left.saturating_sub(count);
        if self.left == 0 {
            (self.held, self.sent) = (0, 0);
        }
    }

    /// Sends a header without a payload.
    fn poll_bare_header(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.held == HEADER && self.left == 0 {
            let rest = &self.header[self.sent..];
            let count = ready!(Pin::new(&mut self.inner).poll_write(cx, rest))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += count;
            if self.sent == HEADER {
                self.paid(0);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WholeMessages<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.poll_bare_header(cx))?;
        if this.held < HEADER {
            let count = bytes.len().min(HEADER - this.held);
            this.header[this.held..this.held + count].copy_from_slice(&bytes[..count]);
            this.held += count;
            if let Some(length) = this.header.first_chunk() {
                this.left = u32::from_be_bytes(*length) as usize;
            }
            return Poll::Ready(Ok(count));
        }
        let bytes = &bytes[..bytes.len().min(this.left)];
        loop {
            let parts = [IoSlice::new(&this.header[this.sent..]), IoSlice::new(bytes)];
            let count = ready!(Pin::new(&mut this.inner).poll_write_vectored(cx, &parts))?;
            let of_header = count.min(HEADER - this.sent);
            this.sent += of_header;
            if count > of_header || count == 0 {
                this.paid(count - of_header);
                return Poll::Ready(Ok(count - of_header));
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_bare_header(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WholeMessages<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// A stream that takes a few bytes at a time and notes each write.
    #[derive(Default)]
    struct Noted {
        most: usize,
        writes: Vec<Vec<u8>>,
    }

    impl AsyncWrite for Noted {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let count = bytes.len().min(self.most);
            self.writes.push(bytes[..count].to_vec());
            Poll::Ready(Ok(count))
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            parts: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
            self.poll_write(cx, &all)
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// As ttrpc does it.
    async fn message(stream: &mut (impl AsyncWrite + Unpin), payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        stream.write_u32(length).await.unwrap();
        stream.write_u32(7).await.unwrap();
        stream.write_u8(1).await.unwrap();
        stream.write_u8(0).await.unwrap();
        stream.flush().await.unwrap();
        stream.write_all(payload).await.unwrap();
        let mut whole = length.to_be_bytes().to_vec();
        whole.extend([0, 0, 0, 7, 1, 0]);
        whole.extend(payload);
        whole
    }

    #[tokio::test]
    async fn a_message_is_one_write() {
        let noted = Noted {
            most: usize::MAX,
            ..Noted::default()
        };
        let mut stream = whole_messages(noted);
        let mut expected = Vec::new();
        for payload in [b"one".as_slice(), b"", b"three"] {
            expected.push(message(&mut stream, payload).await);
        }
        assert_eq!(stream.inner.writes, expected);
    }

    #[tokio::test]
    async fn a_stream_that_takes_little_gets_the_same_bytes() {
        for most in 1..16 {
            let mut stream = whole_messages(Noted {
                most,
                ..Noted::default()
            });
            let mut expected = Vec::new();
            for payload in [b"a longer payload than that".as_slice(), b"", b"x"] {
                expected.extend(message(&mut stream, payload).await);
            }
            assert_eq!(stream.inner.writes.concat(), expected, "{most} at a time");
        }
    }

    #[tokio::test]
    async fn what_is_read_passes_through() {
        let mut stream = whole_messages(b"answer".as_slice());
        let mut read = String::new();
        stream.read_to_string(&mut read).await.unwrap();
        assert_eq!(read, "answer");
    }
}
