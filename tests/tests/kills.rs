//! Processes killed at every moment of a start: each call gets an answer, and nothing is left.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use trenv_tests::{Machine, Settings};

fn crash(pids: &[i32]) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
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
