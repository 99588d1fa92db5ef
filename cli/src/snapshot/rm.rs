//! `trenv snapshot rm`: files, memory and record go, in this order, so that it can be repeated. Programs
//! started from it go on: the files stay for as long as a container is based on them.

use anyhow::Context;
use serde_json::json;
use trenv_config::Config;
use trenv_pool::{Pool, TemplateId};

use super::saved::Saved;
use crate::containerd::Containerd;
use crate::shim::Shim;

pub async fn run(
    config: &Config,
    namespace: &str,
    names: &[String],
    json: bool,
) -> anyhow::Result<()> {
    let containerd = Containerd::connect(config, namespace).await?;
    let mut removed = Vec::new();
    for name in names {
        let saved = Saved::get(&containerd, name).await?;
        remove(config, &containerd, &saved)
            .await
            .with_context(|| format!("The snapshot {name} cannot be removed"))?;
        if !json {
            println!("{name}");
        }
        removed.push(json!({ "name": name, "template": saved.template }));
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&removed)?);
    }
    Ok(())
}

async fn remove(config: &Config, containerd: &Containerd, saved: &Saved) -> anyhow::Result<()> {
    containerd.leave_layer(&saved.record.snapshot_key).await?;
    match Shim::connect(config, &containerd.namespace).await {
        Ok(shim) => shim.delete_template(&saved.template).await?,
        // Without a shim nobody uses it.
        Err(_) => {
            let template: TemplateId = saved.template.parse()?;
            Pool::open(&config.pool_path())?.delete(&template)?;
        }
    }
    containerd.delete_container(&saved.record.id).await
}
