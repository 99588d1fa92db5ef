//! Pages and templates for the tests.
#![allow(dead_code, clippy::unwrap_used)]

use trenv_pool::{PAGE_SIZE, Pool, TemplateInfo, TemplateReader, TemplateWriter};

/// A page whose every word depends on its seed; zeros for seed 0.
pub fn page(seed: u32) -> Vec<u8> {
    let words = (0..PAGE_SIZE as u32 / 4).map(|i| if seed == 0 { 0 } else { seed * 4096 + i });
    words.flat_map(u32::to_le_bytes).collect()
}

pub fn store(pool: &Pool, key: &str, seeds: &[u32]) -> TemplateInfo {
    fill(pool.begin(key).unwrap(), key, seeds)
}

/// [`store`], without the pages that `base` has.
pub fn store_beside(pool: &Pool, key: &str, seeds: &[u32], base: &TemplateInfo) -> TemplateInfo {
    let mut writer = pool.begin(key).unwrap();
    let base = pool.template(&base.id, Some(base.generation)).unwrap();
    writer.share_with(base).unwrap();
    fill(writer, key, seeds)
}

fn fill(mut writer: TemplateWriter, key: &str, seeds: &[u32]) -> TemplateInfo {
    for seed in seeds {
        writer.page(&page(*seed)).unwrap();
    }
    writer.commit(key.as_bytes()).unwrap()
}

pub fn read_all(reader: &TemplateReader) -> Vec<u8> {
    let mut bytes = vec![0; reader.info().pages as usize * PAGE_SIZE];
    reader.read_pages(0, &mut bytes).unwrap();
    bytes
}
