//! The scheduler: takes, starts and returns instances.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::plan::Plan;
use super::table::{Connection, Entry, Instance, InstanceView, State, Table};
use super::{ColdStart, Guard, SandboxOps, SandboxRef, StartError, StartKind};
use crate::functions::{FunctionName, Revision, RevisionState, Template};
use crate::metrics::Metrics;
use crate::shim_client::Step;

/// How many sandboxes there may be and how long they are kept.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// Sandboxes at most.
    pub limit: usize,
    /// Idle sandboxes kept ready in each namespace.
    pub idle: usize,
    /// Sandboxes that hold a parked instance, at most.
    pub parked: usize,
    /// After which an idle instance gives up its sandbox.
    pub keep_alive: Option<Duration>,
    /// How long a call may wait for a sandbox.
    pub patience: Duration,
}

/// See the module's text.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) ops: Arc<dyn SandboxOps>,
    pub(super) options: SchedulerOptions,
    pub(super) table: Mutex<Table>,
    pub(super) namespaces: Mutex<BTreeSet<String>>,
    /// Something became available.
    pub(super) freed: Notify,
    /// The upkeep has something to do.
    pub(super) upkeep: Notify,
    /// Held while instances are started that no call asks for, so that there are not too many.
    pub(super) growing: tokio::sync::Mutex<()>,
    /// Revisions whose template turned out to be gone.
    pub(super) template_gone: tokio::sync::mpsc::UnboundedSender<Arc<Revision>>,
    pub(super) metrics: Arc<Metrics>,
}

impl Scheduler {
    /// A scheduler without sandboxes. Revisions whose template is gone are sent to
    /// `template_gone`.
    pub fn new(
        ops: Arc<dyn SandboxOps>,
        options: SchedulerOptions,
        metrics: Arc<Metrics>,
        template_gone: tokio::sync::mpsc::UnboundedSender<Arc<Revision>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            ops,
            options,
            table: Mutex::default(),
            namespaces: Mutex::default(),
            freed: Notify::new(),
            upkeep: Notify::new(),
            growing: tokio::sync::Mutex::default(),
            template_gone,
            metrics,
        })
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        // A panic elsewhere leaves the table consistent: every change to it is one assignment.
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes an instance of `revision`, starting one if need be, for a call of this input.
    ///
    /// # Errors
    /// When none can be had in time, or it cannot be started.
    pub async fn acquire(
        self: &Arc<Self>,
        revision: &Arc<Revision>,
        input: &str,
    ) -> Result<Guard, StartError> {
        let deadline = tokio::time::Instant::now() + self.options.patience;
        let mut state = revision.watch();
        let mut attempts = 0;
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            let current = state.borrow_and_update().clone();
            let template = match current {
                RevisionState::Failed(reason) => {
                    return Err(StartError::Failed {
                        function: revision.function().to_string(),
                        reason,
                    });
                }
                RevisionState::Building => {
                    // While a lost template is made anew, the instances that run go on.
                    if let Some(guard) = self.acquire_warm(revision) {
                        return Ok(guard);
                    }
                    if tokio::time::timeout_at(deadline, state.changed())
                        .await
                        .is_err()
                    {
                        return Err(StartError::Building {
                            function: revision.function().to_string(),
                            seconds: self.options.patience.as_secs(),
                        });
                    }
                    continue;
                }
                RevisionState::Ready(template) => Some(template),
                RevisionState::Cold(_) => None,
            };
            if revision.retired() {
                return Err(StartError::Removed {
                    function: revision.function().to_string(),
                });
            }
            let plan = {
                let mut table = self.table();
                if table.stopping {
                    return Err(StartError::Stopping);
                }
                match table.plan(revision, template.is_some(), self.options.limit) {
                    Plan::Warm(id) => match self.warm_guard(&mut table, &id) {
                        Some(guard) => return Ok(guard),
                        None => continue,
                    },
                    plan => plan,
                }
            };
            if matches!(plan, Plan::Wait) {
                let waited = tokio::time::timeout_at(deadline, async {
                    tokio::select! {
                        () = &mut freed => {}
                        _ = state.changed() => {}
                    }
                });
                if waited.await.is_err() {
                    return Err(StartError::Busy {
                        limit: self.options.limit,
                        seconds: self.options.patience.as_secs(),
                    });
                }
                continue;
            }
            attempts += 1;
            match self.start_detached(plan, revision, template, input).await {
                Ok(guard) => return Ok(guard),
                // The sandbox may have been the cause; a second one tells.
                Err(err @ StartError::Start { .. }) if attempts < 2 => {
                    tracing::warn!("{err}; another sandbox is tried");
                }
                Err(err @ StartError::ShimGone { .. }) if attempts < 2 => {
                    tracing::warn!("{err}; a new sandbox is tried");
                    self.shim_gone(&revision.function().namespace);
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// Starts one more instance, whatever instances there are, and leaves it idle. Other
    /// functions' instances give way to it when `evict` says so.
    ///
    /// # Errors
    /// When there is no room now, or it cannot be started.
    pub async fn start_another(
        self: &Arc<Self>,
        revision: &Arc<Revision>,
        evict: bool,
    ) -> Result<(), StartError> {
        let template = revision.template();
        let limit = self.options.limit;
        let plan = match evict {
            true => self.table().plan_start(revision, template.is_some(), limit),
            false => self.table().plan_spare(revision, template.is_some(), limit),
        };
        if matches!(plan, Plan::Wait) {
            return Err(StartError::Busy {
                limit: self.options.limit,
                seconds: 0,
            });
        }
        self.start_detached(plan, revision, template, "").await?;
        Ok(())
    }

    /// Runs a start in a task of its own: a client that goes away meanwhile leaves an idle
    /// instance, never a sandbox in between.
    async fn start_detached(
        self: &Arc<Self>,
        plan: Plan,
        revision: &Arc<Revision>,
        template: Option<Template>,
        input: &str,
    ) -> Result<Guard, StartError> {
        let input = input.to_owned();
        let this = Arc::clone(self);
        let revision = Arc::clone(revision);
        let function = revision.function().to_string();
        let task = tokio::spawn(async move { this.start(plan, &revision, template, &input).await });
        task.await.unwrap_or_else(|err| {
            Err(StartError::Start {
                function,
                reason: err.to_string(),
            })
        })
    }

    async fn start(
        self: &Arc<Self>,
        plan: Plan,
        revision: &Arc<Revision>,
        template: Option<Template>,
        input: &str,
    ) -> Result<Guard, StartError> {
        let begun = Instant::now();
        let mut steps: Vec<Step> = Vec::new();
        if template.is_some() {
            self.table().note_start(revision);
        }
        let (sandbox, kind, fresh) = match plan {
            Plan::Resume(sandbox, parked) => {
                return self.resume(sandbox, parked, begun).await;
            }
            Plan::Repurpose(sandbox) => (sandbox, StartKind::Repurposed, false),
            Plan::Evict(sandbox, tenancy) => {
                let served = self.served(&sandbox.id);
                match self.ops.reset(&sandbox, &tenancy, served.as_deref()).await {
                    Ok(taken) => steps.extend(taken),
                    Err(err) => {
                        self.discard(&sandbox, Some(&tenancy)).await;
                        return Err(err);
                    }
                }
                (sandbox, StartKind::Evicted, false)
            }
            Plan::Create(sandbox) => (sandbox, StartKind::Cold, true),
            Plan::Replace { old, tenancy, new } => {
                self.discard(&old, tenancy.as_deref()).await;
                (new, StartKind::Cold, true)
            }
            Plan::Warm(_) | Plan::Wait => return Err(StartError::Stopping),
        };
        let from = template.as_ref().map(|template| (template, input));
        let started = self.fill(&sandbox, revision, from, fresh, &mut steps).await;
        let (address, tenancy) = match started {
            Ok(started) => started,
            Err(err) => {
                self.discard(&sandbox, None).await;
                if let StartError::TemplateGone { .. } = err {
                    // Nobody listens any more only while the provider stops.
                    let _ = self.template_gone.send(Arc::clone(revision));
                }
                return Err(err);
            }
        };
        self.metrics.start(kind, begun.elapsed(), &steps);
        self.upkeep.notify_one();
        let guard = self.put_serving(&sandbox, revision, tenancy, address, kind, steps);
        guard.ok_or_else(|| StartError::Start {
            function: revision.function().to_string(),
            reason: "its sandbox ended while it started".to_owned(),
        })
    }

    async fn fill(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        from: Option<(&Template, &str)>,
        fresh: bool,
        steps: &mut Vec<Step>,
    ) -> Result<(SocketAddr, String), StartError> {
        let Some((template, input)) = from else {
            let cold = self.ops.cold_start(sandbox, revision).await?;
            steps.extend(cold.steps);
            return Ok((cold.address, cold.tenancy));
        };
        let address = if fresh {
            let begun = Instant::now();
            let address = self.ops.create_idle(sandbox).await?;
            steps.push(("sandbox".to_owned(), micros(begun.elapsed())));
            self.set_address(&sandbox.id, address);
            address
        } else {
            self.address(&sandbox.id).ok_or_else(|| StartError::Start {
                function: revision.function().to_string(),
                reason: "its sandbox ended before it started".to_owned(),
            })?
        };
        let repurposed = self.ops.repurpose(sandbox, revision, template, input);
        let (tenancy, taken) = repurposed.await?;
        steps.extend(taken);
        Ok((address, tenancy))
    }

    /// Ends a hold. Called by the guard.
    pub(super) fn release(
        self: &Arc<Self>,
        id: &str,
        tenancy: &str,
        broken: bool,
        connection: Option<Connection>,
    ) {
        let mut table = self.table();
        let stopping = table.stopping;
        let Some(entry) = table.entries.get_mut(id) else {
            return;
        };
        let State::Serving(instance) = &mut entry.state else {
            return;
        };
        if instance.tenancy != tenancy {
            return;
        }
        instance.in_flight = instance.in_flight.saturating_sub(1);
        instance.last_used = Instant::now();
        instance.broken |= broken;
        if let Some(mut connection) = connection
            && !instance.broken
        {
            connection.idle_since = instance.last_used;
            instance.connections.push(connection);
        }
        let (broken, retired) = (instance.broken, instance.revision.retired());
        if instance.in_flight == 0 && (broken || retired) && !stopping {
            if let Some((sandbox, tenancy)) = table.take(id) {
                let this = Arc::clone(self);
                tokio::spawn(async move {
                    if broken {
                        this.discard(&sandbox, tenancy.as_deref()).await;
                    } else {
                        this.reset_to_idle(&sandbox, tenancy.as_deref()).await;
                    }
                });
            }
            return;
        }
        drop(table);
        self.freed.notify_one();
    }

    /// Resets a busy sandbox; one that cannot be reset is destroyed.
    pub(super) async fn reset_to_idle(
        self: &Arc<Self>,
        sandbox: &SandboxRef,
        tenancy: Option<&str>,
    ) {
        let served = self.served(&sandbox.id);
        if let Some(tenancy) = tenancy
            && let Err(err) = self.ops.reset(sandbox, tenancy, served.as_deref()).await
        {
            tracing::warn!(sandbox = sandbox.id, "{err}; the sandbox is destroyed");
            self.discard(sandbox, Some(tenancy)).await;
            return;
        }
        self.put_idle(sandbox);
    }

    fn served(&self, id: &str) -> Option<String> {
        self.table().entries.get(id)?.served.clone()
    }

    /// Makes a busy sandbox available.
    pub fn put_idle(self: &Arc<Self>, sandbox: &SandboxRef) {
        let alive = self.table().set_idle(&sandbox.id);
        if !alive {
            let (this, sandbox) = (Arc::clone(self), sandbox.clone());
            tokio::spawn(async move { this.discard(&sandbox, None).await });
            return;
        }
        self.freed.notify_one();
        self.upkeep.notify_one();
    }

    /// Destroys a sandbox and forgets it.
    pub async fn discard(&self, sandbox: &SandboxRef, tenancy: Option<&str>) {
        self.ops.destroy(sandbox, tenancy).await;
        self.table().forget(&sandbox.id);
        self.freed.notify_one();
        self.upkeep.notify_one();
    }

    /// Takes a sandbox whose task has ended out of service; its open calls end at once.
    pub fn sandbox_died(self: &Arc<Self>, id: &str) {
        let taken = {
            let mut table = self.table();
            let Some(entry) = table.entries.get(id) else {
                return;
            };
            entry.gone.cancel();
            if matches!(entry.state, State::Busy) {
                // Whoever made it busy sees the failure and cleans up.
                return;
            }
            let taken = table.take(id);
            // It makes room at once; what is left of it does not serve anybody.
            table.forget(id);
            taken
        };
        if let Some((sandbox, tenancy)) = taken {
            let this = Arc::clone(self);
            tokio::spawn(async move { this.discard(&sandbox, tenancy.as_deref()).await });
        }
        self.freed.notify_one();
    }

    /// Takes every sandbox of a namespace out of service: its shim is gone, and they with it.
    pub fn shim_gone(self: &Arc<Self>, namespace: &str) {
        let ids: Vec<String> = {
            let table = self.table();
            let of_namespace = table
                .entries
                .iter()
                .filter(|(_, e)| e.namespace == namespace);
            of_namespace.map(|(id, _)| id.clone()).collect()
        };
        for id in ids {
            self.sandbox_died(&id);
        }
    }

    /// Makes room for and reserves a new sandbox, for a start outside a call.
    ///
    /// # Errors
    /// When there is no room in time.
    pub async fn reserve(
        self: &Arc<Self>,
        revision: &Arc<Revision>,
    ) -> Result<SandboxRef, StartError> {
        let deadline = tokio::time::Instant::now() + self.options.patience;
        loop {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            let plan = self.table().plan_new(revision, self.options.limit);
            match plan {
                Plan::Create(sandbox) => return Ok(sandbox),
                Plan::Replace { old, tenancy, new } => {
                    self.discard(&old, tenancy.as_deref()).await;
                    return Ok(new);
                }
                _ => {
                    if tokio::time::timeout_at(deadline, freed).await.is_err() {
                        return Err(StartError::Busy {
                            limit: self.options.limit,
                            seconds: self.options.patience.as_secs(),
                        });
                    }
                }
            }
        }
    }

    /// Lets a busy sandbox serve `revision`, with one call on it.
    pub fn put_serving(
        self: &Arc<Self>,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        tenancy: String,
        address: SocketAddr,
        kind: StartKind,
        steps: Vec<Step>,
    ) -> Option<Guard> {
        let mut table = self.table();
        let entry = table.entries.get_mut(&sandbox.id)?;
        entry.address = Some(address);
        entry.served = None;
        let gone = entry.gone.clone();
        entry.state = State::Serving(Instance {
            revision: Arc::clone(revision),
            tenancy: tenancy.clone(),
            in_flight: 1,
            last_used: Instant::now(),
            broken: false,
            connections: Vec::new(),
        });
        drop(table);
        let concurrent = revision.concurrency() > 1;
        if concurrent {
            self.freed.notify_one();
        }
        Some(Guard {
            sandbox: sandbox.clone(),
            address,
            kind,
            steps,
            gone,
            tenancy,
            scheduler: Arc::clone(self),
            broken: false,
            connection: None,
        })
    }

    /// Adds a sandbox that an earlier provider left.
    pub fn adopt(
        &self,
        sandbox: &SandboxRef,
        address: SocketAddr,
        serving: Option<(Arc<Revision>, String)>,
    ) {
        let state = match serving {
            None => State::Idle {
                since: Instant::now(),
            },
            Some((revision, tenancy)) => State::Serving(Instance {
                revision,
                tenancy,
                in_flight: 0,
                last_used: Instant::now(),
                broken: false,
                connections: Vec::new(),
            }),
        };
        self.table().entries.insert(
            sandbox.id.clone(),
            Entry {
                namespace: sandbox.namespace.clone(),
                address: Some(address),
                state,
                served: None,
                gone: CancellationToken::new(),
            },
        );
        self.freed.notify_one();
    }

    /// Runs a function's process in a reserved sandbox; the sandbox stays busy.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn cold_start(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
    ) -> Result<ColdStart, StartError> {
        self.ops.cold_start(sandbox, revision).await
    }

    /// Notes where a busy sandbox is reached.
    pub fn set_sandbox_address(&self, sandbox: &SandboxRef, address: SocketAddr) {
        self.set_address(&sandbox.id, address);
    }

    pub(super) fn set_address(&self, id: &str, address: SocketAddr) {
        if let Some(entry) = self.table().entries.get_mut(id) {
            entry.address = Some(address);
        }
    }

    pub(super) fn address(&self, id: &str) -> Option<SocketAddr> {
        self.table().entries.get(id)?.address
    }

    /// The instances of a function.
    pub fn instances(&self, function: &FunctionName) -> Vec<InstanceView> {
        self.table()
            .serving()
            .filter(|(_, _, i)| i.revision.function() == function)
            .map(|(id, e, i)| InstanceView {
                sandbox: id.clone(),
                address: e.address,
                in_flight: i.in_flight,
            })
            .collect()
    }

    /// The sandboxes that are not being changed.
    pub fn settled(&self) -> Vec<SandboxRef> {
        let table = self.table();
        let settled = table
            .entries
            .iter()
            .filter(|(_, e)| !matches!(e.state, State::Busy));
        settled
            .map(|(id, e)| SandboxRef {
                namespace: e.namespace.clone(),
                id: id.clone(),
            })
            .collect()
    }

    /// Counts of sandboxes: idle, serving, all.
    pub fn counts(&self) -> (usize, usize, usize) {
        let table = self.table();
        (
            table.idle().count(),
            table.serving().count(),
            table.entries.len(),
        )
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
