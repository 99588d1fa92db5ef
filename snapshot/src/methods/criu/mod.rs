//! `criu` and `criu-lazy`: the tree is dumped and restored by CRIU, the program.
//!
//! CRIU works from its own images, which [`Images`] keeps beside the pool: [`dump`] takes them while
//! the function runs for the first time, [`Criu::start`] restores them. Both times CRIU runs inside
//! of the sandbox ([`launch`], [`enter()`]): its namespaces are those of the tree then, so that it
//! records none and makes none. [`options`] holds its arguments.

mod enter;
mod images;
mod launch;
mod lazy;
mod options;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use trenv_pool::TemplateReader;

use super::Method;
use crate::zygote::{StartRequest, Started, ZygoteError};
pub use enter::{ARGUMENT as ENTER, enter};
pub use images::{Image, Images};
use images::{Streams, Work};
use launch::{Launch, Program};
use lazy::PageServer;

/// How long CRIU may take for a dump.
const DUMP_DEADLINE: Duration = Duration::from_secs(60);

/// Why CRIU did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    #[error("CRIU is not installed on this machine; install the package criu")]
    Absent,
    #[error("Failed to run CRIU while {doing}")]
    Io { doing: String, source: io::Error },
    #[error("CRIU failed at the {doing}: {reason}")]
    Failed { doing: &'static str, reason: String },
    #[error("CRIU did not end the {doing} within {limit:?}")]
    Deadline {
        doing: &'static str,
        limit: Duration,
    },
    #[error(
        "CRIU has no image of the template {image}; it is taken when the function is built with the start method criu"
    )]
    NoImage { image: String },
    #[error("CRIU's image {} cannot be used: {reason}; deploy the function again", path.display())]
    BadImage { path: PathBuf, reason: String },
    #[error("CRIU restored the tree, but its root process {0} has ended")]
    RootGone(i32),
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> CriuError {
    let doing = doing.into();
    move |source| CriuError::Io { doing, source }
}

/// How the pages come from CRIU's image. A third way, in which they are mapped instead of copied, is
/// measured by papers with a CRIU that they have changed; CRIU itself has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All are read before the tree runs.
    Read,
    /// CRIU's page server brings each when it is touched, and the others by and by.
    Lazy,
}

/// What CRIU is to dump.
#[derive(Debug)]
pub struct DumpRequest<'a> {
    /// The program `trenv-zygote`.
    pub binary: &'a Path,
    /// pidfd of the sandbox's pid 1.
    pub init: BorrowedFd<'a>,
    /// Host pid of the tree's root, and its pid in the sandbox.
    pub root: i32,
    pub root_pid: i32,
}

/// Has CRIU write an image of a running tree, which goes on.
///
/// # Errors
/// When CRIU is not there, cannot dump the tree, or the machine fails. The tree goes on all the same,
/// unless CRIU did not end in time.
pub fn dump(request: &DumpRequest<'_>, images: &Images) -> Result<Image, CriuError> {
    let streams = Streams::of(request.root, request.root_pid)?;
    let image = images.begin()?;
    let work = images.work()?;
    let launch = Launch {
        program: &Program::find()?,
        binary: request.binary,
        init: request.init,
        cgroups: &[],
        image: image.path(),
        work: work.path(),
        stdio: None,
        doing: "dump",
        deadline: DUMP_DEADLINE,
    };
    launch.run(&options::dump(&streams))?;
    image.describe(&streams)?;
    Ok(image)
}

/// One template, prepared for starts by CRIU.
#[derive(Debug)]
pub struct Criu {
    mode: Mode,
    program: Program,
    binary: PathBuf,
    images: Images,
    image: PathBuf,
    streams: Streams,
    /// The page server of the next start.
    server: Mutex<Option<PageServer>>,
}

impl Criu {
    /// Finds CRIU and its image of the template.
    ///
    /// # Errors
    /// When one of them is not there.
    pub fn prepare(
        mode: Mode,
        template: &TemplateReader,
        binary: &Path,
        images: Images,
    ) -> Result<Self, CriuError> {
        let info = template.info();
        let image = images.of(&info.id, info.generation);
        let streams = Streams::read(&image)?;
        let criu = Self {
            mode,
            program: Program::find()?,
            binary: binary.to_owned(),
            images,
            image,
            streams,
            server: Mutex::default(),
        };
        criu.ready()?;
        Ok(criu)
    }

    #[must_use]
    pub fn method(&self) -> Method {
        match self.mode {
            Mode::Read => Method::Criu,
            Mode::Lazy => Method::CriuLazy,
        }
    }

    /// Does ahead of the next start what can be done: its page server is started.
    ///
    /// # Errors
    /// When the server does not start.
    pub fn ready(&self) -> Result<(), CriuError> {
        if self.mode == Mode::Lazy {
            let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
            if server.is_none() {
                *server = Some(PageServer::start(&self.program, &self.image, &self.images)?);
            }
        }
        Ok(())
    }

    /// Restores the tree in a sandbox, as a part of the cgroups with these directories.
    ///
    /// # Errors
    /// When CRIU fails: what it made of the tree must then be killed with its cgroup.
    pub fn start(
        &self,
        cgroups: &[PathBuf],
        request: &StartRequest<'_>,
    ) -> Result<Started, ZygoteError> {
        let begun = Instant::now();
        let (server, work) = self.server_and_work()?;
        let launch = Launch {
            program: &self.program,
            binary: &self.binary,
            init: request.init,
            cgroups,
            image: &self.image,
            work: work.path(),
            stdio: Some(request.stdio),
            doing: "restore",
            deadline: request.deadline,
        };
        launch.run(&options::restore(self.mode, &self.streams))?;
        if let Some(server) = server {
            server.leave(work);
        }
        let restored = begun.elapsed();
        Ok(Started {
            pids: self.pids(cgroups)?,
            root_pid: self.streams.root_pid,
            steps: vec![("criu", restored)],
            work: Arc::default(),
        })
    }

    /// The page server of this start, if it needs one, and the folder that it shares with CRIU.
    fn server_and_work(&self) -> Result<(Option<PageServer>, Work), CriuError> {
        self.ready()?;
        let server = self.server.lock();
        match server.unwrap_or_else(PoisonError::into_inner).take() {
            Some(mut server) => {
                let work = server.take_work()?;
                Ok((Some(server), work))
            }
            None => Ok((None, self.images.work()?)),
        }
    }

    /// Host pids of the restored tree, the root first.
    fn pids(&self, cgroups: &[PathBuf]) -> Result<Vec<i32>, CriuError> {
        let mut pids = Vec::new();
        if let Some(cgroup) = cgroups.first() {
            let text = std::fs::read_to_string(cgroup.join("cgroup.procs"));
            let text = text.map_err(io_error("listing the restored processes"))?;
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        let root = pids
            .iter()
            .position(|pid| images::pid_inside(*pid) == Some(self.streams.root_pid))
            .ok_or(CriuError::RootGone(self.streams.root_pid))?;
        pids.swap(0, root);
        Ok(pids)
    }
}
