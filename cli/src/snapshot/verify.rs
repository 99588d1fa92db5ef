//! `trenv snapshot verify`: every page and the description, against their checksums.

use serde_json::json;
use trenv_config::Config;
use trenv_pool::PoolError;

use super::stored::{Stored, all, find};

/// Whether all are sound.
pub async fn run(
    config: &Config,
    namespace: &str,
    names: &[String],
    json: bool,
) -> anyhow::Result<bool> {
    let (pool, templates, saved) = all(config, namespace).await?;
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
        let checked = Stored::open(&pool, info).and_then(|one| Ok(one.reader.verify()?));
        let removed = |err: &anyhow::Error| {
            let cause = err.downcast_ref::<PoolError>();
            cause.is_some_and(PoolError::is_removal)
        };
        if names.is_empty() && checked.as_ref().is_err_and(removed) {
            // Since it was listed; that is no fault.
            continue;
        }
        let error = checked.err().map(|err| format!("{err:#}"));
        sound &= error.is_none();
        if !json {
            match &error {
                None => println!("{name}: sound, {} pages", info.pages),
                Some(error) => println!("{name}: {error}"),
            }
        }
        report.push(json!({
            "name": name,
            "template": info.id.to_string(),
            "pages": info.pages,
            "error": error,
        }));
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(sound)
}
