//! The generation page: a file of the sandbox that tells each start of a function from all others.
//!
//! A process that maps it, shared and read-only, sees another identifier as soon as it runs again
//! after a restore, and draws its random state anew. The sandbox writes the file before a tenancy
//! begins; the engine only takes care that a restored mapping is of the new sandbox's file.
//! `docs/security.md` describes the file for programs.

use crate::manifest::{ManifestError, Mapping, MappingKind, PAGE};

/// Where a process of a sandbox finds it.
pub const PATH: &str = "/run/trenv/generation";
/// What the sandbox makes for itself; never part of a snapshot.
pub const DIRECTORY: &str = "/run/trenv";

const READ: u32 = 1;

/// Why a mapping of the page cannot come back, if it cannot. One that can be written was refused
/// before, as any of a file is.
pub(crate) fn refusal(shared: bool, length: u64) -> Option<&'static str> {
    if !shared {
        Some("maps the generation page privately; map it shared")
    } else if length != PAGE {
        Some("maps more than the one page of the generation file")
    } else {
        None
    }
}

/// Checks a mapping of a manifest.
pub(crate) fn check(mapping: &Mapping, pid: i32) -> Result<(), ManifestError> {
    let one_page = mapping.end - mapping.start == PAGE;
    if mapping.kind != MappingKind::Generation || one_page && mapping.protection & !READ == 0 {
        return Ok(());
    }
    Err(ManifestError::Invalid {
        what: format!(
            "the generation page at {:#x} of process {pid}",
            mapping.start
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_page_to_read_is_taken_from_a_manifest() {
        let page = |length: u64, protection: u32| Mapping {
            start: 0x7000_0000_0000,
            end: 0x7000_0000_0000 + length,
            protection,
            kind: MappingKind::Generation,
            flags: crate::manifest::MappingFlags::default(),
            guards: Vec::new(),
        };
        assert!(check(&page(PAGE, 1), 7).is_ok());
        assert!(check(&page(PAGE, 0), 7).is_ok());
        for (length, protection) in [(PAGE, 3), (PAGE, 5), (2 * PAGE, 1)] {
            let err = check(&page(length, protection), 7).unwrap_err();
            assert!(err.to_string().contains("generation page at 0x7"), "{err}");
        }
    }
}
