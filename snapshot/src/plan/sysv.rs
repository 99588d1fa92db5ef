//! SysV shared memory, semaphores and message queues, made by the tree's root in the sandbox's IPC namespace with the
//! ids that they had.

use nix::libc;
use trenv_restorer::wire::fd;

use super::process::Tree;
use super::region::{Program, Region};
use crate::manifest::{Manifest, Mapping, MemoryKind, MessageQueue};

/// fsconfig(2).
const FSCONFIG_CMD_CREATE: u64 = 6;
/// Slots: the namespace's own /proc, a file in it.
const PROC: u8 = 1;
const NEXT_ID: u8 = 2;
const SET_ALL: u64 = libc::SETALL as u64;
const NEW: i32 = libc::IPC_CREAT | libc::IPC_EXCL;

/// Steps that make everything; `pieces` tells where the bytes of a memory object are in the file of
/// pages: offset in the object, there, and length.
pub fn make(
    tree: Tree<'_>,
    pieces: impl Fn(usize) -> Vec<(u64, u64, u64)>,
    region: &mut Region,
    program: &mut Program,
) {
    let manifest = tree.manifest;
    let segments = manifest.memory.iter().enumerate();
    let segments: Vec<_> = segments
        .filter_map(|(index, object)| match object.kind {
            MemoryKind::Segment { id, key, locked } => Some((index, object, id, key, locked)),
            _ => None,
        })
        .collect();
    let none = manifest.semaphores.is_empty() && manifest.message_queues.is_empty();
    if segments.is_empty() && none {
        return;
    }
    // The sandbox's own /proc/sys may not be written to.
    program.about(region.sentence("reaching the settings of the IPC namespace".into()));
    let name = region.put_text("proc");
    program.call(libc::SYS_fsopen, [name, 0]).into(0);
    program
        .call(libc::SYS_fsconfig, [0, FSCONFIG_CMD_CREATE, 0, 0, 0])
        .from(0, 0);
    program
        .call(libc::SYS_fsmount, [0, 0, 0])
        .from(0, 0)
        .into(PROC);
    program.call(libc::SYS_close, [0]).from(0, 0);
    for (index, object, id, key, locked) in segments {
        program.about(region.sentence(format!("making SysV shared memory {id}")));
        choose("shm", id, region, program);
        let how = (NEW as u32 | object.mode) as u64;
        let key = key as u32;
        program
            .call(libc::SYS_shmget, [u64::from(key), object.size, how])
            .exactly(id as u64);
        let spare = tree.placement.spare;
        program.call(libc::SYS_shmat, [id as u64, spare, 0]);
        program.exactly(spare);
        for (at, from, length) in pieces(index) {
            let content = tree.control + fd::CONTENT;
            program.call(libc::SYS_pread64, [content, spare + at, length, from]);
            program.exactly(length);
        }
        program.call(libc::SYS_shmdt, [spare]);
        if locked {
            let lock = libc::SHM_LOCK as u64;
            program.call(libc::SYS_shmctl, [id as u64, lock, 0]);
        }
        let owner = (object.uid, object.gid, object.mode);
        give(libc::SYS_shmctl, id, owner, region, program);
    }
    for set in &manifest.semaphores {
        let id = set.id as u64;
        program.about(region.sentence(format!("making SysV semaphores {id}")));
        choose("sem", set.id, region, program);
        let how = (NEW as u32 | set.mode) as u64;
        let key = set.key as u32;
        program
            .call(
                libc::SYS_semget,
                [u64::from(key), set.values.len() as u64, how],
            )
            .exactly(id);
        let values: Vec<u8> = set.values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        let values = region.put(&values, 8);
        program.call(libc::SYS_semctl, [id, 0, SET_ALL, values]);
        let owner = (set.uid, set.gid, set.mode);
        give(libc::SYS_semctl, set.id, owner, region, program);
    }
    for queue in &manifest.message_queues {
        make_queue(queue, region, program);
    }
    program.call(libc::SYS_close, [0]).from(0, PROC);
}

fn make_queue(queue: &MessageQueue, region: &mut Region, program: &mut Program) {
    let id = queue.id as u64;
    program.about(region.sentence(format!("making SysV message queue {id}")));
    choose("msg", queue.id, region, program);
    let how = (NEW as u32 | queue.mode) as u64;
    let key = u64::from(queue.key as u32);
    program.call(libc::SYS_msgget, [key, how]).exactly(id);
    // struct msqid64_ds: ipc64_perm of 48 bytes, three times, then bytes, messages, most bytes.
    let mut wanted = permissions(queue.uid, queue.gid, queue.mode);
    wanted[88..96].copy_from_slice(&queue.room.to_ne_bytes());
    let wanted = region.put(&wanted, 8);
    let set = libc::IPC_SET as u64;
    program.call(libc::SYS_msgctl, [id, set, wanted]);
    for message in &queue.messages {
        let mut bytes = message.kind.to_ne_bytes().to_vec();
        bytes.extend(&message.text);
        let (at, length) = (region.put(&bytes, 8), message.text.len() as u64);
        let at_once = libc::IPC_NOWAIT as u64;
        program.call(libc::SYS_msgsnd, [id, at, length, at_once]);
    }
}

/// Maps a segment into a process.
pub fn attach(id: i32, at: u64, mapping: &Mapping, program: &mut Program) {
    let mut how = 0;
    if mapping.protection & 2 == 0 {
        how |= libc::SHM_RDONLY;
    }
    if mapping.protection & 4 != 0 {
        how |= libc::SHM_EXEC;
    }
    program.call(libc::SYS_shmat, [id as u64, at, how as u64]);
    program.exactly(at);
}

/// The length of the largest segment.
pub fn longest(manifest: &Manifest) -> u64 {
    let segments = manifest.memory.iter();
    let segments = segments.filter(|object| matches!(object.kind, MemoryKind::Segment { .. }));
    segments.map(|object| object.size).max().unwrap_or(0)
}

/// Says which id the next object shall have (kernel: Documentation/admin-guide/sysctl/kernel.rst).
fn choose(kind: &str, id: i32, region: &mut Region, program: &mut Program) {
    let path = region.put_text(&format!("sys/kernel/{kind}_next_id"));
    program
        .call(libc::SYS_openat, [0, path, libc::O_WRONLY as u64, 0])
        .from(0, PROC)
        .into(NEXT_ID);
    let text = id.to_string();
    let bytes = region.put(text.as_bytes(), 1);
    program
        .call(libc::SYS_write, [0, bytes, text.len() as u64])
        .from(0, NEXT_ID);
    program.call(libc::SYS_close, [0]).from(0, NEXT_ID);
}

/// Gives an object to its owner (IPC_SET).
fn give(
    call: i64,
    id: i32,
    (uid, gid, mode): (u32, u32, u32),
    region: &mut Region,
    program: &mut Program,
) {
    if (uid, gid) == (0, 0) {
        return;
    }
    let bytes = permissions(uid, gid, mode);
    let wanted = region.put(&bytes, 8);
    let (id, set) = (id as u64, libc::IPC_SET as u64);
    match call {
        libc::SYS_semctl => program.call(call, [id, 0, set, wanted]),
        _ => program.call(call, [id, set, wanted]),
    };
}

/// What a `struct shmid64_ds`, `semid64_ds` or `msqid64_ds` begins with, and zeroes.
fn permissions(uid: u32, gid: u32, mode: u32) -> Vec<u8> {
    // struct ipc64_perm: key, uid, gid, cuid, cgid, mode.
    let words = [0, uid, gid, 0, 0, mode];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.resize(256, 0);
    bytes
}
