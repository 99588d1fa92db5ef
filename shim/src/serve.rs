//! The daemon: both services on the inherited socket, until nothing is left to serve.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::shim_async::create_task;
use nix::fcntl::Flock;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use trenv_config::Config;
use ttrpc::asynchronous::Server;

use crate::error::Result;
use crate::events::Publisher;
use crate::flags::Flags;
use crate::group::{Endpoint, Group};
use crate::runc::RuncContainer;
use crate::sandbox::Sandboxes;
use crate::start::{LISTENER_FD, READY_FD};
use crate::stdio::{Owner, Uris};
use crate::task::{Container, TaskService, Tasks};
use crate::{logging, reap, sandbox, start, template};

/// After this long a promised container is not waited for any more.
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
const PROMISE_LIMIT: Duration = Duration::from_secs(30);
/// How often a shim without tasks looks whether it is still wanted: one whose `start` was killed
/// never hears from containerd.
const UNUSED_CHECK: Duration = Duration::from_secs(5);
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// The state of one shim process.
pub struct Shim {
    pub config: Arc<Config>,
    pub namespace: String,
    pub publisher: Publisher,
    pub tasks: Tasks,
    pub sandboxes: Arc<Sandboxes>,
    endpoint: Endpoint,
    shutdown: Notify,
}

/// Runs the daemon until it has nothing more to serve.
pub fn run(flags: &Flags) -> anyhow::Result<()> {
    let config = Config::load()?;
    // The bundle that this shim was started for will go before the shim does.
    std::env::set_current_dir("/").context("Failed to change to /")?;
    logging::install(&config, &flags.namespace, flags.debug)
        .context("Failed to open the shim's log")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        // A child that asked to die with its parent dies with the *thread* that made it, so
        // threads that make zygotes must never retire.
        .thread_keep_alive(Duration::from_secs(u64::from(u32::MAX)))
        .enable_all()
        .build()
        .context("Failed to start the async runtime")?;
    let done = runtime.block_on(serve(flags, config));
    if let Err(err) = &done {
        tracing::error!("The shim ends: {err:#}");
    }
    // Blocking work that hangs must not keep an ended shim.
    runtime.shutdown_timeout(Duration::from_millis(200));
    done.map(drop)
}

/// Serves until nothing is left; the lock it returns is to be held until the process ends.
async fn serve(flags: &Flags, config: Config) -> anyhow::Result<Flock<File>> {
    reap::become_subreaper()?;
    let config = Arc::new(config);
    let publisher = Publisher::start(flags);
    let sandboxes = Sandboxes::new(Arc::clone(&config), &flags.namespace, publisher.clone());
    let shim = Arc::new(Shim {
        config,
        namespace: flags.namespace.clone(),
        publisher,
        tasks: Tasks::default(),
        sandboxes,
        endpoint: Endpoint::from_address(&flags.socket),
        shutdown: Notify::new(),
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // A closed log fifo or client must be an error to the writer, never a signal to the shim.
    let _ = signal(SignalKind::pipe())?;
    tokio::spawn(reap::sweep_orphans());
    tokio::spawn(template::guard_memory(Arc::clone(&shim.sandboxes)));

    let mut server = server(&shim)?;
    server.start().await.context("Failed to serve")?;
    say_ready().context("Failed to tell that the shim serves")?;
    tracing::info!(
        "Serving the namespace {} on {}",
        flags.namespace,
        flags.socket
    );

    let mut unused = tokio::time::interval(UNUSED_CHECK);
    unused.tick().await;
    let lock = loop {
        let terminated = tokio::select! {
            () = shim.shutdown.notified() => false,
            _ = unused.tick() => false,
            _ = terminate.recv() => true,
            _ = interrupt.recv() => true,
        };
        if terminated && !shim.tasks.is_empty() {
            // As containerd's own shim: containers outlive a stray signal.
            tracing::warn!("Ignored a signal to end: there are tasks");
            continue;
        }
        if let Some(lock) = shim.leave()? {
            break lock;
        }
    };
    server.stop_listen().await;
    // Together they stay below the three seconds that containerd waits.
    tokio::join!(shim.sandboxes.free(), shim.publisher.flush(FLUSH_LIMIT));
    tracing::info!("Ended: nothing left to serve");
    Ok(lock)
}

fn server(shim: &Arc<Shim>) -> anyhow::Result<Server> {
    let tasks = create_task(Arc::new(TaskService::new(Arc::clone(shim))));
    let own = sandbox::service(shim);
    // SAFETY: `start` gives the listening socket as this descriptor, and nothing else uses it.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER_FD) };
    // Programs that this process runs must not inherit the socket.
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)
        .context("The descriptor 3 must be the listening socket; containerd runs `start` first")?;
    // Once more, so that SO_PEERCRED names this process and not the one that ran `start`.
    rustix::net::listen(&listener, BACKLOG).context("Failed to listen on the inherited socket")?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    let listener = listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::UnixListener::from_std(listener))
        .context("Failed to listen on the inherited socket")?;
    Ok(Server::new()
        .add_listener(trenv_sandbox_proto::socket::listen(listener))
        .register_service(tasks)
        .register_service(own))
}

fn say_ready() -> std::io::Result<()> {
    // SAFETY: `start` gives the pipe as this descriptor, and nothing else uses it.
    let ready = unsafe { OwnedFd::from_raw_fd(READY_FD) };
    rustix::io::write(&ready, b"1")?;
    Ok(())
}

impl Shim {
    /// Makes a container of the kind that its annotations ask for.
    pub async fn create_container(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
    ) -> Result<Arc<dyn Container>> {
        let bundle = Path::new(&request.bundle);
        logging::attach(&request.id, bundle);
        let made: Result<Arc<dyn Container>> = match Group::of_bundle(bundle, &request.id) {
            Ok(Group::Sandboxes) => self.sandboxes.create(request).await,
            Ok(Group::Runc(_)) => match RuncContainer::create(self, request).await {
                Ok(container) => Ok(container),
                Err(err) => Err(err),
            },
            Err(err) => Err(err),
        };
        if made.is_err() {
            logging::detach(&request.id);
        }
        made
    }

    /// Whom a container's streams belong to.
    pub fn owner(&self, id: &str) -> Owner {
        Owner {
            namespace: self.namespace.clone(),
            container: id.to_owned(),
        }
    }

    /// Asks the daemon to end if it can.
    pub fn request_shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Notes that a container which `start` promised has come, or will not come any more; false when
    /// it was not promised, or that was noted before.
    pub fn end_promise(&self, id: &str) -> bool {
        std::fs::remove_file(self.endpoint.promise(id)).is_ok()
    }

    /// Whether `start` has promised a container that has not come yet.
    pub fn is_promised(&self, id: &str) -> bool {
        self.endpoint.promise(id).exists()
    }

    /// Takes the socket away if nothing needs it; no new task can come then. A successor starts
    /// when the returned lock is released: not while this shim still frees what the two would
    /// share, nor while a client's old connection would still be answered.
    fn leave(&self) -> anyhow::Result<Option<Flock<File>>> {
        if !self.tasks.is_empty() {
            return Ok(None);
        }
        let lock = start::lock(&self.endpoint)?;
        // In this order: a promised container is a task before its promise goes.
        if self.has_promises() || !self.tasks.is_empty() {
            return Ok(None);
        }
        let _ = std::fs::remove_file(&self.endpoint.socket);
        let _ = std::fs::remove_dir_all(self.endpoint.promises());
        let file = self.config.shim_address_file(&self.namespace);
        if std::fs::read_to_string(&file).is_ok_and(|text| text == self.endpoint.address()) {
            let _ = std::fs::remove_file(&file);
        }
        // The lock file stays: removing it would let two processes hold "the" lock.
        Ok(Some(lock))
    }

    fn has_promises(&self) -> bool {
        let Ok(entries) = std::fs::read_dir(self.endpoint.promises()) else {
            return false;
        };
        let now = SystemTime::now();
        entries
            .flatten()
            .filter_map(|entry| entry.metadata().ok()?.modified().ok())
            .any(|made| now.duration_since(made).unwrap_or_default() < PROMISE_LIMIT)
    }
}

/// The streams that a create request asks for.
pub fn uris(request: &CreateTaskRequest) -> Uris {
    Uris {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    }
}
