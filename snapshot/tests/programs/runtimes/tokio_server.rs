//! A server on tokio's threads, with tasks that wait in a channel, a notification, a connected
//! socket pair, a command's pipes and an interval, and its pool of blocking threads. Each request
//! asks all of them; answers "COUNT TICKS ok" on port 8080.

use std::io::Result;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, UnixStream};
use tokio::process::Command;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, interval, sleep, timeout};

#[tokio::main(worker_threads = 3)]
async fn main() -> Result<()> {
    let ticks = Arc::new(AtomicU64::new(0));
    let ticking = ticks.clone();
    tokio::spawn(async move {
        let mut every = interval(Duration::from_millis(10));
        loop {
            every.tick().await;
            ticking.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (ask, mut asked) = mpsc::channel::<u64>(1);
    let (answer, mut answered) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Some(number) = asked.recv().await {
            let _ = answer.send(2 * number).await;
        }
    });
    let (woken, wake) = (Arc::new(AtomicU64::new(0)), Arc::new(Notify::new()));
    for _ in 0..100 {
        let (woken, wake) = (woken.clone(), wake.clone());
        tokio::spawn(async move {
            loop {
                wake.notified().await;
                woken.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let (mut near, far) = UnixStream::pair()?;
    tokio::spawn(async move {
        let (mut from, mut to) = far.into_split();
        tokio::io::copy(&mut from, &mut to).await
    });
    let mut command = Command::new("/bin/cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut to_command, from_command) = match (command.stdin.take(), command.stdout.take()) {
        (Some(to), Some(from)) => (to, BufReader::new(from)),
        _ => return Err(std::io::Error::other("The command has no pipes")),
    };
    let mut lines = from_command.lines();
    let hour = Duration::from_secs(3600);
    let (begun, long) = (Instant::now(), Box::pin(sleep(hour)));

    let listener = TcpListener::bind("127.0.0.1:8080").await?;
    let mut count = 0;
    loop {
        let (mut client, _) = listener.accept().await?;
        let mut request = BufReader::new(&mut client).lines();
        while request
            .next_line()
            .await?
            .is_some_and(|line| !line.is_empty())
        {}
        count += 1;
        let mut wrong = Vec::new();
        let _ = ask.send(count).await;
        if answered.recv().await != Some(2 * count) {
            wrong.push("the channel");
        }
        wake.notify_waiters();
        near.write_all(b"said").await?;
        let mut said = [0; 4];
        near.read_exact(&mut said).await?;
        if &said != b"said" {
            wrong.push("the socket pair");
        }
        to_command
            .write_all(format!("{count}\n").as_bytes())
            .await?;
        if lines.next_line().await? != Some(count.to_string()) {
            wrong.push("the command");
        }
        if Command::new("/bin/true").status().await.is_err() {
            wrong.push("a command that ends");
        }
        let sum = tokio::task::spawn_blocking(|| (1..=1000).sum::<u64>()).await;
        if !matches!(sum, Ok(500_500)) {
            wrong.push("the blocking threads");
        }
        if timeout(Duration::from_millis(10), std::future::pending::<()>())
            .await
            .is_ok()
        {
            wrong.push("the time-out");
        }
        if woken.load(Ordering::Relaxed) != 100 * count {
            wrong.push("the notification");
        }
        if long.is_elapsed() || begun.elapsed() > hour {
            wrong.push("the timer");
        }
        let (ticks, verdict) = (ticks.load(Ordering::Relaxed), wrong.join(", "));
        let verdict = if wrong.is_empty() { "ok" } else { &verdict };
        let answer = format!("HTTP/1.1 200 OK\r\n\r\n{count} {ticks} {verdict}\n");
        client.write_all(answer.as_bytes()).await?;
        client.shutdown().await?;
    }
}
