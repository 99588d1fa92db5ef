//! The generation page: a file by which a program knows that it is another instance than before.
//!
//! A function that is restored from a snapshot continues with the random state of the moment when
//! it was frozen, and so do all other instances of that snapshot. Pid 1 therefore puts an
//! identifier that no other tenancy has into a file of each root, while the sandbox is idle. A
//! program maps the file, shared and read-only, and compares the identifier with the one that it
//! saw last before it draws a random number. `docs/security.md` tells programs how.

/// The variable that gives functions the file's path.
pub const VARIABLE: &str = "TRENV_GENERATION";
/// The file, as a function sees it.
pub const PATH: &str = "/run/trenv/generation";

/// How the file begins.
pub const MAGIC: [u8; 8] = *b"TRENVGEN";
/// Length of the file: what can be mapped of it.
pub const LENGTH: usize = 4096;
/// Layout of the file.
pub const VERSION: u64 = 1;

const IDENTIFIER: std::ops::Range<usize> = 16..32;

/// The content of a file: magic, version, identifier, number of the tenancy in its sandbox; then
/// zeroes.
#[must_use]
pub fn page(identifier: [u8; 16], count: u64) -> Vec<u8> {
    let mut page = vec![0; LENGTH];
    page[..8].copy_from_slice(&MAGIC);
    page[8..16].copy_from_slice(&VERSION.to_le_bytes());
    page[IDENTIFIER].copy_from_slice(&identifier);
    page[32..40].copy_from_slice(&count.to_le_bytes());
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Programs rely on these offsets.
    #[test]
    fn everything_has_its_place() {
        let page = page([7; 16], 0x0102);
        assert_eq!(page.len(), LENGTH);
        assert_eq!(&page[..16], b"TRENVGEN\x01\0\0\0\0\0\0\0");
        assert_eq!(page[16..32], [7; 16]);
        assert_eq!(page[32..40], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert!(page[40..].iter().all(|byte| *byte == 0));
    }
}
