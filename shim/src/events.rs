//! Events to containerd: one queue, sent in order, retried until containerd is back.
//!
//! The queue is a shim's only one, so the events of a container never overtake each other. Sending
//! goes by ttrpc to the address that containerd gave in `TTRPC_ADDRESS`; without one, by
//! `containerd publish`. An event leaves the queue when containerd has taken it, so a reply lost on
//! the way may deliver it twice, which containerd's subscribers accept. The queue holds 65 536
//! events; while it is full, new ones are dropped, each with an error in the log, and those that it
//! holds keep their order.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task as message;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Notify, mpsc};
use ttrpc::context;

use crate::error::{Result, ShimError};
use crate::flags::Flags;

/// More events than this waiting for containerd means that it will not come back for them.
const QUEUE_MAX: usize = 65_536;
const SEND_LIMIT: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);

/// The queue's end that the rest of the shim holds.
#[derive(Debug, Clone)]
pub struct Publisher {
    queue: mpsc::UnboundedSender<Envelope>,
    waiting: Arc<AtomicUsize>,
    empty: Arc<Notify>,
    namespace: Arc<str>,
}

/// The event types that the shim sends, each with its topic.
pub trait TaskEvent: Message {
    const TOPIC: &'static str;
    const TYPE: &'static str;
}

macro_rules! task_events {
    ($($message:ident $topic:ident,)*) => {
        $(impl TaskEvent for message::$message {
            const TOPIC: &'static str = topics::$topic;
            const TYPE: &'static str = concat!("containerd.events.", stringify!($message));
        })*
    };
}

task_events! {
    TaskCreate TASK_CREATE_EVENT_TOPIC,
    TaskStart TASK_START_EVENT_TOPIC,
    TaskExit TASK_EXIT_EVENT_TOPIC,
    TaskDelete TASK_DELETE_EVENT_TOPIC,
    TaskOOM TASK_OOM_EVENT_TOPIC,
    TaskExecAdded TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused TASK_PAUSED_EVENT_TOPIC,
    TaskResumed TASK_RESUMED_EVENT_TOPIC,
}

/// A point in time in protobuf's form.
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(at))
}

impl Publisher {
    /// Starts the sender of this shim.
    pub fn start(flags: &Flags) -> Self {
        let target = match std::env::var("TTRPC_ADDRESS") {
            Ok(address) if !address.is_empty() => Target::Ttrpc {
                address,
                client: None,
            },
            _ => Target::Binary {
                binary: flags.publish_binary.clone(),
                address: flags.address.clone(),
            },
        };
        Self::start_to(flags, target)
    }

    fn start_to(flags: &Flags, target: Target) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        let publisher = Self {
            queue,
            waiting: Arc::default(),
            empty: Arc::default(),
            namespace: flags.namespace.as_str().into(),
        };
        let sender = Sender {
            target,
            waiting: Arc::clone(&publisher.waiting),
            empty: Arc::clone(&publisher.empty),
        };
        tokio::spawn(sender.run(receiver));
        publisher
    }

    /// Queues an event. Never waits.
    pub fn publish<E: TaskEvent>(&self, event: &E) {
        if self.waiting.load(Ordering::Relaxed) >= QUEUE_MAX {
            tracing::error!(
                "Dropped an event for {}: {QUEUE_MAX} events wait for containerd",
                E::TOPIC
            );
            return;
        }
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(err) => {
                tracing::error!("Failed to encode an event for {}: {err}", E::TOPIC);
                return;
            }
        };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.to_string(),
            topic: E::TOPIC.into(),
            event: MessageField::some(Any {
                type_url: E::TYPE.into(),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // The receiver lives as long as the process.
        let _ = self.queue.send(envelope);
    }

    /// Waits until containerd has everything, at most for `limit`.
    pub async fn flush(&self, limit: Duration) {
        let done = async {
            loop {
                let empty = self.empty.notified();
                if self.waiting.load(Ordering::Relaxed) == 0 {
                    return;
                }
                empty.await;
            }
        };
        if tokio::time::timeout(limit, done).await.is_err() {
            let lost = self.waiting.load(Ordering::Relaxed);
            tracing::warn!("{lost} events were not taken by containerd before the shim ended");
        }
    }
}

struct Sender {
    target: Target,
    waiting: Arc<AtomicUsize>,
    empty: Arc<Notify>,
}

enum Target {
    Ttrpc {
        address: String,
        client: Option<EventsClient>,
    },
    Binary {
        binary: String,
        address: String,
    },
}

impl Sender {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Envelope>) {
        while let Some(envelope) = queue.recv().await {
            let mut pause = RETRY_FIRST;
            let mut told = false;
            while let Err(err) = self.target.send(&envelope).await {
                if !told {
                    told = true;
                    tracing::warn!(
                        "An event for {} waits until containerd takes it: {}",
                        envelope.topic,
                        err.chain()
                    );
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
            if self.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
                self.empty.notify_waiters();
            }
        }
    }
}

impl Target {
    async fn send(&mut self, envelope: &Envelope) -> Result<()> {
        match self {
            Self::Ttrpc { address, client } => {
                let connected = match client.take() {
                    Some(client) => client,
                    None => connect(address).await?,
                };
                let request = ForwardRequest {
                    envelope: MessageField::some(envelope.clone()),
                    ..ForwardRequest::default()
                };
                connected
                    .forward(context::with_duration(SEND_LIMIT), &request)
                    .await
                    .map_err(ShimError::engine("forward an event to containerd"))?;
                // Kept only after a success: a broken connection never heals.
                *client = Some(connected);
                Ok(())
            }
            Self::Binary { binary, address } => publish_by_binary(binary, address, envelope).await,
        }
    }
}

async fn connect(address: &str) -> Result<EventsClient> {
    let url = if address.starts_with("unix://") {
        address.to_owned()
    } else {
        format!("unix://{address}")
    };
    let client = tokio::time::timeout(SEND_LIMIT, Client::connect(&url))
        .await
        .map_err(|_| ShimError::Timeout {
            what: format!("Connecting to {address}"),
            limit: SEND_LIMIT,
        })?;
    Ok(EventsClient::new(
        client.map_err(ShimError::engine("connect to containerd"))?,
    ))
}

async fn publish_by_binary(binary: &str, address: &str, envelope: &Envelope) -> Result<()> {
    let action = || ShimError::io(format!("publish an event with {binary}"));
    let body = envelope
        .event
        .get_or_default()
        .write_to_bytes()
        .map_err(ShimError::engine("encode an event"))?;
    let mut child = tokio::process::Command::new(binary)
        .args(["--address", address, "publish"])
        .args([
            "--topic",
            &envelope.topic,
            "--namespace",
            &envelope.namespace,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(action())?;
    let sent = async {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&body).await?;
        }
        child.wait().await
    };
    let status = tokio::time::timeout(SEND_LIMIT, sent)
        .await
        .map_err(|_| ShimError::Timeout {
            what: format!("{binary} publish"),
            limit: SEND_LIMIT,
        })?
        .map_err(action())?;
    if status.success() {
        Ok(())
    } else {
        Err(ShimError::Fault(format!(
            "{binary} publish ended with {status}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::ffi::OsString;
    use std::sync::Mutex;

    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use ttrpc::asynchronous::{Server, TtrpcContext};

    /// Takes events as containerd does, but refuses every third one once.
    struct Sink {
        taken: Mutex<Vec<u32>>,
        refused: Mutex<HashMap<u32, bool>>,
    }

    #[async_trait::async_trait]
    impl Events for Sink {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let exit = message::TaskExit::parse_from_bytes(&request.envelope.event.value).unwrap();
            let refused = self.refused.lock().unwrap().insert(exit.pid, true);
            if exit.pid % 3 == 0 && refused.is_none() {
                return Err(ShimError::Fault("not now".into()).into());
            }
            self.taken.lock().unwrap().push(exit.pid);
            Ok(Empty::default())
        }
    }

    /// A publisher to a containerd that does not answer yet.
    fn publisher_to(address: &str) -> Publisher {
        let flags = Flags::parse(["-namespace", "n"].map(OsString::from)).unwrap();
        let target = Target::Ttrpc {
            address: address.to_owned(),
            client: None,
        };
        Publisher::start_to(&flags, target)
    }

    #[tokio::test]
    async fn a_full_queue_takes_no_more_events() {
        let directory = tempfile::tempdir().unwrap();
        let publisher = publisher_to(&directory.path().join("none").display().to_string());
        for _ in 0..QUEUE_MAX + 10 {
            publisher.publish(&message::TaskPaused::default());
        }
        assert_eq!(publisher.waiting.load(Ordering::Relaxed), QUEUE_MAX);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn events_wait_for_containerd_and_keep_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("c.sock.ttrpc").display().to_string();
        let publisher = publisher_to(&address);
        for pid in 0..20 {
            publisher.publish(&message::TaskExit {
                pid,
                ..message::TaskExit::default()
            });
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        let sink = Arc::new(Sink {
            taken: Mutex::default(),
            refused: Mutex::default(),
        });
        let mut server = Server::new()
            .bind(&format!("unix://{address}"))
            .unwrap()
            .register_service(create_events(sink.clone()));
        server.start().await.unwrap();
        publisher.flush(Duration::from_secs(20)).await;
        assert_eq!(*sink.taken.lock().unwrap(), (0..20).collect::<Vec<u32>>());
    }
}
