//! The kernel itself out of a boot image: QEMU starts it directly (PVH), and so saves the emulated
//! processor its decompression, which takes longer than all the rest of booting.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// Places in the header, from the kernel's Documentation/arch/x86/boot.rst.
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

pub fn extract(image: &Path, vmlinux: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(image).with_context(|| format!("Failed to read {}", image.display()))?;
    let payload = payload(&bytes)
        .with_context(|| format!("{} is no Linux boot image for x86", image.display()))?;
    let (program, arguments): (_, &[&str]) = match payload {
        [0xfd, b'7', b'z', ..] => ("xz", &["--single-stream"]),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", &[]),
        [0x1f, 0x8b, ..] => ("gzip", &[]),
        _ => bail!("{} is compressed in an unknown way", image.display()),
    };
    let output =
        File::create(vmlinux).with_context(|| format!("Failed to create {}", vmlinux.display()))?;
    let mut child = Command::new(program)
        .args(["--decompress", "--stdout"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(output)
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("Failed to run {program}"))?;
    if let Some(mut input) = child.stdin.take() {
        // What follows the payload may be refused; whether the result is whole is seen below.
        let _ = input.write_all(payload);
    }
    child
        .wait()
        .with_context(|| format!("Failed to wait for {program}"))?;
    let size = fs::metadata(vmlinux)
        .with_context(|| format!("Failed to read {}", vmlinux.display()))?
        .len();
    // The last four bytes of the payload say how long it is.
    let expected = payload
        .last_chunk::<4>()
        .map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
    if Some(size) != expected {
        bail!("{program} does not decompress {}", image.display());
    }
    Ok(())
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(MAGIC..MAGIC + 4)? != b"HdrS" {
        return None;
    }
    let number = |place: usize| {
        let bytes = image.get(place..place + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    // One sector more than counted is there: the first.
    let protected = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * 512;
    let begin = protected.checked_add(number(PAYLOAD_OFFSET)?)?;
    image.get(begin..begin.checked_add(number(PAYLOAD_LENGTH)?)?)
}
