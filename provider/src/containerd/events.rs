//! Events: how the provider learns that a sandbox has ended.

use containerd_client::events;
use containerd_client::services::v1 as services;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::types::Envelope;
use prost::Message;

use super::{Containerd, Result, refused};

/// The end of a task's root process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskExit {
    pub namespace: String,
    pub container: String,
    pub status: u32,
}

impl Containerd {
    /// Calls `each` for every end of a task in any namespace, until containerd ends the stream.
    /// `connected` is called once the subscription stands: what ended before is not told.
    pub async fn watch_exits(
        &self,
        connected: impl FnOnce(),
        mut each: impl FnMut(TaskExit),
    ) -> Result<()> {
        let mut stream = EventsClient::new(self.channel.clone())
            .subscribe(services::SubscribeRequest {
                filters: vec!["topic==\"/tasks/exit\"".to_owned()],
            })
            .await
            .map_err(refused("report events"))?
            .into_inner();
        connected();
        while let Some(envelope) = stream.message().await.map_err(refused("report events"))? {
            if let Some(exit) = read_exit(&envelope) {
                each(exit);
            }
        }
        Ok(())
    }
}

fn read_exit(envelope: &Envelope) -> Option<TaskExit> {
    let any = envelope.event.as_ref()?;
    let exit = events::TaskExit::decode(any.value.as_slice()).ok()?;
    // The end of an additional process (`task exec`) carries that process's id.
    (exit.id == exit.container_id).then(|| TaskExit {
        namespace: envelope.namespace.clone(),
        container: exit.container_id,
        status: exit.exit_status,
    })
}
