//! Tasks: the running sandboxes.

use containerd_client::services::v1 as services;
use containerd_client::services::v1::tasks_client::TasksClient;

use super::snapshots::to_wire;
use super::{Mount, Namespaced, Result, refused};

impl Namespaced {
    /// Makes the task of container `id` on `rootfs`, with its output going to `output`; returns
    /// the host pid.
    pub async fn create_task(&self, id: &str, rootfs: &[Mount], output: &str) -> Result<u32> {
        let request = self.request(services::CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: rootfs.iter().map(to_wire).collect(),
            stdout: output.to_owned(),
            stderr: output.to_owned(),
            ..Default::default()
        });
        let answer = TasksClient::new(self.channel.clone())
            .create(request)
            .await
            .map_err(refused(format!("make the task of container {id}")))?;
        Ok(answer.into_inner().pid)
    }

    /// Starts the task's process.
    pub async fn start_task(&self, id: &str) -> Result<u32> {
        let request = self.request(services::StartRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        });
        let answer = TasksClient::new(self.channel.clone())
            .start(request)
            .await
            .map_err(refused(format!("start the task of container {id}")))?;
        Ok(answer.into_inner().pid)
    }

    /// Sends `signal`; a task that is gone is no error.
    pub async fn kill_task(&self, id: &str, signal: i32) -> Result<()> {
        let request = self.request(services::KillRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
            signal: signal.unsigned_abs(),
            all: false,
        });
        let killed = TasksClient::new(self.channel.clone())
            .kill(request)
            .await
            .map_err(refused(format!("signal the task of container {id}")));
        match killed {
            Err(err) if !err.is_not_found() => Err(err),
            _ => Ok(()),
        }
    }

    /// Waits for the task's end and returns its status.
    pub async fn wait_task(&self, id: &str) -> Result<u32> {
        let request = self.request(services::WaitRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
        });
        let answer = TasksClient::new(self.channel.clone())
            .wait(request)
            .await
            .map_err(refused(format!("wait for the task of container {id}")))?;
        Ok(answer.into_inner().exit_status)
    }

    /// Deletes an ended task; one that does not exist is no error.
    pub async fn delete_task(&self, id: &str) -> Result<()> {
        let request = self.request(services::DeleteTaskRequest {
            container_id: id.to_owned(),
        });
        let deleted = TasksClient::new(self.channel.clone())
            .delete(request)
            .await
            .map_err(refused(format!("delete the task of container {id}")));
        match deleted {
            Err(err) if !err.is_not_found() => Err(err),
            _ => Ok(()),
        }
    }

    /// Ids of the containers that have a task which has not ended.
    pub async fn running_tasks(&self) -> Result<Vec<String>> {
        let request = self.request(services::ListTasksRequest::default());
        let answer = TasksClient::new(self.channel.clone())
            .list(request)
            .await
            .map_err(refused("list tasks"))?;
        let stopped = containerd_client::types::v1::Status::Stopped as i32;
        Ok(answer
            .into_inner()
            .tasks
            .into_iter()
            .filter(|t| t.status != stopped)
            .map(|t| {
                if t.container_id.is_empty() {
                    t.id
                } else {
                    t.container_id
                }
            })
            .collect())
    }
}
