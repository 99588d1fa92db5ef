//! `trenv describe`: everything that the gateway says about one function.

use anyhow::bail;
use http::{Method, StatusCode};
use serde_json::Value;

use crate::functions::{query, split_namespace};
use crate::gateway::{Gateway, accept};

#[derive(Debug, clap::Args)]
pub struct DescribeOptions {
    /// Function, as NAME or NAME.NAMESPACE
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(gateway: &Gateway, options: &DescribeOptions) -> anyhow::Result<()> {
    let (name, namespace) = split_namespace(&options.name);
    let path = format!("/system/function/{name}{}", query(namespace));
    let (status, body) = gateway.system(Method::GET, &path, None).await?;
    if status == StatusCode::NOT_FOUND {
        bail!(
            "There is no function {}; `trenv list` shows those there are",
            options.name
        );
    }
    accept(status, &body)?;
    let function: Value = serde_json::from_slice(&body)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&function)?);
        return Ok(());
    }
    let mut lines = Vec::new();
    flatten("", &function, &mut lines);
    let width = lines.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    for (key, value) in lines {
        println!("{key:<width$}  {value}");
    }
    Ok(())
}

/// One line per value, keys joined by dots; what is empty says nothing and is left out.
fn flatten(key: &str, value: &Value, lines: &mut Vec<(String, String)>) {
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (inner, value) in map {
                let joined = if key.is_empty() {
                    inner.clone()
                } else {
                    format!("{key}.{inner}")
                };
                flatten(&joined, value, lines);
            }
        }
        Value::Array(values) => {
            let scalars: Vec<String> = values.iter().map(plain).collect();
            if !scalars.is_empty() {
                lines.push((key.to_owned(), scalars.join(", ")));
            }
        }
        other => {
            let text = plain(other);
            if !text.is_empty() {
                lines.push((key.to_owned(), text));
            }
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_values_become_lines() {
        let mut lines = Vec::new();
        let value = serde_json::json!({"name": "f", "limits": {"memory": "1Gi"}, "none": null, "list": [1, "b"]});
        flatten("", &value, &mut lines);
        lines.sort();
        assert_eq!(
            lines,
            [
                ("limits.memory".to_owned(), "1Gi".to_owned()),
                ("list".to_owned(), "1, b".to_owned()),
                ("name".to_owned(), "f".to_owned()),
            ]
        );
    }
}
