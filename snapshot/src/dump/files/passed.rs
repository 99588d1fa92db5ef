//! Open files that wait in unix sockets to be received (SCM_RIGHTS of unix(7)).

use std::os::fd::{AsRawFd, OwnedFd};

use super::{Files, Holder, Info, Reached};
use crate::dump::memory_objects::MemoryObjects;
use crate::dump::unix_sockets::Waiting;
use crate::dump::{DumpError, proc_link};
use crate::manifest::{ObjectKind, Queued};

/// What waits in a unix socket.
pub struct Passed {
    /// The socket's index, and where it was found.
    pub socket: usize,
    pub holder: Holder,
    pub queue: Vec<Waiting>,
}

impl Files<'_> {
    /// Open files that wait in unix sockets: the kernel has given them to this process too.
    pub fn look_at_passed(&mut self, memory: &mut MemoryObjects) -> Result<(), DumpError> {
        while let Some(passed) = self.passed.pop() {
            let holder = passed.holder;
            let mut queue = Vec::new();
            for waiting in passed.queue {
                let mut rights = Vec::new();
                for copy in waiting.rights {
                    let object =
                        self.add_passed(copy, holder, memory)
                            .map_err(|err| match err {
                                DumpError::Refused(why) => DumpError::Refused(format!(
                                    "of what waits in descriptor {} of process {}: {why}",
                                    holder.number, holder.pid
                                )),
                                err => err,
                            })?;
                    rights.push(object);
                }
                let data = waiting.data;
                queue.push(Queued { data, rights });
            }
            if let ObjectKind::Socket(socket) = &mut self.objects[passed.socket].kind {
                socket.queue = queue;
            }
        }
        Ok(())
    }

    fn add_passed(
        &mut self,
        copy: OwnedFd,
        holder: Holder,
        memory: &mut MemoryObjects,
    ) -> Result<usize, DumpError> {
        let place = (std::process::id() as i32, copy.as_raw_fd());
        let info = Info::read(place.0, place.1)?;
        let link = proc_link(&format!("/proc/{}/fd/{}", place.0, place.1))?;
        if let Some(object) = self.known(&link, place)? {
            return Ok(object);
        }
        let kept = copy
            .try_clone()
            .map_err(DumpError::io("duplicating a descriptor"))?;
        let place = (place.0, kept.as_raw_fd());
        self.kept.push(kept);
        let reached = Reached {
            holder,
            place,
            copy,
            link,
            info: info.clone(),
        };
        let object = self.add(reached, memory)?;
        self.find_locks(object, holder.pid, holder.number, &info)?;
        Ok(object)
    }

    /// Some of what can be passed cannot be made in time to be passed again.
    pub fn check_passed(&self) -> Result<(), DumpError> {
        for object in &self.objects {
            let ObjectKind::Socket(socket) = &object.kind else {
                continue;
            };
            for passed in socket.queue.iter().flat_map(|one| &one.rights) {
                if let Some(what) = self.objects[*passed].kind.not_passed() {
                    return Err(DumpError::Refused(format!(
                        "it has a unix socket in which {what} waits to be received"
                    )));
                }
            }
        }
        Ok(())
    }
}
