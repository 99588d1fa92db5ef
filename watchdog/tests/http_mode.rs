//! Calls passed to the function's own HTTP server.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use support::{Function, Watchdog, echo, free_port, read_answer, read_chunk, read_head, send};

const FOREVER: (&str, &str) = ("fprocess", "sleep 1000");

fn write(stream: &mut TcpStream, text: &str) {
    let _ = stream.write_all(text.as_bytes());
}

#[test]
fn a_call_and_its_answer_pass_through() {
    let function = Function::start(echo);
    let watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
    let headers = [("X-Mine", "yes"), ("Keep-Alive", "5"), ("TE", "trailers")];
    let answer = watchdog.call("PUT", "/a%20b/c?x=1&y=%2F", &headers, b"some text");
    assert_eq!(answer.status, 202);
    assert_eq!(answer.header("x-from"), Some("function"));
    let text = answer.text();
    assert!(
        text.starts_with("PUT /a%20b/c?x=1&y=%2F HTTP/1.1\n"),
        "{text}"
    );
    assert!(text.ends_with("\n\nsome text"), "{text}");
    assert!(
        text.contains("x-mine: yes\n") && text.contains("host: test\n"),
        "{text}"
    );
    for hop in ["keep-alive", "connection", "te:"] {
        assert!(!text.contains(hop), "{text}");
    }
    let large = vec![b'x'; 8 << 20];
    let answer = watchdog.call("POST", "/", &[], &large);
    assert!(answer.body.ends_with(&large));
}

#[test]
fn the_upstream_urls_path_comes_before_the_calls() {
    let function = Function::start(echo);
    let url = format!("{}/api/", function.url);
    let watchdog = Watchdog::start(&[FOREVER, ("mode", "http"), ("http_upstream_url", &url)]);
    assert!(
        watchdog
            .get("/items?n=1")
            .text()
            .starts_with("GET /api/items?n=1 ")
    );
}

#[test]
fn it_is_healthy_once_the_function_accepts_and_calls_wait_for_that() {
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    let watchdog = Watchdog::start_unready(&[FOREVER, ("upstream_url", &url)]);
    for path in ["/_/health", "/_/ready"] {
        assert_eq!(watchdog.get(path).status, 503);
    }
    let early = send(watchdog.port, "GET", "/early", &[], b"").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    Function::start_at(port, echo);
    assert_eq!(read_answer(early).unwrap().status, 202);
    assert_eq!(watchdog.get("/_/health").status, 200);
    assert_eq!(watchdog.get("/_/ready").status, 200);
    assert_eq!(watchdog.call("POST", "/_/health", &[], b"").status, 405);

    // Without its lock file it says that it is not well.
    std::fs::remove_file(watchdog.directory.path().join(".lock")).unwrap();
    assert_eq!(watchdog.get("/_/health").status, 503);
}

#[test]
fn readiness_asks_the_function_where_a_path_is_set() {
    fn answer(first: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
        let status = if first.contains("/warm") {
            "503 Busy"
        } else {
            "200 OK"
        };
        write(
            stream,
            &format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"),
        );
    }
    let function = Function::start(answer);
    for (path, status) in [("/warm", 503), ("/cold", 200)] {
        let variables = [
            FOREVER,
            ("upstream_url", &function.url),
            ("ready_path", path),
        ];
        let watchdog = Watchdog::start(&variables);
        assert_eq!(watchdog.get("/_/ready").status, status);
    }
}

#[test]
fn no_connection_to_the_function_stays_open() {
    let function = Function::start(echo);
    let watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
    for _ in 0..50 {
        assert_eq!(watchdog.get("/").status, 202);
    }
    let made = function.connections.load(Ordering::SeqCst);
    assert!(made < 40, "{made} connections for 50 calls in a row");
    let start = Instant::now();
    while function.open.load(Ordering::SeqCst) > 0 {
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "a connection stays open"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    // What is left is simple to restore: one thread, and descriptors of a few kinds.
    let process = format!("/proc/{}", watchdog.child.id());
    let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
    assert!(status.contains("Threads:\t1\n"), "{status}");
    for descriptor in std::fs::read_dir(format!("{process}/fd")).unwrap() {
        let target = std::fs::read_link(descriptor.unwrap().path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let known = [
            "socket:",
            "pipe:",
            "anon_inode:[eventpoll]",
            "anon_inode:[eventfd]",
            "/dev/",
        ];
        assert!(
            known.iter().any(|kind| target.starts_with(kind)),
            "{target}"
        );
    }
    assert_eq!(watchdog.get("/").status, 202);
}

#[test]
fn a_function_that_closes_after_each_answer_is_served_too() {
    fn answer(_: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
        write(stream, "HTTP/1.0 200 OK\r\n\r\nold manners");
        let _ = stream.shutdown(Shutdown::Both);
    }
    let function = Function::start(answer);
    let watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
    for _ in 0..100 {
        let answer = watchdog.get("/");
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, "old manners")
        );
    }
}

#[test]
fn an_answer_is_passed_on_as_it_comes() {
    fn answer(_: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
        write(
            stream,
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n",
        );
        std::thread::sleep(Duration::from_millis(600));
        write(stream, "6\r\nsecond\r\n0\r\n\r\n");
    }
    let function = Function::start(answer);
    let watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
    let start = Instant::now();
    let mut reader = BufReader::new(send(watchdog.port, "GET", "/", &[], b"").unwrap());
    read_head(&mut reader).unwrap();
    assert_eq!(read_chunk(&mut reader).unwrap().unwrap(), b"first");
    assert!(start.elapsed() < Duration::from_millis(500));
    assert_eq!(read_chunk(&mut reader).unwrap().unwrap(), b"second");
    assert_eq!(read_chunk(&mut reader).unwrap(), None);
}

fn slow(_: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
    std::thread::sleep(Duration::from_millis(700));
    write(stream, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate");
}

#[test]
fn a_call_that_takes_too_long_is_given_up() {
    let function = Function::start(slow);
    let variables = [
        FOREVER,
        ("upstream_url", &function.url),
        ("exec_timeout", "200ms"),
    ];
    let watchdog = Watchdog::start(&variables);
    let start = Instant::now();
    let answer = watchdog.get("/");
    assert_eq!(answer.status, 504);
    assert!(
        answer.text().contains("exec_timeout (200ms)"),
        "{}",
        answer.text()
    );
    assert!(start.elapsed() < Duration::from_millis(600));
}

#[test]
fn an_answer_that_takes_too_long_is_broken_off() {
    fn endless(_: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
        write(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbeginning",
        );
        std::thread::sleep(Duration::from_secs(5));
    }
    let function = Function::start(endless);
    let variables = [
        FOREVER,
        ("upstream_url", &function.url),
        ("write_timeout", "200ms"),
    ];
    let watchdog = Watchdog::start(&variables);
    let start = Instant::now();
    let mut stream = send(watchdog.port, "GET", "/", &[], b"").unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    assert!(text.ends_with("beginning"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn calls_above_the_limit_are_refused_and_health_is_not() {
    let function = Function::start(slow);
    let variables = [
        FOREVER,
        ("upstream_url", &function.url),
        ("max_inflight", "2"),
    ];
    let watchdog = Watchdog::start(&variables);
    let calls = [0; 2].map(|_| send(watchdog.port, "GET", "/", &[], b"").unwrap());
    std::thread::sleep(Duration::from_millis(200));
    let refused = watchdog.get("/");
    assert_eq!(refused.status, 429);
    assert_eq!(
        refused.text(),
        "Concurrent request limit exceeded. Max concurrent requests: 2\n"
    );
    assert_eq!(watchdog.get("/_/health").status, 200);
    assert_eq!(watchdog.get("/_/ready").status, 429);
    assert!(watchdog.metrics().contains("http_requests_in_flight 2\n"));
    for call in calls {
        assert_eq!(read_answer(call).unwrap().text(), "late");
    }
    let metrics = watchdog.metrics();
    for expected in [
        "http_requests_total{code=\"200\",method=\"get\"} 2\n",
        "http_requests_total{code=\"429\",method=\"get\"} 1\n",
        "http_requests_in_flight 0\n",
        "http_request_duration_seconds_bucket{code=\"200\",method=\"get\",le=\"0.5\"} 0\n",
        "http_request_duration_seconds_count{code=\"200\",method=\"get\"} 2\n",
    ] {
        assert!(metrics.contains(expected), "{metrics}");
    }
}

#[test]
fn a_function_that_breaks_off_gives_502_with_the_reason() {
    fn broken(_: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
        let _ = stream.shutdown(Shutdown::Both);
    }
    let function = Function::start(broken);
    let watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
    let answer = watchdog.get("/");
    assert_eq!(answer.status, 502);
    assert!(answer.text().contains("broke off"), "{}", answer.text());
}

#[test]
fn when_a_killed_function_has_given_502_nobody_can_connect_any_more() {
    fn killed(first: &str, _: &[(String, String)], _: &[u8], stream: &mut TcpStream) {
        let pid = first.split(['/', ' ']).nth(2).unwrap();
        let sent = Command::new("kill").args(["-s", "KILL", pid]).status();
        assert!(sent.unwrap().success());
        let _ = stream.shutdown(Shutdown::Both);
    }
    let function = Function::start(killed);
    for _ in 0..10 {
        let mut watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
        let own = watchdog.child.id();
        let children = format!("/proc/{own}/task/{own}/children");
        let pid = std::fs::read_to_string(children).unwrap();
        let answer = watchdog.get(&format!("/{}", pid.trim()));
        assert_eq!(answer.status, 502);
        assert!(answer.text().contains("broke off"), "{}", answer.text());
        assert!(TcpStream::connect(("127.0.0.1", watchdog.port)).is_err());
        assert_eq!(watchdog.wait().code(), Some(128 + 9));
    }
}

#[test]
fn it_exits_with_the_function_and_passes_on_what_that_wrote() {
    let script = tempfile::tempdir().unwrap();
    let path = script.path().join("function.sh");
    std::fs::write(
        &path,
        "echo to out; echo to err >&2; printf unended; sleep 0.3; exit 7",
    )
    .unwrap();
    let command = format!("sh {}", path.display());
    let variables = [
        ("fprocess", command.as_str()),
        ("upstream_url", "http://127.0.0.1:1"),
    ];
    let mut watchdog = Watchdog::start_unready(&variables);
    assert_eq!(watchdog.wait().code(), Some(7));
    let (out, err) = watchdog.output();
    assert!(
        out.contains(" stdout: to out\n") && out.contains(" stdout: unended\n"),
        "{out}"
    );
    assert!(
        err.contains(" stderr: to err\n") && err.contains("exit status: 7"),
        "{err}"
    );
}

#[test]
fn after_sigterm_calls_under_way_are_finished_and_the_function_ended() {
    let function = Function::start(slow);
    let script = tempfile::tempdir().unwrap();
    let (path, mark) = (
        script.path().join("function.sh"),
        script.path().join("ended"),
    );
    let text = format!(
        "trap 'echo yes > {}; exit' TERM\nwhile :; do sleep 0.05; done",
        mark.display()
    );
    std::fs::write(&path, text).unwrap();
    let command = format!("sh {}", path.display());
    let variables = [
        ("fprocess", command.as_str()),
        ("upstream_url", &function.url),
        ("healthcheck_interval", "150ms"),
    ];
    let mut watchdog = Watchdog::start(&variables);
    let call = send(watchdog.port, "GET", "/", &[], b"").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    watchdog.signal("TERM");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(watchdog.get("/_/health").status, 503);
    assert!(!watchdog.directory.path().join(".lock").exists());
    assert_eq!(read_answer(call).unwrap().text(), "late");
    assert_eq!(watchdog.wait().code(), Some(0));
    assert!(mark.exists());
}

#[test]
fn a_caller_who_goes_away_ends_the_call() {
    let function = Function::start(slow);
    let watchdog = Watchdog::start(&[FOREVER, ("upstream_url", &function.url)]);
    let call = send(watchdog.port, "GET", "/", &[], b"").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(call);
    std::thread::sleep(Duration::from_millis(100));
    let metrics = watchdog.metrics();
    assert!(metrics.contains("http_requests_in_flight 0\n"), "{metrics}");
    assert!(metrics.contains("code=\"499\""), "{metrics}");
}
