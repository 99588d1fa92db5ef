//! Functions at the limit of their memory: replies larger than it, and more than it taken.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use trenv_tests::{Machine, SERVER, until};

const PATIENCE: Duration = Duration::from_secs(60);
/// What the function's /stream answers.
const STREAM_BYTES: usize = 384 << 20;
const BLOCK: usize = 64 << 10;
/// By how much the provider may grow over such a reply.
const GROWTH_KIB: u64 = 16 << 10;

/// The function on its own server, and behind the watchdog.
fn both(machine: &Machine) -> anyhow::Result<[Value; 2]> {
    let limits = json!({ "memory": "64Mi" });
    Ok([
        json!({ "service": "plain", "image": machine.server_image()?, "limits": limits }),
        json!({
            "service": "watched",
            "image": "docker.io/trenv/hello-python:latest",
            "envProcess": "python3 -c exec(__import__('os').environ['SOURCE'])",
            "envVars": { "SOURCE": SERVER, "HOST": "127.0.0.1", "PORT": "5000" },
            "limits": limits,
        }),
    ])
}

/// Calls /stream, reads nothing for a while, then checks every byte of the reply.
fn read_stream(machine: &Machine, name: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(machine.gateway())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET /function/{name}/stream HTTP/1.1\r\nHost: x\r\n\r\n"
    )?;
    std::thread::sleep(Duration::from_secs(1));
    let mut reader = BufReader::with_capacity(BLOCK, stream);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end() {
            "" => break,
            line => head.push(line.to_ascii_lowercase()),
        }
    }
    let status = head.first().context("no status line")?;
    assert!(status.contains(" 200"), "{head:?}");
    let length = format!("content-length: {STREAM_BYTES}");
    assert!(head.contains(&length), "{head:?}");
    let mut block = vec![0; BLOCK];
    for number in 0..STREAM_BYTES / BLOCK {
        reader.read_exact(&mut block)?;
        let expected = (number as u64).to_be_bytes();
        let (words, _) = block.as_chunks::<8>();
        assert!(words.iter().all(|word| *word == expected), "block {number}");
    }
    Ok(())
}

#[test]
fn a_reply_larger_than_any_memory_limit_is_passed_on_whole() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for body in both(&machine)? {
        let function = machine.deploy_as(&body)?;
        assert_eq!(function["status"], "ready", "{function:#}");
        let name = body["service"].as_str().unwrap_or_default();
        assert_eq!(machine.call(name)?.status, 200);
        let before = machine.provider_peak_kib()?;
        read_stream(&machine, name)?;
        let after = machine.provider_peak_kib()?;
        assert!(
            after < before + GROWTH_KIB,
            "{name}: the provider held {before} KiB, then {after} KiB"
        );
        let next = machine.call(name)?;
        assert_eq!((next.status, next.start()), (200, "warm"), "{name}");
    }
    machine.stop()
}

#[test]
fn a_function_that_exceeds_its_memory_limit_is_killed_and_called_again() -> anyhow::Result<()> {
    let machine = Machine::start()?;
    for body in both(&machine)? {
        let function = machine.deploy_as(&body)?;
        assert_eq!(function["status"], "ready", "{function:#}");
        let name = body["service"].as_str().unwrap_or_default();
        let init_id = machine.call(name)?.json()?["init_id"].clone();
        let sandbox = machine.serving()?;
        let zygotes = machine.pids_of("trenv-zygote");
        let reply = machine.anonymous("GET", &format!("/function/{name}/hog"), &[])?;
        assert_eq!(reply.status, 502, "{name}: {}", reply.text());
        let reason = reply.text();
        assert!(reason.contains("The function"), "{name}: {reason}");
        let next = machine.call(name)?;
        assert_eq!(next.status, 200, "{name}: {}", next.text());
        assert_ne!(next.start(), "warm", "{name}");
        assert_eq!(next.json()?["init_id"], init_id, "{name}");
        let alive = machine.pids_of("trenv-zygote");
        assert!(
            zygotes.iter().all(|pid| alive.contains(pid)),
            "{name}: the zygotes were {zygotes:?}, then {alive:?}"
        );
        until("the killed sandbox to go", PATIENCE, || {
            let all = machine.sandboxes().unwrap_or_default();
            all.iter().all(|other| other.id != sandbox.id)
        })?;
        machine.remove(name)?;
    }
    machine.stop()
}
