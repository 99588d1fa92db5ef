//! What `bench restore` restores: two processes, some threads, and memory that was written.
//!
//! The command runs itself in the role, in a root that holds nothing else.

use std::hint::black_box;
use std::io::Write;
use std::process::Command;
use std::thread;

use anyhow::Context;

/// What a process prints when it has all that it shall have.
pub const READY: &str = "ready";
/// Processes that say so.
pub const PROCESSES: usize = 2;
/// The name of the role.
pub const ROLE: &str = "subject";

const PAGE: usize = 4096;
/// Threads that only wait need no more.
const STACK: usize = 64 << 10;

#[derive(Debug, Clone, clap::Args)]
pub struct SubjectOptions {
    /// MiB that the first process writes
    #[arg(long, default_value_t = 0)]
    mb: usize,
    /// Threads of all processes that this one makes, and its own
    #[arg(long)]
    threads: usize,
    /// Be the second process
    #[arg(long)]
    second: bool,
}

/// The arguments that make the command play the role.
pub fn arguments(mb: usize, threads: usize) -> Vec<String> {
    ["bench", ROLE, "--mb", &mb.to_string(), "--threads"]
        .map(str::to_owned)
        .into_iter()
        .chain([threads.to_string()])
        .collect()
}

/// Plays the role; returns only when it cannot.
pub fn run(options: &SubjectOptions) -> anyhow::Result<()> {
    let memory = written(options.mb << 20);
    let others = if options.second {
        0
    } else {
        options.threads / PROCESSES
    };
    if others > 0 {
        Command::new("/proc/self/exe")
            .args(["bench", ROLE, "--second", "--threads", &others.to_string()])
            .spawn()
            .context("Failed to start the second process")?;
    }
    for _ in 1..options.threads - others {
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(wait_for_ever::<()>)
            .context("Failed to start a thread")?;
    }
    let mut output = std::io::stdout();
    writeln!(output, "{READY}").and_then(|()| output.flush())?;
    black_box(&memory);
    wait_for_ever()
}

/// Memory of which no page equals another, so that the pool keeps all of them.
fn written(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0; bytes];
    for (number, page) in memory.chunks_exact_mut(PAGE).enumerate() {
        page.fill(number as u8 | 1);
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    memory
}

fn wait_for_ever<T>() -> T {
    loop {
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_page_equals_another_or_is_empty() {
        let memory = written(1 << 20);
        let pages: HashSet<&[u8]> = memory.chunks(PAGE).collect();
        assert_eq!(pages.len(), (1 << 20) / PAGE);
        assert!(!pages.contains(&[0; PAGE][..]));
    }
}
