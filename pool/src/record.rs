//! One generation of a template as the catalogue stores it.

use serde::{Deserialize, Serialize};

use crate::error::PoolError;
use crate::template::{Extent, TemplateId, TemplateInfo};

/// BLAKE3 of one page.
pub(crate) type PageSum = [u8; 32];

/// One generation of a template, as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub info: TemplateInfo,
    pub extents: Vec<Extent>,
    pub manifest_sum: [u8; 32],
    /// BLAKE3 of all page checksums in a row.
    pub page_sums_sum: [u8; 32],
}

impl Record {
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut bytes = postcard::to_allocvec(self).ok()?;
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        Some(bytes)
    }

    /// Decodes and checks a record, so that whoever uses it may trust its extents to lie in order
    /// and to cover the template.
    pub fn decode(id: TemplateId, generation: u64, bytes: &[u8]) -> Result<Self, PoolError> {
        let bad = |what| PoolError::BadRecord { id, what };
        let (body, sum) = bytes
            .split_at_checked(bytes.len().saturating_sub(32))
            .ok_or_else(|| bad("too short"))?;
        if blake3::hash(body).as_bytes()[..] != *sum {
            return Err(bad("its checksum differs"));
        }
        let record: Self = postcard::from_bytes(body).map_err(|_| bad("it cannot be decoded"))?;
        if record.info.id != id || record.info.generation != generation {
            return Err(bad("it names another template"));
        }
        let mut next = 0u64;
        for extent in &record.extents {
            if extent.first_page != next || extent.pages == 0 {
                return Err(bad("its extents leave a gap"));
            }
            next = next
                .checked_add(extent.pages)
                .ok_or_else(|| bad("its extents overflow"))?;
        }
        if next != record.info.pages {
            return Err(bad("its extents do not cover it"));
        }
        Ok(record)
    }
}

/// Records that could be read, and the ids and errors of those that could not.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub records: Vec<Record>,
    pub damaged: Vec<PoolError>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::template::Source;

    fn record(extents: Vec<Extent>, pages: u64) -> Record {
        let info = TemplateInfo {
            id: TemplateId::of("key"),
            generation: 3,
            key: "key".to_owned(),
            pages,
            stored_pages: 0,
            manifest_bytes: 0,
            created: 0,
        };
        Record {
            info,
            extents,
            manifest_sum: [0; 32],
            page_sums_sum: [0; 32],
        }
    }

    fn zeros(first_page: u64, pages: u64) -> Extent {
        let source = Source::Zero;
        Extent {
            first_page,
            pages,
            source,
        }
    }

    #[test]
    fn a_record_whose_extents_do_not_cover_it_is_refused() {
        let id = TemplateId::of("key");
        let decode = |record: &Record| Record::decode(id, 3, &record.encode().unwrap());
        let sound = record(vec![zeros(0, 2), zeros(2, 3)], 5);
        assert_eq!(decode(&sound).unwrap(), sound);
        for (extents, pages) in [
            (vec![zeros(0, 2), zeros(3, 2)], 5),
            (vec![zeros(1, 4)], 5),
            (vec![zeros(0, 4)], 5),
            (vec![zeros(0, 5), zeros(5, 0)], 5),
            (vec![zeros(0, u64::MAX), zeros(u64::MAX, 2)], 1),
        ] {
            assert!(decode(&record(extents, pages)).is_err());
        }
        assert!(Record::decode(TemplateId::of("other"), 3, &sound.encode().unwrap()).is_err());
        assert!(Record::decode(id, 4, &sound.encode().unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let id = TemplateId::of("key");
            prop_assert!(Record::decode(id, 3, &bytes).is_err());
            // With a checksum that fits, the rest is looked at too.
            let sum = blake3::hash(&bytes);
            bytes.extend_from_slice(sum.as_bytes());
            let _ = Record::decode(id, 3, &bytes);
        }

        #[test]
        fn no_changed_bit_goes_unseen(at in any::<prop::sample::Index>(), bit in 0..8u32) {
            let mut bytes = record(vec![zeros(0, 5)], 5).encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Record::decode(TemplateId::of("key"), 3, &bytes).is_err());
        }
    }
}
