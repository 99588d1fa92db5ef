//! CRIU's page server, which serves the missing pages of one restored tree.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Stdio};

use super::images::{Images, Work};
use super::launch::{Program, reason};
use super::{CriuError, io_error, options};
use crate::zygote::hand_over;

/// The descriptor by which it says that it waits for a restore.
const STATUS: i32 = 3;

/// A page server that waits for a restore. Dropping it ends it.
#[derive(Debug)]
pub struct PageServer {
    child: Option<Child>,
    work: Option<Work>,
}

impl PageServer {
    pub fn start(program: &Program, image: &Path, images: &Images) -> Result<Self, CriuError> {
        let work = images.work()?;
        let starting = "starting the page server";
        let (mut says, status) = std::io::pipe().map_err(io_error(starting))?;
        let text = |path: &Path| path.display().to_string();
        let options = options::lazy_pages(&text(image), &text(work.path()), STATUS);
        let mut command = program.command();
        command.args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null());
        hand_over(&mut command, &[(status.as_fd(), STATUS)]).map_err(io_error(starting))?;
        let child = command.spawn().map_err(io_error(starting))?;
        let server = Self {
            child: Some(child),
            work: Some(work),
        };
        drop((command, status));
        // One byte when it is ready, nothing when it has ended.
        let ready = says.read(&mut [0]).map_err(io_error(starting))?;
        if ready == 0 {
            let work = server.work.as_ref();
            return Err(CriuError::Failed {
                doing: "start of the page server",
                reason: work
                    .and_then(|work| reason(work.path(), "lazy-pages"))
                    .unwrap_or_else(|| "it left no log".into()),
            });
        }
        Ok(server)
    }

    /// The folder in which it waits, for the restore.
    pub fn take_work(&mut self) -> Result<Work, CriuError> {
        self.work.take().ok_or(CriuError::Failed {
            doing: "restore",
            reason: "its page server has no folder".into(),
        })
    }

    /// Leaves it to the restored tree: it ends when it has served all pages, or the tree has ended.
    pub fn leave(mut self, work: Work) {
        if let Some(mut child) = self.child.take() {
            std::thread::spawn(move || {
                let _ = child.wait();
                drop(work);
            });
        }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
