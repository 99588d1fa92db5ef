//! Root file systems of runc's containers, mounted from containerd's mounts.

use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{Result, ShimError};

/// Longest data that mount(2) takes.
const DATA_MAX: usize = 4095;

/// Mounts everything at `target`, in order; a failure leaves nothing mounted.
pub fn mount_all(mounts: &[Mount], target: &Path) -> Result<()> {
    for each in mounts {
        if let Err(err) = mount_one(each, target) {
            // The first failure is the one to report.
            let _ = unmount_all(target);
            return Err(err);
        }
    }
    Ok(())
}

/// Unmounts until nothing is mounted at `target`; a missing target is fine.
pub fn unmount_all(target: &Path) -> Result<()> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => {
                return Err(ShimError::io(format!("unmount {}", target.display()))(
                    errno,
                ));
            }
        }
    }
}

fn mount_one(from: &Mount, target: &Path) -> Result<()> {
    let (flags, data) = split(&from.options);
    let action = || {
        ShimError::io(format!(
            "mount {} ({}) at {}",
            from.source,
            from.type_,
            target.display()
        ))
    };
    let bind = flags.contains(MsFlags::MS_BIND) || from.type_ == "bind";
    let source = Some(from.source.as_str());
    if bind {
        let kind = flags & (MsFlags::MS_BIND | MsFlags::MS_REC) | MsFlags::MS_BIND;
        mount(source, target, None::<&str>, kind, None::<&str>).map_err(action())?;
        // The first call of a bind ignores every other flag.
        let rest = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
        if !rest.is_empty() {
            let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(None::<&str>, target, None::<&str>, again, None::<&str>).map_err(action())?;
        }
        return Ok(());
    }
    let kind = Some(from.type_.as_str());
    if data.join(",").len() <= DATA_MAX {
        let data = data.join(",");
        return mount(source, target, kind, flags, Some(data.as_str())).map_err(action());
    }
    let (directory, data) = shorten(&data).ok_or_else(|| {
        ShimError::InvalidArgument(format!(
            "The options of the {} mount are longer than a page; use an image of fewer layers",
            from.type_
        ))
    })?;
    let (source, kind) = (from.source.clone(), from.type_.clone());
    let place = target.to_owned();
    // A working directory belongs to the whole process unless a thread leaves it.
    let done = std::thread::spawn(move || -> nix::Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::chdir(&directory)?;
        mount(
            Some(source.as_str()),
            &place,
            Some(kind.as_str()),
            flags,
            Some(data.as_str()),
        )
    });
    done.join()
        .map_err(|_| ShimError::Fault("the mounting thread panicked".into()))?
        .map_err(action())
}

/// Makes overlay's lower directories relative to the directory that they share.
fn shorten(options: &[String]) -> Option<(PathBuf, String)> {
    let lower = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let lowers: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut shared = lowers.first()?.parent()?.to_owned();
    while !lowers.iter().all(|path| path.starts_with(&shared)) {
        shared = shared.parent()?.to_owned();
    }
    let relative: Vec<String> = lowers
        .iter()
        .filter_map(|path| path.strip_prefix(&shared).ok())
        .map(|path| path.display().to_string())
        .collect();
    let data: Vec<String> = options
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                format!("lowerdir={}", relative.join(":"))
            } else {
                option.clone()
            }
        })
        .collect();
    let data = data.join(",");
    (data.len() <= DATA_MAX).then_some((shared, data))
}

/// Separates flags from the file system's own options.
fn split(options: &[String]) -> (MsFlags, Vec<String>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (flag, clear) = match option.as_str() {
            "defaults" | "rw" | "loop" => continue,
            "bind" => (MsFlags::MS_BIND, false),
            "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, false),
            "ro" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, false),
            "suid" => (MsFlags::MS_NOSUID, true),
            "nodev" => (MsFlags::MS_NODEV, false),
            "dev" => (MsFlags::MS_NODEV, true),
            "noexec" => (MsFlags::MS_NOEXEC, false),
            "exec" => (MsFlags::MS_NOEXEC, true),
            "sync" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, false),
            "noatime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, false),
            "relatime" => (MsFlags::MS_RELATIME, false),
            "strictatime" => (MsFlags::MS_STRICTATIME, false),
            _ => {
                data.push(option.clone());
                continue;
            }
        };
        flags.set(flag, !clear);
    }
    (flags, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let (flags, data) = split(&strings(&[
            "ro",
            "nosuid",
            "suid",
            "index=off",
            "lowerdir=/a:/b",
        ]));
        assert_eq!(flags, MsFlags::MS_RDONLY);
        assert_eq!(data, strings(&["index=off", "lowerdir=/a:/b"]));
    }

    #[test]
    fn many_layers_fit_into_a_page() {
        let lowers: Vec<String> = (0..100)
            .map(|n| format!("/{}/{n}/fs", "long".repeat(20)))
            .collect();
        let options = vec![
            format!("lowerdir={}", lowers.join(":")),
            "upperdir=/u".into(),
        ];
        assert!(options.join(",").len() > DATA_MAX);
        let (shared, data) = shorten(&options).unwrap();
        assert_eq!(shared, Path::new(&format!("/{}", "long".repeat(20))));
        assert!(data.starts_with("lowerdir=0/fs:1/fs:"), "{data}");
        assert!(data.ends_with(",upperdir=/u"));
    }

    #[test]
    fn a_target_that_is_not_there_is_unmounted() {
        unmount_all(Path::new("/nonexistent/rootfs")).unwrap();
    }
}
