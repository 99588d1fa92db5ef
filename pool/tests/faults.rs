//! Pools that are not what they should be.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use support::{page, store};
use trenv_pool::{Backend, Pool, PoolError, Source};

const SIZE: u64 = 8 << 20;

fn overwrite(path: &Path, bytes: &[u8], offset: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn command(pool: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trenv-pool"))
        .arg("--pool")
        .arg(pool)
        .args(arguments)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn a_wrong_pool_file_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        Pool::open(dir.path()),
        Err(PoolError::NotFound { .. })
    ));
    let formatted = Pool::format(dir.path(), Backend::File, 1 << 20);
    assert!(matches!(formatted, Err(PoolError::TooSmall { .. })));
    drop(Pool::format(dir.path(), Backend::File, SIZE).unwrap());
    let again = Pool::format(dir.path(), Backend::File, SIZE);
    assert!(matches!(again, Err(PoolError::AlreadyExists { .. })));

    let data = dir.path().join("pool.data");
    let mut superblock = vec![0; 4096];
    File::open(&data)
        .unwrap()
        .read_exact_at(&mut superblock, 0)
        .unwrap();

    overwrite(&data, b"SOMETHING", 0);
    assert!(matches!(
        Pool::open(dir.path()),
        Err(PoolError::BadMagic { .. })
    ));
    overwrite(&data, &superblock, 0);

    overwrite(&data, &7u32.to_le_bytes(), 8);
    let version = Pool::open(dir.path()).unwrap_err();
    assert!(
        matches!(version, PoolError::OtherVersion { found: 7, .. }),
        "{version}"
    );
    overwrite(&data, &superblock, 0);

    overwrite(&data, &[0xff], 33);
    assert!(matches!(
        Pool::open(dir.path()),
        Err(PoolError::BadSuperblock { .. })
    ));
    overwrite(&data, &superblock, 0);

    let file = OpenOptions::new().write(true).open(&data).unwrap();
    for length in [SIZE - 4096, 100, 0] {
        file.set_len(length).unwrap();
        assert!(matches!(
            Pool::open(dir.path()),
            Err(PoolError::Truncated { .. })
        ));
    }
    file.set_len(SIZE).unwrap();
    overwrite(&data, &superblock, 0);
    Pool::open(dir.path()).unwrap();
}

#[test]
fn a_catalogue_that_is_missing_foreign_or_garbage_is_refused_by_name() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let id = store(&pool, "key", &[1, 2, 3]).id;
    drop(pool);
    drop(Pool::format(other.path(), Backend::File, SIZE).unwrap());
    let catalogue = dir.path().join("catalogue.redb");
    let sound = std::fs::read(&catalogue).unwrap();

    std::fs::remove_file(&catalogue).unwrap();
    assert!(matches!(
        Pool::open(dir.path()),
        Err(PoolError::CatalogueMissing { .. })
    ));
    std::fs::copy(other.path().join("catalogue.redb"), &catalogue).unwrap();
    assert!(matches!(
        Pool::open(dir.path()),
        Err(PoolError::ForeignCatalogue { .. })
    ));
    std::fs::write(&catalogue, vec![0x5a; 10_000]).unwrap();
    assert!(matches!(
        Pool::open(dir.path()),
        Err(PoolError::Catalogue { .. })
    ));
    std::fs::write(&catalogue, &sound[..sound.len() / 2]).unwrap();
    assert!(Pool::open(dir.path()).is_err());

    // Wherever a stretch of it is overwritten: an error or sound data, never anything else.
    for at in (0..sound.len()).step_by(sound.len() / 150) {
        let mut damaged = sound.clone();
        let end = (at + 64).min(damaged.len());
        damaged[at..end].fill(0xa5);
        std::fs::write(&catalogue, &damaged).unwrap();
        let Ok(pool) = Pool::open(dir.path()) else {
            continue;
        };
        let Ok(infos) = pool.list() else { continue };
        for info in infos {
            assert_eq!(info.key, "key");
            if let Ok(reader) = pool.template(&info.id, None) {
                assert_eq!(reader.manifest(), b"key");
            }
        }
        // Nor does a check or a deletion do worse than fail.
        let _ = pool.verify(|_, _| {});
        let _ = pool.delete(&id);
    }
}

#[test]
fn a_pool_made_anew_in_the_same_place_is_not_mistaken_for_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let old = Pool::format(&path, Backend::File, SIZE).unwrap();
    let info = store(&old, "key", &[1, 2, 3]);
    Pool::destroy(&path).unwrap();
    let new = Pool::format(&path, Backend::File, SIZE).unwrap();
    store(&new, "key", &[4, 5, 6]);
    for failed in [old.list().unwrap_err(), old.delete(&info.id).unwrap_err()] {
        assert!(
            matches!(failed, PoolError::ForeignCatalogue { .. }),
            "{failed}"
        );
    }
    assert!(matches!(
        old.begin("key"),
        Err(PoolError::ForeignCatalogue { .. })
    ));
    assert_eq!(new.list().unwrap().len(), 1);
}

#[test]
fn verify_finds_changed_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let sound = store(&pool, "sound", &[1, 2, 3]);
    let broken = store(&pool, "broken", &[4, 0, 5, 6]);
    let reader = pool.template(&broken.id, None).unwrap();
    let Source::Data { offset } = reader.extents()[2].source else {
        panic!("{:?}", reader.extents());
    };
    overwrite(&dir.path().join("pool.data"), &[1], offset + 4096 + 77);

    let found = reader.verify().unwrap_err();
    assert!(
        matches!(found, PoolError::CorruptPage { page: 3, offset: at, .. } if at == offset + 4096),
        "{found}"
    );
    let mut bytes = vec![0; 4096];
    reader.read_pages(2, &mut bytes).unwrap();
    assert_eq!(bytes, page(5));
    assert!(reader.read_pages(3, &mut bytes).is_err());
    drop(reader);

    let verified = command(dir.path(), &["verify"]);
    assert_eq!(verified.status.code(), Some(1));
    let text = String::from_utf8(verified.stdout).unwrap();
    assert!(
        text.contains("Page 3 of template") && text.contains("1 fault"),
        "{text}"
    );
    stdout(&command(dir.path(), &["rm", &broken.id.to_string()[..10]]));
    stdout(&command(dir.path(), &["verify"]));
    assert_eq!(pool.list().unwrap(), [sound]);
}

#[test]
fn the_command_formats_lists_shows_and_removes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    stdout(&command(
        &path,
        &["format", "--backend", "file", "--size", "16M"],
    ));
    let again = command(&path, &["format", "--size", "16M"]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("already holds a pool"));
    let pool = Pool::open(&path).unwrap();
    let info = store(&pool, "the key", &[1, 0, 2]);

    let stat = stdout(&command(&path, &["stat", "--json"]));
    let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    assert_eq!(stat["templates"], 1);
    assert_eq!(stat["logical_bytes"], 3 * 4096);
    assert_eq!(stat["stored_bytes"], 2 * 4096);
    assert_eq!(stat["size"], 16 << 20);
    let list = stdout(&command(&path, &["ls"]));
    assert!(
        list.contains("the key") && list.contains("12.0 KiB"),
        "{list}"
    );
    let list = stdout(&command(&path, &["--json", "ls"]));
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list[0]["id"], info.id.to_string());
    let show = stdout(&command(
        &path,
        &["show", &info.id.to_string()[..6], "--json"],
    ));
    let show: serde_json::Value = serde_json::from_str(&show).unwrap();
    assert_eq!(show["extents"].as_array().unwrap().len(), 3);
    assert_eq!(show["extents"][1]["source"], "Zero");
    let id = info.id.to_string();
    assert_eq!(
        stdout(&command(&path, &["show", &id, "--manifest"])),
        "the key"
    );
    assert!(!command(&path, &["show", "ffff"]).status.success());

    stdout(&command(&path, &["rm", &id]));
    assert!(pool.list().unwrap().is_empty());
    drop(pool);
    assert!(!command(&path, &["destroy"]).status.success());
    stdout(&command(&path, &["destroy", "--yes"]));
    assert!(!path.exists());
}

/// Needs root, for a small file system of its own; says so where it cannot run.
#[test]
fn a_full_disk_says_what_was_needed_and_what_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "trenv-test"])
        .arg(dir.path())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: mounting a small file system needs root");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let pool = Pool::format(&dir.path().join("pool"), Backend::File, 64 << 20).unwrap();
        let kept = store(&pool, "kept", &(1..100).collect::<Vec<_>>());
        let mut writer = pool.begin("large").unwrap();
        let refused = (1..)
            .find_map(|seed| writer.page(&page(seed)).err())
            .unwrap();
        let PoolError::DiskFull { needed, .. } = refused else {
            panic!("{refused}");
        };
        assert!(needed > 1 << 20 && needed < 5 << 20, "{needed}");
        assert!(refused.to_string().contains("trenv-pool rm"), "{refused}");
        drop(writer);
        pool.template(&kept.id, None).unwrap().verify().unwrap();
        store(&pool, "small", &(1..100).collect::<Vec<_>>());
        assert_eq!(pool.verify(|_, _| {}).unwrap().faults.len(), 0);
    });
    let unmounted = Command::new("umount").arg(dir.path()).status().unwrap();
    assert!(unmounted.success());
    result.unwrap();
}
