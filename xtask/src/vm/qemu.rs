//! The command line of QEMU.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

use super::job;
use super::kernel::Choice;
use super::{Dax, Options};

pub const PROGRAM: &str = "qemu-system-x86_64";

/// What the kernel is told: a panic ends the VM, and so does an oops, since what held locks then
/// would only hang; a trustworthy clock and random numbers without waiting; addresses in the log
/// that can be looked up.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 panic=-1 oops=panic mitigations=off nokaslr tsc=reliable \
    random.trust_cpu=on cgroup_no_v1=all rdinit=/init";

/// Checks that are built into the debug kernel and do nothing unless they are asked for. With
/// init_on_alloc the kernel says in its log that poisoning is on, which takes its place.
const DEBUG_ARGUMENTS: &str = " page_poison=1 init_on_alloc=1";

/// What follows is for this program, which is /init.
const INIT_ARGUMENTS: &str = " -- vm guest";

/// The space for labels, without which ndctl cannot make a namespace of another kind; what is left
/// stays a multiple of 16 MiB.
const LABELS_MIB: u64 = 16;

/// The files of a run that QEMU reads and writes.
#[derive(Debug)]
pub struct Files<'a> {
    pub vmlinux: &'a Path,
    pub initramfs: &'a Path,
    pub console: &'a Path,
    pub outcome: &'a Path,
    pub share: Option<&'a Path>,
}

/// The outputs must be open for writing only, and be inherited.
pub fn command(
    options: &Options,
    files: &Files<'_>,
    stdout: &OwnedFd,
    stderr: &OwnedFd,
) -> anyhow::Result<Command> {
    // QEMU ends with this program, however that ends.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", PROGRAM]);
    let mut machine = "q35,hmat=off".to_owned();
    let mut memory = format!("{}M", options.memory);
    let mut devices: Vec<OsString> = Vec::new();
    let mut device = |kind: &str, value: OsString| devices.extend([kind.into(), value]);

    if options.dax == Some(Dax::Nvdimm) {
        machine.push_str(",nvdimm=on");
        let whole = options.dax_size + LABELS_MIB;
        memory.push_str(&format!(
            ",slots=2,maxmem={}M",
            options.memory + whole + 1024
        ));
        let backend = format!("memory-backend-ram,id=nvdimm,size={whole}M");
        device("-object", backend.into());
        let nvdimm = format!("nvdimm,memdev=nvdimm,label-size={LABELS_MIB}M");
        device("-device", nvdimm.into());
    }

    if options.numa {
        // What does not divide evenly goes to the second node.
        let halves = [options.memory / 2, options.memory.div_ceil(2)];
        let first_cpus = options.cpus / 2;
        let cpus = [0..first_cpus, first_cpus..options.cpus];
        for (node, (half, cpus)) in halves.into_iter().zip(cpus).enumerate() {
            let backend = format!("memory-backend-ram,id=node{node},size={half}M");
            device("-object", backend.into());
            let mut value = format!("node,nodeid={node},memdev=node{node}");
            if !cpus.is_empty() {
                value.push_str(&format!(",cpus={}-{}", cpus.start, cpus.end - 1));
            }
            device("-numa", value.into());
        }
    }

    device("-fsdev", export("root", Path::new("/"), ",readonly=on")?);
    device(
        "-device",
        format!("virtio-9p-pci,fsdev=root,mount_tag={}", job::ROOT_TAG).into(),
    );
    if let Some(share) = files.share {
        device("-fsdev", export("share", share, "")?);
        device(
            "-device",
            format!("virtio-9p-pci,fsdev=share,mount_tag={}", job::SHARE_TAG).into(),
        );
    }

    device("-device", "virtio-serial-pci".into());
    for (name, output) in [("stdout", stdout), ("stderr", stderr)] {
        let set = output.as_raw_fd();
        device("-add-fd", format!("fd={set},set={set}").into());
        let path = Path::new("/dev/fdset").join(set.to_string());
        device("-chardev", character_device(name, &path)?);
    }
    device("-chardev", character_device("outcome", files.outcome)?);
    for (name, port) in [
        ("stdout", job::STDOUT_PORT),
        ("stderr", job::STDERR_PORT),
        ("outcome", job::OUTCOME_PORT),
    ] {
        device(
            "-device",
            format!("virtserialport,chardev={name},name={port}").into(),
        );
    }
    device("-chardev", character_device("console", files.console)?);
    device("-serial", "chardev:console".into());

    device("-netdev", "user,id=network".into());
    device("-device", "virtio-net-pci,netdev=network,romfile=".into());

    if options.dax == Some(Dax::Cxl) {
        // A host bridge with a port, and a window of addresses that leads there. Last: other devices would
        // be put on this bridge.
        machine.push_str(&format!(
            ",cxl=on,cxl-fmw.0.targets.0=bridge,cxl-fmw.0.size={}M",
            options.dax_size
        ));
        let memory = format!("memory-backend-ram,id=cxl,size={}M", options.dax_size);
        device("-object", memory.into());
        let labels = format!("memory-backend-ram,id=labels,size={LABELS_MIB}M");
        device("-object", labels.into());
        for value in [
            "pxb-cxl,id=bridge,bus=pcie.0,bus_nr=16",
            "cxl-rp,id=root_port,bus=bridge,port=0,chassis=0,slot=0",
            // Of a bridge with one port the kernel lets the decoder be, by which QEMU finds the device.
            "cxl-rp,id=other_port,bus=bridge,port=1,chassis=0,slot=1",
            "cxl-type3,bus=root_port,memdev=cxl,lsa=labels",
        ] {
            device("-device", value.into());
        }
    }

    let mut cpus = options.cpus;
    if options.kvm {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else if options.icount {
        cpus = 1;
        command.args(["-accel", "tcg,thread=single", "-cpu", "max,la57=off"]);
        command.args(["-icount", "shift=0,sleep=off"]);
    } else {
        // Page tables of five levels would only cost time.
        command.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]);
    }
    let processors = if options.numa {
        // The kernel takes exception to a socket in two nodes.
        format!("{cpus},sockets={cpus}")
    } else {
        cpus.to_string()
    };
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-machine", &machine, "-m", &memory])
        .args(["-smp", &processors])
        .args(devices)
        .arg("-kernel")
        .arg(files.vmlinux)
        .arg("-initrd")
        .arg(files.initramfs)
        .args(["-append", &kernel_arguments(options.kernel)]);
    Ok(command)
}

fn kernel_arguments(kernel: Choice) -> String {
    let checks = match kernel {
        Choice::Debug => DEBUG_ARGUMENTS,
        Choice::Stock | Choice::Stock612 | Choice::Patched => "",
    };
    format!("{KERNEL_ARGUMENTS}{checks}{INIT_ARGUMENTS}")
}

fn export(id: &str, folder: &Path, more: &str) -> anyhow::Result<OsString> {
    let path = value(folder)?;
    Ok(format!("local,id={id},path={path},security_model=none,multidevs=remap{more}").into())
}

fn character_device(id: &str, path: &Path) -> anyhow::Result<OsString> {
    // Appending: QEMU would truncate what it opens, which pipes refuse.
    Ok(format!("file,id={id},path={},append=on", value(path)?).into())
}

/// A path as QEMU reads it: a comma is doubled.
fn value(path: &Path) -> anyhow::Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("QEMU takes no path such as {path:?}, which is not UTF-8"))?;
    if text.contains('\n') {
        bail!("QEMU takes no path with a line break: {path:?}");
    }
    Ok(text.replace(',', ",,"))
}
