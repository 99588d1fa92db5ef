//! What one process can do with a pool.

mod support;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use support::{page, read_all, store, store_beside};
use trenv_pool::{Backend, Extent, PAGE_SIZE, Pool, PoolError, Source, TemplateId, TemplateInfo};

const SIZE: u64 = 8 << 20;

#[test]
fn a_template_comes_back_as_it_was_stored() {
    for backend in [Backend::File, Backend::Memfd] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool");
        let pool = Pool::format(&path, backend, SIZE).unwrap();
        let mut writer = pool.begin("key").unwrap();
        for seed in [1, 0, 0, 2, 3, 0] {
            writer.page(&page(seed)).unwrap();
        }
        writer.zero_pages(2);
        let info = writer.commit(b"manifest").unwrap();
        assert_eq!((info.pages, info.stored_pages), (8, 3));
        assert_eq!(info.id, TemplateId::of("key"));
        drop(pool);

        let pool = Pool::open(&path).unwrap();
        assert_eq!(pool.list().unwrap(), std::slice::from_ref(&info));
        let reader = pool.template(&info.id, None).unwrap();
        assert_eq!(reader.manifest(), b"manifest");
        reader.verify().unwrap();
        let expected: Vec<u8> = [1, 0, 0, 2, 3, 0, 0, 0]
            .into_iter()
            .flat_map(page)
            .collect();
        assert_eq!(read_all(&reader), expected);
        let shape: Vec<(u64, u64, bool)> = reader
            .extents()
            .iter()
            .map(|e| (e.first_page, e.pages, e.source == Source::Zero))
            .collect();
        assert_eq!(
            shape,
            [(0, 1, false), (1, 2, true), (3, 2, false), (5, 3, true)]
        );
        let mut middle = vec![0; 2 * PAGE_SIZE];
        reader.read_pages(2, &mut middle).unwrap();
        assert_eq!(middle, [page(0), page(2)].concat());
        drop(reader);
        Pool::destroy(&path).unwrap();
        assert!(!path.exists());
    }
}

#[test]
fn data_lies_at_page_aligned_offsets_of_the_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let info = store(&pool, "key", &[7, 8, 9]);
    let reader = pool.template(&info.id, None).unwrap();
    let [
        Extent {
            source: Source::Data { offset },
            ..
        },
    ] = reader.extents()
    else {
        panic!("{:?}", reader.extents());
    };
    assert_eq!(offset % PAGE_SIZE as u64, 0);
    let mut first = vec![0; PAGE_SIZE];
    rustix::io::pread(reader.file().unwrap(), &mut first, *offset).unwrap();
    assert_eq!(first, page(7));
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let before = pool.stat().unwrap();
    let mut writer = pool.begin("key").unwrap();
    for seed in 1..600 {
        writer.page(&page(seed)).unwrap();
    }
    drop(writer);
    assert_eq!(pool.stat().unwrap(), before);
    let id = TemplateId::of("key");
    assert!(matches!(
        pool.template(&id, None),
        Err(PoolError::NoSuchTemplate { .. })
    ));
}

#[test]
fn a_key_committed_again_is_a_new_generation_and_readers_keep_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let free = pool.stat().unwrap().free_bytes;
    let old = store(&pool, "key", &[1, 2, 3]);
    let reader = pool.template(&old.id, None).unwrap();
    let new = store(&pool, "key", &[4, 5]);
    assert!(new.generation > old.generation);
    assert_eq!(pool.list().unwrap(), std::slice::from_ref(&new));
    assert_eq!(pool.stat().unwrap().superseded, 1);

    store(&pool, "other", &[6; 40]);
    assert_eq!(read_all(&reader), [page(1), page(2), page(3)].concat());
    reader.verify().unwrap();
    drop(reader);

    // The next writer finds the old generation unused.
    drop(pool.begin("third").unwrap());
    assert_eq!(pool.stat().unwrap().superseded, 0);
    let gone = pool.template(&old.id, Some(old.generation));
    assert!(matches!(gone, Err(PoolError::NoSuchGeneration { .. })));
    assert_eq!(pool.template(&new.id, None).unwrap().info(), &new);
    let page = PAGE_SIZE as u64;
    assert_eq!(pool.stat().unwrap().free_bytes, free - 42 * page);
}

#[test]
fn deleting_frees_the_pages_and_waits_for_readers() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let free = pool.stat().unwrap().free_bytes;
    let info = store(&pool, "key", &[1, 2, 3]);
    let reader = pool.template(&info.id, None).unwrap();
    let refused = pool
        .delete_within(&info.id, Duration::from_millis(30))
        .unwrap_err();
    let own = format!("process {}", std::process::id());
    assert!(
        matches!(&refused, PoolError::InUse { holders, .. } if *holders == own),
        "{refused}"
    );
    reader.verify().unwrap();

    let deleting = {
        let pool = pool.clone();
        std::thread::spawn(move || pool.delete(&info.id))
    };
    std::thread::sleep(Duration::from_millis(50));
    drop(reader);
    assert!(deleting.join().unwrap().unwrap());
    assert!(!pool.delete(&info.id).unwrap());
    assert_eq!(pool.stat().unwrap().free_bytes, free);
    assert!(pool.list().unwrap().is_empty());
}

#[test]
fn pages_of_another_template_are_stored_once_and_stay_with_the_last_that_has_them() {
    for backend in [Backend::File, Backend::Memfd] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool");
        let pool = Pool::format(&path, backend, SIZE).unwrap();
        let empty = pool.stat().unwrap().free_bytes;
        let base = store(&pool, "base", &[1, 2, 3, 0, 4]);
        // Equal ones, one of them elsewhere and twice, and others.
        let seeds = [[1, 2, 9, 0, 4, 2], [1, 2, 3, 4, 8, 0]];
        let children: Vec<_> = std::iter::zip(["one", "two"], &seeds)
            .map(|(key, seeds)| store_beside(&pool, key, seeds, &base))
            .collect();
        assert_eq!((children[0].pages, children[0].stored_pages), (6, 5));
        let page_size = PAGE_SIZE as u64;
        let stat = pool.stat().unwrap();
        assert_eq!(empty - stat.free_bytes, 6 * page_size);
        assert_eq!(stat.stored_bytes, 6 * page_size);
        assert_eq!(stat.shared_bytes, 8 * page_size);
        let own: Vec<u64> = pool
            .usage()
            .unwrap()
            .iter()
            .map(|usage| usage.unshared_bytes / page_size)
            .collect();
        assert_eq!(own, [0, 1, 1]);
        let sound = |pool: &Pool, info: &TemplateInfo, seeds: &[u32]| {
            let reader = pool.template(&info.id, None).unwrap();
            let expected: Vec<u8> = seeds.iter().flat_map(|seed| page(*seed)).collect();
            assert!(read_all(&reader) == expected, "{}", info.key);
        };
        assert!(pool.verify(|_, _| {}).unwrap().faults.is_empty());

        // In any order, and whatever is stored in what it leaves.
        assert!(pool.delete(&base.id).unwrap());
        drop(pool);
        let pool = Pool::open(&path).unwrap();
        let other = store(&pool, "other", &[20; 12]);
        for (info, seeds) in std::iter::zip(&children, &seeds) {
            sound(&pool, info, seeds);
        }
        assert!(pool.delete(&children[0].id).unwrap());
        let again = store(&pool, "again", &[21; 12]);
        sound(&pool, &children[1], &seeds[1]);
        assert!(pool.verify(|_, _| {}).unwrap().faults.is_empty());
        for info in [&children[1], &other, &again] {
            assert!(pool.delete(&info.id).unwrap());
        }
        assert_eq!(pool.stat().unwrap().free_bytes, empty);
        drop(pool);
        Pool::destroy(&path).unwrap();
    }
}

#[test]
fn a_template_made_again_beside_itself_keeps_its_pages() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let mut info = store(&pool, "key", &[1, 2, 3]);
    for seed in 4..9 {
        info = store_beside(&pool, "key", &[1, 2, seed], &info);
        store(&pool, &format!("other {seed}"), &[seed + 10; 3]);
        let reader = pool.template(&info.id, None).unwrap();
        assert!(read_all(&reader) == [page(1), page(2), page(seed)].concat());
    }
    let stat = pool.stat().unwrap();
    assert_eq!((stat.superseded, stat.shared_bytes), (0, 0));
    assert_eq!(stat.stored_bytes, 18 * PAGE_SIZE as u64);
}

#[test]
fn a_damaged_page_is_not_shared_and_nor_is_another_pool_s() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    let base = store(&pool, "base", &[1, 2, 3]);
    let Source::Data { offset } = pool.template(&base.id, None).unwrap().extents()[0].source else {
        panic!("The first page is stored");
    };
    let data = std::fs::File::options()
        .write(true)
        .open(dir.path().join("pool.data"))
        .unwrap();
    data.write_all_at(&[0xff], offset + PAGE_SIZE as u64 + 5)
        .unwrap();
    let child = store_beside(&pool, "child", &[1, 2, 3], &base);
    let reader = pool.template(&child.id, None).unwrap();
    reader.verify().unwrap();
    assert_eq!(pool.stat().unwrap().shared_bytes, 2 * PAGE_SIZE as u64);

    let other = Pool::format(elsewhere.path(), Backend::File, SIZE).unwrap();
    let mut writer = other.begin("child").unwrap();
    let refused = writer.share_with(reader).unwrap_err();
    assert!(matches!(refused, PoolError::OtherPool { .. }), "{refused}");
}

#[test]
fn a_full_pool_says_what_was_needed_and_what_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, 3 << 20).unwrap();
    let stored = store(&pool, "small", &(1..=100).collect::<Vec<_>>());
    let mut writer = pool.begin("large").unwrap();
    let refused = (1..)
        .find_map(|seed| writer.page(&page(seed)).err())
        .unwrap();
    let PoolError::Full { needed, free, .. } = refused else {
        panic!("{refused}");
    };
    assert_eq!((needed, free), (157 * 4096, 156 * 4096));
    let text = refused.to_string();
    assert!(
        text.contains("trenv-pool rm") && text.contains("638976"),
        "{text}"
    );
    drop(writer);

    let mut writer = pool.begin("large").unwrap();
    let early = writer.expect_pages(200).unwrap_err();
    assert!(
        matches!(
            early,
            PoolError::Full {
                needed: 819_200,
                ..
            }
        ),
        "{early}"
    );
    writer.expect_pages(156).unwrap();
    drop(writer);
    pool.template(&stored.id, None).unwrap().verify().unwrap();

    pool.delete(&stored.id).unwrap();
    let all = store(&pool, "large", &(1..=256).collect::<Vec<_>>());
    pool.template(&all.id, None).unwrap().verify().unwrap();
    assert_eq!(pool.stat().unwrap().free_bytes, 0);
}

#[test]
fn freed_gaps_are_used_again_by_a_template_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, 3 << 20).unwrap();
    let seeds: Vec<u32> = (1..=32).collect();
    let infos: Vec<_> = (0..8)
        .map(|i| store(&pool, &format!("t{i}"), &seeds))
        .collect();
    for info in infos.iter().step_by(2) {
        pool.delete(&info.id).unwrap();
    }
    let many: Vec<u32> = (1000..1128).collect();
    let info = store(&pool, "pieces", &many);
    let reader = pool.template(&info.id, None).unwrap();
    assert_eq!(reader.extents().len(), 4);
    assert_eq!(
        read_all(&reader),
        many.iter().flat_map(|s| page(*s)).collect::<Vec<_>>()
    );
    for info in infos.iter().skip(1).step_by(2) {
        pool.template(&info.id, None).unwrap().verify().unwrap();
    }
}

#[test]
fn only_whole_pages_inside_the_template_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::File, SIZE).unwrap();
    assert!(matches!(
        pool.begin("key").unwrap().page(&[1; 100]),
        Err(PoolError::PageLength { found: 100 })
    ));
    let info = store(&pool, "key", &[1, 2]);
    let reader = pool.template(&info.id, None).unwrap();
    let mut pages = vec![0; 2 * PAGE_SIZE];
    assert!(matches!(
        reader.read_pages(1, &mut pages),
        Err(PoolError::PageRange { .. })
    ));
    assert!(matches!(
        reader.read_pages(u64::MAX, &mut pages),
        Err(PoolError::PageRange { .. })
    ));
    assert!(matches!(
        reader.read_pages(0, &mut pages[..100]),
        Err(PoolError::PageLength { .. })
    ));
}

#[test]
fn memory_that_is_gone_after_a_reboot_means_an_empty_pool() {
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::format(dir.path(), Backend::Memfd, SIZE).unwrap();
    let old = store(&pool, "key", &[1, 2, 3]);
    let memory = format!("/dev/shm/trenv-pool-{}", pool.stat().unwrap().uuid);
    drop(pool);
    std::fs::remove_file(&memory).unwrap();

    let pool = Pool::open(dir.path()).unwrap();
    assert!(pool.list().unwrap().is_empty());
    let new = store(&pool, "key", &[1, 2, 3]);
    assert!(new.generation > old.generation);
    pool.template(&new.id, None).unwrap().verify().unwrap();
    drop(pool);
    Pool::destroy(dir.path()).unwrap();
    assert!(!std::path::Path::new(&memory).exists());
}
