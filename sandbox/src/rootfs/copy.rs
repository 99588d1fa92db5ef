//! A copy of what was written to a root, for another root over the same layers.
//!
//! The upper directory of an overlay is copied entry by entry: files with their holes and links,
//! whiteouts and other devices, owners, modes, extended attributes (overlayfs keeps its own notes in
//! them) and times. Nobody may write to it meanwhile; paths are never followed out of it all the same.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec, Timestamps,
    Uid, XattrFlags,
};
use rustix::io::{Errno, Result as Kernel};

use super::mounts::writable_layer;
use super::{Mount, RootfsError};

/// Copies the upper directory of one root to that of another, which is empty.
///
/// # Errors
/// When a root has no upper directory, or an entry cannot be copied; the copy is to be thrown away.
pub fn copy_upper(from: &[Mount], to: &[Mount]) -> Result<(), RootfsError> {
    copy(upper(from)?, upper(to)?)
}

fn upper(mounts: &[Mount]) -> Result<&Path, RootfsError> {
    let (upper, _) = writable_layer(mounts)?.ok_or_else(|| RootfsError::Mounts {
        count: mounts.len(),
        kind: mounts
            .first()
            .map(|mount| mount.kind.clone())
            .unwrap_or_default(),
    })?;
    Ok(Path::new(upper))
}

fn failed(path: &Path) -> impl FnOnce(Errno) -> RootfsError {
    let what = path.display().to_string();
    move |errno| RootfsError::Mount {
        doing: "copy",
        what,
        source: errno.into(),
    }
}

/// Copies the contents and the attributes of a directory to an empty one.
fn copy(from: &Path, to: &Path) -> Result<(), RootfsError> {
    let open = |path: &Path| rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(failed(path));
    let roots = Roots {
        from: open(from)?,
        to: open(to)?,
    };
    let mut links = HashMap::new();
    let mut directories = VecDeque::from([PathBuf::new()]);
    let mut done = Vec::new();
    while let Some(directory) = directories.pop_front() {
        let whole = from.join(&directory);
        roots
            .directory(&directory, &mut links, &mut directories)
            .map_err(|(name, errno)| failed(&whole.join(name))(errno))?;
        done.push(directory);
    }
    // Last, since what is made in a directory changes its times.
    for directory in done.iter().rev() {
        let path = from.join(directory);
        roots.attributes_of(directory).map_err(failed(&path))?;
    }
    Ok(())
}

/// Bytes of a list of extended attributes, and of the value of one (xattr(7)).
const XATTR_MOST: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Where is copied from and to.
struct Roots {
    from: OwnedFd,
    to: OwnedFd,
}

impl Roots {
    fn open(&self, path: &Path) -> Kernel<[OwnedFd; 2]> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let open = |root| rustix::fs::openat2(root, path, DIRECTORY, Mode::empty(), resolve);
        Ok([open(&self.from)?, open(&self.to)?])
    }

    /// Copies the entries of a directory, and makes those that are directories themselves.
    fn directory(
        &self,
        path: &Path,
        links: &mut HashMap<u64, PathBuf>,
        directories: &mut VecDeque<PathBuf>,
    ) -> Result<(), (PathBuf, Errno)> {
        let [from, to] = self.open(path).map_err(|errno| (PathBuf::new(), errno))?;
        let here = |errno| (PathBuf::new(), errno);
        for entry in Dir::read_from(&from).map_err(here)? {
            let entry = entry.map_err(here)?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            let plain = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let at = path.join(plain);
            let stat = self
                .entry(&from, &to, name, &at, links)
                .map_err(|errno| (plain.to_owned(), errno))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                directories.push_back(at);
            }
        }
        Ok(())
    }

    fn entry(
        &self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        path: &Path,
        links: &mut HashMap<u64, PathBuf>,
    ) -> Kernel<Stat> {
        let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            rustix::fs::mkdirat(to, name, Mode::RWXU)?;
            return Ok(stat);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = links.get(&stat.st_ino) {
                rustix::fs::linkat(&self.to, first, to, name, AtFlags::empty())?;
                return Ok(stat);
            }
            links.insert(stat.st_ino, path.to_owned());
        }
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = rustix::fs::openat(from, name, flags, Mode::empty())?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let target = rustix::fs::openat(to, name, flags, Mode::RUSR)?;
                contents(&source, &target, stat.st_size)?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(&target, to, name)?;
            }
            kind => rustix::fs::mknodat(to, name, kind, Mode::RUSR, stat.st_rdev)?,
        }
        attributes(from, to, name, &stat)?;
        Ok(stat)
    }

    fn attributes_of(&self, directory: &Path) -> Kernel<()> {
        let [from, to] = self.open(directory)?;
        let stat = rustix::fs::fstat(&from)?;
        attributes(&from, &to, c".", &stat)
    }
}

/// Copies a file's data and leaves its holes; without copying where the file system can share blocks.
fn contents(from: &OwnedFd, to: &OwnedFd, size: i64) -> Kernel<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let size = size.cast_unsigned();
    rustix::fs::ftruncate(to, size)?;
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Err(Errno::NXIO) => break,
            data => data?,
        };
        let mut read = data;
        let mut write = data;
        at = rustix::fs::seek(from, SeekFrom::Hole(data))?;
        while read < at {
            let length = usize::try_from(at - read).unwrap_or(usize::MAX);
            let copied =
                rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut write), length)?;
            if copied == 0 {
                return Err(Errno::IO);
            }
        }
    }
    Ok(())
}

/// Gives an entry the attributes of another of its kind and name.
fn attributes(from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> Kernel<()> {
    let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(to, name, Some(owner), Some(group), nofollow)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(stat.st_mode);
        rustix::fs::chmodat(to, name, mode, AtFlags::empty())?;
    }
    // The functions for these take no directory.
    let beneath = |directory: &OwnedFd| {
        let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
        path.extend(name.to_bytes());
        CString::new(path).map_err(|_| Errno::INVAL)
    };
    let (source, target) = (beneath(from)?, beneath(to)?);
    let mut names = Vec::with_capacity(XATTR_MOST);
    rustix::fs::llistxattr(&source, spare_capacity(&mut names))?;
    for attribute in names.split_inclusive(|byte| *byte == 0) {
        let attribute = CStr::from_bytes_with_nul(attribute).map_err(|_| Errno::INVAL)?;
        let mut value = Vec::with_capacity(XATTR_MOST);
        rustix::fs::lgetxattr(&source, attribute, spare_capacity(&mut value))?;
        rustix::fs::lsetxattr(&target, attribute, &value, XattrFlags::empty())?;
    }
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.cast_signed(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    rustix::fs::utimensat(to, name, &times, nofollow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};

    fn overlay(directory: &Path) -> Vec<Mount> {
        for name in ["lower", "upper", "work"] {
            std::fs::create_dir_all(directory.join(name)).unwrap();
        }
        let option = |key, name| format!("{key}={}", directory.join(name).display());
        vec![Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                option("lowerdir", "lower"),
                option("upperdir", "upper"),
                option("workdir", "work"),
            ],
        }]
    }

    #[test]
    fn everything_that_was_written_is_in_the_copy() {
        let [from, to] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        let mounts = [from.path(), to.path()].map(overlay);
        let upper = from.path().join("upper");
        std::fs::create_dir_all(upper.join("a/b")).unwrap();
        let sparse = std::fs::File::create(upper.join("a/b/sparse")).unwrap();
        sparse.write_at(b"middle", 4 << 20).unwrap();
        sparse.set_len(8 << 20).unwrap();
        std::fs::write(upper.join("one"), "linked").unwrap();
        std::fs::hard_link(upper.join("one"), upper.join("a/other")).unwrap();
        symlink("/etc", upper.join("a/link")).unwrap();
        let whiteout = upper.join("gone");
        let none = rustix::fs::makedev(0, 0);
        let device = FileType::CharacterDevice;
        rustix::fs::mknodat(upper_fd(&upper), c"gone", device, Mode::empty(), none).unwrap();
        rustix::fs::lsetxattr(
            upper.join("a"),
            c"trusted.overlay.opaque",
            b"y",
            XattrFlags::empty(),
        )
        .unwrap();
        std::os::unix::fs::lchown(upper.join("a/link"), Some(7), Some(8)).unwrap();
        std::os::unix::fs::lchown(upper.join("a/b"), Some(5), Some(6)).unwrap();
        let mode = std::fs::Permissions::from_mode(0o1751);
        std::fs::set_permissions(upper.join("a/b"), mode).unwrap();

        copy_upper(&mounts[0], &mounts[1]).unwrap();
        let copied = to.path().join("upper");
        for name in [
            "",
            "a",
            "a/b",
            "a/b/sparse",
            "one",
            "a/other",
            "a/link",
            "gone",
        ] {
            let [before, after] =
                [&upper, &copied].map(|root| root.join(name).symlink_metadata().unwrap());
            let facts = |of: &std::fs::Metadata| {
                (
                    of.mode(),
                    of.uid(),
                    of.gid(),
                    of.rdev(),
                    of.nlink(),
                    of.mtime_nsec(),
                )
            };
            assert_eq!(facts(&before), facts(&after), "{name}");
        }
        let text = std::fs::read(copied.join("a/b/sparse")).unwrap();
        assert_eq!(text.len(), 8 << 20);
        assert_eq!(&text[4 << 20..][..7], b"middle\0");
        let blocks = copied.join("a/b/sparse").metadata().unwrap().blocks();
        assert!(blocks < 64, "{blocks} blocks: the holes are filled");
        assert_eq!(
            std::fs::read_link(copied.join("a/link")).unwrap(),
            Path::new("/etc")
        );
        let inode = |name| copied.join(name).metadata().unwrap().ino();
        assert_eq!(inode("one"), inode("a/other"));
        let mut value = [0u8; 8];
        let length =
            rustix::fs::lgetxattr(copied.join("a"), c"trusted.overlay.opaque", &mut value[..])
                .unwrap();
        assert_eq!(&value[..length], b"y");
        assert!(whiteout.exists());
    }

    fn upper_fd(path: &Path) -> OwnedFd {
        rustix::fs::open(path, DIRECTORY, Mode::empty()).unwrap()
    }

    #[test]
    fn a_root_without_an_upper_directory_has_nothing_to_copy() {
        let directory = tempfile::tempdir().unwrap();
        let [view] = [Mount {
            kind: "bind".into(),
            source: "/".into(),
            options: Vec::new(),
        }];
        let refused = copy_upper(&[view], &overlay(directory.path())).unwrap_err();
        assert!(refused.to_string().contains("bind"), "{refused}");
    }
}
