//! The body of a deployment, as OpenFaaS clients send it.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::base::BASE_ANNOTATION;
use super::quantity::{parse_cpu, parse_memory};
use super::start_method::{START_METHOD_ANNOTATION, StartMethod};

/// How many calls an instance serves at once, when the deployment does not say.
pub const DEFAULT_CONCURRENCY: u32 = 1;

/// The annotation that lets an instance serve several calls at once.
pub const CONCURRENCY_ANNOTATION: &str = "dev.trenv.concurrency";

/// A function as a user describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Deployment {
    pub service: String,
    pub image: String,
    #[serde(deserialize_with = "null_as_default")]
    pub namespace: String,
    #[serde(deserialize_with = "null_as_default")]
    pub env_process: String,
    #[serde(deserialize_with = "null_as_default")]
    pub env_vars: BTreeMap<String, String>,
    #[serde(deserialize_with = "null_as_default")]
    pub constraints: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub secrets: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<Resources>,
    #[serde(deserialize_with = "null_as_default")]
    pub read_only_root_filesystem: bool,
}

/// Memory and CPU in the notation of Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    #[serde(deserialize_with = "null_as_default")]
    pub memory: String,
    #[serde(deserialize_with = "null_as_default")]
    pub cpu: String,
}

/// Limits in numbers; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limits {
    pub memory_bytes: u64,
    pub cpu_millis: u64,
}

impl Deployment {
    /// Checks what can be checked without asking anybody, and names the first fault.
    ///
    /// # Errors
    /// A sentence that says what to change.
    pub fn check(&self) -> Result<(), String> {
        check_name("service", &self.service)?;
        if self.image.trim().is_empty() {
            return Err("The deployment names no image; set \"image\"".to_owned());
        }
        for name in self.env_vars.keys() {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(format!(
                    "The environment variable {name:?} has no valid name; use one without '='"
                ));
            }
        }
        for secret in &self.secrets {
            check_name("secret", secret)?;
        }
        self.limits()?;
        self.concurrency()?;
        self.base()?;
        if self.start_method()? == StartMethod::CopyBase && self.base()?.is_none() {
            return Err(format!(
                "The start method {} copies a base's memory, but the function has none; set the annotation {BASE_ANNOTATION}",
                StartMethod::CopyBase.name()
            ));
        }
        if self.start_method()?.by_criu() && self.base()?.is_some() {
            return Err(format!(
                "The start method {} is for functions that are started from their image, but this one is made from a base; leave out the annotation {BASE_ANNOTATION}",
                self.start_method()?.name()
            ));
        }
        Ok(())
    }

    /// The limits in numbers.
    ///
    /// # Errors
    /// A sentence that says which limit cannot be read.
    pub fn limits(&self) -> Result<Limits, String> {
        let Some(limits) = &self.limits else {
            return Ok(Limits::default());
        };
        let read = |what: &str, text: &str, parse: fn(&str) -> Option<u64>| {
            if text.is_empty() {
                return Ok(0);
            }
            parse(text).ok_or_else(|| {
                format!(
                    "The {what} limit {text:?} cannot be read; write it like {}",
                    match what {
                        "memory" => "\"128Mi\"",
                        _ => "\"500m\" or \"0.5\"",
                    }
                )
            })
        };
        Ok(Limits {
            memory_bytes: read("memory", &limits.memory, parse_memory)?,
            cpu_millis: read("cpu", &limits.cpu, parse_cpu)?,
        })
    }

    /// How many calls one instance may serve at once.
    ///
    /// # Errors
    /// A sentence when the annotation is no positive number.
    pub fn concurrency(&self) -> Result<u32, String> {
        match self.annotations.get(CONCURRENCY_ANNOTATION) {
            None => Ok(DEFAULT_CONCURRENCY),
            Some(text) => text.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                format!(
                    "The annotation {CONCURRENCY_ANNOTATION} is {text:?}; set it to a whole number from 1"
                )
            }),
        }
    }

    /// The function of the same namespace that it is made from.
    ///
    /// # Errors
    /// A sentence when the annotation is no function's name.
    pub fn base(&self) -> Result<Option<&str>, String> {
        let name = self.annotations.get(BASE_ANNOTATION).map(String::as_str);
        name.map_or(Ok(()), |name| check_name("base", name))?;
        Ok(name)
    }

    /// How its instances come by their memory.
    ///
    /// # Errors
    /// A sentence that lists the methods when the annotation names none.
    pub fn start_method(&self) -> Result<StartMethod, String> {
        match self.annotations.get(START_METHOD_ANNOTATION) {
            None => Ok(StartMethod::default()),
            Some(name) => StartMethod::parse(name),
        }
    }
}

/// Checks a name of a function, namespace or secret.
///
/// # Errors
/// A sentence that says what a name must look like.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    // A secret's name may hold dots and underscores; a function's may not, since NAME.NAMESPACE
    // is split at the dot.
    let extra: &[u8] = if what == "secret" { b"-._" } else { b"-" };
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || extra.contains(&b);
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let bytes = name.as_bytes();
    if bytes.len() <= 63
        && edge(bytes.first().copied())
        && edge(bytes.last().copied())
        && bytes.iter().all(|b| inner(*b))
    {
        return Ok(());
    }
    Err(format!(
        "The {what} name {name:?} is not valid; use 1 to 63 lower-case letters, digits and '-', with a letter or digit at both ends"
    ))
}

pub(super) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment() -> Deployment {
        Deployment {
            service: "hello".into(),
            image: "hello:latest".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_client_may_send_nulls_and_unknown_fields() {
        let read: Deployment = serde_json::from_str(
            r#"{"service":"a","image":"b","envVars":null,"labels":null,"limits":null,"network":"x"}"#,
        )
        .unwrap();
        assert_eq!(read.service, "a");
        assert!(read.check().is_ok());
    }

    #[test]
    fn names_that_cannot_be_routed_are_refused() {
        for name in ["", "Hello", "a.b", "-a", "a_b", "a/b", &"a".repeat(64)] {
            let bad = Deployment {
                service: name.into(),
                ..deployment()
            };
            assert!(bad.check().is_err(), "{name}");
        }
    }

    #[test]
    fn a_start_method_that_nobody_knows_is_refused() {
        let mut d = deployment();
        assert_eq!(d.start_method(), Ok(StartMethod::Template));
        d.annotations
            .insert(START_METHOD_ANNOTATION.into(), "reap".into());
        assert!(d.check().is_ok());
        assert_eq!(d.start_method(), Ok(StartMethod::Reap));
        d.annotations
            .insert(START_METHOD_ANNOTATION.into(), "copy-base".into());
        assert!(d.check().unwrap_err().contains(BASE_ANNOTATION));
        d.annotations
            .insert(BASE_ANNOTATION.into(), "python-base".into());
        assert!(d.check().is_ok());
        d.annotations
            .insert(START_METHOD_ANNOTATION.into(), "quick".into());
        assert!(d.check().unwrap_err().contains("spice"));
    }

    #[test]
    fn limits_and_concurrency_are_read() {
        let mut d = deployment();
        d.limits = Some(Resources {
            memory: "128Mi".into(),
            cpu: "100m".into(),
        });
        d.annotations
            .insert(CONCURRENCY_ANNOTATION.into(), "8".into());
        assert_eq!(
            d.limits().unwrap(),
            Limits {
                memory_bytes: 128 << 20,
                cpu_millis: 100
            }
        );
        assert_eq!(d.concurrency().unwrap(), 8);
        d.annotations
            .insert(CONCURRENCY_ANNOTATION.into(), "0".into());
        assert!(d.check().is_err());
    }
}
