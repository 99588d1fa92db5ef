//! `trenv remove`: removes functions.

use anyhow::bail;
use http::{Method, StatusCode};
use serde_json::json;

use crate::functions::{query, split_namespace};
use crate::gateway::{Gateway, accept};

#[derive(Debug, clap::Args)]
pub struct RemoveOptions {
    /// Functions, as NAME or NAME.NAMESPACE
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(gateway: &Gateway, options: &RemoveOptions) -> anyhow::Result<()> {
    let mut failed = 0;
    for name in &options.names {
        match remove(gateway, name).await {
            Ok(()) => println!("{name} removed"),
            Err(err) => {
                eprintln!("{name}: {err:#}");
                failed += 1;
            }
        }
    }
    if failed > 0 {
        bail!(
            "{failed} of {} functions could not be removed",
            options.names.len()
        );
    }
    Ok(())
}

/// Removes one function.
pub async fn remove(gateway: &Gateway, function: &str) -> anyhow::Result<()> {
    let (name, namespace) = split_namespace(function);
    let mut body = json!({ "functionName": name });
    if let Some(namespace) = namespace {
        body["namespace"] = namespace.into();
    }
    let path = format!("/system/functions{}", query(namespace));
    let (status, answer) = gateway.system(Method::DELETE, &path, Some(&body)).await?;
    if status == StatusCode::NOT_FOUND {
        bail!("There is no such function");
    }
    accept(status, &answer)
}
