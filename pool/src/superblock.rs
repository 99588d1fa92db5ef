//! The first block of `pool.data`: what the file is, whose, and how large.
//!
//! Little-endian: magic (8), version (4), backend (4), uuid (16), size (8), page size (4),
//! zero (4), data offset (8), created (8); zeros; BLAKE3 of everything before it in the last 32 bytes
//! of the block. Magic and version are read before the checksum, so that a later format gets to say
//! what it is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use uuid::Uuid;

use crate::PAGE_SIZE;
use crate::backend::Backend;
use crate::error::PoolError;

/// Version of the format written here.
pub const VERSION: u32 = 1;

/// Where pages start in the data file; a multiple of 2 MiB for devices that map by that unit.
pub const DATA_OFFSET: u64 = 2 << 20;

const MAGIC: [u8; 8] = *b"TRENVPL\n";
const SUM_AT: usize = PAGE_SIZE - 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub backend: Backend,
    pub uuid: Uuid,
    /// Bytes of the data file, the superblock's part included.
    pub size: u64,
    pub created: u64,
}

impl Superblock {
    pub fn encode(&self) -> [u8; PAGE_SIZE] {
        let mut block = [0; PAGE_SIZE];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            block[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&self.backend.code().to_le_bytes());
        put(self.uuid.as_bytes());
        put(&self.size.to_le_bytes());
        put(&(PAGE_SIZE as u32).to_le_bytes());
        put(&[0; 4]);
        put(&DATA_OFFSET.to_le_bytes());
        put(&self.created.to_le_bytes());
        let sum = blake3::hash(&block[..SUM_AT]);
        block[SUM_AT..].copy_from_slice(sum.as_bytes());
        block
    }

    /// Reads and checks the superblock of `file`, and that the file is as long as it says.
    pub fn read(file: &File, path: &Path) -> Result<Self, PoolError> {
        let mut block = [0; PAGE_SIZE];
        let length = file
            .metadata()
            .map_err(|e| PoolError::io("examine", path, e))?
            .len();
        if length < PAGE_SIZE as u64 {
            return Err(PoolError::Truncated {
                path: path.to_path_buf(),
                found: length,
                expected: PAGE_SIZE as u64,
            });
        }
        file.read_exact_at(&mut block, 0)
            .map_err(|e| PoolError::io("read the superblock of", path, e))?;
        let superblock = Self::decode(&block, path)?;
        if superblock.backend == Backend::File && length < superblock.size {
            return Err(PoolError::Truncated {
                path: path.to_path_buf(),
                found: length,
                expected: superblock.size,
            });
        }
        Ok(superblock)
    }

    pub fn decode(block: &[u8; PAGE_SIZE], path: &Path) -> Result<Self, PoolError> {
        let damaged = || PoolError::BadSuperblock {
            path: path.to_path_buf(),
        };
        if block[..8] != MAGIC {
            return Err(PoolError::BadMagic {
                path: path.to_path_buf(),
            });
        }
        let version = u32_at(block, 8);
        if version != VERSION {
            return Err(PoolError::OtherVersion {
                path: path.to_path_buf(),
                found: version,
                known: VERSION,
            });
        }
        if blake3::hash(&block[..SUM_AT]).as_bytes()[..] != block[SUM_AT..] {
            return Err(damaged());
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&block[16..32]);
        let superblock = Self {
            backend: Backend::from_code(u32_at(block, 12)).ok_or_else(damaged)?,
            uuid: Uuid::from_bytes(uuid),
            size: u64_at(block, 32),
            created: u64_at(block, 56),
        };
        let page_size = u32_at(block, 40);
        if page_size != PAGE_SIZE as u32
            || u64_at(block, 48) != DATA_OFFSET
            || superblock.size < DATA_OFFSET
        {
            return Err(damaged());
        }
        Ok(superblock)
    }
}

fn u32_at(block: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&block[at..at + 4]);
    u32::from_le_bytes(bytes)
}

fn u64_at(block: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_changed_bit_goes_unseen(at in 0..PAGE_SIZE, bit in 0..8u32) {
            let sound = Superblock {
                backend: Backend::File,
                uuid: Uuid::new_v4(),
                size: 1 << 30,
                created: 1,
            };
            let path = Path::new("pool.data");
            let mut block = sound.encode();
            prop_assert_eq!(Superblock::decode(&block, path).unwrap(), sound);
            block[at] ^= 1 << bit;
            prop_assert!(Superblock::decode(&block, path).is_err());
        }
    }
}
