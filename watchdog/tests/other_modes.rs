//! A process for each call, files, and environments that cannot be obeyed.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Watchdog, read_chunk, read_head, send};

fn script(directory: &Path, text: &str) -> (PathBuf, String) {
    let path = directory.join("function.sh");
    std::fs::write(&path, text).unwrap();
    let command = format!("sh {}", path.display());
    (path, command)
}

#[test]
fn streaming_passes_large_bodies_both_ways() {
    let watchdog = Watchdog::start(&[("fprocess", "cat")]);
    let large: Vec<u8> = (0..12u32 << 20).map(|i| (i % 251) as u8).collect();
    let answer = watchdog.call("POST", "/", &[], &large);
    assert_eq!(answer.status, 200);
    assert!(answer.body == large);
    assert_eq!(
        answer.header("content-type"),
        Some("application/octet-stream")
    );
}

#[test]
fn streaming_passes_output_on_as_it_comes() {
    let directory = tempfile::tempdir().unwrap();
    let (_, command) = script(directory.path(), "printf first; sleep 0.6; printf second");
    let variables = [
        ("fprocess", command.as_str()),
        ("content_type", "text/plain"),
    ];
    let watchdog = Watchdog::start(&variables);
    let start = Instant::now();
    let mut reader = BufReader::new(send(watchdog.port, "GET", "/", &[], b"").unwrap());
    let (_, headers) = read_head(&mut reader).unwrap();
    assert!(headers.contains(&("content-type".to_owned(), "text/plain".to_owned())));
    assert_eq!(read_chunk(&mut reader).unwrap().unwrap(), b"first");
    assert!(start.elapsed() < Duration::from_millis(500));
    assert_eq!(read_chunk(&mut reader).unwrap().unwrap(), b"second");
    assert_eq!(read_chunk(&mut reader).unwrap(), None);
}

#[test]
fn a_process_gets_the_call_in_its_environment() {
    for mode in ["streaming", "serializing", "fork"] {
        let watchdog = Watchdog::start(&[("fprocess", "env"), ("mode", mode), ("OWN", "value")]);
        let headers = [
            ("X-Forwarded-By", "http://my.vpn.com"),
            ("Content-Type", "text/x"),
        ];
        let answer = watchdog.call("POST", "/some/path?q=serverless&page=1", &headers, b"12345");
        let text = answer.text();
        for expected in [
            "OWN=value\n",
            "Http_Method=POST\n",
            "Http_Path=/some/path\n",
            "Http_Query=q=serverless&page=1\n",
            "Http_X_Forwarded_By=http://my.vpn.com\n",
            "Http_ContentLength=5\n",
            "Http_Content_Length=5\n",
            "Http_Host=test\n",
        ] {
            assert!(text.contains(expected), "{mode}: {expected} not in {text}");
        }
        // The classic watchdog answers in the type of the call.
        let own = if mode == "fork" {
            "text/x"
        } else {
            "application/octet-stream"
        };
        assert_eq!(answer.header("content-type"), Some(own));
    }
    let watchdog = Watchdog::start(&[("fprocess", "env"), ("cgi_headers", "false")]);
    assert!(!watchdog.get("/").text().contains("Http_"));
}

#[test]
fn a_process_that_fails_gives_500() {
    let directory = tempfile::tempdir().unwrap();
    let (_, command) = script(
        directory.path(),
        "cat >/dev/null; echo the reason >&2; exit 3",
    );
    for mode in ["streaming", "serializing", "fork"] {
        let watchdog = Watchdog::start(&[("fprocess", &command), ("mode", mode)]);
        let answer = watchdog.call("POST", "/", &[], b"x");
        assert_eq!(answer.status, 500, "{mode}");
        assert!(
            answer.text().contains("exit status: 3"),
            "{}",
            answer.text()
        );
        // Only the classic one's answer holds standard error, unless told otherwise.
        assert_eq!(answer.text().contains("the reason"), mode == "fork");
    }
    let variables = [
        ("fprocess", command.as_str()),
        ("mode", "fork"),
        ("combine_output", "0"),
    ];
    let mut watchdog = Watchdog::start(&variables);
    assert!(!watchdog.get("/").text().contains("the reason"));
    watchdog.signal("TERM");
    watchdog.wait();
    assert!(watchdog.output().1.contains(" stderr: the reason\n"));

    let watchdog = Watchdog::start(&[("fprocess", "/there/is/none")]);
    let answer = watchdog.get("/");
    assert_eq!(answer.status, 500);
    assert!(
        answer.text().contains("Failed to start"),
        "{}",
        answer.text()
    );
}

#[test]
fn a_process_that_takes_too_long_is_killed_with_its_children() {
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("mark");
    let text = format!("(sleep 0.8; echo alive > {}) & wait", mark.display());
    let (_, command) = script(directory.path(), &text);
    for mode in ["streaming", "serializing", "fork"] {
        let variables = [
            ("fprocess", command.as_str()),
            ("mode", mode),
            ("exec_timeout", "150ms"),
        ];
        let watchdog = Watchdog::start(&variables);
        let answer = watchdog.get("/");
        assert_eq!(answer.status, 504, "{mode}");
        assert!(answer.text().contains("was killed"), "{}", answer.text());
    }
    std::thread::sleep(Duration::from_secs(1));
    assert!(!mark.exists());
}

#[test]
fn a_caller_who_goes_away_ends_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let mark = directory.path().join("mark");
    let text = format!("printf first; sleep 0.8; echo alive > {}", mark.display());
    let (_, command) = script(directory.path(), &text);
    let watchdog = Watchdog::start(&[("fprocess", &command)]);
    let mut reader = BufReader::new(send(watchdog.port, "GET", "/", &[], b"").unwrap());
    read_head(&mut reader).unwrap();
    drop(reader);
    std::thread::sleep(Duration::from_millis(1200));
    assert!(!mark.exists());
    // And nobody is left unreaped.
    let children = Command::new("ps")
        .args(["-o", "stat=", "--ppid", &watchdog.child.id().to_string()])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&children.stdout), "");
}

#[test]
fn files_are_served() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("sub")).unwrap();
    std::fs::write(directory.path().join("sub/index.html"), "<p>hello").unwrap();
    let large = vec![7; 300_000];
    std::fs::write(directory.path().join("a b.bin"), &large).unwrap();
    let root = directory.path().to_str().unwrap();
    let watchdog = Watchdog::start(&[("mode", "static"), ("static_path", root)]);
    let page = watchdog.get("/sub/");
    assert_eq!((page.status, page.text().as_str()), (200, "<p>hello"));
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    assert_eq!(watchdog.get("/sub").header("location"), Some("/sub/"));
    assert!(watchdog.get("/a%20b.bin").body == large);
    for path in [
        "/none",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/",
    ] {
        assert_eq!(watchdog.get(path).status, 404, "{path}");
    }
    assert_eq!(watchdog.call("POST", "/sub/", &[], b"x").status, 405);
}

#[test]
fn an_environment_that_cannot_be_obeyed_is_an_error() {
    for (variables, expected) in [
        (vec![], "`fprocess` is not set"),
        (
            vec![("fprocess", "x"), ("mode", "afterburn")],
            "`mode` is \"afterburn\"",
        ),
        (
            vec![
                ("fprocess", "/none"),
                ("upstream_url", "http://127.0.0.1:1"),
            ],
            "Failed to start",
        ),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_fwatchdog"))
            .env_clear()
            .env("port", support::free_port().to_string())
            .env("metrics_port", support::free_port().to_string())
            .envs(variables)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(expected), "{text}");
    }
}
