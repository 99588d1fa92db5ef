//! A plain HTTP client: one connection per request, nothing retried, nothing hidden.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, bail};

/// A whole reply.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// A header's value, empty when absent; the name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value)
    }

    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is not.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("The reply {:?} is not JSON", self.text()))
    }

    /// How the function was started, as the reply says.
    #[must_use]
    pub fn start(&self) -> &str {
        self.header("x-trenv-start")
    }
}

/// Sends a request and reads the whole reply.
///
/// # Errors
/// When there is no connection or no complete reply.
pub fn request(
    server: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    patience: Duration,
) -> anyhow::Result<Reply> {
    let mut stream = TcpStream::connect_timeout(&server, patience)
        .with_context(|| format!("Failed to connect to {server}"))?;
    stream.set_read_timeout(Some(patience))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() || method == "POST" || method == "PUT" {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    read_reply(BufReader::new(stream), method == "HEAD")
        .with_context(|| format!("No complete reply to {method} {path}"))
}

fn read_reply(mut reader: impl BufRead, empty: bool) -> anyhow::Result<Reply> {
    let line = read_line(&mut reader)?;
    let status: u16 = line
        .split(' ')
        .nth(1)
        .and_then(|word| word.parse().ok())
        .with_context(|| format!("{line:?} is not a status line"))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(&mut reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').context("A header has no colon")?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    if (100..200).contains(&status) {
        return read_reply(reader, empty);
    }
    let mut reply = Reply {
        status,
        headers,
        body: Vec::new(),
    };
    if empty || status == 204 || status == 304 {
        return Ok(reply);
    }
    if reply
        .header("transfer-encoding")
        .eq_ignore_ascii_case("chunked")
    {
        reply.body = read_chunks(&mut reader)?;
    } else if let Ok(length) = reply.header("content-length").parse::<usize>() {
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        reply.body = body;
    } else {
        reader.read_to_end(&mut reply.body)?;
    }
    Ok(reply)
}

fn read_chunks(reader: &mut impl BufRead) -> anyhow::Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = read_line(reader)?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(digits, 16)
            .with_context(|| format!("{line:?} is not a chunk's size"))?;
        if size == 0 {
            while !read_line(reader)?.is_empty() {}
            return Ok(body);
        }
        let start = body.len();
        body.resize(start + size, 0);
        reader.read_exact(&mut body[start..])?;
        if !read_line(reader)?.is_empty() {
            bail!("A chunk does not end where it says");
        }
    }
}

fn read_line(reader: &mut impl BufRead) -> anyhow::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        bail!("The connection was closed");
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_each_length_are_read() {
        let sized = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-A: b\r\n\r\nhi";
        let reply = read_reply(sized.as_bytes(), false).unwrap();
        assert_eq!((reply.status, reply.text().as_str()), (200, "hi"));
        assert_eq!(reply.header("x-a"), "b");
        let chunked =
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n1;x\r\n!\r\n0\r\n\r\n";
        assert_eq!(read_reply(chunked.as_bytes(), false).unwrap().text(), "hi!");
        let open = "HTTP/1.0 502 Bad\r\n\r\nuntil the end";
        assert_eq!(
            read_reply(open.as_bytes(), false).unwrap().text(),
            "until the end"
        );
        let continued = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n";
        assert_eq!(read_reply(continued.as_bytes(), false).unwrap().status, 204);
    }

    #[test]
    fn a_cut_reply_is_an_error() {
        for text in [
            "",
            "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhi",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi",
        ] {
            assert!(read_reply(text.as_bytes(), false).is_err(), "{text:?}");
        }
    }
}
