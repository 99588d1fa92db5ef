//! Records and superblocks as somebody hostile would write them, with checksums that fit.

use std::path::Path;

use uuid::Uuid;

use crate::PAGE_SIZE;
use crate::backend::Backend;
use crate::record::Record;
use crate::superblock::Superblock;
use crate::template::{Extent, Source, TemplateId, TemplateInfo};

const INPUTS: u64 = 100_000;

fn corpus(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name)
}

/// Keeps a seed in the corpus when asked to.
fn keep(name: &str, seed: &[u8]) {
    if std::env::var_os("TRENV_WRITE_CORPUS").is_some() {
        std::fs::write(corpus(name).join("sound"), seed).unwrap();
    }
}

#[test]
fn no_record_brings_reading_down() {
    let id = TemplateId::of("key");
    let extent = |first_page, pages, source| Extent {
        first_page,
        pages,
        source,
    };
    let record = Record {
        info: TemplateInfo {
            id,
            generation: 3,
            key: "key".to_owned(),
            pages: 9,
            stored_pages: 4,
            manifest_bytes: 100,
            created: 1,
        },
        extents: vec![
            extent(0, 4, Source::Data { offset: 2 << 20 }),
            extent(4, 5, Source::Zero),
        ],
        manifest_sum: [1; 32],
        page_sums_sum: [2; 32],
    };
    let mut seed = record.encode().unwrap();
    seed.truncate(seed.len() - 32);
    keep("record", &seed);
    let mut read = 0;
    trenv_fuzz::run(&corpus("record"), &[seed], INPUTS, |body| {
        let mut bytes = body.to_vec();
        bytes.extend_from_slice(blake3::hash(body).as_bytes());
        if let Ok(record) = Record::decode(id, 3, &bytes) {
            read += 1;
            let end = record.extents.last().map_or(0, |e| e.first_page + e.pages);
            assert_eq!(end, record.info.pages);
        }
    });
    assert!(read > 100, "only {read} inputs could be read");
}

#[test]
fn no_superblock_brings_reading_down() {
    let sound = Superblock {
        backend: Backend::File,
        uuid: Uuid::nil(),
        size: 1 << 30,
        created: 1,
    };
    // What follows is zeros and the checksum.
    let seed = sound.encode()[..64].to_vec();
    keep("superblock", &seed);
    let path = Path::new("pool.data");
    let mut read = 0;
    trenv_fuzz::run(&corpus("superblock"), &[seed], INPUTS, |head| {
        let mut block = [0; PAGE_SIZE];
        let length = head.len().min(PAGE_SIZE - 32);
        block[..length].copy_from_slice(&head[..length]);
        let sum = blake3::hash(&block[..PAGE_SIZE - 32]);
        block[PAGE_SIZE - 32..].copy_from_slice(sum.as_bytes());
        if let Ok(superblock) = Superblock::decode(&block, path) {
            read += 1;
            assert!(superblock.size >= crate::DATA_OFFSET);
        }
    });
    assert!(read > 100, "only {read} inputs could be read");
}
