//! Named pipes.

use std::collections::BTreeMap;

use nix::libc;

use super::{SETTABLE, move_to, place};
use crate::manifest::{Manifest, ObjectKind};
use crate::plan::region::{Program, Region};

/// Slot of an end that reads and writes: with it no open call waits for another end.
const BOTH: u8 = 1;

/// Steps that open every named pipe of the tree, at its number above the control descriptor.
pub fn make(manifest: &Manifest, control: u64, region: &mut Region, program: &mut Program) {
    let mut pipes: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, object) in manifest.objects.iter().enumerate() {
        if let ObjectKind::Fifo { path, .. } = &object.kind {
            pipes.entry(path).or_default().push(index);
        }
    }
    let here = libc::AT_FDCWD as u64;
    for (path, ends) in pipes {
        program.about(region.sentence(format!("opening the named pipe {path}")));
        let text = region.put_text(path);
        let both = (libc::O_RDWR | libc::O_NONBLOCK) as u64;
        program
            .call(libc::SYS_openat, [here, text, both, 0])
            .into(BOTH);
        for end in ends {
            let (object, at) = (&manifest.objects[end], place(control, end));
            let flags = u64::from(object.flags);
            let waiting = flags | libc::O_NONBLOCK as u64;
            program
                .call(libc::SYS_openat, [here, text, waiting, 0])
                .into(0);
            move_to(at, program);
            let settable = flags & u64::from(SETTABLE);
            program.call(libc::SYS_fcntl, [at, libc::F_SETFL as u64, settable]);
            let ObjectKind::Fifo { size, data, .. } = &object.kind else {
                continue;
            };
            if *size != 65_536 {
                program.call(libc::SYS_fcntl, [at, libc::F_SETPIPE_SZ as u64, *size]);
            }
            if !data.is_empty() {
                let (bytes, length) = (region.put(data, 8), data.len() as u64);
                program
                    .call(libc::SYS_write, [0, bytes, length])
                    .from(0, BOTH)
                    .exactly(length);
            }
        }
        program.call(libc::SYS_close, [0]).from(0, BOTH);
    }
}
