//! Every dependency's licence is one that `deny.toml` allows.

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::metadata::{Metadata, Package};
use crate::spdx;

#[derive(Debug, Deserialize)]
struct Deny {
    licenses: Licences,
}

#[derive(Debug, Deserialize)]
struct Licences {
    allow: Vec<String>,
    /// Licences allowed for one crate only, with the reason beside it in the file.
    #[serde(default)]
    exceptions: Vec<Exception>,
    /// Crates whose manifest names no licence.
    #[serde(default)]
    clarify: Vec<Clarify>,
}

#[derive(Debug, Deserialize)]
struct Exception {
    #[serde(rename = "crate")]
    name: String,
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Clarify {
    #[serde(rename = "crate")]
    name: String,
    expression: String,
}

pub fn run() -> anyhow::Result<()> {
    let metadata = Metadata::read()?;
    let path = metadata.workspace_root.join("deny.toml");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("Failed to read {}", path.display()))?;
    let deny: Deny =
        toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))?;
    let used: Vec<&Package> = metadata
        .packages
        .iter()
        .filter(|package| {
            metadata
                .resolve
                .nodes
                .iter()
                .any(|node| node.id == package.id)
        })
        .collect();
    let faults: Vec<String> = used
        .iter()
        .filter_map(|package| fault(package, &deny.licenses))
        .collect();
    for fault in &faults {
        eprintln!("licences: {fault}");
    }
    if !faults.is_empty() {
        bail!(
            "{} dependencies have a licence that deny.toml does not allow",
            faults.len()
        );
    }
    println!("licences: {} packages, all allowed", used.len());
    Ok(())
}

fn fault(package: &Package, licences: &Licences) -> Option<String> {
    let clarified = licences
        .clarify
        .iter()
        .find(|clarify| clarify.name == package.name)
        .map(|clarify| clarify.expression.as_str());
    let Some(expression) = clarified.or(package.license.as_deref()) else {
        return Some(format!(
            "{} {} names no licence; look at its files and add a [[licenses.clarify]]",
            package.name, package.version
        ));
    };
    let allowed = |licence: &str| {
        licences.allow.iter().any(|allow| allow == licence)
            || licences.exceptions.iter().any(|exception| {
                exception.name == package.name
                    && exception.allow.iter().any(|allow| allow == licence)
            })
    };
    match spdx::satisfied(expression, &allowed) {
        Ok(true) => None,
        Ok(false) => Some(format!(
            "{} {} is under {expression}",
            package.name, package.version
        )),
        Err(err) => Some(format!(
            "{} {}: the licence {expression:?} cannot be read: {err}",
            package.name, package.version
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(license: Option<&str>) -> Package {
        Package {
            id: String::new(),
            name: "thing".into(),
            version: "1.0.0".into(),
            license: license.map(Into::into),
            dependencies: vec![],
        }
    }

    fn licences(text: &str) -> Licences {
        toml::from_str::<Deny>(text).unwrap().licenses
    }

    #[test]
    fn one_allowed_alternative_is_enough() {
        let rules = licences("[licenses]\nallow = [\"MIT\"]\n");
        assert_eq!(fault(&package(Some("GPL-3.0 OR MIT")), &rules), None);
        assert!(fault(&package(Some("GPL-3.0 AND MIT")), &rules).is_some());
        assert!(fault(&package(None), &rules).is_some());
    }

    #[test]
    fn an_exception_counts_for_its_crate_only() {
        let rules = licences(
            "[licenses]\nallow = []\n[[licenses.exceptions]]\ncrate = \"thing\"\nallow = [\"MPL-2.0\"]\n",
        );
        assert_eq!(fault(&package(Some("MPL-2.0")), &rules), None);
        let mut other = package(Some("MPL-2.0"));
        other.name = "other".into();
        assert!(fault(&other, &rules).is_some());
    }
}
