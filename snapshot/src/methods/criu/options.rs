//! CRIU's arguments; criu(8) describes them.

use super::Mode;
use super::enter::fd;
use super::images::Streams;

/// Bytes of a deleted file that go into the image.
const GHOST_LIMIT: u64 = 64 << 20;

/// The dump of the tree of this root, which goes on.
pub fn dump(streams: &Streams) -> Vec<String> {
    let mut options = both("dump");
    options.extend(["--tree".into(), streams.root_pid.to_string()]);
    options.push("--leave-running".into());
    options.extend(["--ghost-limit".into(), GHOST_LIMIT.to_string()]);
    for name in streams.files() {
        options.extend(["--external".into(), name.into()]);
    }
    options
}

/// The restore, after which CRIU ends.
pub fn restore(mode: Mode, streams: &Streams) -> Vec<String> {
    let mut options = both("restore");
    options.push("--restore-detached".into());
    if mode == Mode::Lazy {
        options.push("--lazy-pages".into());
    }
    for (number, name) in streams.each() {
        let descriptor = fd::STDIO + number;
        options.extend(["--inherit-fd".into(), format!("fd[{descriptor}]:{name}")]);
    }
    options
}

/// The page server of one restore. It runs outside of the sandbox.
pub fn lazy_pages(image: &str, work: &str, status: i32) -> Vec<String> {
    let mut options = vec!["lazy-pages".into()];
    options.extend(["--images-dir".into(), image.into()]);
    options.extend(["--work-dir".into(), work.into()]);
    options.extend(["--log-file".into(), log_file("lazy-pages")]);
    options.extend(["--status-fd".into(), status.to_string()]);
    options
}

/// Where in the work folder a command's log is.
pub fn log_file(command: &str) -> String {
    format!("{command}.log")
}

/// What a dump and a restore have in common. The cgroup is the one that CRIU itself is in.
/// Connections come back closed: to keep them CRIU would have to change the firewall.
fn both(command: &str) -> Vec<String> {
    vec![
        command.into(),
        "--images-dir".into(),
        format!("/proc/self/fd/{}", fd::IMAGE),
        "--work-dir".into(),
        format!("/proc/self/fd/{}", fd::WORK),
        "--log-file".into(),
        log_file(command),
        "--manage-cgroups=ignore".into(),
        "--file-locks".into(),
        "--tcp-close".into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams() -> Streams {
        Streams {
            root_pid: 2,
            names: [
                Some("file[16:4]".into()),
                Some("pipe:[71]".into()),
                Some("pipe:[71]".into()),
            ],
        }
    }

    #[test]
    fn the_tree_goes_on_after_a_dump() {
        let line = dump(&streams()).join(" ");
        assert_eq!(
            line,
            "dump --images-dir /proc/self/fd/5 --work-dir /proc/self/fd/6 --log-file dump.log \
             --manage-cgroups=ignore --file-locks --tcp-close --tree 2 --leave-running \
             --ghost-limit 67108864 --external file[16:4]"
        );
    }

    #[test]
    fn a_restore_takes_the_streams_of_the_new_tenancy_once_each() {
        let line = restore(Mode::Read, &streams()).join(" ");
        assert_eq!(
            line,
            "restore --images-dir /proc/self/fd/5 --work-dir /proc/self/fd/6 --log-file restore.log \
             --manage-cgroups=ignore --file-locks --tcp-close --restore-detached \
             --inherit-fd fd[7]:file[16:4] --inherit-fd fd[8]:pipe:[71]"
        );
    }

    #[test]
    fn a_lazy_restore_has_a_page_server_with_the_same_work_folder() {
        let line = restore(Mode::Lazy, &streams()).join(" ");
        assert!(line.contains(" --lazy-pages "), "{line}");
        let line = lazy_pages("/images/a", "/images/work-1", 3).join(" ");
        assert_eq!(
            line,
            "lazy-pages --images-dir /images/a --work-dir /images/work-1 \
             --log-file lazy-pages.log --status-fd 3"
        );
    }
}
