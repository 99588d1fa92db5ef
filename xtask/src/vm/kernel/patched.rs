//! Debian's source of 6.1 with the patches of `kernel-patch/series`, built with all built in that
//! VMs need. The cache knows it by what goes into it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, bail};

use super::{Image, cached, packages};

const PACKAGE: &str = "linux-source-6.1";
/// Where the driver goes in the kernel's tree; a patch of the series has it built.
const DRIVER: &str = "drivers/misc/pseudo_mm";
/// Settings beside the kernel's own for x86, and those that `debug` adds.
const CONFIG: &str = "vm.config";
const DEBUG_CONFIG: &str = "debug.config";
/// QEMU starts the kernel at xen_prepare_pvh(), before KASAN has its shadow memory; the kernel's
/// Makefiles have this file checked all the same (arch/x86/platform/pvh), and memcmp() that it calls.
const NOT_SANITIZED: [&str; 2] = ["KASAN_SANITIZE_enlighten.o=n", "KASAN_SANITIZE_string.o=n"];

/// What goes into a kernel, from `kernel-patch`.
#[derive(Debug)]
struct Inputs {
    configs: Vec<PathBuf>,
    patches: Vec<PathBuf>,
    /// Files of the driver, which counts once there are patches; where they are, and their places in
    /// the driver's folder.
    driver: Vec<(PathBuf, PathBuf)>,
}

pub fn image(debug: bool) -> anyhow::Result<Image> {
    let workspace = crate::metadata::Metadata::read()?.workspace_root;
    let inputs = Inputs::read(&workspace.join("kernel-patch"), debug)?;
    let version = packages::version(PACKAGE)?;
    let name = format!(
        "{}-{version}-{}",
        if debug { "debug" } else { "patched" },
        inputs.key(&version)?
    );
    let folder = cached(&name, |folder| build(&inputs, folder))?;
    let modules = folder.join("lib/modules");
    let release = fs::read_dir(&modules)
        .and_then(|mut entries| entries.next().transpose())
        .with_context(|| format!("Failed to list {}", modules.display()))?
        .with_context(|| format!("{} is empty; remove {name}", modules.display()))?;
    Ok(Image {
        vmlinux: folder.join("vmlinux"),
        modules: release.path(),
    })
}

impl Inputs {
    fn read(folder: &Path, debug: bool) -> anyhow::Result<Self> {
        let mut configs = vec![folder.join("config").join(CONFIG)];
        if debug {
            configs.push(folder.join("config").join(DEBUG_CONFIG));
        }
        let series = folder.join("series");
        let patches: Vec<PathBuf> = fs::read_to_string(&series)
            .with_context(|| format!("Failed to read {}", series.display()))?
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| folder.join(line))
            .collect();
        let driver = if patches.is_empty() {
            Vec::new()
        } else {
            driver(&folder.join("driver"))?
        };
        Ok(Self {
            configs,
            patches,
            driver,
        })
    }

    /// Changes when anything that goes in does.
    fn key(&self, version: &str) -> anyhow::Result<String> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&bytes.len().to_le_bytes());
            hasher.update(bytes);
        };
        add(version.as_bytes());
        let driver = self.driver.iter().map(|(from, _)| from);
        for file in self.configs.iter().chain(&self.patches).chain(driver) {
            add(file.file_name().unwrap_or_default().as_encoded_bytes());
            let contents =
                fs::read(file).with_context(|| format!("Failed to read {}", file.display()))?;
            add(&contents);
        }
        Ok(hasher.finalize().to_hex()[..16].to_owned())
    }
}

/// The driver's files by their places below `folder`. What building the module leaves beside its
/// sources is not source.
fn driver(folder: &Path) -> anyhow::Result<Vec<(PathBuf, PathBuf)>> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(place) = folders.pop() {
        let listed = folder.join(&place);
        let context = || format!("Failed to list {}", listed.display());
        for entry in fs::read_dir(&listed).with_context(context)? {
            let entry = entry.with_context(context)?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            let source = [".c", ".h"].iter().any(|end| text.ends_with(end))
                || ["Kbuild", "Kconfig"].contains(&text.as_ref());
            if entry.file_type().with_context(context)?.is_dir() {
                folders.push(place.join(&name));
            } else if source && !text.ends_with(".mod.c") {
                files.push((entry.path(), place.join(&name)));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn build(inputs: &Inputs, folder: &Path) -> anyhow::Result<()> {
    packages::unpack(&[PACKAGE], folder)?;
    let archive = folder.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
    let tree = folder.join("tree");
    fs::create_dir(&tree).with_context(|| format!("Failed to make {}", tree.display()))?;
    succeed(
        Command::new("tar")
            .args(["--extract", "--strip-components=1", "--directory"])
            .arg(&tree)
            .arg("--file")
            .arg(&archive),
    )?;
    fs::remove_dir_all(folder.join("usr")).context("Failed to remove the source's archive")?;

    if !inputs.driver.is_empty() {
        let place = tree.join(DRIVER);
        for (from, to) in &inputs.driver {
            let to = place.join(to);
            let context = || format!("Failed to copy {} to {}", from.display(), to.display());
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).with_context(context)?;
            }
            fs::copy(from, &to).with_context(context)?;
        }
    }
    for patch in &inputs.patches {
        eprintln!("== applying {}", patch.display());
        let text =
            File::open(patch).with_context(|| format!("Failed to open {}", patch.display()))?;
        succeed(
            Command::new("patch")
                .args(["-p1", "--fuzz=0", "--no-backup-if-mismatch"])
                .current_dir(&tree)
                .stdin(text),
        )?;
    }

    succeed(&mut make(&tree, &["defconfig"]))?;
    succeed(
        Command::new("scripts/kconfig/merge_config.sh")
            .args(["-m", ".config"])
            .args(&inputs.configs)
            .current_dir(&tree),
    )?;
    succeed(&mut make(&tree, &["olddefconfig"]))?;
    check_config(&tree.join(".config"), &inputs.configs)?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    eprintln!("== building, which takes a quarter of an hour on two processors");
    let jobs = format!("-j{processors}");
    let targets = [NOT_SANITIZED.as_slice(), &[&jobs, "vmlinux"]].concat();
    succeed(&mut make(&tree, &targets))?;

    let release = fs::read_to_string(tree.join("include/config/kernel.release"))
        .context("Failed to read the kernel's release")?;
    let modules = folder.join("lib/modules").join(release.trim());
    fs::create_dir_all(&modules)
        .with_context(|| format!("Failed to make {}", modules.display()))?;
    for (from, to) in [
        ("vmlinux", folder.join("vmlinux")),
        ("System.map", folder.join("System.map")),
        (".config", folder.join("config")),
        ("modules.builtin", modules.join("modules.builtin")),
        (
            "modules.builtin.modinfo",
            modules.join("modules.builtin.modinfo"),
        ),
    ] {
        fs::copy(tree.join(from), to).with_context(|| format!("Failed to keep {from}"))?;
    }
    // It has none of its own.
    fs::write(modules.join("modules.order"), "").context("Failed to write modules.order")?;
    super::depmod(folder, release.trim())?;
    // Gigabytes that nobody needs afterwards.
    fs::remove_dir_all(&tree).with_context(|| format!("Failed to remove {}", tree.display()))
}

fn make(tree: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("nice");
    command
        .args(["make", "--silent", "-C"])
        .arg(tree)
        .args(arguments);
    // The key says what the kernel is; when and where it was built does not matter.
    for (name, value) in [
        ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
        ("KBUILD_BUILD_USER", "trenv"),
        ("KBUILD_BUILD_HOST", "trenv"),
    ] {
        command.env(name, value);
    }
    command
}

/// Runs a command with its output on standard error: standard output is for the kernel's path.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("Failed to run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

/// A setting whose own needs are not met is dropped without a word.
fn check_config(config: &Path, fragments: &[PathBuf]) -> anyhow::Result<()> {
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("Failed to read {}", path.display()))
    };
    let made = read(config)?;
    let made: Vec<&str> = made.lines().collect();
    let mut missing = Vec::new();
    for fragment in fragments {
        let text = read(fragment)?;
        let wanted = text.lines().filter(|line| line.starts_with("CONFIG_"));
        missing.extend(
            wanted
                .filter(|line| !made.contains(line))
                .map(str::to_owned),
        );
    }
    if !missing.is_empty() {
        bail!(
            "The kernel's configuration does not accept {}; see what they depend on",
            missing.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_changes_with_what_goes_in() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let key = |debug, version: &str| {
            Inputs::read(folder.path(), debug)
                .unwrap()
                .key(version)
                .unwrap()
        };
        write("config/vm.config", "CONFIG_PVH=y\n");
        write("config/debug.config", "CONFIG_KASAN=y\n");
        write("series", "# none\n");
        write("driver/a.c", "one");

        let first = key(false, "1");
        assert_eq!(first, key(false, "1"));
        assert_ne!(first, key(false, "2"));
        assert_ne!(first, key(true, "1"));
        write("driver/a.c", "without a series no kernel has the driver");
        assert_eq!(first, key(false, "1"));

        write("series", "patches/one.patch\n");
        write("patches/one.patch", "a");
        let patched = key(false, "1");
        assert_ne!(first, patched);
        write("patches/one.patch", "b");
        assert_ne!(patched, key(false, "1"));
        let patched = key(false, "1");
        write("driver/a.c", "two");
        assert_ne!(patched, key(false, "1"));
        let patched = key(false, "1");
        write("driver/a.mod.c", "made by a build");
        assert_eq!(patched, key(false, "1"));
    }

    #[test]
    fn a_setting_that_was_dropped_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (config, fragment) = (
            folder.path().join(".config"),
            folder.path().join("vm.config"),
        );
        fs::write(&config, "CONFIG_PVH=y\n# CONFIG_DEV_DAX is not set\n").unwrap();
        fs::write(&fragment, "CONFIG_PVH=y\n").unwrap();
        check_config(&config, std::slice::from_ref(&fragment)).unwrap();
        fs::write(&fragment, "CONFIG_PVH=y\nCONFIG_DEV_DAX=y\n").unwrap();
        let err = check_config(&config, &[fragment]).unwrap_err().to_string();
        assert!(
            err.contains("CONFIG_DEV_DAX=y") && !err.contains("PVH"),
            "{err}"
        );
    }
}
