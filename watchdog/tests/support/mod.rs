//! A watchdog under test, a function's server to stand behind it, and a small HTTP client.
#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

pub struct Watchdog {
    pub child: Child,
    pub port: u16,
    pub metrics_port: u16,
    pub directory: tempfile::TempDir,
}

impl Watchdog {
    /// Starts it with the variables given, and waits until it is healthy.
    pub fn start(variables: &[(&str, &str)]) -> Self {
        let watchdog = Self::start_unready(variables);
        watchdog.wait_until_healthy();
        watchdog
    }

    pub fn start_unready(variables: &[(&str, &str)]) -> Self {
        let (port, metrics_port) = (free_port(), free_port());
        let directory = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_fwatchdog"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("TMPDIR", directory.path())
            .env("port", port.to_string())
            .env("metrics_port", metrics_port.to_string())
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "it does not listen"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        Self {
            child,
            port,
            metrics_port,
            directory,
        }
    }

    pub fn wait_until_healthy(&self) {
        let start = Instant::now();
        while self.get("/_/health").status != 200 {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "it is not healthy"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.call("GET", path, &[], b"")
    }

    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        call(self.port, method, path, headers, body).unwrap()
    }

    pub fn metrics(&self) -> String {
        let answer = call(self.metrics_port, "GET", "/metrics", &[], b"").unwrap();
        assert_eq!(answer.status, 200);
        answer.text()
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill")
            .args(["-s", name, &pid])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "it does not exit"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it wrote; to be called once it has exited.
    pub fn output(&mut self) -> (String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.child
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        (out, err)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            // The function's server ends with it, given the chance.
            self.signal("TERM");
            let start = Instant::now();
            while self.child.try_wait().unwrap().is_none() {
                if start.elapsed() > Duration::from_secs(3) {
                    let _ = self.child.kill();
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

pub fn send(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    let mut writer = stream.try_clone()?;
    let body = body.to_vec();
    // Beside reading, since a large body may be answered while it is sent.
    std::thread::spawn(move || writer.write_all(&body));
    Ok(stream)
}

pub fn call(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Answer> {
    read_answer(send(port, method, path, headers, body)?)
}

pub fn read_answer(stream: TcpStream) -> std::io::Result<Answer> {
    let mut reader = BufReader::new(stream);
    let (first, headers) = read_head(&mut reader)?;
    let status = first
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    let mut answer = Answer {
        status,
        headers,
        body: Vec::new(),
    };
    if answer.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(&mut reader)? {
            answer.body.extend_from_slice(&chunk);
        }
    } else {
        reader.read_to_end(&mut answer.body)?;
        if let Some(length) = answer.header("content-length") {
            assert_eq!(answer.body.len().to_string(), length);
        }
    }
    Ok(answer)
}

pub fn read_head(reader: &mut impl BufRead) -> std::io::Result<(String, Vec<(String, String)>)> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok((first.trim_end().to_owned(), headers));
        }
        let (name, value) = line.split_once(':').unwrap();
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
}

/// `None` after the last chunk.
pub fn read_chunk(reader: &mut impl BufRead) -> std::io::Result<Option<Vec<u8>>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let size = usize::from_str_radix(line.trim_end(), 16).unwrap();
    let mut data = vec![0; size + 2];
    reader.read_exact(&mut data)?;
    data.truncate(size);
    Ok((size > 0).then_some(data))
}

/// Gets request line, headers and body, and writes the whole answer.
pub type Respond = fn(&str, &[(String, String)], &[u8], &mut TcpStream);

/// A function's own HTTP server, in this process.
#[derive(Clone)]
pub struct Function {
    pub url: String,
    /// Connections made, and those still open.
    pub connections: Arc<AtomicUsize>,
    pub open: Arc<AtomicUsize>,
}

impl Function {
    pub fn start(answer: Respond) -> Self {
        Self::start_at(0, answer)
    }

    pub fn start_at(port: u16, answer: Respond) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let function = Self {
            url: format!("http://{}", listener.local_addr().unwrap()),
            connections: Arc::default(),
            open: Arc::default(),
        };
        let counts = function.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                counts.connections.fetch_add(1, Ordering::SeqCst);
                counts.open.fetch_add(1, Ordering::SeqCst);
                let counts = counts.clone();
                std::thread::spawn(move || {
                    let _ = serve(stream, answer);
                    counts.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        function
    }
}

fn serve(mut stream: TcpStream, answer: Respond) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let (first, headers) = read_head(&mut reader)?;
        let find = |name: &str| {
            let found = headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.as_str())
        };
        let mut body = Vec::new();
        if find("transfer-encoding") == Some("chunked") {
            while let Some(chunk) = read_chunk(&mut reader)? {
                body.extend_from_slice(&chunk);
            }
        } else if let Some(length) = find("content-length") {
            body.resize(length.parse().unwrap(), 0);
            reader.read_exact(&mut body)?;
        }
        answer(&first, &headers, &body, &mut stream);
        stream.flush()?;
    }
}

/// Answers with the request.
pub fn echo(first: &str, headers: &[(String, String)], body: &[u8], stream: &mut TcpStream) {
    let mut text = format!("{first}\n");
    for (name, value) in headers {
        text += &format!("{}: {value}\n", name.to_lowercase());
    }
    text += "\n";
    let mut answer = text.into_bytes();
    answer.extend_from_slice(body);
    let head = format!(
        "HTTP/1.1 202 Accepted\r\nX-From: function\r\nContent-Length: {}\r\n\r\n",
        answer.len()
    );
    let _ = stream.write_all(&[head.into_bytes(), answer].concat());
}
