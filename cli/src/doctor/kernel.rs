//! What the running kernel offers.

use std::path::Path;

use super::{Check, read};

/// The oldest kernel that trenv is tested on.
const TESTED: (u32, u32) = (6, 1);

/// The oldest kernel that has every call trenv makes (clone3 with set_tid, time namespaces,
/// pidfd_getfd, close_range, the mount API).
const OLDEST: (u32, u32) = (5, 9);

/// Capabilities by bit, with what fails without them; `true` where nothing works without.
const CAPABILITIES: &[(u32, &str, bool, &str)] = &[
    (5, "CAP_KILL", true, ""),
    (6, "CAP_SETGID", true, ""),
    (7, "CAP_SETUID", true, ""),
    (12, "CAP_NET_ADMIN", true, ""),
    (18, "CAP_SYS_CHROOT", true, ""),
    (19, "CAP_SYS_PTRACE", true, ""),
    (21, "CAP_SYS_ADMIN", true, ""),
    (
        24,
        "CAP_SYS_RESOURCE",
        false,
        "raising a function's resource limits above its own",
    ),
    (
        40,
        "CAP_CHECKPOINT_RESTORE",
        false,
        "creating processes with given ids without CAP_SYS_ADMIN",
    ),
];

pub fn checks() -> Vec<Check> {
    let mut checks = vec![version(), cgroup(), overlay(), huge_pages(), userfaultfd()];
    checks.push(time_namespace());
    checks.push(pid_max());
    checks.push(ptrace());
    checks.extend(capabilities());
    checks
}

fn version() -> Check {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let advice = "apt-get install linux-image-amd64, then boot it";
    match parse_version(&release) {
        Some(version) if version >= TESTED => Check::ok("kernel", release),
        Some(version) if version >= OLDEST => Check::absent("kernel", release, advice),
        _ => Check::missing("kernel", release, advice),
    }
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Which cgroup versions carry the controllers that limits and freezing need.
fn cgroup() -> Check {
    let mounts = read("/proc/self/mounts").unwrap_or_default();
    let (v1, v2) = cgroup_mounts(&mounts);
    let v2_controllers = v2
        .as_ref()
        .and_then(|path| read(Path::new(path).join("cgroup.controllers")))
        .unwrap_or_default();
    let has = |list: &[String], name: &str| list.iter().any(|item| item == name);
    let v2_list: Vec<String> = v2_controllers.split(' ').map(str::to_owned).collect();
    let found = match (v1.is_empty(), &v2) {
        (true, Some(_)) => format!("v2 ({v2_controllers})"),
        (false, Some(_)) => format!("v1 ({}) and a v2 tree", v1.join(" ")),
        (false, None) => format!("v1 ({})", v1.join(" ")),
        (true, None) => "none mounted".to_owned(),
    };
    // On v2 the freezer is part of every group.
    let enough = ["memory", "cpu", "pids"]
        .iter()
        .all(|name| has(&v1, name) || has(&v2_list, name))
        && (has(&v1, "freezer") || v1.is_empty() && v2.is_some());
    if enough {
        return Check::ok("cgroups", found);
    }
    let advice =
        "mount -t cgroup2 none /sys/fs/cgroup (or boot with systemd.unified_cgroup_hierarchy=1)";
    Check::missing("cgroups", found, advice)
}

/// Controllers of v1 hierarchies, and where v2 is mounted.
fn cgroup_mounts(mounts: &str) -> (Vec<String>, Option<String>) {
    const NAMES: [&str; 8] = [
        "blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids",
    ];
    let mut v1 = Vec::new();
    let mut v2 = None;
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, target, kind, options, ..] = fields.as_slice() else {
            continue;
        };
        match *kind {
            "cgroup2" => v2 = Some((*target).to_owned()),
            "cgroup" => v1.extend(
                options
                    .split(',')
                    .filter(|option| NAMES.contains(option))
                    .map(str::to_owned),
            ),
            _ => {}
        }
    }
    v1.sort();
    v1.dedup();
    (v1, v2)
}

fn overlay() -> Check {
    let known = read("/proc/filesystems").unwrap_or_default();
    if known
        .lines()
        .any(|line| line.split_whitespace().last() == Some("overlay"))
    {
        return Check::ok("overlayfs", "yes");
    }
    Check::missing("overlayfs", "no", "modprobe overlay")
}

fn huge_pages() -> Check {
    const ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let Some(text) = read(ENABLED) else {
        return Check::absent(
            "huge pages",
            "the kernel has no transparent huge pages",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE; large templates start slower without",
        );
    };
    let chosen = text
        .split('[')
        .nth(1)
        .and_then(|rest| rest.split(']').next())
        .unwrap_or(&text);
    if chosen == "never" {
        return Check::absent(
            "huge pages",
            "transparent huge pages are off",
            format!("echo madvise > {ENABLED}"),
        );
    }
    Check::ok("huge pages", format!("transparent ({chosen})"))
}

fn userfaultfd() -> Check {
    // The file exists exactly when the kernel is built with userfaultfd.
    if Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists() {
        return Check::ok("userfaultfd", "yes");
    }
    let advice =
        "a kernel with CONFIG_USERFAULTFD; only the start methods that load pages on demand use it";
    Check::absent("userfaultfd", "no", advice)
}

fn time_namespace() -> Check {
    if Path::new("/proc/self/ns/time").exists() {
        return Check::ok("time namespaces", "yes");
    }
    let advice = "a kernel with CONFIG_TIME_NS; without, a restored function's clocks jump, and after a reboot its template is made anew";
    Check::absent("time namespaces", "no", advice)
}

fn pid_max() -> Check {
    const NEEDED: u64 = 32768;
    let text = read("/proc/sys/kernel/pid_max").unwrap_or_default();
    match text.parse::<u64>() {
        Ok(value) if value >= NEEDED => Check::ok("pid_max", text),
        _ => Check::missing("pid_max", text, "sysctl -w kernel.pid_max=4194304"),
    }
}

fn ptrace() -> Check {
    match read("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        Some("3") => Check::missing(
            "ptrace",
            "forbidden until the next boot (yama.ptrace_scope = 3)",
            "set kernel.yama.ptrace_scope below 3 in /etc/sysctl.d and reboot",
        ),
        _ => Check::ok("ptrace", "allowed to root"),
    }
}

fn capabilities() -> Vec<Check> {
    let status = read("/proc/self/status").unwrap_or_default();
    let Some(held) = effective(&status) else {
        return vec![Check::missing("capabilities", "unknown", "mount /proc")];
    };
    let mut checks = Vec::new();
    let mut present = Vec::new();
    for (bit, name, needed, without) in CAPABILITIES {
        if held >> bit & 1 == 1 {
            present.push(name.trim_start_matches("CAP_"));
        } else if *needed {
            checks.push(Check::missing(
                *name,
                "not held",
                "run as root with full capabilities",
            ));
        } else {
            checks.push(Check::absent(
                *name,
                "not held",
                format!("run as root with it; it serves {without}"),
            ));
        }
    }
    checks.insert(0, Check::ok("capabilities", present.join(" ")));
    checks
}

fn effective(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(parse_version("6.1.0-40-amd64"), Some((6, 1)));
        assert_eq!(parse_version("5.10.2"), Some((5, 10)));
        assert!(parse_version("5.10.2") > parse_version("5.9"));
        assert_eq!(parse_version("unknown"), None);
    }

    #[test]
    fn both_cgroup_versions_are_seen() {
        let mounts = "cgroup /sys/fs/cgroup/memory cgroup rw,nosuid,memory 0 0\n\
            cgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n\
            none /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let (v1, v2) = cgroup_mounts(mounts);
        assert_eq!(v1, ["cpu", "cpuacct", "memory"]);
        assert_eq!(v2.as_deref(), Some("/sys/fs/cgroup/unified"));
    }

    #[test]
    fn effective_capabilities_are_hexadecimal() {
        assert_eq!(
            effective("Name:\tx\nCapEff:\t0000000000000021\n"),
            Some(0x21)
        );
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
