//! What a pool on a device-dax does. Needs one, `/dev/dax0.0`, whose bytes are lost:
//!
//!     bash pool/devices/build.sh
//!     cargo test -p trenv-pool --features device --test device --no-run
//!     cargo xtask vm run --dax nvdimm -- \
//!         env PATH=$PWD/target/x86_64-unknown-linux-gnu/debug:$PATH PROGRAM --test-threads=1

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FlockOperation, flock, major, minor};
use support::{page, read_all, store};
use trenv_devices::DaxMode;
use trenv_pool::{Backend, DaxError, PAGE_SIZE, Pool, PoolError, PoolOptions, Source};

const DEVICE: &str = "/dev/dax0.0";

/// A pool on the device, in place of the last test's.
fn fresh() -> (tempfile::TempDir, PathBuf, Pool) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pool");
    let pool = Pool::format_device(&path, Path::new(DEVICE), true).unwrap();
    (directory, path, pool)
}

/// Runs a program on the machine; its standard output.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_template_comes_back_as_it_was_stored() {
    let (_directory, path, pool) = fresh();
    let seeds: Vec<u32> = (0..3000).map(|seed| seed % 1000).collect();
    let info = store(&pool, "key", &seeds);
    assert_eq!((info.pages, info.stored_pages), (3000, 2997));
    drop(pool);

    let pool = Pool::open(&path).unwrap();
    assert_eq!(pool.backend(), Backend::Dax);
    assert!(pool.verify(|_, _| {}).unwrap().faults.is_empty());
    let reader = pool.template(&info.id, None).unwrap();
    let expected: Vec<u8> = seeds.iter().flat_map(|seed| page(*seed)).collect();
    assert_eq!(read_all(&reader), expected);
    assert!(reader.file().is_none());
}

#[test]
fn pages_lie_on_the_device_where_their_extents_say() {
    let (_directory, _, pool) = fresh();
    let info = store(&pool, "key", &[7, 8, 9]);
    let reader = pool.template(&info.id, None).unwrap();
    let Source::Data { offset } = reader.extents()[0].source else {
        panic!("{:?}", reader.extents());
    };
    // Another process's view of the device.
    let script = format!(
        "import mmap, os, sys\n\
         memory = mmap.mmap(os.open('{DEVICE}', os.O_RDWR), {}, mmap.MAP_SHARED)\n\
         sys.stdout.write(memory[{offset}:{offset} + 3 * {PAGE_SIZE}].hex())",
        pool.stat().unwrap().size,
    );
    let seen = run("python3", &["-c", &script]);
    let stored: Vec<u8> = [7, 8, 9].into_iter().flat_map(page).collect();
    let stored: String = stored.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(seen == stored);
}

#[test]
fn a_page_that_changed_on_the_device_is_found() {
    let (_directory, _, pool) = fresh();
    let info = store(&pool, "key", &[1, 2, 3]);
    let reader = pool.template(&info.id, None).unwrap();
    let Source::Data { offset } = reader.extents()[0].source else {
        panic!("{:?}", reader.extents());
    };
    let script = format!(
        "import mmap, os\n\
         memory = mmap.mmap(os.open('{DEVICE}', os.O_RDWR), {}, mmap.MAP_SHARED)\n\
         memory[{offset} + {PAGE_SIZE} + 5] ^= 1",
        pool.stat().unwrap().size,
    );
    run("python3", &["-c", &script]);
    let fault = reader.verify().unwrap_err();
    assert!(
        matches!(fault, PoolError::CorruptPage { page: 1, .. }),
        "{fault}"
    );
}

#[test]
fn space_is_free_again_after_a_template_is_removed_or_abandoned() {
    let (_directory, _, pool) = fresh();
    let free = pool.stat().unwrap().free_bytes;
    let info = store(&pool, "key", &[1, 2, 3, 4]);
    assert_eq!(pool.stat().unwrap().free_bytes, free - 4 * PAGE_SIZE as u64);
    assert!(pool.delete(&info.id).unwrap());
    let mut writer = pool.begin("abandoned").unwrap();
    writer.page(&page(5)).unwrap();
    drop(writer);
    assert_eq!(pool.stat().unwrap().free_bytes, free);
    let again = store(&pool, "key", &[6, 7]);
    assert_eq!(
        read_all(&pool.template(&again.id, None).unwrap()),
        [page(6), page(7)].concat()
    );
}

#[test]
fn a_device_with_a_pool_is_not_taken_for_another() {
    let (directory, path, pool) = fresh();
    let info = store(&pool, "key", &[1]);
    drop(pool);
    let other = directory.path().join("other");
    let refused = Pool::format_device(&other, Path::new(DEVICE), false).unwrap_err();
    assert!(refused.to_string().contains("--overwrite"), "{refused}");
    // Nothing was lost.
    let pool = Pool::open(&path).unwrap();
    assert_eq!(read_all(&pool.template(&info.id, None).unwrap()), page(1));
    drop(pool);

    Pool::format_device(&other, Path::new(DEVICE), true).unwrap();
    let refused = Pool::open(&path).unwrap_err();
    assert!(
        matches!(refused, PoolError::Device(DaxError::OtherPages { .. })),
        "{refused}"
    );
    Pool::destroy(&other).unwrap();
    fs::remove_dir_all(&path).unwrap();
    Pool::format_device(&path, Path::new(DEVICE), false).unwrap();
}

#[test]
fn a_device_in_use_is_busy() {
    let (directory, path, pool) = fresh();
    let other = directory.path().join("other");
    let refused = Pool::format_device(&other, Path::new(DEVICE), true).unwrap_err();
    let own = format!("process {}", std::process::id());
    assert!(refused.to_string().contains(&own), "{refused}");
    // Any number may have one pool open.
    drop(Pool::open(&path).unwrap());
    drop(pool);
    let device = fs::File::open(DEVICE).unwrap();
    flock(&device, FlockOperation::LockExclusive).unwrap();
    let refused = Pool::open(&path).unwrap_err();
    assert!(
        matches!(refused, PoolError::Device(DaxError::Busy { .. })),
        "{refused}"
    );
}

#[test]
fn what_daxctl_tells_is_what_is_read() {
    let told: serde_json::Value =
        serde_json::from_str(&run("daxctl", &["list", "-D", "-d", "dax0.0"])).unwrap();
    let found = trenv_devices::list().unwrap();
    let [device] = found.as_slice() else {
        panic!("{found:?}");
    };
    let told = told.get(0).unwrap_or(&told);
    assert_eq!(told["chardev"], device.name);
    assert_eq!(told["size"], device.size);
    assert_eq!(told["align"], device.align);
    assert_eq!(told["mode"], "devdax");
    assert_eq!(device.mode, DaxMode::Devdax);
    assert_eq!(told["target_node"].as_i64(), device.node.map(i64::from));
    assert_eq!(device.namespace.as_deref(), Some("namespace0.0"));
    let number = fs::metadata(DEVICE).unwrap().rdev();
    assert_eq!(device.number, Some((major(number), minor(number))));
}

/// Each fault is made, refused, and mended by the very command that the refusal names.
#[test]
fn advice_mends_what_it_is_about() {
    let directory = tempfile::tempdir().unwrap();
    let options = PoolOptions {
        backend: Backend::Dax,
        path: directory.path().join("pool"),
        size: 0,
        device: Some(DEVICE.into()),
    };
    for (make, expected) in [
        ("daxctl disable-device dax0.0", "is disabled"),
        (
            "daxctl reconfigure-device --mode=system-ram dax0.0",
            "in mode system-ram",
        ),
        ("ndctl disable-namespace namespace0.0", "There is no"),
        (
            "ndctl create-namespace -f -e namespace0.0 -m devdax -a 2M",
            "mapped by 2097152 bytes",
        ),
    ] {
        run("sh", &["-c", make]);
        let refused = options.format(true).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused}");
        let command = refused.split('`').nth(1).unwrap();
        run("sh", &["-c", command]);
        drop(options.format(true).unwrap());
        Pool::destroy(&options.path).unwrap();
    }
}
