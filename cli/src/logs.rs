//! `trenv logs`: what a function prints.

use anyhow::{Context, bail};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde::Deserialize;

use crate::functions::split_namespace;
use crate::gateway::Gateway;

#[derive(Debug, clap::Args)]
pub struct LogsOptions {
    /// Function, as NAME or NAME.NAMESPACE
    name: String,
    /// Go on as long as lines come
    #[arg(long, short = 'f')]
    follow: bool,
    /// Only that many of the last lines
    #[arg(long)]
    tail: Option<u64>,
    /// Only lines since this time, e.g. 2026-01-31T12:00:00Z
    #[arg(long)]
    since: Option<String>,
    /// Only lines of this instance
    #[arg(long)]
    instance: Option<String>,
    /// Print the lines as the gateway sends them, one JSON object each
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    instance: String,
    timestamp: String,
    text: String,
}

pub async fn run(gateway: &Gateway, options: &LogsOptions) -> anyhow::Result<()> {
    let (name, namespace) = split_namespace(&options.name);
    let mut path = format!("/system/logs?name={name}&follow={}", options.follow);
    let optional = [
        ("namespace", namespace.map(str::to_owned)),
        ("tail", options.tail.map(|count| count.to_string())),
        ("since", options.since.clone()),
        ("instance", options.instance.clone()),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            path.push_str(&format!("&{key}={}", escape(&value)));
        }
    }
    let response = gateway
        .send(gateway.request(Method::GET, &path, "")?)
        .await?;
    let status = response.status();
    if status == StatusCode::NOT_FOUND {
        bail!(
            "There is no function {}; `trenv list` shows those there are",
            options.name
        );
    }
    let mut body = response.into_body();
    if !status.is_success() {
        let text = body.collect().await?.to_bytes();
        return crate::gateway::accept(status, &text);
    }
    let mut rest = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("The log was cut off")?;
        let Some(data) = frame.data_ref() else {
            continue;
        };
        rest.extend_from_slice(data);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            print_line(&line, options.json);
        }
    }
    print_line(&rest, options.json);
    Ok(())
}

fn print_line(line: &[u8], json: bool) {
    let line = String::from_utf8_lossy(line);
    let line = line.trim_end();
    if line.is_empty() {
        return;
    }
    match serde_json::from_str::<Line>(line) {
        Ok(parsed) if !json => println!(
            "{} {} {}",
            parsed.timestamp,
            parsed.instance,
            parsed.text.trim_end()
        ),
        _ => println!("{line}"),
    }
}

/// Escapes a value for a query.
fn escape(value: &str) -> String {
    value
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b':' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn values_are_escaped_for_a_query() {
        assert_eq!(
            escape("2026-01-01T00:00:00+02:00"),
            "2026-01-01T00:00:00%2B02:00"
        );
        assert_eq!(escape("a b&c"), "a%20b%26c");
    }
}
