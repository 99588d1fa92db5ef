//! Detached mounts by fsopen, fsconfig, fsmount and open_tree.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::OnceLock,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
        mount_change, open_tree,
    },
};

use super::{BindFlags, Mount, RootfsError};
use crate::sys;

/// The longest value that fsconfig takes.
const VALUE_LIMIT: usize = 255;

fn failed(
    doing: &'static str,
    what: impl Into<String>,
) -> impl FnOnce(rustix::io::Errno) -> RootfsError {
    let what = what.into();
    move |error| RootfsError::Mount {
        doing,
        what,
        source: error.into(),
    }
}

/// Builds the root that containerd describes: one overlay, or one bind mount (the view of an image
/// of one layer).
///
/// An overlay with an upper directory is made `volatile`: unmounting an ordinary one writes the
/// whole file system below it through to the disk, which takes as long as the disk wants. What is
/// to survive a crash of the machine, such as an upper directory that becomes a layer, needs
/// [`sync_upper`].
///
/// # Errors
/// When the mounts are of another kind, an option is unknown, or the kernel refuses.
pub fn overlay_from_mounts(mounts: &[Mount]) -> Result<OwnedFd, RootfsError> {
    match mounts {
        [mount] if mount.kind == "overlay" => overlay(&mount.options),
        [mount] if matches!(mount.kind.as_str(), "bind" | "rbind") => {
            let mut flags = BindFlags::default();
            for option in &mount.options {
                match option.as_str() {
                    "ro" => flags.read_only = true,
                    "rbind" => flags.recursive = true,
                    "bind" | "rw" => {}
                    _ => {
                        return Err(RootfsError::Option {
                            option: option.clone(),
                            kind: mount.kind.clone(),
                        });
                    }
                }
            }
            Ok(bind(Path::new(&mount.source), flags)?.0)
        }
        _ => Err(RootfsError::Mounts {
            count: mounts.len(),
            kind: mounts
                .first()
                .map(|mount| mount.kind.clone())
                .unwrap_or_default(),
        }),
    }
}

/// A directory in an overlay's options: named by its path, or by an open descriptor where the path
/// is longer than fsconfig takes.
struct Layer {
    text: String,
    /// Keeps the descriptor that `text` may name.
    _open: Option<OwnedFd>,
}

impl Layer {
    fn new(path: &str) -> Result<Self, RootfsError> {
        if path.len() <= VALUE_LIMIT {
            return Ok(Self {
                text: path.to_owned(),
                _open: None,
            });
        }
        Self::by_descriptor(path)
    }

    fn by_descriptor(path: &str) -> Result<Self, RootfsError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open =
            rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open the layer", path))?;
        Ok(Self {
            text: format!("/proc/self/fd/{}", open.as_raw_fd()),
            _open: Some(open),
        })
    }
}

/// An overlay's options, sorted.
#[derive(Debug, Default, PartialEq, Eq)]
struct OverlayOptions<'a> {
    lower: Vec<&'a str>,
    upper: Option<&'a str>,
    work: Option<&'a str>,
    /// Options with and without a value that go to the file system as they are.
    others: Vec<(&'a str, Option<&'a str>)>,
    read_only: bool,
}

fn parse(options: &[String]) -> Result<OverlayOptions<'_>, RootfsError> {
    let mut parsed = OverlayOptions::default();
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => parsed.lower = value.split(':').collect(),
            Some(("upperdir", value)) => parsed.upper = Some(value),
            Some(("workdir", value)) => parsed.work = Some(value),
            Some((
                key @ ("index" | "metacopy" | "redirect_dir" | "xino" | "nfs_export" | "uuid"),
                value,
            )) => parsed.others.push((key, Some(value))),
            None if matches!(option.as_str(), "userxattr" | "volatile") => {
                parsed.others.push((option, None));
            }
            None if option == "ro" => parsed.read_only = true,
            None if option == "rw" => {}
            _ => {
                return Err(RootfsError::Option {
                    option: option.clone(),
                    kind: "overlay".into(),
                });
            }
        }
    }
    Ok(parsed)
}

fn overlay(options: &[String]) -> Result<OwnedFd, RootfsError> {
    let mut options = parse(options)?;
    if let Some(work) = options.work {
        make_volatile(&mut options, work)?;
    }
    let name = options
        .upper
        .or(options.lower.first().copied())
        .unwrap_or("");
    let name = format!("the overlay on {name}");
    if takes_single_layers() {
        overlay_by_layers(&options, &name)
    } else {
        overlay_joined(&options, &name)
    }
}

/// The kernel marks the work directory of a volatile overlay, to warn of a crash that cut it off,
/// and refuses a marked one. An overlay of ours that has ended well leaves the mark as well.
fn make_volatile(options: &mut OverlayOptions<'_>, work: &str) -> Result<(), RootfsError> {
    let mark = Path::new(work).join("work/incompat/volatile");
    match std::fs::remove_dir_all(&mark) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => {
            return Err(RootfsError::Mount {
                doing: "remove the mark",
                what: mark.display().to_string(),
                source,
            });
        }
    }
    if !options.others.contains(&("volatile", None)) {
        options.others.push(("volatile", None));
    }
    Ok(())
}

/// Writes the file system that holds an overlay's upper directory through to the disk. Without an
/// upper directory there is nothing to write.
///
/// # Errors
/// When the directory cannot be opened or the disk refuses.
pub fn sync_upper(mounts: &[Mount]) -> Result<(), RootfsError> {
    for mount in mounts.iter().filter(|mount| mount.kind == "overlay") {
        if let Some(upper) = parse(&mount.options)?.upper {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(upper, flags, Mode::empty())
                .and_then(|dir| rustix::fs::syncfs(&dir))
                .map_err(failed("write through", upper))?;
        }
    }
    Ok(())
}

/// The upper and the work directory of a root, where it is an overlay that has them.
///
/// # Errors
/// When an option is unknown.
pub(super) fn writable_layer(mounts: &[Mount]) -> Result<Option<(&str, &str)>, RootfsError> {
    let [mount] = mounts else { return Ok(None) };
    if mount.kind != "overlay" {
        return Ok(None);
    }
    let options = parse(&mount.options)?;
    Ok(options.upper.zip(options.work))
}

/// Whether overlayfs takes each lower directory by itself (kernel 6.8 and later). Such a kernel
/// looks at the directory at once; others know no such option, and the oldest only say so when the
/// overlay is made.
fn takes_single_layers() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).is_ok_and(|context| {
            let missing = "/proc/self/no-such-layer";
            fsconfig_set_string(context.as_fd(), "lowerdir+", missing)
                == Err(rustix::io::Errno::NOENT)
        })
    })
}

fn overlay_by_layers(options: &OverlayOptions<'_>, name: &str) -> Result<OwnedFd, RootfsError> {
    let context = open_context(name)?;
    for path in &options.lower {
        let layer = Layer::new(path)?;
        fsconfig_set_string(context.as_fd(), "lowerdir+", layer.text.as_str())
            .map_err(|error| refused(context.as_fd(), "add a layer to", name, error))?;
    }
    finish(&context, options, name)
}

/// All lower directories in one value, short by naming each by a descriptor.
fn overlay_joined(options: &OverlayOptions<'_>, name: &str) -> Result<OwnedFd, RootfsError> {
    let whole = options.lower.join(":");
    let mut open = Vec::new();
    let joined = if whole.len() <= VALUE_LIMIT {
        whole
    } else {
        for path in &options.lower {
            open.push(Layer::by_descriptor(path)?);
        }
        join(&open)
    };
    if joined.len() > VALUE_LIMIT {
        drop(open);
        return mount_classic(options, name);
    }
    let context = open_context(name)?;
    fsconfig_set_string(context.as_fd(), "lowerdir", joined.as_str())
        .map_err(|error| refused(context.as_fd(), "set the layers of", name, error))?;
    finish(&context, options, name)
}

fn join(layers: &[Layer]) -> String {
    let texts: Vec<&str> = layers.iter().map(|layer| layer.text.as_str()).collect();
    texts.join(":")
}

/// The last resort, for many layers on kernels before 6.8: mount(2), whose options may be a page
/// long. It mounts in a mount namespace that lives as long as this call, so that nothing can leak,
/// and takes the mount out as a detached clone.
fn mount_classic(options: &OverlayOptions<'_>, name: &str) -> Result<OwnedFd, RootfsError> {
    let worker = || -> Result<OwnedFd, RootfsError> {
        private_namespace().map_err(|source| RootfsError::Mount {
            doing: "make a mount namespace for",
            what: name.to_owned(),
            source,
        })?;
        // Opened in the new namespace: overlayfs takes layers of its own namespace only.
        let open = |path: &&str| Layer::by_descriptor(path);
        let lower = options
            .lower
            .iter()
            .map(open)
            .collect::<Result<Vec<_>, _>>()?;
        let mut text = format!("lowerdir={}", join(&lower));
        let mut kept = Vec::new();
        for (key, path) in [("upperdir", options.upper), ("workdir", options.work)] {
            if let Some(path) = path {
                let layer = Layer::new(path)?;
                text.push_str(&format!(",{key}={}", layer.text));
                kept.push(layer);
            }
        }
        for (key, value) in &options.others {
            text.push(',');
            text.push_str(key);
            if let Some(value) = value {
                text.push_str(&format!("={value}"));
            }
        }
        let flags = if options.read_only {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        let text = CString::new(text).map_err(|_| RootfsError::Option {
            option: "a path with a zero byte".into(),
            kind: "overlay".into(),
        })?;
        // /sys exists everywhere, and no layer lies below it.
        rustix::mount::mount("overlay", "/sys", "overlay", flags, Some(text.as_c_str()))
            .map_err(failed("mount", name))?;
        let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, "/sys", tree).map_err(failed("take out", name))
    };
    std::thread::scope(|scope| scope.spawn(worker).join()).unwrap_or_else(|_| {
        Err(RootfsError::Mount {
            doing: "mount",
            what: name.to_owned(),
            source: io::Error::other("the mounting thread ended early"),
        })
    })
}

/// Gives this thread a mount namespace of its own, from which nothing gets out.
fn private_namespace() -> io::Result<()> {
    // SAFETY: unshare takes flags only; the thread shares its file system context with no other
    // after it, and ends soon.
    sys::check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into())?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

fn open_context(name: &str) -> Result<OwnedFd, RootfsError> {
    fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("open a context for", name))
}

fn finish(
    context: &OwnedFd,
    options: &OverlayOptions<'_>,
    name: &str,
) -> Result<OwnedFd, RootfsError> {
    let context = context.as_fd();
    for (key, path) in [("upperdir", options.upper), ("workdir", options.work)] {
        if let Some(path) = path {
            let layer = Layer::new(path)?;
            fsconfig_set_string(context, key, layer.text.as_str())
                .map_err(|error| refused(context, "set a directory of", name, error))?;
        }
    }
    for (key, value) in &options.others {
        match value {
            Some(value) => fsconfig_set_string(context, *key, *value),
            None => fsconfig_set_flag(context, *key),
        }
        .map_err(|error| refused(context, "set an option of", name, error))?;
    }
    fsconfig_create(context).map_err(|error| refused(context, "make", name, error))?;
    let attributes = if options.read_only {
        MountAttrFlags::MOUNT_ATTR_RDONLY
    } else {
        MountAttrFlags::empty()
    };
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("mount", name))
}

/// The kernel's own sentence about a refused option, where it wrote one into the context.
fn refused(
    context: BorrowedFd<'_>,
    doing: &'static str,
    what: &str,
    error: rustix::io::Errno,
) -> RootfsError {
    let mut text = [0_u8; 512];
    let source = match rustix::io::read(context, &mut text) {
        Ok(length) if length > 2 => {
            let said = String::from_utf8_lossy(&text[..length]);
            let errno = io::Error::from(error);
            io::Error::new(errno.kind(), format!("{errno}: {}", said[2..].trim()))
        }
        _ => error.into(),
    };
    RootfsError::Mount {
        doing,
        what: what.to_owned(),
        source,
    }
}

/// Clones what is at a path as a detached mount; answers whether it is a directory.
///
/// # Errors
/// When the path does not exist or the kernel refuses.
pub fn bind(source: &Path, flags: BindFlags) -> Result<(OwnedFd, bool), RootfsError> {
    let name = source.display().to_string();
    let mut tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if flags.recursive {
        tree |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = open_tree(CWD, source, tree).map_err(failed("clone the mount of", &name))?;
    let attributes = [
        (flags.read_only, sys::MOUNT_ATTR_RDONLY),
        (flags.no_suid, sys::MOUNT_ATTR_NOSUID),
        (flags.no_dev, sys::MOUNT_ATTR_NODEV),
        (flags.no_exec, sys::MOUNT_ATTR_NOEXEC),
    ];
    let set = attributes
        .iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bit)| all | bit);
    sys::mount_setattr(mount.as_fd(), set, flags.recursive).map_err(|source| {
        RootfsError::Mount {
            doing: "set the flags of the mount of",
            what: name.clone(),
            source,
        }
    })?;
    let status = rustix::fs::fstat(&mount).map_err(failed("look at", name))?;
    let directory = status.st_mode & libc::S_IFMT == libc::S_IFDIR;
    Ok((mount, directory))
}

/// A detached, empty tmpfs. `options` are the file system's own: size, mode, uid, gid, nr_inodes.
///
/// # Errors
/// When an option is refused.
pub fn tmpfs(options: &[(&str, &str)], flags: BindFlags) -> Result<OwnedFd, RootfsError> {
    let name = "a tmpfs";
    let context =
        fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("open a context for", name))?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value)
            .map_err(|error| refused(context.as_fd(), "set an option of", name, error))?;
    }
    fsconfig_create(context.as_fd())
        .map_err(|error| refused(context.as_fd(), "make", name, error))?;
    let all = [
        (flags.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (flags.no_suid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (flags.no_dev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (flags.no_exec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
    ];
    let set = all
        .iter()
        .filter(|(on, _)| *on)
        .fold(MountAttrFlags::empty(), |all, (_, bit)| all | *bit);
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, set).map_err(failed("mount", name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerds_options_are_sorted() {
        let options: Vec<String> = [
            "index=off",
            "userxattr",
            "workdir=/w",
            "upperdir=/u",
            "lowerdir=/a:/b",
        ]
        .map(str::to_owned)
        .into();
        let parsed = parse(&options).unwrap();
        assert_eq!(parsed.lower, ["/a", "/b"]);
        assert_eq!((parsed.upper, parsed.work), (Some("/u"), Some("/w")));
        assert_eq!(parsed.others, [("index", Some("off")), ("userxattr", None)]);
    }

    #[test]
    fn unknown_options_are_refused_by_name() {
        let error = overlay(&["lowerdir=/".into(), "sync=maybe".into()]).unwrap_err();
        assert!(error.to_string().contains("sync=maybe"), "{error}");
    }

    #[test]
    fn two_mounts_are_refused() {
        let mount = Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: vec![],
        };
        assert!(overlay_from_mounts(&[mount.clone(), mount]).is_err());
        assert!(overlay_from_mounts(&[]).is_err());
    }

    /// An overlay of many layers with long names, each with a file of its own.
    struct Layers {
        dir: tempfile::TempDir,
        count: usize,
    }

    impl Layers {
        fn new(count: usize, name_length: usize) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let layers = Self { dir, count };
            for at in 0..count {
                let path = layers.path(at, name_length);
                std::fs::create_dir_all(&path).unwrap();
                std::fs::write(format!("{path}/file{at}"), at.to_string()).unwrap();
            }
            for name in ["upper", "work"] {
                std::fs::create_dir(layers.dir.path().join(name)).unwrap();
            }
            layers
        }

        fn path(&self, at: usize, name_length: usize) -> String {
            let name = format!("{at:0name_length$}");
            self.dir.path().join(name).display().to_string()
        }

        fn options(&self, name_length: usize) -> Vec<String> {
            let lower: Vec<String> = (0..self.count)
                .map(|at| self.path(at, name_length))
                .collect();
            let dir = self.dir.path().display();
            vec![
                format!("upperdir={dir}/upper"),
                format!("workdir={dir}/work"),
                format!("lowerdir={}", lower.join(":")),
            ]
        }

        fn check(&self, mount: &OwnedFd) {
            for at in [0, self.count - 1] {
                let file = rustix::fs::openat(
                    mount,
                    format!("file{at}"),
                    OFlags::RDONLY | OFlags::CLOEXEC,
                    Mode::empty(),
                )
                .unwrap();
                let text = std::io::read_to_string(std::fs::File::from(file)).unwrap();
                assert_eq!(text, at.to_string());
            }
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
            let made = rustix::fs::openat(mount, "made", flags, Mode::RWXU);
            assert!(made.is_ok());
            assert!(self.dir.path().join("upper/made").exists());
        }
    }

    #[test]
    fn many_layers_with_long_names_are_stacked() {
        let layers = Layers::new(60, 240);
        let mounts = [Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: layers.options(240),
        }];
        // Twice, since a volatile overlay leaves a mark behind.
        for _ in 0..2 {
            layers.check(&overlay_from_mounts(&mounts).unwrap());
        }
        sync_upper(&mounts).unwrap();
    }

    #[test]
    fn kernels_without_single_layers_get_one_value() {
        for (count, name_length) in [(2, 3), (3, 150), (100, 100)] {
            let layers = Layers::new(count, name_length);
            let texts = layers.options(name_length);
            let options = parse(&texts).unwrap();
            layers.check(&overlay_joined(&options, "an overlay").unwrap());
        }
    }

    #[test]
    fn a_refused_overlay_is_explained() {
        let error = overlay(&["lowerdir=/nonexistent/layer".into()]).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/layer"), "{error}");
    }

    #[test]
    fn a_view_is_a_read_only_bind() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let view = overlay_from_mounts(&[Mount {
            kind: "bind".into(),
            source: dir.path().display().to_string(),
            options: vec!["ro".into(), "rbind".into()],
        }])
        .unwrap();
        assert!(rustix::fs::statat(&view, "file", rustix::fs::AtFlags::empty()).is_ok());
        let made = rustix::fs::mkdirat(&view, "made", Mode::RWXU);
        assert_eq!(made, Err(rustix::io::Errno::ROFS));
    }
}
