//! `cargo xtask vm run`, seen by who calls it. Each test starts a VM of its own.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a shell's command in a VM.
fn vm(options: &[&str], command: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["vm", "run"])
        .args(options)
        .args(["--", "sh", "-c", command])
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[track_caller]
fn assert_status(output: &Output, status: i32) {
    assert_eq!(output.status.code(), Some(status), "{}", stderr(output));
}

#[test]
fn status_and_both_outputs_come_back() {
    let output = vm(&[], "echo one; echo two >&2; exit 3");
    assert_status(&output, 3);
    assert_eq!(stdout(&output), "one\n");
    assert_eq!(stderr(&output), "two\n");
}

#[test]
fn long_output_comes_back_whole() {
    let output = vm(&[], "seq 200000");
    assert_status(&output, 0);
    let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
    assert!(
        stdout(&output) == expected,
        "{} bytes came",
        output.stdout.len()
    );
}

#[test]
fn two_numa_nodes_share_memory_and_processors() {
    let output = vm(
        &["--numa", "--dax", "nvdimm", "--cpus", "3"],
        "cat /sys/devices/system/node/has_memory /sys/devices/system/node/node?/cpulist",
    );
    assert_status(&output, 0);
    assert_eq!(stdout(&output), "0-1\n0\n1-2\n");
}

#[test]
fn a_signal_that_ends_the_command_is_its_status() {
    assert_status(&vm(&[], "kill -KILL $$"), 128 + 9);
}

#[test]
fn what_the_command_leaves_running_ends_with_it() {
    let output = vm(&[], "sleep 100000 & echo started");
    assert_status(&output, 0);
    assert_eq!(stdout(&output), "started\n");
}

#[test]
fn a_warning_of_the_kernel_fails_the_run() {
    let output = vm(&[], "echo 'WARNING: a test wrote this' > /dev/kmsg");
    assert_status(&output, 125);
    let shown = stderr(&output);
    assert!(shown.contains("WARNING: a test wrote this"), "{shown}");
}

#[test]
fn a_panic_ends_the_run_with_its_lines() {
    let output = vm(&[], "echo c > /proc/sysrq-trigger");
    assert_status(&output, 125);
    let shown = stderr(&output);
    assert!(shown.contains("Kernel panic"), "{shown}");
}

#[test]
fn a_hang_ends_with_the_log() {
    let output = vm(&["--timeout", "20"], "echo before; sleep 100000");
    assert_status(&output, 124);
    assert_eq!(stdout(&output), "before\n");
    let shown = stderr(&output);
    assert!(shown.contains("Run /init as init process"), "{shown}");
    let log = shown
        .lines()
        .last()
        .and_then(|line| line.rsplit(' ').next());
    assert!(Path::new(log.unwrap()).exists(), "{shown}");
}

#[test]
fn the_nvdimm_is_a_devdax_with_small_pages() {
    for kernel in ["stock", "stock-6.12"] {
        let output = vm(
            &["--kernel", kernel, "--dax", "nvdimm", "--dax-size", "64"],
            "test -c /dev/dax0.0 && cat /sys/bus/dax/devices/dax0.0/align /sys/bus/dax/devices/dax0.0/size",
        );
        assert_status(&output, 0);
        let size = (64 - 2) << 20;
        assert_eq!(stdout(&output), format!("4096\n{size}\n"), "{kernel}");
    }
}

#[test]
fn the_rdma_device_is_active() {
    let output = vm(
        &["--rdma"],
        "cat /sys/class/infiniband/rxe0/ports/1/state && ibv_devices",
    );
    assert_status(&output, 0);
    let shown = stdout(&output);
    assert!(
        shown.contains("ACTIVE") && shown.contains("rxe0"),
        "{shown}"
    );
}

#[test]
fn cgroups_are_version_2_with_all_controllers() {
    let output = vm(
        &[],
        "mkdir /sys/fs/cgroup/one && cat /sys/fs/cgroup/one/cgroup.controllers",
    );
    assert_status(&output, 0);
    let shown = stdout(&output);
    for controller in ["cpu", "memory", "pids"] {
        assert!(
            shown.split_whitespace().any(|name| name == controller),
            "{shown}"
        );
    }
}

#[test]
fn only_the_shared_folder_is_changed() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (shared, other) = (folder.path().join("shared"), folder.path().join("other"));
    fs::create_dir(&shared).unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("kept"), "machine").unwrap();
    let output = vm(
        &["--share", shared.to_str().unwrap()],
        &format!(
            "cd {} && echo vm > kept && echo vm > made && cat kept && echo vm > {}/made",
            other.display(),
            shared.display()
        ),
    );
    assert_status(&output, 0);
    assert_eq!(stdout(&output), "vm\n");
    assert_eq!(fs::read_to_string(other.join("kept")).unwrap(), "machine");
    assert!(!other.join("made").exists());
    assert_eq!(fs::read_to_string(shared.join("made")).unwrap(), "vm\n");
}

/// Not a kernel of 6.12: its driver of CXL memory has no use for QEMU's.
#[test]
fn cxl_memory_is_a_devdax_with_small_pages() {
    let output = vm(
        &["--kernel", "stock", "--dax", "cxl", "--dax-size", "256"],
        "cat /sys/bus/dax/devices/dax0.0/align; ls /sys/bus/cxl/devices/region0/size",
    );
    assert_status(&output, 0);
    assert!(stdout(&output).starts_with("4096\n"));
}

#[test]
fn the_command_runs_in_the_same_folder_with_what_it_is_passed() {
    let output = vm(
        &["--env", "TRENV_VM_TEST=passed"],
        "pwd; echo $TRENV_VM_TEST",
    );
    assert_status(&output, 0);
    let folder = std::env::current_dir().unwrap();
    assert_eq!(stdout(&output), format!("{}\npassed\n", folder.display()));
}
