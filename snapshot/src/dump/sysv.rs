//! SysV shared memory, attached or not, semaphores and message queues of the sandbox's IPC namespace
//! (sysvipc(7)).
//!
//! What cannot be seen from outside is lost: who used one last and when, and what SEM_UNDO would undo.

use std::fs::File;

use nix::errno::Errno;
use nix::libc;
use nix::sched::CloneFlags;

use super::memory_objects::mapped_file;
use super::{DumpError, proc_text};
use crate::manifest::{MessageQueue, QueueMessage, SemaphoreSet};

/// Bits of a segment's mode in /proc/sysvipc/shm (shmctl(2)).
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

/// A segment, and the file behind it.
#[derive(Debug)]
pub struct Segment {
    pub id: i32,
    pub key: i32,
    pub mode: u32,
    pub locked: bool,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub file: File,
}

/// Lets this thread see the sandbox's IPC namespace.
pub fn enter(init: i32) -> Result<(), DumpError> {
    let doing = "entering the sandbox's IPC namespace";
    let namespace = File::open(format!("/proc/{init}/ns/ipc")).map_err(DumpError::io(doing))?;
    nix::sched::setns(&namespace, CloneFlags::CLONE_NEWIPC).map_err(DumpError::errno(doing))
}

/// The segments of the namespace that this thread is in.
pub fn segments() -> Result<Vec<Segment>, DumpError> {
    let mut all = Vec::new();
    for line in table("shm")? {
        // key shmid perms size cpid lpid nattch uid gid cuid cgid
        let mode = line.octal(2)?;
        let id = line.number(1)? as i32;
        if mode & SHM_DEST != 0 {
            return Err(DumpError::Refused(format!(
                "SysV shared memory {id} is marked to be removed (IPC_RMID)"
            )));
        }
        let file = attached_file(id)
            .map_err(DumpError::io(format!("looking at SysV shared memory {id}")))?;
        all.push(Segment {
            id,
            key: line.number(0)? as i32,
            mode: mode & 0o777,
            locked: mode & SHM_LOCKED != 0,
            uid: line.number(7)? as u32,
            gid: line.number(8)? as u32,
            size: line.number(3)? as u64,
            file,
        });
    }
    Ok(all)
}

/// The semaphores of the namespace that this thread is in.
pub fn semaphores() -> Result<Vec<SemaphoreSet>, DumpError> {
    let mut all = Vec::new();
    for line in table("sem")? {
        // key semid perms nsems uid gid cuid cgid
        let (id, count) = (line.number(1)? as i32, line.number(3)? as usize);
        let mut values = vec![0u16; count];
        // SAFETY: GETALL writes one value for each semaphore of the set, and `values` has as many:
        // the set's size never changes, and its owners are stopped.
        let result = unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) };
        Errno::result(result).map_err(DumpError::errno(format!("reading semaphores {id}")))?;
        all.push(SemaphoreSet {
            id,
            key: line.number(0)? as i32,
            mode: line.octal(2)? & 0o777,
            uid: line.number(4)? as u32,
            gid: line.number(5)? as u32,
            values,
        });
    }
    Ok(all)
}

/// The message queues of the namespace that this thread is in.
pub fn message_queues() -> Result<Vec<MessageQueue>, DumpError> {
    let mut all = Vec::new();
    for line in table("msg")? {
        // key msqid perms cbytes qnum lspid lrpid uid gid
        let (id, count) = (line.number(1)? as i32, line.number(4)?);
        let doing = || DumpError::errno(format!("reading SysV message queue {id}"));
        // SAFETY: IPC_STAT writes a msqid_ds, for which all zeroes are a value.
        let about = unsafe {
            let mut about: libc::msqid_ds = std::mem::zeroed();
            Errno::result(libc::msgctl(id, libc::IPC_STAT, &raw mut about)).map_err(doing())?;
            about
        };
        let mut messages = Vec::new();
        for index in 0..count {
            messages.push(message(id, index, line.number(3)? as usize).map_err(doing())?);
        }
        all.push(MessageQueue {
            id,
            key: line.number(0)? as i32,
            mode: line.octal(2)? & 0o777,
            uid: line.number(7)? as u32,
            gid: line.number(8)? as u32,
            room: about.msg_qbytes,
            messages,
        });
    }
    Ok(all)
}

/// Copies a message, at most `room` bytes of it, and leaves it where it is.
fn message(id: i32, index: i64, room: usize) -> nix::Result<QueueMessage> {
    // struct msgbuf: the type, then the text.
    let mut buffer = vec![0u8; 8 + room];
    let how = libc::MSG_COPY | libc::IPC_NOWAIT;
    // SAFETY: the kernel writes the type and at most `room` bytes.
    let got = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), room, index, how) };
    let length = Errno::result(got)?.unsigned_abs();
    let kind = buffer.first_chunk().copied().unwrap_or_default();
    Ok(QueueMessage {
        kind: i64::from_ne_bytes(kind),
        text: buffer[8..8 + length].to_vec(),
    })
}

/// Reaches the file of a segment by attaching it for a moment.
fn attached_file(id: i32) -> std::io::Result<File> {
    // SAFETY: the kernel chooses a free range.
    let at = unsafe { libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY) };
    if at as isize == -1 {
        return Err(std::io::Error::last_os_error());
    }
    let start = at as u64;
    let maps = std::fs::read_to_string("/proc/self/maps");
    let file = maps.and_then(|maps| {
        let prefix = format!("{start:x}-");
        let end = maps.lines().find_map(|line| {
            let range = line.strip_prefix(&prefix)?.split_once(' ')?.0;
            u64::from_str_radix(range, 16).ok()
        });
        mapped_file(std::process::id() as i32, start, end.unwrap_or(0))
    });
    // SAFETY: detaches what was attached above; no reference into it was made.
    unsafe { libc::shmdt(at) };
    file
}

/// A line of a table of /proc/sysvipc.
struct Line {
    fields: Vec<String>,
    name: &'static str,
}

fn table(name: &'static str) -> Result<impl Iterator<Item = Line>, DumpError> {
    // The link of this thread leads to the namespace that it is in.
    let text = proc_text(&format!("/proc/sysvipc/{name}"))?;
    let lines: Vec<Line> = text
        .lines()
        .skip(1)
        .map(|line| Line {
            fields: line.split_whitespace().map(str::to_owned).collect(),
            name,
        })
        .collect();
    Ok(lines.into_iter())
}

impl Line {
    fn number(&self, index: usize) -> Result<i64, DumpError> {
        let field = self.fields.get(index).and_then(|text| text.parse().ok());
        field.ok_or_else(|| self.wrong())
    }

    fn octal(&self, index: usize) -> Result<u32, DumpError> {
        let field = self.fields.get(index);
        field
            .and_then(|text| u32::from_str_radix(text, 8).ok())
            .ok_or_else(|| self.wrong())
    }

    fn wrong(&self) -> DumpError {
        DumpError::Io {
            doing: format!("reading /proc/sysvipc/{}", self.name),
            source: std::io::ErrorKind::InvalidData.into(),
        }
    }
}
