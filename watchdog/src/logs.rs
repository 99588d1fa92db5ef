//! What the watchdog and its processes have to say.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

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
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    format_time(seconds)
}

fn format_time(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}/{month:02}/{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_calendar_dates() {
        assert_eq!(format_time(0), "1970/01/01 00:00:00");
        assert_eq!(format_time(951_782_399), "2000/02/28 23:59:59");
    }
}
