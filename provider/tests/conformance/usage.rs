//! What functions use, as their status tells it.

use std::time::Duration;

use http::Method;
use serde_json::json;

use crate::cases::{Outcome, expect, function, same};
use crate::machine::Machine;

/// Processor and memory of a function, by its own status and by the list.
async fn usage(m: &Machine, name: &str) -> Result<(u64, u64), String> {
    let path = format!("/system/function/{name}");
    let status = m.system(Method::GET, &path, None).await?.json();
    let list = m.system(Method::GET, "/system/functions", None).await?;
    let listed = list.json()[0]["usage"].clone();
    // Asked again at once, the last answer stands; memory is always that of now.
    same("listed", &listed["cpu"], &status["usage"]["cpu"])?;
    let figure = |key: &str| {
        let figure = status["usage"][key].as_u64();
        figure.ok_or(format!("no {key} in {status}"))
    };
    Ok((figure("cpu")?, figure("totalMemoryBytes")?))
}

pub async fn usage_is_what_the_instances_use(m: &mut Machine) -> Outcome {
    m.deploy(function("busy")).await?;
    expect("a call", &m.call("busy").await?, 200)?;
    let (_, before) = usage(m, "busy").await?;
    same("some memory", before > 0, true)?;
    tokio::time::sleep(Duration::from_millis(600)).await;
    expect("work", &m.call("busy/burn/1000").await?, 200)?;
    let (cpu, memory) = usage(m, "busy").await?;
    // One processor for the most of the time, on a machine that others use too.
    same(
        &format!("{cpu} thousandths"),
        (200..1100).contains(&cpu),
        true,
    )?;
    let grown = memory.saturating_sub(before);
    same(
        &format!("{grown} bytes more"),
        (30 << 20..64 << 20).contains(&grown),
        true,
    )?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (idle, kept) = usage(m, "busy").await?;
    same(&format!("{idle} thousandths at rest"), idle < 50, true)?;
    same("memory stays", kept.saturating_sub(before) > 30 << 20, true)?;
    let scale = json!({ "serviceName": "busy", "replicas": 0 });
    let path = "/system/scale-function/busy";
    expect(
        "scaled",
        &m.system(Method::POST, path, Some(scale)).await?,
        202,
    )?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    same("without an instance", usage(m, "busy").await?, (0, 0))
}
