//! Builds the free-standing restorer, flattened into the image that zygotes map, and the loader.

use std::path::{Path, PathBuf};
use std::process::Command;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo:rerun-if-changed=restorer/src");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let restorer = compile("restorer", "restorer/src/blob.rs", &out)?;
    let (image, entry) = flatten(&std::fs::read(restorer)?)?;
    std::fs::write(out.join("restorer.image"), image)?;
    std::fs::write(out.join("restorer.entry"), entry.to_string())?;
    let loader = compile("loader", "restorer/src/loader.rs", &out)?;
    // Refused if the kernel alone could not start it.
    flatten(&std::fs::read(loader)?)?;
    Ok(())
}

/// Compiles a program that needs neither a C library nor relocation.
fn compile(name: &str, source: &str, out: &Path) -> Result<PathBuf, Failure> {
    let elf = out.join(format!("{name}.elf"));
    let status = Command::new(std::env::var("RUSTC")?)
        .args(["--edition=2024", "--crate-type=bin", "-Adead_code"])
        .args(["--crate-name", name])
        .args(["--target", &std::env::var("TARGET")?])
        .args([
            "-Cpanic=abort",
            "-Copt-level=2",
            "-Cdebug-assertions=off",
            "-Coverflow-checks=off",
        ])
        .args([
            "-Crelocation-model=pic",
            "-Ctarget-feature=+crt-static",
            "-Cstrip=symbols",
        ])
        .args([
            "-Clink-arg=-nostartfiles",
            "-Clink-arg=-nostdlib",
            "-Clink-arg=-Wl,--gc-sections",
        ])
        .arg("-o")
        .arg(&elf)
        .arg(Path::new(source))
        .status()?;
    if !status.success() {
        return Err(
            format!("The {name} does not compile ({status}); see the messages above").into(),
        );
    }
    Ok(elf)
}

/// Lays the loadable segments out as they lie in memory (elf(5)).
fn flatten(elf: &[u8]) -> Result<(Vec<u8>, u64), Failure> {
    const LOAD: u32 = 1;
    const DYNAMIC: u32 = 2;
    let entry = word(elf, 24)?;
    let (table, size, count) = (word(elf, 32)?, half(elf, 54)?, half(elf, 56)?);
    let mut image = Vec::new();
    for index in 0..count {
        let at = (table + index * size) as usize;
        let kind = word(elf, at)? as u32;
        let (offset, address, length) =
            (word(elf, at + 8)?, word(elf, at + 16)?, word(elf, at + 32)?);
        let bytes = elf
            .get(offset as usize..(offset + length) as usize)
            .ok_or("cut short")?;
        if kind == LOAD {
            let end = (address + length) as usize;
            image.resize(image.len().max(end), 0);
            image[address as usize..end].copy_from_slice(bytes);
        }
        if kind == DYNAMIC {
            // The image is mapped wherever a hole is, without a loader: DT_RELA (7) must not occur.
            for entry in bytes.chunks_exact(16) {
                if word(entry, 0)? == 7 {
                    return Err(
                        "The restorer needs relocations; keep tables of pointers out of it".into(),
                    );
                }
            }
        }
    }
    Ok((image, entry))
}

fn word(bytes: &[u8], at: usize) -> Result<u64, Failure> {
    Ok(u64::from_le_bytes(
        bytes.get(at..at + 8).ok_or("cut short")?.try_into()?,
    ))
}

fn half(bytes: &[u8], at: usize) -> Result<u64, Failure> {
    Ok(u64::from(u16::from_le_bytes(
        bytes.get(at..at + 2).ok_or("cut short")?.try_into()?,
    )))
}
