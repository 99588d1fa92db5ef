//! What `trenv.sandbox.v1` does to a sandbox: reset, repurpose, snapshot, each step timed.
//!
//! A step's name with a dot ("rootfs.pivot") is a part of the one before it without.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use trenv_sandbox::Rootfs;
use trenv_sandbox::rootfs::{KeptRoot, Mount, sync_upper};
use trenv_sandbox_proto as proto;
use trenv_snapshot::layer::{LayerMount, layer_digest};
use trenv_snapshot::recording::Recorded;
use trenv_snapshot::zygote::{Parked, StartRequest, Started, ZygoteError};

use super::container::SandboxContainer;
use super::plan::Plan;
use super::tenancy::{Root, Seat, TemplateRef, Tenancy, identify};
use crate::error::{Result, ShimError};
use crate::reap::Exit;
use crate::runc::blocking;
use crate::stdio::{self, Overflow, ProcessEnds};
use crate::template::{Claim, TenancyRoot, start_error};

/// How long what only prepares the next start, or tells of the last one, lets the call that caused it
/// go first.
pub const HOUSEKEEPING_PAUSE: Duration = Duration::from_millis(20);
const STREAMS_LIMIT: Duration = Duration::from_secs(2);

/// Timed parts of a step.
type Parts = Vec<(&'static str, Duration)>;

/// Timed steps, in order.
#[derive(Debug, Default)]
pub struct Steps(Vec<proto::Step>);

impl Steps {
    /// Runs a step and notes how long it took.
    fn time<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let begun = Instant::now();
        let result = step();
        self.add(name, begun.elapsed());
        result
    }

    fn add(&mut self, name: &str, took: Duration) {
        self.0.push(proto::Step {
            name: name.to_owned(),
            microseconds: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            ..proto::Step::default()
        });
    }

    fn parts<'a>(&mut self, of: &str, parts: impl IntoIterator<Item = (&'a str, Duration)>) {
        for (name, took) in parts {
            self.add(&format!("{of}.{name}"), took);
        }
    }

    /// The steps as the protocol has them.
    pub fn into_proto(self) -> Vec<proto::Step> {
        self.0
    }
}

/// What lets a parked tenancy go on.
pub struct Held {
    parked: Parked,
    plan: Arc<Plan>,
}

/// How a tenancy ends.
#[derive(Debug, Clone, Default)]
pub struct End {
    /// The input of the calls that it has served, if any, from which the zygote learns.
    pub served: Option<String>,
    /// Its root is kept for another tenancy, if nothing was written to it.
    pub keep_root: bool,
}

/// What the end of a tenancy came to.
#[derive(Debug)]
pub struct Ended {
    /// What is known of the pages that its input needs.
    pub learnt: Option<Recorded>,
    /// Whether its root is staged again.
    pub root_kept: bool,
}

/// A start that failed.
enum Failed {
    /// Nothing has been changed yet.
    Before(ShimError),
    /// The sandbox is half a function's.
    Within(ShimError),
}

impl SandboxContainer {
    /// Ends the tenancy: Ready, Resetting, Idle.
    pub async fn reset(self: &Arc<Self>, end: End) -> Result<(Steps, Ended)> {
        let from = match self.lock().phase {
            proto::State::PARKED => proto::State::PARKED,
            _ => proto::State::READY,
        };
        self.claim("reset", from, proto::State::RESETTING)?;
        let tenancy = {
            let mut state = self.lock();
            state.parked = None;
            state.tenancy.take()
        };
        let mut steps = Steps::default();
        match self.end_tenancy(tenancy, end, &mut steps).await {
            Ok(ended) => {
                self.settle(proto::State::IDLE, "the tenancy was ended", |_| {})?;
                Ok((steps, ended))
            }
            Err(err) => {
                self.die(Exit::now(137), "the reset failed").await;
                Err(err)
            }
        }
    }

    /// Starts a tenancy from a template: Idle, Restoring, Ready.
    pub async fn repurpose(
        self: &Arc<Self>,
        request: proto::RepurposeRequest,
    ) -> Result<proto::RepurposeResponse> {
        let plan = Arc::new(Plan::of(request)?);
        self.claim("repurpose", proto::State::IDLE, proto::State::RESTORING)?;
        let mut steps = Steps::default();
        match self.restore(&plan, &mut steps).await {
            Ok((template, pids)) => {
                if plan.park {
                    self.refill_later(template);
                } else {
                    self.after_start(template, plan);
                }
                Ok(proto::RepurposeResponse {
                    steps: steps.into_proto(),
                    pids: pids.into_iter().map(i32::cast_unsigned).collect(),
                    ..proto::RepurposeResponse::default()
                })
            }
            Err(Failed::Before(err)) => {
                self.settle(proto::State::IDLE, "nothing to start from", |_| {})?;
                Err(err)
            }
            Err(Failed::Within(err)) => {
                self.die(Exit::now(137), "the restore failed").await;
                Err(err)
            }
        }
    }

    /// Writes the function's template and ends the tenancy, or leaves it running where there is a copy
    /// of its root to be made; a refused dump leaves it running too.
    pub async fn snapshot(
        self: &Arc<Self>,
        key: String,
        copy: Vec<Mount>,
        criu: bool,
    ) -> Result<proto::SnapshotResponse> {
        if key.is_empty() {
            return Err(ShimError::InvalidArgument(
                "A snapshot needs the template's key".into(),
            ));
        }
        if let Some(capability) = self.lock().unfit {
            return Err(ShimError::Unimplemented(format!(
                "The function cannot be snapshotted: it has {capability}, so its sandbox must end \
                 with it"
            )));
        }
        self.claim("snapshot", proto::State::READY, proto::State::RESETTING)?;
        let _starting = self.starting();
        let tenancy = self
            .lock()
            .tenancy
            .take()
            .ok_or_else(|| ShimError::Fault("a running sandbox has no tenancy".into()))?;
        let mut steps = Steps::default();
        let begun = Instant::now();
        let this = Arc::clone(self);
        let to = copy.clone();
        let (tenancy, dumped) = blocking(move || {
            let templates = &this.all.templates;
            let dumped = templates.dump(&key, &this.sandbox, &tenancy, &to, criu);
            Ok((tenancy, dumped))
        })
        .await?;
        let dumped = match dumped {
            Ok(dumped) => dumped,
            Err(err) => {
                self.settle_tenancy(tenancy, None, "the snapshot was refused")?;
                return Err(err);
            }
        };
        steps.add("dump", begun.elapsed());
        steps.parts("dump", dumped.steps.iter().copied());
        let files_digest = if copy.is_empty() {
            let mounts = tenancy.mounts.clone();
            let written = self.write_through(mounts.clone(), &mut steps).await;
            let ended = match written {
                Ok(()) => {
                    let end = End::default();
                    self.end_tenancy(Some(tenancy), end, &mut steps).await
                }
                Err(err) => Err(err),
            };
            if let Err(err) = ended {
                self.die(Exit::now(137), "the end after the snapshot failed")
                    .await;
                return Err(err);
            }
            // Before another tenancy can come, and after everybody who could write has gone.
            let digest = Self::files_digest(mounts, &mut steps).await;
            self.settle(proto::State::IDLE, "the function was snapshotted", |_| {})?;
            digest
        } else {
            self.settle_tenancy(tenancy, None, "the function was snapshotted and goes on")?;
            self.write_through(copy.clone(), &mut steps).await?;
            Self::files_digest(copy, &mut steps).await
        };
        Ok(proto::SnapshotResponse {
            template_id: dumped.template.id.to_string(),
            generation: dumped.template.generation,
            image_bytes: dumped.image_bytes,
            stored_bytes: dumped.template.stored_pages * trenv_pool::PAGE_SIZE as u64,
            processes: u32::try_from(dumped.processes).unwrap_or(u32::MAX),
            threads: u32::try_from(dumped.threads).unwrap_or(u32::MAX),
            steps: steps.into_proto(),
            notes: dumped.notes,
            files_digest,
            ..proto::SnapshotResponse::default()
        })
    }

    /// The upper layer belongs to the template, so it must be as durable.
    async fn write_through(&self, mounts: Vec<Mount>, steps: &mut Steps) -> Result<()> {
        let begun = Instant::now();
        blocking(move || {
            sync_upper(&mounts).map_err(ShimError::engine("write the upper layer through"))
        })
        .await?;
        steps.add("sync", begun.elapsed());
        Ok(())
    }

    /// By which the upper layer is known again; empty where it cannot be read whole.
    async fn files_digest(mounts: Vec<Mount>, steps: &mut Steps) -> String {
        let begun = Instant::now();
        let mounts: Vec<LayerMount> = mounts
            .into_iter()
            .map(|mount| LayerMount {
                kind: mount.kind,
                source: mount.source,
                options: mount.options,
            })
            .collect();
        let digest = blocking(move || {
            layer_digest(&mounts).map_err(ShimError::engine("read the upper layer"))
        });
        let digest = digest.await.unwrap_or_else(|err| {
            tracing::warn!("The files of a snapshot have no digest: {}", err.chain());
            String::new()
        });
        steps.add("digest", begun.elapsed());
        digest
    }

    /// Kills what is left of a tenancy and purges the sandbox.
    async fn end_tenancy(
        self: &Arc<Self>,
        tenancy: Option<Tenancy>,
        end: End,
        steps: &mut Steps,
    ) -> Result<Ended> {
        let this = Arc::clone(self);
        let mut timed = std::mem::take(steps);
        let (timed, seat, ended) = blocking(move || {
            let templates = &this.all.templates;
            let learnt = match (&tenancy, end.served) {
                (Some(tenancy), Some(input)) => templates.learn(tenancy, &input),
                _ => None,
            };
            let (seat, root) = match tenancy {
                Some(tenancy) => {
                    let template = tenancy.seat.template;
                    let root = template.zip(tenancy.kept_root);
                    (
                        Some(tenancy.seat),
                        root.map(|(template, kept)| (template, tenancy.mounts, kept)),
                    )
                }
                None => (None, None),
            };
            timed.time("kill", || {
                seat.as_ref().map_or(Ok(()), |seat| seat.kill_all())
            })?;
            let parts = timed.time("purge", || {
                this.sandbox
                    .purge()
                    .map_err(ShimError::engine("purge the sandbox"))
            })?;
            timed.parts("purge", parts.iter().map(|step| (step.name, step.took)));
            let root_kept = match root.filter(|_| end.keep_root) {
                Some((template, mounts, kept)) => templates.stage_again(template, mounts, kept),
                None => false,
            };
            Ok((timed, seat, Ended { learnt, root_kept }))
        })
        .await?;
        *steps = timed;
        if let Some(seat) = seat {
            self.lock().seats.retain(|kept| !Arc::ptr_eq(kept, &seat));
            let this = Arc::clone(self);
            // The next tenancy has a seat of its own.
            after_the_call(move || {
                if let Err(err) = this.all.templates.give_back(seat) {
                    tracing::warn!(
                        "A tenancy's cgroup stays until the next sweep: {}",
                        err.chain()
                    );
                }
            });
        }
        self.first.leave_streams(STREAMS_LIMIT);
        match self.lock().unfit {
            None => Ok(ended),
            Some(capability) => Err(ShimError::WrongState {
                action: "use again",
                id: self.id.clone(),
                state: format!("unfit: a process in it had {capability}"),
            }),
        }
    }

    async fn restore(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        steps: &mut Steps,
    ) -> std::result::Result<(Option<TemplateRef>, Vec<i32>), Failed> {
        let until = Instant::now() + plan.deadline;
        let begun = Instant::now();
        let uris = self.all.function_uris(&self.id, &self.first.uris);
        let (ends, streams) = stdio::pipes(&uris, &self.owner, Overflow::Drop)
            .await
            .map_err(Failed::Before)?;
        steps.add("streams", begun.elapsed());
        let _starting = self.starting();
        // Here and now: another thread would have to be woken, and would wake this one in the end.
        let (done, tenancy, parked) =
            tokio::task::block_in_place(|| self.restore_here(plan, &ends, until))?;
        drop(ends);
        steps.0.extend(done.0);
        self.first.connect(streams, None);
        let (template, pids) = (tenancy.seat.template, tenancy.restored.clone());
        let reason = match parked {
            Some(_) => "the function was parked",
            None => "the function was started from its template",
        };
        let plan = Arc::clone(plan);
        let held = parked.map(|parked| Held { parked, plan });
        self.settle_tenancy(tenancy, held, reason)
            .map_err(Failed::Within)?;
        Ok((template, pids))
    }

    /// The part of a start that blocks: seat, root, processes.
    fn restore_here(
        &self,
        plan: &Plan,
        ends: &ProcessEnds,
        until: Instant,
    ) -> std::result::Result<(Steps, Tenancy, Option<Parked>), Failed> {
        let mut steps = Steps::default();
        let (seat, _claim) = steps
            .time("cgroup", || self.seat_for(plan))
            .map_err(Failed::Before)?;
        self.lock().seats.push(Arc::clone(&seat));
        let (kept_root, parts) = steps
            .time("rootfs", || self.enter(plan))
            .map_err(Failed::Within)?;
        steps.parts("rootfs", parts);
        let (root, started, parked) = steps
            .time("restore", || {
                let (started, parked) = self.start_tree(plan, &seat, ends, until)?;
                Ok((Root::of_started(&started)?, started, parked))
            })
            .map_err(Failed::Within)?;
        steps.parts("restore", started.steps.iter().copied());
        let tenancy = Tenancy {
            id: plan.tenancy.clone(),
            seat,
            root,
            stdio: identify(&ends.0),
            mounts: plan.rootfs.clone(),
            kept_root,
            seccomp: plan.seccomp.clone(),
            restored: started.pids,
        };
        Ok((steps, tenancy, parked))
    }

    fn seat_for(&self, plan: &Plan) -> Result<(Arc<Seat>, Claim)> {
        let templates = &self.all.templates;
        let template = templates.resolve(plan.template)?;
        let (seat, prepared, claim) = templates.seat(template, &plan.rootfs, &plan.limits)?;
        if !prepared {
            tracing::info!("No clone of {} waits: one is made now", template.id);
        }
        Ok((seat, claim))
    }

    fn enter(&self, plan: &Plan) -> Result<(Option<KeptRoot>, Parts)> {
        let begun = Instant::now();
        let TenancyRoot { mount, kept } = self.all.templates.root(&plan.rootfs)?;
        let root = Rootfs {
            overlay: mount,
            parts: plan.root.parts()?,
            read_only: plan.root.read_only,
            hostname: plan.root.hostname.clone(),
            masked_paths: plan.root.masked_paths.clone(),
            readonly_paths: plan.root.readonly_paths.clone(),
        };
        let mut parts = vec![("mount", begun.elapsed())];
        let entered = self
            .sandbox
            .enter_rootfs(&root)
            .map_err(ShimError::engine("enter the root"))?;
        parts.extend(entered.iter().map(|step| (step.name, step.took)));
        Ok((kept, parts))
    }

    fn start_tree(
        &self,
        plan: &Plan,
        seat: &Seat,
        ends: &ProcessEnds,
        until: Instant,
    ) -> Result<(Started, Option<Parked>)> {
        let [input, output, error] = &ends.0;
        let deadline = until.saturating_duration_since(Instant::now());
        if deadline.is_zero() {
            return Err(start_error(ZygoteError::Deadline(plan.deadline)));
        }
        let request = StartRequest {
            init: self.sandbox.init_pidfd(),
            stdio: [input.as_fd(), output.as_fd(), error.as_fd()],
            input: &plan.input,
            deadline,
        };
        if !plan.park {
            return seat.start(&request).map(|started| (started, None));
        }
        let parked = seat.take_clone()?.park(&request).map_err(start_error)?;
        Ok((parked.0, Some(parked.1)))
    }

    /// Lets a parked tenancy go on: Parked, Ready.
    pub async fn resume(self: &Arc<Self>, tenancy: &str) -> Result<Steps> {
        let begun = Instant::now();
        let there = {
            let state = self.lock();
            let there = state.tenancy.as_ref();
            there.is_some_and(|there| there.id == tenancy)
        };
        if !there {
            return Err(ShimError::NotFound {
                kind: "parked tenancy",
                id: tenancy.to_owned(),
            });
        }
        self.claim("resume", proto::State::PARKED, proto::State::RESTORING)?;
        let (held, template) = {
            let mut state = self.lock();
            let template = state.tenancy.as_ref().and_then(|one| one.seat.template);
            (state.parked.take(), template)
        };
        let resumed = match held {
            Some(held) => held
                .parked
                .resume()
                .map_err(start_error)
                .map(|()| held.plan),
            None => Err(ShimError::Fault("a parked sandbox holds nothing".into())),
        };
        match resumed {
            Ok(plan) => {
                self.settle(proto::State::READY, "the parked function goes on", |_| {})?;
                let mut steps = Steps::default();
                steps.add("resume", begun.elapsed());
                self.after_start(template, plan);
                Ok(steps)
            }
            Err(err) => {
                self.die(Exit::now(137), "the parked function is gone")
                    .await;
                Err(err)
            }
        }
    }

    /// What need not be done before the answer.
    fn after_start(self: &Arc<Self>, template: Option<TemplateRef>, plan: Arc<Plan>) {
        let this = Arc::clone(self);
        after_the_call(move || {
            // A later tenancy tells of itself.
            let current = this.lock().tenancy.as_ref().map(|one| one.id.clone());
            if !plan.spec_json.is_empty() && current.as_ref() == Some(&plan.tenancy) {
                let path = this.bundle.join("config.json");
                let new = this.bundle.join("config.json.new");
                let done = std::fs::write(&new, &plan.spec_json)
                    .and_then(|()| std::fs::rename(&new, &path));
                if let Err(err) = done {
                    tracing::warn!("{} tells the last tenancy's spec: {err}", path.display());
                }
            }
            this.refill(template);
        });
    }

    fn refill_later(self: &Arc<Self>, template: Option<TemplateRef>) {
        let this = Arc::clone(self);
        after_the_call(move || this.refill(template));
    }

    fn refill(&self, template: Option<TemplateRef>) {
        let Some(template) = template else { return };
        if let Err(err) = self.all.templates.refill(template) {
            tracing::warn!(
                "The next start of {} has no seat ready: {}",
                template.id,
                err.chain()
            );
        }
    }
}

/// Runs what only prepares the next start, or tells of the last one: the call that caused it goes
/// first.
fn after_the_call(work: impl FnOnce() + Send + 'static) {
    tokio::spawn(async {
        tokio::time::sleep(HOUSEKEEPING_PAUSE).await;
        tokio::task::spawn_blocking(work).await
    });
}
