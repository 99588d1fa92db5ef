//! The OCI spec of a program: what a start needs of it.

use anyhow::bail;
use serde_json::Value;
use trenv_sandbox_proto as proto;

/// The annotation that makes a container a sandbox.
pub const SANDBOX: &str = "dev.trenv.sandbox";
/// The annotation by which the provider names its function.
pub const FUNCTION: &str = "dev.trenv.function";

/// Refuses what a start from a snapshot would leave out.
pub fn check(spec: &Value) -> anyhow::Result<()> {
    if spec["process"]["terminal"] == true {
        bail!("Its program has a terminal, which cannot be snapshotted; run it without -t");
    }
    for mount in others(spec) {
        if !is_bind(mount) {
            bail!(
                "It has a mount of type {} at {}, which a start from a snapshot cannot make; run it \
                 without",
                mount["type"],
                mount["destination"]
            );
        }
    }
    Ok(())
}

/// The request that starts the program in a sandbox, its root and template aside.
pub fn request(spec: &Value, id: &str) -> proto::RepurposeRequest {
    let resources = &spec["linux"]["resources"];
    let quota = resources["cpu"]["quota"].as_u64().unwrap_or(0);
    let period = resources["cpu"]["period"].as_u64().unwrap_or(100_000);
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    proto::RepurposeRequest {
        sandbox_id: id.to_owned(),
        tenancy: id.to_owned(),
        hostname: text(&spec["hostname"]),
        read_only_rootfs: spec["root"]["readonly"] == true,
        mounts: others(spec).map(bind).collect(),
        limits: Some(proto::Limits {
            memory_bytes: number(&resources["memory"]["limit"]),
            cpu_millis: (quota * 1000).checked_div(period).unwrap_or(0),
            pids: number(&resources["pids"]["limit"]),
            ..proto::Limits::default()
        })
        .into(),
        spec_json: spec.to_string(),
        ..proto::RepurposeRequest::default()
    }
}

/// Mounts beside those that every sandbox has.
fn others(spec: &Value) -> impl Iterator<Item = &Value> {
    const STANDARD: [&str; 8] = [
        "/proc",
        "/dev",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/sys",
        "/run",
        "/sys/fs/cgroup",
    ];
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    mounts.filter(|mount| {
        let place = mount["destination"].as_str().unwrap_or_default();
        is_bind(mount) || !STANDARD.contains(&place)
    })
}

fn is_bind(mount: &Value) -> bool {
    mount["type"] == "bind"
        || options(mount)
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

fn options(mount: &Value) -> Vec<String> {
    let options = mount["options"].as_array().into_iter().flatten();
    options.map(text).collect()
}

fn bind(mount: &Value) -> proto::Mount {
    proto::Mount {
        type_: "bind".to_owned(),
        source: text(&mount["source"]),
        target: text(&mount["destination"]),
        options: options(mount),
        ..proto::Mount::default()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_start_gets_limits_and_binds_and_nothing_that_is_there_anyway() {
        let spec = json!({
            "hostname": "h",
            "root": { "readonly": true },
            "mounts": [
                { "destination": "/proc", "type": "proc" },
                { "destination": "/data", "source": "/srv", "options": ["rbind", "ro"] },
            ],
            "linux": { "resources": {
                "memory": { "limit": 5 }, "cpu": { "quota": 50_000, "period": 100_000 },
            } },
        });
        check(&spec).unwrap();
        let request = request(&spec, "a");
        assert_eq!(request.limits.cpu_millis, 500);
        assert_eq!(request.limits.memory_bytes, 5);
        assert_eq!(request.mounts.len(), 1);
        assert_eq!(request.mounts[0].target, "/data");
        assert!(request.read_only_rootfs);
    }

    #[test]
    fn what_a_start_would_leave_out_is_named() {
        let spec = json!({ "mounts": [{ "destination": "/t", "type": "tmpfs" }] });
        assert!(check(&spec).unwrap_err().to_string().contains("tmpfs"));
        let spec = json!({ "process": { "terminal": true } });
        assert!(check(&spec).unwrap_err().to_string().contains("terminal"));
    }
}
