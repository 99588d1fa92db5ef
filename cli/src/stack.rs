//! `stack.yml`: the functions of a deployment, as OpenFaaS users write them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// What is read of a stack file; keys that concern building images are left to who builds them,
/// and the gateway to `--gateway` and the configuration.
#[derive(Debug, Deserialize)]
pub struct Stack {
    pub functions: BTreeMap<String, StackFunction>,
}

#[derive(Debug, Default, Deserialize)]
pub struct StackFunction {
    pub image: String,
    #[serde(default)]
    pub namespace: Option<String>,
    #[serde(default)]
    pub fprocess: Option<String>,
    #[serde(default)]
    pub environment: BTreeMap<String, Scalar>,
    #[serde(default)]
    pub environment_file: Vec<String>,
    #[serde(default)]
    pub secrets: Vec<String>,
    #[serde(default)]
    pub labels: BTreeMap<String, Scalar>,
    #[serde(default)]
    pub annotations: BTreeMap<String, Scalar>,
    #[serde(default)]
    pub constraints: Vec<String>,
    #[serde(default)]
    pub limits: Option<Resources>,
    #[serde(default)]
    pub requests: Option<Resources>,
    #[serde(default)]
    pub readonly_root_filesystem: bool,
}

/// A value that YAML may take for a number or a truth.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    Truth(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Truth(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(value) => write!(f, "{value}"),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
}

/// The body of a deployment request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Deployment {
    pub service: String,
    pub image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_process: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env_vars: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub constraints: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<Resources>,
    pub read_only_root_filesystem: bool,
}

impl Stack {
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("Failed to read the stack file {}", path.display()))?;
        let stack: Self = serde_yaml_ng::from_str(&text)
            .with_context(|| format!("The stack file {} is not valid", path.display()))?;
        if stack.functions.is_empty() {
            bail!("The stack file {} names no function", path.display());
        }
        Ok(stack)
    }

    /// The deployments of all functions, or of those that `only` names.
    pub fn deployments(
        &self,
        directory: &Path,
        only: &[String],
    ) -> anyhow::Result<Vec<Deployment>> {
        if let Some(unknown) = only.iter().find(|name| !self.functions.contains_key(*name)) {
            bail!("The stack file has no function {unknown}");
        }
        self.functions
            .iter()
            .filter(|(name, _)| only.is_empty() || only.contains(name))
            .map(|(name, function)| function.deployment(name, directory))
            .collect()
    }
}

impl StackFunction {
    fn deployment(&self, name: &str, directory: &Path) -> anyhow::Result<Deployment> {
        let text = |map: &BTreeMap<String, Scalar>| -> BTreeMap<String, String> {
            map.iter()
                .map(|(key, value)| (key.clone(), value.to_string()))
                .collect()
        };
        let mut env_vars = BTreeMap::new();
        for file in &self.environment_file {
            env_vars.append(&mut environment_file(&directory.join(file))?);
        }
        env_vars.append(&mut text(&self.environment));
        Ok(Deployment {
            service: name.to_owned(),
            image: self.image.clone(),
            namespace: self.namespace.clone(),
            env_process: self.fprocess.clone(),
            env_vars,
            constraints: self.constraints.clone(),
            secrets: self.secrets.clone(),
            labels: text(&self.labels),
            annotations: text(&self.annotations),
            limits: self.limits.clone(),
            requests: self.requests.clone(),
            read_only_root_filesystem: self.readonly_root_filesystem,
        })
    }
}

/// A file that holds `environment:` with more variables.
fn environment_file(path: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct File {
        environment: BTreeMap<String, Scalar>,
    }
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("Failed to read the environment file {}", path.display()))?;
    let file: File = serde_yaml_ng::from_str(&text)
        .with_context(|| format!("The environment file {} is not valid", path.display()))?;
    Ok(file
        .environment
        .into_iter()
        .map(|(key, value)| (key, value.to_string()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STACK: &str = "
version: 1.0
provider:
  name: openfaas
  gateway: http://127.0.0.1:9000
functions:
  hello:
    lang: python3
    handler: ./hello
    image: example/hello:1
    fprocess: python3 index.py
    environment:
      debug: true
      workers: 4
      greeting: hi
    labels:
      com.openfaas.scale.min: 2
    limits:
      memory: 128Mi
    readonly_root_filesystem: true
  other:
    image: example/other:1
";

    #[test]
    fn a_stack_file_becomes_deployments() {
        let stack: Stack = serde_yaml_ng::from_str(STACK).unwrap();
        let all = stack.deployments(Path::new("."), &[]).unwrap();
        assert_eq!(all.len(), 2);
        let hello = &all[0];
        assert_eq!(hello.env_process.as_deref(), Some("python3 index.py"));
        assert_eq!(hello.env_vars["debug"], "true");
        assert_eq!(hello.env_vars["workers"], "4");
        assert_eq!(hello.labels["com.openfaas.scale.min"], "2");
        let json = serde_json::to_value(hello).unwrap();
        assert_eq!(json["limits"]["memory"], "128Mi");
        assert_eq!(json["readOnlyRootFilesystem"], true);
        assert!(json.get("secrets").is_none());
    }

    #[test]
    fn some_functions_may_be_picked_and_unknown_ones_are_named() {
        let stack: Stack = serde_yaml_ng::from_str(STACK).unwrap();
        let one = stack
            .deployments(Path::new("."), &["other".into()])
            .unwrap();
        assert_eq!(one[0].service, "other");
        let err = stack
            .deployments(Path::new("."), &["nope".into()])
            .unwrap_err();
        assert!(err.to_string().contains("nope"));
    }

    #[test]
    fn a_function_without_image_is_refused() {
        assert!(serde_yaml_ng::from_str::<Stack>("functions:\n  a:\n    lang: go\n").is_err());
    }

    #[test]
    fn variables_may_stand_in_files_and_the_stack_goes_first() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(
            directory.path().join("env.yml"),
            "environment:\n  a: file\n  b: file\n",
        )
        .unwrap();
        let function = StackFunction {
            image: "i".into(),
            environment_file: vec!["env.yml".into()],
            environment: [("b".to_owned(), Scalar::Text("stack".into()))].into(),
            ..StackFunction::default()
        };
        let deployment = function.deployment("f", directory.path()).unwrap();
        assert_eq!(deployment.env_vars["a"], "file");
        assert_eq!(deployment.env_vars["b"], "stack");
    }
}
