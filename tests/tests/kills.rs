//! Processes killed at every moment of a start: each call gets an answer, and nothing is left.

use std::time::{Duration, Instant};

use anyhow::Context;
use trenv_tests::{Machine, Sandbox, Settings, crash, until};

const PATIENCE: Duration = Duration::from_secs(30);
/// A start takes less than this.
const START: Duration = Duration::from_millis(15);

/// An answer comes within this, whatever was killed.
const ANSWER: Duration = Duration::from_secs(8);

fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    (call(), begun.elapsed())
}

/// Which process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Provider,
    Shim,
    Zygote,
    Init,
}

/// Lets the function serve and end, so that there are two idle sandboxes; the one that served is
/// the one that the next call takes.
fn rest(machine: &Machine, init_id: &str) -> anyhow::Result<Sandbox> {
    let mut all = Vec::new();
    let settled = until("a sandbox that serves and an idle one", PATIENCE, || {
        all = machine.sandboxes().unwrap_or_default();
        let states: Vec<&str> = all.iter().map(|sandbox| sandbox.state.as_str()).collect();
        match states.as_slice() {
            ["ready", "idle"] | ["idle", "ready"] => true,
            // The call may have been the last that a dying instance served.
            _ => machine.served_again("hello-python", init_id).is_err(),
        }
    });
    settled.with_context(|| format!("There are {all:#?}\n{}", machine.last_words()))?;
    let sandbox = machine.serving()?;
    machine.scale("hello-python", 0)?;
    machine.idle(&sandbox.id)?;
    Ok(sandbox)
}

/// Kills `victim` at many moments of a start, `step` apart.
fn strike(victim: Victim, step: Duration) -> anyhow::Result<()> {
    let settings = Settings {
        max_sandboxes: 2,
        ..Settings::default()
    };
    let mut machine = Machine::start_with(&settings)?;
    machine.deploy("hello-python")?;
    let id = machine.init_id("hello-python")?;
    rest(&machine, &id)?;
    let before = machine.leftovers();
    let mut delay = Duration::ZERO;
    while delay <= START {
        let sandbox = rest(&machine, &id)?;
        let pids = match victim {
            Victim::Provider => vec![machine.provider_pid()],
            Victim::Shim => machine.pids_of("containerd-shim-trenv-v2"),
            Victim::Zygote => machine.pids_of("trenv-zygote"),
            Victim::Init => vec![sandbox.init_pid],
        };
        let reply = std::thread::scope(|scope| {
            let call = scope.spawn(|| timed(|| machine.call("hello-python")));
            std::thread::sleep(delay);
            crash(&pids);
            call.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let (reply, took) = reply;
        assert!(took < ANSWER, "{delay:?}: answered after {took:?}");
        match reply {
            Ok(reply) if reply.status == 200 => {}
            Ok(reply) => {
                assert_eq!(reply.status, 502, "{delay:?}: {}", reply.text());
                let error = reply.json()?["error"].to_string();
                assert!(error.contains("The function"), "{delay:?}: {error}");
            }
            Err(err) => assert_eq!(victim, Victim::Provider, "{delay:?}: {err:#}"),
        }
        match victim {
            Victim::Provider => {
                machine.kill_provider();
                machine.start_provider()?;
            }
            Victim::Init => until("the sandbox to go", PATIENCE, || {
                let all = machine.sandboxes();
                all.is_ok_and(|all| all.iter().all(|other| other.id != sandbox.id))
            })?,
            Victim::Shim | Victim::Zygote => {}
        }
        delay += step;
    }
    rest(&machine, &id)?;
    // One start more: it is a start that builds a killed zygote.
    rest(&machine, &id)?;
    machine.back_to(&before)?;
    machine.stop()
}

#[test]
fn a_provider_killed_at_any_moment_of_a_start_leaves_nothing() -> anyhow::Result<()> {
    strike(Victim::Provider, Duration::from_millis(1))
}

#[test]
fn a_shim_killed_at_any_moment_of_a_start_is_replaced() -> anyhow::Result<()> {
    strike(Victim::Shim, Duration::from_millis(1))
}

#[test]
fn a_zygote_killed_at_any_moment_of_a_start_is_built_again() -> anyhow::Result<()> {
    strike(Victim::Zygote, Duration::from_micros(500))
}

#[test]
fn a_pid_1_killed_at_any_moment_of_a_start_ends_its_sandbox_only() -> anyhow::Result<()> {
    strike(Victim::Init, Duration::from_micros(500))
}

#[test]
fn a_call_at_the_end_of_the_last_sandbox_is_served_by_the_next_shim() -> anyhow::Result<()> {
    let settings = Settings {
        idle_sandboxes: 0,
        ..Settings::default()
    };
    let machine = Machine::start_with(&settings)?;
    machine.deploy("hello-python")?;
    // The shim ends with its last sandbox, some milliseconds after it.
    for turn in 0..24 {
        machine.scale("hello-python", 0)?;
        let sandboxes = machine.sandboxes()?;
        assert_eq!(sandboxes.len(), 1, "turn {turn}: {sandboxes:?}");
        machine.idle(&sandboxes[0].id)?;
        crash(&[sandboxes[0].init_pid]);
        std::thread::sleep(Duration::from_millis(turn * 4));
        let reply = machine.call("hello-python")?;
        assert_eq!(reply.status, 200, "turn {turn}: {}", reply.text());
    }
    machine.stop()
}
