//! Restores the trees that functions form: watchdog and Python, watchdog and Node, Go. Needs root.

#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Bed, TestResult};

fn functions() -> String {
    format!("{}/../functions", env!("CARGO_MANIFEST_DIR"))
}

fn watchdog() -> String {
    let beside = std::path::Path::new(env!("CARGO_BIN_EXE_trenv-zygote"));
    beside.with_file_name("fwatchdog").display().to_string()
}

/// Value of a string or number in a flat JSON reply.
fn value(reply: &str, key: &str) -> String {
    let at = reply
        .find(&format!("\"{key}\":"))
        .unwrap_or_else(|| panic!("no {key} in {reply}"));
    let rest = reply[at + key.len() + 3..].trim_start();
    rest.trim_start_matches('"')
        .split(['"', ',', '}'])
        .next()
        .unwrap()
        .to_owned()
}

fn comes_back(command: &[&str], environment: &[(&str, &str)]) -> TestResult {
    let bed = Bed::new()?;
    let first = bed.serve(command, environment)?;
    let before = first.get("/?check=1")?;
    let template = bed.dump(first)?;
    let zygote = bed.zygote(&template)?;
    let mut agent = zygote.agent()?;
    let counted: u64 = value(&before, "counter").parse()?;
    for _ in 0..10 {
        let instance = bed.start(&mut agent)?;
        let after = instance.get("/?check=1")?;
        assert_eq!(
            value(&after, "init_id"),
            value(&before, "init_id"),
            "{after}"
        );
        assert_eq!(
            value(&after, "counter"),
            (counted + 1).to_string(),
            "{after}"
        );
        // Garbage collectors give memory back and take it again; what they keep stays whole.
        for _ in 0..3 {
            let churned = instance.get("/?churn=1&check=1")?;
            assert!(!churned.contains("\"intact\":false"), "{churned}");
            assert_eq!(
                value(&churned, "init_id"),
                value(&before, "init_id"),
                "{churned}"
            );
        }
        zygote.learn(&instance.pids, "")?;
    }
    drop(agent);
    drop(zygote);
    for method in harness::methods() {
        let prepared = bed.prepare(method, &template)?;
        for turn in 0..8 {
            let instance = bed.start_with(prepared.as_ref())?;
            let begun = std::time::Instant::now();
            let answer = instance.get("/")?;
            let took = begun.elapsed();
            assert!(
                answer.starts_with("HTTP/1.1 200"),
                "{method} {turn}: {answer}"
            );
            for _ in 0..3 {
                let answer = instance.get("/")?;
                assert!(
                    answer.starts_with("HTTP/1.1 200"),
                    "{method} {turn}: {answer}"
                );
            }
            let figures = instance.work.figures();
            eprintln!(
                "{method} {turn}: started in {:?}, first answer {took:?}, {figures:?}",
                instance.took
            );
            prepared.learn(&instance.pids, "")?;
        }
    }
    Ok(())
}

#[test]
fn watchdog_and_python() -> TestResult {
    let function = format!("{}/hello-python", functions());
    let serve = format!("{}/runtime/python/serve.py", functions());
    comes_back(
        &[&watchdog()],
        &[
            ("fprocess", &format!("/usr/bin/python3 {serve} handler")),
            ("mode", "http"),
            ("upstream_url", "http://127.0.0.1:5000"),
            ("PYTHONPATH", &function),
        ],
    )
}

#[test]
fn watchdog_and_node() -> TestResult {
    let function = format!("{}/hello-node", functions());
    let serve = format!("{}/runtime/node/serve.js", functions());
    comes_back(
        &[&watchdog()],
        &[
            (
                "fprocess",
                &format!("/usr/bin/node {serve} {function}/handler.js"),
            ),
            ("mode", "http"),
            ("upstream_url", "http://127.0.0.1:5000"),
        ],
    )
}

#[test]
fn a_go_server_of_its_own() -> TestResult {
    let bed = Bed::new()?;
    let server = bed.build_go(&format!("{}/go-server", functions()))?;
    comes_back(&[&server], &[])
}

#[test]
fn pythons_own_server_without_a_watchdog() -> TestResult {
    let server = format!("{}/plain-python/server.py", functions());
    comes_back(&["/usr/bin/python3", &server], &[])
}
