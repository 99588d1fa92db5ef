//! From the initramfs to the machine's root file system, on which nothing can be changed.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount, umount2};

use super::super::job::{self, Job};

/// The machine's root by 9p, and with the overlay that takes all writes.
const LOWER: &str = "/lower";
const WRITES: &str = "/writes";
const NEW: &str = "/new";

/// As large as a virtio ring can take: each request costs a switch to QEMU.
const NINE_P: &str = "trans=virtio,version=9p2000.L,msize=512000";

/// Kinds of file system with places and options, in this order.
const MOUNTS: &[(&str, &str, &str)] = &[
    ("devpts", "/dev/pts", "ptmxmode=666,mode=620,gid=5"),
    ("tmpfs", "/dev/shm", "mode=1777"),
    ("mqueue", "/dev/mqueue", ""),
    ("hugetlbfs", "/dev/hugepages", ""),
    ("tmpfs", "/run", "mode=755"),
    ("cgroup2", "/sys/fs/cgroup", ""),
    ("debugfs", "/sys/kernel/debug", ""),
    ("tracefs", "/sys/kernel/tracing", ""),
];

pub fn early() -> anyhow::Result<()> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        attach(kind, kind, Path::new(place), "")?;
    }
    Ok(())
}

pub fn load_modules() -> anyhow::Result<()> {
    let mut files: Vec<PathBuf> = fs::read_dir(job::MODULES_FOLDER)
        .and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect()
        })
        .context("Failed to list the modules")?;
    files.sort();
    for path in files {
        let context = || format!("Failed to load the module {}", path.display());
        let file = File::open(&path).with_context(context)?;
        finit_module(&file, c"", ModuleInitFlags::empty()).with_context(context)?;
    }
    Ok(())
}

/// Makes the machine's root this process's, with all that a running system has mounted.
pub fn enter(job: &Job) -> anyhow::Result<()> {
    attach_with(
        "9p",
        job::ROOT_TAG,
        Path::new(LOWER),
        MsFlags::MS_RDONLY,
        &format!("{NINE_P},cache=loose"),
    )?;
    attach("tmpfs", "tmpfs", Path::new(WRITES), "mode=755,size=90%")?;
    for folder in ["upper", "work"] {
        make_folder(&Path::new(WRITES).join(folder))?;
    }
    let options = format!("lowerdir={LOWER},upperdir={WRITES}/upper,workdir={WRITES}/work");
    attach("overlay", "overlay", Path::new(NEW), &options)?;
    for place in ["/dev", "/proc", "/sys"] {
        let target = below_new(Path::new(place));
        move_mount(Path::new(place), &target)?;
    }
    if let Some(modules) = &job.modules {
        install_modules(modules)?;
    }
    std::env::set_current_dir(NEW).with_context(|| format!("Failed to enter {NEW}"))?;
    move_mount(Path::new("."), Path::new("/"))?;
    nix::unistd::chroot(".").context("Failed to make the machine's root the VM's")?;
    std::env::set_current_dir("/").context("Failed to enter the VM's root")?;

    for (kind, place, options) in MOUNTS {
        attach(kind, kind, Path::new(place), options)?;
    }
    enable_controllers()?;
    let folders: Vec<&Path> = std::iter::once(Path::new("/tmp"))
        .chain(job.tmpfs.iter().map(PathBuf::as_path))
        .collect();
    for folder in folders {
        attach_tmpfs(folder, &job.folder)?;
    }
    if let Some(share) = &job.share {
        // The machine sees at once what is written, and mappings work.
        attach("9p", job::SHARE_TAG, share, &format!("{NINE_P},cache=mmap"))?;
    }
    Ok(())
}

/// Writes what belongs to the machine.
pub fn leave(job: &Job) -> anyhow::Result<()> {
    if let Some(share) = &job.share {
        umount2(share, nix::mount::MntFlags::empty())
            .with_context(|| format!("Failed to write {} to the machine", share.display()))?;
    }
    Ok(())
}

/// Where `modprobe` looks: the machine has its own kernel's there, if any.
fn install_modules(modules: &Path) -> anyhow::Result<()> {
    let release = modules
        .file_name()
        .with_context(|| format!("{} is named after no kernel", modules.display()))?;
    let place = below_new(Path::new("/usr/lib/modules")).join(release);
    make_folder(&place)?;
    bind(&below_new(modules), &place)
}

/// Each child of the root has every controller, as systemd has it.
fn enable_controllers() -> anyhow::Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let context = "Failed to enable the controllers of cgroup v2";
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).context(context)?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    fs::write(root.join("cgroup.subtree_control"), all.join(" ")).context(context)?;
    // With the first child of the root the kernel patches its code, and back with the last. As with systemd
    // there is always one: Debian's 6.12 died in such a patch, now and then, under software emulation.
    fs::create_dir(root.join("init.scope")).context(context)
}

/// A tmpfs on a folder, under which the command's own folder stays to be seen.
fn attach_tmpfs(folder: &Path, command: &Path) -> anyhow::Result<()> {
    let kept = if command.starts_with(folder) && command != folder {
        let open =
            File::open(command).with_context(|| format!("Failed to open {}", command.display()))?;
        Some(open)
    } else {
        None
    };
    attach("tmpfs", "tmpfs", folder, "mode=1777")?;
    if let Some(kept) = kept {
        make_folder(command)?;
        bind(
            &Path::new("/proc/self/fd").join(kept.as_raw_fd().to_string()),
            command,
        )?;
    }
    Ok(())
}

fn below_new(path: &Path) -> PathBuf {
    Path::new(NEW).join(path.strip_prefix("/").unwrap_or(path))
}

fn attach(kind: &str, source: &str, place: &Path, options: &str) -> anyhow::Result<()> {
    attach_with(kind, source, place, MsFlags::empty(), options)
}

fn attach_with(
    kind: &str,
    source: &str,
    place: &Path,
    flags: MsFlags,
    options: &str,
) -> anyhow::Result<()> {
    make_folder(place)?;
    mount(Some(source), place, Some(kind), flags, Some(options))
        .with_context(|| format!("Failed to mount {kind} on {}", place.display()))
}

fn bind(from: &Path, to: &Path) -> anyhow::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("Failed to bind {} to {}", from.display(), to.display()))
}

fn move_mount(from: &Path, to: &Path) -> anyhow::Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .with_context(|| format!("Failed to move {} to {}", from.display(), to.display()))
}

fn make_folder(path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).with_context(|| format!("Failed to make {}", path.display()))
}
