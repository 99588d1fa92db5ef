//! Network, devdax and RDMA.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// QEMU's user network has these addresses.
const ADDRESSES: &str = "link set lo up
link set eth0 up
address add 10.0.2.15/24 dev eth0
route add default via 10.0.2.2
";
const RDMA: &str = "link add rdma0 type dummy
link set rdma0 up
address add 10.99.0.1/24 dev rdma0
";
const NAMESERVER: &str = "nameserver 10.0.2.3\n";

pub fn network() -> anyhow::Result<()> {
    nix::unistd::sethostname("trenv-vm").context("Failed to name the VM")?;
    ip(ADDRESSES)?;
    let path = Path::new("/etc/resolv.conf");
    // It may be a link to what only the machine has.
    if path.is_symlink() {
        fs::remove_file(path).context("Failed to replace /etc/resolv.conf")?;
    }
    fs::write(path, NAMESERVER).context("Failed to write /etc/resolv.conf")
}

/// The NVDIMM's first namespace covers all of it; it is made a devdax with pages of 4 KiB, whose pages
/// the kernel describes in ordinary memory.
pub fn devdax_of_nvdimm() -> anyhow::Result<()> {
    devdax(&["--force", "--reconfig=namespace0.0"])
}

/// A region of all of the one memory device, as persistent memory, and a namespace of all of it.
pub fn devdax_of_cxl() -> anyhow::Result<()> {
    let region = [
        "create-region",
        "-t",
        "pmem",
        "-d",
        "decoder0.0",
        "-w",
        "1",
        "-m",
        "mem0",
    ];
    super::program("cxl", &region)?;
    devdax(&["--region=region0"])
}

fn devdax(what: &[&str]) -> anyhow::Result<()> {
    let how = ["--mode=devdax", "--align=4096", "--map=mem"];
    super::program("ndctl", &[&["create-namespace"], what, &how].concat())?;
    if !Path::new("/dev/dax0.0").exists() {
        bail!("ndctl made no /dev/dax0.0");
    }
    Ok(())
}

/// RDMA in software needs an interface with an address; this one leads nowhere.
pub fn rdma() -> anyhow::Result<()> {
    ip(RDMA)?;
    let link = ["link", "add", "rxe0", "type", "rxe", "netdev", "rdma0"];
    super::program("rdma", &link)
}

fn ip(commands: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("Failed to run ip; is iproute2 installed on the machine?")?;
    if let Some(mut input) = child.stdin.take() {
        input
            .write_all(commands.as_bytes())
            .context("Failed to tell ip what to do")?;
    }
    let status = child.wait().context("Failed to wait for ip")?;
    if !status.success() {
        bail!("ip cannot set the VM's addresses: {status}");
    }
    Ok(())
}
