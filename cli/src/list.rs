//! `trenv list`: the functions of a namespace.

use crate::functions::{Function, query};
use crate::gateway::Gateway;
use crate::table::Table;

#[derive(Debug, clap::Args)]
pub struct ListOptions {
    /// Namespace; the gateway's default when absent
    #[arg(long)]
    namespace: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(gateway: &Gateway, options: &ListOptions) -> anyhow::Result<()> {
    let path = format!("/system/functions{}", query(options.namespace.as_deref()));
    let functions: Vec<Function> = gateway.get(&path).await?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&functions)?);
        return Ok(());
    }
    let mut table = Table::new(["FUNCTION", "STATUS", "INSTANCES", "CALLS", "IMAGE"]);
    for function in &functions {
        table.row([
            function.name.clone(),
            function.status().to_owned(),
            function.instances.len().to_string(),
            format!("{:.0}", function.invocation_count),
            function.image.clone(),
        ]);
    }
    if table.is_empty() {
        println!("No functions; deploy some with `trenv deploy -f stack.yml`.");
    } else {
        print!("{table}");
    }
    Ok(())
}
