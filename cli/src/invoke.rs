//! `trenv invoke`: calls a function; the body comes from standard input, the reply goes to standard output.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, bail};
use http::Method;
use http_body_util::BodyExt;

use crate::gateway::Gateway;

#[derive(Debug, clap::Args)]
pub struct InvokeOptions {
    /// Function, as NAME or NAME.NAMESPACE
    name: String,
    /// Path and query for the function, e.g. /items?id=3
    #[arg(long, default_value = "")]
    path: String,
    /// Method; POST when standard input is given, else GET
    #[arg(long, short = 'X')]
    method: Option<String>,
    /// Header to send, as 'Name: value'
    #[arg(long = "header", short = 'H')]
    headers: Vec<String>,
    /// Kind of input, by which the pages that the call needs are recorded
    #[arg(long)]
    input: Option<String>,
    /// Body to send in place of standard input
    #[arg(long, short = 'd')]
    data: Option<String>,
    /// Print status and headers to standard error, with them how the function was started
    #[arg(long, short = 'i')]
    include: bool,
}

pub async fn run(gateway: &Gateway, options: &InvokeOptions) -> anyhow::Result<()> {
    let body = match &options.data {
        Some(text) => Some(text.clone().into_bytes()),
        None => read_stdin()?,
    };
    let method = match &options.method {
        Some(name) => name
            .to_uppercase()
            .parse()
            .with_context(|| format!("{name:?} is not a method"))?,
        None if body.is_some() => Method::POST,
        None => Method::GET,
    };
    let separator = if options.path.is_empty() || options.path.starts_with(['/', '?']) {
        ""
    } else {
        "/"
    };
    let path = format!("/function/{}{separator}{}", options.name, options.path);
    let mut request = gateway.request(method, &path, body.unwrap_or_default())?;
    for header in &options.headers {
        let (name, value) = header
            .split_once(':')
            .with_context(|| format!("{header:?} is not of the form 'Name: value'"))?;
        let name: http::HeaderName = name.trim().parse()?;
        request.headers_mut().insert(name, value.trim().parse()?);
    }
    if let Some(input) = &options.input {
        let input = input
            .parse()
            .with_context(|| format!("{input:?} cannot be sent as a header"))?;
        request.headers_mut().insert("x-trenv-input", input);
    }
    let response = gateway.send(request).await?;
    let status = response.status();
    if options.include {
        eprintln!("{:?} {status}", response.version());
        for (name, value) in response.headers() {
            eprintln!("{name}: {}", String::from_utf8_lossy(value.as_bytes()));
        }
        eprintln!();
    }
    // The reply is written as it comes: a function may stream without end.
    let mut body = response.into_body();
    let mut output = std::io::stdout().lock();
    while let Some(frame) = body.frame().await {
        let frame = frame.context("The reply was cut off")?;
        if let Some(data) = frame.data_ref() {
            output.write_all(data)?;
            output.flush()?;
        }
    }
    if !status.is_success() && !status.is_redirection() {
        bail!("The function {} answered {status}", options.name);
    }
    Ok(())
}

/// What standard input holds; nothing when it is a terminal.
fn read_stdin() -> anyhow::Result<Option<Vec<u8>>> {
    let mut input = std::io::stdin();
    if input.is_terminal() {
        return Ok(None);
    }
    let mut body = Vec::new();
    input
        .read_to_end(&mut body)
        .context("Failed to read standard input")?;
    Ok((!body.is_empty()).then_some(body))
}
