//! The copiers between a process and the other ends of its streams.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

use super::target::Target;
use super::{Overflow, Owner};
use crate::error::{Result, ShimError};

const CHUNK: usize = 16 << 10;
/// Chunks held for a slow reader: 4 MiB at most.
const CHUNKS: usize = 256;

/// The shim's end of a pipe that it writes.
pub fn sender(fd: OwnedFd) -> Result<pipe::Sender> {
    pipe::Sender::from_owned_fd(fd).map_err(ShimError::io("use a pipe for writing"))
}

/// The shim's end of a pipe that it reads.
pub fn receiver(fd: OwnedFd) -> Result<pipe::Receiver> {
    pipe::Receiver::from_owned_fd(fd).map_err(ShimError::io("use a pipe for reading"))
}

/// Copies to the process until either side ends or stdin is closed by a call.
pub async fn input<R, W>(mut from: R, mut to: W, mut open: watch::Receiver<bool>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut chunk = vec![0; CHUNK];
    let closed = async move {
        // An error means that the streams are gone altogether.
        let _ = open.wait_for(|open| !open).await;
    };
    tokio::pin!(closed);
    let mut closing = false;
    loop {
        let read = if closing {
            // What the client wrote before it asked to close still belongs to the process.
            match tokio::time::timeout(std::time::Duration::ZERO, from.read(&mut chunk)).await {
                Ok(read) => read,
                Err(_) => return,
            }
        } else {
            tokio::select! {
                biased;
                read = from.read(&mut chunk) => read,
                () = &mut closed => { closing = true; continue; }
            }
        };
        match read {
            Ok(length) if length > 0 => {
                if to.write_all(&chunk[..length]).await.is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

/// Copies from the process until it has closed its end.
pub async fn output<R>(from: R, to: Target, overflow: Overflow, owner: Owner, name: &'static str)
where
    R: AsyncRead + Unpin,
{
    match overflow {
        Overflow::Wait => forward(from, to).await,
        Overflow::Drop => forward_or_drop(from, to, &owner, name).await,
    }
}

async fn forward<R: AsyncRead + Unpin>(mut from: R, mut to: Target) {
    let mut chunk = vec![0; CHUNK];
    let mut broken = false;
    // Reading goes on after a write error, so that the process never stops for it.
    while let Ok(length) = from.read(&mut chunk).await {
        if length == 0 {
            break;
        }
        broken = broken || to.write(&chunk[..length]).await.is_err();
    }
}

async fn forward_or_drop<R: AsyncRead + Unpin>(
    mut from: R,
    mut to: Target,
    owner: &Owner,
    name: &'static str,
) {
    let (queue, mut queued) = mpsc::channel::<Vec<u8>>(CHUNKS);
    let dropped = Arc::new(AtomicU64::new(0));
    let lost = Arc::clone(&dropped);
    let writer = async move {
        while let Some(chunk) = queued.recv().await {
            if to.write(&chunk).await.is_err() {
                lost.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
        }
    };
    let reader = async move {
        let mut chunk = vec![0; CHUNK];
        let mut told = false;
        while let Ok(length) = from.read(&mut chunk).await {
            if length == 0 {
                break;
            }
            if queue.try_send(chunk[..length].to_vec()).is_err() {
                dropped.fetch_add(length as u64, Ordering::Relaxed);
                if !told {
                    told = true;
                    tracing::warn!(
                        "Nobody reads the {name} of {}; output is being dropped",
                        owner.container
                    );
                }
            }
        }
        dropped
    };
    let (dropped, ()) = tokio::join!(reader, writer);
    let dropped = dropped.load(Ordering::Relaxed);
    if dropped > 0 {
        tracing::warn!(
            "Dropped {dropped} bytes of the {name} of {}",
            owner.container
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::{Duration, Instant};

    fn owner() -> Owner {
        Owner {
            namespace: "n".into(),
            container: "c".into(),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reader_that_never_reads_does_not_hold_the_writer_up() {
        let (client_read, client_write) = std::io::pipe().unwrap();
        let (read, mut write) = std::io::pipe().unwrap();
        let target = Target::Stream(Box::new(sender(client_write.into()).unwrap()));
        let copier = tokio::spawn(output(
            receiver(read.into()).unwrap(),
            target,
            Overflow::Drop,
            owner(),
            "stdout",
        ));
        let started = Instant::now();
        tokio::task::spawn_blocking(move || {
            let block = vec![b'x'; 1 << 20];
            for _ in 0..32 {
                write.write_all(&block).unwrap();
            }
        })
        .await
        .unwrap();
        assert!(started.elapsed() < Duration::from_secs(20));
        drop(client_read);
        tokio::time::timeout(Duration::from_secs(5), copier)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn closing_stdin_passes_on_what_was_written_before() {
        let (mut client, shim) = tokio::io::duplex(1 << 16);
        let (to_process, mut process) = tokio::io::duplex(1 << 16);
        let (open, closed) = watch::channel(true);
        client.write_all(b"last words").await.unwrap();
        open.send_replace(false);
        input(shim, to_process, closed).await;
        let mut text = String::new();
        process.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "last words");
    }
}
