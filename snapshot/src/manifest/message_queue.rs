//! SysV message queues (sysvipc(7)).

use serde::{Deserialize, Serialize};

use super::{Manifest, ManifestError};

/// A queue with what waits in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    pub id: i32,
    pub key: i32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes that may wait in it.
    pub room: u64,
    /// The oldest first.
    pub messages: Vec<QueueMessage>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueMessage {
    pub kind: i64,
    pub text: Vec<u8>,
}

pub fn check(manifest: &Manifest) -> Result<(), ManifestError> {
    for queue in &manifest.message_queues {
        if queue.id < 0 || queue.messages.iter().any(|message| message.kind < 1) {
            return Err(ManifestError::Invalid {
                what: format!("the SysV message queue {}", queue.id),
            });
        }
    }
    Ok(())
}
