//! What the watchdog and its processes have to say.

use std::io::Write;

use jiff::Timestamp;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

/// Where a process's line goes.
#[derive(Debug, Clone, Copy)]
pub enum Stream {
    Out,
    Err,
}

/// Writes one line of the watchdog's own to standard error.
pub fn line(text: &str) {
    let _ = std::io::stderr().write_all(format!("{} {text}\n", now()).as_bytes());
}

/// Passes on what a process writes, line by line with time and stream before it. A line longer than
/// `limit` comes in pieces.
pub async fn forward(mut pipe: Receiver, stream: Stream, limit: usize) {
    let mut held = Vec::new();
    let limit = limit.max(1);
    let mut buffer = vec![0; limit.min(4096)];
    loop {
        let count = match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => count,
        };
        for piece in buffer[..count].split_inclusive(|byte| *byte == b'\n') {
            held.extend_from_slice(piece);
            if held.len() >= limit || held.ends_with(b"\n") {
                write_line(&held, stream);
                held.clear();
            }
        }
    }
    if !held.is_empty() {
        write_line(&held, stream);
    }
}

/// Passes on a text that was collected already.
pub fn text(text: &[u8], stream: Stream) {
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        write_line(line, stream);
    }
}

fn write_line(line: &[u8], stream: Stream) {
    let name = match stream {
        Stream::Out => "stdout",
        Stream::Err => "stderr",
    };
    let mut whole = format!("{} {name}: ", now()).into_bytes();
    whole.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(line));
    whole.push(b'\n');
    // A reader that is gone is no reason to stop serving.
    let _ = match stream {
        Stream::Out => {
            let mut out = std::io::stdout();
            out.write_all(&whole).and_then(|()| out.flush())
        }
        Stream::Err => std::io::stderr().write_all(&whole),
    };
}

/// The time as Go's log writes it: `2026/11/21 08:15:00`, UTC.
fn now() -> String {
    format_time(Timestamp::now())
}

fn format_time(time: Timestamp) -> String {
    time.strftime("%Y/%m/%d %T").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_dates() {
        let text = |seconds| format_time(Timestamp::from_second(seconds).unwrap());
        assert_eq!(text(0), "1970/01/01 00:00:00");
        assert_eq!(text(951_782_399), "2000/02/28 23:59:59");
    }
}
