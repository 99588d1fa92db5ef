//! The identity and shape of a template.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// BLAKE3 of a template's key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TemplateId([u8; 32]);

/// Text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("A template id is 64 hexadecimal digits, got {0:?}")]
pub struct InvalidTemplateId(pub String);

impl TemplateId {
    /// The id of the template that is made for `key`.
    pub fn of(key: &str) -> Self {
        Self(*blake3::hash(key.as_bytes()).as_bytes())
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for TemplateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TemplateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TemplateId({self})")
    }
}

impl FromStr for TemplateId {
    type Err = InvalidTemplateId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidTemplateId(text.to_owned());
        if text.len() != 64 || !text.bytes().all(|c| c.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for TemplateId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for TemplateId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?
                .parse()
                .map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

/// What the catalogue says about one generation of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateInfo {
    pub id: TemplateId,
    /// Grows with every commit to the pool; a key committed again gets a higher one.
    pub generation: u64,
    pub key: String,
    /// Pages of the template, zero pages included.
    pub pages: u64,
    /// Pages that are not zeros: those that lie in the pool, shared with other templates or not.
    pub stored_pages: u64,
    pub manifest_bytes: u64,
    /// Seconds since 1970.
    pub created: u64,
}

/// Consecutive pages of a template with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub first_page: u64,
    pub pages: u64,
    pub source: Source,
}

/// Where pages come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// Pages of zeros, which are not stored.
    Zero,
    /// Consecutive bytes of the data file from `offset` on.
    Data { offset: u64 },
}

/// Appends one page to `extents`, making the last one longer where it continues it.
pub(crate) fn push_page(extents: &mut Vec<Extent>, page: u64, source: Source) {
    if let Some(last) = extents.last_mut() {
        let continues = match (last.source, source) {
            (Source::Zero, Source::Zero) => true,
            (Source::Data { offset: start }, Source::Data { offset }) => {
                offset == start + last.pages * crate::PAGE_SIZE as u64
            }
            _ => false,
        };
        if continues {
            last.pages += 1;
            return;
        }
    }
    extents.push(Extent {
        first_page: page,
        pages: 1,
        source,
    });
}
