//! VMAs of a process, from /proc/PID/smaps.

use super::memory_objects::{MemoryObjects, mapped_file, other_name};
use super::{DumpError, proc_text};
use crate::generation;
use crate::manifest::{MCL_FUTURE, MCL_ONFAULT, Mapping, MappingFlags, MappingKind};

/// Name of the region that a restored process was brought up from; it is not part of the process.
pub const RESTORER: &str = "/memfd:trenv-restorer";

/// How areas are named that a template of the pool's device has made.
const ATTACHED: &str = "/pseudo_mm:";

/// Reads every VMA, refusing by name what cannot be captured.
pub fn read(host: i32, pid: i32, memory: &mut MemoryObjects) -> Result<Vec<Mapping>, DumpError> {
    let path = format!("/proc/{host}/smaps");
    let tmpfs = tmpfs_devices(host)?;
    let mut found = Vec::new();
    let mut current: Option<Line> = None;
    let mut resident = 0;
    for line in proc_text(&path)?.lines() {
        if let Some(kilobytes) = line.strip_prefix("Rss:") {
            resident = kilobytes.trim_end_matches("kB").trim().parse().unwrap_or(0);
        } else if let Some(key) = line.strip_prefix("ProtectionKey:") {
            if let Some(head) = &current {
                head.check_key(key, pid)?;
            }
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(head) = current.take()
                && let Some(mut mapping) = head.mapping(flags, pid)?
            {
                // The kernel tells of MLOCK_ONFAULT by what is not there only.
                let pages = (mapping.end - mapping.start) >> 10;
                mapping.flags.lock_on_fault = mapping.flags.locked && resident < pages;
                head.find_file(&mut mapping, &tmpfs, (host, pid), memory)?;
                found.push(mapping);
            }
        } else if let Some(head) = Line::parse(line) {
            current = Some(head);
        }
    }
    Ok(found)
}

/// Flags by which what is mapped is locked (mlockall(2)), by a mapping that was just made.
pub fn lock_of(host: i32, at: u64) -> Result<u32, DumpError> {
    let text = proc_text(&format!("/proc/{host}/smaps"))?;
    let mut ours = false;
    let mut resident = false;
    for line in text.lines() {
        if let Some(head) = Line::parse(line) {
            ours = head.start <= at && at < head.end;
        } else if let Some(kilobytes) = line.strip_prefix("Rss:").filter(|_| ours) {
            resident = kilobytes.trim() != "0 kB";
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| ours) {
            return Ok(match flags.split_whitespace().any(|flag| flag == "lo") {
                true if resident => MCL_FUTURE,
                true => MCL_FUTURE | MCL_ONFAULT,
                false => 0,
            });
        }
    }
    Ok(0)
}

/// Whether an address lies in the region that a process was brought up from.
pub fn in_restorer(host: i32, address: u64) -> Result<bool, DumpError> {
    let text = proc_text(&format!("/proc/{host}/maps"))?;
    let mut regions = text.lines().filter(|line| line.contains(RESTORER));
    Ok(regions.any(|line| {
        Line::parse(line).is_some_and(|region| (region.start..region.end).contains(&address))
    }))
}

/// Device numbers of the tmpfs mounts that a process sees, as maps has them.
fn tmpfs_devices(host: i32) -> Result<Vec<String>, DumpError> {
    let mounts = proc_text(&format!("/proc/{host}/mountinfo"))?;
    let device = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let (major, minor) = left.split(' ').nth(2)?.split_once(':')?;
        let number = |text: &str| text.parse::<u32>().ok();
        let (major, minor) = (number(major)?, number(minor)?);
        right
            .starts_with("tmpfs ")
            .then(|| format!("{major:02x}:{minor:02x}"))
    };
    Ok(mounts.lines().filter_map(device).collect())
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
    device: String,
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
        let device = fields.next()?;
        let (inode, name) = fields.next()?.split_once(' ').unwrap_or(("0", ""));
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            access: access.into(),
            offset: u64::from_str_radix(offset, 16).ok()?,
            device: device.into(),
            inode: inode.parse().ok()?,
            name: name.trim().into(),
        })
    }

    fn check_key(&self, key: &str, pid: i32) -> Result<(), DumpError> {
        // What can only be executed has one of the kernel's own.
        if key.trim() == "0" || self.access == "--xp" {
            return Ok(());
        }
        Err(DumpError::Refused(format!(
            "mapping {:#x}-{:#x} of process {pid} has a protection key (pkey_mprotect)",
            self.start, self.end
        )))
    }

    fn mapping(&self, flags: &str, pid: i32) -> Result<Option<Mapping>, DumpError> {
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
        let mut attached = false;
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
                "sr" => properties.sequential = true,
                "rr" => properties.random = true,
                "lo" => properties.locked = true,
                "ss" => return refuse("is a shadow stack"),
                "um" | "uw" | "ui" => return refuse("is watched by a userfaultfd"),
                "ht" => return refuse("uses huge TLB pages"),
                "sl" => return refuse("is sealed (mseal)"),
                // Memory of a zygote's that lies on the pool's device is anonymous in all but its name.
                "mm" if name.starts_with(ATTACHED) => attached = true,
                "io" | "pf" if !name.starts_with("[vvar") => return refuse("maps a device"),
                _ => {}
            }
        }
        // The module's own flag, on each area that it attaches.
        properties.no_huge &= !attached;
        let shared = self.access.ends_with('s');
        let writable =
            self.access.contains('w') || flags.split_whitespace().any(|f| f == "mw") && shared;
        let kind = match name {
            "[vdso]" => MappingKind::Vdso,
            _ if name.starts_with("[vvar") => MappingKind::Vvar,
            _ if attached && !shared => MappingKind::Anonymous,
            _ if self.inode == 0 && !shared && !name.starts_with('/') => MappingKind::Anonymous,
            // Its inode's number is the segment's id (kernel: ipc/shm.c, newseg).
            _ if name.starts_with("/SYSV") && self.offset == 0 => MappingKind::Segment {
                id: self.inode as i32,
            },
            _ if name.starts_with("/SYSV") => return refuse("is a part of SysV shared memory"),
            // Which object it is of is found out by its file.
            _ if name.ends_with(" (deleted)") => MappingKind::Object {
                object: usize::MAX,
                offset: self.offset,
                shared,
            },
            _ if !name.starts_with('/') => return refuse("is of an unknown kind"),
            generation::PATH => match generation::refusal(shared, self.end - self.start) {
                Some(why) => return refuse(why),
                None => MappingKind::Generation,
            },
            _ if shared && writable => MappingKind::AtStart {
                path: unescape(name),
                offset: self.offset,
                shared,
                writable,
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
            // Told by the page map.
            guards: Vec::new(),
        }))
    }

    /// What stands behind a mapping that /proc names only in part.
    fn find_file(
        &self,
        mapping: &mut Mapping,
        tmpfs: &[String],
        (host, pid): (i32, i32),
        memory: &mut MemoryObjects,
    ) -> Result<(), DumpError> {
        let what = || {
            let (start, end) = (self.start, self.end);
            format!("mapping {start:#x}-{end:#x} of process {pid}")
        };
        mapping.kind = match mapping.kind.clone() {
            MappingKind::Object { offset, shared, .. } => {
                let link = unescape(&self.name);
                let file = mapped_file(host, self.start, self.end).ok();
                match file.and_then(|file| other_name(&file, &link, host)) {
                    Some(path) => MappingKind::AtStart {
                        path,
                        offset,
                        shared,
                        writable: shared,
                    },
                    None => MappingKind::Object {
                        object: memory.of_mapping(host, &link, mapping, &what())?,
                        offset,
                        shared,
                    },
                }
            }
            MappingKind::Segment { id } => {
                memory.check_attached(id, mapping, &what())?;
                MappingKind::Segment { id }
            }
            // The zygote has the function's layers only.
            MappingKind::File { path, offset } if tmpfs.contains(&self.device) => {
                MappingKind::AtStart {
                    path,
                    offset,
                    shared: false,
                    writable: false,
                }
            }
            MappingKind::SharedReadOnly { path, offset } if tmpfs.contains(&self.device) => {
                MappingKind::AtStart {
                    path,
                    offset,
                    shared: true,
                    writable: false,
                }
            }
            other => other,
        };
        Ok(())
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
    fn memory_of_the_pool_s_device_is_anonymous() {
        let line = "1000-2000 rw-p 00001000 00:0f 5 /pseudo_mm:7 (deleted)";
        let attached = mapping(line, "rd wr mr mw me mm nh").unwrap().unwrap();
        assert_eq!(attached.kind, MappingKind::Anonymous);
        assert!(!attached.flags.no_huge);
        // A file may have such a name.
        let file = mapping(line, "rd wr mr mw me").unwrap().unwrap();
        assert!(matches!(file.kind, MappingKind::Object { .. }));
    }

    #[test]
    fn refuses_by_name() {
        for (line, flags, why) in [
            (
                "1000-2000 rw-s 00001000 00:01 5 /SYSV00000000 (deleted)",
                "rd wr sh",
                "part of SysV shared memory",
            ),
            ("1000-2000 rw-p 00000000 00:00 0 ", "rd wr ht", "huge TLB"),
            (
                "1000-2000 rw-p 00000000 00:00 0 ",
                "rd wr ss",
                "shadow stack",
            ),
            (
                "1000-2000 r--p 00000000 00:00 0 ",
                "rd mr sl",
                "sealed (mseal)",
            ),
        ] {
            let err = mapping(line, flags).unwrap_err().to_string();
            assert!(err.contains(why), "{err}");
        }
    }

    #[test]
    fn a_protection_key_of_the_program_s_own_is_refused() {
        let check = |access: &str, key: &str| {
            let line = format!("1000-2000 {access} 00000000 00:00 0 ");
            Line::parse(&line).unwrap().check_key(key, 7)
        };
        assert!(check("rw-p", "         0").is_ok());
        assert!(check("--xp", "         1").is_ok());
        let err = check("rw-p", "         1").unwrap_err().to_string();
        assert!(
            err.contains("0x1000-0x2000 of process 7 has a protection key"),
            "{err}"
        );
    }

    #[test]
    fn tells_what_is_mapped_later() {
        let kind = |line: &str| mapping(line, "rd wr sh").unwrap().unwrap().kind;
        assert_eq!(
            kind("1000-2000 rw-s 00003000 00:01 5 /dev/zero (deleted)"),
            MappingKind::Object {
                object: usize::MAX,
                offset: 0x3000,
                shared: true
            }
        );
        assert_eq!(
            kind("1000-2000 rw-s 00001000 00:01 5 /srv/db"),
            MappingKind::AtStart {
                path: "/srv/db".into(),
                offset: 0x1000,
                shared: true,
                writable: true
            }
        );
    }

    #[test]
    fn leaves_out_what_the_kernel_or_the_restorer_put_there() {
        let gate = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(mapping(gate, "ex").unwrap(), None);
        let region = "1000-2000 r-xp 00000000 00:01 9 /memfd:trenv-restorer (deleted)";
        assert_eq!(mapping(region, "rd ex").unwrap(), None);
    }
}
