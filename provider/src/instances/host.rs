//! Sandboxes on this host: containerd makes and ends them, the shim hands them over.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use trenv_sandbox_proto as proto;

use super::prepare::PrepareError;
use super::scheduler::micros;
use super::{ColdStart, ParkedStart, SandboxOps, SandboxRef, StartError, wait_ready};
use crate::containerd::{Containerd, ContainerdError, Mount, Namespaced, NewContainer};
use crate::functions::{Revision, Source, Spare, StartMethod, Template, next_tenancy, snapshot_of};
use crate::logs::Logs;
use crate::metrics::Metrics;
use crate::shim_client::{Reset, ShimClient, Step, wire_limits, wire_mounts};
use crate::spec::{self, FunctionSpec};

/// The port on which every function listens.
pub const FUNCTION_PORT: u16 = 8080;

/// The label of every container, snapshot and lease that the provider made.
pub const OWNER_LABEL: &str = "dev.trenv.provider";
const FUNCTION_LABEL: &str = "dev.trenv.function";
const TENANCY_LABEL: &str = "dev.trenv.tenancy";
const RUNTIME: &str = "io.containerd.trenv.v2";

/// Writable snapshots made ready for each revision.
const SPARES: usize = 2;
/// As many at most, with those that tenancies have left as they were; the shim mounts no more.
const SPARES_MAX: usize = 8;
/// How long work that only prepares the next start, or tells of the last one, lets the call that
/// caused it go first.
pub const HOUSEKEEPING_PAUSE: Duration = Duration::from_millis(20);
/// The step that stands for the way to the shim and back.
const CALL_STEP: &str = "call";
const KILL: i32 = 9;
const END_TIMEOUT: Duration = Duration::from_secs(10);
const FREE_TIMEOUT: Duration = Duration::from_secs(15);
const FREE_PAUSE: Duration = Duration::from_millis(100);

/// The host's side of sandboxes.
#[derive(Debug)]
pub struct Host {
    containerd: Containerd,
    shim_addresses: PathBuf,
    logs: Logs,
    ready_timeout: Duration,
    shims: Mutex<HashMap<String, ShimClient>>,
    records: Mutex<HashMap<String, Arc<RecordOrder>>>,
    metrics: Arc<Metrics>,
    /// By tenancy, the roots that may serve once more after it.
    lent: Mutex<HashMap<String, Lent>>,
}

/// The root of a tenancy that was started from a template.
#[derive(Debug)]
struct Lent {
    revision: Weak<Revision>,
    template: Template,
    mounts: Vec<Mount>,
}

/// Keeps the updates of one container's record in order, the newest last.
#[derive(Debug, Default)]
struct RecordOrder {
    newest: AtomicU64,
    turn: tokio::sync::Mutex<()>,
}

impl Host {
    /// A host that makes sandboxes through `containerd` and finds shims by the files in
    /// `shim_addresses`.
    pub fn new(
        containerd: Containerd,
        shim_addresses: PathBuf,
        logs: Logs,
        ready_timeout: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            containerd,
            shim_addresses,
            logs,
            ready_timeout,
            shims: Mutex::default(),
            records: Mutex::default(),
            metrics,
            lent: Mutex::default(),
        }
    }

    /// The shim's client for a namespace.
    pub fn shim(&self, namespace: &str) -> ShimClient {
        let mut shims = self.shims.lock().unwrap_or_else(|e| e.into_inner());
        let client = shims.entry(namespace.to_owned()).or_insert_with(|| {
            let file = self.shim_addresses.join(format!("{namespace}.address"));
            ShimClient::new(namespace, file)
        });
        client.clone()
    }

    /// Until when a function must be ready.
    pub fn ready_timeout(&self) -> Duration {
        self.ready_timeout
    }

    /// What functions say.
    pub fn logs(&self) -> &Logs {
        &self.logs
    }

    /// containerd's side of a namespace.
    pub fn namespace(&self, namespace: &str) -> Result<Namespaced, ContainerdError> {
        self.containerd.namespace(namespace)
    }

    async fn take_or_make_spare(&self, revision: &Revision) -> Result<Spare, ContainerdError> {
        match revision.take_spare() {
            Some(spare) => Ok(spare),
            None => make_spare(&self.containerd, revision).await,
        }
    }

    /// The address at which the sandbox's function listens, as the shim tells it.
    async fn sandbox_address(&self, sandbox: &SandboxRef) -> Result<SocketAddr, StartError> {
        let listed = self.shim(&sandbox.namespace).list().await;
        let sandboxes = listed.map_err(|err| failed(&sandbox.id, err))?;
        let info = sandboxes.into_iter().find(|s| s.id == sandbox.id);
        let info = info.ok_or_else(|| {
            failed(
                &sandbox.id,
                "the shim does not know the sandbox that it has just made",
            )
        })?;
        read_address(&info).ok_or_else(|| {
            failed(
                &sandbox.id,
                format!(
                    "the shim gave it the address {:?}, which is none",
                    info.address
                ),
            )
        })
    }

    /// Updates containerd's record of a sandbox after a change of tenancy.
    fn update_record(&self, sandbox: &SandboxRef, record: NewContainer) {
        let containerd = self.namespace(&sandbox.namespace);
        let order = {
            let mut orders = self.records.lock().unwrap_or_else(|e| e.into_inner());
            Arc::clone(orders.entry(sandbox.id.clone()).or_default())
        };
        let mine = order.newest.fetch_add(1, Ordering::AcqRel) + 1;
        tokio::spawn(async move {
            tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
            let _turn = order.turn.lock().await;
            // A later change of tenancy has its own update on the way.
            if order.newest.load(Ordering::Acquire) != mine {
                return;
            }
            let updated = match containerd {
                Ok(containerd) => containerd.update_container(record).await,
                Err(err) => Err(err),
            };
            // The sandbox may have ended meanwhile.
            if let Err(err) = updated
                && !err.is_not_found()
            {
                tracing::warn!("A container's record is out of date: {err}");
            }
        });
    }

    fn lent(&self) -> MutexGuard<'_, HashMap<String, Lent>> {
        self.lent.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The revision that can use the root once more.
    fn taker(lent: &Lent) -> Option<Arc<Revision>> {
        let revision = lent.revision.upgrade()?;
        let wanted = !revision.retired()
            && revision.spares() < SPARES_MAX
            && revision.template().as_ref() == Some(&lent.template);
        wanted.then_some(revision)
    }

    fn remove_snapshot_later(&self, namespace: &str, tenancy: &str) {
        let (containerd, key) = (self.namespace(namespace), snapshot_of(tenancy).to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
            remove_snapshot(containerd, &key).await;
        });
    }

    fn function_record(
        &self,
        sandbox: &SandboxRef,
        revision: &Revision,
        tenancy: &str,
        spec_json: Vec<u8>,
    ) -> NewContainer {
        let mut labels = owner_labels(revision);
        labels.insert(TENANCY_LABEL.to_owned(), tenancy.to_owned());
        NewContainer {
            id: sandbox.id.clone(),
            image: revision.record.image.name.clone(),
            runtime: RUNTIME.to_owned(),
            spec_json,
            snapshot_key: snapshot_of(tenancy).to_owned(),
            labels,
        }
    }

    /// The record of a sandbox without a function.
    pub fn idle_record(&self, sandbox: &SandboxRef) -> NewContainer {
        NewContainer {
            id: sandbox.id.clone(),
            image: String::new(),
            runtime: RUNTIME.to_owned(),
            spec_json: spec::idle_spec(&sandbox.id),
            snapshot_key: String::new(),
            labels: [(OWNER_LABEL.to_owned(), "idle".to_owned())].into(),
        }
    }

    /// Tells containerd that the sandbox has no function any more.
    pub fn record_idle(&self, sandbox: &SandboxRef) {
        self.update_record(sandbox, self.idle_record(sandbox));
    }

    async fn run_task(
        &self,
        sandbox: &SandboxRef,
        record: NewContainer,
        rootfs: &[Mount],
        steps: &mut Vec<Step>,
    ) -> Result<(), StartError> {
        let fail = |err: ContainerdError| failed(&sandbox.id, err);
        let output = format!("file://{}", self.logs.live(sandbox).display());
        let containerd = self.namespace(&sandbox.namespace).map_err(fail)?;
        let mut begun = Instant::now();
        let mut step = |name: &str, begun: &mut Instant| {
            steps.push((name.to_owned(), micros(begun.elapsed())));
            *begun = Instant::now();
        };
        containerd.create_container(record).await.map_err(fail)?;
        step("container", &mut begun);
        containerd
            .create_task(&sandbox.id, rootfs, &output)
            .await
            .map_err(fail)?;
        step("task", &mut begun);
        containerd.start_task(&sandbox.id).await.map_err(fail)?;
        step("start", &mut begun);
        Ok(())
    }

    /// Waits until the function is ready, or until its process ends.
    async fn ready(
        &self,
        sandbox: &SandboxRef,
        revision: &Revision,
        address: SocketAddr,
    ) -> Result<(), StartError> {
        let containerd = self
            .namespace(&sandbox.namespace)
            .map_err(|err| failed(&sandbox.id, err))?;
        let path = revision.record.ready_path.as_deref();
        let reason = tokio::select! {
            ready = wait_ready(address, path, self.ready_timeout) => match ready {
                Ok(_) => return Ok(()),
                Err(reason) => reason,
            },
            ended = containerd.wait_task(&sandbox.id) => match ended {
                Ok(status) => format!("its process ended with status {status} before it was ready"),
                Err(err) => format!("{err}"),
            },
        };
        let said = self.logs.last_words(sandbox);
        Err(failed(
            &revision.record.function.to_string(),
            match said {
                Some(said) => format!("{reason}; it last said: {said}"),
                None => reason,
            },
        ))
    }

    /// Starts a tenancy from a template for a call of an input; parks it if there is no call.
    pub(super) async fn restore(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        source: &Source,
        input: Option<&str>,
    ) -> Result<(ParkedStart, Vec<Step>), StartError> {
        let record = &revision.record;
        let name = record.function.to_string();
        let begun = Instant::now();
        self.ensure_prepared(source)
            .await
            .map_err(|err| err.into_start(&name))?;
        let Spare {
            tenancy,
            mounts,
            spec,
        } = self
            .take_or_make_spare(revision)
            .await
            .map_err(|err| failed(&name, err))?;
        let mut steps = vec![("snapshot".to_owned(), micros(begun.elapsed()))];
        let spec_json = spec.in_sandbox(&sandbox.id);
        let mut request = proto::RepurposeRequest::new();
        request.sandbox_id = sandbox.id.clone();
        request.tenancy = tenancy.clone();
        request.rootfs = wire_mounts(&mounts);
        request.template_id = source.template.id.clone();
        request.generation = source.template.generation;
        request.limits = Some(wire_limits(record.limits)).into();
        request.hostname = sandbox.id.clone();
        request.mounts = wire_mounts(&revision.binds);
        request.read_only_rootfs = record.read_only;
        request.spec_json = String::from_utf8_lossy(&spec_json).into_owned();
        request.method = source.method.name().to_owned();
        request.park = input.is_none();
        request.input = input.unwrap_or_default().to_owned();
        let begun = Instant::now();
        let answer = self.shim(&sandbox.namespace).repurpose(request).await;
        let called = micros(begun.elapsed());
        match answer {
            Ok(taken) => {
                steps.extend(taken_by_call(taken, called));
                let lent = Lent {
                    revision: Arc::downgrade(revision),
                    template: source.template.clone(),
                    mounts,
                };
                // One that started from its base's template is not staged.
                if Self::taker(&lent).is_some() {
                    self.lent().insert(tenancy.clone(), lent);
                }
                refill_spares(self, revision);
                let spec = spec_json;
                Ok((ParkedStart { tenancy, spec }, steps))
            }
            Err(err) => {
                self.destroy(sandbox, Some(&tenancy)).await;
                Err(PrepareError::Shim(err).into_start(&name))
            }
        }
    }

    /// Lets the container's record tell of a tenancy that serves from now on.
    pub(super) fn record_serving(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        start: ParkedStart,
    ) {
        let record = self.function_record(sandbox, revision, &start.tenancy, start.spec);
        self.update_record(sandbox, record);
    }

    async fn free(
        &self,
        sandbox: &SandboxRef,
        tenancy: Option<&str>,
    ) -> Result<(), ContainerdError> {
        let containerd = self.namespace(&sandbox.namespace)?;
        self.end_task(&containerd, &sandbox.id).await?;
        containerd.delete_container(&sandbox.id).await?;
        match tenancy {
            Some(tenancy) => containerd.remove_snapshot(snapshot_of(tenancy)).await,
            None => Ok(()),
        }
    }

    async fn end_task(&self, containerd: &Namespaced, id: &str) -> Result<(), ContainerdError> {
        containerd.kill_task(id, KILL).await?;
        match tokio::time::timeout(END_TIMEOUT, containerd.wait_task(id)).await {
            Ok(Err(err)) if !err.is_not_found() => return Err(err),
            Ok(_) => {}
            Err(_) => tracing::warn!("The task of {id} did not end in time"),
        }
        containerd.delete_task(id).await
    }
}

#[async_trait]
impl SandboxOps for Host {
    async fn create_idle(&self, sandbox: &SandboxRef) -> Result<SocketAddr, StartError> {
        self.run_task(sandbox, self.idle_record(sandbox), &[], &mut Vec::new())
            .await?;
        self.sandbox_address(sandbox).await
    }

    async fn cold_start(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
    ) -> Result<ColdStart, StartError> {
        let name = revision.record.function.to_string();
        let begun = Instant::now();
        let Spare {
            tenancy,
            mounts,
            spec,
        } = make_spare(&self.containerd, revision)
            .await
            .map_err(|err| failed(&name, err))?;
        let mut steps = vec![("snapshot".to_owned(), micros(begun.elapsed()))];
        let spec_json = spec.in_sandbox(&sandbox.id);
        let record = self.function_record(sandbox, revision, &tenancy, spec_json);
        let run = async {
            self.run_task(sandbox, record, &mounts, &mut steps).await?;
            let address = self.sandbox_address(sandbox).await?;
            let begun = Instant::now();
            self.ready(sandbox, revision, address).await?;
            steps.push(("ready".to_owned(), micros(begun.elapsed())));
            Ok(address)
        };
        match run.await {
            Ok(address) => Ok(ColdStart {
                address,
                tenancy,
                steps,
            }),
            Err(err) => {
                self.destroy(sandbox, Some(&tenancy)).await;
                Err(err)
            }
        }
    }

    async fn repurpose(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        template: &Template,
        input: &str,
    ) -> Result<(String, Vec<Step>), StartError> {
        // An update may change the method meanwhile; this start keeps the one that it began with.
        let source = Source::of(revision, template, revision.methods.now());
        let (start, steps) = self
            .restore(sandbox, revision, &source, Some(input))
            .await?;
        let tenancy = start.tenancy.clone();
        self.record_serving(sandbox, revision, start);
        Ok((tenancy, steps))
    }

    async fn park(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        template: &Template,
    ) -> Result<ParkedStart, StartError> {
        let source = Source::of(revision, template, StartMethod::Template);
        let (start, _) = self.restore(sandbox, revision, &source, None).await?;
        Ok(start)
    }

    async fn resume(
        &self,
        sandbox: &SandboxRef,
        revision: &Arc<Revision>,
        start: ParkedStart,
    ) -> Result<Vec<Step>, StartError> {
        let begun = Instant::now();
        let shim = self.shim(&sandbox.namespace);
        let steps = shim
            .resume(&sandbox.id, &start.tenancy)
            .await
            .map_err(|err| failed(&revision.record.function.to_string(), err))?;
        self.record_serving(sandbox, revision, start);
        Ok(taken_by_call(steps, micros(begun.elapsed())))
    }

    async fn reset(
        &self,
        sandbox: &SandboxRef,
        tenancy: &str,
        served: Option<&str>,
    ) -> Result<Vec<Step>, StartError> {
        let lent = self.lent().remove(tenancy);
        let taker = lent.as_ref().and_then(Self::taker);
        let begun = Instant::now();
        let Reset {
            steps,
            learnt,
            root_kept,
        } = self
            .shim(&sandbox.namespace)
            .reset(&sandbox.id, served, taker.is_some())
            .await
            .map_err(|err| failed(&sandbox.id, err))?;
        if let Some(learnt) = learnt {
            let function = format!("{}.{}", function_of(tenancy), sandbox.namespace);
            self.metrics.learnt(&function, learnt);
        }
        let steps = taken_by_call(steps, micros(begun.elapsed()));
        self.record_idle(sandbox);
        self.logs.end_tenancy(sandbox, function_of(tenancy));
        match lent.zip(taker).filter(|_| root_kept) {
            Some((lent, revision)) if Self::taker(&lent).is_some() => {
                let next = next_tenancy(tenancy);
                revision.add_spare(spare(&revision, next, lent.mounts));
            }
            // Nothing holds the old root file system any more.
            _ => self.remove_snapshot_later(&sandbox.namespace, tenancy),
        }
        Ok(steps)
    }

    async fn destroy(&self, sandbox: &SandboxRef, tenancy: Option<&str>) {
        self.records
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(&sandbox.id);
        let begun = Instant::now();
        // A shim that has just died leaves containerd a moment in which it refuses everything
        // about its tasks.
        while let Err(err) = self.free(sandbox, tenancy).await {
            if begun.elapsed() > FREE_TIMEOUT {
                tracing::warn!("The sandbox {} was not freed wholly: {err}", sandbox.id);
                break;
            }
            tokio::time::sleep(FREE_PAUSE).await;
        }
        if let Some(tenancy) = tenancy {
            self.lent().remove(tenancy);
            self.logs.end_tenancy(sandbox, function_of(tenancy));
        }
        self.logs.remove(sandbox);
    }
}

/// Makes a writable snapshot for a tenancy to come, held by the revision's lease.
///
/// # Errors
/// When containerd refuses.
pub async fn make_spare(
    containerd: &Containerd,
    revision: &Revision,
) -> Result<Spare, ContainerdError> {
    let record = &revision.record;
    let parent = match revision.template() {
        Some(template) => template.layer,
        None => record.image.chain_id.clone(),
    };
    let tenancy = revision.new_tenancy();
    let mounts = containerd
        .namespace(&record.function.namespace)?
        .prepare_snapshot(&record.lease, &tenancy, &parent, owner_labels(revision))
        .await?;
    Ok(spare(revision, tenancy, mounts))
}

fn spare(revision: &Revision, tenancy: String, mounts: Vec<Mount>) -> Spare {
    let record = &revision.record;
    let spec = spec::function_spec(&FunctionSpec {
        function: &record.function.name,
        tenancy: &tenancy,
        process: &record.process,
        limits: record.limits,
        read_only: record.read_only,
        binds: &revision.binds,
    });
    Spare {
        tenancy,
        mounts,
        spec,
    }
}

/// Tops up the snapshots made ahead of a revision with a template, off the call's path.
pub fn refill_spares(host: &Host, revision: &Arc<Revision>) {
    let Some(template) = revision.template() else {
        return;
    };
    if revision.spares() >= SPARES || revision.retired() {
        return;
    }
    let source = Source::of(revision, &template, revision.methods.now()).template;
    let (containerd, revision) = (host.containerd.clone(), Arc::clone(revision));
    let shim = host.shim(&revision.record.function.namespace);
    tokio::spawn(async move {
        if revision.spares() > 0 {
            tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
        }
        while revision.spares() < SPARES && !revision.retired() {
            match make_spare(&containerd, &revision).await {
                Ok(spare) if revision.retired() => {
                    // It was made while the revision was retired.
                    let containerd = containerd.namespace(&revision.record.function.namespace);
                    remove_snapshot(containerd, snapshot_of(&spare.tenancy)).await;
                }
                Ok(spare) => {
                    // A root that is not mounted ahead is mounted at the start.
                    if let Err(err) = shim
                        .stage(&source.id, source.generation, &spare.mounts)
                        .await
                    {
                        tracing::debug!("No root was mounted ahead: {err}");
                    }
                    revision.add_spare(spare);
                }
                Err(err) => {
                    tracing::warn!("No snapshot was made ahead: {err}");
                    return;
                }
            }
        }
    });
}

async fn remove_snapshot(containerd: Result<Namespaced, ContainerdError>, key: &str) {
    let removed = match containerd {
        Ok(containerd) => containerd.remove_snapshot(key).await,
        Err(err) => Err(err),
    };
    if let Err(err) = removed {
        tracing::warn!("A snapshot stays behind until the provider starts again: {err}");
    }
}

/// The shim's steps, and what its call took besides. A name with a dot is a part of another step.
fn taken_by_call(mut steps: Vec<Step>, called: u64) -> Vec<Step> {
    let whole = steps.iter().filter(|(name, _)| !name.contains('.'));
    let inside: u64 = whole.map(|(_, micros)| micros).sum();
    let outside = called.saturating_sub(inside);
    match steps.iter_mut().find(|(name, _)| name == CALL_STEP) {
        Some((_, micros)) => *micros += outside,
        None => steps.push((CALL_STEP.to_owned(), outside)),
    }
    steps
}

/// The function that a tenancy's id names: NAME-REVISION-UNIQUE.
fn function_of(tenancy: &str) -> &str {
    tenancy.rsplitn(3, '-').nth(2).unwrap_or(tenancy)
}

/// The labels of what belongs to a revision.
pub fn owner_labels(revision: &Revision) -> HashMap<String, String> {
    [
        (OWNER_LABEL.to_owned(), revision.record.id.clone()),
        (
            FUNCTION_LABEL.to_owned(),
            revision.record.function.name.clone(),
        ),
    ]
    .into()
}

/// The address in a shim's description of a sandbox.
pub fn read_address(info: &proto::SandboxInfo) -> Option<SocketAddr> {
    let ip: IpAddr = info.address.parse().ok()?;
    Some(SocketAddr::new(ip, FUNCTION_PORT))
}

pub(super) fn failed(function: &str, reason: impl std::fmt::Display) -> StartError {
    StartError::Start {
        function: function.to_owned(),
        reason: reason.to_string(),
    }
}
