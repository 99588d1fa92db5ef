//! A containerd of the tests' own, whose images stay between tests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::daemon::Daemon;
use crate::images;
use crate::variants::VARIANTS;
use crate::wait::until;
use crate::{BASES, SAMPLES};

/// The images in a store of a machine's own; they share a base.
const FEW: [&str; 2] = ["hello-python", "json-python"];

/// A running containerd, and the root directory that no other test uses meanwhile.
#[derive(Debug)]
pub struct Containerd {
    daemon: Daemon,
    directory: PathBuf,
    store: Store,
    binaries: PathBuf,
    config: PathBuf,
}

/// The root directory: content and snapshots of the images, imported once.
#[derive(Debug)]
struct Store {
    root: PathBuf,
    /// Exists from a start to a clean stop; what is found with it is thrown away.
    used: PathBuf,
    _lock: Option<Flock<File>>,
}

impl Store {
    fn open(directory: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(directory)?;
        let file = File::create(directory.join("lock"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, err)| err)
            .context("Failed to lock the tests' containerd")?;
        let store = Self {
            root: directory.join("containerd"),
            used: directory.join("used"),
            _lock: Some(lock),
        };
        if store.used.exists() && store.root.exists() {
            fs::remove_dir_all(&store.root)?;
        }
        fs::create_dir_all(&store.root)?;
        File::create(&store.used)?;
        Ok(store)
    }

    /// One that nobody else uses, and that goes with its directory.
    fn own(directory: &Path) -> anyhow::Result<Self> {
        let store = Self {
            root: directory.join("containerd"),
            used: directory.join("used"),
            _lock: None,
        };
        fs::create_dir_all(&store.root)?;
        Ok(store)
    }

    fn clean(&self) {
        let _ = fs::remove_file(&self.used);
    }
}

impl Containerd {
    /// Starts it with its state in `directory` and trenv's shim, configured by `config`, on its
    /// path; `apart` says that its store lies in `directory` too, with few images.
    pub fn start(
        directory: &Path,
        binaries: &Path,
        config: &Path,
        apart: bool,
    ) -> anyhow::Result<Self> {
        let (store, samples) = match apart {
            true => (Store::own(directory)?, FEW.to_vec()),
            false => (
                Store::open(&images::cache())?,
                [&SAMPLES[..], &BASES].concat(),
            ),
        };
        let daemon = spawn(directory, &store.root, binaries, config)?;
        let mut containerd = Self {
            daemon,
            directory: directory.into(),
            store,
            binaries: binaries.into(),
            config: config.into(),
        };
        containerd.wait()?;
        images::import(&containerd.socket(), &samples)?;
        Ok(containerd)
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        let socket = self.socket();
        let answers = || ctr(&socket, "default", &["version"]).is_ok();
        until("containerd", Duration::from_secs(30), answers)
            .with_context(|| self.daemon.last_words())
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("c.sock")
    }

    /// Ends it and starts it again; sandboxes live on meanwhile.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.daemon.stop();
        self.daemon = spawn(
            &self.directory,
            &self.store.root,
            &self.binaries,
            &self.config,
        )?;
        self.wait()
    }

    /// Ends every container of ours in a namespace, and removes tests' own images.
    pub fn remove_containers(&self, namespace: &str) -> anyhow::Result<()> {
        let socket = self.socket();
        let run = |arguments: &[&str]| ctr(&socket, namespace, arguments);
        for id in run(&["container", "ls", "-q"])?.lines() {
            let _ = run(&["task", "kill", "-s", "SIGKILL", id]);
            let _ = run(&["task", "delete", "-f", id]);
            let _ = run(&["container", "delete", id]);
        }
        let left = run(&["container", "ls", "-q"])?;
        if !left.trim().is_empty() {
            bail!("Containers cannot be removed: {}", left.trim());
        }
        for image in run(&["images", "ls", "-q"])?.lines() {
            if image.starts_with(VARIANTS) {
                let _ = run(&["images", "rm", image]);
            }
        }
        for lease in run(&["leases", "ls", "-q"])?.lines() {
            let _ = run(&["leases", "rm", lease]);
        }
        Ok(())
    }

    /// Ends it; `clean` says that its store may be used again.
    pub fn stop(&mut self, clean: bool) {
        self.daemon.stop();
        if clean {
            self.store.clean();
        }
    }

    pub fn last_words(&self) -> String {
        self.daemon.last_words()
    }
}

fn spawn(directory: &Path, root: &Path, binaries: &Path, config: &Path) -> anyhow::Result<Daemon> {
    let state = directory.join("state-containerd");
    let file = directory.join("containerd.toml");
    let text = format!(
        "version = 2\nroot = {root:?}\nstate = {state:?}\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\n  address = {:?}\n",
        directory.join("c.sock"),
    );
    fs::write(&file, text)?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut paths = vec![binaries.to_path_buf()];
    paths.extend(std::env::split_paths(&path));
    let mut command = Command::new("containerd");
    command
        .args(["--log-level", "warn"])
        .arg("--config")
        .arg(&file)
        .env("PATH", std::env::join_paths(paths)?)
        .env("TRENV_CONFIG", config);
    Daemon::start("containerd", &mut command, directory)
}

/// `ctr` on a socket and namespace; its output.
pub fn ctr(socket: &Path, namespace: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("ctr")
        .arg("-a")
        .arg(socket)
        .args(["-n", namespace])
        .args(arguments)
        .output()
        .context("Failed to run ctr")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("ctr {} failed: {}", arguments.join(" "), text.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
