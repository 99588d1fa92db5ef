//! VMAs of a process, from /proc/PID/smaps.

use super::{DumpError, proc_text};
use crate::generation;
use crate::manifest::{Mapping, MappingFlags, MappingKind};

/// Name of the region that a restored process was brought up from; it is not part of the process.
pub const RESTORER: &str = "/memfd:trenv-restorer";

/// Reads every VMA, refusing by name what cannot be captured.
pub fn read(host: i32, pid: i32) -> Result<Vec<Mapping>, DumpError> {
    let path = format!("/proc/{host}/smaps");
    let mut found = Vec::new();
    let mut current: Option<Line> = None;
    for line in proc_text(&path)?.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(head) = current.take()
                && let Some(mapping) = head.mapping(flags, pid)?
            {
                found.push(mapping);
            }
        } else if let Some(head) = Line::parse(line) {
            current = Some(head);
        }
    }
    Ok(found)
}

/// Address of a `syscall` instruction in the vdso.
pub fn syscall_instruction(host: i32, vdso: &Mapping) -> Result<u64, DumpError> {
    let code = vdso_bytes(host, vdso)?;
    code.windows(2)
        .position(|pair| pair == [0x0f, 0x05])
        .map(|at| vdso.start + at as u64)
        .ok_or_else(|| DumpError::Refused("its vdso holds no syscall instruction".into()))
}

fn vdso_bytes(host: i32, vdso: &Mapping) -> Result<Vec<u8>, DumpError> {
    let path = format!("/proc/{host}/mem");
    let memory = std::fs::File::open(&path).map_err(DumpError::io(format!("opening {path}")))?;
    let mut code = vec![0; (vdso.end - vdso.start) as usize];
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut code, vdso.start)
        .map_err(DumpError::io("reading the vdso"))?;
    Ok(code)
}

/// The line that begins an entry of smaps.
struct Line {
    start: u64,
    end: u64,
    access: String,
    offset: u64,
    inode: u64,
    name: String,
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let mut fields = rest.splitn(4, ' ');
        let access = fields.next()?;
        let offset = fields.next()?;
        fields.next()?;
        let (inode, name) = fields.next()?.split_once(' ').unwrap_or(("0", ""));
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            access: access.into(),
            offset: u64::from_str_radix(offset, 16).ok()?,
            inode: inode.parse().ok()?,
            name: name.trim().into(),
        })
    }

    fn mapping(self, flags: &str, pid: i32) -> Result<Option<Mapping>, DumpError> {
        let name = self.name.as_str();
        if name == "[vsyscall]" || name.starts_with(RESTORER) {
            return Ok(None);
        }
        let refuse = |why: &str| {
            let named = if name.is_empty() { "anonymous" } else { name };
            Err(DumpError::Refused(format!(
                "mapping {:#x}-{:#x} ({named}) of process {pid} {why}",
                self.start, self.end
            )))
        };
        let mut properties = MappingFlags::default();
        for flag in flags.split_whitespace() {
            match flag {
                "gd" => properties.grows_down = true,
                "nr" => properties.no_reserve = true,
                "dc" => properties.dont_fork = true,
                "dd" => properties.dont_dump = true,
                "wf" => properties.wipe_on_fork = true,
                "dp" => properties.droppable = true,
                "hg" => properties.huge = true,
                "nh" => properties.no_huge = true,
                "mg" => properties.mergeable = true,
                "lo" => return refuse("is locked in memory (mlock)"),
                "ss" => return refuse("is a shadow stack"),
                "um" | "uw" | "ui" => return refuse("is watched by a userfaultfd"),
                "ht" => return refuse("uses huge TLB pages"),
                "sl" => return refuse("is sealed (mseal)"),
                "io" | "pf" if !name.starts_with("[vvar") => return refuse("maps a device"),
                _ => {}
            }
        }
        let shared = self.access.ends_with('s');
        let writable =
            self.access.contains('w') || flags.split_whitespace().any(|f| f == "mw") && shared;
        let kind = match name {
            "[vdso]" => MappingKind::Vdso,
            _ if name.starts_with("[vvar") => MappingKind::Vvar,
            _ if self.inode == 0 && !shared && !name.starts_with('/') => MappingKind::Anonymous,
            _ if name.ends_with(" (deleted)") => {
                return refuse(if shared {
                    "is shared memory"
                } else {
                    "maps a deleted file"
                });
            }
            _ if !name.starts_with('/') => return refuse("is of an unknown kind"),
            _ if shared && writable => return refuse("is a writable shared file mapping"),
            generation::PATH => match generation::refusal(shared, self.end - self.start) {
                Some(why) => return refuse(why),
                None => MappingKind::Generation,
            },
            _ if shared => MappingKind::SharedReadOnly {
                path: unescape(name),
                offset: self.offset,
            },
            _ => MappingKind::File {
                path: unescape(name),
                offset: self.offset,
            },
        };
        let mut protection = 0;
        for (bit, letter) in ['r', 'w', 'x'].into_iter().enumerate() {
            if self.access.contains(letter) {
                protection |= 1 << bit;
            }
        }
        Ok(Some(Mapping {
            start: self.start,
            end: self.end,
            protection,
            kind,
            flags: properties,
        }))
    }
}

/// The kernel writes newlines in names as `\012`.
fn unescape(name: &str) -> String {
    name.replace("\\012", "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(line: &str, flags: &str) -> Result<Option<Mapping>, DumpError> {
        Line::parse(line).unwrap().mapping(flags, 7)
    }

    #[test]
    fn reads_a_private_file_mapping() {
        let got = mapping(
            "7f1000000000-7f1000002000 r-xp 00001000 fe:00 42                 /usr/lib/a b.so",
            "rd ex mr mw me",
        );
        let got = got.unwrap().unwrap();
        assert_eq!(
            (got.start, got.end, got.protection),
            (0x7f10_0000_0000, 0x7f10_0000_2000, 5)
        );
        assert_eq!(
            got.kind,
            MappingKind::File {
                path: "/usr/lib/a b.so".into(),
                offset: 0x1000
            }
        );
    }

    #[test]
    fn reads_anonymous_memory_and_the_stack() {
        let heap = mapping("1000-2000 rw-p 00000000 00:00 0    [heap]", "rd wr")
            .unwrap()
            .unwrap();
        assert_eq!(heap.kind, MappingKind::Anonymous);
        let stack = mapping("1000-2000 rw-p 00000000 00:00 0 [stack]", "rd wr gd")
            .unwrap()
            .unwrap();
        assert!(stack.flags.grows_down);
        let plain = mapping("1000-2000 ---p 00000000 00:00 0 ", "mr mw me nr")
            .unwrap()
            .unwrap();
        assert_eq!((plain.kind, plain.protection), (MappingKind::Anonymous, 0));
    }

    #[test]
    fn refuses_by_name() {
        for (line, flags, why) in [
            (
                "1000-2000 rw-s 00000000 00:01 5 /dev/zero (deleted)",
                "rd wr sh",
                "shared memory",
            ),
            (
                "1000-2000 r-xp 00000000 00:01 5 /tmp/x.so (deleted)",
                "rd ex",
                "deleted file",
            ),
            ("1000-2000 rw-p 00000000 00:00 0 ", "rd wr lo", "mlock"),
            (
                "1000-2000 rw-s 00000000 00:01 5 /srv/db",
                "rd wr sh",
                "writable shared",
            ),
        ] {
            let err = mapping(line, flags).unwrap_err().to_string();
            assert!(err.contains(why), "{err}");
        }
    }

    #[test]
    fn leaves_out_what_the_kernel_or_the_restorer_put_there() {
        let gate = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(mapping(gate, "ex").unwrap(), None);
        let region = "1000-2000 r-xp 00000000 00:01 9 /memfd:trenv-restorer (deleted)";
        assert_eq!(mapping(region, "rd ex").unwrap(), None);
    }
}
