//! Times as clients write and read them: RFC 3339.

use jiff::Timestamp;

/// Seconds since 1970 as text, in UTC.
pub fn rfc3339(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    let time = Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX);
    time.strftime("%FT%TZ").to_string()
}

/// Seconds since 1970 of a text like `2026-01-02T03:04:05.678+01:00`.
pub fn parse_rfc3339(text: &str) -> Option<u64> {
    let time: Timestamp = text.parse().ok()?;
    u64::try_from(time.as_second()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_go_both_ways() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
            assert_eq!(parse_rfc3339(text), Some(seconds));
        }
        assert_eq!(parse_rfc3339("1970-01-01T01:00:00.5+01:00"), Some(0));
        for text in [
            "",
            "5m",
            "2024-13-01T00:00:00Z",
            "2024-01-01T00:00:00",
            "x-y-zT1:2:3Z",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }
}
