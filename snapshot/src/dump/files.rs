//! Descriptors: which processes share which open files, and what each open file is.

mod passed;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::memory_objects::{MemoryObjects, other_name};
use super::process::sandbox_path;
use super::{
    DumpError, DumpRequest, descriptor_of, fifo, file_locks, file_owner, inotify, posix_queues,
    proc_link, proc_text, same_file, socket_files, sockets,
};
use crate::manifest::{Descriptor, EpollTarget, FileLock, Object, ObjectKind, Process};

use passed::Passed;

const O_CLOEXEC: u32 = nix::libc::O_CLOEXEC as u32;

/// The tree's open files, found process by process.
pub struct Files<'a> {
    request: &'a DumpRequest<'a>,
    pidfds: &'a BTreeMap<i32, OwnedFd>,
    /// Pid inside the sandbox by host pid.
    ids: &'a BTreeMap<i32, i32>,
    objects: Vec<Object>,
    /// First place of each object: host pid and descriptor.
    places: Vec<(i32, i32)>,
    /// Objects by their link in /proc, which equal open files share.
    by_link: BTreeMap<String, Vec<usize>>,
    sockets: sockets::Peers,
    locks: Vec<FileLock>,
    /// What waits in unix sockets, not looked at yet.
    passed: Vec<Passed>,
    /// Descriptors of our own that `places` names.
    kept: Vec<OwnedFd>,
}

/// A descriptor of the tree.
#[derive(Debug, Clone, Copy)]
struct Holder {
    host: i32,
    /// Pid inside the sandbox.
    pid: i32,
    number: i32,
}

/// How an open file is reached.
struct Reached {
    /// What leads to it in the tree.
    holder: Holder,
    /// Host pid and descriptor by which /proc tells of it.
    place: (i32, i32),
    copy: OwnedFd,
    link: String,
    info: Info,
}

impl<'a> Files<'a> {
    pub fn new(
        request: &'a DumpRequest<'a>,
        pidfds: &'a BTreeMap<i32, OwnedFd>,
        ids: &'a BTreeMap<i32, i32>,
    ) -> Self {
        Self {
            request,
            pidfds,
            ids,
            objects: Vec::new(),
            places: Vec::new(),
            by_link: BTreeMap::new(),
            sockets: sockets::Peers::default(),
            locks: Vec::new(),
            passed: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Descriptors of one process; new open files are added.
    pub fn of_process(
        &mut self,
        host: i32,
        memory: &mut MemoryObjects,
    ) -> Result<Vec<Descriptor>, DumpError> {
        let path = format!("/proc/{host}/fd");
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&path).map_err(DumpError::io(format!("reading {path}")))? {
            let entry = entry.map_err(DumpError::io(format!("reading {path}")))?;
            if let Some(number) = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok())
            {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        let pid = self.ids.get(&host).copied().unwrap_or(host);
        let mut descriptors = Vec::new();
        for number in numbers {
            let info = Info::read(host, number)?;
            let link = proc_link(&format!("/proc/{host}/fd/{number}"))?;
            let object = match self.known(&link, (host, number))? {
                Some(object) => object,
                None => {
                    let pidfd = self
                        .pidfds
                        .get(&host)
                        .ok_or_else(|| DumpError::Refused(format!("process {host} came late")))?;
                    let reached = Reached {
                        holder: Holder { host, pid, number },
                        place: (host, number),
                        copy: descriptor_of(pidfd, number, host)?,
                        link,
                        info: info.clone(),
                    };
                    self.add(reached, memory)?
                }
            };
            self.find_locks(object, pid, number, &info)?;
            descriptors.push(Descriptor {
                number,
                object,
                close_on_exec: info.flags & O_CLOEXEC != 0,
            });
        }
        self.look_at_passed(memory)?;
        Ok(descriptors)
    }

    fn find_locks(
        &mut self,
        object: usize,
        pid: i32,
        number: i32,
        info: &Info,
    ) -> Result<(), DumpError> {
        let place = file_locks::Place {
            object,
            pid,
            descriptor: number,
            access: info.flags & 3,
        };
        let found = file_locks::read(&info.text, place)?;
        let kind = &self.objects[object].kind;
        if !found.is_empty()
            && !matches!(kind, ObjectKind::Path { .. } | ObjectKind::Nameless { .. })
        {
            return Err(DumpError::Refused(format!(
                "descriptor {number} of process {} has a lock, but is no file",
                place.pid
            )));
        }
        for lock in found {
            // One of an open file is named with each descriptor of it.
            if !self.locks.contains(&lock) {
                self.locks.push(lock);
            }
        }
        Ok(())
    }

    /// The locks on them.
    pub fn locks(&mut self) -> Vec<FileLock> {
        std::mem::take(&mut self.locks)
    }

    /// All open files, after every process was looked at.
    pub fn finish(mut self, processes: &[Process]) -> Result<Vec<Object>, DumpError> {
        self.sockets.pair()?;
        self.sockets.connections.finish(&mut self.objects)?;
        self.check_passed()?;
        sockets::check_ports(&self.objects)?;
        // Those that are open are refused by their descriptors.
        posix_queues::refuse()?;
        for (index, object) in self.objects.iter().enumerate() {
            let ObjectKind::Epoll { targets } = &object.kind else {
                continue;
            };
            let owners: Vec<_> = processes
                .iter()
                .filter(|process| process.descriptors.iter().any(|d| d.object == index))
                .collect();
            for target in targets {
                let open = owners
                    .first()
                    .is_some_and(|p| p.descriptors.iter().any(|d| d.number == target.number));
                if !open {
                    return Err(DumpError::Refused(format!(
                        "an epoll watches descriptor {}, which is closed there but open elsewhere",
                        target.number
                    )));
                }
            }
        }
        Ok(self.objects)
    }

    fn known(&self, link: &str, place: (i32, i32)) -> Result<Option<usize>, DumpError> {
        for object in self.by_link.get(link).into_iter().flatten() {
            let (other, at) = self.places[*object];
            if same_file((place.0, other), (place.1, at))? {
                return Ok(Some(*object));
            }
        }
        Ok(None)
    }

    fn add(&mut self, reached: Reached, memory: &mut MemoryObjects) -> Result<usize, DumpError> {
        let Reached {
            holder,
            place,
            copy,
            link,
            info,
        } = reached;
        let Holder { host, pid, number } = holder;
        if posix_queues::is_one(&copy)? {
            return Err(DumpError::Refused(format!(
                "descriptor {number} of process {pid} is a POSIX message queue ({link})"
            )));
        }
        let mut kind = match nameless(&link, &copy)? {
            None => self.kind(&link, &copy, holder, &info)?,
            Some(file) => match other_name(&file, &link, host) {
                Some(path) => self.kind(&path, &copy, holder, &info)?,
                None => {
                    let what = format!("descriptor {number} of process {pid}");
                    ObjectKind::Nameless {
                        memory: memory.of_descriptor(&copy, info.flags, &link, host, &what)?,
                        position: info.decimal("pos")?,
                    }
                }
            },
        };
        if let ObjectKind::Socket(socket) = &mut kind {
            socket.file = socket_files::read(socket, host)?;
        }
        // fcntl(2) has nothing else for one that is a path only.
        let owner = match info.flags & nix::libc::O_PATH as u32 {
            0 => file_owner::read(&copy, self.ids)?,
            _ => None,
        };
        let index = self.objects.len();
        self.objects.push(Object {
            flags: info.flags & !O_CLOEXEC,
            owner,
            kind,
        });
        self.places.push(place);
        self.by_link.entry(link).or_default().push(index);
        Ok(index)
    }

    fn kind(
        &mut self,
        link: &str,
        copy: &OwnedFd,
        holder: Holder,
        info: &Info,
    ) -> Result<ObjectKind, DumpError> {
        let Holder { pid, number, .. } = holder;
        let refuse = |why: &str| {
            Err(DumpError::Refused(format!(
                "descriptor {number} of process {pid} is {why} ({link})"
            )))
        };
        let meta = std::fs::File::from(
            copy.try_clone()
                .map_err(DumpError::io("duplicating a descriptor"))?,
        )
        .metadata()
        .map_err(DumpError::io(format!(
            "reading descriptor {number} of process {pid}"
        )))?;
        let identity = (meta.dev(), meta.ino());
        if let Some(stream) = self.request.stdio.iter().position(|s| *s == Some(identity)) {
            // A pipe that serves as 1 and 2 both is told apart by what it was opened as.
            let stream = if number <= 2 && self.request.stdio[number as usize] == Some(identity) {
                number as u32
            } else {
                stream as u32
            };
            return Ok(ObjectKind::Stdio(stream));
        }
        if link.starts_with("pipe:[") {
            return pipe(copy, meta.ino(), info, pid);
        }
        if link.starts_with("socket:[") {
            let what = format!("descriptor {number} of process {pid}");
            let index = self.objects.len();
            let (socket, queue) = self.sockets.read(copy, meta.ino(), index, &what)?;
            if !queue.is_empty() {
                self.passed.push(Passed {
                    socket: index,
                    holder,
                    queue,
                });
            }
            return Ok(ObjectKind::Socket(socket));
        }
        match link {
            "anon_inode:[eventfd]" => {
                let count = info.hex("eventfd-count")?;
                let semaphore = match info.field("eventfd-semaphore") {
                    Some(value) => value == "1",
                    None => is_semaphore(copy, count)
                        .map_err(DumpError::errno("trying whether an eventfd is a semaphore"))?,
                };
                return Ok(ObjectKind::EventFd { count, semaphore });
            }
            "anon_inode:[eventpoll]" => {
                return Ok(ObjectKind::Epoll {
                    targets: info.epoll_targets()?,
                });
            }
            "anon_inode:[timerfd]" => return info.timer(),
            "anon_inode:[signalfd]" => {
                return Ok(ObjectKind::SignalFd {
                    mask: info.hex("sigmask")?,
                });
            }
            "anon_inode:inotify" => {
                let what = format!("descriptor {number} of process {pid}");
                let root = self.request.root_pid;
                let watches = inotify::watches(copy, &info.text, root, &what)?;
                return Ok(ObjectKind::Inotify { watches });
            }
            _ if link.starts_with("anon_inode:[pidfd") || link.starts_with("pidfd:") => {
                return self.pid_of(info, number, pid);
            }
            _ if link.starts_with("anon_inode:") => {
                return refuse("of a kind that cannot be captured");
            }
            _ => {}
        }
        let what = format!("file of descriptor {number}");
        if info.flags & nix::libc::O_PATH as u32 != 0 {
            return Ok(ObjectKind::Path {
                path: sandbox_path(link, &what, pid)?,
                position: 0,
            });
        }
        if meta.file_type().is_char_device() {
            // devices.txt of the kernel: memory, of which null, zero and random are; terminals.
            match nix::sys::stat::major(meta.rdev()) {
                1 => {}
                4 | 5 | 136..=143 => return refuse("a terminal"),
                _ => return refuse("a device with a state of its own"),
            }
        }
        if meta.file_type().is_fifo() {
            let path = sandbox_path(link, &what, pid)?;
            let is_it = |object: &Object| match &object.kind {
                ObjectKind::Fifo { path: other, .. } => *other == path,
                _ => false,
            };
            let first = !self.objects.iter().any(is_it);
            return fifo::read(copy, path, first);
        }
        if meta.file_type().is_block_device() {
            return refuse("a block device");
        }
        let path = sandbox_path(link, &what, pid)?;
        Ok(ObjectKind::Path {
            path,
            position: info.decimal("pos")?,
        })
    }

    fn pid_of(&self, info: &Info, number: i32, pid: i32) -> Result<ObjectKind, DumpError> {
        // Pid: in our own pid namespace's terms.
        let host = info
            .field("Pid")
            .and_then(|text| text.parse().ok())
            .unwrap_or(-1);
        match self.ids.get(&host) {
            Some(target) => Ok(ObjectKind::PidFd { pid: *target }),
            None => Err(DumpError::Refused(format!(
                "descriptor {number} of process {pid} is a pidfd of a process outside of the tree"
            ))),
        }
    }
}

/// The file behind a descriptor, where it is a regular one without a path: a memfd, or deleted.
fn nameless(link: &str, copy: &OwnedFd) -> Result<Option<std::fs::File>, DumpError> {
    if !link.ends_with(" (deleted)") {
        return Ok(None);
    }
    let file = copy.try_clone().map(std::fs::File::from);
    let file = file.map_err(DumpError::io("duplicating a descriptor"))?;
    let meta = file
        .metadata()
        .map_err(DumpError::io("reading a descriptor"))?;
    Ok(meta.is_file().then_some(file))
}

/// Whether reading takes one from an eventfd, and not all; kernels before 6.5 do not tell. Its count is
/// the same again afterwards.
fn is_semaphore(copy: &OwnedFd, count: u64) -> nix::Result<bool> {
    let read = || {
        let mut word = [0; 8];
        nix::unistd::read(copy, &mut word)?;
        Ok(u64::from_ne_bytes(word))
    };
    let add = |number: u64| nix::unistd::write(copy, &number.to_ne_bytes()).map(drop);
    // Of one, both would take one.
    if count < 2 {
        add(2)?;
    }
    let semaphore = read()? == 1;
    match (semaphore, count) {
        (true, 0 | 1) => drop(read()?),
        (true, _) => add(1)?,
        (false, 0) => {}
        (false, _) => add(count)?,
    }
    Ok(semaphore)
}

fn pipe(copy: &OwnedFd, inode: u64, info: &Info, pid: i32) -> Result<ObjectKind, DumpError> {
    let writer = info.flags & 3 == 1;
    let doing = || format!("reading a pipe of process {pid}");
    let size = nix::fcntl::fcntl(copy.as_fd(), nix::fcntl::FcntlArg::F_GETPIPE_SZ)
        .map_err(DumpError::errno(doing()))? as u64;
    let mut data = Vec::new();
    if !writer {
        let mut queued: i32 = 0;
        // SAFETY: FIONREAD writes one int.
        let result =
            unsafe { nix::libc::ioctl(copy.as_raw_fd(), nix::libc::FIONREAD, &raw mut queued) };
        nix::errno::Errno::result(result).map_err(DumpError::errno(doing()))?;
        if queued > 0 {
            data = peek(copy, queued as usize, size).map_err(|errno| match errno {
                nix::errno::Errno::EBADMSG => DumpError::Refused(format!(
                    "process {pid} has a pipe with packets (O_DIRECT) that were not read yet"
                )),
                errno => DumpError::errno(doing())(errno),
            })?;
        }
    }
    Ok(ObjectKind::Pipe {
        pipe: inode,
        writer,
        size,
        data,
    })
}

/// Copies what a pipe holds without taking it; EBADMSG where it holds several packets.
pub fn peek(pipe: &OwnedFd, queued: usize, size: u64) -> nix::Result<Vec<u8>> {
    let (reader, writer) = nix::unistd::pipe()?;
    let room = i32::try_from(size).unwrap_or(i32::MAX);
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(room))?;
    let copied = rustix::pipe::tee(pipe, &writer, queued, rustix::pipe::SpliceFlags::NONBLOCK)
        .map_err(|errno| nix::errno::Errno::from_raw(errno.raw_os_error()))?;
    let mut data = vec![0; copied];
    // A read takes all that there is, or one packet.
    match nix::unistd::read(&reader, &mut data)? {
        all if all == copied => Ok(data),
        _ => Err(nix::errno::Errno::EBADMSG),
    }
}

/// /proc/PID/fdinfo/N.
#[derive(Clone)]
struct Info {
    text: String,
    path: String,
    flags: u32,
}

impl Info {
    fn read(host: i32, number: i32) -> Result<Self, DumpError> {
        let path = format!("/proc/{host}/fdinfo/{number}");
        let mut info = Self {
            text: proc_text(&path)?,
            path,
            flags: 0,
        };
        let flags = info
            .field("flags")
            .and_then(|text| u32::from_str_radix(text, 8).ok());
        info.flags = flags.ok_or_else(|| info.wrong("flags"))?;
        Ok(info)
    }

    fn field(&self, key: &str) -> Option<&str> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .map(str::trim)
    }

    fn wrong(&self, key: &str) -> DumpError {
        DumpError::Io {
            doing: format!("reading {key} in {}", self.path),
            source: std::io::ErrorKind::InvalidData.into(),
        }
    }

    fn decimal(&self, key: &str) -> Result<u64, DumpError> {
        self.field(key)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| self.wrong(key))
    }

    fn hex(&self, key: &str) -> Result<u64, DumpError> {
        self.field(key)
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .ok_or_else(|| self.wrong(key))
    }

    fn epoll_targets(&self) -> Result<Vec<EpollTarget>, DumpError> {
        let mut targets = Vec::new();
        for line in self.text.lines().filter(|line| line.starts_with("tfd:")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let value = |key: &str| {
                words
                    .iter()
                    .position(|word| *word == key)
                    .and_then(|at| words.get(at + 1))
                    .copied()
            };
            let parsed = (|| {
                Some(EpollTarget {
                    number: value("tfd:")?.parse().ok()?,
                    events: u32::from_str_radix(value("events:")?, 16).ok()?,
                    data: u64::from_str_radix(value("data:")?, 16).ok()?,
                })
            })();
            targets.push(parsed.ok_or_else(|| self.wrong("tfd"))?);
        }
        Ok(targets)
    }

    fn timer(&self) -> Result<ObjectKind, DumpError> {
        let pair = |key: &str| {
            let text = self
                .field(key)?
                .trim_start_matches('(')
                .trim_end_matches(')');
            let (seconds, nanoseconds) = text.split_once(',')?;
            Some([
                seconds.trim().parse().ok()?,
                nanoseconds.trim().parse().ok()?,
            ])
        };
        let interval = pair("it_interval").ok_or_else(|| self.wrong("it_interval"))?;
        let ticks = self.decimal("ticks")?;
        let mut value = pair("it_value").ok_or_else(|| self.wrong("it_value"))?;
        // The kernel lets one that has gone off rest until its ticks are read, and tells that nothing
        // remains, as of one that is not set.
        if ticks > 0 && value == [0; 2] {
            value = interval;
        }
        Ok(ObjectKind::TimerFd {
            clock: self.decimal("clockid")? as i32,
            flags: self
                .field("settime flags")
                .and_then(|text| u32::from_str_radix(text, 8).ok())
                .ok_or_else(|| self.wrong("settime flags"))?,
            value,
            interval,
            ticks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eventfd_is_tried_and_keeps_its_count() {
        for count in [0, 1, 2, 7, u64::MAX - 1] {
            for semaphore in [false, true] {
                let flags = if semaphore {
                    nix::libc::EFD_SEMAPHORE
                } else {
                    0
                };
                // SAFETY: makes a descriptor, which is owned from here on.
                let fd = unsafe {
                    let fd = nix::libc::eventfd(0, flags);
                    <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd)
                };
                if count > 0 {
                    nix::unistd::write(&fd, &count.to_ne_bytes()).unwrap();
                }
                assert_eq!(is_semaphore(&fd, count), Ok(semaphore), "{count}");
                let own = std::process::id() as i32;
                let info = Info::read(own, fd.as_raw_fd()).unwrap();
                assert_eq!(info.hex("eventfd-count").unwrap(), count, "{semaphore}");
            }
        }
    }
}
