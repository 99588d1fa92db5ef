//! `trenv snapshot verify`: every page, the description and the files, against their checksums.

use serde_json::json;
use trenv_config::Config;

use super::files::Files;
use super::stored::{Stored, all, find};
use crate::containerd::Containerd;

/// Whether all are sound.
pub async fn run(
    config: &Config,
    namespace: &str,
    names: &[String],
    json: bool,
) -> anyhow::Result<bool> {
    let (pool, templates, saved) = all(config, namespace).await?;
    // Without containerd, which is told already, memory alone.
    let files = match Containerd::connect(config, namespace).await {
        Ok(containerd) => Some(Files::all(containerd).await?),
        Err(_) => None,
    };
    let mut chosen = Vec::new();
    for name in names {
        chosen.push((name.clone(), find(&templates, &saved, name)?));
    }
    if names.is_empty() {
        chosen.extend(templates.iter().map(|info| {
            let id = info.id.to_string();
            let named = saved.iter().find(|one| one.template == id);
            (named.map_or(id, |one| one.name.clone()), info)
        }));
    }
    let mut report = Vec::new();
    let mut sound = true;
    for (name, info) in chosen {
        let id = info.id.to_string();
        let by_hand = saved.iter().find(|one| one.template == id);
        let checked = async {
            Stored::open(&pool, info)?.reader.verify()?;
            match &files {
                Some(files) => files.verify(info, by_hand).await,
                None => Ok(None),
            }
        };
        let (digest, error) = match checked.await {
            Ok(digest) => (digest, None),
            Err(err) => (None, Some(format!("{err:#}"))),
        };
        let removed = || {
            let there = pool.template(&info.id, Some(info.generation));
            there.is_err_and(|err| err.is_removal())
        };
        if names.is_empty() && error.is_some() && removed() {
            // Since it was listed; that is no fault.
            continue;
        }
        sound &= error.is_none();
        if !json {
            let pages = info.pages;
            match (&error, &digest) {
                (Some(error), _) => println!("{name}: {error}"),
                (None, Some(_)) => println!("{name}: sound, {pages} pages and the files"),
                (None, None) => println!("{name}: sound, {pages} pages"),
            }
        }
        report.push(json!({
            "name": name,
            "template": id,
            "pages": info.pages,
            "files": digest,
            "error": error,
        }));
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(sound)
}
