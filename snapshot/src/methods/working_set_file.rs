//! A file of the pages that instances touch, in an order of the method's own.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::image::{Image, Mapped, Part, Store, nameless};
use crate::manifest::PAGE;

/// The file, mapped, and what is where in it.
#[derive(Debug, Clone)]
pub struct WorkingSetFile {
    pub mapped: Arc<Mapped>,
    pub file: Arc<File>,
    /// In the file's order.
    pub parts: Vec<Part>,
}

impl WorkingSetFile {
    /// Writes pages to a file in the order given; neighbours make one part. Pages that were never
    /// stored are zero and belong to the set as well: each would be a fault.
    pub fn write(image: &Image, pages: &[u64], store: Store<'_>) -> io::Result<Self> {
        let file = nameless(store)?;
        let mut parts: Vec<Part> = Vec::new();
        for (index, at) in pages.iter().enumerate() {
            let offset = index as u64 * PAGE;
            if let Some(stored) = image.offset(*at) {
                file.write_all_at(image.mapped().bytes(stored, PAGE), offset)?;
            }
            match parts.last_mut() {
                Some(last) if last.at + last.length == *at && same_area(image, last.at, *at) => {
                    last.length += PAGE;
                }
                _ => parts.push(Part {
                    at: *at,
                    length: PAGE,
                    offset,
                }),
            }
        }
        let length = pages.len() as u64 * PAGE;
        file.set_len(length)?;
        let mapped = Arc::new(Mapped::of(file.as_fd(), length)?);
        let file = Arc::new(file);
        Ok(Self {
            mapped,
            file,
            parts,
        })
    }
}

/// Whether two addresses lie in one mapping: a copy must not go beyond one.
fn same_area(image: &Image, first: u64, second: u64) -> bool {
    let area = |at: u64| image.area(at).map(|area| area.at);
    area(first) == area(second)
}
