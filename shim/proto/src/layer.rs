//! How the layer of containerd's that has a template's files is known: by labels, given when it is
//! committed.

use std::collections::HashMap;

use crate::SnapshotResponse;

/// The template and its generation.
pub const TEMPLATE: &str = "dev.trenv.template";
/// Digest of the files, as [`SnapshotResponse::files_digest`].
pub const FILES: &str = "dev.trenv.files";

/// What [`TEMPLATE`] says.
#[must_use]
pub fn template(id: &str, generation: u64) -> String {
    format!("{id}@{generation}")
}

/// The labels of the layer of a template that was just taken; none where its files have no digest.
#[must_use]
pub fn labels(taken: &SnapshotResponse) -> HashMap<String, String> {
    if taken.files_digest.is_empty() {
        return HashMap::new();
    }
    let template = template(&taken.template_id, taken.generation);
    [
        (TEMPLATE.to_owned(), template),
        (FILES.to_owned(), taken.files_digest.clone()),
    ]
    .into()
}
