//! A digest of what was written to a root, by which a layer is known again later.
//!
//! It is over the uppermost directory of the root, entry by entry in the order of names: kind, owner,
//! mode, modification time, device number (a whiteout is a device), extended attributes (overlayfs
//! keeps its own notes in them), link target, contents. Blocks of zeroes count like holes, so how a
//! file lies on the disk makes no difference. Paths are never followed out of the directory.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::{Errno, Result as Kernel};

/// Parts of a file that are looked at each by itself.
const BLOCK: usize = 128 << 10;

/// Bytes of a list of extended attributes, and of the value of one (xattr(7)).
const XATTR_MOST: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A mount of a root, as containerd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMount {
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// Why a layer has no digest.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error(
        "The root has {count} mounts, the first of kind {kind:?}; its layer can be found where there is one, an overlay or a bind mount"
    )]
    Mounts { count: usize, kind: String },
    #[error("Failed to read {path} for the digest of its layer")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Digest of the uppermost layer of a root: its upper directory, or the first of its layers where it is
/// read-only. Nobody may write to it meanwhile. It begins with the name of the algorithm.
///
/// # Errors
/// When the mounts are of an unknown kind, or an entry cannot be read.
pub fn layer_digest(mounts: &[LayerMount]) -> Result<String, LayerError> {
    let top = Path::new(top_layer(mounts)?);
    let digest = digest(top).map_err(|(path, errno)| LayerError::Read {
        path: top.join(path),
        source: errno.into(),
    })?;
    Ok(format!("blake3:{}", digest.to_hex()))
}

/// The uppermost directory of a root: its upper one, or the first of the layers of a read-only one.
fn top_layer(mounts: &[LayerMount]) -> Result<&str, LayerError> {
    let top = match mounts {
        [mount] if mount.kind == "overlay" => {
            let option = |name: &str| mount.options.iter().find_map(|one| one.strip_prefix(name));
            let lower = || option("lowerdir=").and_then(|all| all.split(':').next());
            option("upperdir=").or_else(lower)
        }
        [mount] if matches!(mount.kind.as_str(), "bind" | "rbind") => Some(mount.source.as_str()),
        _ => None,
    };
    top.ok_or_else(|| LayerError::Mounts {
        count: mounts.len(),
        kind: mounts
            .first()
            .map(|mount| mount.kind.clone())
            .unwrap_or_default(),
    })
}

fn digest(top: &Path) -> Result<blake3::Hash, (PathBuf, Errno)> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |errno| (path, errno)
    };
    let none = Path::new("");
    let root = rustix::fs::open(top, DIRECTORY, Mode::empty()).map_err(at(none))?;
    let mut digest = Digest {
        hasher: blake3::Hasher::new(),
        links: HashMap::new(),
        buffer: vec![0; BLOCK],
    };
    digest.entry(&root, c".", none).map_err(at(none))?;
    let mut directories = VecDeque::from([PathBuf::new()]);
    while let Some(directory) = directories.pop_front() {
        let open = open(&root, &directory).map_err(at(&directory))?;
        for name in names(&open).map_err(at(&directory))? {
            let path = directory.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let kind = digest.entry(&open, &name, &path).map_err(at(&path))?;
            if kind == FileType::Directory {
                directories.push_back(path);
            }
        }
    }
    Ok(digest.hasher.finalize())
}

fn open(root: &OwnedFd, path: &Path) -> Kernel<OwnedFd> {
    if path.as_os_str().is_empty() {
        return rustix::io::fcntl_dupfd_cloexec(root, 0);
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(root, path, DIRECTORY, Mode::empty(), resolve)
}

/// Names in a directory, sorted.
fn names(directory: &OwnedFd) -> Kernel<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        if ![c".", c".."].contains(&entry.file_name()) {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

struct Digest {
    hasher: blake3::Hasher,
    /// First paths of files with several names, by inode.
    links: HashMap<u64, PathBuf>,
    buffer: Vec<u8>,
}

impl Digest {
    fn number(&mut self, number: u64) {
        self.hasher.update(&number.to_le_bytes());
    }

    /// With its length, so that no two lists of values have the same bytes.
    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.hasher.update(bytes);
    }

    fn entry(&mut self, directory: &OwnedFd, name: &CStr, path: &Path) -> Kernel<FileType> {
        let stat = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        self.bytes(path.as_os_str().as_bytes());
        self.facts(&stat, kind);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let first = self.links.get(&stat.st_ino).cloned();
            self.bytes(first.as_deref().unwrap_or(path).as_os_str().as_bytes());
            if first.is_some() {
                return Ok(kind);
            }
            self.links.insert(stat.st_ino, path.to_owned());
        }
        self.attributes(directory, name)?;
        match kind {
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(directory, name, flags, Mode::empty())?;
                let contents = self.contents(file.as_fd(), stat.st_size.cast_unsigned())?;
                self.hasher.update(contents.as_bytes());
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(directory, name, Vec::new())?;
                self.bytes(target.as_bytes());
            }
            _ => {}
        }
        Ok(kind)
    }

    fn facts(&mut self, stat: &Stat, kind: FileType) {
        self.number(u64::from(stat.st_mode));
        self.number(u64::from(stat.st_uid));
        self.number(u64::from(stat.st_gid));
        self.number(stat.st_mtime.cast_unsigned());
        self.number(stat.st_mtime_nsec);
        // That of a directory is the file system's affair.
        let size = match kind {
            FileType::Directory => 0,
            _ => stat.st_size.cast_unsigned(),
        };
        self.number(size);
        self.number(stat.st_rdev);
    }

    fn attributes(&mut self, directory: &OwnedFd, name: &CStr) -> Kernel<()> {
        // The functions for these take no directory.
        let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
        path.extend(name.to_bytes());
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        let mut list = Vec::with_capacity(XATTR_MOST);
        match rustix::fs::llistxattr(&path, spare_capacity(&mut list)) {
            // A file system without them.
            Err(Errno::OPNOTSUPP) => {}
            listed => drop(listed?),
        }
        let mut names: Vec<&[u8]> = list.split_inclusive(|byte| *byte == 0).collect();
        names.sort_unstable();
        self.number(names.len() as u64);
        for name in names {
            let attribute = CStr::from_bytes_with_nul(name).map_err(|_| Errno::INVAL)?;
            let mut value = Vec::with_capacity(XATTR_MOST);
            rustix::fs::lgetxattr(&path, attribute, spare_capacity(&mut value))?;
            self.bytes(name);
            self.bytes(&value);
        }
        Ok(())
    }

    /// Digest of a file's blocks that are not zeroes, with their places.
    fn contents(&mut self, file: BorrowedFd<'_>, size: u64) -> Kernel<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let block = BLOCK as u64;
        let mut at = 0;
        while at < size {
            at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                // Nothing but a hole is left.
                Err(Errno::NXIO) => break,
                data => data? / block * block,
            };
            let length = read(file, at, &mut self.buffer)?;
            let read = &self.buffer[..length];
            if read.iter().any(|byte| *byte != 0) {
                hasher.update(&at.to_le_bytes());
                hasher.update(read);
            }
            at += block;
        }
        Ok(hasher.finalize())
    }
}

/// Reads as much as there is; the length.
fn read(file: BorrowedFd<'_>, at: u64, buffer: &mut [u8]) -> Kernel<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], at + done as u64)? {
            0 => break,
            more => done += more,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Timespec, Timestamps, XattrFlags};
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
    use std::time::{Duration, SystemTime};

    fn mount(kind: &str, source: &str, options: &[String]) -> [LayerMount; 1] {
        [LayerMount {
            kind: kind.into(),
            source: source.into(),
            options: options.to_vec(),
        }]
    }

    /// A layer of all kinds of entries.
    fn layer() -> tempfile::TempDir {
        let layer = tempfile::tempdir().unwrap();
        let path = |name: &str| layer.path().join(name);
        std::fs::create_dir_all(path("a/b")).unwrap();
        std::fs::write(path("a/file"), "contents").unwrap();
        std::fs::write(path("a/other"), "contents").unwrap();
        std::fs::hard_link(path("a/file"), path("a/b/linked")).unwrap();
        symlink("file", path("a/link")).unwrap();
        let name = c"trusted.trenv";
        rustix::fs::lsetxattr(path("a/other"), name, b"1", XattrFlags::empty()).unwrap();
        let hole = std::fs::File::create(path("a/hole")).unwrap();
        hole.set_len(BLOCK as u64).unwrap();
        device(layer.path(), 0, 0);
        layer
    }

    fn device(layer: &Path, major: u32, minor: u32) {
        let number = rustix::fs::makedev(major, minor);
        let kind = FileType::CharacterDevice;
        let path = layer.join("gone");
        rustix::fs::mknodat(rustix::fs::CWD, path, kind, Mode::empty(), number).unwrap();
    }

    /// Gives all entries one modification time.
    fn at_one_time(path: &Path) {
        if path.symlink_metadata().unwrap().is_dir() {
            for entry in std::fs::read_dir(path).unwrap() {
                at_one_time(&entry.unwrap().path());
            }
        }
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: zero,
            last_modification: zero,
        };
        rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }

    fn of(layer: &Path) -> String {
        layer_digest(&mount("bind", &layer.display().to_string(), &[])).unwrap()
    }

    #[test]
    fn every_change_of_a_layer_changes_its_digest() {
        type Change = (&'static str, fn(&Path));
        let changes: [Change; 14] = [
            ("contents", |at| {
                let file = std::fs::File::options()
                    .write(true)
                    .open(at.join("a/file"))
                    .unwrap();
                file.write_at(b"C", 0).unwrap();
            }),
            ("mode", |at| {
                let mode = std::fs::Permissions::from_mode(0o600);
                std::fs::set_permissions(at.join("a/file"), mode).unwrap();
            }),
            ("owner", |at| {
                std::os::unix::fs::lchown(at.join("a/link"), Some(7), None).unwrap();
            }),
            ("group", |at| {
                std::os::unix::fs::lchown(at.join("a/b"), None, Some(7)).unwrap();
            }),
            ("time", |at| {
                let file = std::fs::File::open(at.join("a/file")).unwrap();
                file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_nanos(1))
                    .unwrap();
            }),
            ("length", |at| {
                let file = std::fs::File::options().write(true).open(at.join("a/hole"));
                file.unwrap().set_len(2 * BLOCK as u64).unwrap();
            }),
            ("target", |at| {
                std::fs::remove_file(at.join("a/link")).unwrap();
                symlink("fire", at.join("a/link")).unwrap();
            }),
            ("name", |at| {
                std::fs::rename(at.join("a/other"), at.join("a/third")).unwrap();
            }),
            ("removed", |at| {
                std::fs::remove_file(at.join("a/b/linked")).unwrap();
            }),
            ("whiteout", |at| {
                std::fs::remove_file(at.join("gone")).unwrap();
            }),
            ("whiteout made a file", |at| {
                std::fs::remove_file(at.join("gone")).unwrap();
                std::fs::write(at.join("gone"), "").unwrap();
            }),
            ("device", |at| {
                std::fs::remove_file(at.join("gone")).unwrap();
                device(at, 1, 3);
            }),
            ("attribute's value", |at| {
                let (path, name) = (at.join("a/other"), c"trusted.trenv");
                rustix::fs::lsetxattr(path, name, b"2", XattrFlags::empty()).unwrap();
            }),
            ("attribute", |at| {
                let opaque = c"trusted.overlay.opaque";
                rustix::fs::lsetxattr(at.join("a"), opaque, b"y", XattrFlags::empty()).unwrap();
            }),
        ];
        for (what, change) in changes {
            let layer = layer();
            at_one_time(layer.path());
            let before = of(layer.path());
            assert!(before.starts_with("blake3:"), "{before}");
            assert_eq!(before, of(layer.path()), "{what}: it changed by itself");
            change(layer.path());
            if what != "time" {
                // Else that would tell of most of them.
                at_one_time(layer.path());
            }
            assert_ne!(before, of(layer.path()), "{what}");
        }
    }

    #[test]
    fn holes_are_zeroes_and_what_follows_them_counts() {
        let layer = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(layer.path().join("sparse")).unwrap();
        let time = SystemTime::UNIX_EPOCH;
        let digest = || {
            file.set_modified(time).unwrap();
            let directory = std::fs::File::open(layer.path()).unwrap();
            directory.set_modified(time).unwrap();
            of(layer.path())
        };
        // So large that reading all of it would be seen.
        file.set_len(1 << 40).unwrap();
        file.write_at(b"late", (1 << 40) - 5).unwrap();
        let sparse = digest();
        file.write_at(&[0; 3 * BLOCK], 5000).unwrap();
        assert_eq!(digest(), sparse);
        file.write_at(b"moved", (1 << 40) - 6).unwrap();
        assert_ne!(digest(), sparse);
    }

    #[test]
    fn the_uppermost_layer_of_a_root_counts() {
        let [top, below] = [(), ()].map(|()| layer());
        std::fs::write(below.path().join("more"), "").unwrap();
        let own = of(top.path());
        let path = |of: &tempfile::TempDir| of.path().display().to_string();
        let view = [format!("lowerdir={}:{}", path(&top), path(&below))];
        assert_eq!(
            layer_digest(&mount("overlay", "overlay", &view)).unwrap(),
            own
        );
        let active = [
            format!("lowerdir={}", path(&below)),
            format!("upperdir={}", path(&top)),
            "workdir=/w".to_owned(),
        ];
        assert_eq!(
            layer_digest(&mount("overlay", "overlay", &active)).unwrap(),
            own
        );
        let refused = layer_digest(&mount("ext4", "/dev/sda", &[])).unwrap_err();
        assert!(refused.to_string().contains("ext4"), "{refused}");
        let missing = layer_digest(&mount("bind", "/no/such/layer", &[])).unwrap_err();
        assert!(missing.to_string().contains("/no/such/layer"), "{missing}");
    }
}
