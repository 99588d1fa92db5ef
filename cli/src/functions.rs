//! Functions as the gateway describes them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::bail;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::gateway::{Gateway, accept};

/// One function's status.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Function {
    pub name: String,
    pub image: String,
    pub namespace: String,
    pub replicas: u64,
    pub available_replicas: u64,
    /// The instances that are there now, by sandbox.
    pub instances: Vec<Value>,
    pub invocation_count: f64,
    pub annotations: Option<BTreeMap<String, String>>,
    /// `building`, `ready`, `serving-cold` or `failed`.
    pub status: Option<String>,
    /// Why it is not ready, or why it has no template.
    pub reason: Option<String>,
    /// What else the gateway says.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

impl Function {
    pub fn status(&self) -> &str {
        match &self.status {
            Some(status) => status,
            None if self.available_replicas > 0 => "ready",
            None => "building",
        }
    }
}

/// `NAME`, or `NAME` and the namespace after the last dot.
pub fn split_namespace(name: &str) -> (&str, Option<&str>) {
    match name.rsplit_once('.') {
        Some((name, namespace)) => (name, Some(namespace)),
        None => (name, None),
    }
}

/// `?namespace=...`, empty without one.
pub fn query(namespace: Option<&str>) -> String {
    namespace.map_or_else(String::new, |name| format!("?namespace={name}"))
}

/// One function; `None` when the gateway does not know it.
pub async fn find(
    gateway: &Gateway,
    name: &str,
    namespace: Option<&str>,
) -> anyhow::Result<Option<Function>> {
    let path = format!("/system/function/{name}{}", query(namespace));
    let (status, body) = gateway.system(Method::GET, &path, None).await?;
    if status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    accept(status, &body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

/// How long a request for instances is given.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Sets the number of instances that a function is to keep.
pub async fn request_scale(
    gateway: &Gateway,
    name: &str,
    namespace: Option<&str>,
    replicas: u64,
) -> anyhow::Result<()> {
    let mut body = json!({ "serviceName": name, "replicas": replicas });
    if let Some(namespace) = namespace {
        body["namespace"] = namespace.into();
    }
    let path = format!("/system/scale-function/{name}{}", query(namespace));
    let (status, answer) = gateway.system(Method::POST, &path, Some(&body)).await?;
    accept(status, &answer)
}

/// Sets the number of instances and waits until that many are there.
pub async fn scale(
    gateway: &Gateway,
    name: &str,
    namespace: Option<&str>,
    replicas: u64,
    deadline: Duration,
) -> anyhow::Result<()> {
    let end = Instant::now() + deadline;
    let mut asked: Option<Instant> = None;
    loop {
        // Asked again from time to time: what did not fit at first may fit now.
        if asked.is_none_or(|asked| asked.elapsed() > ASK_AGAIN) {
            request_scale(gateway, name, namespace, replicas).await?;
            asked = Some(Instant::now());
        }
        let Some(function) = find(gateway, name, namespace).await? else {
            bail!("The function {name} was removed while it was scaled");
        };
        let there = function.instances.len() as u64;
        if there == replicas {
            return Ok(());
        }
        if Instant::now() > end {
            bail!(
                "The function {name} has {there} of {replicas} instances after {} s",
                deadline.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
