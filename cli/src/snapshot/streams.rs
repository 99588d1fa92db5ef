//! This command's streams, given to a task by fifos.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::Context;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;

use crate::containerd::Streams;

/// Fifos of a task to come.
#[derive(Debug)]
pub struct Attached {
    pub streams: Streams,
    input: File,
    outputs: [File; 2],
    directory: PathBuf,
}

/// Threads that copy a task's output until it ends.
#[derive(Debug)]
pub struct Copies(Vec<JoinHandle<()>>);

impl Attached {
    pub fn new() -> anyhow::Result<Self> {
        let name = format!("trenv-streams-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory)
            .with_context(|| format!("Failed to create {}", directory.display()))?;
        Self::in_directory(&directory).inspect_err(|_| remove(&directory))
    }

    fn in_directory(directory: &Path) -> anyhow::Result<Self> {
        let fifo = |name: &str| -> anyhow::Result<PathBuf> {
            let path = directory.join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
                .with_context(|| format!("Failed to make the fifo {}", path.display()))?;
            Ok(path)
        };
        let open = |path: &Path, write: bool| {
            OpenOptions::new()
                .read(true)
                // Both ways: the task's input has not ended before this command's has.
                .write(write)
                .custom_flags(OFlag::O_NONBLOCK.bits())
                .open(path)
                .with_context(|| format!("Failed to open the fifo {}", path.display()))
        };
        let [input, output, error] = ["stdin", "stdout", "stderr"].map(fifo);
        let (input, output, error) = (input?, output?, error?);
        Ok(Self {
            input: open(&input, true)?,
            outputs: [open(&output, false)?, open(&error, false)?],
            streams: Streams {
                input: input.display().to_string(),
                output: output.display().to_string(),
                error: error.display().to_string(),
            },
            directory: directory.to_owned(),
        })
    }

    /// Copies from now on, when the task has opened its ends.
    pub fn copy(self) -> anyhow::Result<Copies> {
        let Self {
            input,
            outputs: [output, error],
            directory,
            ..
        } = self;
        for file in [&input, &output, &error] {
            fcntl(file, FcntlArg::F_SETFL(OFlag::empty()))
                .context("Failed to make a fifo wait for its other end")?;
        }
        // The names are not needed any more.
        remove(&directory);
        // It may wait for ever, and ends with this command.
        std::thread::spawn(move || copy(std::io::stdin(), input));
        Ok(Copies(vec![
            std::thread::spawn(move || copy(output, std::io::stdout())),
            std::thread::spawn(move || copy(error, std::io::stderr())),
        ]))
    }
}

impl Copies {
    /// Waits until all output has been written.
    pub fn finish(self) {
        for thread in self.0 {
            // A thread that ended badly has nothing more to write.
            let _ = thread.join();
        }
    }
}

fn remove(directory: &Path) {
    if let Err(err) = std::fs::remove_dir_all(directory) {
        eprintln!("trenv: Failed to remove {}: {err}", directory.display());
    }
}

fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to
            .write_all(&buffer[..length])
            .and_then(|()| to.flush())
            .is_err()
        {
            return;
        }
    }
}
