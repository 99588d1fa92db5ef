//! Requests of `trenv.sandbox.v1` in the shim's own terms, checked.

use std::time::Duration;

use serde::Deserialize;
use serde_json::value::RawValue;
use trenv_sandbox::cgroup::Limits;
use trenv_sandbox::rootfs::Mount;
use trenv_sandbox_proto as proto;
use trenv_snapshot::methods::Method;

use super::spec::{PartSpec, RootSpec, hostname_of};
use super::tenancy::{Seccomp, TemplateRef};
use crate::error::{Result, ShimError};

const DEADLINE: Duration = Duration::from_secs(10);
const DEADLINE_MAX: Duration = Duration::from_secs(300);

/// A checked repurpose request.
pub struct Plan {
    pub tenancy: String,
    pub template: TemplateRef,
    pub rootfs: Vec<Mount>,
    pub root: RootSpec,
    pub limits: Limits,
    pub seccomp: Option<Seccomp>,
    pub spec_json: String,
    pub input: String,
    pub deadline: Duration,
    pub park: bool,
}

/// What a start needs of the OCI spec; reading all of it would take longer than the swap of roots.
#[derive(Default, Deserialize)]
struct NeededSpec {
    linux: Option<NeededLinux>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NeededLinux {
    seccomp: Option<Box<RawValue>>,
    masked_paths: Vec<String>,
    readonly_paths: Vec<String>,
}

impl Plan {
    pub fn of(request: proto::RepurposeRequest) -> Result<Self> {
        let template = template_ref(&request.template_id, request.generation, &request.method)?;
        if request.park && template.method != Method::Template {
            return Err(ShimError::InvalidArgument(format!(
                "The start method {} cannot park a function; only {} can",
                template.method,
                Method::Template
            )));
        }
        let spec: NeededSpec = if request.spec_json.is_empty() {
            NeededSpec::default()
        } else {
            serde_json::from_str(&request.spec_json).map_err(|err| {
                ShimError::InvalidArgument(format!("spec_json is not an OCI spec: {err}"))
            })?
        };
        let linux = spec.linux.unwrap_or_default();
        let mut mounts = Vec::new();
        for mount in &request.mounts {
            let (source, target) = (mount.source.clone().into(), mount.target.clone().into());
            mounts.push(PartSpec::bind(source, target, &mount.options)?);
        }
        let hostname = if request.hostname.is_empty() {
            hostname_of(&request.tenancy)
        } else {
            request.hostname
        };
        Ok(Self {
            template,
            tenancy: request.tenancy,
            rootfs: mounts_of(&request.rootfs),
            root: RootSpec {
                read_only: request.read_only_rootfs,
                hostname,
                mounts,
                masked_paths: linux.masked_paths,
                readonly_paths: linux.readonly_paths,
            },
            limits: limits_of(request.limits.as_ref()),
            seccomp: linux.seccomp.map(Seccomp::Text),
            spec_json: request.spec_json,
            input: request.input,
            deadline: match request.deadline_ms {
                0 => DEADLINE,
                ms => Duration::from_millis(u64::from(ms)).min(DEADLINE_MAX),
            },
            park: request.park,
        })
    }
}

/// A template as a request names it.
pub fn template_ref(id: &str, generation: u64, method: &str) -> Result<TemplateRef> {
    let method =
        Method::parse(method).map_err(|err| ShimError::InvalidArgument(err.to_string()))?;
    let id = id.parse().map_err(|err: trenv_pool::InvalidTemplateId| {
        ShimError::InvalidArgument(err.to_string())
    })?;
    Ok(TemplateRef {
        id,
        generation,
        method,
    })
}

/// Mounts as a request names them.
pub fn mounts_of(mounts: &[proto::Mount]) -> Vec<Mount> {
    mounts
        .iter()
        .map(|mount| Mount {
            kind: mount.type_.clone(),
            source: mount.source.clone(),
            options: mount.options.clone(),
        })
        .collect()
}

/// Limits as a request names them; 0 is none.
pub fn limits_of(limits: Option<&proto::Limits>) -> Limits {
    const PERIOD_US: u64 = 100_000;
    let Some(limits) = limits else {
        return Limits::default();
    };
    let some = |value: u64| i64::try_from(value).ok().filter(|value| *value > 0);
    let quota = limits.cpu_millis.saturating_mul(PERIOD_US / 1000);
    Limits {
        memory: some(limits.memory_bytes),
        cpu_quota_us: some(quota),
        cpu_period_us: some(quota).map(|_| PERIOD_US),
        pids: some(limits.pids),
        ..Limits::default()
    }
}
