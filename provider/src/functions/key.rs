//! The key of a template: everything that a function sees at start.
//!
//! Two starts with the same key may share a template, two with different keys never do. A key is
//! a document of one line, so that people can read why a template was made anew. The name of the
//! function is part of it, since a template lives and dies with its function.

use serde::Serialize;

use super::deployment::Limits;
use super::process::Process;

/// What goes into a key, besides the machine's fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KeyParts<'a> {
    pub namespace: &'a str,
    pub function: &'a str,
    /// Digest of the image's manifest.
    pub image: &'a str,
    pub process: &'a Process,
    pub limits: Limits,
    pub read_only: bool,
    /// Name and digest of every secret, by name.
    pub secrets: &'a [(String, String)],
    /// The function that it is made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<&'a str>,
}

#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    parts: &'a KeyParts<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    revision: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    fingerprint: &'a str,
}

/// The key without the machine: equal for equal functions, before anything runs.
pub fn function_key(parts: &KeyParts<'_>) -> String {
    render(parts, "", "")
}

/// The key of a template made for `revision` on a machine with `fingerprint`.
///
/// The revision is in it so that freeing a replaced function can never meet the template of the
/// one that took its place.
pub fn template_key(parts: &KeyParts<'_>, revision: &str, fingerprint: &str) -> String {
    render(parts, revision, fingerprint)
}

fn render(parts: &KeyParts<'_>, revision: &str, fingerprint: &str) -> String {
    // The document holds strings and numbers only, for which writing JSON cannot fail.
    serde_json::to_string(&Document {
        parts,
        revision,
        fingerprint,
    })
    .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process {
            args: vec!["fwatchdog".into()],
            env: vec!["A=1".into()],
            ..Default::default()
        }
    }

    fn parts<'a>(process: &'a Process, secrets: &'a [(String, String)]) -> KeyParts<'a> {
        KeyParts {
            namespace: "openfaas-fn",
            function: "hello",
            image: "sha256:aa",
            process,
            limits: Limits::default(),
            read_only: false,
            secrets,
            base: None,
        }
    }

    #[test]
    fn equal_functions_have_equal_keys() {
        let process = process();
        assert_eq!(
            template_key(&parts(&process, &[]), "r1", "cpu"),
            template_key(&parts(&process, &[]), "r1", "cpu")
        );
    }

    #[test]
    fn everything_seen_at_start_changes_the_key() {
        let process = process();
        let base = template_key(&parts(&process, &[]), "r1", "cpu");
        let mut other = process.clone();
        other.env.push("B=2".into());
        let mut user = process.clone();
        user.uid = 7;
        let secret = [("token".to_owned(), "ff".to_owned())];
        let keys = [
            template_key(&parts(&process, &[]), "r1", "cpu2"),
            template_key(&parts(&other, &[]), "r1", "cpu"),
            template_key(&parts(&user, &[]), "r1", "cpu"),
            template_key(&parts(&process, &secret), "r1", "cpu"),
            template_key(
                &KeyParts {
                    base: Some("python-base"),
                    ..parts(&process, &[])
                },
                "r1",
                "cpu",
            ),
            template_key(
                &KeyParts {
                    read_only: true,
                    ..parts(&process, &[])
                },
                "r1",
                "cpu",
            ),
            template_key(
                &KeyParts {
                    image: "sha256:bb",
                    ..parts(&process, &[])
                },
                "r1",
                "cpu",
            ),
            template_key(
                &KeyParts {
                    limits: Limits {
                        memory_bytes: 1,
                        cpu_millis: 0,
                    },
                    ..parts(&process, &[])
                },
                "r1",
                "cpu",
            ),
        ];
        for key in &keys {
            assert_ne!(key, &base);
        }
    }
}
