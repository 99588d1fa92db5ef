//! The shim's log: an own rotated file, and containerd's log fifo of every living bundle.
//!
//! A shared shim outlives the bundle that it was started for, so the fifos come and go with the
//! containers. A fifo nobody reads never holds the shim up: what does not fit is left out there.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use trenv_config::Config;

const ROTATE_AT: u64 = 8 << 20;

static FIFOS: OnceLock<Arc<Fifos>> = OnceLock::new();

type Fifos = Mutex<HashMap<String, File>>;

/// The log file of a namespace's shims.
pub fn path(config: &Config, namespace: &str) -> PathBuf {
    config
        .run_dir
        .join("logs")
        .join(format!("shim-{namespace}.log"))
}

/// Sends everything logged from now on to the file and the fifos.
pub fn install(config: &Config, namespace: &str, debug: bool) -> std::io::Result<()> {
    let path = path(config, namespace);
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let sink = Sink {
        file: Arc::new(Mutex::new(Rotated::open(path)?)),
        fifos: Arc::clone(FIFOS.get_or_init(Arc::default)),
    };
    let level = if debug { "debug" } else { "info" };
    let filter = EnvFilter::try_from_env("TRENV_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    // A second call, as in tests, keeps the first log.
    let _ = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_env_filter(filter)
        .with_writer(sink)
        .try_init();
    Ok(())
}

/// Adds the log fifo of a bundle.
pub fn attach(id: &str, bundle: &Path) {
    let fifo = bundle.join("log");
    // Reading too keeps writes from failing while containerd restarts.
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&fifo);
    if let (Ok(file), Some(fifos)) = (opened, FIFOS.get()) {
        guard(fifos).insert(id.to_owned(), file);
    }
}

/// Forgets the log fifo of a container.
pub fn detach(id: &str) {
    if let Some(fifos) = FIFOS.get() {
        guard(fifos).remove(id);
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Rotated {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Rotated {
    fn open(path: PathBuf) -> std::io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let written = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            written,
        })
    }

    fn write(&mut self, line: &[u8]) -> std::io::Result<()> {
        if self.written + line.len() as u64 > ROTATE_AT {
            std::fs::rename(&self.path, self.path.with_extension("log.1"))?;
            *self = Self::open(self.path.clone())?;
        }
        self.written += line.len() as u64;
        self.file.write_all(line)
    }
}

#[derive(Clone)]
struct Sink {
    file: Arc<Mutex<Rotated>>,
    fifos: Arc<Fifos>,
}

struct Line {
    sink: Sink,
    to_fifos: bool,
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line {
            sink: self.clone(),
            to_fifos: false,
        }
    }

    fn make_writer_for(&'a self, meta: &tracing::Metadata<'_>) -> Line {
        Line {
            sink: self.clone(),
            to_fifos: *meta.level() <= Level::WARN,
        }
    }
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        // A full disk must not stop the shim: logging is the one thing that may be lost.
        let _ = guard(&self.sink.file).write(line);
        if self.to_fifos {
            for fifo in guard(&self.sink.fifos).values_mut() {
                let _ = fifo.write(line);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
