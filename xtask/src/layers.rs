//! Dependencies between our own crates point one way.

use anyhow::bail;

use crate::metadata::Metadata;

/// Every crate with the crates of ours that it may depend on.
///
/// `provider` and the command reach the shim only through containerd and `trenv.sandbox.v1`, so
/// neither may name `sandbox` or `cni`, nor the provider `snapshot`.
const LAYERS: &[(&str, &[&str])] = &[
    ("trenv-config", &[]),
    // Tests only.
    ("trenv-fuzz", &[]),
    ("pseudo-mm-uapi", &[]),
    ("trenv-devices", &[]),
    // Its command reads where the pool is.
    (
        "trenv-pool",
        &[
            "pseudo-mm-uapi",
            "trenv-config",
            "trenv-devices",
            "trenv-fuzz",
        ],
    ),
    ("trenv-restorer", &["trenv-fuzz"]),
    (
        "trenv-snapshot",
        &[
            "pseudo-mm-uapi",
            "trenv-fuzz",
            "trenv-pool",
            "trenv-restorer",
        ],
    ),
    ("trenv-cni", &[]),
    ("trenv-sandbox", &["trenv-cni"]),
    ("trenv-sandbox-proto", &[]),
    ("trenv-watchdog", &[]),
    (
        "containerd-shim-trenv-v2",
        &[
            "trenv-cni",
            "trenv-config",
            "trenv-pool",
            "trenv-sandbox",
            "trenv-sandbox-proto",
            "trenv-snapshot",
        ],
    ),
    ("trenv-provider", &["trenv-config", "trenv-sandbox-proto"]),
    (
        "trenv",
        // It reads what snapshots say, and makes none.
        &[
            "trenv-config",
            "trenv-devices",
            "trenv-pool",
            "trenv-sandbox-proto",
            "trenv-snapshot",
        ],
    ),
    (
        "trenv-tests",
        &["trenv-config", "trenv-pool", "trenv-sandbox-proto"],
    ),
    ("xtask", &[]),
];

/// Names that say nothing: a shared idea gets a name of its own.
const EMPTY_NAMES: &[&str] = &["common", "helpers", "misc", "util", "utils"];

pub fn run() -> anyhow::Result<()> {
    let metadata = Metadata::read()?;
    let crates: Vec<(&str, Vec<&str>)> = metadata
        .members()
        .map(|package| {
            let ours = package
                .dependencies
                .iter()
                .map(|dependency| dependency.name.as_str())
                .filter(|name| metadata.members().any(|member| member.name == *name))
                .collect();
            (package.name.as_str(), ours)
        })
        .collect();
    let faults = faults(&crates);
    for fault in &faults {
        eprintln!("layers: {fault}");
    }
    if !faults.is_empty() {
        bail!(
            "{} dependencies point the wrong way; the table is in xtask/src/layers.rs",
            faults.len()
        );
    }
    println!(
        "layers: {} crates, every dependency points the right way",
        crates.len()
    );
    Ok(())
}

fn faults(crates: &[(&str, Vec<&str>)]) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, dependencies) in crates {
        if name.split('-').any(|part| EMPTY_NAMES.contains(&part)) {
            faults.push(format!(
                "{name} has a name that says nothing; name it after its idea"
            ));
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| layer == name) else {
            faults.push(format!(
                "{name} is not in the table of layers; add it with what it may use"
            ));
            continue;
        };
        for dependency in dependencies {
            if !allowed.contains(dependency) {
                faults.push(format!("{name} may not depend on {dependency}"));
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowed_dependency_is_no_fault() {
        assert!(faults(&[("trenv-snapshot", vec!["trenv-pool"])]).is_empty());
    }

    #[test]
    fn a_dependency_against_the_direction_is_named() {
        let found = faults(&[("trenv-pool", vec!["trenv-snapshot"])]);
        assert_eq!(found, ["trenv-pool may not depend on trenv-snapshot"]);
    }

    #[test]
    fn an_unknown_crate_and_an_empty_name_are_faults() {
        assert_eq!(faults(&[("trenv-utils", vec![])]).len(), 2);
    }

    #[test]
    fn the_table_itself_has_no_cycle() {
        fn reaches(from: &str, to: &str) -> bool {
            LAYERS
                .iter()
                .filter(|(name, _)| *name == from)
                .flat_map(|(_, uses)| uses.iter())
                .any(|used| *used == to || reaches(used, to))
        }
        for (name, _) in LAYERS {
            assert!(!reaches(name, name), "{name} reaches itself");
        }
    }
}
