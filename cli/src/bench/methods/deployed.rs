//! A deployed function whose start method is changed for a while.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::functions::{Function, find};
use crate::gateway::{Gateway, accept};

const ANNOTATION: &str = "dev.trenv.start-method";
const ROUTE: &str = "/system/functions";
/// How long the gateway may take until it tells of a method.
const TOLD: Duration = Duration::from_secs(5);
/// How long a function may be built anew.
const BUILT: Duration = Duration::from_secs(120);

/// What an update must repeat of a function's description, as the gateway names it.
const REPEATED: [&str; 11] = [
    "namespace",
    "image",
    "envProcess",
    "envVars",
    "constraints",
    "secrets",
    "labels",
    "annotations",
    "limits",
    "requests",
    "readOnlyRootFilesystem",
];

/// A function, and the deployment that it had.
#[derive(Debug)]
pub struct Deployed {
    pub function: Function,
    pub name: String,
    /// Bytes of its memory image.
    pub image_bytes: u64,
    before: Value,
}

impl Deployed {
    /// The function `name`, which must be ready.
    pub async fn find(gateway: &Gateway, name: &str) -> anyhow::Result<Self> {
        let function = find(gateway, name, None).await?.with_context(|| {
            format!("There is no function {name}; `trenv deploy -f functions/stack.yml` deploys the samples, docs/benchmarks.md has numpy-python")
        })?;
        if function.status() != "ready" {
            bail!(
                "The function {name} is {}, not ready; `trenv describe {name}` says why",
                function.status()
            );
        }
        let described: Value = gateway.get(&format!("/system/function/{name}")).await?;
        Ok(Self {
            name: name.to_owned(),
            image_bytes: described["template"]["imageBytes"].as_u64().unwrap_or(0),
            before: deployment(&described),
            function,
        })
    }

    /// Lets its next starts use `method`.
    pub async fn use_method(&self, gateway: &Gateway, method: &str) -> anyhow::Result<()> {
        update(gateway, &self.starting_by(method))
            .await
            .with_context(|| format!("{} was not set to start by {method}", self.name))?;
        let end = Instant::now() + TOLD;
        loop {
            let told = self.told(gateway).await?;
            if !told["update"].is_null() {
                bail!(
                    "{} is built anew, so something of it has changed since it was deployed, such as its image; deploy it again, then measure",
                    self.name
                );
            }
            if told["startMethod"] == method {
                return Ok(());
            }
            if Instant::now() > end {
                bail!(
                    "{} starts by {}, not by {method}; this provider may not know the annotation {ANNOTATION}",
                    self.name,
                    told["startMethod"]
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Has it built anew for `method`, if that needs it; a sentence where this machine or the function
    /// cannot have the method.
    pub async fn build_for(
        &self,
        gateway: &Gateway,
        method: &str,
    ) -> anyhow::Result<Option<String>> {
        let body = self.starting_by(method);
        let (status, answer) = gateway.system(Method::PUT, ROUTE, Some(&body)).await?;
        if status == StatusCode::BAD_REQUEST {
            let refused = String::from_utf8_lossy(&answer);
            return Ok(Some(refused.trim().trim_end_matches('.').to_owned()));
        }
        accept(status, &answer)?;
        let built = self.built(gateway).await?;
        if built["status"] == "ready" && built["update"].is_null() {
            return Ok(None);
        }
        self.put_back(gateway).await?;
        self.built(gateway).await?;
        let reason = built["updateReason"].as_str().or(built["reason"].as_str());
        let reason = reason.unwrap_or("it is not ready");
        Ok(Some(format!("{}: {reason}", self.name)))
    }

    /// What the gateway says of it once it is not being built.
    async fn built(&self, gateway: &Gateway) -> anyhow::Result<Value> {
        let end = Instant::now() + BUILT;
        loop {
            let told = self.told(gateway).await?;
            if told["update"] != "building" && told["status"] != "building" {
                return Ok(told);
            }
            if Instant::now() > end {
                bail!("{} is still being built after {BUILT:?}", self.name);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn told(&self, gateway: &Gateway) -> anyhow::Result<Value> {
        gateway
            .get(&format!("/system/function/{}", self.name))
            .await
    }

    fn starting_by(&self, method: &str) -> Value {
        let mut body = self.before.clone();
        body["annotations"][ANNOTATION] = method.into();
        body
    }

    /// Gives it back the deployment that it had.
    pub async fn put_back(&self, gateway: &Gateway) -> anyhow::Result<()> {
        update(gateway, &self.before).await.with_context(|| {
            format!(
                "{} did not get its own start method back; set its annotation {ANNOTATION} by `trenv deploy`",
                self.name
            )
        })
    }
}

async fn update(gateway: &Gateway, body: &Value) -> anyhow::Result<()> {
    let (status, answer) = gateway.system(Method::PUT, ROUTE, Some(body)).await?;
    accept(status, &answer)
}

/// The deployment that leads to such a description.
fn deployment(described: &Value) -> Value {
    let mut body = json!({ "service": described["name"] });
    for key in REPEATED {
        if !described[key].is_null() {
            body[key] = described[key].clone();
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deployment_is_read_from_a_description() {
        let described = json!({
            "name": "f", "image": "i", "limits": null, "annotations": { "a": "b" },
            "replicas": 3, "status": "ready",
        });
        assert_eq!(
            deployment(&described),
            json!({ "service": "f", "image": "i", "annotations": { "a": "b" } })
        );
    }
}
