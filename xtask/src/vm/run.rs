//! One run, seen from the machine: starts QEMU, passes output on, waits, and judges the outcome.

use std::fs;
use std::io::{self, PipeReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};

use super::job::{Job, Outcome};
use super::{Dax, Options, console, initramfs, kernel, modules, qemu};

/// The status after a hang, as `timeout` has it.
const HANG: u8 = 124;
/// The status if the VM failed or its kernel reported a fault.
const FAULT: u8 = 125;
/// How long folders of failed runs are kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// Variables that are passed on without being asked for.
const VARIABLES: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TERM",
    "CARGO_HOME",
    "CARGO_TARGET_DIR",
    "RUSTUP_HOME",
    "RUST_BACKTRACE",
    "RUST_LOG",
];

pub fn run(options: &Options) -> anyhow::Result<u8> {
    check_machine(options)?;
    let image = kernel::image(options.kernel)?;
    let share = match &options.share {
        Some(folder) => Some(
            folder
                .canonicalize()
                .with_context(|| format!("Failed to find the folder {}", folder.display()))?,
        ),
        None => None,
    };
    let job = Job {
        command: options.command.clone(),
        folder: std::env::current_dir().context("Failed to find the current folder")?,
        environment: environment(&options.env)?,
        modules: Some(image.modules.clone()),
        share: share.clone(),
        tmpfs: options.tmpfs.clone(),
        dax: options.dax,
        rdma: options.rdma,
    };
    let mut wanted = modules::ROOT.to_vec();
    match job.dax {
        Some(Dax::Nvdimm) => wanted.extend(modules::NVDIMM),
        Some(Dax::Cxl) => wanted.extend(modules::CXL),
        None => {}
    }
    if job.rdma {
        wanted.extend(modules::RDMA);
    }

    let runs = super::cache()?.join("runs");
    remove_old(&runs);
    let folder = new_folder(&runs)?;
    let initramfs = folder.join("initramfs");
    initramfs::write(&initramfs, &job, &modules::files(&image.modules, &wanted)?)?;
    let files = qemu::Files {
        vmlinux: &image.vmlinux,
        initramfs: &initramfs,
        console: &folder.join("console.log"),
        outcome: &folder.join("outcome"),
        share: share.as_deref(),
    };
    let ended = start(options, &files, &folder)?;
    judge(ended, options, &files, &folder)
}

fn check_machine(options: &Options) -> anyhow::Result<()> {
    let found = Command::new(qemu::PROGRAM)
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        bail!(
            "{} cannot be run; as root, install what VMs need: \
             bash -c 'here=$PWD; . deploy/lib/packages.sh; apt-get install ${{vm_packages[*]}}'",
            qemu::PROGRAM
        );
    }
    let unit = options.dax.unwrap_or(Dax::Nvdimm).unit();
    if !options.dax_size.is_multiple_of(unit) {
        bail!("--dax-size {} is no multiple of {unit}", options.dax_size);
    }
    if options.kvm && !Path::new("/dev/kvm").exists() {
        bail!("This machine has no /dev/kvm; leave --kvm out");
    }
    Ok(())
}

fn environment(asked: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    let mut environment: Vec<_> = VARIABLES
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
        .collect();
    for variable in asked {
        let (name, value) = match variable.split_once('=') {
            Some((name, value)) => (name, value.to_owned()),
            None => (
                variable.as_str(),
                std::env::var(variable)
                    .with_context(|| format!("The variable {variable} cannot be passed on"))?,
            ),
        };
        environment.push((name.to_owned(), value));
    }
    Ok(environment)
}

/// Folders of failed runs stay for a look; those nobody has looked at for a day go.
fn remove_old(runs: &Path) {
    let Ok(entries) = fs::read_dir(runs) else {
        return;
    };
    for entry in entries.flatten() {
        let age = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .ok()
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        if age.is_some_and(|age| age > KEPT)
            && let Err(err) = fs::remove_dir_all(entry.path())
        {
            eprintln!("== {} cannot be removed: {err}", entry.path().display());
        }
    }
}

fn new_folder(runs: &Path) -> anyhow::Result<PathBuf> {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let folder = runs.join(format!("{}-{}", since.as_secs(), std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("Failed to make {}", folder.display()))?;
    Ok(folder)
}

/// How QEMU ended; `None` if it was ended because the time was over.
fn start(
    options: &Options,
    files: &qemu::Files<'_>,
    folder: &Path,
) -> anyhow::Result<Option<std::process::ExitStatus>> {
    let pipe = || io::pipe().context("Failed to make a pipe for the command's output");
    let (stdout, stdout_end) = pipe()?;
    let (stderr, stderr_end) = pipe()?;
    let (stdout_end, stderr_end) = (inherited(stdout_end.into())?, inherited(stderr_end.into())?);
    let log = folder.join("qemu.log");
    let messages =
        fs::File::create(&log).with_context(|| format!("Failed to create {}", log.display()))?;
    let mut child = qemu::command(options, files, &stdout_end, &stderr_end)?
        .stdin(Stdio::null())
        .stdout(messages.try_clone().context("Failed to share QEMU's log")?)
        .stderr(messages)
        .spawn()
        .context("Failed to start QEMU by setpriv, which is in util-linux")?;
    drop((stdout_end, stderr_end));
    let copies = [pass_on(stdout, io::stdout()), pass_on(stderr, io::stderr())];

    let process = nix::unistd::Pid::from_raw(
        i32::try_from(child.id()).context("QEMU has an impossible process number")?,
    );
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || sender.send(child.wait()));
    let status = match ended.recv_timeout(options.timeout()) {
        Ok(status) => Some(status.context("Failed to wait for QEMU")?),
        Err(_) => {
            nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL)
                .context("Failed to end QEMU")?;
            None
        }
    };
    for copy in copies {
        // It ends without fail once QEMU has: its ends of the pipes are closed.
        let _ = copy.join();
    }
    Ok(status)
}

/// A copy that QEMU keeps over its start.
fn inherited(file: OwnedFd) -> anyhow::Result<OwnedFd> {
    nix::unistd::dup(file).context("Failed to make a pipe's end one that QEMU inherits")
}

/// Copies until the other side closes, or nobody takes it any more.
fn pass_on(mut from: PipeReader, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    thread::spawn(move || {
        // If our own output is closed there is nobody to tell; the command's writes fail.
        let _ = io::copy(&mut from, &mut to).and_then(|_| to.flush());
    })
}

fn judge(
    ended: Option<std::process::ExitStatus>,
    options: &Options,
    files: &qemu::Files<'_>,
    folder: &Path,
) -> anyhow::Result<u8> {
    let log = fs::read(files.console).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).replace('\r', "");
    let outcome = fs::read_to_string(files.outcome)
        .ok()
        .and_then(|text| serde_json::from_str(&text).ok());
    let faults = console::faults(&log);
    let status = match (ended, outcome) {
        (Some(_), Some(Outcome::Ended(status))) => status,
        (Some(_), Some(Outcome::Failed(why))) => {
            eprintln!("== the VM cannot run the command: {why}");
            FAULT
        }
        (None, _) => {
            eprintln!(
                "== the VM was ended after {} s; the last lines of its console:\n{}",
                options.timeout,
                console::last_lines(&log)
            );
            HANG
        }
        (Some(ended), None) => {
            let messages = fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
            eprintln!(
                "== the VM ended before the command did ({ended})\n{messages}{}",
                if faults.is_none() {
                    console::last_lines(&log)
                } else {
                    String::new()
                }
            );
            FAULT
        }
    };
    let status = match faults {
        Some(faults) => {
            eprintln!("== the VM's kernel reported a fault:\n{faults}");
            if status == 0 { FAULT } else { status }
        }
        None => status,
    };
    if status == HANG || status == FAULT {
        eprintln!("== the whole console: {}", files.console.display());
    } else {
        fs::remove_dir_all(folder)
            .with_context(|| format!("Failed to remove {}", folder.display()))?;
    }
    Ok(status)
}
