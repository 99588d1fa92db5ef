//! What a skeleton and its clones are asked for beyond what a zygote is.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use trenv_restorer::wire::{self, MOST_RANGES, READ_AHEAD, fd};

use super::channel::send;
use super::{PreparedClone, Zygote, ZygoteError, io_error, lock, receive_soon, zygote_error};
use crate::plan::skeleton::{self, Map};
use crate::working_set::table_of;

impl Zygote {
    /// Puts parts of files into the address space that clones copy from now on.
    pub(crate) fn rework(&self, maps: &[Map], files: &[BorrowedFd<'_>]) -> Result<(), ZygoteError> {
        let program = skeleton::rework(skeleton::fitting(maps), self.tree.control);
        let control = lock(&self.control);
        File::options()
            .write(true)
            .open(format!("/proc/{}/mem", self.pid))
            .and_then(|memory| memory.write_all_at(&program, self.tree.rework))
            .map_err(io_error("writing a program into the skeleton"))?;
        send(control.as_fd(), wire::request::REWORK, 0, files)?;
        let (message, _) = receive_soon(&control)?;
        zygote_error(&message, &self.tree)
    }
}

/// What a process brings in of the memory that its clone attaches, before the tree runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// Start and length of what is copied, as it will be written.
    pub copied: Vec<(u64, u64)>,
    /// The same of what will be read.
    pub read: Vec<(u64, u64)>,
}

impl Ahead {
    /// The table of [`wire::verb::COPY_AHEAD`].
    fn table(&self) -> Vec<u8> {
        let read = self
            .read
            .iter()
            .map(|(at, length)| (*at, length | READ_AHEAD));
        let copied = self.copied.iter().copied();
        let ranges: Vec<_> = copied.chain(read).take(MOST_RANGES).collect();
        table_of(&ranges)
    }
}

impl PreparedClone {
    /// Tells the clone what to bring in, by process, once it has attached its memory.
    pub(crate) fn bring_ahead(&self, ahead: &[Ahead]) -> Result<(), ZygoteError> {
        let doing = "telling a clone what is written";
        let none = Ahead::default();
        let mut told = self.tree.tables.iter().zip(ahead);
        if told.all(|(_, ahead)| *ahead == none) {
            return Ok(());
        }
        let memory = File::options()
            .write(true)
            .open(format!("/proc/{}/mem", self.pid))
            .map_err(io_error(doing))?;
        for (table, ahead) in self.tree.tables.iter().zip(ahead) {
            if let Some(table) = table {
                memory
                    .write_all_at(&ahead.table(), *table)
                    .map_err(io_error(doing))?;
            }
        }
        Ok(())
    }

    /// Takes the clone's userfaultfd, if it has one; the clone loses its own when it starts.
    pub(super) fn find_watch(&mut self) -> Result<(), ZygoteError> {
        use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
        if self.tree.watched {
            let number = i32::try_from(self.tree.control + fd::WATCH).unwrap_or_default();
            let watch = pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())
                .map_err(|errno| io_error("taking a clone's userfaultfd")(errno.into()))?;
            self.watch = Some(watch);
        }
        Ok(())
    }

    /// Its userfaultfd, for the one who watches it.
    pub(crate) fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn take_watch(&mut self) -> Option<OwnedFd> {
        self.watch.take()
    }

    /// An address that is mapped in the clone and its tree, and never watched.
    pub(crate) fn unwatched(&self) -> u64 {
        self.tree.base
    }
}
