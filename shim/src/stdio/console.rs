//! Terminals: the master side of a pseudo-terminal, and the socket on which runc hands it over.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixListener;

use crate::error::{Result, ShimError};

/// The master side of a terminal.
#[derive(Debug)]
pub struct Console {
    master: OwnedFd,
}

impl Console {
    /// Takes a master side over.
    pub fn new(master: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&master, true).map_err(ShimError::io("prepare a terminal"))?;
        Ok(Self { master })
    }

    /// A stream over the master side; reading and writing are independent.
    pub fn stream(&self) -> Result<ConsoleStream> {
        let copy = self
            .master
            .try_clone()
            .map_err(ShimError::io("copy a terminal's descriptor"))?;
        // SAFETY: an owned descriptor stays the same file for as long as it lives.
        unsafe { AsyncFd::register(copy) }
            .map(ConsoleStream)
            .map_err(ShimError::io("wait for a terminal's output"))
    }

    /// The descriptor itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

/// Sets a terminal's size.
pub fn resize(console: &Console, width: u32, height: u32) -> Result<()> {
    let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size = libc::winsize {
        ws_row: clamp(height),
        ws_col: clamp(width),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the request reads one winsize, and the pointer is to one that lives during the call.
    let done = unsafe { libc::ioctl(console.fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if done == 0 {
        return Ok(());
    }
    Err(ShimError::io("resize a terminal")(
        std::io::Error::last_os_error(),
    ))
}

/// A terminal as a byte stream.
#[derive(Debug)]
pub struct ConsoleStream(AsyncFd<OwnedFd>);

impl AsyncRead for ConsoleStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let room = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::read(fd, &mut *room)?)) {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                // The last process on the other side has gone.
                Ok(Err(err)) if err.raw_os_error() == Some(libc::EIO) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(err)) => return Poll::Ready(Err(err)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for ConsoleStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A socket on which runc sends the master side of a new terminal.
#[derive(Debug)]
pub struct ConsoleSocket {
    directory: PathBuf,
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens in a fresh directory below `parent`, which must be short enough for a socket's path.
    pub fn listen(parent: &Path) -> Result<Self> {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = parent.join(format!("pty{}-{number}", std::process::id()));
        let path = directory.join("s");
        let action = || ShimError::io(format!("listen on {}", path.display()));
        std::fs::create_dir_all(&directory).map_err(action())?;
        let listener = UnixListener::bind(&path).map_err(action())?;
        Ok(Self {
            directory,
            path,
            listener,
        })
    }

    /// The path to give to runc.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the terminal.
    pub async fn receive(&self, limit: Duration) -> Result<Console> {
        let received = async {
            let (stream, _) = self.listener.accept().await?;
            loop {
                stream.readable().await?;
                match stream.try_io(tokio::io::Interest::READABLE, || receive_fd(&stream)) {
                    Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => {}
                    result => return result,
                }
            }
        };
        let master = tokio::time::timeout(limit, received)
            .await
            .map_err(|_| ShimError::Timeout {
                what: "The hand-over of a terminal by runc".into(),
                limit,
            })?
            .map_err(ShimError::io("receive a terminal from runc"))?;
        Console::new(master)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn receive_fd(stream: &impl AsRawFd) -> std::io::Result<OwnedFd> {
    let mut name = [0; 4096];
    let mut slices = [IoSliceMut::new(&mut name)];
    let mut control = cmsg_space!([std::os::fd::RawFd; 1]);
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        "the message held no descriptor",
    ))
}
