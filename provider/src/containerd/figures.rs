//! What tasks use, out of containerd's metrics. Only the fields that the provider shows are read.

use std::collections::HashMap;

use containerd_client::services::v1 as services;
use containerd_client::services::v1::tasks_client::TasksClient;
use prost::Message;

use super::{Namespaced, Result, refused};

/// Figures of one task's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TaskFigures {
    /// Processor time, ever growing.
    pub cpu_ns: u64,
    /// Memory that the kernel cannot simply take back.
    pub memory_bytes: u64,
}

/// `io.containerd.cgroups.v1.Metrics`.
#[derive(Clone, PartialEq, Message)]
struct MetricsV1 {
    #[prost(message, optional, tag = "3")]
    cpu: Option<CpuV1>,
    #[prost(message, optional, tag = "4")]
    memory: Option<MemoryV1>,
}

#[derive(Clone, PartialEq, Message)]
struct CpuV1 {
    #[prost(message, optional, tag = "1")]
    usage: Option<CpuUsageV1>,
}

#[derive(Clone, PartialEq, Message)]
struct CpuUsageV1 {
    #[prost(uint64, tag = "1")]
    total_ns: u64,
}

#[derive(Clone, PartialEq, Message)]
struct MemoryV1 {
    #[prost(uint64, tag = "30")]
    total_inactive_file: u64,
    #[prost(message, optional, tag = "33")]
    usage: Option<MemoryUsageV1>,
}

#[derive(Clone, PartialEq, Message)]
struct MemoryUsageV1 {
    #[prost(uint64, tag = "2")]
    usage: u64,
}

/// `io.containerd.cgroups.v2.Metrics`.
#[derive(Clone, PartialEq, Message)]
struct MetricsV2 {
    #[prost(message, optional, tag = "2")]
    cpu: Option<CpuV2>,
    #[prost(message, optional, tag = "4")]
    memory: Option<MemoryV2>,
}

#[derive(Clone, PartialEq, Message)]
struct CpuV2 {
    #[prost(uint64, tag = "1")]
    usage_us: u64,
}

#[derive(Clone, PartialEq, Message)]
struct MemoryV2 {
    #[prost(uint64, tag = "13")]
    inactive_file: u64,
    #[prost(uint64, tag = "32")]
    usage: u64,
}

impl Namespaced {
    /// The figures of these containers' tasks, in one request; tasks that are gone are left out.
    pub async fn task_figures(&self, ids: &[String]) -> Result<HashMap<String, TaskFigures>> {
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let request = self.request(services::MetricsRequest {
            filters: ids.iter().map(|id| format!("id=={id}")).collect(),
        });
        let answer = TasksClient::new(self.channel.clone())
            .metrics(request)
            .await
            .map_err(refused("measure tasks"))?;
        Ok(answer
            .into_inner()
            .metrics
            .into_iter()
            .filter_map(|metric| {
                let data = metric.data?;
                Some((metric.id, read(&data.type_url, &data.value)?))
            })
            .collect())
    }
}

fn read(kind: &str, value: &[u8]) -> Option<TaskFigures> {
    if kind.ends_with("cgroups.v2.Metrics") {
        let metrics = MetricsV2::decode(value).ok()?;
        let memory = metrics.memory.unwrap_or_default();
        return Some(TaskFigures {
            cpu_ns: metrics.cpu.unwrap_or_default().usage_us * 1000,
            memory_bytes: memory.usage.saturating_sub(memory.inactive_file),
        });
    }
    let metrics = MetricsV1::decode(value).ok()?;
    let memory = metrics.memory.unwrap_or_default();
    let usage = memory.usage.unwrap_or_default().usage;
    Some(TaskFigures {
        cpu_ns: metrics.cpu?.usage?.total_ns,
        memory_bytes: usage.saturating_sub(memory.total_inactive_file),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_read() {
        let v1 = MetricsV1 {
            cpu: Some(CpuV1 {
                usage: Some(CpuUsageV1 { total_ns: 7_000 }),
            }),
            memory: Some(MemoryV1 {
                total_inactive_file: 1,
                usage: Some(MemoryUsageV1 { usage: 10 }),
            }),
        };
        let v2 = MetricsV2 {
            cpu: Some(CpuV2 { usage_us: 7 }),
            memory: Some(MemoryV2 {
                inactive_file: 1,
                usage: 10,
            }),
        };
        let wanted = Some(TaskFigures {
            cpu_ns: 7_000,
            memory_bytes: 9,
        });
        let first = read("io.containerd.cgroups.v1.Metrics", &v1.encode_to_vec());
        let second = read("io.containerd.cgroups.v2.Metrics", &v2.encode_to_vec());
        assert_eq!(first, wanted);
        assert_eq!(second, wanted);
        assert_eq!(read("io.containerd.cgroups.v1.Metrics", &[]), None);
    }
}
